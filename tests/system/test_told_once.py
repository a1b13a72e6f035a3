"""A trouble that comes again at each look is told once, and again when it was over between."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from faashound.calls.model import QueueUnavailable
from faashound.calls.retries import RetryPolicy
from faashound.draining import known_functions
from faashound.draining.gateway_access import GatewayAccess
from faashound.draining.known_functions import KnownFunctions
from faashound.functions import endpoint as endpoints
from faashound.functions.endpoint import Endpoint
from faashound.functions.scheduler import Scheduler
from faashound.functions.supervisor import ManagedProgram, Supervisor
from faashound.functions.table import Function
from faashound.queues.spool import database
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.notifier import Notifier, WakeUp
from faashound.queues.spool.queue import Spool
from faashound.serving.health import Health
from faashound.serving.history import History, Sources
from faashound.serving.janitor import Janitor
from faashound.serving.metrics import GatewayMetrics
from faashound.serving.settings import Settings
from faashound.watchdog import (
    Client,
    Response,
    Scoreboard,
    Server,
    ServerTimeouts,
    Slot,
    Trouble,
    log,
    parse_settings,
    parse_url,
)
from testkit.harness import SOON_S, eventually, free_port
from testkit.scripted import body_of
from testkit.spool_kit import new_call
from tests.functions.kit import F, few_descriptors, run

LOOKS_COUNT = 4


def lines(capfd: pytest.CaptureFixture[str], text: str) -> list[str]:
    """Return the lines of the log with a text, since the last time."""
    log.flush()
    return [line for line in capfd.readouterr().err.splitlines() if text in line]


def begins_and_ends(capfd: pytest.CaptureFixture[str], text: str) -> list[bool]:
    """Return of each line with a text, since the last time, whether it tells that it is over."""
    return [line.endswith(": over") for line in lines(capfd, text)]


def test_end_of_a_trouble_is_told_once_and_only_of_one_that_was_told(capfd: pytest.CaptureFixture[str]) -> None:
    trouble = Trouble(log.warning)
    trouble.over()
    for _ in range(LOOKS_COUNT):
        trouble.tell("no room in the shed")
    for _ in range(LOOKS_COUNT):
        trouble.over()
    assert begins_and_ends(capfd, "the shed") == [False, True]


def test_gateway_that_is_away_is_told_once_for_each_function(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_functions, "KEPT_S", 0.0)
    port = free_port()

    async def say(request: object) -> Response:
        return Response(200, (), b"{}")

    async def test() -> None:
        client = Client()
        gateway = GatewayAccess(parse_url(f"http://127.0.0.1:{port}"), "token")
        functions = KnownFunctions(client, gateway, RetryPolicy(), direct=True)
        for _ in range(LOOKS_COUNT):
            await functions.get(F)
        (line,) = lines(capfd, "does not tell")
        assert line.endswith("Connection refused")
        server = Server(say, ServerTimeouts(20.0, 20.0, 20.0))
        server.listen(socket.create_server(("127.0.0.1", port)))
        await functions.get(F)
        server.stop_accepting()
        await server.give_up()
        await client.close()
        for _ in range(LOOKS_COUNT):
            await functions.get(F)
        assert len(lines(capfd, "does not tell")) == 1

    run(test())


def test_queue_that_has_no_figures_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        spool = await Spool.open(tmp_path / "spool")
        history = History(Sources(Slot(Scoreboard()), spool, "spool", None), None, "life")
        await spool.close()
        for _ in range(LOOKS_COUNT):
            await history.sample(0)

    run(test())
    assert len(lines(capfd, "no figures of the queue")) == 1


def janitor_of(spool: Spool, drained: Collection[str]) -> Janitor:
    slot = Slot(Scoreboard())
    return Janitor(spool, parse_settings(Settings, {}), lambda: drained, GatewayMetrics(slot), Health(slot))


def test_queue_that_cannot_be_swept_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        spool = await Spool.open(tmp_path / "spool")
        janitor = janitor_of(spool, ())
        await spool.close()
        for _ in range(LOOKS_COUNT):
            await janitor.look()

    run(test())
    assert len(lines(capfd, "housekeeping in the queue failed")) == 1


def test_queue_that_another_worker_empties_time_and_again_is_told_once_until_ours_drains_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drained: set[str] = set()

    async def test() -> None:
        spool = await Spool.open(tmp_path / "spool")
        janitor = janitor_of(spool, drained)
        for count in (1, 2):
            for _ in range(LOOKS_COUNT):
                await spool.put(new_call(due_s=time.time()))
                await janitor.look()
                await spool.cancel_queued()
                await janitor.look()
            assert len(lines(capfd, "nothing here drains the queue faas-request")) == 1, count
            drained.add("faas-request")
            await janitor.look()
            drained.clear()
        await spool.close()

    run(test())


def test_state_of_schedules_that_cannot_be_kept_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    annotations = {"topic": "cron-function", "schedule": "@daily"}

    async def test() -> None:
        spool = await Spool.open(tmp_path / "spool")
        scheduler = Scheduler({F: Function(F, url="http://h", annotations=annotations)}, spool, tmp_path / "no" / "s")
        for _ in range(LOOKS_COUNT):
            await scheduler.look(time.time())
        assert begins_and_ends(capfd, "how far schedules were looked at") == [False]
        (tmp_path / "no").mkdir()
        await scheduler.look(time.time())
        (tmp_path / "no" / "s").unlink()
        (tmp_path / "no").rmdir()
        await scheduler.look(time.time())
        assert begins_and_ends(capfd, "how far schedules were looked at") == [True, False]
        await spool.close()

    run(test())


def test_processes_that_cannot_be_woken_are_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    one, other = Notifier(directory_fd), Notifier(directory_fd)
    one.wake(WakeUp.WORK)
    assert other.read() == WakeUp.WORK
    third = Notifier(directory_fd)
    with few_descriptors(0):
        for _ in range(LOOKS_COUNT):
            one.wake(WakeUp.WORK)
            one.wake(WakeUp.FINISHED)  # of which those that nobody waits at are not told
    (line,) = lines(capfd, "cannot wake")
    assert line.endswith("too many open files")
    one.wake(WakeUp.WORK)
    assert begins_and_ends(capfd, "cannot wake") == [True]
    assert third.read() != WakeUp.NOTHING
    for notifier in (one, other, third):
        notifier.close()
    os.close(directory_fd)


def test_queue_that_cannot_be_written_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.01)

    async def test() -> None:
        spool = await Spool.open(tmp_path / "spool")
        owner = await spool.enlist()
        for _ in range(2):
            with contextlib.closing(sqlite3.connect(tmp_path / "spool" / DATABASE)) as other:
                other.execute("BEGIN IMMEDIATE")
                for _ in range(LOOKS_COUNT):
                    with pytest.raises(QueueUnavailable):
                        await spool.claim(["faas-request"], owner, 1.0, 1)
            assert (
                await spool.claim(["no-such-queue"], owner, 1.0, 1) == []
            )  # which proves nothing, as it writes nothing
            assert begins_and_ends(capfd, "cannot be written") == [False]
            await spool.put(new_call())
            assert begins_and_ends(capfd, "cannot be written") == [True]
        await spool.close()

    run(test())


WATCHDOGS = {"the first": (0, "f cannot be started"), "one more": (1, "f gets no more watchdogs now")}


@pytest.mark.parametrize(("running_count", "text"), WATCHDOGS.values(), ids=WATCHDOGS)
def test_watchdog_that_cannot_be_started_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, running_count: int, text: str
) -> None:
    monkeypatch.setattr(endpoints, "WAKE_AGAIN_S", 0.01)
    monkeypatch.setattr(endpoints, "LOAD_LOOK_S", 0.01)
    labels = {"com.openfaas.scale.zero": "false", "com.openfaas.scale.max": "2"}
    calls = itertools.count(0, 10_000)  # so many since the last look: two watchdogs are wanted
    outcomes: list[bool] = []
    lacking = True

    def program_of(function: Function, listener: socket.socket, stderr_fd: int | None) -> ManagedProgram:
        outcomes.append(not lacking or len(outcomes) < running_count)
        if not outcomes[-1]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return ManagedProgram("sleeper", ("/bin/sleep", "60"), {})

    async def attempts(wanted: bool, count: int) -> None:
        async def made() -> bool:
            return outcomes.count(wanted) >= count

        await eventually(made, SOON_S, "the attempts")

    async def test() -> None:
        nonlocal lacking
        sys.audit("tests.starts_a_process")
        supervisor = Supervisor()
        endpoint = Endpoint(Function(F, labels=labels), tmp_path / "s", program_of, None, lambda name: next(calls))
        endpoint.open()
        try:
            endpoint.start(supervisor)
            await attempts(False, LOOKS_COUNT)
            lacking = False
            await attempts(True, 2)
        finally:
            endpoint.stop_watching()
            await supervisor.stop(SOON_S)
            endpoint.close_socket()

    run(test())
    assert begins_and_ends(capfd, text) == [False, True]


def test_connections_that_cannot_be_accepted_are_told_once_with_the_remedy(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def answer(request: object) -> Response:
        return Response(200, (), b"hello")

    async def test() -> None:
        server = Server(answer, ServerTimeouts(20.0, 20.0, 20.0))
        listener = socket.create_server(("127.0.0.1", 0))
        url = parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        with socket.create_connection(listener.getsockname()) as waiting:
            with few_descriptors(0):
                server.listen(listener)
                for _ in range(40):
                    await asyncio.sleep(0.01)  # each look is 0.1 s after the last; a busy machine has fewer

            async def accepted() -> bool:
                return bool(server.connections)

            await eventually(accepted, SOON_S, "the connection is accepted once there are descriptors")
            assert waiting
        client = Client()
        assert await body_of(await client.request("GET", url)) == b"hello"
        await client.close()
        server.stop_accepting()
        await server.give_up()

    run(test())
    (line,) = lines(capfd, "cannot accept a connection")
    assert line.endswith("too many open files (LimitNOFILE, ulimit -n)")
