"""Namespaces that clients make: kept, listed, noted, and removed only when they are empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.functions.control import DeployOff
from faashound.functions.deployments import BadDeployment
from faashound.functions.documents import Documents
from faashound.functions.namespaces import (
    BadNamespace,
    Namespace,
    NamespaceExists,
    NamespaceInUse,
    Namespaces,
    UnknownNamespace,
    parse_namespace,
)
from faashound.functions.secrets import SecretInUse
from tests.functions.conftest import Log
from tests.functions.kit import run
from tests.functions.test_deployments import controlled, shell

BLUE: dict[str, Any] = {"name": "blue", "labels": {"team": "a"}, "annotations": {"openfaas": "1"}}


def test_namespace_is_there_after_a_restart_and_functions_in_it_too(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            with pytest.raises(BadDeployment, match="namespace: there is no blue; allowed: openfaas-fn"):
                await control.create(shell(namespace="blue"))
            with pytest.raises(UnknownNamespace):
                await control.create_secret({"name": "s", "value": "v", "namespace": "blue"})
            await control.create_namespace(BLUE)
            await control.create(shell(namespace="blue"))
        async with controlled(tmp_path) as (control, local):
            assert control.namespace_names() == ["openfaas-fn", "blue"]
            assert control.find_namespace("blue").describe() == BLUE
            assert list(local.table) == ["f.blue"]

    run(test())


def test_namespace_is_removed_only_when_it_is_empty(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create_namespace(BLUE)
            with pytest.raises(NamespaceExists):
                await control.create_namespace(BLUE)
            await control.create(shell(namespace="blue"))
            await control.create_secret({"name": "s", "value": "v"}, "blue")
            with pytest.raises(NamespaceInUse, match="blue is not empty: the function f, the secret s"):
                await control.delete_namespace({}, "blue")
            await control.remove({"functionName": "f"}, "blue")
            await control.delete_secret({"name": "s"}, "blue")
            await control.delete_namespace({}, "blue")
            with pytest.raises(UnknownNamespace):
                await control.delete_namespace({}, "blue")
            with pytest.raises(UnknownNamespace):
                await control.update_namespace(BLUE)
        async with controlled(tmp_path) as (control, _):
            assert control.namespace_names() == ["openfaas-fn"]

    run(test())


def test_disabled_function_holds_its_namespace_and_its_secrets(tmp_path: Path) -> None:
    program = tmp_path / "program"

    def provide() -> None:
        program.write_text("#!/bin/sh\necho here")
        program.chmod(0o755)

    async def test() -> None:
        provide()
        async with controlled(tmp_path) as (control, _):
            await control.create_namespace(BLUE)
            for name in ("read", "token"):
                await control.create_secret({"name": name, "value": "v"}, "blue")
            annotations = {"com.faashound.auth": "token"}
            given = shell(namespace="blue", envProcess=str(program), secrets=["read"], annotations=annotations)
            await control.create(given)
        program.unlink()
        async with controlled(tmp_path) as (control, local):
            assert not local.table
            for name in ("read", "token"):
                with pytest.raises(SecretInUse, match=f"{name} is in use by f.blue"):
                    await control.delete_secret({"name": name}, "blue")
            with pytest.raises(NamespaceInUse, match="blue is not empty: the function f, the secret read"):
                await control.delete_namespace({}, "blue")
        provide()
        async with controlled(tmp_path) as (control, local):
            assert list(local.table) == ["f.blue"]

    run(test())


def test_function_that_the_file_hides_holds_its_secrets(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create_secret({"name": "s", "value": "v"})
            await control.create(shell(secrets=["s"]))
            (tmp_path / "functions.toml").write_text('[f]\nfprocess = "cat"\n')
            assert await control.reload()
            with pytest.raises(SecretInUse, match=r"s is in use by f$"):
                await control.delete_secret({"name": "s"})

    run(test())


def test_namespace_that_a_declared_function_has_brought_stays_for_those_deployed_there(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path, '["f.blue"]\nfprocess = "cat"\n') as (control, _):
            await control.create(shell(service="g", namespace="blue"))
        async with controlled(tmp_path) as (control, local):
            assert list(local.table) == ["g.blue"]
            await control.remove({"functionName": "g", "namespace": "blue"})
            await control.delete_namespace({}, "blue")

    run(test())


def test_namespace_of_a_declared_function_is_there_and_its_notes_can_be_changed(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path, '["f.blue"]\nfprocess = "cat"\n') as (control, _):
            assert control.find_namespace("blue") == Namespace("blue")
            await control.update_namespace(BLUE)
            assert control.find_namespace("blue").describe() == BLUE
            with pytest.raises(NamespaceInUse, match="the function f"):
                await control.delete_namespace({}, "blue")
            with pytest.raises(NamespaceInUse, match="openfaas-fn is always there"):
                await control.delete_namespace({}, "openfaas-fn")

    run(test())


def test_no_namespace_is_made_where_nothing_is_deployed() -> None:
    async def test() -> None:
        async with controlled(None) as (control, _):
            assert control.namespace_names() == ["openfaas-fn"]
            with pytest.raises(DeployOff):
                await control.create_namespace(BLUE)

    run(test())


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 9000, b"\xff", b'{"name": "green"}', b'{"labels": 1}'])
def test_namespace_with_a_damaged_file_is_there_without_notes(tmp_path: Path, log: Log, content: bytes) -> None:
    (tmp_path / "blue").write_bytes(content)
    assert Namespaces(Documents(tmp_path)).find("blue") == Namespace("blue")
    assert ("what was noted of the namespace blue is lost" in log) is (content != b"[]")


def test_every_problem_of_a_namespace_is_told() -> None:
    with pytest.raises(BadNamespace) as caught:
        parse_namespace({"name": "No", "labels": [], "annotations": {"a": 1}})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["name", "labels", "annotations"]
    with pytest.raises(BadNamespace, match="name: 'green': allowed: 'blue', as in the path, or none"):
        parse_namespace({"name": "green"}, "blue")


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text())), st.text())
def test_whatever_a_client_sends_is_a_namespace_or_a_problem(document: dict[str, Any], name: str) -> None:
    try:
        namespace = parse_namespace(document, name)
    except BadNamespace:
        return
    assert Namespace(**namespace.describe()) == namespace  # type: ignore[arg-type]
