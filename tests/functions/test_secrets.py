"""Secrets: kept, changed, handed to the functions that name them and to no other."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.names import parse_function_name
from faashound.functions.control import Control
from faashound.functions.documents import Documents, DocumentShelves, NotStored
from faashound.functions.endpoint import NotHealthy
from faashound.functions.local import LocalFunctions
from faashound.functions.secrets import (
    BadSecret,
    SecretExists,
    SecretFiles,
    SecretInUse,
    Secrets,
    UnknownSecret,
    parse_secret_name,
    parse_secret_value,
)
from faashound.functions.table import Function
from testkit.needed import want_root
from testkit.system import System
from tests.functions.conftest import Log
from tests.functions.kit import DEADLINE_S, F, call, run, until
from tests.functions.test_deployments import controlled, shell

READ = b"cat $secret_mount_path/*; ls $secret_mount_path"


def secret(value: str = "s3cret", name: str = "token") -> dict[str, Any]:
    return {"name": name, "value": value}


def test_secret_for_which_no_directory_can_be_made_is_not_stored(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create_namespace({"name": "blue"})
            (tmp_path / "secrets" / "blue").touch()
            with pytest.raises(NotStored, match=r"^cannot be stored: File exists$"):
                await control.create_secret(secret(), "blue")

    run(test())


def test_secret_may_have_the_longest_name_that_is_allowed(tmp_path: Path) -> None:
    name = "n" * 253

    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret("first", name))
            await control.create(shell(secrets=[name]))
            assert (await call(local, "f", READ)).body == b"first" + name.encode() + b"\n"
            await control.update_secret(secret("second", name))
            assert (await call(local, "f", READ)).body == b"second" + name.encode() + b"\n"

    run(test())


def test_function_finds_its_own_secrets_and_a_changed_one_at_the_next_call(tmp_path: Path, log: Log) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret("first"))
            await control.create_secret(secret("hidden", "other"))
            await control.create(shell(secrets=["token"]))
            await control.create(shell(service="without"))
            assert (await call(local, "f", READ)).body == b"firsttoken\n"
            pids = [status.pids for status in local.status().values()]
            await control.update_secret(secret("second"))
            assert (await call(local, "f", READ)).body == b"secondtoken\n"
            assert [status.pids for status in local.status().values()] == pids
            assert (await call(local, "without", b"echo [$secret_mount_path]")).body == b"[]\n"
        async with controlled(tmp_path) as (control, local):
            assert (await call(local, "f", READ)).body == b"secondtoken\n"

    run(test())
    assert "second" not in str(log)
    assert "hidden" not in str(log)


def test_secret_of_a_declared_function_is_a_file_of_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path, '[f]\nfprocess = "/bin/sh"\nsecrets = ["token"]\n') as (control, local):
            await control.create_secret(secret("value"))
            assert (await call(local, "f", READ)).body == b"valuetoken\n"

    run(test())


def test_declared_function_whose_secret_is_not_kept_is_told_of_at_each_change_of_the_file(
    tmp_path: Path, log: Log
) -> None:
    told = "f does not find its secrets token; allowed: those that /system/secrets has in openfaas-fn"

    async def test() -> None:
        async with controlled(tmp_path, '[f]\nfprocess = "/bin/sh"\nsecrets = ["token"]\n') as (control, local):
            await until(lambda: str(log).count(told) == 1, "the missing secret is told")
            await control.reload()
            await until(lambda: str(log).count(told) == 2, "and again, of the file as it is now")
            await control.create_secret(secret("value"))
            await control.reload()
            assert (await call(local, "f", READ)).body == b"valuetoken\n"
            assert str(log).count(told) == 2

    run(test())


def test_declared_function_is_told_of_when_no_secrets_are_kept() -> None:
    with System('[f]\nfprocess = "/bin/sh"\nsecrets = ["token"]\n', {"worker": "none"}) as system:
        system.wait_log("error: f does not find its secrets token; allowed: none, unless deploy=process is set")


def test_nothing_of_a_secret_is_readable_for_others(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret())
            await control.create(shell(secrets=["token"]))
            mine = Path((await call(local, "f", b"echo $secret_mount_path")).body.decode().strip())
            assert readable_for_others(mine.parent, tmp_path / "secrets") == []
        assert not exists_still(mine)

    run(test())


def test_function_of_another_user_reads_its_secrets_and_connects_to_no_function(tmp_path: Path) -> None:
    want_root("running functions as another user")
    reads = "id -u; cat $secret_mount_path/token; ls -ld $secret_mount_path | cut -c1-10"
    other = "python3 -c \"import socket; socket.socket(socket.AF_UNIX).connect('{}')\" 2>&1 | tail -1"

    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret("value"))
            await control.create(shell(secrets=["token"], envVars={"user": "65534:65534"}))
            assert (await call(local, "f", reads.encode())).body == b"65534\nvaluedrwx------\n"
            await control.update_secret(secret("other"))
            assert (await call(local, "f", b"cat $secret_mount_path/token")).body == b"other"
            refused = (await call(local, "f", other.format(local.path(F)).encode())).text
            assert "Permission denied" in refused

    run(test())


def test_trap_of_a_function_in_its_directory_gets_no_secret_elsewhere_and_stops_no_change(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    trap = f"cd $secret_mount_path; touch {elsewhere}; ln -s {elsewhere} .token.new; echo set"

    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret("first"))
            await control.create(shell(secrets=["token"]))
            assert (await call(local, "f", trap.encode())).body == b"set\n"
            await control.update_secret(secret("second"))
            assert (await call(local, "f", READ)).body == b"secondtoken\n"
            await call(local, "f", b"cd $secret_mount_path; mkdir .token.new")
            await control.update_secret(secret("third"))

    run(test())
    assert elsewhere.read_text() == ""


def test_version_that_serves_keeps_its_secrets_when_a_new_one_with_others_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret("first"))
            await control.create_secret(secret("hidden", "other"))
            await control.create(shell(secrets=["token"]))
            old = local.table[F]
            settings = {**(old.settings or {}), "exec_timeout": "banana"}  # what no deployment could say
            with pytest.raises(NotHealthy):
                await local.put(dataclasses.replace(old, settings=settings, secrets=("other",)))
            assert (await call(local, "f", READ)).body == b"firsttoken\n"
            await control.update_secret(secret("second"))
            assert (await call(local, "f", READ)).body == b"secondtoken\n"
            await until(lambda: len(directories(local)) == 1, "the end of what the refused version had")

    run(test())


async def read_late(control: Control, local: LocalFunctions, change: Callable[[], Awaitable[object]]) -> bytes:
    """Return what a call reads of its secret after `change`, before which it has begun."""
    begun, released = local.directory / "begun", local.directory / "released"
    reads = f"touch {begun}; while ! [ -e {released} ]; do sleep 0.05; done; cat $secret_mount_path/token"
    await control.create_secret(secret("first"))
    await control.create_secret(secret("hidden", "other"))
    await control.create(shell(secrets=["token"]))
    calling = asyncio.create_task(call(local, "f", reads.encode()))
    await until(begun.exists, "the call has begun")
    await change()
    released.touch()
    return (await calling).body


def directories(local: LocalFunctions) -> list[Path]:
    """Return those that functions have of their secrets."""
    return list((local.directory / "secrets").iterdir())


def test_call_of_an_old_version_reads_its_secret_after_the_update_and_a_new_value_of_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):

            async def change() -> None:
                await control.update(shell(secrets=["other"]))
                assert (await call(local, "f", READ)).body == b"hiddenother\n"
                await control.update_secret(secret("second"))

            assert await read_late(control, local, change) == b"second"
            await until(lambda: len(directories(local)) == 1, "the end of what the old version had")
            assert (await call(local, "f", READ)).body == b"hiddenother\n"

    run(test())


@pytest.mark.parametrize("way", ["deleted", "gone from what is in force"])
def test_running_call_of_a_removed_function_reads_its_secret_which_is_gone_afterwards(tmp_path: Path, way: str) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):

            async def change() -> None:
                if way == "deleted":
                    await control.remove({"functionName": "f"})
                else:
                    await local.apply({})
                assert F not in local.table

            assert await read_late(control, local, change) == b"first"
            await until(lambda: not directories(local), "the end of what the function had")

    run(test())


def test_new_version_serves_though_it_cannot_have_as_many_processes_as_the_old_one_yet(
    tmp_path: Path, log: Log
) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret())
            await control.create(shell(secrets=["token"]))
            await local.scale(F, 3)
            in_the_way: list[Path] = []

            async def be_stored() -> None:
                in_the_way.extend(directory / ".token.new" for directory in directories(local))
                for each in in_the_way:
                    each.mkdir()

            changed = dataclasses.replace(local.table[F], environment={"V": "2"})
            await local.put(changed, be_stored)
            assert (await call(local, "f", b"echo $V")).body == b"2\n"
            await until(lambda: "f cannot be started" in log, "it is told")
            for each in in_the_way:
                with contextlib.suppress(FileNotFoundError):  # of the old version, which has gone
                    each.rmdir()
            await until(lambda: len(local.status()[F].pids) == 3, "as many as before")

    run(test())


def test_function_whose_user_is_gone_is_told_of_at_its_call_and_the_gateway_goes_on(tmp_path: Path, log: Log) -> None:
    function = Function(F, settings={"fprocess": "cat", "user": "no-such-user"}, secrets=("token",))

    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create_secret(secret())
            await local.apply({F: function})
            _, writer = await asyncio.open_unix_connection(local.path(F))
            await until(lambda: "f cannot be started: " in log and "there is no such user" in log, "it is told")
            await control.update_secret(secret("second"))
            writer.close()

    run(test())
    assert "f does not see the new token: user=no-such-user: there is no such user" in log


def function_named(name: str) -> Function:
    return Function(parse_function_name(name), settings={"fprocess": "cat"}, secrets=("token",))


def test_changed_secret_reaches_every_function_while_others_wake(tmp_path: Path) -> None:
    secrets = Secrets(DocumentShelves(tmp_path / "state"))
    secrets.create("openfaas-fn", "token", b"0")
    (tmp_path / "run").mkdir()
    files, made = SecretFiles(tmp_path / "run" / "secrets", secrets), itertools.count()

    def wake(name: str = "f") -> Path:
        return files.directory_of(function_named(name), f"1.{next(made)}")

    paths = [wake() for _ in range(40)]

    def change() -> None:
        for number in range(1, 4):
            secrets.update("openfaas-fn", "token", b"%d" % number)
            files.refresh("openfaas-fn", "token")
            files.refresh_all()

    with ThreadPoolExecutor(1) as pool:
        changing = pool.submit(change)
        while not changing.done():
            paths.append(wake())
            files.directory_of(function_named("f"), "1.0")  # another watchdog of a version that is awake
            files.forget(paths.pop(1).name)
        changing.result()
    assert {(path / "token").read_bytes() for path in paths} == {b"3"}


class ShelvesThatChange(DocumentShelves):
    """Has `change` go on when a document was read, and before the reader has it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.change: Callable[[], None] | None = None

    def space(self, name: str) -> Documents:
        return DocumentsThatChange(self, super().space(name).directory)


