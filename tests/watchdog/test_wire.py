"""Both wires: a message built at once has the bytes that h11 gives it piece by piece, whatever follows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import HOSTILE_REQUESTS, BadRequest, ClientWire, Header, PeerGone, ServerWire, WireEvent
from testkit.harness import START_DEADLINE_S

POST = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello"
NEXT = b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n"
UNUSUAL = [NEXT.replace(b"GET", b"HEAD"), NEXT.replace(b"1.1", b"1.0"), NEXT[:-2] + b"Connection: close\r\n\r\n"]
TYPE = (b"Content-Type", b"text/plain")

names = st.from_regex(rb"X-[A-Za-z0-9-]{1,20}", fullmatch=True)
values = st.from_regex(rb"(?:[\x21-\x7e\x80-\xff]+(?: [\x21-\x7e\x80-\xff]+)*)?", fullmatch=True)
headers_lists = st.lists(st.tuples(names, values), max_size=6)


def received(request: bytes) -> ServerWire:
    """Return a wire that has taken `request` and handed on its events."""
    wire = ServerWire()
    wire.feed(request)
    drain(wire)
    return wire


def drain(wire: ServerWire) -> list[object]:
    """Return all events that a wire has, up to the sign that there are no more."""
    events: list[object] = []
    while True:
        events.append(wire.next_event())
        if events[-1] in (WireEvent.NEED_DATA, WireEvent.PAUSED, WireEvent.CLOSED):
            return events


def in_pieces(wire: ServerWire, status: int, headers: list[Header], body: bytes, close: bool) -> bytes:
    """Return the answer as h11 builds it."""
    head = wire.build_head(status, headers, len(body), close)
    return head + (wire.build_chunk(body) if body else b"") + wire.end()


@given(
    request=st.sampled_from([POST, NEXT, *UNUSUAL]),
    status=st.sampled_from([200, 202, 204, 304, 404, 500]),
    headers=headers_lists,
    body=st.binary(max_size=40),
    close=st.booleans(),
    behind=st.sampled_from([b"", NEXT, b"\r\n" + NEXT, NEXT[:9]]),
)
def test_answer_and_what_follows_are_the_same_when_built_whole_as_when_built_in_pieces(
    request: bytes, status: int, headers: list[Header], body: bytes, close: bool, behind: bytes
) -> None:
    if status in (204, 304):
        body = b""
    one, other = received(request + behind), received(request + behind)
    assert one.build_whole(status, headers, body, len(body), close) == in_pieces(other, status, headers, body, close)
    goes_on = one.next_cycle()
    assert goes_on == other.next_cycle()
    if goes_on:
        assert one.started == other.started
        assert drain(one) == drain(other)
        one.feed(NEXT[9:] if behind == NEXT[:9] else NEXT)
        other.feed(NEXT[9:] if behind == NEXT[:9] else NEXT)
        assert drain(one) == drain(other)


@given(body=st.binary(max_size=60), cuts=st.lists(st.integers(0, 200), max_size=6), answer_bytes=st.integers(0, 2**40))
def test_wire_takes_a_body_and_the_next_request_when_cut_anywhere(
    body: bytes, cuts: list[int], answer_bytes: int
) -> None:
    request = b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    wire, events = ServerWire(), list[object]()
    bounds = sorted({0, *(cut for cut in cuts if cut < len(request + NEXT)), len(request + NEXT)})
    for start, end in pairwise(bounds):
        wire.feed((request + NEXT)[start:end])
        events += drain(wire)
    assert b"".join(event for event in events if isinstance(event, bytes)) == body
    assert [event for event in events if event is WireEvent.END] == [WireEvent.END]
    wire.build_head(200, [TYPE], answer_bytes, close=False)
    wire.pass_by(answer_bytes)
    wire.end()
    assert wire.next_cycle()
    assert [event[1] for event in drain(wire) if isinstance(event, tuple)] == [b"/b"]


def test_wire_knows_that_a_body_is_incomplete_when_it_passed_by() -> None:
    wire = received(POST[:-3])
    wire.feed(b"l")
    assert drain(wire) == [b"l", WireEvent.NEED_DATA]
    assert not wire.peer_done
    wire.feed(b"lo")
    assert drain(wire)[:2] == [b"lo", WireEvent.END]
    assert wire.peer_done


def test_wire_refuses_to_end_an_answer_when_less_was_sent_than_announced() -> None:
    wire = received(POST)
    wire.build_head(200, [TYPE], 1000, close=False)
    wire.pass_by(999)
    with pytest.raises(h11.LocalProtocolError):
        wire.end()


@pytest.mark.parametrize(
    "field",
    [
        (b"X-A", b"a\r\nX-Evil: 1"),
        (b"X-A", b"a\nb"),
        (b"X-A", b"a\0"),
        (b"X A", b"a"),
        (b"X-A:", b"a"),
        (b"", b"a"),
        (b"Content-Length", b"3"),
        (b"transfer-encoding", b"chunked"),
    ],
    ids=["line-break", "newline", "nul", "space-in-name", "colon-in-name", "no-name", "length", "coding"],
)
def test_wire_refuses_to_send_a_field_when_it_could_change_the_framing(field: Header) -> None:
    with pytest.raises(h11.LocalProtocolError):
        received(POST).build_whole(200, [TYPE, field], b"x", 1, close=False)


def asked(method: bytes, headers: list[Header], body: bytes, *, at_once: bool) -> tuple[ClientWire, bytes]:
    """Return a client's wire that has been asked something, and the bytes of the request."""
    wire = ClientWire()
    fields = [(b"Host", b"h"), *headers]
    if at_once:
        return wire, wire.build_whole(method, b"/a?b", fields, body, len(body))
    head = wire.build_head(method, b"/a?b", [*fields, (b"Content-Length", b"%d" % len(body))])
    return wire, head + (wire.build_chunk(body) if body else b"") + wire.end()


ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nhello",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello and more",
]


