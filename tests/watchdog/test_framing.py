"""HTTP/1.1 framing: however a request is cut into packets it is one request, and a doubtful one is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faashound.functions.endpoint import read_spent_ns
from testkit.harness import (
    Answer,
    Program,
    connect,
    http_request,
    parse,
    raw,
    read_all,
    read_until,
    wait_until,
)

HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"
CLOSE = b"Connection: close\r\n"
PROCESSES = settings(max_examples=25)  # each example is a process or a few
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"


def posted(body: bytes, *headers: bytes) -> bytes:
    return HEAD + b"".join(header + b"\r\n" for header in headers) + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def chunked(body: bytes, *headers: bytes) -> bytes:
    head = HEAD + b"".join(header + b"\r\n" for header in headers)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + body


def last(request: bytes) -> bytes:
    """Return `request` with a wish to close added, so that the end of its response can be told."""
    return request.replace(b"Host: h\r\n", b"Host: h\r\n" + CLOSE, 1)


def ask(program: Program, pieces: bytes | Sequence[bytes]) -> Answer:
    (answer,) = parse(raw(program.port, pieces))
    return answer


# Refused: 400, the connection closed, and nothing behind the bad request is run

REFUSED = {
    "length-and-chunked": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked-and-length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two-lengths": HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "list-of-lengths": HEAD + b"Content-Length: 4, 5\r\n\r\nabcde",
    "negative-length": HEAD + b"Content-Length: -1\r\n\r\n",
    "signed-length": HEAD + b"Content-Length: +4\r\n\r\nabcd",
    "hex-length": HEAD + b"Content-Length: 0x4\r\n\r\nabcd",
    "word-length": HEAD + b"Content-Length: many\r\n\r\n",
    "empty-length": HEAD + b"Content-Length: \r\n\r\n",
    "underscored-length": HEAD + b"Content-Length: 1_0\r\n\r\n0123456789",
    "bare-cr-in-chunk-extension": chunked(b"1;a=\rb\r\nx\r\n0\r\n\r\n"),
    "bare-lf-in-chunk-extension": chunked(b"1;a=\nb\r\nx\r\n0\r\n\r\n"),
    "nul-in-chunk-extension": chunked(b"1;a=\x00\r\nx\r\n0\r\n\r\n"),
    "word-chunk-size": chunked(b"zz\r\nx\r\n0\r\n\r\n"),
    "negative-chunk-size": chunked(b"-1\r\nx\r\n0\r\n\r\n"),
    "hex-prefixed-chunk-size": chunked(b"0x1\r\nx\r\n0\r\n\r\n"),
    "huge-chunk-size": chunked(b"f" * 40 + b"\r\nx\r\n0\r\n\r\n"),
    "space-in-chunk-size": chunked(b"1 0\r\nx\r\n0\r\n\r\n"),
    "no-crlf-after-chunk": chunked(b"1\r\nxyz\r\n0\r\n\r\n"),
    "control-in-trailer": chunked(b"0\r\nX-A: a\x01b\r\n\r\n"),
    "bare-cr-in-value": HEAD + b"X-A: a\rb\r\n\r\n",
    "nul-in-value": HEAD + b"X-A: a\x00b\r\n\r\n",
    "bell-in-value": HEAD + b"X-A: a\x07b\r\n\r\n",
    "escape-in-value": HEAD + b"X-A: \x1b[31m\r\n\r\n",
    "delete-in-value": HEAD + b"X-A: a\x7fb\r\n\r\n",
    "space-before-colon": HEAD + b"X-A : b\r\n\r\n",
    "space-in-name": HEAD + b"X A: b\r\n\r\n",
    "no-name": HEAD + b": b\r\n\r\n",
    "no-colon": HEAD + b"nonsense\r\n\r\n",
    "first-line-folded": b"POST / HTTP/1.1\r\n X-A: b\r\nHost: h\r\n\r\n",
    "no-host": b"GET / HTTP/1.1\r\n\r\n",
    "two-hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "version-2": b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
    "version-3": b"GET / HTTP/3.0\r\nHost: h\r\n\r\n",
    "version-0.9": b"GET / HTTP/0.9\r\nHost: h\r\n\r\n",
    "version-1.1.1": b"GET / HTTP/1.1.1\r\nHost: h\r\n\r\n",
    "no-version": b"GET /\r\n\r\n",
    "lower-case-version": b"GET / http/1.1\r\nHost: h\r\n\r\n",
    "http-2-preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls-hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "relative-target": b"GET path HTTP/1.1\r\nHost: h\r\n\r\n",
    "asterisk-target": b"GET * HTTP/1.1\r\nHost: h\r\n\r\n",
    "authority-target": b"GET h:80 HTTP/1.1\r\nHost: h\r\n\r\n",
    "connect-target": b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n",
    "query-only-target": b"GET ?q HTTP/1.1\r\nHost: h\r\n\r\n",
    "space-in-target": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "tab-for-space": b"GET\t/\tHTTP/1.1\r\nHost: h\r\n\r\n",
    "fragment-in-path": b"GET /a#b?x=1 HTTP/1.1\r\nHost: h\r\n\r\n",
    "fragment-in-query": b"GET /a?x=1#y HTTP/1.1\r\nHost: h\r\n\r\n",
    "fragment-in-absolute-target": b"GET http://h/#y HTTP/1.1\r\nHost: h\r\n\r\n",
    "utf-8-target": "GET /é HTTP/1.1\r\nHost: h\r\n\r\n".encode(),
    "control-in-target": b"GET /\x01 HTTP/1.1\r\nHost: h\r\n\r\n",
    "nul-in-path": b"GET /a%00b HTTP/1.1\r\nHost: h\r\n\r\n",
    "broken-escape-in-path": b"GET /a%zz HTTP/1.1\r\nHost: h\r\n\r\n",
    "bad-method": b"G@T / HTTP/1.1\r\nHost: h\r\n\r\n",
    "binary": bytes(range(128, 256)) + b"\r\n\r\n",
}


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED)
def test_connection_gets_400_and_is_closed_when_request_is_doubtful(cat: Program, request_bytes: bytes) -> None:
    (answer,) = parse(raw(cat.port, request_bytes + SMUGGLED))
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    cat.wait_idle()


@pytest.mark.parametrize(
    "coding", [b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b"chunked;q=1"]
)
def test_connection_is_refused_and_closed_when_transfer_coding_is_not_chunked(cat: Program, coding: bytes) -> None:
    answer = ask(cat, HEAD + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n" + SMUGGLED)
    assert answer.status in (400, 501)  # RFC 9112 6.1: 501 should answer a coding that is not understood
    assert answer.headers["connection"] == "close"


def test_answers_before_the_doubtful_request_are_sent_when_pipelined(cat: Program) -> None:
    received = raw(cat.port, posted(b"one") + posted(b"two") + REFUSED["length-and-chunked"] + SMUGGLED)
    assert [(answer.status, answer.body) for answer in parse(received)][:2] == [(200, b"one"), (200, b"two")]
    assert [answer.status for answer in parse(received)][2:] == [400]


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED)
def test_watchdog_explains_itself_in_text_when_it_refuses(cat: Program, request_bytes: bytes) -> None:
    answer = ask(cat, request_bytes)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.endswith("\n")
    assert "Traceback" not in cat.log()


# Taken, although unusual

TAKEN = {
    "plain": (posted(b"hello"), b"hello"),
    "empty-line-first": (b"\r\n" + posted(b"hello"), b"hello"),
    "no-body": (HEAD + b"\r\n", b""),
    "zero-length": (posted(b""), b""),
    "chunked": (chunked(b"5\r\nhello\r\n0\r\n\r\n"), b"hello"),
    "chunked-in-capitals": (HEAD + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\nx\r\n0\r\n\r\n", b"x"),
    "chunks": (chunked(b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n"), b"hello"),
    "upper-case-size": (chunked(b"A\r\n0123456789\r\n0\r\n\r\n"), b"0123456789"),
    "zeros-before-size": (chunked(b"0005\r\nhello\r\n000\r\n\r\n"), b"hello"),
    "chunk-extensions": (chunked(b'5;a=b;c="d e"\r\nhello\r\n0;last\r\n\r\n'), b"hello"),
    "trailers": (chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n"), b"hello"),
    "body-like-a-request": (posted(SMUGGLED), SMUGGLED),
    "expect-with-body-already-there": (posted(b"hello", b"Expect: 100-continue"), b"hello"),
    "upgrade-wish": (posted(b"hello", b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"), b"hello"),
    "absolute-target": (posted(b"hello").replace(b"POST /", b"POST http://h/", 1), b"hello"),
    "double-slash-target": (posted(b"hello").replace(b"POST /", b"POST //x//", 1), b"hello"),
    "latin-1-value": (posted(b"hello", b"X-A: \xe9\xff"), b"hello"),
    "tab-in-value": (posted(b"hello", b"X-A:\ta\tb\t"), b"hello"),
    "empty-value": (posted(b"hello", b"X-A:"), b"hello"),
}
SHORT = {name: taken for name, taken in TAKEN.items() if len(last(taken[0])) < 140}


@pytest.mark.parametrize(("request_bytes", "body"), TAKEN.values(), ids=TAKEN)
def test_request_is_answered_when_unusual_but_right(cat: Program, request_bytes: bytes, body: bytes) -> None:
    answer = ask(cat, last(request_bytes))
    assert (answer.status, answer.body) == (200, body)


def test_asterisk_target_is_a_405_when_method_is_options(cat: Program) -> None:
    assert ask(cat, b"OPTIONS * HTTP/1.1\r\nHost: h\r\n" + CLOSE + b"\r\n").status == 405


@pytest.mark.parametrize(("request_bytes", "body"), TAKEN.values(), ids=TAKEN)
def test_connection_serves_the_next_request_when_one_was_taken(cat: Program, request_bytes: bytes, body: bytes) -> None:
    answers = parse(raw(cat.port, request_bytes + last(posted(b"next"))))
    assert [(answer.status, answer.body) for answer in answers] == [(200, body), (200, b"next")]


# However it is cut


@pytest.mark.parametrize("name", ["plain", "chunk-extensions", "trailers", "empty-line-first", "no-body"])
def test_request_is_answered_the_same_when_cut_at_any_byte(cat: Program, name: str) -> None:
    request_bytes, body = TAKEN[name]
    request_bytes = last(request_bytes)
    for cut in range(1, len(request_bytes)):
        answer = ask(cat, [request_bytes[:cut], request_bytes[cut:]])
        assert (answer.status, answer.body) == (200, body), f"cut at {cut}"


@pytest.mark.parametrize(("request_bytes", "body"), SHORT.values(), ids=SHORT)
def test_request_is_answered_the_same_when_sent_byte_by_byte(cat: Program, request_bytes: bytes, body: bytes) -> None:
    request_bytes = last(request_bytes)
    answer = ask(cat, [request_bytes[index : index + 1] for index in range(len(request_bytes))])
    assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize(
    "name", ["length-and-chunked", "bare-cr-in-chunk-extension", "nul-in-value", "version-2", "no-host"]
)
def test_request_is_refused_the_same_when_sent_byte_by_byte(cat: Program, name: str) -> None:
    request_bytes = REFUSED[name]
    assert ask(cat, [request_bytes[index : index + 1] for index in range(len(request_bytes))]).status == 400


@pytest.mark.parametrize("name", ["plain", "trailers"])
def test_next_request_is_answered_the_same_when_its_beginning_came_with_the_last(cat: Program, name: str) -> None:
    request_bytes, body = TAKEN[name]
    first, second = posted(b"first"), last(request_bytes)
    for cut in range(len(second)):
        with connect(cat.port) as client:
            client.sendall(first + second[:cut])
            read_until(client, b"first")
            client.sendall(second[cut:])
            (answer,) = parse(read_all(client, 5.0))
        assert (answer.status, answer.body) == (200, body), f"cut at {cut}"


@pytest.mark.parametrize("rest", [b"\r\n", b"\r\n\r\n", SMUGGLED, b"\x00"], ids=["crlf", "crlfs", "request", "noise"])
def test_last_request_is_answered_when_bytes_follow_it(cat: Program, rest: bytes) -> None:
    answer = ask(cat, last(posted(b"hello")) + rest)
    assert (answer.status, answer.body) == (200, b"hello")


@PROCESSES
@given(st.data())
def test_pipelined_requests_are_answered_the_same_when_cut_anywhere(cat: Program, data: st.DataObject) -> None:
    taken = data.draw(st.lists(st.sampled_from(sorted(TAKEN.values())), max_size=3))
    stream = b"".join(request_bytes for request_bytes, _ in taken) + last(posted(b"end"))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    answers = parse(raw(cat.port, pieces))
    assert [answer.body for answer in answers] == [*(body for _, body in taken), b"end"]


@PROCESSES
@given(body=st.binary(max_size=2000), data=st.data())
def test_chunked_body_is_whole_when_chunked_in_any_way(cat: Program, body: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(body) - 1, 1)), max_size=8)))
    parts = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"
    answer = ask(cat, last(chunked(coded)))
    assert (answer.status, answer.body) == (200, body)


@PROCESSES
@given(st.binary(min_size=1, max_size=200))
def test_watchdog_lives_on_and_closes_when_it_is_sent_noise(cat: Program, noise: bytes) -> None:
    answers = parse(raw(cat.port, noise + b"\r\n\r\n\r\n"))
    assert [answer.status for answer in answers] in ([], [200], [400], [405], [501])  # some noise is a request
    assert http_request(cat.port, "GET", "/_/health").status == 200


# Order


def test_answers_come_in_order_when_the_first_is_the_slowest(shell: Program) -> None:
    scripts = [b"sleep 0.3; echo 1", b"echo 2", b"exit 3", b"echo 4"]
    received = raw(shell.port, b"".join(posted(script) for script in scripts[:-1]) + last(posted(scripts[-1])))
    assert [answer.text for answer in parse(received)] == ["1\n", "2\n", "exit status 3\n", "4\n"]


def test_every_request_is_answered_when_many_are_pipelined(cat: Program) -> None:
    bodies = [b"%d" % number for number in range(60)]
    received = raw(cat.port, b"".join(map(posted, bodies)) + last(posted(b"end")))
    assert [answer.body for answer in parse(received)] == [*bodies, b"end"]


def test_large_bodies_stay_apart_when_pipelined(cat: Program) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(4)]
    received = raw(cat.port, b"".join(map(posted, bodies)) + last(posted(b"end")))
    assert [answer.body for answer in parse(received)] == [*bodies, b"end"]


# The life of the connection


def test_connection_stays_open_when_nobody_wishes_otherwise(cat: Program) -> None:
    with connect(cat.port) as client:
        for body in (b"one", b"two", b"three"):
            client.sendall(posted(body))
            (answer,) = parse(read_until(client, body))
            assert answer.headers.get("connection", "keep-alive").lower() == "keep-alive"


def test_connection_is_closed_and_says_so_when_the_client_wishes(cat: Program) -> None:
    answers = parse(raw(cat.port, last(posted(b"hello")) + SMUGGLED))
    assert [answer.body for answer in answers] == [b"hello"]
    assert answers[0].headers["connection"] == "close"


def test_answer_ends_with_the_connection_when_client_speaks_1_0(cat: Program) -> None:
    (answer,) = parse(raw(cat.port, b"POST / HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello"))
    assert (answer.status, answer.body) == (200, b"hello")
    assert "transfer-encoding" not in answer.headers


def test_host_is_not_demanded_when_client_speaks_1_0(cat: Program) -> None:
    assert ask(cat, b"GET / HTTP/1.0\r\n\r\n").status == 200


def test_nothing_but_a_405_is_sent_when_the_method_is_head(cat: Program) -> None:
    received = raw(cat.port, b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n" + last(posted(b"next")))
    head, follower = parse(received, ["HEAD", "POST"])
    assert (head.status, head.body) == (405, b"")
    assert (follower.status, follower.body) == (200, b"next")


@pytest.mark.parametrize("method", [b"OPTIONS", b"PROPFIND", b"HEAD"])
def test_connection_serves_on_or_closes_when_a_405_had_a_body(cat: Program, method: bytes) -> None:
    refused = posted(b"ignored").replace(b"POST", method, 1)
    answers = parse(raw(cat.port, refused + last(posted(b"next"))), [method.decode(), "POST"])
    assert answers[0].status == 405
    assert [answer.body for answer in answers[1:]] in ([b"next"], [])
    if not answers[1:]:
        assert answers[0].headers["connection"] == "close"


def test_response_tells_its_length_and_date_when_sent(cat: Program) -> None:
    answer = ask(cat, last(posted(b"hello")))
    assert answer.headers["content-length"] == "5"
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", answer.headers["date"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_connection_is_given_up_when_client_goes_between_requests(cat: Program, count: int) -> None:
    before = cat.descriptors()
    clients = [connect(cat.port) for _ in range(5)]
    for client in clients:
        for _ in range(count):
            client.sendall(posted(b"hello"))
            read_until(client, b"hello")
        client.close()
    wait_until(lambda: cat.descriptors() <= before, 10.0, "the descriptors of the connections closed")


# Expect: 100-continue


def test_client_is_told_to_go_on_when_it_asks(cat: Program) -> None:
    with connect(cat.port) as client:
        client.sendall(HEAD + CLOSE + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        client.sendall(b"hello")
        (answer,) = parse(read_until(client, b"hello"))
        assert answer.status == 200


@pytest.mark.parametrize("case", ["405", "400", "431"])
def test_client_is_not_told_to_go_on_when_its_request_is_refused(cat: Program, case: str) -> None:
    headers = {"405": b"", "400": b"X-Timeout: banana\r\n", "431": b"X-A: " + b"a" * 200_000 + b"\r\n"}[case]
    head = HEAD.replace(b"POST", b"OPTIONS", 1) if case == "405" else HEAD
    with connect(cat.port) as client:
        client.sendall(head + headers + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        received = b""
        while b"\r\n" not in received:
            received += client.recv(65536)
        assert received.startswith(f"HTTP/1.1 {case} ".encode())


def test_client_is_not_told_to_go_on_when_it_speaks_1_0(cat: Program) -> None:
    received = raw(cat.port, [b"POST / HTTP/1.0\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", b"hello"])
    assert received.startswith(b"HTTP/1.1 200 ")


# Limits


@pytest.mark.parametrize("size_bytes", [3_000_000, 20_000_000])
def test_headers_are_answered_431_without_reading_on_when_they_never_end(cat: Program, size_bytes: int) -> None:
    before_bytes = cat.resident_bytes()
    answer = ask(cat, HEAD + b"X-A: " + b"a" * size_bytes)
    assert answer.status == 431
    assert answer.headers["connection"] == "close"
    assert cat.resident_bytes() - before_bytes < 16 << 20


def test_request_line_is_refused_when_it_never_ends(cat: Program) -> None:
    assert ask(cat, b"GET /" + b"a" * 3_000_000).status in (400, 414, 431)


@pytest.mark.parametrize(
    "endless", [b"1;" + b"a" * 3_000_000, b"0\r\n" + b"X-A: a\r\n" * 400_000], ids=["extension", "trailer"]
)
def test_body_is_refused_when_its_framing_never_ends(cat: Program, endless: bytes) -> None:
    assert ask(cat, chunked(endless)).status in (400, 431)
    cat.wait_idle()


def test_watchdog_reads_headers_in_linear_time_when_they_come_in_small_pieces(cat: Program) -> None:
    """Four times as long a field takes sixteen times as long where each piece has all before it read again."""

    def spent_ns(length: int) -> int:
        request_bytes = last(posted(b"hello", b"X-A: " + b"a" * length))
        pieces = [request_bytes[start : start + 50] for start in range(0, len(request_bytes), 50)]
        before_ns = read_spent_ns(cat.pid)
        answer = ask(cat, pieces)
        assert (answer.status, answer.body) == (200, b"hello")
        return read_spent_ns(cat.pid) - before_ns

    short, long = (min(spent_ns(length) for _ in range(3)) for length in (15_000, 60_000))
    assert long < 8 * short
