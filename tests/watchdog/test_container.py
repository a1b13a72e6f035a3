"""As PID 1 of a container: nobody else reaps, and the kernel gives PID 1 no default action for signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from testkit import tree
from testkit.apart import UNSHARE_PIDS
from testkit.harness import TICK_S, InBackground, Program, connect, crowding, http_request, wait_until
from testkit.inspection import children_of, state_of

GONE_S = 10.0  # until what is killed, or told to end, is gone
UNSHARE = UNSHARE_PIDS  # or none, where a container is one anyway
pytestmark = pytest.mark.skipif(
    subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode != 0,
    reason="no PID namespace can be had here",
)


class Container:
    """A watchdog that is PID 1 of a namespace; `pid` is its number outside."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.port = program.port
        self.pid = next(pid for pid in program.survivors() if is_first(pid))

    def states(self) -> dict[int, str]:
        """Return the state letter (proc(5)) of each process inside, by its number outside: all descend from PID 1."""
        found, waiting = {}, [self.pid]
        while waiting:
            pid = waiting.pop()
            with suppress(FileNotFoundError, ProcessLookupError):
                waiting += children_of(pid)
            found[pid] = state_of(pid)
        return {pid: state for pid, state in found.items() if state != "X"}

    def wait_only_itself(self, deadline_s: float = GONE_S) -> None:
        """Wait until PID 1 and its guard are all there is, zombies included."""
        wait_until(lambda: len(self.states()) == 2, deadline_s, "nothing but PID 1 and its guard")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


def is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.partition("NSpid:")[2].split("\n")[0].split()[1:] == ["1"]


@contextmanager
def container(settings: Mapping[str, str]) -> Iterator[Container]:
    """Run a watchdog as PID 1; at the end the namespace is killed with it."""
    with Program("watchdog", {"fprocess": "sh"} | dict(settings), prefix=UNSHARE) as program:
        inside = Container(program)
        yield inside
        if program.process.poll() is None:
            inside.signal(signal.SIGKILL)
            program.wait_exit()


DOUBLE_FORKS = tree.double_forks(1000) + '\nos.write(1, b"forked")'
UNREAPED = tree.double_forks(300, reaped=False) + '\nos.write(1, b"forked")'


@pytest.mark.parametrize("script", [DOUBLE_FORKS, UNREAPED], ids=["a-thousand-orphans", "parents-unreaped-too"])
@pytest.mark.parametrize("ending", ["", "; exec sleep 60"], ids=["exits", "hangs"])
def test_no_zombie_is_left_when_a_function_double_forks(script: str, ending: str) -> None:
    with container({}) as inside:
        body = f"{sys.executable} -SEIc '{script}'{ending}".encode()
        limit_s = (3 if ending else 30) * crowding()  # by then the thousand have been
        limit = {"X-Timeout": f"{limit_s:.1f}s"}
        answer = http_request(inside.port, "POST", "/", limit, body, 2 * limit_s + GONE_S)
        assert answer.text == ("Killed process.\n" if ending else "forked")
        inside.wait_only_itself()


def test_zombies_are_reaped_while_the_function_that_left_them_runs() -> None:
    with container({}) as inside, connect(inside.port) as client:
        body = f"{sys.executable} -SEIc '{DOUBLE_FORKS}'; exec sleep 60".encode()
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: "Z" in inside.states().values() or sleeps(inside), GONE_S, "it forks, or has")
        wait_until(lambda: sleeps(inside) and "Z" not in inside.states().values(), GONE_S, "all orphans reaped")
    inside_is_gone(inside)


def sleeps(inside: Container) -> bool:
    return any("sleep" in command_of(pid) for pid in inside.states())


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def inside_is_gone(inside: Container) -> None:
    wait_until(lambda: not inside.program.survivors(), GONE_S, "the namespace gone with its PID 1")


def test_calls_are_answered_and_exit_is_0_when_told_to_stop() -> None:
    interval_s = 2 * crowding()  # in which to see it unhealthy; the call lasts longer
    script = f"setsid -f sleep 60; sleep {interval_s + 0.4:.1f}; echo done".encode()
    with container({"healthcheck_interval": f"{interval_s:.1f}s"}) as inside:
        call = InBackground(lambda: http_request(inside.port, "POST", body=script))
        inside.program.wait_started(2)
        inside.signal(signal.SIGTERM)
        wait_until(lambda: http_request(inside.port, "GET", "/_/health").status == 503, GONE_S, "unhealthy")
        assert call.result().text == "done\n"
        assert inside.program.wait_exit() == 0
        inside_is_gone(inside)


def test_watchdog_ends_at_once_when_told_twice_and_a_function_is_stuck() -> None:
    with container({"write_timeout": "1m"}) as inside, connect(inside.port) as client:
        script = b"trap '' TERM; setsid -f sleep 60; sleep 60; sleep 60"
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(script), script))
        inside.program.wait_started(3)
        inside.signal(signal.SIGTERM)
        inside.program.wait_log("raining")
        start_s = time.monotonic()
        inside.signal(signal.SIGTERM)
        assert inside.program.wait_exit() == 1
        assert time.monotonic() - start_s < GONE_S * crowding()
        inside_is_gone(inside)


def test_drain_is_bounded_when_a_function_is_stuck() -> None:
    limits = {"write_timeout": "500ms", "healthcheck_interval": "0"}
    with container(limits) as inside, connect(inside.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nsleep 60\n")
        inside.program.wait_started()
        start_s = time.monotonic()
        inside.signal(signal.SIGTERM)
        assert inside.program.wait_exit() == 1
        assert 0.5 - TICK_S <= time.monotonic() - start_s < 0.5 + GONE_S * crowding()


def test_daemons_are_gone_and_reaped_when_deadlines_come_and_clients_leave() -> None:
    with container({"exec_timeout": "400ms"}) as inside:
        for _ in range(3):
            answer = http_request(inside.port, "POST", body=b"setsid -f sleep 60; (sleep 60 &); exec sleep 60")
            assert answer.status == 408
            inside.wait_only_itself()
        with connect(inside.port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 29\r\n\r\nsetsid -f sleep 60; sleep 60\n")
            inside.program.wait_started(2)
        inside.wait_only_itself()