@given(
    method=st.sampled_from([b"GET", b"HEAD", b"POST", b"PUT", b"PURGE"]),
    headers=headers_lists,
    body=st.binary(max_size=40),
    answer=st.sampled_from(ANSWERS),
)
def test_request_and_its_answer_are_the_same_when_built_whole_as_when_built_in_pieces(
    method: bytes, headers: list[Header], body: bytes, answer: bytes
) -> None:
    one, sent = asked(method, headers, body, at_once=True)
    other, expected = asked(method, headers, body, at_once=False)
    assert sent == expected
    for wire in (one, other):
        wire.feed(answer)
    assert until_end(one) == until_end(other)
    assert one.next_cycle() == other.next_cycle()


@given(
    method=st.sampled_from([b"GET", b"HEAD"]),
    answer=st.sampled_from(ANSWERS),
    sent_count=st.integers(1, 200),
    cuts=st.lists(st.integers(1, 100), max_size=6),
    closes=st.booleans(),
)
def test_answer_is_read_as_h11_reads_it_when_cut_anywhere(
    method: bytes, answer: bytes, sent_count: int, cuts: list[int], closes: bool
) -> None:
    answer = answer[:sent_count]
    bounds = sorted({0, *(cut for cut in cuts if cut < len(answer)), len(answer)})
    pieces = [answer[start:end] for start, end in pairwise(bounds)] + [b""] * closes
    assert read_by_wire(method, pieces) == read_by_h11(method, [answer] + [b""] * closes)


Reading = tuple[int | None, list[Header], bytes, str]  # status, fields, body, how it ends


def read_by_wire(method: bytes, pieces: list[bytes]) -> Reading:
    """Return what a client's wire makes of an answer."""
    wire, status, fields, body, end = asked(method, [], b"", at_once=True)[0], None, list[Header](), b"", "goes on"
    for piece in pieces:
        if end != "goes on":
            break  # whatever the driver is told after the end, it does not read
        wire.feed(piece)
        try:
            for event in until_end(wire):
                match event:
                    case bytes():
                        body += event
                    case tuple():
                        status, fields = event
                    case WireEvent.END:
                        end = "whole"
        except PeerGone:
            end = "broken"
    return status, fields, body, end


def read_by_h11(method: bytes, pieces: list[bytes]) -> Reading:
    """Return what h11 makes of it."""
    conn, status, fields, body = h11.Connection(h11.CLIENT), None, list[Header](), b""
    conn.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
    conn.send(h11.EndOfMessage())
    for piece in pieces:
        conn.receive_data(piece)
        try:
            while (event := conn.next_event()) is not h11.NEED_DATA:
                match event:
                    case h11.Response():
                        status, fields = event.status_code, list(event.headers)
                    case h11.Data():
                        body += event.data
                    case h11.EndOfMessage():
                        return status, fields, body, "whole"
        except h11.RemoteProtocolError:
            return status, fields, body, "broken"
    return status, fields, body, "goes on"


def until_end(wire: ClientWire) -> list[object]:
    """Return what a client's wire reads, up to the end of the message or the sign that more is needed."""
    events: list[object] = []
    while True:
        events.append(wire.next_event())
        if isinstance(events[-1], WireEvent):
            return events


