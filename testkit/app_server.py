"""A function that is a server of its own, for mode=http; what it does is in the path of a request.

PORT=5000 python -S -E -I app_server.py [WAIT_S]          # listens after so many seconds, "never" for never

/echo            all of the request as JSON, its body as text
/status/N        that status, no body
/pid             its process number
/dated           a Date of long ago
/stream          a chunk at once, then one for each line of the request's body, as it comes
/zeros/N         N bytes, as fast as they are read
/hang            never an answer
/cut             half an answer, and the end of the connection
/nothing         the end of the connection, without an answer
/half            a chunk, then nothing any more
/exit/N          ends with that status, without an answer
/daemon          starts a process that leaves its session and its parent, and sleeps
/child           starts a child that sleeps
/zombie          leaves an orphan that ends at once
/print/TEXT      prints TEXT on stdout, and TEXT in upper case on stderr
any, with `Upgrade: echo`      101, and then what it is sent; `quit` has it close
/as/NAME, with that            ... whose Upgrade is NAME, or missing; as/NAME/NAME has two such fields
/deaf, with that               101, and then it reads nothing
/talks, with that              101, and after what it is sent first zeros as fast as they are taken
/ends-first, with that         101, and the end of its side; what it is sent it prints on stdout
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from typing import cast

SLEEP = ["sleep", "60"]
DATE = "Tue, 14 Nov 2023 22:14:20 GMT"


class Handler(BaseHTTPRequestHandler):
    """Does what the path says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Log nothing."""

    def do_any(self) -> None:
        """Answer any method."""
        words = self.path.partition("?")[0].strip("/").split("/")
        if "echo" in self.headers.get("Upgrade", ""):
            self.switch(*words)
            return
        getattr(self, f"on_{words[0]}", self.on_echo)(*words[1:])

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_PROPFIND = do_any

    def answer(self, body: bytes, status: int = 200) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def pieces(self) -> Iterator[bytes]:
        """Yield the request's body as it comes."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", "0"))
            while left:
                piece = self.rfile.read1(left)
                left -= len(piece)
                yield piece

    def on_echo(self, *_: str) -> None:
        body = b"".join(self.pieces())
        known = {"method": self.command, "target": self.path, "headers": self.headers.items()}
        self.answer(json.dumps({**known, "length": len(body), "body": body[:1000].decode("latin-1")}).encode())

    def on_status(self, number: str) -> None:
        self.answer(b"", int(number))

    def on_pid(self) -> None:
        self.answer(str(os.getpid()).encode())

    def on_dated(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", DATE)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def begin_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_stream(self) -> None:
        self.begin_chunks()
        self.chunk(b"begin\n")
        for piece in self.pieces():
            self.chunk(piece)
        self.chunk(b"")

    def on_zeros(self, count: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", count)
        self.end_headers()
        left, piece = int(count), bytes(1 << 20)
        while left:
            self.wfile.write(piece[:left])
            left -= min(left, len(piece))

    def on_hang(self) -> None:
        time.sleep(60)

    def on_half(self) -> None:
        self.begin_chunks()
        self.chunk(b"half\n")
        while self.connection.recv(1, socket.MSG_PEEK):
            time.sleep(60)
        print("the other end has gone", flush=True)

    def on_cut(self) -> None:
        self.begin_chunks()
        self.chunk(b"half\n")
        self.close_connection = True

    def on_nothing(self) -> None:
        self.close_connection = True

    def on_exit(self, status: str) -> None:
        print("about to exit", flush=True)
        os._exit(int(status))

    def on_daemon(self) -> None:
        subprocess.run(["setsid", "-f", *SLEEP], check=True)
        self.answer(b"")

    def on_child(self) -> None:
        subprocess.Popen(SLEEP)
        self.answer(b"")

    def on_zombie(self) -> None:
        subprocess.run(["sh", "-c", "sleep 0 & exec true"], check=True)
        self.answer(b"")

    def on_print(self, text: str) -> None:
        print(text, flush=True)
        print(text.upper(), file=sys.stderr, flush=True)
        self.answer(b"")

    def switch(self, what: str, *names: str) -> None:
        """Speak the protocol that sends back what it gets, or one that is worse."""
        self.send_response_only(101)
        self.send_header("Connection", "Upgrade")
        for name in names if what == "as" else ("echo",):
            self.send_header("Upgrade", name)
        self.send_header("X-A", "b")
        self.end_headers()
        self.close_connection = True
        if what == "deaf":
            time.sleep(60)
        while what == "talks" and cast(BufferedReader, self.rfile).peek(1):
            self.wfile.write(bytes(65536))
        if what == "ends-first":
            self.connection.shutdown(socket.SHUT_WR)
        while data := self.rfile.read1(65536):
            if data == b"quit":
                return
            if what == "ends-first":
                print(data.decode(), flush=True)
            else:
                self.wfile.write(data)
        if what != "ends-first":
            self.wfile.write(b"bye")


def main(wait: str = "0") -> None:
    """Serve for ever."""
    if wait == "never":
        time.sleep(3600)
    time.sleep(float(wait))
    ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
