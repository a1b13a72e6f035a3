"""cgi_response=true: a function's output begins with its own status and header fields, whatever the mode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import MAX_FIELDS_COUNT, MAX_HEAD_BYTES, BadOutputHead, parse_output_head
from testkit.harness import Answer, Program, connect, http_request, parse, raw, read_until

LARGE = b"X-A: " + b"a" * (MAX_HEAD_BYTES - 7) + b"\n\n"  # the largest that is allowed: 64 KiB with the empty line

# What each head means: the status, and the fields that are passed on.
HEADS: dict[str, tuple[bytes, int, list[tuple[bytes, bytes]]]] = {
    "lf": (b"Content-Type: a/b\n\n", 200, [(b"Content-Type", b"a/b")]),
    "crlf": (b"Content-Type: a/b\r\n\r\n", 200, [(b"Content-Type", b"a/b")]),
    "mixed-ends": (b"A: b\r\nC: d\n\r\n", 200, [(b"A", b"b"), (b"C", b"d")]),
    "status-with-words": (b"Status: 404 Not Found\n\n", 404, []),
    "status-without-words": (b"Status: 201\n\n", 201, []),
    "status-in-lower-case": (b"status:503\n\n", 503, []),
    "location": (b"Location: /there\n\n", 302, [(b"Location", b"/there")]),
    "location-and-status": (b"Location: /there\nStatus: 307\n\n", 307, [(b"Location", b"/there")]),
    "repeated-field": (b"Set-Cookie: a\nSet-Cookie: b\n\n", 200, [(b"Set-Cookie", b"a"), (b"Set-Cookie", b"b")]),
    "empty-value": (b"X-A:\n\n", 200, [(b"X-A", b"")]),
    "lying-length": (b"Content-Length: 7\nX-A: b\n\n", 200, [(b"X-A", b"b")]),
    "hop-by-hop": (b"Connection: X-A\nX-A: b\nTransfer-Encoding: chunked\nX-C: d\n\n", 200, [(b"X-C", b"d")]),
    "date": (b"Date: then\nX-A: b\n\n", 200, [(b"X-A", b"b")]),
    "64-kib": (LARGE, 200, [(b"X-A", LARGE[5:-2])]),
}
BAD_HEADS = {
    "no-head": (b"hello world\n\n", "line 1 is no header field"),
    "no-field": (b"\nhello", "it begins with an empty line"),
    "folded": (b"X-A: b\n c\n\n", "line 2 is no header field"),
    "space-before-colon": (b"X-A : b\n\n", "line 1 is no header field"),
    "control-character": (b"X-A: \x01\n\n", "line 1 is no header field"),
    "bare-cr": (b"X-A: a\rX-B: b\n\n", "line 1 is no header field"),
    "binary": (bytes(range(256)), "line 1 is no header field"),
    "two-status": (b"Status: 200\nStatus: 404\n\n", "more than one Status"),
    "status-1xx": (b"Status: 101\n\n", "its Status is none from 200 to 599"),
    "status-600": (b"Status: 600\n\n", "its Status is none from 200 to 599"),
    "status-words": (b"Status: Not Found\n\n", "its Status is none from 200 to 599"),
    "status-empty": (b"Status:\n\n", "its Status is none from 200 to 599"),
    "over-64-kib": (b"X-" + LARGE, f"no empty line within {MAX_HEAD_BYTES} bytes"),
    "too-many": (b"A: b\n" * (MAX_FIELDS_COUNT + 1) + b"\n", f"too many header fields; allowed: {MAX_FIELDS_COUNT}"),
}


@pytest.mark.parametrize(("data", "status", "headers"), HEADS.values(), ids=HEADS)
def test_head_means_status_and_fields_however_much_follows(
    data: bytes, status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    for body in (b"", b"\n\nbody", bytes(range(256))):
        assert parse_output_head(data + body) == (len(data), status, headers)


@pytest.mark.parametrize("data", [data for data, _, _ in HEADS.values() if len(data) < 1000])
def test_head_is_awaited_when_it_comes_in_pieces(data: bytes) -> None:
    assert [parse_output_head(data[:size]) for size in range(len(data))] == [None] * len(data)


@pytest.mark.parametrize(("data", "problem"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_head_is_refused_with_the_reason(data: bytes, problem: str) -> None:
    with pytest.raises(BadOutputHead, match=problem):
        parse_output_head(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused_or_wait_for_more(data: bytes) -> None:
    try:
        head = parse_output_head(data)
    except BadOutputHead:
        return
    assert head is None or data[: head.size].endswith((b"\n\n", b"\n\r\n"))


@pytest.fixture(scope="module", params=["serializing", "streaming"])
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    """A watchdog whose function is the shell that runs the body."""
    with Program("watchdog", {"fprocess": "sh", "cgi_response": "true", "mode": request.param}) as program:
        yield program


def post(program: Program, script: str) -> Answer:
    return http_request(program.port, "POST", body=script.encode())


def test_function_says_its_own_status_and_fields(program: Program) -> None:
    answer = post(program, r"printf 'Status: 404 Not Found\nX-A: b\nContent-Type: a/b\nContent-Length: 99\n\nno such'")
    assert (answer.status, answer.body) == (404, b"no such")
    assert answer.headers["x-a"] == "b"
    assert answer.headers["content-type"] == "a/b"


def test_answer_has_one_duration_when_the_function_tells_its_own(program: Program) -> None:
    script = b"printf 'X-Duration-Seconds: 9\n\nhi'"
    head = b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(script)
    received = raw(program.port, head + script)
    assert received.lower().count(b"x-duration-seconds: ") == 1


def test_function_redirects_when_it_names_a_location(program: Program) -> None:
    answer = post(program, r"printf 'Location: https://example.org/there\r\n\r\n'")
    assert (answer.status, answer.body, answer.headers["location"]) == (302, b"", "https://example.org/there")


def test_head_that_comes_in_pieces_is_one_head(program: Program) -> None:
    answer = post(program, r"printf 'Sta'; sleep 0.05; printf 'tus: 201\nX-A: b\n'; sleep 0.05; printf '\nbody'")
    assert (answer.status, answer.headers["x-a"], answer.body) == (201, "b", b"body")


def test_body_is_whole_and_binary_when_it_is_large(program: Program) -> None:
    answer = post(program, r"printf 'Content-Type: a/b\n\n'; head -c 3000000 /dev/zero; printf '\377\r\n\r\n'")
    assert answer.body == bytes(3_000_000) + b"\xff\r\n\r\n"


def test_answer_has_no_body_when_its_status_has_none(program: Program) -> None:
    request = rb"printf 'Status: 204\n\nbody'"
    head = b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(request)
    (answer,) = parse(raw(program.port, head + request))
    assert (answer.status, answer.body) == (204, b"")


@pytest.mark.parametrize("script", ["echo hello", "printf '\\nhello'", "printf 'X-A: b\\n'", "true"])
def test_output_without_a_head_is_a_failure_that_says_so(program: Program, script: str) -> None:
    answer = post(program, script)
    assert answer.status == 500
    assert "the function's output has no valid head (cgi_response): " in answer.text
    program.wait_idle()


def test_log_shows_the_line_when_it_is_no_head(program: Program) -> None:
    post(
        program,
        "echo oh $((40 + 2)) dear; sleep 60" if program.environment["mode"] == "streaming" else "echo oh 42 dear",
    )
    program.wait_log("the output begins with: oh 42 dear")
    program.wait_idle()


def test_log_tells_of_no_kill_when_the_process_ended_by_itself(program: Program) -> None:
    post(program, "printf 'X-A: b'")
    assert "Killed process" not in program.wait_log("it ended before an empty line")


@pytest.mark.parametrize("printed", ["", "printf 'X-A: b'; "], ids=["nothing", "half-a-head"])
def test_exit_status_decides_when_the_answer_has_not_begun(program: Program, printed: str) -> None:
    answer = post(program, f"{printed}exit 3")
    assert answer.status == 500
    assert answer.body.startswith(b"exit status 3\n")


def test_deadline_decides_when_the_head_is_not_whole(program: Program) -> None:
    script = b"printf 'X-A: b\n'; sleep 60"
    answer = http_request(program.port, "POST", headers={"X-Timeout": "300ms"}, body=script)
    assert (answer.status, answer.body) == (408, b"Killed process.\n")
    program.wait_idle()


def test_body_streams_behind_the_head() -> None:
    with Program("watchdog", {"fprocess": "sh", "cgi_response": "true", "mode": "streaming"}) as program:
        script = rb"printf 'Status: 201\nContent-Type: text/event-stream\n\ndata: 1\n'; sleep 60"
        with connect(program.port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(script) + script)
            received = read_until(client, b"data: 1\n\r\n")
            assert received.startswith(b"HTTP/1.1 201 Created\r\n")
        program.wait_idle()


def test_tree_is_gone_when_the_client_leaves_before_the_head_is_whole(program: Program) -> None:
    script = b"printf 'X-A: b\n'; setsid -f sleep 60; sleep 60"
    with connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(script) + script)
        program.wait_started(2)
    program.wait_idle()
