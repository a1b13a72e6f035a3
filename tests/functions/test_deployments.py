"""Functions that are deployed: what is taken and what is refused, and what is there after a crash at any instant."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.names import parse_function_name
from faashound.functions.control import Control, DeployOff, FunctionExists
from faashound.functions.deployments import BadDeployment, Deployments, Rules, find_image, parse_deployment
from faashound.functions.documents import Documents, hold_state
from faashound.functions.local import LocalFunctions, UnknownFunction
from faashound.functions.table import Image
from faashound.watchdog import CannotStart
from tests.functions.conftest import Log
from tests.functions.kit import F, call, exists, few_descriptors, parse, real, run, running, until

RULES = Rules(images={"functions/alpine": Image()})
LONGEST_BYTES = 131072  # of a word or variable, its end included (execve(2))
SHELL: Mapping[str, Any] = {"service": "f", "image": "process", "envProcess": "/bin/sh"}


def function_of(document: Mapping[str, Any], rules: Rules = RULES) -> Any:
    return parse_deployment(document, rules, 1_700_000_000.0).function


@pytest.mark.parametrize(
    "image",
    ["process", "process:latest", "functions/alpine", "docker.io/functions/alpine:latest", "functions/alpine:3"],
)
def test_image_that_means_a_program_is_taken(image: str) -> None:
    assert function_of({**SHELL, "image": image}).settings["fprocess"] == "/bin/sh"


@pytest.mark.parametrize("image", ["alpine", "evil/process", "host:5000/process2", "process@sha256:00", ""])
def test_image_that_means_none_is_refused(image: str) -> None:
    with pytest.raises(BadDeployment, match="image: "):
        function_of({**SHELL, "image": image})


def test_image_may_be_a_directory_to_run_in(tmp_path: Path) -> None:
    program = tmp_path / "handler"
    program.write_text("#!/bin/sh\npwd\n")
    program.chmod(0o755)
    rules = Rules(images={"theaxer/redirector": Image(str(tmp_path))})
    function = function_of({**SHELL, "image": "theaxer/redirector:latest", "envProcess": "./handler"}, rules)
    assert function.directory == str(tmp_path)
    assert find_image("docker.io/theaxer/redirector", rules.images) == Image(str(tmp_path))

    async def test() -> None:
        async with running(LocalFunctions({}, environ={"PATH": "/usr/bin:/bin"})) as local:
            await local.put(function)
            assert (await call(local, "f")).body.decode() == f"{tmp_path}\n"

    run(test())


def test_image_brings_a_command_settings_and_variables_along_and_the_deployment_wins() -> None:
    image = Image(None, {"function_process": "cat", "exec_timeout": "3s", "max_inflight": "1"}, {"A": "1", "B": "1"})
    rules = Rules(images={"shop/cart": image})
    document = {"service": "f", "image": "shop/cart:latest", "envVars": {"exec_timeout": "9s", "B": "2"}}
    function = function_of(document, rules)
    assert function.settings == {"fprocess": "cat", "exec_timeout": "9s", "max_inflight": "1"}
    assert function.environment == {"A": "1", "B": "2"}
    assert function_of({**document, "envProcess": "tac"}, rules).settings["fprocess"] == "tac"


def test_variables_are_divided_between_watchdog_and_program() -> None:
    function = function_of({**SHELL, "envVars": {"exec_timeout": "3s", "GREETING": "hello"}})
    assert function.settings == {"fprocess": "/bin/sh", "exec_timeout": "3s"}
    assert function.environment == {"GREETING": "hello"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"service": "Bad"}, "service: 'Bad' is no function's name; allowed: 1 to 63"),
        ({"service": None}, "service: it is missing"),
        ({"service": 1}, "service: 1 is no function's name"),
        ({"service": "a.b"}, "service: 'a.b' is no function's name"),
        ({"namespace": 7}, "namespace: 7: allowed: 1 to 63"),
        ({"namespace": "No"}, "namespace: 'No': allowed: 1 to 63"),
        ({"namespace": "other"}, "namespace: there is no other; allowed: openfaas-fn"),
        ({"envProcess": ""}, "envProcess: missing"),
        ({"envProcess": '"'}, "envProcess: no closing quotation"),
        ({"envProcess": "/no/such/program"}, "envProcess: there is no program '/no/such/program' here"),
        ({"envVars": {"exec_timeout": "banana"}}, "envVars: exec_timeout='banana': allowed: "),
        ({"envVars": {"port": "80"}}, "envVars: port: not allowed here: the gateway opens the socket"),
        ({"envVars": {"fprocess": "cat"}}, "envVars: fprocess: not allowed here; envProcess says"),
        ({"envVars": {"LISTEN_FDS": "1"}}, "envVars: LISTEN_FDS: reserved"),
        ({"envVars": {"A=B": "1"}}, "envVars: 'A=B': not a variable's name"),
        ({"envVars": {"A": 1}}, "envVars: allowed: an object whose values are strings"),
        ({"labels": {"com.openfaas.scale.min": "x"}}, "labels: com.openfaas.scale.min: 'x': allowed: "),
        ({"annotations": {"com.openfaas.retry.attempts": "x"}}, "annotations: com.openfaas.retry.attempts: "),
        ({"annotations": {"com.openfaas.queue": "no queue"}}, "annotations: com.openfaas.queue: "),
        ({"annotations": {"topic": "cron-function", "schedule": "61 * * * *"}}, "annotations: schedule: "),
        ({"secrets": ["none"]}, "secrets: there is no 'none' in openfaas-fn"),
        ({"envVars": {"BIG": "x" * LONGEST_BYTES}}, "envVars: 'BIG': allowed: less than 131072 bytes"),
        ({"envProcess": f"cat {'x' * LONGEST_BYTES}"}, "envProcess: allowed: a command line whose words are each"),
        ({"limits": "10Mi"}, "limits: allowed: an object whose values are strings"),
        ({"limits": {"memory": 10}}, "limits: allowed: an object whose values are strings"),
        ({"requests": "10Mi"}, "requests: allowed: an object whose values are strings"),
        ({"requests": {"cpu": 1}}, "requests: allowed: an object whose values are strings"),
        ({"constraints": 5}, "constraints: allowed: an array of strings"),
        ({"constraints": [5]}, "constraints: allowed: an array of strings"),
        ({"limits": {"memory": "10Mi"}}, "limits: this gateway limits no function"),
        ({"readOnlyRootFilesystem": True}, "readOnlyRootFilesystem: not kept"),
    ],
)
def test_problem_names_field_and_what_is_allowed(change: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(BadDeployment) as caught:
        function_of({**SHELL, **change})
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(BadDeployment) as caught:
        function_of({"service": "-", "image": "x", "labels": 1, "limits": {"cpu": "1"}})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "service",
        "image",
        "labels",
        "envProcess",
        "limits",
    ]


def test_limits_that_are_ignored_are_objects_of_texts_nevertheless() -> None:
    rules = dataclasses.replace(RULES, ignores_limits=True)
    assert function_of({**SHELL, "limits": {"memory": "10Mi"}}, rules)
    with pytest.raises(BadDeployment, match="limits: allowed: an object"):
        function_of({**SHELL, "limits": [1]}, rules)


def test_name_and_namespace_are_told_apart() -> None:
    with pytest.raises(BadDeployment) as caught:
        function_of({**SHELL, "service": "No", "namespace": "No"})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["service", "namespace"]


def test_what_was_sent_is_told_back_and_what_was_not_is_left_out() -> None:
    sent = {**SHELL, "envVars": {}, "labels": None, "annotations": {"a": "b"}, "requests": {"cpu": "1"}}
    told = parse_deployment(sent, RULES, 1_700_000_000.0).describe()
    assert told == {
        "name": "f",
        "namespace": "openfaas-fn",
        "image": "process",
        "envProcess": "/bin/sh",
        "requests": {"cpu": "1"},
        "readOnlyRootFilesystem": False,
        "createdAt": "2023-11-14T22:13:20Z",
    }


# --- at work -----------------------------------------------------------------------------------------------------


def write_file(state: Path | None, text: str) -> Path:
    path = (state or Path("/nowhere")) / "functions.toml"
    if state is not None:
        path.write_text(text)
    return path


@asynccontextmanager
async def controlled(state: Path | None, file: str = "") -> AsyncIterator[tuple[Control, LocalFunctions]]:
    """Run a control plane over real watchdogs, with what `state` and the file have."""
    path = write_file(state, file)
    async with running(real(file)) as local:
        control = Control(local, path, state=state, rules=RULES, file_is_optional=True)
        try:
            await control.start()
            yield control, local
        finally:
            control.close()


def shell(**changes: Any) -> dict[str, Any]:
    return {**SHELL, **changes}


def test_deployed_function_is_called_at_once_and_is_there_after_a_restart(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            with pytest.raises(UnknownFunction):
                await control.update(shell())
            await control.create(shell(envVars={"V": "1"}))
            assert (await call(local, "f", b"echo $V")).body == b"1\n"
            with pytest.raises(FunctionExists):
                await control.create(shell())
        async with controlled(tmp_path) as (control, local):
            assert (await call(local, "f", b"echo $V")).body == b"1\n"
            await control.update(shell(envVars={"V": "2"}))
            assert (await call(local, "f", b"echo $V")).body == b"2\n"
            await control.remove({"functionName": "f"})
            assert F not in local.table
            with pytest.raises(UnknownFunction):
                await control.remove({"functionName": "f"})
        async with controlled(tmp_path) as (control, local):
            assert not local.table

    run(test())


def test_declared_function_is_changed_in_the_file_only(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path, '[f]\nfprocess = "/bin/sh"\n') as (control, _):
            for operation in (control.create(shell()), control.update(shell()), control.remove({"functionName": "f"})):
                with pytest.raises(FunctionExists, match="f is declared in"):
                    await operation

    run(test())


def test_schedule_that_has_no_topic_is_told(tmp_path: Path, log: Log) -> None:
    async def test() -> None:
        async with controlled(tmp_path, '[g]\nfprocess = "cat"\nschedule = "@hourly"\n') as (control, _):
            await control.create(shell(annotations={"schedule": "@hourly"}))
            await control.create(shell(service="h", annotations={"schedule": "@hourly", "topic": "orders"}))

    run(test())
    for name in "fg":
        assert f"warning: {name} has a schedule and no topic, so nothing calls it; allowed: cron-function" in log
    assert "h has a schedule" not in log


def test_file_wins_over_what_was_deployed_under_its_name(tmp_path: Path, log: Log) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create(shell(envVars={"V": "deployed"}))
        declared = '[f]\nfprocess = "/bin/sh"\nenvironment = { V = "declared" }\n'
        async with controlled(tmp_path, declared) as (control, local):
            assert (await call(local, "f", b"echo $V")).body == b"declared\n"
            assert control.describe(F) is None

    run(test())
    assert "what was deployed under this name is not served" in log


def test_file_that_comes_to_declare_what_was_deployed_says_so_once(tmp_path: Path, log: Log) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create(shell())
            for text in ('[f]\nfprocess = "cat"\n', '[f]\nfprocess = "env"\n'):
                write_file(tmp_path, text)
                assert await control.reload()

    run(test())
    told = "the functions file declares f: what was deployed under this name is not served"
    assert str(log).count(told) == 1


def test_bad_update_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create(shell(envVars={"V": "1"}))
            before = dict(local.table), local.status()[F].pids
            with pytest.raises(BadDeployment):
                await control.update(shell(envVars={"exec_timeout": "banana"}))
            assert (dict(local.table), local.status()[F].pids) == before

    run(test())


def test_function_can_be_removed_again_when_other_processes_could_not_be_told(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create(shell())
            in_the_way = local.directory / "table.new"
            in_the_way.mkdir()
            with pytest.raises(OSError, match=r"table\.new"):
                await control.remove({"functionName": "f"})
            in_the_way.rmdir()
            await control.remove({"functionName": "f"})
            assert F not in local.table
            await control.create(shell())

    run(test())


@pytest.mark.parametrize("method", ["create", "update"])
def test_every_problem_is_told_when_the_name_is_one(tmp_path: Path, method: str) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            with pytest.raises(BadDeployment) as caught:
                await getattr(control, method)(shell(service="A", limits={"memory": "1"}))
            assert [problem.partition(":")[0] for problem in caught.value.problems] == ["service", "limits"]

    run(test())


def test_longest_variable_that_is_taken_reaches_the_program(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create(shell(envVars={"BIG": "x" * (LONGEST_BYTES - len("BIG=") - 1)}))
            assert (await call(local, "f", b"echo ${#BIG}")).body == b"131067\n"

    run(test())


def test_nothing_is_deployed_without_a_state(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(None) as (control, _):
            with pytest.raises(DeployOff):
                await control.create(shell())
            with pytest.raises(DeployOff):
                control.secret_names()

    run(test())


STORED = json.dumps({"deployment": {"service": "g", "image": "process", "envProcess": "cat"}, "created_s": "WHEN"})


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[" * 9000, "{}", "null", '{"deployment": {}}', '{"deployment": null, "created_s": 1}'),
        *(STORED.replace('"WHEN"', moment) for moment in ("1e20", "NaN", "Infinity", "-1", "null", "1" + "0" * 400)),
    ],
    ids=lambda content: content[-30:],
)
def test_damaged_deployment_is_disabled_and_told_and_can_be_removed_and_others_serve(
    tmp_path: Path, log: Log, content: str
) -> None:
    damaged = tmp_path / "functions" / "g.openfaas-fn"

    async def test() -> None:
        async with controlled(tmp_path) as (control, _):
            await control.create(shell())
            await control.create(shell(service="g"))
        damaged.write_text(content)
        async with controlled(tmp_path) as (control, local):
            assert list(local.table) == [F]
            await control.remove({"functionName": "g"})
            assert not damaged.exists()
            with pytest.raises(UnknownFunction):
                await control.remove({"functionName": "g"})
            assert (await call(local, "f", b"echo here")).body == b"here\n"

    run(test())
    assert f"error: the deployed function g.openfaas-fn is disabled: {damaged}: " in log
    assert "'deployment'" not in log
    assert "object is not" not in log


def test_state_is_one_gateways(tmp_path: Path) -> None:
    with hold_state(tmp_path), pytest.raises(CannotStart, match="is another gateway's"), hold_state(tmp_path):
        pass


def test_file_is_followed_and_a_bad_one_changes_nothing(tmp_path: Path, log: Log) -> None:
    text = '[f]\nfprocess = "/bin/sh"\nenvironment = {{ V = "{}" }}\n[same]\nfprocess = "cat"\n'
    file = tmp_path / "functions.toml"

    async def test() -> None:
        async with controlled(tmp_path, text.format(1)) as (control, local):
            following = asyncio.create_task(control.follow())
            await call(local, "same")
            pids = local.status()[parse_function_name("same")].pids
            file.write_text(text.format(2) + '[added]\nfprocess = "cat"\n')
            added = parse_function_name("added")
            await until(lambda: added in local.table and local.table[F].environment == {"V": "2"}, "the change")
            assert (await call(local, "f", b"echo $V")).body == b"2\n"
            file.write_text("[f]\nfprocess = 1.5\n[g]\n")
            control.look_now()
            await until(lambda: "f.toml" not in log and "[g]: has neither fprocess nor url" in log, "the problems")
            assert "[f] fprocess: is a number with a fraction" in log
            assert added in local.table
            file.write_text(text.format(3))
            control.look_now()
            await until(lambda: added not in local.table, "the removal")
            assert local.status()[parse_function_name("same")].pids == pids
            assert all(exists(pid) for pid in pids)
            following.cancel()

    run(test())


@pytest.mark.parametrize("room", [0, 12], ids=["the file cannot be opened", "the sockets cannot all be opened"])
def test_file_is_applied_when_there_are_descriptors_again(tmp_path: Path, log: Log, room: int) -> None:
    file, old = tmp_path / "functions.toml", '[f]\nfprocess = "/bin/sh"\n'
    many = old + "".join(f'[new{number}]\nfprocess = "cat"\n' for number in range(20))

    async def test() -> None:
        async with controlled(tmp_path, old) as (control, local):
            following = asyncio.create_task(control.follow())
            with few_descriptors(room):
                file.write_text(many) if room else control.look_now()
                await until(lambda: "the functions file is not applied" in log, "the failure")
                assert list(local.table) == [F]
            file.write_text(many)
            await until(lambda: len(local.table) == 21, "the change")
            assert (await call(local, "new19", b"here")).body == b"here"
            file.write_text(old)
            control.look_now()
            await until(lambda: len(local.table) == 1, "the next change")
            await until(lambda: len(list(local.directory.glob(f"{os.getpid()}.*"))) == 1, "no socket but one")
            following.cancel()

    run(test())
    assert room or str(log).count("the functions file is not applied") == 1


def test_changed_function_is_applied_when_there_are_descriptors_again(tmp_path: Path, log: Log) -> None:
    file, text = tmp_path / "functions.toml", '[f]\nfprocess = "/bin/sh"\nenvironment = {{ V = "{}" }}\n'

    async def test() -> None:
        async with controlled(tmp_path, text.format(1)) as (control, local):
            following = asyncio.create_task(control.follow())
            with few_descriptors(1):  # for the file, and for what tells other processes, but not for a socket
                file.write_text(text.format(2))
                await until(lambda: "the old version of f goes on" in log, "the failure")
                assert local.table[F].environment == {"V": "1"}
            await until(lambda: local.table[F].environment == {"V": "2"}, "the change")
            assert (await call(local, "f", b"echo $V")).body == b"2\n"
            following.cancel()

    run(test())
    assert str(log).count("the old version of f goes on") == 1


def test_functions_go_on_when_their_file_is_gone_and_what_a_change_brings_and_takes_is_told(
    tmp_path: Path, log: Log
) -> None:
    file = tmp_path / "functions.toml"

    async def test() -> None:
        two = "[f]\nfprocess = 'sh'\n[g]\nfprocess = 'sh'\n"
        async with controlled(tmp_path, two) as (control, local):
            following = asyncio.create_task(control.follow())

            async def look_until(text: str) -> None:
                control.look_now()
                await until(lambda: text in str(log), text)

            file.unlink()
            await look_until(f"the functions file is not applied: {file}: there is no such file")
            assert [name.short for name in local.table] == ["f", "g"]
            file.write_text("[g]\nfprocess = 'sh'\nexec_timeout = '9s'\n[h]\nfprocess = 'sh'\n")
            await look_until("the functions file has changed; new: h; changed: g; gone: f")
            file.write_text("")
            await look_until("the functions file has changed; gone: g, h")
            assert not local.table
            file.write_text(IMAGE.format(1))
            assert await control.reload()
            file.unlink()
            assert not await control.reload(), "nor one that had images alone"
            following.cancel()

    run(test())


IMAGE = '[images]\n"shop/echo" = {{ fprocess = "/bin/sh", environment = {{ V = "{}" }} }}\n'


def test_images_are_those_of_the_file_in_force_and_hold_for_what_is_deployed(tmp_path: Path, log: Log) -> None:
    file, document = tmp_path / "functions.toml", {"service": "f", "image": "shop/echo"}

    async def test() -> None:
        async with controlled(tmp_path, IMAGE.format(1)) as (control, local):
            await control.create(document)
            for bad in ("[images", '[images]\n"shop/echo" = 5\n', IMAGE.format(2) + "[cat]\n"):
                file.write_text(bad)
                assert not await control.reload()
                await control.update({**document, "envVars": {"W": bad}})
                assert (await call(local, "f", b"echo $V")).body == b"1\n"
            file.write_text(IMAGE.format(3))
            assert await control.reload()
            assert (await call(local, "f", b"echo $V")).body == b"3\n"
            file.write_text("")
            assert await control.reload()
            assert (await call(local, "f", b"echo $V")).body == b"3\n"
        async with controlled(tmp_path) as (control, local):
            assert not local.table
            file.write_text(IMAGE.format(4))
            assert await control.reload()
            assert (await call(local, "f", b"echo $V")).body == b"4\n"

    run(test())
    assert "the deployed function f.openfaas-fn is disabled" in log


def test_deployed_functions_stay_when_the_file_changes(tmp_path: Path) -> None:
    async def test() -> None:
        async with controlled(tmp_path) as (control, local):
            await control.create(shell())
            (tmp_path / "functions.toml").write_text('[cat]\nfprocess = "cat"\n')
            assert await control.reload()
            assert set(local.table) == {F, *parse('[cat]\nfprocess = "cat"')}

    run(test())


# --- a crash at any instant --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from faashound.functions.documents import Documents

directory, steps = Path(sys.argv[1]), int(sys.argv[2])
documents = Documents(directory)
documents.write("name", b"old" * 1000)

def hook(event, args):  # of the interpreter: each call that touches the disk's names, and each sync by its open
    global steps
    if event in ("open", "os.rename", "os.remove", "os.listdir") and str(directory) in str(args):
        steps -= 1
        if steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
documents.write("name", b"new" * 2000)
documents.delete("other")
print("whole")
"""


