"""An application that serves HTTP by itself: counts the calls of each path for as long as it lives."""

import collections
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

counts: collections.Counter[str] = collections.Counter()


class Handler(BaseHTTPRequestHandler):
    """Answers any GET or POST."""

    protocol_version = "HTTP/1.1"  # connections are kept, which spares the watchdog a new one for each request

    def do_GET(self) -> None:
        """Count the path, and say how often it was asked for."""
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        counts[self.path] += 1
        body = f"{self.path} was called {counts[self.path]} times\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
