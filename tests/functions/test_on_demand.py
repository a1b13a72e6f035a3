"""Functions that have processes only while they are used, and the fork server that makes that quick."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from faashound.functions import endpoint
from faashound.functions.forkserver import STATUS_LIMIT_S
from faashound.functions.local import BadScale, LocalFunctions, UnknownFunction
from faashound.functions.logs import LogStore
from faashound.functions.runtime import open_runtime_directory, parent_directory, remove_abandoned
from faashound.functions.scaling import LOAD_WINDOW_S, BadLabels, Load, Scale, parse_scale
from faashound.watchdog import Client, Url
from tests.functions.conftest import Log
from tests.functions.kit import CAT, F, call, exists, few_descriptors, parse, real, run, running, until

SHORT = 'labels."com.openfaas.scale.zero-duration" = "200ms"'
SHELL = '[f]\nfprocess = "/bin/sh"\n'


def logged(directory: Path) -> LocalFunctions:
    """Return functions whose lines are kept: a start wants a pipe for them."""
    return LocalFunctions(parse(SHELL + SHORT), environ={"PATH": os.environ["PATH"]}, logs=LogStore(directory, 1 << 20))


def connect_to(local: LocalFunctions) -> socket.socket:
    """Return a connection to `f`, which nobody has accepted."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(local.path(F)))
    return connection


async def fork_server(but: psutil.Process | None = None) -> psutil.Process:
    """Return the fork server of this process, once there is one beside the one that is `but` just ending."""

    def others() -> list[psutil.Process]:
        return [each for each in psutil.Process().children() if each != but]

    await until(others, "a fork server")
    (found,) = others()
    return found


def test_function_has_no_process_until_its_first_call() -> None:
    async def test() -> None:
        async with running(real('[cat]\nfprocess = "cat"')) as local:
            status = local.status()[CAT]
            assert (list(status.pids), status.wanted_count, status.available_count) == ([], 1, 1)
            assert (await call(local, "cat", b"hello")).body == b"hello"
            assert len(local.status()[CAT].pids) == 1

    run(test())


def test_function_is_put_to_rest_when_it_was_not_called_and_wakes_again() -> None:
    async def test() -> None:
        async with running(real(SHELL + SHORT)) as local:
            first = int((await call(local, "f", b"echo $PPID")).body)
            await until(lambda: not exists(first), "the watchdog's end")
            assert not local.status()[F].pids
            assert int((await call(local, "f", b"echo $PPID")).body) != first

    run(test())


def test_function_with_worker_processes_is_awake_while_it_is_called_and_rests_then() -> None:
    duration_s, calls_s = 1.5, 5.0
    text = SHELL + f'workers = "2"\nlabels."com.openfaas.scale.zero-duration" = "{duration_s}s"'

    async def call_for_a_while(local: LocalFunctions) -> bool:
        """Tell whether the machine let the calls come without long pauses."""
        begun_s = last_s = time.monotonic()
        while last_s < begun_s + calls_s:
            assert (await call(local, "f", b"echo awake")).body == b"awake\n"
            await asyncio.sleep(0.3)  # its connection is closed meanwhile: only its processes show that it is used
            pause_s, last_s = time.monotonic() - last_s, time.monotonic()
            if pause_s > duration_s / 2:
                return False
        return True

    async def test() -> None:
        async with running(real(text)) as local:
            await call(local, "f", b"true")
            pids = local.status()[F].pids
            while not await call_for_a_while(local):
                pids = local.status()[F].pids
            assert local.status()[F].pids == pids
            await until(lambda: not local.status()[F].pids, "it is put to rest")

    run(test())


def test_no_call_is_lost_when_calls_come_as_the_function_is_put_to_rest() -> None:
    async def test() -> None:
        async with running(real(SHELL + SHORT)) as local:
            seen = set()
            for turn in range(30):
                client = Client()  # as callers have it: what an ending watchdog has not read is sent again
                url = Url("http", str(local.path(F)), 80, "/")
                async with await client.request("POST", url, body=b"echo $PPID") as response:
                    assert response.status == 200
                    seen.add(await response.body.read(100))
                await client.close()
                await asyncio.sleep(0.2 + turn % 10 / 100)  # about when it is put to rest
            assert len(seen) > 2

    run(test())