@pytest.mark.parametrize("steps", range(1, 6))
def test_document_is_the_old_or_the_new_one_when_the_writer_is_killed_at_any_step(tmp_path: Path, steps: int) -> None:
    directory = tmp_path / "documents"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(directory), str(steps)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9 or "whole" in done.stdout, done.stderr
    found = dict(Documents(directory).read_all())
    assert found in ({"name": b"old" * 1000}, {"name": b"new" * 2000})
    assert sorted(path.name for path in directory.iterdir()) == ["name"]  # and no temporary file


WRITER = """
import itertools, sys
from pathlib import Path
from faashound.functions.deployments import Deployments, Rules, parse_deployment
from faashound.functions.documents import Documents

deployments, rules = Deployments(Documents(Path(sys.argv[1]))), Rules()
for number in itertools.count():
    document = {"service": "f", "image": "process", "envProcess": "cat", "envVars": {"V": str(number) * 5000}}
    deployments.store(parse_deployment(document, rules, 0.0))
    if number == 0:
        print("ready", flush=True)
"""


@pytest.mark.parametrize("delay_ms", range(0, 20, 2))
def test_deployment_is_whole_when_the_gateway_is_killed_while_it_stores(tmp_path: Path, delay_ms: int) -> None:
    directory = tmp_path / "functions"
    command = [sys.executable, "-c", WRITER, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(0.02 + delay_ms / 1000)
        writer.kill()
    (deployment,) = Deployments(Documents(directory)).load(Rules()).values()
    value = deployment.function.environment["V"]
    assert value == value[: len(value) // 5000] * 5000
    assert json.loads((directory / "f.openfaas-fn").read_bytes())["created_s"] == 0.0
