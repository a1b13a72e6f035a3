"""A whole system for tests: gateway, worker and functions as real processes, and receivers that follow a script.

with System('[cat]\\nfprocess = "cat"', {"max_retry_attempts": "3"}) as system, Receiver() as receiver:
    call_id = system.submit("cat", b"hello", {"X-Callback-Url": receiver.url("/done")})
    assert system.ended(call_id)["state"] == "done"
    assert receiver.wait_for(1)[0].body == b"hello"
"""

from __future__ import annotations

import fcntl
import json
import signal
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from testkit.harness import (
    MARK_NAME,
    SOON_S,
    Answer,
    Program,
    command_line_of,
    crowding,
    http_request,
    wait_until,
)
from testkit.inspection import state_of

GATEWAY_READY = r"^\S+ \S+ Listening on port: (\d+)"  # without a name before it: those are the watchdogs of functions
WORKER_READY = r"Draining .* of "

# Quick retries, and callbacks to this machine's receivers.
QUICK = {
    "initial_retry_wait": "100ms",
    "max_retry_wait": "400ms",
    "max_retry_attempts": "3",
    "callback_allow": "127.0.0.0/8",
}

FUNCTIONS = """
[cat]
fprocess = "cat"

[shell]  # runs the body as a script
fprocess = "/bin/sh"

[env]
fprocess = "env"
"""


SIGNING_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOTES_RUN = b'echo "$Http_X_Call_Id" >>"$TMPDIR/runs"\n'  # a script's first line, so that its runs can be counted


class System(Program):
    """A gateway with its local functions and, unless `worker` is none, its worker."""

    def __init__(
        self,
        functions: str = FUNCTIONS,
        settings: Mapping[str, str] | None = None,
        spool: Path | None = None,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        super().__init__("gateway", ready_line=GATEWAY_READY, prefix=prefix, pass_fds=pass_fds)
        self.spool = spool or self.temporary / "spool"
        path = self.temporary / "functions.toml"
        path.write_text(functions)
        self.environment |= QUICK | {"functions": str(path), "queue_url": f"spool:{self.spool}"} | dict(settings or {})

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Answer:
        """Send one request to the gateway."""
        return http_request(self.port, method, path, headers, body, timeout_s or 20.0 * crowding())

    def worker_pid(self) -> int:
        """Wait until its local worker runs; return the number of that process."""

        def found() -> list[int]:
            return [pid for pid in self.survivors() if b"faashound.worker" in command_line_of(pid)]

        return wait_until(found, SOON_S, "there is a local worker")[0]

    def submit(self, function: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> str:
        """Submit an asynchronous call and return its id; `function` may have a path and a query behind it."""
        answer = self.request("POST", f"/async-function/{function}", body, headers)
        assert answer.status == 202, answer
        return answer.headers["x-call-id"]

    def status(self, call_id: str, query: str = "") -> dict[str, Any]:
        """Return what the gateway says of a call."""
        answer = self.request("GET", f"/async-function/{call_id}{query}")
        assert answer.status == 200, answer
        found: dict[str, Any] = json.loads(answer.body)
        return found

    def ended(self, call_id: str, within_s: float = 15.0) -> dict[str, Any]:
        """Return what the gateway says of a call when it has ended."""
        return self._until(call_id, has_ended, within_s, "?wait=5s")

    def until(self, call_id: str, condition: Callable[[dict[str, Any]], object], deadline_s: float = SOON_S) -> Any:
        """Return the status of a call once it meets `condition`."""
        return self._until(call_id, condition, deadline_s, "")

    def _until(
        self, call_id: str, condition: Callable[[dict[str, Any]], object], deadline_s: float, query: str
    ) -> dict[str, Any]:
        status: dict[str, Any] = {}

        def look() -> bool:
            nonlocal status
            status = self.status(call_id, query)
            return bool(condition(status))

        try:
            wait_until(look, deadline_s, f"condition on {call_id}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {status}") from None
        return status

    def row(self, call_id: str) -> dict[str, Any]:
        """Return the row of a call, by a reader that shares nothing with the system."""
        return rows(self.spool, "SELECT * FROM calls JOIN requests USING (seq) WHERE id = ?", call_id)[0]

    def metrics(self) -> str:
        """Return what the gateway's /metrics says."""
        return http_request(self.metrics_port, "GET", "/metrics").text


def has_ended(status: Mapping[str, Any]) -> bool:
    """Tell whether the call of which the gateway says `status` has ended."""
    return status["state"] not in ("queued", "running")


def runs(system: System) -> list[str]:
    """Return the ids of the calls that began with NOTES_RUN, in the order in which they ran."""
    path = system.temporary / "runs"
    return path.read_text().split() if path.exists() else []


def rows(spool: Path, sql: str, *values: object) -> list[dict[str, Any]]:
    """Return the rows of a query on a spool's database, opened for the purpose."""
    db = sqlite3.connect(f"file:{spool / 'spool.sqlite3'}?mode=ro", uri=True)
    try:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql, values)]
    finally:
        db.close()


