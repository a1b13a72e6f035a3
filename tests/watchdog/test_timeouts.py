"""Deadlines: nobody waits past one, and nobody who was in time is told otherwise."""

from __future__ import annotations

import math
import socket
import time
import uuid
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testkit.harness import (
    TICK_S,
    Answer,
    InBackground,
    Program,
    connect,
    crowding,
    http_request,
    noise_s,
    parse,
    read_all,
    read_until,
    wait_closed,
    wait_until,
)

GRACE_S = 5.0  # in which a caller is answered once a deadline has passed; what is wrong would take far longer
CLEARLY_S = 0.25  # how long before its deadline a process must have ended for the answer to be beyond doubt
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"
BATCH = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=6, max_size=6)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Program]:
    """A watchdog of `cat` that gives a client 0.5 s to say what it wants."""
    with Program("watchdog", {"fprocess": "cat", "read_timeout": "500ms"}) as program:
        yield program


def call(program: Program, run_s: float, limit_s: float, note: str = "/dev/null") -> Answer:
    """Run a function for `run_s` seconds with `limit_s` as the caller's own limit; it notes when it was done."""
    script = f"sleep {run_s:.2f}; date +%s.%N >{note}; echo done".encode()
    return http_request(program.port, "POST", "/", {"X-Timeout": f"{round(limit_s * 1000)}ms"}, script)


@settings(max_examples=8)
@given(BATCH)
def test_caller_is_answered_in_time_and_justly_when_run_and_limit_are_close(
    shell: Program, batch: list[tuple[int, int]]
) -> None:
    """Each pair is (run time, limit) in tenths of a second; six run side by side to fit more into the time."""
    notes, began_s = [shell.temporary / str(uuid.uuid4()) for _ in batch], time.time()
    calls = [
        InBackground(lambda pair=pair, note=note: call(shell, pair[0] / 10, pair[1] / 10, str(note)))  # type: ignore[misc]
        for pair, note in zip(batch, notes, strict=True)
    ]
    for (run_tenths, limit_tenths), note, background in zip(batch, notes, calls, strict=True):
        answer, run_s, limit_s = background.result(), run_tenths / 10, limit_tenths / 10
        assert answer.elapsed_s <= min(run_s, limit_s) + GRACE_S + noise_s()
        assert answer.status in (200, 408)
        assert answer.text == ("done\n" if answer.status == 200 else "Killed process.\n")
        if answer.status == 408:
            assert answer.elapsed_s >= limit_s - TICK_S
            done_s = float(note.read_text() or "inf") - began_s if note.exists() else math.inf
            assert done_s + CLEARLY_S + noise_s() > limit_s, f"killed although done at {done_s} of {limit_s} s"
        else:  # a watchdog that stood still over both sees the end first, which is as well
            assert run_s <= limit_s + noise_s()


@settings(max_examples=4)
@given(st.sampled_from([0.1, 0.25, 0.6]))
def test_caller_is_answered_at_exec_timeout_when_function_runs_on(limit_s: float) -> None:
    with Program("watchdog", {"fprocess": "sleep 600", "exec_timeout": f"{round(limit_s * 1000)}ms"}) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (408, "Killed process.\n")
        assert limit_s - TICK_S <= answer.elapsed_s <= limit_s + GRACE_S + noise_s()
        program.wait_idle(GRACE_S)


@pytest.mark.parametrize(
    "script",
    [
        b"trap '' TERM INT HUP; while :; do sleep 600; done",
        b"while :; do echo flood; done",
        b"exec <&-; exec >&-; exec 2>&-; exec sleep 600",
        b"kill -STOP $$",
        b"head -c 10000000 /dev/zero; exec sleep 600",
    ],
    ids=["ignores-signals", "floods", "closes-its-pipes", "stops-itself", "large-output-first"],
)
def test_caller_is_answered_at_its_limit_when_function_is_stubborn(shell: Program, script: bytes) -> None:
    answer = http_request(shell.port, "POST", "/", {"X-Timeout": "300ms"}, script)
    assert (answer.status, answer.text) == (408, "Killed process.\n")
    assert 0.3 - TICK_S <= answer.elapsed_s <= 0.3 + GRACE_S + noise_s()
    shell.wait_idle(GRACE_S)


