"""/system as clients of OpenFaaS' gateway ask it: each test is an exchange of faas-cli, its SDK or the certifier."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import platform
import re
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from faashound.functions.logs import LogStore
from faashound.functions.runtime import PREFIX
from faashound.functions.secrets import MAX_SECRET_BYTES
from faashound.functions.table import Functions, parse_functions
from faashound.serving.control_plane import NOT_OFFERED
from faashound.serving.followers import Followers
from faashound.serving.function_logs import FunctionLogs
from faashound.serving.invocation_counts import InvocationCounts, load_counts
from faashound.serving.metrics import GatewayMetrics
from faashound.watchdog import VERSION, Body, Request, Scoreboard, Slot, Stream
from testkit.harness import SOON_S, Answer, command_line_of, connect, eventually, read_all, read_until, run, wait_until
from testkit.system import Receiver, System
from tests.gateway.test_drain import connection_beside, two_processes

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
secrets = ["token"]
"""
JSON_FIELD = "Content-Type: application/json"
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
    assert (found["name"], found["namespace"], found["secrets"]) == ("resize", "prod", ["token"])


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
    cat, far = ask(system, "/system/functions?usage=1")
    assert 1 << 20 < cat["usage"]["totalMemoryBytes"] < 1 << 30
    assert "usage" not in far
    assert not any("usage" in each for each in ask(system, "/system/functions"))


def test_memory_that_is_shared_with_others_is_not_told_as_the_functions_own(system: System) -> None:
    assert system.request("POST", "/function/cat").status == 200
    usage = ask(system, "/system/function/cat?usage=1")["usage"]
    resident_bytes = 0
    for pid in system.survivors():
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            process = psutil.Process(pid)
            resident_bytes += process.memory_info().rss if process.name() == "fw cat" else 0
    assert 0 < usage["totalMemoryBytes"] < 0.8 * resident_bytes


def test_client_lists_namespaces(system: System) -> None:
    assert ask(system, "/system/namespaces") == ["openfaas-fn", "prod"]
    assert ask(system, "/system/namespace/prod") == {"name": "prod", "labels": {}, "annotations": {}}
    assert system.request("GET", "/system/namespace/dev").status == 404


def test_namespaces_of_function_url_are_listed_and_their_functions_known() -> None:
    settings = {"function_url": "http://127.0.0.1:1/{namespace}/{name}", "namespaces": "dev", "worker": "none"}
    with System(settings=settings) as system:
        assert ask(system, "/system/namespaces") == ["openfaas-fn", "dev"]
        assert ask(system, "/system/function/f.dev")["name"] == "f"
        answer = system.request("GET", "/system/logs?name=f&namespace=dev")
        assert (answer.status, answer.body) == (200, b""), "it is there, and what it writes stays where it runs"
        assert system.request("GET", "/system/logs?name=f&namespace=other").status == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *((method, "/system/functions") for method in ("POST", "PUT", "DELETE")),
        *((method, "/system/secrets") for method in ("GET", "POST", "PUT", "DELETE")),
        *((method, "/system/namespace/dev") for method in ("PUT", "DELETE")),
        ("POST", "/system/namespace/"),
        *(("GET", f"/system/{area}") for area in NOT_OFFERED),
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
    assert "invocations.json" in [path.name for path in (tmp_path / "state").iterdir()]


def test_invocations_that_were_saved_survive_a_kill(tmp_path: Path) -> None:
    path, metrics = tmp_path / "invocations.json", GatewayMetrics(Slot(Scoreboard()))
    metrics.end("cat.openfaas-fn", 200, 0.1)
    InvocationCounts(path, {"cat.openfaas-fn": 2, "gone.openfaas-fn": 7}, metrics).save(["cat.openfaas-fn"])
    assert load_counts(path) == {"cat.openfaas-fn": 3}, "a function that is no more has no count"


