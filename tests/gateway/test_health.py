"""What the gateway says of itself: /healthz tells what does not work, and the log which calls no worker makes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import pytest

from faashound.calls.model import CallDamaged, QueueDamaged, QueueFull, QueueUnavailable, Stats, TooManyQueued
from faashound.functions.supervisor import ManagedProcess, ManagedProgram, Supervisor
from faashound.queues.spool.queue import Spool
from faashound.serving import health as health_module
from faashound.serving import metrics as metrics_module
from faashound.serving.health import Health
from faashound.serving.janitor import is_nearly_full, stray_queues
from faashound.serving.local_workers import LocalWorkers
from faashound.serving.metrics import GatewayMetrics, QueueFigures
from faashound.watchdog import FaashoundError, Scoreboard, Slot, log
from testkit.disks import fill
from testkit.harness import SOON_S, eventually, free_port, http_request, wait_until
from testkit.system import System

RENAMED = '[resize]\nfprocess = "cat"\nannotations."com.openfaas.queue" = "{}"'


def tells(system: System, text: str) -> bool:
    return text in system.metrics()


def is_healthy(system: System) -> bool:
    return system.request("GET", "/healthz").status == 200


def test_health_has_no_problems_at_first() -> None:
    assert Health(Slot(Scoreboard())).problems() == []


def shown(slot: Slot) -> float:
    """What the metrics have of the queue's trouble."""
    (row,) = (metric for metric in GatewayMetrics(slot).collect() if metric.name == "gateway_trouble")
    return next(float(sample.value) for sample in row.samples if sample.labels == {"part": "queue"})


@pytest.mark.parametrize("error", [QueueUnavailable("the disk is away"), QueueDamaged("no database")])
def test_queue_that_refuses_is_a_problem_until_it_takes_a_call(error: FaashoundError) -> None:
    async def scenario() -> None:
        slot = Slot(Scoreboard())
        health = Health(slot)
        health.queue_refused(error)
        assert (health.problems(), shown(slot)) == (["the queue does not take calls; see the log"], 1.0)
        health.queue_took()
        assert (health.problems(), shown(slot)) == ([], 0.0)

    asyncio.run(scenario())


def test_queue_is_believed_to_work_again_when_it_was_not_asked_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "QUEUE_MEMORY_S", 0.1)
    slot = Slot(Scoreboard())

    async def is_forgotten() -> bool:
        return shown(slot) == 0.0

    async def scenario() -> None:
        health = Health(slot)
        health.queue_refused(QueueUnavailable("the disk is away"))
        assert shown(slot) == 1.0
        await eventually(is_forgotten, SOON_S, "the metrics have forgotten it, and nobody has asked for health")
        assert health.problems() == []

    asyncio.run(scenario())


def test_full_queue_is_told_by_the_metrics_and_a_call_that_is_refused_for_itself_by_nothing() -> None:
    async def scenario() -> None:
        slot = Slot(Scoreboard())
        health = Health(slot)
        for error in (TooManyQueued("max_queued"), CallDamaged("the record of a call cannot be read")):
            health.queue_refused(error)
            assert (health.problems(), shown(slot)) == ([], 0.0)
        health.queue_refused(QueueFull("no room for so long a body"))
        assert (health.problems(), shown(slot)) == ([], 1.0)

    asyncio.run(scenario())


def test_every_process_knows_of_the_worker_that_the_first_one_runs() -> None:
    board = Scoreboard(2)
    first, second = Health(Slot(board)), Health(Slot(board, 1))
    first.worker_trouble("exited with status 1")
    assert second.problems() == first.problems() != []
    first.worker_trouble("")
    assert second.problems() == []


