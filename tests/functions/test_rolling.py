"""Changes while calls run: new versions, removals, another file; what has not changed keeps its process."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from faashound.functions.endpoint import NotHealthy
from faashound.functions.local import LocalFunctions, UnknownFunction
from faashound.functions.published import PublishedTable, publish
from faashound.functions.table import Function, parse_upstream
from faashound.watchdog import Client, NotReady, Url
from tests.functions.conftest import Log
from tests.functions.kit import CAT, F, call, exists, few_descriptors, parse, real, run, running, until

VERSION = """
[f]
fprocess = "/bin/sh"
environment = {{ VERSION = "{}" }}
[cat]
fprocess = "cat"
"""
ADDED = '[g]\nfprocess = "cat"\n'
REFUSED = '[f]\nfprocess = "cat"\nuser = "4000000000:1"\n[cat]\nfprocess = "cat"\n'


def version(number: object) -> str:
    return VERSION.format(number)


class Load:
    """Callers that call `f` where the table says, one call after the other, until the end of the test."""

    def __init__(self, local: LocalFunctions) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self._local = local
        self._client = Client()
        self._ended = False

    async def call_on(self) -> None:
        while not self._ended:
            function = self._local.table[F]
            assert function.url is not None
            base = parse_upstream(function.url)
            url = Url(base.scheme, base.host, base.port, "/")
            async with await self._client.request("POST", url, body=b"echo $VERSION") as response:
                self.answers.append((response.status, await response.body.read(1000)))

    async def end(self, callers: list[asyncio.Task[None]]) -> None:
        self._ended = True
        await asyncio.gather(*callers)
        await self._client.close()


@asynccontextmanager
async def under_load(local: LocalFunctions, callers_count: int = 8) -> AsyncIterator[Load]:
    load = Load(local)
    callers = [asyncio.create_task(load.call_on()) for _ in range(callers_count)]
    try:
        yield load
    finally:
        await load.end(callers)


def test_no_call_fails_when_a_function_is_updated_fifty_times_under_load() -> None:
    async def test() -> None:
        async with running(real(version(0))) as local, under_load(local) as load:
            for number in range(1, 51):
                await local.put(parse(version(number))[F])
            assert (await call(local, "f", b"echo $VERSION")).body == b"50\n"
        assert {status for status, _ in load.answers} == {200}
        assert len(load.answers) > 100
        assert len({body for _, body in load.answers}) > 10

    run(test())


def test_old_version_finishes_its_call_and_ends_when_a_new_one_serves(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    async def test() -> None:
        async with running(real(version("old"))) as local:
            pid = int((await call(local, "f", b"echo $PPID")).body)
            calling = asyncio.create_task(call(local, "f", f"touch {begun}; sleep 0.5; echo $VERSION".encode()))
            await until(begun.exists, "the call has begun")
            await local.put(parse(version("new"))[F])
            assert (await call(local, "f", b"echo $VERSION")).body == b"new\n"
            assert (await calling).body == b"old\n"
            await until(lambda: not exists(pid), "the old watchdog's end")

    run(test())


def test_old_version_finishes_a_call_that_no_exec_timeout_bounds_however_long_an_answer_may_take_to_write(
    tmp_path: Path,
) -> None:
    begun, old, new = tmp_path / "begun", version("old"), version("new")
    short = 'write_timeout = "200ms"\n'

    async def test() -> None:
        async with running(real(old.replace("[cat]", short + "[cat]"))) as local:
            calling = asyncio.create_task(call(local, "f", f"touch {begun}; sleep 1.5; echo $VERSION".encode()))
            await until(begun.exists, "the call has begun")
            await local.put(parse(new.replace("[cat]", short + "[cat]"))[F])
            assert (await calling).body == b"old\n"

    run(test())


def test_old_version_serves_on_when_the_new_one_does_not_get_healthy(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            pid = int((await call(local, "f", b"echo $PPID")).body)
            broken = local_that_refuses(local)
            with pytest.raises(NotHealthy, match="the watchdog of f exited with status 2: it refuses its settings"):
                await local.put(broken[F])
            assert int((await call(local, "f", b"echo $PPID")).body) == pid
            await local.apply(broken)
            assert (await call(local, "f", b"echo $VERSION")).body == b"old\n"
            assert local.table[F].environment == {"VERSION": "old"}

    run(test())
    assert "the old version of f goes on" in log


@pytest.mark.parametrize("is_refused", [False, True], ids=["healthy", "refused"])
def test_annotations_hold_at_once_though_the_new_version_is_yet_to_get_healthy(is_refused: bool) -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            seen: list[Function] = []
            local.on_change = lambda: seen.append(local.table[F])
            changed = (local_that_refuses(local) if is_refused else parse(version("new")))[F]
            internal = dataclasses.replace(changed, annotations={"com.faashound.auth": "internal"})
            await local.apply({**local.table, F: internal})
            assert [each.exposure.is_internal for each in seen] == [True] * len(seen)
            assert [each.environment["VERSION"] for each in seen] == ["old"] if is_refused else ["old", "new"]

    run(test())


def test_old_version_serves_on_when_the_other_processes_cannot_be_told_of_the_new_one() -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            in_the_way = local.directory / "table.new"
            in_the_way.mkdir()
            changed = parse(version("new"))
            with pytest.raises(OSError, match=r"table\.new"):
                await local.put(changed[F])
            with pytest.raises(OSError, match=r"table\.new"):
                await local.apply(parse(version("new") + ADDED))
            with pytest.raises(OSError, match=r"table\.new"):
                await local.apply({F: local.table[F]})
            assert local.table.keys() == {F, CAT}
            assert (await call(local, "f", b"echo $VERSION")).body == b"old\n"
            assert (await call(local, "cat", b"here")).body == b"here"
            in_the_way.rmdir()
            await local.put(changed[F])
            assert (await call(local, "f", b"echo $VERSION")).body == b"new\n"

    run(test())


def test_refused_version_is_not_started_again_and_leaves_nothing() -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            with pytest.raises(NotHealthy):
                await local.put(local_that_refuses(local)[F])
            paths = {local.path(F), local.path(CAT)}
            await until(lambda: {path for path in local.directory.iterdir() if path.is_socket()} == paths, "its end")
            assert (await call(local, "f", b"echo $VERSION")).body == b"old\n"

    run(test())


def test_removed_function_that_never_served_leaves_nothing_though_a_caller_waits() -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            broken = local_that_refuses(local)[F]
            await local.remove(F)
            await local.apply({F: broken})
            path = local.path(F)
            _, writer = await asyncio.open_unix_connection(path)
            await local.remove(F)
            await until(lambda: not path.exists(), "its end")
            writer.close()

    run(test())


def local_that_refuses(local: LocalFunctions) -> dict:  # type: ignore[type-arg]
    """Return a table whose `f` our watchdog refuses, though its settings can be read."""
    table = parse(version("new"))
    settings = {**(table[F].settings or {}), "exec_timeout": "banana"}  # what a file could not say
    function = table[F]
    return {**table, F: type(function)(function.name, settings=settings)}


def test_unchanged_function_keeps_its_process_when_the_table_changes() -> None:
    async def test() -> None:
        async with running(real(version(1))) as local:
            await call(local, "cat")
            before = local.status()[CAT].pids
            await local.apply(parse(version(2) + '[new]\nfprocess = "cat"\n[far]\nurl = "http://h"\n'))
            assert [name.short for name in local.table] == ["f", "cat", "new", "far"]
            assert local.status()[CAT].pids == before
            assert (await call(local, "new", b"x")).body == b"x"
            assert (await call(local, "f", b"echo $VERSION")).body == b"2\n"

    run(test())


def test_annotations_change_without_another_process() -> None:
    async def test() -> None:
        async with running(real(version(1))) as local:
            await call(local, "cat")
            before = local.status()[CAT].pids
            await local.apply(parse(version(1) + 'annotations.a = "b"\nlabels.c = "d"'))
            assert local.status()[CAT].pids == before
            assert (local.table[CAT].annotations, local.table[CAT].labels) == ({"a": "b"}, {"c": "d"})

    run(test())


def test_removed_function_finishes_its_call_and_leaves_nothing(tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    async def test() -> None:
        async with running(real(version(1))) as local:
            pid = int((await call(local, "f", b"echo $PPID")).body)
            path = local.path(F)
            calling = asyncio.create_task(call(local, "f", f"touch {begun}; sleep 0.5; echo whole".encode()))
            await until(begun.exists, "the call has begun")
            await local.remove(F)
            assert F not in local.table
            assert (await calling).body == b"whole\n"
            await until(lambda: not exists(pid) and not path.exists(), "its end")
            with pytest.raises(UnknownFunction):
                await local.remove(F)

    run(test())


def test_connection_to_an_old_address_is_still_served_right_after_a_change() -> None:
    async def test() -> None:
        async with running(real(version("old"))) as local:
            path = local.path(F)
            await local.put(parse(version("new"))[F])
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 13\r\n\r\necho $VERSION")
            assert (await reader.read()).endswith(b"old\n")
            writer.close()

    run(test())


def test_other_processes_see_each_change_on_a_file_system_with_a_coarse_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat, path = os.stat, tmp_path / "table"

    def coarse_stat(*arguments: Any, **options: Any) -> os.stat_result:
        """Return what a file system tells that keeps whole seconds, and gives the number of a file to the next."""
        found = stat(*arguments, **options)
        return os.stat_result((found.st_mode, 1, *found[2:]), {"st_mtime_ns": found[8] * 1_000_000_000})

    monkeypatch.setattr(os, "stat", coarse_stat)
    seen = PublishedTable(path)
    for number in range(10):
        publish(path, parse(version(number)))
        assert seen[F].environment == {"VERSION": str(number)}


def test_other_process_without_descriptors_goes_on_with_what_it_knows_and_sees_the_change_later(
    tmp_path: Path,
) -> None:
    path = tmp_path / "table"
    publish(path, parse(version("old")))
    seen, fresh = PublishedTable(path), PublishedTable(path)
    assert seen[F].environment == {"VERSION": "old"}
    publish(path, parse(version("new")))
    with few_descriptors(0):
        assert seen[F].environment == {"VERSION": "old"}
        with pytest.raises(NotReady, match="Too many open files"):
            fresh.get(F)
    assert seen[F].environment == fresh[F].environment == {"VERSION": "new"}


def test_other_processes_see_the_table_in_force_at_their_next_look() -> None:
    async def test() -> None:
        async with running(real(version(1))) as local:
            seen: PublishedTable = local.published
            for number in itertools.islice(itertools.count(2), 5):
                await local.put(parse(version(number))[F])
                assert dict(seen) == local.table
            await local.remove(CAT)
            assert list(seen) == [F]

    run(test())