def test_function_is_not_put_to_rest_when_a_call_takes_longer_than_the_zero_duration() -> None:
    async def test() -> None:
        async with running(real(SHELL + SHORT)) as local:
            assert (await call(local, "f", b"sleep 1; echo whole")).body == b"whole\n"

    run(test())


def test_function_is_woken_by_the_call_that_waits_when_descriptors_were_scarce_at_first(
    tmp_path: Path, log: Log
) -> None:
    async def test() -> None:
        async with running(logged(tmp_path)) as local:
            with few_descriptors(1):
                waiting = connect_to(local)
                await until(lambda: "f cannot be started: too many open files" in log, "the failure")
            with waiting:
                await until(lambda: local.status()[F].pids, "a watchdog for the call that waits")
            assert (await call(local, "f", b"echo here")).body == b"here\n"
            await until(lambda: not local.status()[F].pids, "it is put to rest")
            assert (await call(local, "f", b"echo again")).body == b"again\n"

    run(test())


def test_function_is_put_to_rest_when_descriptors_were_scarce_as_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = itertools.count()
    real_look = endpoint.count_connections

    def look(path: Path) -> int:  # at the boundary to the kernel: the first look fails
        if next(looks) == 0:
            raise OSError(errno.EMFILE, "Too many open files")
        return real_look(path)

    async def test() -> None:
        monkeypatch.setattr(endpoint, "count_connections", look)
        async with running(real(SHELL + SHORT)) as local:
            first = int((await call(local, "f", b"echo $PPID")).body)
            await until(lambda: not exists(first), "the watchdog's end")
        assert next(looks) > 1

    run(test())


def test_function_keeps_its_process_when_its_label_says_so() -> None:
    text = SHELL + 'labels = { com.openfaas.scale.zero = "false", com.openfaas.scale.zero-duration = "50ms" }'

    async def test() -> None:
        async with running(real(text)) as local:
            await until(lambda: local.status()[F].pids, "a process without a call")
            before = local.status()[F].pids
            await asyncio.sleep(0.5)
            assert local.status()[F].pids == before

    run(test())


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        pytest.param({"zero": "false"}, {"zero": "true", "zero-duration": "200ms"}, 0, id="rests now"),
        pytest.param({"zero-duration": "1h"}, {"zero-duration": "200ms"}, 0, id="rests sooner"),
        pytest.param({}, {"min": "3"}, 3, id="more"),
        pytest.param({"min": "3"}, {}, 1, id="fewer"),
        pytest.param({"min": "3"}, {"max": "5"}, 1, id="fewer, by its load"),
    ],
)
def test_labels_that_change_hold_for_a_function_that_is_awake(
    before: dict[str, str], after: dict[str, str], count: int
) -> None:
    async def test() -> None:
        async with running(real(scaled(before))) as local:
            await call(local, "f", b"true")
            pids = set(local.status()[F].pids)
            await local.apply(parse(scaled(after)))
            await until(lambda: len(local.status()[F].pids) == count, f"{count} watchdogs")
            gone = pids.difference(local.status()[F].pids)
            await until(lambda: not any(map(exists, gone)), "the end of those that are too many")
            assert len(gone) == max(len(pids) - count, 0), "the others stay"
            assert (await call(local, "f", b"echo here")).body == b"here\n"

    run(test())


def test_new_version_has_no_more_watchdogs_than_its_labels_allow() -> None:
    async def test() -> None:
        async with running(real(scaled({}))) as local:
            await local.scale(F, 4)
            await local.put(parse(scaled({"max": "2"}) + '\nenvironment = { V = "2" }')[F])
            assert local.status()[F].wanted_count == 2

    run(test())