@pytest.mark.parametrize(
    ("method", "target", "field"),
    [
        pytest.param(b"GET /", b"/", TYPE, id="space-in-method"),
        pytest.param(b"GET", b"/a b", TYPE, id="space-in-target"),
        pytest.param(b"GET", b"/\r\nX-Evil:", TYPE, id="line-break-in-target"),
        pytest.param(b"GET", b"", TYPE, id="no-target"),
        pytest.param(b"GET", b"/", (b"X-A", b"a\r\nX-Evil: 1"), id="line-break-in-value"),
        pytest.param(b"GET", b"/", (b"Transfer-Encoding", b"chunked"), id="coding"),
    ],
)
def test_client_refuses_to_send_a_head_when_it_could_change_the_framing(
    method: bytes, target: bytes, field: Header
) -> None:
    with pytest.raises(h11.LocalProtocolError):
        ClientWire().build_whole(method, target, [(b"Host", b"h"), field], b"", 0)


# h11's grammar, tightened from outside


@pytest.mark.parametrize("hostile", HOSTILE_REQUESTS, ids=range(len(HOSTILE_REQUESTS)))
def test_wire_refuses_a_request_when_it_is_one_of_those_tried_at_the_start(hostile: bytes) -> None:
    with pytest.raises(BadRequest):
        received(hostile)


@pytest.mark.parametrize("pattern", ["chunk_header_re", "header_field_re", "request_line_re"])
def test_program_does_not_start_when_h11_lets_hostile_bytes_through(tmp_path: Path, pattern: str) -> None:
    shutil.copytree(Path(h11.__file__).parent, tmp_path / "h11")
    readers = tmp_path / "h11" / "_readers.py"
    loose = re.sub(rf"\b{pattern}\b", f"{pattern}_cached", readers.read_text(encoding="utf-8"))
    readers.write_text(f"{loose}\n{pattern} = {pattern}_cached\n", encoding="utf-8")
    (tmp_path / "h11" / "_version.py").write_text('__version__ = "0.16.1"\n', encoding="utf-8")
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import faashound.watchdog"
    ended = subprocess.run(
        [sys.executable, "-c", start], capture_output=True, text=True, timeout=START_DEADLINE_S, check=False
    )
    assert ended.returncode == 1
    last_line = ended.stderr.splitlines()[-1]
    assert last_line.startswith("ImportError: h11 0.16.1 lets through ")
    assert last_line.endswith("install h11 0.16.0")


# Plain heads pass h11 by, if they come in one piece.  One that is cut after its first byte is h11's whatever it is, and
# must be read the same: what two readers take for two things is how requests are smuggled.