class Worker(Program):
    """A worker of its own on a system's spool; it carries the system's mark too."""

    def __init__(self, system: System, settings: Mapping[str, str] | None = None) -> None:
        super().__init__("worker", ready_line=WORKER_READY)
        self.environment |= QUICK | {
            "gateway_url": f"http://127.0.0.1:{system.port}",
            "queue_url": f"spool:{system.spool}",
        }
        self.environment |= dict(settings or {})
        assert MARK_NAME in self.environment
        self._lock = system.spool / "writer.lock"

    def suspend(self) -> None:
        """Stop it while it does not write: with the queue's lock in its hands it would stop all the others."""

        def stopped_between_two_writes() -> bool:
            self.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: state_of(self.pid) == "T", SOON_S, "the worker is stopped")
            with self._lock.open("r+b") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.process.send_signal(signal.SIGCONT)
                    return False
                return True

        wait_until(stopped_between_two_writes, SOON_S, "the worker does not write")


@dataclass(frozen=True)
class Received:
    """One request that a receiver got; header names are in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Reply = tuple[int, Mapping[str, str], bytes]
Script = Callable[[Received], Reply]


def always(status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Script:
    """Return a script that gives one answer to everything."""
    return lambda _: (status, headers or {}, body)


def in_turn(*statuses: int) -> Script:
    """Return a script that answers the statuses one after the other, the last for ever."""
    left = list(statuses)
    return lambda _: (left.pop(0) if len(left) > 1 else left[0], {}, b"")


class Receiver:
    """A real HTTP server in this process that answers by a script and remembers what it got."""

    def __init__(self, script: Script | None = None) -> None:
        self._script = script or always(200)
        self._received: list[Received] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                receiver._answer(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        received = Received(handler.command, handler.path, headers, _read_body(handler))
        self._received.append(received)
        status, fields, body = self._script(received)
        handler.send_response(status)
        for name, value in fields.items():
            handler.send_header(name, value)
        if "Content-Length" not in fields:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if received.method != "HEAD":
            handler.wfile.write(body)

    def url(self, path: str = "/") -> str:
        """Return the address of `path` here."""
        return f"http://127.0.0.1:{self.port}{path}"

    def received(self) -> Sequence[Received]:
        """Return what has come so far."""
        return list(self._received)

    def wait_for(self, count: int, deadline_s: float = SOON_S) -> Sequence[Received]:
        """Return what has come, once it is `count` requests."""
        wait_until(lambda: len(self._received) >= count, deadline_s, f"{count} requests, got {self._received}")
        return self.received()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def functions_at(receiver: Receiver, **annotations: str) -> str:
    """Return a functions file whose one function, `up`, is `receiver`; `a__b` is the annotation com.openfaas.a.b."""
    lines = [f'annotations."com.openfaas.{name.replace("__", ".")}" = "{value}"' for name, value in annotations.items()]
    return "\n".join([f'[up]\nurl = "{receiver.url("/fn")}"', *lines])


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