class DocumentsThatChange(Documents):
    def __init__(self, shelves: ShelvesThatChange, directory: Path) -> None:
        super().__init__(directory)
        self._shelves = shelves

    def read(self, name: str) -> bytes | None:
        found = super().read(name)
        change, self._shelves.change = self._shelves.change, None
        if change is not None:
            change()
        return found


def test_function_that_wakes_while_its_secret_changes_has_the_new_value(tmp_path: Path) -> None:
    shelves = ShelvesThatChange(tmp_path / "state")
    secrets = Secrets(shelves)
    secrets.create("openfaas-fn", "token", b"first")
    (tmp_path / "run").mkdir()
    files, stored = SecretFiles(tmp_path / "run" / "secrets", secrets), threading.Event()

    def change() -> None:
        secrets.update("openfaas-fn", "token", b"second")
        stored.set()
        files.refresh("openfaas-fn", "token")

    with ThreadPoolExecutor(1) as pool:
        changes: list[Future[None]] = []

        def begin() -> None:
            changes.append(pool.submit(change))
            assert stored.wait(DEADLINE_S)
            wait(changes, timeout=0.2)  # it may well be told before we go on, and need not be

        shelves.change = begin
        path = files.directory_of(function_named("f"), "1.1")
        changes[0].result()
    assert (path / "token").read_bytes() == b"second"