FIRST_LINES = [
    *(b"GET / HTTP/1.1", b"POST /a?b HTTP/1.1", b"HEAD / HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://h/ HTTP/1.1"),
    *(
        b"GET / HTTP/1.0",
        b"GET  / HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"G T / HTTP/1.1",
        b"GET a HTTP/1.1",
        b"get / http/1.1",
    ),
]
STATUS_LINES = [
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 404", b"HTTP/1.1 503 ", b"HTTP/1.1 204 No Content", b"HTTP/1.1 304 Not Modified"),
    *(b"HTTP/1.1 100 Continue", b"HTTP/1.1 101 Switching", b"HTTP/1.0 200 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 600 No"),
    *(b"HTTP/1.1  200 OK", b"HTTP/1.1 200 O\x01K", b"HTTP/2 200 OK"),
]
FIELD_LINES = [
    *(
        b"Host: h",
        b"Host: h",
        b"Host: a b",
        b"host:h",
        b"X-A: b",
        b"X-A:\tb\t ",
        b"X-A:",
        b"X-A: \x80",
        b"X-A : b",
        b"X A: b",
    ),
    *(b"Content-Length: 5", b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: 05", b"Content-Length: 5, 5"),
    *(b"Content-Length: +5", b"Content-Length: 5 5", b"Content-Length:", b"Content-Length: 99999999999999999999"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Connection: close", b"Connection: keep-alive"),
    *(
        b"Connection: Keep-Alive",
        b"Connection: keep-alive, close",
        b"Connection: X-A",
        b"Upgrade: x",
        b"Expect: 100-continue",
    ),
    *(
        b" folded",
        b"\tfolded",
        b"X-A: b\x00",
        b"X-A: b\rX-B: c",
        b"X-A: b\nX-B: c",
        b"X-A: b\n",
        b":",
        b"",
        b"X-A: \x7f",
    ),
]
BODIES = [b"", b"hello", b"hell", b"hello" + NEXT, b"5\r\nhello\r\n0\r\n\r\n", b"\r\n"]


@st.composite
def messages(draw: st.DrawFn, first_lines: list[bytes]) -> bytes:
    lines = [draw(st.sampled_from(first_lines)), *draw(st.lists(st.sampled_from(FIELD_LINES), max_size=5))]
    if draw(st.booleans()):
        lines.append(b"Host: h")
    end = draw(st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n"]))
    return end.join([*lines, b"", b""]) + draw(st.sampled_from(BODIES))


def server_reading(pieces: list[bytes]) -> tuple[list[object], bytes]:
    """Return the events that a server's wire has of what comes, its chunks joined, or the error it raises."""
    wire, events, body = ServerWire(), list[object](), b""
    try:
        for piece in pieces:
            wire.feed(piece)
            for event in drain(wire):
                if isinstance(event, bytes):
                    body += event
                elif event is not WireEvent.NEED_DATA:
                    events.append(event)
    except BadRequest as error:
        events.append((type(error), str(error)))
    events = [event for at, event in enumerate(events) if event is not WireEvent.PAUSED or at == len(events) - 1]
    return events, body


@given(request=messages(FIRST_LINES), cut=st.integers(1, 300), closes=st.booleans())
def test_request_is_the_same_when_it_passes_h11_by(request: bytes, cut: int, closes: bool) -> None:
    end = [b""] * closes
    expected = server_reading([request[:1], request[1:], *end])
    assert server_reading([request, *end]) == expected
    assert server_reading([request[:cut], request[cut:], *end] if cut < len(request) else [request, *end]) == expected


@given(answer=messages(STATUS_LINES), method=st.sampled_from([b"GET", b"HEAD"]), closes=st.booleans())
def test_answer_is_the_same_when_it_passes_h11_by(answer: bytes, method: bytes, closes: bool) -> None:
    end = [b""] * closes
    assert read_by_wire(method, [answer, *end]) == read_by_wire(method, [answer[:1], answer[1:], *end])


@given(answer=messages(STATUS_LINES[:3]))
def test_connection_goes_on_after_the_same_answers_when_they_pass_h11_by(answer: bytes) -> None:
    def goes_on(pieces: list[bytes]) -> bool | None:
        wire = asked(b"GET", [], b"", at_once=True)[0]
        try:
            for piece in pieces:
                wire.feed(piece)
                if WireEvent.END in until_end(wire):
                    return wire.next_cycle()
        except PeerGone:
            return None
        return None

    assert goes_on([answer]) == goes_on([answer[:1], answer[1:]])


BROKEN_PLACES = {
    "field": b"Authorization : Basic c2VjcmV0\r\n\r\n",
    "length": b"Content-Length: c2VjcmV0\r\n\r\n",
    "chunk-head": b"Transfer-Encoding: chunked\r\n\r\nc2VjcmV0\r\n",
    "chunk-end": b"Transfer-Encoding: chunked\r\n\r\n1\r\nxc2VjcmV0\r\n",
    "trailer": b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A : c2VjcmV0\r\n\r\n",
}


@pytest.mark.parametrize("behind", BROKEN_PLACES.values(), ids=BROKEN_PLACES)
@pytest.mark.parametrize("side", ["server", "client"])
def test_error_tells_what_rule_was_broken_and_not_by_which_bytes(side: str, behind: bytes) -> None:
    """They may be a secret, and the text goes to clients, logs and records of calls."""
    head = b"POST / HTTP/1.1\r\nHost: h\r\n" if side == "server" else b"HTTP/1.1 200 OK\r\n"
    assert_names_no_bytes(side, head + behind)


@pytest.mark.parametrize(("side", "line"), [("server", b"G T /c2VjcmV0 HTTP/1.1"), ("client", b"HTTP/1.1 c2VjcmV0")])
def test_error_of_a_first_line_does_not_tell_it(side: str, line: bytes) -> None:
    assert_names_no_bytes(side, line + b"\r\n\r\n")


def read_on(wire: ServerWire | ClientWire) -> None:
    while wire.next_event() is not WireEvent.NEED_DATA:
        continue


def assert_names_no_bytes(side: str, data: bytes) -> None:
    wire = ServerWire() if side == "server" else asked(b"GET", [], b"", at_once=True)[0]
    wire.feed(data)
    with pytest.raises((BadRequest, PeerGone)) as caught:
        read_on(wire)
    text = str(caught.value)
    assert re.fullmatch(r"bad (request|response): [A-Za-z][A-Za-z -]+", text), text
    assert "c2Vj" not in text
