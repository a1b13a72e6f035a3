"""/system as clients of OpenFaaS' gateway ask it: each test is an exchange of faas-cli, its SDK or the certifier."""

from __future__ import annotations

import json
import platform
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from faashound.serving.control_plane import NOT_OFFERED
from faashound.serving.invocation_counts import InvocationCounts, load_counts
from faashound.serving.metrics import GatewayMetrics
from faashound.watchdog import VERSION, Scoreboard, Slot
from testkit.harness import wait_until
from testkit.system import Receiver, System

FUNCTIONS = """
[cat]
fprocess = "cat"
environment = { TOKEN = "hidden" }
annotations = { topic = "orders" }
labels = { team = "blue" }

[far]
url = "{}"

["resize.prod"]
fprocess = "sh -c 'sleep 60'"
"""
NOT_LOGGED_IN = {"Authorization": "Bearer "}  # what faas-cli sends without a login


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with Receiver() as receiver, System(FUNCTIONS.replace("{}", receiver.url()), {"worker": "none"}) as system:
        wait_until(lambda: system.request("POST", "/function/cat").status == 200, 10, "cat answers")
        yield system


def ask(system: System, path: str, status: int = 200) -> Any:
    answer = system.request("GET", path, headers=NOT_LOGGED_IN)
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    return json.loads(answer.body)


def test_client_learns_version_and_provider(system: System) -> None:
    info = ask(system, "/system/info")
    sha = info["version"]["sha"]
    assert re.fullmatch("[0-9a-f]{40}", sha)
    assert info == {
        "provider": {
            "provider": "faashound",
            "orchestration": "processes",
            "version": {"release": VERSION, "sha": sha},
        },
        "version": {"release": VERSION, "sha": sha, "commit_message": ""},
        "arch": platform.machine(),
    }


def test_client_lists_the_functions_of_the_default_namespace(system: System) -> None:
    cat, far = ask(system, "/system/functions")
    count = cat.pop("invocationCount")
    assert isinstance(count, int)
    assert cat == {
        "name": "cat",
        "namespace": "openfaas-fn",
        "image": "process",
        "envProcess": "cat",
        "labels": {"faas_function": "cat", "team": "blue"},
        "annotations": {"topic": "orders"},
        "replicas": 1,
        "availableReplicas": 1,
        "local": True,
    }
    assert (far["name"], far["image"], far["envProcess"], far["annotations"]) == ("far", "remote", "", {})
    assert (far["replicas"], far["availableReplicas"]) == (1, 1), "it serves, wherever it is"


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["cat", "far"]),
        ("?namespace=", ["cat", "far"]),
        ("?namespace=openfaas-fn", ["cat", "far"]),
        ("?namespace=prod", ["resize"]),
        ("?namespace=dev", []),
        ("?namespace=*", ["cat", "far", "resize"]),
    ],
)
def test_client_lists_the_functions_of_a_namespace(system: System, query: str, names: list[str]) -> None:
    assert [function["name"] for function in ask(system, f"/system/functions{query}")] == names


@pytest.mark.parametrize("path", ["resize.prod", "resize?namespace=prod", "resize.prod?namespace=openfaas-fn"])
def test_client_describes_a_function_of_a_namespace(system: System, path: str) -> None:
    found = ask(system, f"/system/function/{path}")
    assert (found["name"], found["namespace"]) == ("resize", "prod")


@pytest.mark.parametrize("path", ["nobody", "resize", "cat?namespace=prod", "cat.prod", "a/b"])
def test_client_gets_404_for_a_function_that_is_not_there(system: System, path: str) -> None:
    answer = system.request("GET", f"/system/function/{path}", headers=NOT_LOGGED_IN)
    assert answer.status == 404
    assert "x-openfaas-internal" not in answer.headers


