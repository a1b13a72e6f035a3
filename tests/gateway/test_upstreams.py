"""What a caller gets when a function's server is odd: its answer if that can be understood, else a 502."""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from testkit.harness import Answer, http_request, raw
from testkit.system import System

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LENGTH = b"Content-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n"
NO_ANSWER = b"far: no answer\n"
LARGE_BODY = bytes(2_000_000)  # more than the sockets between us take


class OddServer:
    """Answers a request for /KIND with the bytes of that kind, whole or one by one; some kinds read no body."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._kinds = {"early": self._early, "drip": self._drip, "reset": self._reset}
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._answer_all, args=(self._listener.accept()[0],), daemon=True).start()

    def _answer_all(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while self._answer(client):
                pass

    def _answer(self, client: socket.socket) -> bool:
        """Answer one request; tell whether the connection goes on."""
        received = b""
        while b"\r\n\r\n" not in received:
            piece = client.recv(65536)
            if not piece:
                return False
            received += piece
        head, _, rest = received.partition(b"\r\n\r\n")
        kind = head.split(b" ")[1].decode().rpartition("/")[2]
        if kind in self._kinds:
            return self._kinds[kind](client, head, rest)
        _read_body(client, head, rest)
        answer, closes, *_ = ANSWERS[kind]
        client.sendall(answer, socket.MSG_MORE if closes else 0)  # its last bytes wait for the end, and go with it
        return not closes

    def _early(self, client: socket.socket, head: bytes, rest: bytes) -> bool:
        client.sendall(OK)
        _read_body(client, head, rest)
        return True

    def _drip(self, client: socket.socket, head: bytes, rest: bytes) -> bool:
        _read_body(client, head, rest)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in OK:
            client.sendall(bytes([number]))
        return True

    def _reset(self, client: socket.socket, head: bytes, rest: bytes) -> bool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False


def _read_body(client: socket.socket, head: bytes, rest: bytes) -> None:
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields.get(b"content-length", b"0")) - len(rest)
    while left > 0:
        piece = client.recv(65536)
        if not piece:
            return
        left -= len(piece)


# By kind: the bytes, whether the server closes behind them, and what the caller gets: status and body.
ANSWERS: dict[str, tuple[bytes, bool, int, bytes]] = {
    "continue": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, False, 200, b"ok"),
    "early-hints": (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK, False, 200, b"ok"),
    "http-1.0": (b"HTTP/1.0 200 OK\r\n\r\nok", True, 200, b"ok"),
    "until-close": (b"HTTP/1.1 200 OK\r\n\r\nok", True, 200, b"ok"),
    "closes-unannounced": (OK, True, 200, b"ok"),
    "trailers": (CHUNKED + b"Trailer: X-T\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n", False, 200, b"ok"),
    "no-reason": (b"HTTP/1.1 200\r\n" + LENGTH, False, 200, b"ok"),
    "bare-lf": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", False, 200, b"ok"),
    "utf8-reason": ("HTTP/1.1 200 Grün\r\n".encode() + LENGTH, False, 200, b"ok"),
    "utf8-field": ("HTTP/1.1 200 OK\r\nX-N: grün\r\n".encode() + LENGTH, False, 200, b"ok"),
    "spaces-around-value": (b"HTTP/1.1 200 OK\r\nSet-Cookie:   a=b; Path=/ \t\r\n" + LENGTH, False, 200, b"ok"),
    "folded-field": (b"HTTP/1.1 200 OK\r\nX-F: a\r\n b\r\n" + LENGTH, False, 200, b"ok"),
    "same-length-twice": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n" + LENGTH, False, 200, b"ok"),
    "second-answer": (OK + b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", False, 200, b"ok"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b""),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n", False, 304, b""),
    "999": (b"HTTP/1.1 999 Odd\r\n" + LENGTH, False, 999, b"ok"),
    "closes": (b"", True, 502, NO_ANSWER),
    "garbage": (b"\0\1\2hello\r\n\r\n", True, 502, NO_ANSWER),
    "http-2": (b"HTTP/2 200 OK\r\n" + LENGTH, True, 502, NO_ANSWER),
    "two-lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n" + LENGTH, True, 502, NO_ANSWER),
    "unasked-upgrade": (
        b"HTTP/1.1 101 Go\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        True,
        502,
        NO_ANSWER,
    ),
    "control-character": (b"HTTP/1.1 200 OK\r\nX: a\1b\r\n" + LENGTH, True, 502, NO_ANSWER),
    "head-too-large": (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n" + LENGTH, True, 502, NO_ANSWER),
}
EARLY = {"early": (200, b"ok"), "drip": (200, b"ok"), "reset": (502, NO_ANSWER)}


@pytest.fixture(scope="module")
def functions() -> Iterator[str]:
    """The functions file of one function, which an odd server is."""
    server = OddServer()
    yield f'[far]\nurl = "http://127.0.0.1:{server.port}"'
    server.close()


@pytest.fixture(scope="module")
def system(functions: str) -> Iterator[System]:
    with System(functions, {"worker": "none"}) as system:
        yield system


def ask(system: System, kind: str, body: bytes, method: str = "POST") -> Answer:
    return http_request(system.port, method, f"/function/far/{kind}", {}, body)


@pytest.mark.parametrize("kind", [*ANSWERS, *EARLY])
def test_caller_gets_the_answer_of_an_odd_server_each_time_whatever_the_body(system: System, kind: str) -> None:
    expected = EARLY[kind] if kind in EARLY else ANSWERS[kind][2:]
    for body in (b"x", b"x", LARGE_BODY):
        answer = ask(system, kind, body)
        assert (answer.status, answer.body) == expected
    got = ask(system, kind, b"", "GET")
    assert (got.status, got.body) == expected
    assert ask(system, kind, b"", "HEAD").status == expected[0]


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked\r\n", b""], ids=["chunked", "no-framing"])
def test_head_is_told_no_length_that_the_server_has_not_told(system: System, framing: bytes) -> None:
    ANSWERS["headless"] = (b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n", False, 0, b"")
    for _ in range(2):
        answer = ask(system, "headless", b"", "HEAD")
        assert (answer.status, answer.headers.get("content-length")) == (200, None)


def test_date_is_that_of_the_server_whose_answer_it_is(system: System, functions: str) -> None:
    then = "Tue, 14 Nov 2023 22:14:20 GMT"
    ANSWERS["dated"] = (b"HTTP/1.1 200 OK\r\nDate: %b\r\n" % then.encode() + LENGTH, False, 0, b"")
    called = raw(system.port, b"GET /function/far/dated HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert re.findall(rb"(?i)^date: (.*)\r$", called, re.MULTILINE) == [then.encode()]
    with System(functions) as with_worker:
        call_id = with_worker.submit("far/dated")
        with_worker.ended(call_id)
        assert with_worker.request("GET", f"/async-function/{call_id}/result").headers["date"] == then


@pytest.mark.parametrize("body", [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", CHUNKED + b"\r\n5\r\nab"])
def test_answer_that_is_cut_is_not_taken_for_a_whole_one(system: System, body: bytes) -> None:
    ANSWERS["cut"] = (body, True, 0, b"")
    received = raw(system.port, b"GET /function/far/cut HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 ")
    assert not received.endswith(b"0\r\n\r\n")


def test_gateway_has_failed_nowhere_over_odd_servers(system: System) -> None:
    ask(system, "garbage", b"x")
    assert "Traceback" not in system.log()
    assert "failed" not in system.log()
