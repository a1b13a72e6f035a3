"""From SIGTERM to the end: unhealthy at once, accepting a while, draining what runs, and gone in bounded time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from testkit.harness import (
    TICK_S,
    InBackground,
    Program,
    command_of,
    connect,
    free_port,
    http_request,
    parse,
    read_all,
    read_until,
    run,
    wait_closed,
    wait_until,
)

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
LONGEST_INTERVAL_S = 5.0  # that is not asked for
WAIT_FOR_GO = 'while [ ! -e "$TMPDIR/go" ]; do sleep 0.02; done; echo went'


def refuses(program: Program) -> bool:
    """Whether a new connection to `program` is refused, or dropped unanswered as its socket closes."""
    try:
        connect(program.port, timeout_s=5).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    return False


def health(program: Program) -> int:
    return http_request(program.port, "GET", "/_/health").status


def settings(script: str, **others: str) -> dict[str, str]:
    return {"fprocess": f"sh -c '{script}'"} | others


@pytest.fixture
def draining() -> Iterator[Program]:
    """A watchdog that has just got SIGTERM and stays up, unhealthy, for longer than a test lasts."""
    with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "1m"}) as program:
        program.terminate()
        wait_until(lambda: health(program) == 503, 15.0, "unhealthy")
        yield program


def test_watchdog_is_unhealthy_but_serves_when_told_to_stop(draining: Program) -> None:
    assert not (draining.temporary / ".lock").exists()
    assert http_request(draining.port, "GET", "/_/ready").status == 503
    assert http_request(draining.port, "POST", "/_/health").status == 405
    assert http_request(draining.port, "POST", body=b"served").body == b"served"
    assert run("watchdog", ["--run-healthcheck"], {"TMPDIR": str(draining.temporary)}).returncode == 1


def test_watchdog_is_not_ready_but_draining_when_told_to_stop_while_it_is_full() -> None:
    full = settings("echo started; sleep 60", max_inflight="1", healthcheck_interval="1m", mode="streaming")
    with Program("watchdog", full) as program, connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\n\r\n")
        read_until(client, b"started\n\r\n")
        program.terminate()
        wait_until(lambda: health(program) == 503, 15.0, "unhealthy")
        answer = http_request(program.port, "GET", "/_/ready")
        assert (answer.status, answer.text) == (503, "draining\n")


def test_watchdog_is_unhealthy_when_told_to_stop_without_a_lock_file() -> None:
    with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "1m", "suppress_lock": "true"}) as program:
        program.terminate()
        wait_until(lambda: health(program) == 503, 15.0, "unhealthy")


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=["TERM", "INT-INT"])
def test_watchdog_stops_at_once_when_told_again(draining: Program, signals: list[signal.Signals]) -> None:
    start_s = time.monotonic()
    for each in signals:
        draining.process.send_signal(each)
        # Two pending signals of one kind are one to the kernel: the next waits until this one was taken.
        wait_until(lambda: draining.process.poll() is not None or not pending(draining), 15.0, "signal taken")
    draining.wait_exit()
    assert time.monotonic() - start_s < 30, "the interval is a minute"


def pending(program: Program) -> bool:
    """Whether a signal waits to be delivered to `program`."""
    with open(f"/proc/{program.pid}/status", encoding="ascii") as status:
        masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    return any(masks)


def test_watchdog_exits_0_after_the_interval_when_idle() -> None:
    with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "700ms"}) as program:
        start_s = time.monotonic()
        program.terminate()
        assert program.wait_exit() == 0
        assert 0.7 - TICK_S <= time.monotonic() - start_s < LONGEST_INTERVAL_S


def test_interval_is_the_write_timeout_when_that_is_shorter_than_5_s() -> None:
    with Program("watchdog", {"fprocess": "cat", "write_timeout": "300ms"}) as program:
        start_s = time.monotonic()
        program.terminate()
        assert program.wait_exit() == 0
        assert 0.3 - TICK_S <= time.monotonic() - start_s < LONGEST_INTERVAL_S


def test_running_call_is_answered_after_accepting_ended_when_draining() -> None:
    with Program("watchdog", settings(WAIT_FOR_GO, healthcheck_interval="200ms")) as program:
        call = InBackground(lambda: http_request(program.port))
        program.wait_started()
        program.terminate()
        wait_until(lambda: refuses(program), 15.0, "no more connections accepted")
        assert program.process.poll() is None
        (program.temporary / "go").touch()
        assert call.result().text == "went\n"
        assert program.wait_exit() == 0


def test_next_request_of_a_connection_is_its_last_when_draining() -> None:
    with (
        Program("watchdog", settings(WAIT_FOR_GO, healthcheck_interval="0")) as program,
        connect(program.port) as client,
    ):
        client.sendall(GET)
        program.wait_started()
        program.terminate()
        wait_until(lambda: refuses(program), 15.0, "no more connections accepted")
        (program.temporary / "go").touch()
        received = read_all(client)
        assert received.endswith(b"went\n")
        assert b"connection: close" in received.lower()
        assert program.wait_exit() == 0


def test_request_that_has_come_behind_an_answer_told_to_keep_the_connection_is_answered_when_draining() -> None:
    """Over a Unix socket its client would see an end that looks as if a function had been at it."""
    settings_ = {"fprocess": "head -c 50000000 /dev/zero", "healthcheck_interval": "0"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        client.sendall(GET + GET)
        begun = client.recv(1)
        program.terminate()
        wait_until(lambda: refuses(program), 15.0, "no more connections accepted")
        first, second = parse(begun + read_all(client))
        assert (len(first.body), len(second.body)) == (50_000_000, 50_000_000)
        assert ("connection" in first.headers, second.headers.get("connection")) == (False, "close")
        assert program.wait_exit() == 0


def test_connection_is_closed_when_only_an_empty_line_has_come_behind_its_answer_when_draining() -> None:
    """Old clients send one behind the body of a POST (RFC 9112 2.2); it is no request."""
    settings_ = {"fprocess": "head -c 50000000 /dev/zero", "healthcheck_interval": "0", "read_timeout": "30s"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi\r\n")
        begun = client.recv(1)
        program.terminate()
        wait_until(lambda: refuses(program), 15.0, "no more connections accepted")
        (answer,) = parse(begun + read_all(client))
        assert len(answer.body) == 50_000_000
        assert program.wait_exit() == 0


@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_idle_connection_does_not_hold_up_the_end_when_draining(used: bool) -> None:
    settings_ = {"fprocess": "echo hi", "healthcheck_interval": "0"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        if used:
            client.sendall(GET)
            read_until(client, b"hi\n")
        program.terminate()
        assert program.wait_exit() == 0
        wait_closed(client, 1.0)


def test_stalled_reader_does_not_hold_up_the_end_when_draining() -> None:
    settings_ = {"fprocess": "head -c 50000000 /dev/zero", "write_timeout": "1s", "healthcheck_interval": "0"}
    with Program("watchdog", settings_) as program, connect(program.port) as client:
        client.sendall(GET)
        assert client.recv(1) == b"H"
        program.terminate()
        program.wait_exit()  # 0 or 1: its limit and that of the drain pass at the same time


@pytest.mark.parametrize("exec_timeout", ["0", "500ms"])
def test_drain_is_bounded_when_a_function_does_not_end(exec_timeout: str) -> None:
    limits = {"exec_timeout": exec_timeout, "write_timeout": "1s", "healthcheck_interval": "0"}
    with Program("watchdog", {"fprocess": "sleep 600"} | limits) as program, connect(program.port) as client:
        client.sendall(GET)
        program.wait_started()
        program.terminate()
        program.wait_exit()
        program.wait_idle()
        client.recv(65536)


@pytest.mark.parametrize("signals_count", [1, 2], ids=["drained", "at-once"])
def test_client_gets_a_503_when_its_function_outlasts_the_drain(signals_count: int) -> None:
    limits = {"write_timeout": "500ms" if signals_count == 1 else "1m", "healthcheck_interval": "0"}
    with Program("watchdog", {"fprocess": "sleep 600"} | limits) as program:
        call = InBackground(lambda: http_request(program.port))
        program.wait_started()
        for _ in range(signals_count):
            program.terminate()
            program.wait_log("draining")
        answer = call.result()
        assert (answer.status, answer.headers["connection"]) == (503, "close")
        assert "stopping" in answer.text
        assert program.wait_exit() == 1
        program.wait_idle()  # what is killed needs a turn of the processor to be gone


def test_client_gets_a_503_when_its_request_has_not_arrived_whole_by_the_end_of_the_drain() -> None:
    limits = {"write_timeout": "500ms", "healthcheck_interval": "0"}
    with Program("watchdog", {"fprocess": "cat"} | limits) as program, connect(program.port) as client:
        client.sendall(GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\nhe"))
        program.wait_started()
        program.terminate()
        assert read_all(client).startswith(b"HTTP/1.1 503 ")
        program.wait_exit()


def test_log_counts_the_requests_in_flight_and_no_idle_connection_when_draining() -> None:
    with Program("watchdog", settings(WAIT_FOR_GO, healthcheck_interval="0")) as program, ExitStack() as idle:
        for _ in range(3):
            idle.enter_context(connect(program.port))
        call = InBackground(lambda: http_request(program.port))
        program.wait_started()
        program.terminate()
        program.wait_log("No new connections allowed, draining: 1 requests")
        (program.temporary / "go").touch()
        assert call.result().text == "went\n"


def test_drain_lasts_as_long_as_a_function_may_when_exec_timeout_is_the_larger() -> None:
    limits = {"exec_timeout": "1m", "write_timeout": "100ms", "healthcheck_interval": "0"}
    with Program("watchdog", settings(WAIT_FOR_GO) | limits) as program:
        call = InBackground(lambda: http_request(program.port))
        program.wait_started()
        program.terminate()
        wait_until(lambda: refuses(program), 15.0, "no more connections accepted")
        end_s = time.monotonic() + 0.5
        wait_until(lambda: time.monotonic() > end_s, 15.0, "longer has passed than an answer may take to be sent")
        (program.temporary / "go").touch()
        assert call.result().text == "went\n"
        assert program.wait_exit() == 0


def test_running_functions_are_killed_when_told_to_stop_twice() -> None:
    with Program("watchdog", {"fprocess": "sh -c 'trap \"\" TERM INT; sleep 600'"}) as program:
        clients = [connect(program.port) for _ in range(3)]
        for client in clients:
            client.sendall(GET)
        program.wait_started(6)
        program.terminate()
        wait_until(lambda: health(program) == 503, 15.0, "unhealthy")
        program.terminate()
        program.wait_exit()
        program.wait_idle()  # SIGKILL has been sent; on a busy machine the kernel needs a turn to carry it out
        for client in clients:
            client.close()


def test_one_interrupt_is_a_wish_to_stop_when_typed() -> None:
    with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "300ms"}) as program:
        program.process.send_signal(signal.SIGINT)
        assert program.wait_exit() == 0
        assert "Traceback" not in program.log()


@pytest.mark.parametrize("which", [signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE, signal.SIGCHLD, signal.SIGWINCH])
def test_watchdog_ends_or_serves_on_but_leaves_no_process_when_signalled(which: signal.Signals) -> None:
    with Program("watchdog", {"fprocess": "cat"}) as program:
        program.process.send_signal(which)
        if which in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGWINCH):
            assert http_request(program.port, "POST", body=b"on").body == b"on"


def started_with(code: str) -> list[str]:
    """Return a command prefix that runs Python `code` and becomes the command behind it."""
    return [sys.executable, "-c", f"import os, signal, sys; {code}; os.execv(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize(
    "prefix",
    [
        started_with("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"),
        started_with("signal.signal(signal.SIGCHLD, signal.SIG_IGN)"),
        started_with("signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
        started_with("os.close(0)"),
        started_with("os.dup2(0, 57)"),
        ["/bin/sh", "-c", 'sleep 0.1 & exec "$@"', "sh"],
    ],
    ids=["signals-blocked", "children-ignored", "term-ignored", "no-stdin", "one-descriptor-more", "with-a-child"],
)
def test_watchdog_serves_and_stops_when_its_parent_left_it_a_mess(prefix: list[str]) -> None:
    settings_ = {"fprocess": "ls /proc/self/fd", "healthcheck_interval": "0"}
    with Program("watchdog", settings_, prefix=prefix) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (200, "0\n1\n2\n3\n")
        program.terminate()
        assert program.wait_exit() == 0


def test_function_ignores_a_signal_only_when_the_parent_of_the_watchdog_did() -> None:
    others_at_default = "[signal.signal(each, signal.SIG_DFL) for each in {*signal.Signals} - {9, 19}]"
    prefix = started_with(f"{others_at_default}; signal.signal(signal.SIGUSR1, signal.SIG_IGN)")
    with Program("watchdog", {"fprocess": "grep -E ^Sig(Ign|Blk) /proc/self/status"}, prefix=prefix) as program:
        facts = dict(line.split(":\t") for line in http_request(program.port).text.splitlines())
    masks = {
        name: {number for number in signal.valid_signals() if int(mask, 16) >> number - 1 & 1}
        for name, mask in facts.items()
    }
    assert masks == {"SigBlk": set(), "SigIgn": {signal.SIGUSR1}}


def test_log_tells_the_stages_when_told_to_stop() -> None:
    with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "100ms"}) as program:
        program.terminate()
        assert program.wait_exit() == 0
        program.wait_log("SIGTERM")
        program.wait_log("raining")


def test_port_is_free_again_at_once_when_watchdog_was_killed() -> None:
    settings_ = {"fprocess": "cat", "port": str(free_port())}
    with Program("watchdog", settings_) as first:
        assert http_request(first.port, "POST", body=b"x").body == b"x"
        first.kill()
        with Program("watchdog", settings_) as second:
            assert http_request(second.port, "POST", body=b"x").body == b"x"


def test_nothing_is_written_to_standard_output_when_serving() -> None:
    settings_ = {"fprocess": "cat", "port": "0", "metrics_port": "0", "healthcheck_interval": "0"}
    with Program("watchdog", settings_, prefix=["/bin/sh", "-c", 'exec "$@" >"$TMPDIR/stdout"', "sh"]) as program:
        assert http_request(program.port, "POST", body=b"x").body == b"x"
        assert (program.temporary / "stdout").read_bytes() == b""


def test_watchdog_serves_on_when_its_log_is_gone() -> None:
    # An operator's `fwatchdog 2>&1 | head -1`: writing the log then fails, and calls must not.
    port = free_port()
    with Program("watchdog", {"fprocess": "cat"}) as first:
        environment = first.environment | {"port": str(port), "suppress_lock": "true"}
        with subprocess.Popen(
            command_of("watchdog"),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline()
            process.stderr.close()
            try:
                wait_until(lambda: answers(port), 5.0, "it serves")
                assert all(answers(port) for _ in range(5))
            finally:
                process.kill()


def answers(port: int) -> bool:
    try:
        return http_request(port, "POST", body=b"x").body == b"x"
    except ConnectionError:
        return False