@pytest.mark.parametrize("text", [b"", b"[]", b'{"cat": "many"}', b"\xff", b"[" * 9000, b'{"cat": 1e400}'])
def test_gateway_starts_beside_a_damaged_file_of_counts(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "invocations.json"
    path.write_bytes(text)
    assert load_counts(path) == {}


def test_gateway_serves_where_no_counts_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with System(settings={"worker": "none", "state": str(tmp_path / "file" / "state")}) as system:
        wait_until(lambda: system.request("POST", "/function/cat").status == 200, 10, "cat answers")
        system.wait_log("counts of invocations, and what is scheduled, will not survive a restart")


# What changes something: deploy=process.

PASSWORD = "open:sesame"


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two processes"])
def operated(request: pytest.FixtureRequest) -> Iterator[System]:
    """A gateway that functions are deployed to, in one process or in several."""
    settings = {"deploy": "process", "workers": request.param}
    with System('[declared]\nfprocess = "cat"', settings) as system:
        yield system


def send(system: System, method: str, path: str, document: object) -> Answer:
    headers = NOT_LOGGED_IN | {"Content-Type": "application/json"}
    return system.request(method, path, json.dumps(document).encode(), headers)


def deployment(name: str, **more: object) -> dict[str, object]:
    return {
        "service": name,
        "image": "process:latest",
        "envProcess": "cat",
        "labels": None,
        "annotations": None,
        **more,
    }


def test_client_deploys_updates_and_removes_a_function(operated: System) -> None:
    document = deployment("echo", envVars={"GREETING": "hello"}, annotations={"topic": "a"})
    assert send(operated, "PUT", "/system/functions", document).status == 404, "what faas-cli tries first"
    assert send(operated, "POST", "/system/functions", document).status == 202
    assert operated.request("POST", "/function/echo.openfaas-fn", b"x").text == "x", "a call works at once"
    assert send(operated, "POST", "/system/functions", document).status == 409
    found = ask(operated, "/system/function/echo?namespace=openfaas-fn")
    assert (found["image"], found["envProcess"], found["envVars"]) == ("process:latest", "cat", {"GREETING": "hello"})
    assert (found["labels"], found["annotations"]) == ({"faas_function": "echo"}, {"topic": "a"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["createdAt"])
    assert "limits" not in found
    assert send(operated, "PUT", "/system/functions", deployment("echo", envProcess="tr a-z A-Z")).status == 200
    assert operated.request("POST", "/function/echo", b"x").text == "X"
    assert operated.ended(operated.submit("echo", b"later"))["state"] == "done"
    assert send(operated, "DELETE", "/system/functions", {"functionName": "echo"}).status == 202
    assert operated.request("POST", "/function/echo", b"x").status == 404
    assert send(operated, "DELETE", "/system/functions", {"functionName": "echo"}).status == 404
    assert "no name from 127.0.0.1" in operated.wait_log("Done: deploy function 'echo'")


def test_client_is_told_every_problem_of_a_deployment_and_the_old_one_serves(operated: System) -> None:
    assert send(operated, "POST", "/system/functions", deployment("old")).status == 202
    bad = deployment("old", image="docker.io/library/nginx", envVars={"exec_timeout": "banana"}, secrets=["absent"])
    answer = send(operated, "PUT", "/system/functions", bad)
    assert answer.status == 400
    for word in ("image", "exec_timeout", "absent"):
        assert word in answer.text
    assert operated.request("POST", "/function/old", b"x").text == "x"
    operated.wait_log("Refused to update function 'old'")


def test_limits_that_are_ignored_are_told_of() -> None:
    with System("", {"deploy": "process", "limits": "ignore", "worker": "none"}) as system:
        assert send(system, "POST", "/system/functions", deployment("free")).status == 202
        limits = {"memory": "10Mi"}
        assert send(system, "POST", "/system/functions", deployment("limited", limits=limits)).status == 202
        system.wait_log("warning: limited has limits that are not kept (limits=ignore)")
        assert "free has limits" not in system.log()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_client_cannot_change_what_the_functions_file_declares(operated: System, method: str) -> None:
    document = {**deployment("declared"), "functionName": "declared"}
    answer = send(operated, method, "/system/functions", document)
    assert (answer.status, "declared" in answer.text) == (409, True)


WHOLE = b'{"service": "x", "name": "x", "image": "process", "envProcess": "cat", "value": "x", "replicas": 1, %b}'
NO_JSON = [b'"a": NaN', b'"a": 1e999', b'"annotations": {"\\ud800": ""}', b'"a": "\xed\xa0\x80"']  # but for Python


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"1", b"[" * 100_000, b'{"service": 1}', *(WHOLE % member for member in NO_JSON)],
)
@pytest.mark.parametrize("path", ["functions", "secrets", "scale-function/declared"])
def test_client_that_sends_no_such_document_gets_400(operated: System, path: str, body: bytes) -> None:
    answer = operated.request("POST", f"/system/{path}", body, {"Content-Type": "application/json"})
    assert answer.status == 400


