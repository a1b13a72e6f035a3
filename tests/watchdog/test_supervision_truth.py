"""Every outcome has one status, one line in the log and one metric, and none of them lies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest

from faashound import watchdog
from testkit.harness import (
    Answer,
    InBackground,
    Program,
    connect,
    crowding,
    free_port,
    http_request,
    parse,
    raw,
    read_all,
    wait_until,
)
from testkit.inspection import in_flight, is_free

CALL_ID = "a-call.1"
SOON_S = 10.0  # until what follows an answer has happened: a line, a metric, the end of a process
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\nX-Call-Id: " + CALL_ID.encode() + b"\r\n"


@pytest.fixture(scope="module")
def judged() -> Iterator[Program]:
    """A watchdog that runs scripts, whose log is JSON, and that has metrics and low limits."""
    # What is sent in pieces waits for its process to start, which is to be well within read_timeout.
    limits = {"max_inflight": "1", "max_body": "2000", "read_timeout": f"{2 * crowding():.1f}s"}
    others = {"log_format": "json", "metrics_port": str(free_port())}
    with Program("watchdog", {"fprocess": "sh"} | limits | others) as program:
        yield program


def post(program: Program, script: bytes, **headers: str) -> Answer:
    fields = {"X-Call-Id": CALL_ID} | {name.replace("_", "-"): value for name, value in headers.items()}
    return http_request(program.port, "POST", "/", fields, script)


def send(program: Program, request: bytes) -> Answer:
    return parse(raw(program.port, request))[-1]


def send_broken(program: Program) -> Answer:
    with connect(program.port) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\necho\n\r\n")
        program.wait_started()
        client.sendall(b"nonsense\r\n")
        return parse(read_all(client))[-1]


def send_too_much(program: Program) -> Answer:
    with connect(program.port) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n")
        program.wait_started()  # what has come whole at once, and is too much, starts none
        client.sendall(b"7d0\r\n" + b"\n" * 2000 + b"\r\n0\r\n\r\n")
        return parse(read_all(client))[-1]


def leave(program: Program) -> None:
    with connect(program.port) as client:
        client.sendall(HEAD + b"Content-Length: 9\r\n\r\nsleep 60\n")
        program.wait_started()


def second(program: Program) -> Answer:
    """Return what a second caller is told while the only slot is taken by one that leaves when that is done."""
    with connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nsleep 60\n")
        program.wait_started()
        return post(program, b"echo second")


@dataclass(frozen=True)
class Outcome:
    """A call and what must be known of it: status, how its process ended (None: it had none), bytes in and out."""

    call: Callable[[Program], Answer | None]
    status: int
    exit: str | None = None
    bytes_in: int | None = None
    bytes_out: int | None = None
    method: str = "post"
    has_id: bool = True  # False: refused before a header of it is believed


SAYS_AND_HANGS = b"echo hi; exec sleep 60"
OUTCOMES = {
    "well": Outcome(lambda p: post(p, b"echo hi"), 200, "exit status 0", 7, 3),
    "fails": Outcome(lambda p: post(p, b"echo hi; exit 3"), 500, "exit status 3", 15, 3),
    "is-killed": Outcome(lambda p: post(p, b"kill -SEGV $$"), 500, "signal: segmentation fault", 13, 0),
    "deadline": Outcome(
        lambda p: post(p, SAYS_AND_HANGS, X_Timeout=f"{2 * crowding():.1f}s"), 408, "signal: killed", 22, 3
    ),
    "client-leaves": Outcome(leave, 499, "signal: killed", 9, 0),
    "body-does-not-come": Outcome(
        lambda p: send(p, HEAD + b"Content-Length: 20\r\n\r\necho half\n"), 408, "signal: killed", 10
    ),
    "body-is-broken": Outcome(send_broken, 400, "signal: killed", 5),
    "body-too-large-in-chunks": Outcome(send_too_much, 413, "signal: killed"),
    "body-too-large-in-a-chunk": Outcome(
        lambda p: send(p, HEAD + b"Transfer-Encoding: chunked\r\n\r\n7d1\r\n" + b"\n" * 2001 + b"\r\n0\r\n\r\n"), 413
    ),
    "body-too-large": Outcome(lambda p: send(p, HEAD + b"Content-Length: 2001\r\n\r\n" + b"\n" * 2001), 413),
    "too-many": Outcome(second, 429),
    "bad-x-timeout": Outcome(lambda p: post(p, b"", X_Timeout="soon"), 400),
    "bad-method": Outcome(lambda p: send(p, HEAD.replace(b"POST", b"TRACE") + b"\r\n"), 405, method="trace"),
    "head-too-large": Outcome(
        lambda p: send(p, HEAD + b"X-A: " + b"x" * 70_000 + b"\r\n\r\n"), 431, method="", has_id=False
    ),
    "bad-framing": Outcome(
        lambda p: send(p, HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        400,
        method="",
        has_id=False,
    ),
    "head-does-not-come": Outcome(lambda p: send(p, HEAD), 408, method="", has_id=False),
}


def counts(program: Program) -> Counter[tuple[str, str]]:
    """Return http_requests_total by code and method; the histogram must agree."""
    text = http_request(program.metrics_port, "GET", "/metrics").text
    labels = r'\{code="(\d+)",method="(\w+)"\} (\S+)$'
    totals = re.findall(r"^http_requests_total" + labels, text, re.MULTILINE)
    timed = re.findall(r"^http_request_duration_seconds_count" + labels, text, re.MULTILINE)
    assert sorted(totals) == sorted(timed)
    return Counter({(code, method): int(float(value)) for code, method, value in totals})


def records(program: Program) -> list[dict[str, Any]]:
    """Return the lines of the log that tell of an outcome."""
    lines = [json.loads(line) for line in program.log_lines()]
    return [line for line in lines if "status" in line]


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES)
def test_outcome_has_one_line_and_one_metric_when_a_call_ends(judged: Program, outcome: Outcome) -> None:
    wait_until(lambda: is_free(judged), SOON_S, "the slot is free")
    counted, logged = counts(judged), len(records(judged))
    answer = outcome.call(judged)
    assert answer is None or answer.status == outcome.status
    expected = 2 if outcome.status == 429 else 1  # the other call, whose slot it was, ends as well
    wait_until(lambda: len(records(judged)) >= logged + expected, SOON_S, "a line about the end")
    of_it = [each for each in records(judged)[logged:] if each["status"] == outcome.status]
    assert len(of_it) == 1
    check_record(of_it[0], outcome)
    change = counts(judged) - counted
    assert sum(change.values()) == expected
    assert [code for (code, method), _ in change.items() if method == outcome.method or not outcome.method].count(
        str(outcome.status)
    )


def check_record(record: dict[str, Any], outcome: Outcome) -> None:
    assert record.get("call_id") == (CALL_ID if outcome.has_id else None)
    # What is killed is waited for, but not for long: the line does not say then how it has ended.
    assert record.get("exit") in (outcome.exit, "not ended yet" if outcome.exit == "signal: killed" else None)
    if outcome.has_id:
        assert re.search(r"Duration: \d+\.\d+s$", record["msg"])
    if outcome.exit is not None:
        assert record["pid"] > 1
        assert outcome.bytes_in in (None, record["in"])
        assert outcome.bytes_out in (None, record["out"])


def test_in_flight_is_zero_when_all_outcomes_have_been(judged: Program) -> None:
    wait_until(lambda: in_flight(judged) == 0, SOON_S, "in flight 0")


def test_answer_is_500_with_the_reason_when_the_program_cannot_start_or_is_replaced() -> None:
    with Program("watchdog", {"fprocess": "./function", "log_format": "json"}) as program:
        function = program.temporary / "function"
        assert post(program, b"").status == 500
        function.write_text("#!/bin/sh\necho hi\n")
        assert "permission denied" in post(program, b"").text
        function.chmod(0o755)
        assert post(program, b"").text == "hi\n"
        function.unlink()
        assert "no such file" in post(program, b"").text
        wait_until(lambda: len(records(program)) == 4, SOON_S, "a line for each")
        assert [record["status"] for record in records(program)] == [500, 500, 200, 500]


# Too large for execve: whose fault is it?


def shrink_execve(program: Program, limit_bytes: int) -> None:
    """Let words and environment of what the watchdog executes have `limit_bytes` together (execve(2): a quarter)."""
    resource.prlimit(program.pid, resource.RLIMIT_STACK, (4 * limit_bytes, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("own_bytes", "header_bytes", "status"),
    [(100_000, 0, 200), (100_000, 1000, 200), (100_000, 50_000, 431), (170_000, 0, 500), (170_000, 50_000, 500)],
)
def test_answer_is_431_for_headers_and_500_for_our_environment_when_execve_refuses(
    own_bytes: int, header_bytes: int, status: int
) -> None:
    own = {f"OWN_{index}": "x" * 10_000 for index in range(own_bytes // 10_000)}
    with Program("watchdog", {"fprocess": "echo hi"} | own) as program:
        shrink_execve(program, 140_000)
        headers = {f"X-{index}": "x" * 1000 for index in range(header_bytes // 1000)}
        answer = http_request(program.port, "GET", "/", headers)
        assert answer.status == status
        if status == 500:
            assert "argument list too long" in answer.text
        assert http_request(program.port, "GET", "/_/health").status == 200


# Exit against deadline.


@pytest.mark.parametrize("size_bytes", [6, 1_000_000])
def test_answer_is_one_of_two_and_whole_when_exit_and_deadline_meet(shell: Program, size_bytes: int) -> None:
    """Twelve at a time on a busy machine: some end before, some after, some at the deadline."""
    call_id = str(uuid.uuid4())
    script = b"sleep 0.3; head -c %d /dev/zero | tr '\\0' x" % size_bytes
    whole = {200: b"x" * size_bytes, 408: b"Killed process.\n"}
    total = 0
    for limit_ms in (300, 303, 306, 310, 320):
        calls = [
            InBackground(lambda: post(shell, script, X_Timeout=f"{limit_ms}ms", X_Call_Id=call_id))  # noqa: B023
            for _ in range(12)
        ]
        for call in calls:
            answer = call.result()
            assert answer.body == whole[answer.status]
            assert answer.elapsed_s <= limit_ms / 1000 + SOON_S * crowding()
        total += len(calls)
    shell.wait_idle(SOON_S)
    wait_until(lambda: ends(shell, call_id) == total, SOON_S, "one line for each")


def ends(program: Program, call_id: str) -> int:
    """Return how many calls have ended that were given `call_id`; a line of another may come late."""
    return sum("Duration: " in line and f"call_id={call_id}" in line for line in program.log_lines())


class WritesBetween(ThreadPoolExecutor):
    """Threads as they are; but what `write` writes comes after their first look at an empty pipe, before it is told."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(1)
        self._write: Callable[[], None] | None = write

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """As the base, but wait for the end: the loop stands still meanwhile, as it does on a busy machine."""
        future = super().submit(function, *arguments, **named)
        if isinstance(future.exception(), BlockingIOError) and self._write is not None:
            self._write()
            self._write = None
        return future