def test_client_is_told_what_a_function_takes_when_it_asks_for_usage(system: System) -> None:
    assert "usage" not in ask(system, "/system/function/cat")
    usage = ask(system, "/system/function/cat?namespace=openfaas-fn&usage=1")["usage"]
    assert 1 << 20 < usage["totalMemoryBytes"] < 1 << 30
    assert 0 <= usage["cpu"] <= 1000 * 64
    assert "usage" not in ask(system, "/system/function/far?usage=1"), "of other machines nothing is known"


def test_client_lists_namespaces(system: System) -> None:
    assert ask(system, "/system/namespaces") == ["openfaas-fn", "prod"]
    assert ask(system, "/system/namespace/prod") == {"name": "prod", "labels": {}, "annotations": {}}
    assert system.request("GET", "/system/namespace/dev").status == 404


def test_namespaces_of_function_url_are_listed() -> None:
    settings = {"function_url": "http://127.0.0.1:1/{namespace}/{name}", "namespaces": "dev", "worker": "none"}
    with System(settings=settings) as system:
        assert ask(system, "/system/namespaces") == ["openfaas-fn", "dev"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, "/system/functions") for method in ("POST", "PUT", "DELETE")),
        *((method, "/system/namespace/dev") for method in ("PUT", "DELETE")),
        ("POST", "/system/namespace/"),
        *(("GET", f"/system/{area}") for area in NOT_OFFERED),
        ("POST", "/system/scale-function/cat"),
        ("POST", "/system/alert"),
        ("POST", "/oauth/token"),
    ],
)
def test_client_is_told_in_a_sentence_what_is_not_offered(system: System, method: str, path: str) -> None:
    answer = system.request(method, path, b"{}", NOT_LOGGED_IN | {"Content-Type": "application/json"})
    assert answer.status == 501
    assert len(answer.text.split()) > 4


@pytest.mark.parametrize("path", ["info", "functions", "function/cat", "namespaces", "namespace/openfaas-fn"])
def test_client_that_patches_what_can_be_read_gets_405(system: System, path: str) -> None:
    assert system.request("PATCH", f"/system/{path}").status == 405


def invocations(system: System, name: str) -> int:
    found: int = ask(system, f"/system/function/{name}")["invocationCount"]
    return found


def test_invocations_are_counted_in_all_processes_and_over_restarts(tmp_path: Path) -> None:
    settings = {"worker": "none", "state": str(tmp_path / "state"), "workers": "2"}
    for lives_count in (1, 2):
        with System(settings=settings) as system:
            wait_until(lambda: system.request("POST", "/function/cat").status == 200, 10, "cat answers")
            before = invocations(system, "cat")
            for _ in range(5):
                system.request("POST", "/function/cat")
            wait_until(partial(lambda count: invocations(system, "cat") == count + 5, before), 5, "five more")
            assert before + 5 >= 6 * lives_count
            assert invocations(system, "env") == 0
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["invocations.json"]


def test_invocations_that_were_saved_survive_a_kill(tmp_path: Path) -> None:
    path, metrics = tmp_path / "state" / "invocations.json", GatewayMetrics(Slot(Scoreboard()))
    metrics.end("cat.openfaas-fn", 200, 0.1)
    InvocationCounts(path, {"cat.openfaas-fn": 2, "gone.openfaas-fn": 7}, metrics).save(["cat.openfaas-fn"])
    assert load_counts(path) == {"cat.openfaas-fn": 3}, "a function that is no more has no count"


@pytest.mark.parametrize("text", [b"", b"[]", b'{"cat": "many"}', b"\xff"])
def test_gateway_starts_beside_a_damaged_file_of_counts(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "invocations.json"
    path.write_bytes(text)
    assert load_counts(path) == {}


def test_gateway_serves_where_no_counts_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with System(settings={"worker": "none", "state": str(tmp_path / "file" / "state")}) as system:
        wait_until(lambda: system.request("POST", "/function/cat").status == 200, 10, "cat answers")
        system.process.send_signal(signal.SIGTERM)
        assert system.process.wait(10) == 0
        system.wait_log("counts of invocations will not survive a restart")