def test_caller_is_answered_at_its_limit_when_it_still_sends_its_body(shell: Program) -> None:
    with connect(shell.port) as client:
        start_s = time.monotonic()
        client.sendall(HEAD + b"X-Timeout: 300ms\r\nContent-Length: 1000\r\n\r\nexec sleep 600\n")
        (answer,) = parse(read_until(client, b"Killed process.\n"))
        assert answer.status == 408
        assert 0.3 - TICK_S <= time.monotonic() - start_s <= 0.3 + GRACE_S + noise_s()


def test_caller_is_answered_at_its_limit_when_function_ignores_a_large_body() -> None:
    with Program("watchdog", {"fprocess": "sleep 600", "exec_timeout": "300ms"}) as program:
        answer = http_request(program.port, "POST", body=bytes(1_000_000))
        assert (answer.status, answer.text) == (408, "Killed process.\n")


def test_others_are_served_when_one_function_floods(shell: Program) -> None:
    flood = InBackground(lambda: http_request(shell.port, "POST", "/", {"X-Timeout": "1s"}, b"exec cat /dev/zero"))
    shell.wait_started()
    assert http_request(shell.port, "POST", body=b"echo quick").elapsed_s < noise_s()
    assert flood.result().status == 408


def test_function_may_tidy_up_but_caller_does_not_wait_when_term_grace_is_set() -> None:
    script = 'trap "touch $TMPDIR/tidied" TERM; sleep 600 & wait; sleep 600'
    limit_s = round(2 * crowding(), 1)  # the shell must have set its trap by then, and touch run within the grace
    settings_ = {"fprocess": f"sh -c '{script}'", "exec_timeout": f"{limit_s}s", "term_grace": "2s"}
    with Program("watchdog", settings_) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (408, "Killed process.\n")
        assert limit_s - TICK_S <= answer.elapsed_s <= limit_s + 2.0 + GRACE_S + noise_s()
        wait_until(lambda: (program.temporary / "tidied").exists(), GRACE_S, "the function tidied up")
        program.wait_idle(2.0 + GRACE_S)


# read_timeout