def test_output_is_whole_when_its_end_and_a_stop_come_before_the_loop_hears_of_an_empty_pipe() -> None:
    async def collect() -> int:
        loop = asyncio.get_running_loop()
        ready = watchdog.EpollSet(loop)
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        ended = asyncio.Event()
        stdout = watchdog.Stdout(ready, read_end, ended.set, lambda error: pytest.fail(str(error)))

        def end() -> None:
            os.write(write_end, b"x" * 50_000)
            os.close(write_end)
            stdout.stop(discarding=False)
            ended.set()

        loop.set_default_executor(WritesBetween(end))
        for written_bytes in range(50_000, watchdog.SPILL_BYTES + 50_000, 50_000):
            os.write(write_end, b"x" * 50_000)
            while stdout.output.bytes_count < written_bytes:  # noqa: ASYNC110 - it tells nobody of each read
                await asyncio.sleep(0)
        await ended.wait()
        await stdout.settled()
        count = stdout.output.bytes_count
        stdout.drop()
        stdout.close()
        ready.close()
        return count

    with asyncio.Runner() as runner:
        assert runner.run(collect()) == (watchdog.SPILL_BYTES // 50_000 + 2) * 50_000


class NoThreads(ThreadPoolExecutor):
    """As where a limit of processes is reached."""

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        raise RuntimeError("can't start new thread")


def test_output_is_said_to_be_lost_when_there_is_no_thread_to_write_it_to_a_file() -> None:
    async def collect() -> watchdog.FaashoundError:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(NoThreads())
        ready = watchdog.EpollSet(loop)
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        lost: asyncio.Future[watchdog.FaashoundError] = loop.create_future()
        stdout = watchdog.Stdout(ready, read_end, lambda: None, lost.set_result)
        while not lost.done():
            with suppress(BlockingIOError):
                os.set_blocking(write_end, False)
                os.write(write_end, b"x" * 50_000)
            await asyncio.sleep(0)
        stdout.stop(discarding=True)
        await stdout.settled()
        stdout.drop()
        stdout.close()
        os.close(write_end)
        ready.close()
        return lost.result()

    async def bounded() -> watchdog.FaashoundError:
        async with asyncio.timeout(10):
            return await collect()

    with asyncio.Runner() as runner:
        error = runner.run(bounded())
    assert str(error) == "the output could not be kept: can't start new thread"


def test_answer_is_one_of_two_when_exit_and_hang_up_meet(shell: Program) -> None:
    call_id = str(uuid.uuid4())
    head = b"POST / HTTP/1.1\r\nHost: h\r\nX-Call-Id: %b\r\nContent-Length: 20\r\n\r\n" % call_id.encode()
    for delay_ms in range(0, 40, 2):
        with connect(shell.port) as client:
            client.sendall(head + b"(sleep 60 &) echo hi")
            client.settimeout(0.001 + delay_ms / 1000)
            try:
                client.recv(1)
            except TimeoutError:
                continue
    shell.wait_idle(SOON_S)
    wait_until(lambda: ends(shell, call_id) == 20, SOON_S, "a line for each")


# Descriptors.


LINKS = b"for f in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do readlink /proc/$$/fd/$f; done; sleep 0.3"


def test_functions_hold_three_descriptors_and_nobody_elses_when_started_together(shell: Program) -> None:
    with connect(shell.port) as idle, connect(shell.port) as half:
        idle.sendall(b"GET /_/health HTTP/1.1\r\nHost: h\r\n\r\n")
        half.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nsleep 1\n")
        spilling = InBackground(lambda: post(shell, b"head -c 1000000 /dev/zero; sleep 0.5"))
        calls = [InBackground(lambda: post(shell, LINKS)) for _ in range(20)]
        held = [call.result().text.split() for call in calls]
        assert all(len(links) == 3 for links in held), held
        stdin_of, stdout_of = Counter(links[0] for links in held), Counter(links[1] for links in held)
        assert max((stdin_of + stdout_of).values()) == 1
        assert len(spilling.result().body) == 1_000_000


def test_input_ends_at_once_when_other_functions_run(shell: Program) -> None:
    """If another function held the writing end of its pipe, `cat` would wait for that function's end."""
    go = shell.temporary / str(uuid.uuid4())
    sleeping = [
        InBackground(lambda: post(shell, b"until [ -e %b ]; do sleep 0.05; done" % bytes(go))) for _ in range(10)
    ]
    quick = [InBackground(lambda: post(shell, b"cat; echo end")) for _ in range(10)]
    assert {call.result().text for call in quick} == {"end\n"}
    go.touch()
    assert {call.result().status for call in sleeping} == {200}


def test_function_does_not_inherit_what_the_watchdog_inherited() -> None:
    read_end, write_end = os.pipe()
    try:
        with Program("watchdog", {"fprocess": "sh"}, pass_fds=(read_end, write_end)) as program:
            assert len(post(program, LINKS).text.split()) == 3
    finally:
        os.close(read_end)
        os.close(write_end)


def test_slow_reader_gets_the_whole_answer_of_a_call_that_has_left_a_daemon(shell: Program) -> None:
    with connect(shell.port) as client:
        script = b"setsid -f sleep 60; head -c 3000000 /dev/zero"
        client.sendall(
            b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(script) + script
        )
        received = client.recv(1)
        shell.wait_idle(SOON_S)
        (answer,) = parse(received + read_all(client))
        assert (answer.status, len(answer.body)) == (200, 3_000_000)