def test_function_that_sleeps_is_started_when_its_labels_say_so() -> None:
    async def test() -> None:
        async with running(real(scaled({}))) as local:
            await local.apply(parse(scaled({"zero": "false", "min": "2"})))
            await until(lambda: len(local.status()[F].pids) == 2, "processes without a call")

    run(test())


def scaled(labels: dict[str, str]) -> str:
    """Return a functions file whose function has these labels of its scale."""
    return SHELL + "labels = { " + ", ".join(f'com.openfaas.scale.{name} = "{labels[name]}"' for name in labels) + " }"


def test_replicas_are_as_many_as_asked_for() -> None:
    text = SHELL + 'labels = { com.openfaas.scale.min = "2", com.openfaas.scale.max = "3" }'

    async def test() -> None:
        async with running(real(text)) as local:
            await until(lambda: len(local.status()[F].pids) == 2, "two")
            await local.scale(F, 3)
            await until(lambda: len(local.status()[F].pids) == 3, "three")
            await local.scale(F, 1)
            assert len(local.status()[F].pids) == 1
            await local.scale(F, 0)
            status = local.status()[F]
            assert (list(status.pids), status.wanted_count, status.available_count) == ([], 0, 0)
            assert (await call(local, "f", b"echo awake")).body == b"awake\n"
            with pytest.raises(BadScale, match=r"replicas: 4; allowed: 0 to 3 \(com.openfaas.scale.max\)"):
                await local.scale(F, 4)
            with pytest.raises(UnknownFunction):
                await local.scale(CAT, 1)

    run(test())


def test_function_gets_more_replicas_when_more_calls_are_in_flight_and_fewer_when_they_have_ended(
    tmp_path: Path,
) -> None:
    text = SHELL + 'labels = { com.openfaas.scale.max = "3", com.openfaas.scale.target = "2" }'
    gate = tmp_path / "gate"
    script = f"while [ ! -e {gate} ]; do sleep 0.05; done".encode()

    async def test() -> None:
        async with running(real(text)) as local:
            calls = [asyncio.create_task(call(local, "f", script)) for _ in range(8)]
            await until(lambda: len(local.status()[F].pids) == 3, "three")
            await asyncio.sleep(2 * endpoint.LOAD_LOOK_S)  # in which there is no fourth
            assert len(local.status()[F].pids) == local.status()[F].wanted_count == 3
            gate.touch()
            assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
            assert len(local.status()[F].pids) == 3
            await until(lambda: len(local.status()[F].pids) == 1, "one is enough again")
            assert local.status()[F].wanted_count == 1
            assert (await call(local, "f", b"echo still here")).body == b"still here\n"

    run(test())


