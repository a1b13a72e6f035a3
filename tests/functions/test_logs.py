"""Logs of functions: kept in files that are bounded, and read by time, number, call, and as they come."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from faashound.calls.names import parse_function_name
from faashound.functions.local import LocalFunctions
from faashound.functions.logs import (
    MAX_REMOVED_COUNT,
    BadLogQuery,
    LogLine,
    LogQuery,
    LogStore,
    Record,
    parse_log_query,
    parse_record,
)
from faashound.functions.table import Function
from faashound.serving.answers import parse_parameters
from testkit.harness import crowding, eventually
from tests.functions.conftest import Log
from tests.functions.kit import DEADLINE_S, F, call_at, parse, run, running, until

FUNCTION = Function(F)
TALKS = '[f]\nfprocess = "/bin/sh"\ncombine_output = false\n'


def line(number: int, call_id: str | None = None, instance: str = "1.1") -> Record:
    return Record("info", LogLine(1_700_000_000.0 + number, instance, call_id, f"line {number}"))


async def texts(store: LogStore, query: LogQuery | None = None) -> list[str]:
    return [each.text async for each in await store.read(F, query or LogQuery())]


def logged(directory: Path, text: str = TALKS, **options: bool) -> LocalFunctions:
    store = LogStore(directory, 1 << 20, **options)
    return LocalFunctions(parse(text), environ={"PATH": os.environ["PATH"]}, logs=store)


async def call_with_id(local: LocalFunctions, body: bytes, call_id: str) -> None:
    headers: Mapping[str, str] = {"X-Call-Id": call_id}
    answer = await asyncio.to_thread(call_at, local.path(F), body, "/", headers)
    assert answer.status == 200


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(
            b'{"time": 5.0, "level": "info", "msg": "[a-1] stderr: hello"}',
            Record("info", LogLine(5.0, "i", "a-1", "stderr: hello")),
            id="of a call",
        ),
        pytest.param(
            b'{"time": 5.0, "level": "error", "msg": "[none] oh"}',
            Record("error", LogLine(5.0, "i", None, "oh")),
            id="of no call",
        ),
        pytest.param(b"Traceback", Record("raw", LogLine(9.0, "i", None, "Traceback")), id="of nobody"),
        pytest.param(b'{"msg": 1}', Record("raw", LogLine(9.0, "i", None, '{"msg": 1}')), id="not ours"),
        pytest.param(b"\xff\x1b[0m", Record("raw", LogLine(9.0, "i", None, "\ufffd\\x1b[0m")), id="not text"),
    ],
)
def test_line_of_a_watchdog_is_understood_whatever_it_is(data: bytes, expected: Record) -> None:
    assert parse_record(data, "i", 9.0) == expected


POSING = [
    *(b'{"msg":"x","level":"info","time":%b}' % time for time in (b"1e400", b"NaN", b"1e20", b"-1", b"1" + b"0" * 400)),
    b'{"a":' * 1300,
]


@pytest.mark.parametrize("data", POSING, ids=lambda data: data[:60].decode()[-30:])
def test_line_of_a_function_that_poses_as_a_watchdogs_stops_neither_the_pipe_nor_readers(
    tmp_path: Path, data: bytes
) -> None:
    async def test() -> None:
        store = LogStore(tmp_path, 1 << 20)
        pipe = store.open_pipe(FUNCTION, "i")
        try:
            for text in (data, b"next"):
                os.write(pipe.fd, text + b"\n")
                last = text.decode()
                await eventually(partial(_has, store, last), DEADLINE_S, f"{last[:20]} is kept")
        finally:
            pipe.close()
        told = [each.describe(F) async for each in await store.read(F, LogQuery())]
        assert [each["text"] for each in told] == [data.decode(), "next"]

    run(test())


async def _has(store: LogStore, text: str) -> bool:
    return text in await texts(store)


def test_reader_passes_over_lines_that_are_damaged(tmp_path: Path) -> None:
    async def test() -> None:
        store = LogStore(tmp_path, 1 << 20)
        store.add(FUNCTION, [line(1)])
        store.on_pipe_closed(F)
        (part,) = (tmp_path / str(F)).iterdir()
        bad = (b'[Infinity,"i",null,"x"]', b'[1e20,"i",null,"x"]', b'["1","i",null,"x"]', b"[" * 9000, b"{}", b"[1]")
        with part.open("ab") as file:
            file.write(b"\n".join([*bad, LogLine(5.0, "i", None, "whole").build()]))
        told = [each.describe(F) async for each in await store.read(F, LogQuery())]
        assert [each["text"] for each in told] == ["line 1", "whole"]

    run(test())


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", LogQuery()),
        (b"name=f&tail=-1&follow=0", LogQuery()),
        (b"tail=0", LogQuery()),  # "unlimited if <=0", faas-cli
        (b"tail=5&tail=1", LogQuery(None, 5)),  # the first of each, as everywhere
        (b"tail=5&follow=true&call=a&instance=i", LogQuery(None, 5, True, "a", "i")),
        (b"since=2023-11-14T22:13:20Z", LogQuery(1_700_000_000.0)),
        (b"since=2023-11-14T23:13:20%2B01:00", LogQuery(1_700_000_000.0)),
        (b"since=2023-11-14T23:13:20+01:00", LogQuery(1_700_000_000.0)),
    ],
)
def test_query_is_read_as_clients_spell_it(query: bytes, expected: LogQuery) -> None:
    assert parse_log_query(parse_parameters(query)) == expected


@pytest.mark.parametrize("text", [b"2023-11-14T22:13:20", b"2023-11-14", b"1700000000", b"22:13:20Z"])
def test_time_that_each_zone_has_of_its_own_is_refused(text: bytes) -> None:
    with pytest.raises(BadLogQuery, match=r"since: .*RFC 3339"):
        parse_log_query(parse_parameters(b"since=" + text))


def test_all_problems_of_a_query_are_told() -> None:
    with pytest.raises(BadLogQuery) as caught:
        parse_log_query({"since": "yesterday", "tail": "x", "follow": "perhaps"})
    assert [problem.partition(":")[0] for problem in str(caught.value).splitlines()] == ["since", "tail", "follow"]
    assert caught.value.status == 422


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (LogQuery(), ["line 0", "line 1", "line 2", "line 3"]),
        (LogQuery(tail_count=2), ["line 2", "line 3"]),
        (LogQuery(tail_count=0), []),
        (LogQuery(since_s=1_700_000_001.0), ["line 1", "line 2", "line 3"]),
        (LogQuery(call_id="b"), ["line 1", "line 3"]),
        (LogQuery(call_id="b", tail_count=1), ["line 3"]),
        (LogQuery(instance="other"), []),
    ],
)
def test_lines_are_chosen(tmp_path: Path, query: LogQuery, expected: list[str]) -> None:
    store = LogStore(tmp_path, 1 << 20)
    store.add(FUNCTION, [line(number, "ab"[number % 2]) for number in range(4)])
    store.close()
    assert asyncio.run(texts(LogStore(tmp_path, 1 << 20), query)) == expected


def test_files_are_bounded_and_the_newest_lines_stay(tmp_path: Path) -> None:
    store = LogStore(tmp_path, 40_000)
    for number in range(3000):
        store.add(FUNCTION, [line(number)])
    store.close()
    parts = list((tmp_path / str(F)).iterdir())
    assert len(parts) == 4
    assert sum(path.stat().st_size for path in parts) <= 40_000 + 4 * 100
    found = asyncio.run(texts(LogStore(tmp_path, 40_000)))
    assert found == [f"line {number}" for number in range(3000 - len(found), 3000)]
    assert len(found) > 300


def test_reader_that_follows_sees_each_line_once_across_files_and_a_slow_one_slows_nobody(tmp_path: Path) -> None:
    async def test() -> None:
        store = LogStore(tmp_path, 100_000)
        store.add(FUNCTION, [line(0)])
        slow = await store.read(F, LogQuery(follow=True))
        assert (await anext(slow)).text == "line 0"  # and then reads no more
        seen: list[str] = []

        async def follow() -> None:
            async for each in await store.read(F, LogQuery(follow=True)):
                seen.append(each.text)

        following = asyncio.create_task(follow())
        begin_s = time.monotonic()
        for number in range(1, 2000):
            store.add(FUNCTION, [line(number)])
            if number % 200 == 0:
                await until(lambda: len(seen) == number + 1, "what was written")  # noqa: B023
        await until(lambda: len(seen) == 2000, "all of it")
        assert seen == [f"line {number}" for number in range(2000)]
        assert time.monotonic() - begin_s < DEADLINE_S * crowding()
        following.cancel()
        await slow.aclose()
        store.close()

    run(test())


def test_reader_sees_what_is_written_after_its_tail_was_counted(tmp_path: Path) -> None:
    async def test() -> None:
        store = LogStore(tmp_path, 100_000)
        store.add(FUNCTION, [line(0), line(1)])
        for count in (0, 1):
            lines = await store.read(F, LogQuery(tail_count=count, follow=True))
            store.add(FUNCTION, [line(2)])
            assert [(await anext(lines)).text for _ in range(count + 1)][-1] == "line 2"
            await lines.aclose()
        store.close()

    run(test())


def test_reader_of_a_tail_gets_no_more_when_lines_are_written_meanwhile(tmp_path: Path) -> None:
    async def test() -> None:
        store = LogStore(tmp_path, 100_000)
        store.add(FUNCTION, [line(0), line(1)])
        lines = await store.read(F, LogQuery(tail_count=1))
        store.add(FUNCTION, [line(2)])
        assert [each.text async for each in lines] == ["line 1"]
        store.close()

    run(test())


def test_lines_of_a_function_are_kept_with_their_call_across_restarts(tmp_path: Path) -> None:
    async def test() -> None:
        for word in ("first", "second"):
            async with running(logged(tmp_path)) as local:
                await call_with_id(local, f"echo {word} >&2".encode(), f"id-{word}")
        store = LogStore(tmp_path, 1 << 20)
        assert "stderr: first" in await texts(store, LogQuery(call_id="id-first"))
        found = await texts(store, LogQuery(call_id="id-second"))
        assert found[0] == "Forking fprocess."
        assert found[1] == "stderr: second"
        assert found[2].startswith("Wrote 0 Bytes - Duration: ")
        assert len(found) == 3

    run(test())


@pytest.mark.parametrize("as_json", [False, True])
def test_gateways_log_shows_what_functions_say_and_not_each_step_of_a_call(
    tmp_path: Path, log: Log, as_json: bool
) -> None:
    async def test() -> None:
        async with running(logged(tmp_path, as_json=as_json)) as local:
            await call_with_id(local, b"echo hello >&2", "an-id")

    run(test())
    (shown,) = [text for text in str(log).splitlines() if "hello" in text]
    assert "Forking" not in log
    assert "Wrote" not in log
    if as_json:
        document = json.loads(shown)
        assert (document["function"], document["msg"], document["call_id"]) == ("f", "stderr: hello", "an-id")
    else:
        assert shown.endswith(" f: stderr: hello")


def test_lines_are_for_the_gateways_user_only(tmp_path: Path) -> None:
    store = LogStore(tmp_path / "logs", 1 << 20)
    store.add(FUNCTION, [line(1)])
    store.close()
    assert not any(path.stat().st_mode & 0o077 for path in (tmp_path / "logs").rglob("*"))
    assert store.knows(F)


def test_disk_that_takes_nothing_is_told_once_and_stops_nothing(tmp_path: Path, log: Log) -> None:
    (tmp_path / str(F)).write_text("a file in the way")
    store = LogStore(tmp_path, 1 << 20)
    for number in range(3):
        store.add(FUNCTION, [line(number)])
    assert str(log).count("lines of functions are lost") == 1


def test_update_and_removal_lose_no_line(tmp_path: Path) -> None:
    async def test() -> None:
        async with running(logged(tmp_path)) as local:
            await call_with_id(local, b"echo old >&2", "one")
            await local.put(parse(TALKS + 'environment = { V = "2" }')[F])
            await call_with_id(local, b"echo new >&2", "two")
            await local.remove(F)
        found = await texts(LogStore(tmp_path, 1 << 20))
        assert [text for text in found if text.startswith("stderr")] == ["stderr: old", "stderr: new"]

    run(test())


def test_call_of_an_old_version_finishes_and_its_lines_are_kept_when_all_is_stopped_meanwhile(tmp_path: Path) -> None:
    gate, logs = tmp_path / "gate", tmp_path / "logs"
    script = f"echo first >&2; while [ ! -e {gate} ]; do sleep 0.05; done; echo second >&2".encode()

    async def test() -> None:
        store = LogStore(logs, 1 << 20)

        async def tells(part: str) -> bool:
            return any(part in text for text in await texts(store))

        async with running(logged(logs)) as local:
            calling = asyncio.create_task(call_with_id(local, script, "an-id"))
            await eventually(partial(tells, "stderr: first"), DEADLINE_S, "the call")
            await local.put(parse(TALKS + 'environment = { V = "2" }')[F])
            await eventually(partial(tells, "draining"), DEADLINE_S, "the end of the old version")
            stopping = asyncio.create_task(local.stop(DEADLINE_S))
            await asyncio.sleep(0)  # it has asked all to end
            gate.touch()
            await calling
            await stopping
        assert "stderr: second" in await texts(store)

    run(test())


@pytest.mark.parametrize("counts", [(0,), (2, 1, 0)], ids=["to none", "down step by step"])
def test_lines_of_a_call_are_kept_when_its_function_is_scaled_down_meanwhile(
    tmp_path: Path, counts: Sequence[int]
) -> None:
    gate, logs = tmp_path / "gate", tmp_path / "logs"
    script = f"echo first >&2; while [ ! -e {gate} ]; do sleep 0.05; done; echo second >&2".encode()

    async def test() -> None:
        local = logged(logs)
        async with running(local):
            await local.scale(F, 2)
            calls = [asyncio.create_task(call_with_id(local, script, "an-id")) for _ in range(3)]
            store = LogStore(logs, 1 << 20)

            async def all_run() -> bool:
                return (await texts(store)).count("stderr: first") == len(calls)

            await eventually(all_run, DEADLINE_S, "the calls")
            for count in counts:  # the client need not wait for the calls
                await local.scale(F, count)
            await call_with_id(local, b"echo awake >&2", "another")
            gate.touch()
            await asyncio.gather(*calls)

            async def all_told() -> bool:
                return (await texts(store)).count("stderr: second") == len(calls)

            await eventually(all_told, DEADLINE_S, "the last lines")

    run(test())


def test_lines_of_removed_functions_are_bounded_and_those_that_wrote_last_stay(tmp_path: Path) -> None:
    store = LogStore(tmp_path, 1 << 20)
    count = MAX_REMOVED_COUNT + 3
    names = [parse_function_name(f"f{number}") for number in range(count)]
    for number, name in enumerate(names):
        store.add(Function(name), [line(number)])
        for part in (tmp_path / str(name)).iterdir():
            os.utime(part, (number, number))
    store.prune({str(names[0])})
    assert {path.name for path in tmp_path.iterdir()} == {names[0], *names[-MAX_REMOVED_COUNT:]}


def test_functions_change_though_the_lines_of_one_that_is_no_more_cannot_be_looked_at(tmp_path: Path, log: Log) -> None:
    (tmp_path / "gone.openfaas-fn").mkdir()
    (tmp_path / "gone.openfaas-fn" / "1.jsonl").symlink_to(tmp_path / "nowhere")

    async def test() -> None:
        async with running(logged(tmp_path)) as local:
            await local.apply(parse(TALKS + '[g]\nfprocess = "cat"\n'))
            await local.remove(F)
            assert [name.short for name in local.table] == ["g"]

    run(test())
    assert "lines of functions that are no more are not looked through" in log


def test_no_file_of_a_function_is_held_open_when_it_is_removed(tmp_path: Path) -> None:
    async def test() -> None:
        local = logged(tmp_path)
        async with running(local):
            await call_with_id(local, b"echo hello", "a")
            await until(lambda: open_logs(tmp_path), "a file that is written to")
            await local.remove(F)
            await until(lambda: not open_logs(tmp_path), "no file")
            assert (tmp_path / str(F)).exists()

    run(test())


def open_logs(directory: Path) -> list[str]:
    """Return the files below `directory` that this process holds open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
    return [path for path in found if path.startswith(str(directory))]