def test_client_that_sends_too_much_gets_413(operated: System) -> None:
    assert send(operated, "POST", "/system/functions", deployment("big", padding="x" * (2 << 20))).status == 413


def test_client_scales_a_function(operated: System) -> None:
    def replicas() -> tuple[int, int]:
        found = ask(operated, "/system/function/declared")
        return found["replicas"], found["availableReplicas"]

    path = "/system/scale-function/declared"
    assert send(operated, "POST", path, {"serviceName": "declared", "replicas": 2}).status == 202
    wait_until(lambda: replicas() == (2, 2), 10, "two replicas")
    assert send(operated, "POST", path, {"serviceName": "declared", "replicas": 0}).status == 202
    wait_until(lambda: replicas()[0] == 0, 10, "no replica")
    assert operated.request("POST", "/function/declared", b"x").text == "x", "a call wakes it"
    for count in (-1, 21, 1.5, "2", None):
        assert send(operated, "POST", path, {"serviceName": "declared", "replicas": count}).status == 400
    assert send(operated, "POST", "/system/scale-function/nobody", {"replicas": 1}).status == 404


def test_client_creates_updates_and_deletes_a_secret(operated: System) -> None:
    secret = {"name": "token", "namespace": "openfaas-fn", "value": "tell-nobody"}
    assert send(operated, "POST", "/system/secrets", secret).status == 201
    assert send(operated, "POST", "/system/secrets", secret).status == 409
    assert ask(operated, "/system/secrets?namespace=openfaas-fn") == [{"name": "token", "namespace": "openfaas-fn"}]
    reader = deployment("reader", envProcess='sh -c "cat $secret_mount_path/token"', secrets=["token"])
    assert send(operated, "POST", "/system/functions", reader).status == 202
    assert operated.request("POST", "/function/reader").text == "tell-nobody"
    assert send(operated, "PUT", "/system/secrets", {**secret, "value": "tell-no-one"}).status == 200
    assert operated.request("POST", "/function/reader").text == "tell-no-one"
    assert send(operated, "DELETE", "/system/secrets", secret).status == 409
    assert send(operated, "DELETE", "/system/functions", {"functionName": "reader"}).status == 202
    assert send(operated, "DELETE", "/system/secrets", secret).status == 202
    assert send(operated, "DELETE", "/system/secrets", secret).status == 404
    assert "tell-no" not in operated.log()


def test_client_creates_a_secret_from_the_longest_file_whatever_is_in_it(operated: System) -> None:
    content = b"\xff" * MAX_SECRET_BYTES
    text = content.decode("utf-8", "replace")  # as faas-cli sends it, besides
    secret = {"name": "file", "value": text, "rawValue": base64.b64encode(content).decode()}
    assert send(operated, "POST", "/system/secrets", secret).status == 201
    secret["rawValue"] = base64.b64encode(content + b"\xff").decode()
    answer = send(operated, "PUT", "/system/secrets", secret)
    assert (answer.status, "1048577 bytes" in answer.text) == (400, True)
    assert send(operated, "DELETE", "/system/secrets", {"name": "file"}).status == 202


def test_client_creates_updates_and_removes_a_namespace(operated: System) -> None:
    created = {"name": "blue", "labels": {"a": "b", "openfaas": "1"}, "annotations": {"openfaas": "1"}}
    assert send(operated, "POST", "/system/namespace/", created).status == 201
    assert send(operated, "POST", "/system/namespace/blue", created).status == 409
    assert ask(operated, "/system/namespaces") == ["openfaas-fn", "blue"]
    assert ask(operated, "/system/namespace/blue") == created
    changed = {**created, "labels": {"c": "d", "openfaas": "1"}}
    assert send(operated, "PUT", "/system/namespace/blue", changed).status == 202
    assert ask(operated, "/system/namespace/blue") == changed
    assert send(operated, "POST", "/system/functions", deployment("echo", namespace="blue")).status == 202
    assert operated.request("POST", "/function/echo.blue", b"x").text == "x"
    removed = {"name": "blue", "labels": {"openfaas": "1"}}
    answer = send(operated, "DELETE", "/system/namespace/blue", removed)
    assert (answer.status, answer.text.strip()) == (409, "blue is not empty: the function echo")
    assert send(operated, "DELETE", "/system/functions?namespace=blue", {"functionName": "echo"}).status == 202
    assert send(operated, "DELETE", "/system/namespace/blue", removed).status == 202
    assert send(operated, "DELETE", "/system/namespace/blue", removed).status == 404
    assert send(operated, "PUT", "/system/namespace/blue", changed).status == 404
    assert operated.request("GET", "/system/namespace/blue").status == 404
    operated.wait_log("Done: delete namespace 'blue'")


