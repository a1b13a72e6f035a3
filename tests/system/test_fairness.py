"""No client, whatever it sends and however it reads, keeps the others waiting, nor has us hold much for it."""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

from testkit.harness import ROOT, InBackground, connect, http_request

HEAD = b"POST /body HTTP/1.1\r\nHost: h\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
ATTACK_S = 0.6
LONGEST_TURN_MS = 50.0  # of processor time: what one client may do to another's call
HELD_KB = 2048  # of memory, for one connection
TRIES_COUNT = 3  # now and then a virtual machine counts as ours the time that it did not get; a client can do it always


@dataclass(frozen=True)
class Flood:
    """What a client sends: once `start`, then `again` for ever, all in pieces of `piece_bytes`; it may never read."""

    start: bytes
    again: bytes
    piece_bytes: int = 1 << 18
    reads: bool = True


FIELDS = b"a:\r\n"
FLOODS = {
    "head-bytes": Flood(b"GET /healthz HTTP/1.1\r\nX: ", b"a", 1),
    "head-tabs": Flood(b"", b"GET / HTTP/1.1\r\nHost: x\r\nX:" + b"\t" * 60_000 + b"\x01\r\n\r\n"),
    "head-of-empty-fields": Flood(b"", GET[:-2] + FIELDS * 15_000 + b"\r\n"),
    "head-of-many-fields": Flood(b"", GET[:-2] + FIELDS * 490 + b"\r\n"),
    "head-of-long-fields": Flood(b"", GET[:-2] + (b"a:" + b" b" * 60 + b"\r\n") * 490 + b"\r\n"),
    "head-folded": Flood(b"", GET[:-2] + b"a: b\r\n" + b" c\r\n" * 490 + b"\r\n"),
    "chunks-of-1": Flood(CHUNKED, b"1\r\nx\r\n"),
    "chunks-of-3": Flood(CHUNKED, b"3\r\nxyz\r\n"),
    "chunks-of-30": Flood(CHUNKED, b"1e\r\n" + b"x" * 30 + b"\r\n"),
    "chunk-extensions": Flood(CHUNKED, b"1;" + b"a" * 60_000 + b"\r\nx\r\n"),
    "chunk-extension-spaces": Flood(CHUNKED, b"1;" + b" " * 60_000 + b"\x01\r\nx\r\n"),
    "trailers": Flood(b"", CHUNKED + b"1\r\nx\r\n0\r\n" + FIELDS * 490 + b"\r\n"),
    "trailers-too-many": Flood(b"", CHUNKED + b"1\r\nx\r\n0\r\n" + FIELDS * 15_000 + b"\r\n"),
    "pipelined": Flood(b"", GET),
    "pipelined-and-never-read": Flood(b"", GET, reads=False),
    "pipelined-bodies": Flood(b"", CHUNKED + b"1\r\nx\r\n0\r\n\r\n"),
    "body": Flood(HEAD + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    "body-in-bytes": Flood(HEAD + b"Content-Length: 99999999999\r\n\r\n", b"x", 1),
    "answer-never-read": Flood(GET.replace(b"/healthz", b"/large"), b"x" * 65536, reads=False),
    "answer-never-read-but-asked-again": Flood(b"", GET.replace(b"/healthz", b"/large"), reads=False),
    "answer-awaited": Flood(GET.replace(b"/healthz", b"/wait"), GET, reads=False),
    "answer-awaited-body-unread": Flood(CHUNKED.replace(b"/body", b"/wait"), b"1\r\nx\r\n", reads=False),
    "empty-lines": Flood(b"", b"\r\n"),
    "continue-awaited": Flood(b"", HEAD + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\nx"),
}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    command = [sys.executable, "-m", "testkit.turns"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline().rpartition(" ")[2])
        finally:
            server.kill()


def ask_turns(port: int) -> tuple[float, int]:
    """Return the longest turn in ms since the last time, and the resident memory in KiB."""
    told = json.loads(http_request(port, "GET", "/turns", timeout_s=60).body)
    return told["longest_ms"], told["resident_kb"]


def send_flood(client: socket.socket, flood: Flood, limit_s: float) -> None:
    """Send as much of `flood` as the server takes, until it closes or `limit_s` is over."""
    stream = flood.again * max(4 * flood.piece_bytes // len(flood.again), 1)
    client.sendall(flood.start)
    client.settimeout(0.02)
    sent, end_s = 0, time.monotonic() + limit_s
    while time.monotonic() < end_s:
        try:
            sent += client.send(stream[sent % len(stream) :][: flood.piece_bytes])
        except TimeoutError:
            pass
        except ConnectionError:
            return
        if flood.reads and select.select([client], [], [], 0)[0]:
            with suppress(ConnectionError):
                client.recv(1 << 20)


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_client_keeps_no_other_waiting_and_has_little_held_when_it_floods(port: int, flood: Flood) -> None:
    def is_bounded() -> bool:
        """Tell whether one flood is; what it has held shows each time, what the interpreter wants of its own once."""
        _, before_kb = ask_turns(port)
        with connect(port) as client:
            send_flood(client, flood, ATTACK_S)
            longest_ms, held_kb = ask_turns(port)
        return longest_ms < LONGEST_TURN_MS and held_kb - before_kb < HELD_KB

    assert any(is_bounded() for _ in range(TRIES_COUNT))


# The other side: an upstream, or a receiver of callbacks, that answers so

CHUNKED_ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "head-tabs": (b"HTTP/1.1 200 OK\r\nX:" + b"\t" * 60_000 + b"\x01\r\n\r\n", "bad response"),
    "head-of-empty-fields": (b"HTTP/1.1 200 OK\r\n" + FIELDS * 15_000 + b"\r\n", "bad response"),
    "chunks-of-1": (CHUNKED_ANSWER + b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n", "bad response"),
    "chunks-of-3": (CHUNKED_ANSWER + b"3\r\nxyz\r\n" * 100_000 + b"0\r\n\r\n", "300000"),
    "chunks-cut-short": (CHUNKED_ANSWER + b"3\r\nxyz\r\n" * 20_000, "the connection was closed"),
    "chunk-extension-spaces": (CHUNKED_ANSWER + b"1;" + b" " * 60_000 + b"\x01\r\nx\r\n", "bad response"),
    "interim-answers": (b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000 + CHUNKED_ANSWER + b"0\r\n\r\n", "bad response"),
}


@pytest.mark.parametrize(("answer", "outcome"), ANSWERS.values(), ids=ANSWERS)
def test_upstream_keeps_no_other_waiting_when_it_floods_us(port: int, answer: bytes, outcome: str) -> None:
    def longest_turn_ms() -> float:
        ask_turns(port)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            fetch = InBackground(lambda: http_request(port, "GET", f"/fetch?{listener.getsockname()[1]}"))
            with listener.accept()[0] as upstream, suppress(ConnectionError):
                upstream.recv(65536)
                upstream.sendall(answer)
            assert fetch.result().text.startswith(outcome)
        return ask_turns(port)[0]

    assert any(longest_turn_ms() < LONGEST_TURN_MS for _ in range(TRIES_COUNT))