def test_worker_that_runs_hides_no_trouble_of_another() -> None:
    class Listing(Supervisor):
        """Starts nothing, and tells what it was to start."""

        def __init__(self) -> None:
            self.programs: list[ManagedProgram] = []

        def start(self, program: ManagedProgram) -> ManagedProcess:
            self.programs.append(program)
            return ManagedProcess(program)

    supervisor, health = Listing(), Health(Slot(Scoreboard()))
    workers = LocalWorkers(supervisor, {}, health.worker_trouble, lambda: None, follows=True)
    workers.follow(("another-queue",))
    first, later = (program.on_trouble for program in supervisor.programs)
    first("exited with status 1")
    later("")
    assert health.problems()
    later("exited with status 1")
    first("")
    assert health.problems()
    later("")
    assert health.problems() == []


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
    assert second.problems() == []
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
    assert second.problems() == []
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


def test_figures_that_are_late_are_shown_to_the_next_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "FIGURES_S", 0.01)

    class SlowSpool(Spool):
        """Tells its figures when it may."""

        async def stats(self) -> Stats:
            asked.append(None)
            await may_tell.wait()
            return await super().stats()

    asked, may_tell = list[None](), asyncio.Event()

    async def test() -> None:
        spool, metrics = await SlowSpool.open(tmp_path / "spool"), GatewayMetrics(Slot(Scoreboard()))
        figures = QueueFigures(spool, metrics)

        async def is_shown() -> bool:
            await figures.refresh()
            return any(metric.name == "gateway_queue_calls" for metric in metrics.collect())

        for _ in range(3):
            assert not await is_shown()
        assert len(asked) == 1
        may_tell.set()
        await eventually(is_shown, SOON_S, "the figures")
        may_tell.clear()
        await figures.refresh()
        await figures.close()
        await spool.close()

    asyncio.run(test())


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


def test_every_restart_of_the_local_worker_is_counted() -> None:
    with System(settings={"metrics_port": str(free_port()), "workers": "2"}) as system:
        assert "gateway_local_worker_restarts_total 0.0" in system.metrics(), "from the start, or it would not increase"
        for count in (1, 2):
            os.kill(system.worker_pid(), signal.SIGKILL)
            wait_until(partial(tells, system, f"gateway_local_worker_restarts_total {count}.0"), SOON_S, "it is told")


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


def test_metrics_tell_of_a_full_disk_that_a_call_was_refused_for(small_disk: Path) -> None:
    settings = {"worker": "none", "metrics_port": str(free_port())}
    with System(settings=settings, spool=small_disk / "spool") as system:
        fill(small_disk)
        for body in (b"x", bytes(200_000)):  # the one is refused by its row, the other by its file
            assert system.request("POST", "/async-function/cat", body).status == 507
            assert 'gateway_trouble{part="queue"} 1.0' in system.metrics()


def test_metrics_tell_of_a_scheduled_call_that_the_queue_does_not_take(tmp_path: Path) -> None:
    ticking = '[cat]\nfprocess = "cat"\nannotations.topic = "cron-function"\nannotations.schedule = "@every 1s"'
    with System(ticking, {"worker": "none", "metrics_port": str(free_port())}, tmp_path / "spool") as system:
        system.wait_log("Queued the scheduled call of cat")
        for name in ("spool.sqlite3", "spool.sqlite3-wal", "spool.sqlite3-shm"):
            (system.spool / name).rename(system.spool / f"{name}.away")
        system.wait_log("a scheduled call could not be queued")
        wait_until(lambda: 'gateway_trouble{part="queue"} 1.0' in system.metrics(), SOON_S, "the metrics tell")
        assert not is_healthy(system)


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


def test_gateway_tells_of_calls_in_a_queue_that_its_worker_was_not_told_to_drain() -> None:
    with System(RENAMED.format("pictures"), {"queues": "faas-request,images", "keep_results": "1s"}) as system:
        system.submit("resize", b"", {"X-Delay": "1h"})
        line = system.wait_log("warning: nothing here drains the queue pictures")
        assert "wait in it: 1; a worker with queues=pictures makes them" in line


def test_health_of_the_worker_is_its_own_matter_without_a_local_one() -> None:
    with System(settings={"worker": "none"}) as system:
        assert http_request(system.port, "HEAD", "/healthz").status == 200