def test_function_that_names_a_new_queue_has_it_drained(operated: System) -> None:
    queue = {"com.openfaas.queue": f"later-{operated.port}"}
    assert send(operated, "POST", "/system/functions", deployment("queued", annotations=queue)).status == 202
    assert operated.ended(operated.submit("queued"), 20)["state"] == "done"


def test_schedules_are_listed(operated: System) -> None:
    annotations = {"topic": "cron-function", "schedule": "0 3 * * *"}
    assert send(operated, "POST", "/system/functions", deployment("nightly", annotations=annotations)).status == 202
    (row,) = ask(operated, "/system/schedules")
    assert (row["function"], row["namespace"], row["schedule"]) == ("nightly", "openfaas-fn", "0 3 * * *")
    assert row["next"].endswith(":00:00Z")


def test_browsers_page_deploys_nothing(operated: System) -> None:
    body = json.dumps(deployment("evil")).encode()
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        headers = headers | {"Content-Type": "application/json"}
        assert operated.request("POST", "/system/functions", body, headers).status == 403
    assert operated.request("POST", "/system/functions", body, {"Content-Type": "text/plain"}).status == 415
    assert operated.request("POST", "/function/evil").status == 404


def test_deployed_function_is_there_after_a_restart_and_its_password_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "basic-auth-user").write_text("open")
    (tmp_path / "basic-auth-password").write_text("sesame")
    settings = {
        "deploy": "process",
        "state": str(tmp_path / "state"),
        "basic_auth": "true",
        "secret_mount_path": str(tmp_path),
        "worker": "none",
    }
    login = {"Authorization": "Basic " + base64.b64encode(PASSWORD.encode()).decode()}
    with System("", settings) as system:
        body, json_type = json.dumps(deployment("kept")).encode(), {"Content-Type": "application/json"}
        assert system.request("POST", "/system/functions", body, json_type).status == 401
        assert system.request("POST", "/system/functions", body, login | json_type).status == 202
        assert "open from 127.0.0.1" in system.wait_log("Done: deploy function 'kept'")
        assert "sesame" not in system.log()
    with System("", settings) as system:
        assert system.request("POST", "/function/kept", b"x").text == "x"


def test_deployed_function_answers_when_the_process_that_runs_the_functions_is_killed(tmp_path: Path) -> None:
    settings = {"deploy": "process", "workers": "2", "state": str(tmp_path / "state"), "worker": "none"}
    with System("", settings) as system:
        assert send(system, "POST", "/system/functions", deployment("late")).status == 202
        ending = {  # and what it forked
            pid for pid in system.survivors() if b"faashound.functions.forkserver" in command_line_of(pid)
        }
        (runner,) = {psutil.Process(pid).ppid() for pid in ending} - ending - {system.process.pid}
        Path(system.environment["functions"]).write_text("what nobody can read")
        os.kill(runner, signal.SIGKILL)
        wait_until(lambda: not ending.intersection(system.survivors()), 10, "what it ran is gone")
        answers = [system.request("POST", "/function/late", b"x") for _ in range(20)]
        assert {(answer.status, answer.text) for answer in answers} == {(200, "x")}
        wait_until(lambda: system.request("GET", "/system/functions").status == 200, 20, "its successor")
        assert [found["name"] for found in ask(system, "/system/functions")] == ["late"]


def test_change_that_fails_for_a_reason_of_ours_is_told_with_who_asked_for_it() -> None:
    with System(settings={"deploy": "process", "worker": "none"}) as system:
        (runtime,) = system.temporary.glob(f"{PREFIX}*")
        in_the_way = runtime / "table.new"
        in_the_way.mkdir()
        assert send(system, "POST", "/system/functions", deployment("new")).status == 500
        told = system.wait_log("Failed to deploy function 'new'")
        assert re.search(r"asker=.*127\.0\.0\.1", told)
        assert "table.new" in told
        in_the_way.rmdir()


def test_gateway_that_others_reach_does_not_start_with_deploy_and_without_a_password() -> None:
    ended = run("gateway", settings={"deploy": "process", "host": "0.0.0.0", "port": "0", "metrics_port": "0"})
    assert ended.returncode == 1
    assert "basic_auth=true" in ended.stderr