def test_function_that_was_woken_by_hand_gets_more_replicas_when_more_calls_are_in_flight(tmp_path: Path) -> None:
    text = SHELL + 'labels = { com.openfaas.scale.max = "3", com.openfaas.scale.target = "1" }'
    gate = tmp_path / "gate"
    script = f"while [ ! -e {gate} ]; do sleep 0.05; done".encode()

    async def test() -> None:
        async with running(real(text)) as local:
            await local.scale(F, 0)
            await local.scale(F, 1)
            calls = [asyncio.create_task(call(local, "f", script)) for _ in range(3)]
            await until(lambda: len(local.status()[F].pids) == 3, "three")
            gate.touch()
            assert {answer.status for answer in await asyncio.gather(*calls)} == {200}

    run(test())


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("prewarm", ["0", "2", "3"])
def test_calls_in_flight_are_counted_without_what_waits_for_a_request(
    tmp_path: Path, workers: str, prewarm: str
) -> None:
    gate = tmp_path / "gate"
    settings = {"prewarm": prewarm, "workers": workers}
    text = SHELL + f'prewarm = "{prewarm}"\nworkers = "{workers}"\ncgi_headers = false'
    script = f"while [ ! -e {gate} ]; do sleep 0.05; done".encode()
    waiting_count = -(-int(prewarm) // int(workers)) * int(workers)

    async def test() -> None:
        async with running(real(text)) as local:
            assert (await call(local, "f", b"echo awake")).body == b"awake\n"
            (pid,) = local.status()[F].pids
            at_rest = 1 + waiting_count + (int(workers) if workers != "1" else 0)
            await until(lambda: len(psutil.Process(pid).children(recursive=True)) == at_rest, "all that wait, wait")
            assert endpoint.count_calls(pid, settings) == 0
            calls = [asyncio.create_task(call(local, "f", script)) for _ in range(5)]
            await until(lambda: endpoint.count_calls(pid, settings) == 5, "five")
            gate.touch()
            assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
            await until(lambda: endpoint.count_calls(pid, settings) == 0, "none")

    run(test())


def test_watchdog_that_has_no_call_goes_before_one_that_has(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    script = f"until [ -e {gate} ]; do sleep 0.05; done".encode()

    async def test() -> None:
        async with running(real(SHELL)) as local:
            await local.scale(F, 4)
            await until(lambda: [has_guard(pid) for pid in local.status()[F].pids] == [True] * 4, "four")
            calling = asyncio.create_task(call(local, "f", script))
            await until(lambda: busy(local), "one has the call")
            expected = busy(local)
            await local.scale(F, 1)
            assert list(local.status()[F].pids) == expected
            gate.touch()
            assert (await calling).status == 200

    run(test())


def has_guard(pid: int) -> bool:
    return len(endpoint.children_of(pid)) == 1


def busy(local: LocalFunctions) -> list[int]:
    return [pid for pid in local.status()[F].pids if endpoint.count_calls(pid, {})]


def test_function_gets_more_replicas_when_it_is_called_often_and_no_target_is_set() -> None:
    made = itertools.count(0, 1000)  # at each look, however late a busy machine makes it

    async def test() -> None:
        local = real(SHELL + 'labels = { com.openfaas.scale.max = "2" }')
        local.count_made = lambda name: next(made)
        async with running(local):
            await call(local, "f", b"true")
            await until(lambda: len(local.status()[F].pids) == 2, "a second one")

    run(test())


@pytest.mark.parametrize(("in_flight", "expected"), [(0, 1), (50, 1), (51, 2), (500, 4)])
def test_calls_in_flight_want_so_many_replicas(in_flight: int, expected: int) -> None:
    assert parse_scale({"com.openfaas.scale.max": "4"}).count_for(in_flight) == expected


@pytest.mark.parametrize(("calls_per_s", "expected"), [(5.0, 1), (5.1, 2), (10.0, 2), (100.0, 4)])
def test_calls_a_second_want_so_many_replicas_unless_a_target_is_set(calls_per_s: float, expected: int) -> None:
    labels = {"com.openfaas.scale.max": "4"}
    assert parse_scale(labels).count_for(0, calls_per_s) == expected
    assert parse_scale({**labels, "com.openfaas.scale.target": "50"}).count_for(0, calls_per_s) == 1


def test_load_is_that_of_the_last_seconds() -> None:
    load = Load()
    assert (load.in_flight_count, load.calls_per_s) == (0, 0.0)
    for second in range(11):
        load.look(float(second), 6 * second, 9 if second == 3 else 1)
    assert (load.in_flight_count, load.calls_per_s) == (9, 6.0)
    load.look(10.0 + LOAD_WINDOW_S, 60, 0)
    assert (load.in_flight_count, load.calls_per_s) == (1, 0.0)


def test_calls_go_on_when_the_fork_server_is_killed(log: Log) -> None:
    async def test() -> None:
        async with running(real(SHELL + '[cat]\nfprocess = "cat"')) as local:
            first = int((await call(local, "f", b"echo $PPID")).body)
            server = await fork_server()
            server.kill()
            assert int((await call(local, "f", b"echo $PPID")).body) == first
            assert (await call(local, "cat", b"from the next server")).body == b"from the next server"
            assert await fork_server(but=server) != server
            os.kill(first, signal.SIGKILL)
            assert int((await call(local, "f", b"echo $PPID")).body) != first

    run(test())
    assert "the fork server was ended by SIGKILL" in log


def test_why_a_watchdog_has_ended_is_told_though_the_fork_server_is_late(log: Log) -> None:
    async def test() -> None:
        async with running(real(SHELL)) as local:
            first = int((await call(local, "f", b"echo $PPID")).body)
            server = await fork_server()
            server.suspend()
            try:
                os.kill(first, signal.SIGKILL)
                await asyncio.sleep(STATUS_LIMIT_S + 0.3)
            finally:
                server.resume()
            await until(lambda: "the watchdog of f " in log, "the end")

    run(test())
    assert "the watchdog of f was ended by SIGKILL" in log


def test_forked_watchdog_leads_its_group_and_holds_no_descriptor_of_the_server() -> None:
    async def test() -> None:
        async with running(real(SHELL + '[cat]\nfprocess = "cat"')) as local:
            await call(local, "cat")
            pid = int((await call(local, "f", b"echo $PPID")).body)
            assert os.getpgid(pid) == pid
            assert psutil.Process(pid).name() == "fw f"
            sockets = [fd for fd in os.listdir(f"/proc/{pid}/fd") if _is_seqpacket(pid, fd)]
            assert sockets == []

    run(test())


def _is_seqpacket(pid: int, fd: str) -> bool:
    try:
        target = str(Path(f"/proc/{pid}/fd/{fd}").readlink())
    except FileNotFoundError:
        return False
    inode = target.removeprefix("socket:[").rstrip("]")
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return any(words[6] == inode and words[4] == "0005" for words in lines)


def test_socket_is_for_the_gateways_user_only() -> None:
    async def test() -> None:
        async with running(real(SHELL)) as local:
            directory = local.path(F).parent
            assert directory.stat().st_mode & 0o777 == 0o700
        assert not directory.exists()

    run(test())


def test_directory_of_a_killed_gateway_is_removed_by_the_next(tmp_path: Path) -> None:
    environ = {"TMPDIR": str(tmp_path)} if len(str(tmp_path)) < 60 else {}
    abandoned = Path(environ.get("TMPDIR", "/tmp")) / "faashound.run.abandoned-by-a-test"
    abandoned.mkdir()
    with open_runtime_directory(environ) as first, open_runtime_directory(environ) as second:
        assert first.exists()
        assert second.exists()
        assert not abandoned.exists()
    assert not first.exists()


def test_directory_that_another_gateway_removes_as_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"TMPDIR": str(tmp_path)} if len(str(tmp_path)) < 60 else {}
    made, make = list[str](), tempfile.mkdtemp

    def make_and_remove(**options: Any) -> str:
        made.append(make(**options))
        if len(made) == 1:  # another gateway starts before this one holds what it has made
            remove_abandoned(parent_directory(environ))
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_remove)
    with open_runtime_directory(environ) as directory:
        assert (str(directory), directory.exists()) == (made[1], True)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param({}, Scale(0, 20, True, 900.0), id="nothing said"),
        pytest.param({"min": "2", "max": "4"}, Scale(2, 4, True, 900.0, grows=True), id="numbers"),
        pytest.param({"zero": "false", "zero-duration": "5m"}, Scale(0, 20, False, 300.0), id="zero"),
    ],
)
def test_labels_ask_for_a_scale(labels: dict[str, str], expected: Scale) -> None:
    assert parse_scale({f"com.openfaas.scale.{name}": text for name, text in labels.items()}) == expected


def test_all_bad_labels_are_told_at_once() -> None:
    with pytest.raises(BadLabels) as caught:
        parse_scale({"com.openfaas.scale.min": "x", "com.openfaas.scale.max": "0", "com.openfaas.scale.type": "x"})
    assert set(caught.value.problems) == {"com.openfaas.scale.min", "com.openfaas.scale.max"}