@pytest.mark.parametrize(
    "beginning",
    [b"P", b"POST / HTTP/1.1\r\n", HEAD, HEAD + b"X-A: ", HEAD + b"Content-Length: 9\r\n\r\n"]
    + [HEAD + b"Content-Length: 9\r\n\r\nhalf", HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"],
    ids=["byte", "line", "header", "in-header", "no-body", "half-body", "half-chunks"],
)
def test_client_gets_408_and_is_cut_when_it_stops_amid_a_request(impatient: Program, beginning: bytes) -> None:
    with connect(impatient.port) as client:
        start_s = time.monotonic()
        client.sendall(beginning)
        answers = parse(read_all(client))
        elapsed_s = time.monotonic() - start_s
    assert [answer.status for answer in answers] == [408]
    assert answers[0].headers["connection"] == "close"
    assert 0.5 - TICK_S <= elapsed_s <= 0.5 + GRACE_S + noise_s()
    impatient.wait_idle(GRACE_S)


@pytest.mark.parametrize("start", [HEAD + b"X-A: ", HEAD + b"Content-Length: 999\r\n\r\n"], ids=["header", "body"])
def test_client_gets_408_when_it_drips(impatient: Program, start: bytes) -> None:
    with connect(impatient.port) as client:
        start_s = time.monotonic()
        client.sendall(start)
        received = drip(client)
        assert 0.5 - TICK_S <= time.monotonic() - start_s <= 0.5 + GRACE_S + noise_s()
    assert received.startswith(b"HTTP/1.1 408 ")


def drip(client: socket.socket) -> bytes:
    """Send a byte each 50 ms until something comes back; return it."""
    client.settimeout(0.05)
    for _ in range(200):
        try:
            return client.recv(65536)
        except TimeoutError:
            client.sendall(b"a")
    raise AssertionError("it took a drip for 10 s")


def test_limit_starts_anew_when_the_next_request_of_a_connection_begins() -> None:
    pause_s = 0.8 * crowding()  # four are longer than the limit, and one is so much shorter that it may be late
    with (
        Program("watchdog", {"fprocess": "cat", "read_timeout": f"{3.75 * pause_s:.1f}s"}) as program,
        connect(program.port) as client,
    ):
        for _ in range(4):
            client.sendall(HEAD + b"Content-Length: 4\r\n\r\n")
            time.sleep(pause_s)  # what is asserted is that nothing happens meanwhile
            client.sendall(b"body")
            assert parse(read_until(client, b"body"))[0].status == 200


def test_connection_is_closed_without_a_word_when_no_request_begins_for_as_long(impatient: Program) -> None:
    # As with Go's server, whose idle limit is its read limit unless set.
    start_s = time.monotonic()
    with connect(impatient.port) as client:
        assert read_all(client) == b""
        assert 0.5 - TICK_S <= time.monotonic() - start_s <= 0.5 + GRACE_S + noise_s()


def test_limit_does_not_count_the_run_when_request_was_whole(impatient: Program) -> None:
    settings_ = {"fprocess": "sh -c 'sleep 0.9; cat'", "read_timeout": "400ms"}
    with Program("watchdog", settings_) as program:
        assert http_request(program.port, "POST", body=b"small").body == b"small"


def test_client_is_not_blamed_when_it_is_the_function_that_reads_slowly() -> None:
    # The body is larger than every buffer on the way: the client is held up by the function, not slow itself.
    limit_s = 1.5 * crowding()  # by far longer than it takes to send the body to one who reads it
    settings_ = {"fprocess": f"sh -c 'sleep {2 * limit_s:.1f}; wc -c'", "read_timeout": f"{limit_s:.1f}s"}
    with Program("watchdog", settings_) as program:
        answer = http_request(program.port, "POST", body=bytes(8_000_000))
        assert (answer.status, answer.text.strip()) == (200, "8000000")


# write_timeout


def test_reader_is_cut_when_it_does_not_read() -> None:
    settings_ = {"fprocess": "head -c 50000000 /dev/zero", "write_timeout": "700ms"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        start_s = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        client.recv(1)
        wait_closed(client, 0.7 + GRACE_S + noise_s())
        assert time.monotonic() - start_s >= 0.7 - TICK_S
        assert http_request(program.port, "GET", "/_/health").status == 200


def test_reader_gets_all_when_it_is_slow_but_in_time() -> None:
    settings_ = {"fprocess": "head -c 20000000 /dev/zero", "write_timeout": "10s"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        received = bytearray(client.recv(1000))
        start_s = time.monotonic()
        wait_until(lambda: time.monotonic() - start_s > 1.0, 2.0, "1 s passes without reading")
        received += read_all(client)
        assert len(parse(bytes(received))[0].body) == 20_000_000


def test_limit_does_not_count_the_run_when_the_function_is_slow() -> None:
    settings_ = {"fprocess": "sh -c 'sleep 0.8; echo done'", "write_timeout": "300ms", "healthcheck_interval": "0"}
    with Program("watchdog", settings_) as program:
        assert http_request(program.port).text == "done\n"


def test_every_call_ends_when_many_time_out_at_once(shell: Program) -> None:
    calls = [InBackground(lambda: call(shell, 600, 0.5)) for _ in range(30)]
    answers = [background.result() for background in calls]
    assert {answer.status for answer in answers} == {408}
    assert max(answer.elapsed_s for answer in answers) <= 0.5 + GRACE_S + noise_s() * 2
    shell.wait_idle(GRACE_S)
