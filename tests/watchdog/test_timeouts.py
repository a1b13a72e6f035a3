"""Deadlines: nobody waits past one, and nobody who was in time is told otherwise."""

from __future__ import annotations

import socket
import time
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
    http_request,
    noise_s,
    parse,
    read_all,
    read_until,
    wait_closed,
    wait_until,
)

GRACE_S = 0.1  # what the program may take to answer once a deadline has passed
CLEARLY_S = 0.25  # how far from its deadline a process must end for the answer to be beyond doubt
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"
BATCH = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=6, max_size=6)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Program]:
    """A watchdog of `cat` that gives a client 0.5 s to say what it wants."""
    with Program("watchdog", {"fprocess": "cat", "read_timeout": "500ms"}) as program:
        yield program


def call(program: Program, run_s: float, limit_s: float) -> Answer:
    """Run a function for `run_s` seconds with `limit_s` as the caller's own limit (X-Timeout)."""
    script = b"sleep %.2f; echo done" % run_s
    return http_request(program.port, "POST", "/", {"X-Timeout": f"{round(limit_s * 1000)}ms"}, script)


@settings(max_examples=8)
@given(BATCH)
def test_caller_is_answered_in_time_and_justly_when_run_and_limit_are_close(
    shell: Program, batch: list[tuple[int, int]]
) -> None:
    """Each pair is (run time, limit) in tenths of a second; six run side by side to fit more into the time."""
    calls = [InBackground(lambda pair=pair: call(shell, pair[0] / 10, pair[1] / 10)) for pair in batch]  # type: ignore[misc]
    for (run_tenths, limit_tenths), background in zip(batch, calls, strict=True):
        answer, run_s, limit_s = background.result(), run_tenths / 10, limit_tenths / 10
        assert answer.elapsed_s <= min(run_s, limit_s) + GRACE_S + noise_s()
        assert answer.status in (200, 408)
        assert answer.text == ("done\n" if answer.status == 200 else "Killed process.\n")
        if answer.status == 408:
            assert answer.elapsed_s >= limit_s
            assert run_s + noise_s() > limit_s, f"killed although done at {run_s} of {limit_s} s"
        else:
            assert run_s <= limit_s


@settings(max_examples=4)
@given(st.sampled_from([0.1, 0.25, 0.6]))
def test_caller_is_answered_at_exec_timeout_when_function_runs_on(limit_s: float) -> None:
    with Program("watchdog", {"fprocess": "sleep 600", "exec_timeout": f"{round(limit_s * 1000)}ms"}) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (408, "Killed process.\n")
        assert limit_s - TICK_S <= answer.elapsed_s <= limit_s + GRACE_S + noise_s()
        program.wait_idle(1.0)


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
    shell.wait_idle(1.0)


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
    settings_ = {"fprocess": f"sh -c '{script}'", "exec_timeout": "300ms", "term_grace": "600ms"}
    with Program("watchdog", settings_) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (408, "Killed process.\n")
        assert 0.3 - TICK_S <= answer.elapsed_s <= 0.3 + 0.6 + GRACE_S + noise_s()
        wait_until(lambda: (program.temporary / "tidied").exists(), 1.0, "the function tidied up")
        program.wait_idle(0.6 + noise_s())


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
    impatient.wait_idle(1.0)


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
    for _ in range(100):
        try:
            return client.recv(65536)
        except TimeoutError:
            client.sendall(b"a")
    raise AssertionError("it took a drip for 5 s")


def test_limit_starts_anew_when_the_next_request_of_a_connection_begins(impatient: Program) -> None:
    with connect(impatient.port) as client:
        for _ in range(3):
            client.sendall(HEAD + b"Content-Length: 4\r\n\r\n")
            start_s = time.monotonic()
            wait_until(lambda start_s=start_s: time.monotonic() - start_s > 0.3, 1.0, "0.3 s pass")  # type: ignore[misc]
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
    settings_ = {"fprocess": "sh -c 'sleep 1.2; wc -c'", "read_timeout": "400ms"}
    with Program("watchdog", settings_) as program:
        answer = http_request(program.port, "POST", body=bytes(8_000_000))
        assert (answer.status, answer.text.strip()) == (200, "8000000")


# write_timeout


def test_reader_is_cut_when_it_does_not_read() -> None:
    settings_ = {"fprocess": "head -c 50000000 /dev/zero", "write_timeout": "700ms"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        client.recv(1)
        start_s = time.monotonic()
        wait_closed(client, 0.7 + GRACE_S + noise_s())
        assert time.monotonic() - start_s > 0.3
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
    shell.wait_idle(2.0)
