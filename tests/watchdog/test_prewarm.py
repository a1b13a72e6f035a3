"""Processes that wait for their request: each serves one, and is as strictly kept as any other."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from testkit.harness import InBackground, Program, crowding, http_request, run, wait_until
from testkit.inspection import state_of

GONE_S = 10.0  # until what is killed is gone

# Answers with its process number; says that it is ready, since only then is it of use to have been started before.
FUNCTION = """
import os, sys, signal
open(os.path.join(os.environ["READY_DIR"], str(os.getpid())), "w").close()
if sys.stdin.read() == "hang":
    os.fork() or os.setsid()
    signal.pause()
print(os.getpid())
"""


class Prewarmed(Program):
    """A watchdog with processes that wait."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self.ready_dir = directory / "ready"
        self.ready_dir.mkdir()
        script = directory / "function.py"
        script.write_text(FUNCTION, encoding="utf-8")
        always = {"fprocess": f"{sys.executable} -S -E -I {script}", "cgi_headers": "false", "prewarm": "2"}
        super().__init__("watchdog", always | {"READY_DIR": str(self.ready_dir)} | settings)

    def ready(self) -> set[int]:
        """Return the processes that have ever said they are ready."""
        return {int(path.name) for path in self.ready_dir.iterdir()}

    def waiting(self) -> set[int]:
        """Return those among them that are alive."""
        return self.ready() & self.survivors()


def test_start_is_refused_when_prewarm_meets_cgi_headers() -> None:
    done = run("watchdog", settings={"fprocess": "cat", "prewarm": "2"})
    assert done.returncode == 2
    assert "prewarm" in done.stderr
    assert "cgi_headers=false" in done.stderr


def test_request_is_served_by_a_process_that_was_there_before_it(tmp_path: Path) -> None:
    with Prewarmed(tmp_path) as program:
        wait_until(lambda: len(program.waiting()) == 2, 10, "two that wait")
        before = program.ready()
        assert int(http_request(program.port, "POST", body=b"x").text) in before


def test_each_process_serves_one_request_when_many_come(tmp_path: Path) -> None:
    with Prewarmed(tmp_path) as program:
        answers = [http_request(program.port, "POST", body=b"x").text for _ in range(10)]
        assert len(set(answers)) == 10
        wait_until(lambda: len(program.waiting()) == 2, 10, "the pool full again")


def test_requests_beyond_the_pool_get_processes_of_their_own(tmp_path: Path) -> None:
    with Prewarmed(tmp_path) as program:
        calls = [InBackground(lambda: http_request(program.port, "POST", body=b"x").text) for _ in range(8)]
        assert len({call.result() for call in calls}) == 8


def test_deadline_counts_from_the_request_when_the_process_has_waited(tmp_path: Path) -> None:
    with Prewarmed(tmp_path, exec_timeout="500ms") as program:
        wait_until(lambda: len(program.waiting()) == 2, 10, "two that wait")
        first = program.waiting()
        # Other calls pass the time; the two that wait are older than exec_timeout when the last of them is taken.
        answers = [http_request(program.port, "POST", body=b"hang") for _ in range(3)]
        assert [answer.status for answer in answers] == [408, 408, 408]
        assert all(0.45 <= answer.elapsed_s < 0.5 + GONE_S * crowding() for answer in answers)
        wait_until(lambda: not (first & program.waiting()), GONE_S, "their trees gone")
        # Unless the limit, short for what follows, falls into the start of its process.
        wait_until(lambda: http_request(program.port, "POST", body=b"x").status == 200, GONE_S, "the next is answered")


def test_request_is_answered_when_processes_end_unasked() -> None:
    settings = {"fprocess": "echo early", "cgi_headers": "false", "prewarm": "2"}
    with Program("watchdog", settings) as program:
        program.wait_log("ended before it had a request")
        assert http_request(program.port, "POST").text == "early\n"
        assert sum("ended before" in line for line in program.log_lines()) < 20  # the starts wait, longer each time


def test_request_is_answered_when_a_process_that_waits_is_killed(tmp_path: Path) -> None:
    with Prewarmed(tmp_path) as program:
        wait_until(lambda: len(program.waiting()) == 2, 10, "two that wait")
        killed = program.waiting()
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        # Not their environment, which is gone a moment before the kernel tells their parent of the end.
        wait_until(lambda: all(state_of(pid) in ("X", "Z") for pid in killed), GONE_S, "their end")
        assert http_request(program.port, "POST", body=b"x").status == 200
        wait_until(lambda: len(program.waiting()) == 2, 10, "the pool full again")


@pytest.mark.parametrize(("log_callid", "origin"), [("false", "stderr: "), ("true", "[none] stderr: ")])
def test_line_says_that_it_is_a_function_s_when_written_before_the_request(log_callid: str, origin: str) -> None:
    forged = "2026/01/01 00:00:00 Forking fprocess."
    script = f"echo {forged} >&2; read line; echo $line"
    settings = {"fprocess": f"sh -c '{script}'", "cgi_headers": "false", "prewarm": "1", "combine_output": "false"}
    with Program("watchdog", settings | {"log_callid": log_callid}) as program:
        assert program.wait_log(forged).endswith(f" {origin}{forged}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_watchdog_ends(tmp_path: Path, number: signal.Signals) -> None:
    with Prewarmed(tmp_path, healthcheck_interval="0") as program:
        wait_until(lambda: len(program.waiting()) == 2, 10, "two that wait")
        program.process.send_signal(number)
        program.wait_exit()
        wait_until(lambda: not program.waiting(), GONE_S, "all gone")