def test_client_reads_and_follows_the_lines_of_a_function(operated: System) -> None:
    assert operated.request("POST", "/function/declared", b"x").status == 200

    def lines(query: str = "") -> list[dict[str, str]]:
        answer = operated.request("GET", f"/system/logs?name=declared&namespace=openfaas-fn{query}")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
        return [json.loads(line) for line in answer.body.splitlines()]

    wait_until(lambda: any(line["text"].startswith("Wrote 1 Bytes") for line in lines()), 10, "the call is told")
    line = next(line for line in lines() if line["text"] == "Forking fprocess.")
    assert set(line) == {"name", "namespace", "instance", "timestamp", "text"}
    assert (line["name"], line["namespace"]) == ("declared", "openfaas-fn")
    assert len(lines("&tail=1")) == 1
    assert lines("&since=2999-01-01T00:00:00%2B02:00") == []
    assert operated.request("GET", "/system/logs?name=nobody").status == 404
    answer = operated.request("GET", "/system/logs?name=Bad&tail=many")
    assert answer.status == 422
    assert [line.partition(":")[0] for line in answer.text.splitlines()] == ["name", "tail"]
    assert operated.request("GET", "/system/logs").status == 422
    with connect(operated.port) as client:
        client.sendall(b"GET /system/logs?name=declared&tail=1&follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(client, b"}\n\r\n")  # the newest one, as a chunk
        operated.request("POST", "/function/declared", b"followed")
        received = b""
        while b'"Wrote 8 Bytes' not in received:
            piece = client.recv(65536)
            assert piece, received
            received += piece


def test_client_that_is_cut_while_it_waits_for_lines_leaves_nothing_that_looks_for_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        before = asyncio.all_tasks()
        store, functions = LogStore(tmp_path, 1 << 20), Functions(parse_functions('[f]\nfprocess = "cat"', "f.toml"))
        logs, query = FunctionLogs(store, functions, Followers("lines", "", 60.0)), b"name=f&follow=1"
        request = Request("GET", b"/system/logs", b"/system/logs", query, b"localhost", (), Body(0, lambda: None))
        body = cast(Stream, (await logs.answer(request)).body)

        async def wait_for_a_line() -> None:
            await anext(aiter(body))

        async def waits() -> bool:
            return len(asyncio.all_tasks() - before) == 3  # it, what looks for lines, and what waits for a drain

        async def nothing_is_left() -> bool:
            return asyncio.all_tasks() == before

        waiting = asyncio.create_task(wait_for_a_line())
        await eventually(waits, SOON_S, "it waits")
        waiting.cancel()
        await asyncio.wait((waiting,))
        assert waiting.cancelled(), waiting.exception()
        await body.aclose()
        await eventually(nothing_is_left, SOON_S, "no task is left")

    asyncio.run(scenario())


def test_client_that_follows_is_let_go_when_the_gateway_stops() -> None:
    with System(settings={"worker": "none"}) as system, connect(system.port) as client:
        client.sendall(b"GET /system/logs?name=cat&follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(client, b"\r\n\r\n")
        system.process.send_signal(signal.SIGTERM)
        assert system.wait_exit() == 0


def test_slow_sender_has_the_read_timeout_whichever_process_it_has_come_to() -> None:
    body = b'{"replicas": 1}'
    head = "POST /system/scale-function/cat HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", JSON_FIELD
    with two_processes() as (system, first), ExitStack() as stack:
        client = connection_beside(system, first, stack)
        client.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode() + body[:5])
        end_s = time.monotonic() + 11
        wait_until(lambda: time.monotonic() > end_s, 30, "longer than the processes let each other wait once")
        client.sendall(body[5:])
        assert read_all(client).startswith(b"HTTP/1.1 202 ")


def test_functions_file_is_followed_at_sighup_and_when_it_changes(tmp_path: Path) -> None:
    with System('[one]\nfprocess = "cat"', {"worker": "none", "workers": "2"}) as system:
        path = Path(system.environment["functions"])
        path.write_text('[two]\nfprocess = "cat"')
        system.process.send_signal(signal.SIGHUP)
        wait_until(lambda: system.request("POST", "/function/two", b"x").text == "x", 10, "the new function is there")
        wait_until(lambda: system.request("POST", "/function/one", b"x").status == 404, 10, "the old one is gone")
        path.write_text("[three]\nfprocess = 1\nurl = 2")
        system.wait_log("the functions file is not applied")
        assert system.request("POST", "/function/two", b"x").text == "x"