def readable_for_others(*directories: Path) -> list[Path]:
    """Return what is below the directories and not for its owner alone."""
    found = [path for directory in directories for path in directory.rglob("*")]
    assert found
    return [path for path in found if path.stat().st_mode & 0o077]


def exists_still(path: Path) -> bool:
    return path.exists()


def test_secret_that_a_function_needs_is_not_deleted(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create_secret(secret())
            await control.create(shell(secrets=["token"]))
            with pytest.raises(SecretInUse, match="token is in use by f"):
                await control.delete_secret({"name": "token"})
            await control.remove({"functionName": "f"})
            await control.delete_secret({"name": "token"})
            assert control.secret_names() == []
            with pytest.raises(UnknownSecret):
                await control.delete_secret({"name": "token"})

    run(test())


def test_secrets_are_listed_by_name_and_survive_a_restart(tmp_path: Path) -> None:
    secrets = Secrets(DocumentShelves(tmp_path))
    secrets.create("openfaas-fn", "a", b"1")
    secrets.create("dev", "b", b"2")
    with pytest.raises(SecretExists):
        secrets.create("dev", "b", b"3")
    with pytest.raises(UnknownSecret):
        secrets.update("dev", "c", b"3")
    assert Secrets(DocumentShelves(tmp_path)).names() == [("dev", "b"), ("openfaas-fn", "a")]
    assert Secrets(DocumentShelves(tmp_path)).names("dev") == [("dev", "b")]
    assert Secrets(DocumentShelves(tmp_path)).read("dev", "b") == b"2"


@pytest.mark.parametrize(
    ("document", "value"),
    [
        pytest.param({"value": "text"}, b"text", id="text"),
        pytest.param({"value": "text", "rawValue": base64.b64encode(b"text\n")}, b"text", id="a file's last line end"),
        pytest.param({"value": "\ufffd", "rawValue": base64.b64encode(b"\xff\x00")}, b"\xff\x00", id="raw wins"),
        pytest.param({"rawValue": base64.b64encode(b" raw ").decode()}, b" raw ", id="raw alone"),
    ],
)
def test_value_is_what_the_client_means(document: dict[str, Any], value: bytes) -> None:
    assert parse_secret_value(document) == value


@pytest.mark.parametrize("document", [{}, {"value": 1}, {"rawValue": "%"}, {"value": ""}, {"value": "x" * (2 << 20)}])
def test_bad_value_is_refused_without_being_shown(document: dict[str, Any]) -> None:
    with pytest.raises(BadSecret, match="allowed") as caught:
        parse_secret_value(document)
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", ".a", "a" * 254, None])
def test_name_that_is_no_file_is_refused(name: object) -> None:
    with pytest.raises(BadSecret):
        parse_secret_name({"name": name})
