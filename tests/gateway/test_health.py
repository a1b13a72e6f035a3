"""What the gateway says of itself: /healthz tells what does not work, and the log which calls no worker makes."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from faashound.functions.supervisor import ManagedProcess, ManagedProgram, Supervisor
from faashound.serving.health import QUEUE_MEMORY_S, Health
from faashound.serving.janitor import is_nearly_full, stray_queues
from faashound.serving.local_workers import LocalWorkers
from faashound.watchdog import Scoreboard, Slot, log
from testkit.disks import fill
from testkit.harness import SOON_S, eventually, free_port, http_request, wait_until
from testkit.system import System

RENAMED = '[resize]\nfprocess = "cat"\nannotations."com.openfaas.queue" = "{}"'


def is_healthy(system: System) -> bool:
    return system.request("GET", "/healthz").status == 200


def test_health_has_no_problems_at_first() -> None:
    assert Health(Slot(Scoreboard())).problems(0.0) == []


def test_queue_that_refuses_is_a_problem_until_it_takes_a_call_or_nobody_has_asked_it_for_long() -> None:
    health = Health(Slot(Scoreboard()))
    health.queue_refused(0.0)
    assert health.problems(1.0) == ["the queue does not take calls; see the log"]
    health.queue_took()
    assert health.problems(1.0) == []
    health.queue_refused(2.0)
    assert health.problems(2.0 + QUEUE_MEMORY_S)
    assert health.problems(3.0 + QUEUE_MEMORY_S) == []


def test_every_process_knows_of_the_worker_that_the_first_one_runs() -> None:
    board = Scoreboard(2)
    first, second = Health(Slot(board)), Health(Slot(board, 1))
    first.worker_trouble("exited with status 1")
    assert second.problems(0.0) == first.problems(0.0) != []
    first.worker_trouble("")
    assert second.problems(0.0) == []


def test_worker_that_runs_hides_no_trouble_of_another() -> None:
    class Listing(Supervisor):
        """Starts nothing, and tells what it was to start."""

        def __init__(self) -> None:
            self.programs: list[ManagedProgram] = []

        def start(self, program: ManagedProgram) -> ManagedProcess:
            self.programs.append(program)
            return ManagedProcess(program)

    supervisor, health = Listing(), Health(Slot(Scoreboard()))
    workers = LocalWorkers(supervisor, {}, health.worker_trouble, follows=True)
    workers.follow(("another-queue",))
    first, later = (program.on_trouble for program in supervisor.programs)
    first("exited with status 1")
    later("")
    assert health.problems(0.0)
    later("exited with status 1")
    first("")
    assert health.problems(0.0)
    later("")
    assert health.problems(0.0) == []


def test_work_in_the_background_that_dies_is_told_at_once_and_its_end_is_waited_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    board, ended = Scoreboard(2), False
    first, second = Health(Slot(board)), Health(Slot(board, 1))

    async def die() -> None:
        raise ZeroDivisionError

    async def take_a_while_to_end() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended = True

    async def is_told() -> bool:
        return bool(second.warnings())

    async def scenario() -> None:
        async with AsyncExitStack() as stack:
            first.keep_running(stack, take_a_while_to_end())
            first.keep_running(stack, die())
            await eventually(is_told, SOON_S, "a warning")

    asyncio.run(scenario())
    log.flush()
    assert ended
    assert second.warnings() == [
        "work in the background has ended by a fault, and a restart brings it back; see the log"
    ]
    assert second.problems(0.0) == []
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_stray_queues_are_those_with_calls_that_nothing_drains() -> None:
    assert stray_queues({"a": 1, "b": 2, "c": 0}, {"a"}) == {"b": 2}


@pytest.mark.parametrize(
    ("free_bytes", "reserve_bytes", "expected"),
    [(399, 100, True), (400, 100, False), (0, 100, True), (None, 100, False), (0, 0, False), (0, None, False)],
)
def test_queue_is_nearly_full_when_few_reserves_are_free(
    free_bytes: int | None, reserve_bytes: int | None, expected: bool
) -> None:
    assert is_nearly_full(free_bytes, reserve_bytes) is expected


def test_every_process_warns_of_the_room_that_the_first_one_looks_at() -> None:
    board = Scoreboard(2)
    first, second = Health(Slot(board)), Health(Slot(board, 1))
    first.queue_is_nearly_full(True)
    assert second.warnings() == ["the queue's disk is nearly full; see the log"]
    assert second.problems(0.0) == []
    first.queue_is_nearly_full(False)
    assert second.warnings() == []


def test_gateway_tells_of_a_disk_that_is_nearly_full_while_it_still_takes_calls(small_disk: Path) -> None:
    settings = {"keep_results": "1s", "retention": "1s", "metrics_port": str(free_port()), "worker": "none"}
    with System(settings=settings, spool=small_disk / "spool") as system:
        assert system.request("GET", "/healthz").text == "OK"
        ballast = fill(small_disk)
        os.truncate(ballast, ballast.stat().st_size - (600 << 10))
        system.wait_log("warning: the queue's disk is nearly full")
        answer = system.request("GET", "/healthz")
        assert (answer.status, answer.text) == (200, "OK; the queue's disk is nearly full; see the log")
        assert 'gateway_trouble{part="room"} 1.0' in system.metrics()
        system.submit("cat", b"x")
        ballast.unlink()
        wait_until(lambda: system.request("GET", "/healthz").text == "OK", 10, "there is room again")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_gateway_is_unhealthy_while_its_worker_cannot_start_and_healthy_again_after(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {
            "worker_metrics_port": str(taken.getsockname()[1]),
            "metrics_port": str(free_port()),
            "workers": workers,
        }
        with System(settings=settings) as system:
            for _ in range(3):  # whichever process answers
                wait_until(lambda: not is_healthy(system), 10, "unhealthy")
            answer = system.request("GET", "/healthz")
            assert (answer.status, answer.text) == (
                503,
                "the local worker does not keep running, asynchronous calls wait; see the log\n",
            )
            assert 'gateway_trouble{part="worker"} 1.0' in system.metrics()
            assert system.request("POST", "/function/cat", b"x").text == "x", "the rest works"
            taken.close()
            call_id = system.submit("cat")
            assert system.ended(call_id, 40)["state"] == "done"
            wait_until(partial(is_healthy, system), 15, "healthy")


def test_gateway_is_unhealthy_when_its_queue_does_not_take_calls() -> None:
    with System(settings={"worker": "none", "metrics_port": str(free_port())}) as system:
        system.submit("cat", b"")
        assert is_healthy(system)
        for name in ("spool.sqlite3", "spool.sqlite3-wal", "spool.sqlite3-shm"):
            (system.spool / name).rename(system.spool / f"{name}.away")
        assert system.request("POST", "/async-function/cat", b"x").status == 503
        answer = system.request("GET", "/healthz")
        assert (answer.status, answer.text) == (503, "the queue does not take calls; see the log\n")
        assert 'gateway_trouble{part="queue"} 1.0' in system.metrics()


def test_gateway_tells_of_calls_in_a_queue_that_no_function_names_any_more(tmp_path: Path) -> None:
    with System(RENAMED.format("pictures"), {"worker": "none"}, tmp_path / "spool") as system:
        system.submit("resize", b"", {"X-Delay": "4s"})
    settings = {"metrics_port": str(free_port()), "worker_metrics_port": "0"}
    with System(RENAMED.format("images"), settings, tmp_path / "spool") as successor:
        line = successor.wait_log("warning: nothing here drains the queue pictures")
        assert "wait in it: 1; a worker with queues=pictures makes them" in line
        assert 'gateway_queue_waiting{queue="pictures"} 1.0' in successor.metrics()
    with System(RENAMED.format("images"), {"queues": "images,pictures"}, tmp_path / "spool") as third:
        third.ended(third.submit("resize"))
        assert "nothing here drains" not in third.log()


def test_health_of_the_worker_is_its_own_matter_without_a_local_one() -> None:
    with System(settings={"worker": "none"}) as system:
        assert http_request(system.port, "HEAD", "/healthz").status == 200
