"""The world outside of a chaos run: a function elsewhere, and the receiver of callbacks, in this process.

Both answer by a script that travels in the path.  The function notes its runs in the functions' ledger, as those in
shell do; the receiver notes what it gets in the books.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bench.chaos.ledger import Books, Post
from testkit.harness import free_port

SLOW_S = 0.3


def now_s() -> float:
    """Return the seconds since boot, the clock that functions in shell can read too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def digest_of(body: bytes) -> str:
    """Return what stands for a body in the books."""
    return hashlib.sha256(body).hexdigest()


class StationServer(ThreadingHTTPServer):
    """A server that is used to clients being killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Station:
    """A server in this process that answers by the script in the path.

    `/function/STEPS` is a function, and keeps the functions' ledger; `/callback/STEPS` receives results, and notes
    them in the books.
    """

    def __init__(self, books: Books, ledger: Path) -> None:
        self.port = free_port()
        self._books = books
        self._ledger = ledger
        self._visits: Counter[tuple[str, str]] = Counter()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """The address of the station."""
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Be there."""
        station = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                station._on_post(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
                pass

        self._server = StationServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Be gone: connections are refused, and those that are open end without an answer."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    def _on_post(self, request: BaseHTTPRequestHandler) -> None:
        length_bytes = int(request.headers["Content-Length"])
        body = request.rfile.read(length_bytes)
        if self._server is None or len(body) < length_bytes:  # we are down, or the sender has died
            request.close_connection = True
            return
        _, place, steps = request.path.split("/", 2)
        call_id = request.headers["X-Call-Id"]
        visit = call_id, place
        step = steps.split(".")[min(self._visits[visit], steps.count("."))]
        self._visits[visit] += 1
        if place == "function":
            self._run(request, call_id, step, body)
        else:
            self._receive(request, call_id, step, body)

    def _run(self, request: BaseHTTPRequestHandler, call_id: str, step: str, body: bytes) -> None:
        run = f"{call_id} {uuid.uuid4()}"
        self._say(f"{run} start")
        if step == "drop":
            request.close_connection = True
            return
        status = perform(step)
        if status == 200:
            self._say(f"{run} end")
        reply(request, status, body, {"Retry-After": "1"} if status == 429 else {})

    def _say(self, text: str) -> None:
        with self._ledger.open("a", encoding="ascii") as ledger:
            ledger.write(f"{now_s():.2f} {text}\n")

    def _receive(self, request: BaseHTTPRequestHandler, call_id: str, step: str, body: bytes) -> None:
        at_s, function_status = now_s(), request.headers["X-Function-Status"]
        status = perform(step)
        self._books.posts.append(Post(call_id, at_s, status, function_status, digest_of(body)))
        reply(request, status, b"", {"Location": "/moved/200"} if status == 307 else {})


def perform(step: str) -> int:
    """Return the status that a step answers with, after the time that it takes."""
    if step == "slow":
        time.sleep(SLOW_S)
        return 200
    return int(step)


def reply(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Answer a request; its sender may be dead by now."""
    with contextlib.suppress(ConnectionError):
        request.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)
