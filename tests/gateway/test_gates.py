"""Functions that are not for every caller, or for none at the moment, as callers and operators find them."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from faashound.functions.exposure import BadExposure, Exposure, digest_token, parse_exposure
from faashound.functions.table import Function, Functions, parse_functions
from faashound.serving.access import Access
from faashound.serving.browsers import BrowserRules
from faashound.serving.gates import FunctionGate
from faashound.serving.invocations import Invocations
from faashound.serving.metrics import GatewayMetrics
from faashound.serving.passwords import FREE_FAILURES_COUNT, MAX_LATE_COUNT
from faashound.serving.proxying import build_via
from faashound.serving.settings import Settings
from faashound.watchdog import Body, Request, Scoreboard, Slot, Stream, parse_settings
from testkit.harness import SOON_S, Answer, InBackground, free_port, http_request, wait_until
from testkit.system import System
from tests.functions.kit import F, real, run, running, until

FUNCTIONS = """
[open]
fprocess = "cat"

[inner]
fprocess = "env"
annotations = { "com.faashound.auth" = "internal" }

[keyed]
fprocess = "env"
annotations = { "com.faashound.auth" = "caller-token" }

[other]
fprocess = "cat"
annotations = { "com.faashound.auth" = "long-token" }

[lost]
fprocess = "cat"
annotations = { "com.faashound.auth" = "no-such-token" }
"""
LONG_TOKEN = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DISABLED = '[open]\nfprocess = "cat"\n[switch]\nfprocess = "cat"\nannotations = {{ "com.faashound.disabled" = "{}" }}\n'


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def guarded(secrets: Path, functions: str = FUNCTIONS, **settings: str) -> System:
    """Return a gateway with a password, whose operator keeps a token beside it."""
    for name, text in (
        ("basic-auth-user", "admin"),
        ("basic-auth-password", "sesame"),
        ("caller-token", "let-me-in\n"),
        ("long-token", LONG_TOKEN),
    ):
        (secrets / name).write_text(text)
    return System(functions, {"basic_auth": "true", "secret_mount_path": str(secrets), **settings})


@pytest.fixture(scope="module", params=["1", "2"], ids=["one process", "two processes"])
def system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with guarded(tmp_path_factory.mktemp("secrets"), workers=request.param) as system:
        yield system


def call(system: System, name: str, headers: Mapping[str, str] | None = None) -> Answer:
    return system.request("POST", f"/function/{name}", b"x", headers)


@pytest.mark.parametrize(
    ("annotations", "expected"),
    [
        ({}, Exposure()),
        ({"com.faashound.auth": "internal"}, Exposure(is_internal=True)),
        ({"com.faashound.auth": "token"}, Exposure(secret="token")),
        ({"com.faashound.disabled": "true"}, Exposure(is_disabled=True)),
        ({"com.faashound.disabled": "false"}, Exposure()),
    ],
)
def test_annotations_say_whom_a_function_is_for(annotations: dict[str, str], expected: Exposure) -> None:
    assert parse_exposure(annotations) == expected


def test_all_bad_annotations_are_told_at_once() -> None:
    with pytest.raises(BadExposure) as caught:
        parse_exposure({"com.faashound.auth": "../etc", "com.faashound.disabled": "yes"})
    auth, disabled = caught.value.problems["com.faashound.auth"], caught.value.problems["com.faashound.disabled"]
    assert auth.startswith("'../etc': allowed: internal, or the name of a secret: 1 to 253 lower-case letters")
    assert disabled == "'yes': allowed: true, false, 1, 0"


def test_token_is_compared_without_the_line_end_of_its_file() -> None:
    assert digest_token(b"abc\n") == digest_token(b"abc") != digest_token(b"abcd")


def test_internal_function_is_for_who_has_the_password(system: System) -> None:
    assert call(system, "inner").status == 401
    assert call(system, "inner").headers["www-authenticate"].startswith("Basic ")
    assert call(system, "inner", bearer("let-me-in")).status == 401
    assert call(system, "inner", basic("admin:wrong")).status == 401
    answer = call(system, "inner", basic("admin:sesame"))
    assert answer.status == 200
    assert "Http_Authorization" not in answer.text, "the gateway's password is no business of a function"


def test_function_with_a_token_is_for_who_carries_it(system: System) -> None:
    assert call(system, "keyed").status == 401
    assert call(system, "keyed").headers["www-authenticate"].startswith("Bearer ")
    for wrong in ("let-me-i", "let-me-in-", "", "\xff"):
        assert call(system, "keyed", bearer(wrong)).status == 401
    answer = call(system, "keyed", bearer("let-me-in"))
    assert (answer.status, "let-me-in" in answer.text) == (200, False)
    assert call(system, "keyed", basic("admin:sesame")).status == 200
    assert "let-me" not in system.log()


def test_function_whose_token_is_not_there_lets_no_caller_in(system: System) -> None:
    for headers in ({}, bearer(""), bearer("None")):
        assert call(system, "lost", headers).status == 401
    system.wait_log("lost lets no caller in: openfaas-fn has no secret no-such-token")


@pytest.mark.parametrize(("name", "headers"), [("inner", basic("admin:sesame")), ("keyed", bearer("let-me-in"))])
def test_asynchronous_call_wants_the_same_and_is_made(system: System, name: str, headers: dict[str, str]) -> None:
    assert system.request("POST", f"/async-function/{name}", b"x").status == 401
    call_id = system.request("POST", f"/async-function/{name}", b"x", headers).headers["x-call-id"]
    ended = wait_until(lambda: status_of(system, call_id) not in ("queued", "running"), 15, "it has ended")
    assert ended
    result = system.request("GET", f"/async-function/{call_id}/result", headers=basic("admin:sesame"))
    assert (result.status, "Http_Authorization" in result.text) == (200, False)


def status_of(system: System, call_id: str) -> str:
    answer = system.request("GET", f"/async-function/{call_id}", headers=basic("admin:sesame"))
    return str(json.loads(answer.body)["state"])


def test_function_that_is_open_gets_the_authorization_that_its_caller_sends(system: System) -> None:
    assert call(system, "open", bearer("its-own")).status == 200


def test_guesses_of_a_token_are_slow(tmp_path: Path) -> None:
    with guarded(tmp_path, worker="none") as system:
        answers = [call(system, "keyed", bearer(f"guess-{number}")) for number in range(FREE_FAILURES_COUNT + 2)]
        assert {answer.status for answer in answers} == {401}
        assert answers[-1].elapsed_s >= 0.4
        assert "guess-" not in system.log()
        system.wait_log("wrong token for [POST] /function/keyed peer=127.0.0.1")


def guess_on(system: System, name: str, is_enough: threading.Event) -> None:
    """Guess again and again: as many answers are late at any time as may be, whenever that is looked at."""
    while not is_enough.is_set():
        call(system, name, bearer("guess"))
        is_enough.wait(0.1)


def test_wrong_tokens_lock_out_no_caller_of_another_function_and_none_with_a_long_token(tmp_path: Path) -> None:
    with guarded(tmp_path, worker="none") as system:
        for name in ("keyed", "other"):
            is_enough = threading.Event()
            guess = partial(guess_on, system, name, is_enough)
            held = [InBackground(guess) for _ in range(2 * MAX_LATE_COUNT)]
            wait_until(lambda: call(system, name, bearer("guess")).status == 429, 20, "too many guesses")  # noqa: B023
            assert call(system, "other", bearer(LONG_TOKEN)).status == 200
            if name == "keyed":
                assert call(system, "other", bearer("guess")).status == 401, "which is counted for itself"
            is_enough.set()
            for each in held:
                each.result()


def test_internal_function_without_a_password_is_for_workers_alone() -> None:
    with System(FUNCTIONS) as system:
        assert call(system, "inner").status == 403
        assert call(system, "inner", basic("a:b")).status == 403
        assert system.request("POST", "/async-function/inner").status == 403


def test_deployed_function_wants_a_secret_that_is_there_and_follows_it(tmp_path: Path) -> None:
    json_type = {"Content-Type": "application/json"}

    def send(method: str, what: str, document: object) -> Answer:
        return gateway.request(method, f"/system/{what}", json.dumps(document).encode(), json_type)

    document = {"service": "f", "image": "process", "envProcess": "cat"}
    keyed = {**document, "annotations": {"com.faashound.auth": "token"}}
    with System("", {"deploy": "process", "state": str(tmp_path), "worker": "none"}) as gateway:
        answer = send("POST", "functions", keyed)
        assert (answer.status, "there is no secret token in openfaas-fn" in answer.text) == (400, True)
        assert send("POST", "secrets", {"name": "token", "value": "one"}).status == 201
        assert send("POST", "functions", keyed).status == 202
        assert call(gateway, "f", bearer("one")).status == 200
        assert send("PUT", "secrets", {"name": "token", "value": "two"}).status == 200
        assert call(gateway, "f", bearer("one")).status == 401
        assert call(gateway, "f", bearer("two")).status == 200
        assert send("DELETE", "secrets", {"name": "token"}).status == 409
        assert send("PUT", "functions", document).status == 200
        assert call(gateway, "f").status == 200
        assert send("DELETE", "secrets", {"name": "token"}).status == 202


def test_disabled_function_answers_503_and_its_asynchronous_calls_wait_until_it_is_enabled() -> None:
    with System(DISABLED.format("true"), {"max_retry_attempts": "1"}) as system:
        answer = call(system, "switch")
        assert (answer.status, answer.headers["retry-after"]) == (503, "30")
        calls = [system.submit("switch", b"later") for _ in range(3)]
        assert system.ended(system.submit("open"))["state"] == "done", "others are not held up"
        for each in calls:  # one that was claimed before that was known is handed back
            system.until(each, lambda status: (status["state"], status["attempts"]) == ("queued", 0))
        Path(system.environment["functions"]).write_text(DISABLED.format("false"))
        system.process.send_signal(signal.SIGHUP)
        assert [system.ended(each, 30)["attempts"] for each in calls] == [1] * 3
        assert call(system, "switch").text == "x"


def test_no_process_answers_before_the_one_that_runs_the_functions_knows_their_tokens(tmp_path: Path) -> None:
    ports, token = {"port": str(free_port()), "metrics_port": str(free_port())}, tmp_path / "caller-token"
    os.mkfifo(token)  # so that the one that reads it starts for as long as we wish

    def call_meanwhile() -> tuple[bool, Answer]:
        fd = wait_until(lambda: opened_if_read(token), SOON_S, "the token is asked for")
        calling = InBackground(partial(http_request, int(ports["port"]), "POST", "/function/keyed", bearer(LONG_TOKEN)))
        for _ in range(10):  # the other process answers here as soon as it is all there
            assert http_request(int(ports["metrics_port"]), "GET", "/metrics").status == 200
        was_early = calling.done()
        (tmp_path / "new").write_text(LONG_TOKEN)
        (tmp_path / "new").rename(token)
        os.write(fd, LONG_TOKEN.encode())
        os.close(fd)
        return was_early, calling.result()

    text = f'[keyed]\nfprocess = "cat"\nannotations = {{ "com.faashound.auth" = "{token.name}" }}\n'
    calling = InBackground(call_meanwhile)
    with System(text, {"worker": "none", "workers": "2", "secret_mount_path": str(tmp_path), **ports}):
        was_early, answer = calling.result()
    assert (was_early, answer.status) == (False, 200)


def opened_if_read(fifo: Path) -> int | None:
    """Return a descriptor to write to a FIFO with, if a process has it open to read."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


AWAKE = 'fprocess = "cat"\nlabels = { com.openfaas.scale.max = "4", com.openfaas.scale.zero = "false" }\n'
GROWING = "".join(
    f'[{name}]\n{AWAKE}annotations = {{ "{annotation}" = "{value}" }}\n'
    for name, annotation, value in (
        ("called", "com.example.nothing", ""),
        ("inner", "com.faashound.auth", "internal"),
        ("keyed", "com.faashound.auth", "no-such-token"),
        ("off", "com.faashound.disabled", "true"),
    )
)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_function_does_not_grow_by_calls_that_it_is_not_asked(workers: str) -> None:
    with System(GROWING, {"worker": "none", "workers": workers}) as system:

        def replicas(name: str) -> int:
            answer = system.request("GET", f"/system/function/{name}")
            assert answer.status == 200, answer
            count: int = json.loads(answer.body)["replicas"]
            return count

        def has_grown() -> bool:
            for name, status in (("inner", 403), ("keyed", 401), ("off", 503), ("called", 200)):
                asked = 40 if name == "called" else 4
                assert {call(system, name).status for _ in range(asked)} == {status}
            return replicas("called") > 1

        wait_until(has_grown, 30.0, "the one that is called has another watchdog")
        assert [replicas(name) for name in ("inner", "keyed", "off")] == [1, 1, 1]


def test_bad_annotation_is_reported_with_its_line() -> None:
    with System(DISABLED.format("true"), {"worker": "none"}) as system:
        Path(system.environment["functions"]).write_text(DISABLED.format("maybe"))
        system.wait_log(
            "functions.toml:5: [switch] annotations.com.faashound.disabled: 'maybe': allowed: true, false, 1, 0"
        )
        assert call(system, "switch").status == 503


class ThoughtfulGate(FunctionGate):
    """Takes its time to let a caller in: `meanwhile` is done."""

    meanwhile: Callable[[], Awaitable[None]]

    async def admit(self, request: Request, function: Function) -> tuple[bytes, ...]:
        await self.meanwhile()
        return await super().admit(request, function)


@pytest.mark.parametrize("is_removed", [False, True], ids=["replaced", "removed"])
def test_caller_that_waits_to_be_let_in_finds_what_is_there_then(is_removed: bool) -> None:
    text = '[f]\nfprocess = "/bin/sh"\nenvironment = {{ V = "{}" }}\n'

    async def test() -> None:
        async with running(real(text.format("old"))) as local:
            old = local.path(F)

            async def meanwhile() -> None:
                await (local.remove(F) if is_removed else local.put(parse_functions(text.format("new"), "f.toml")[F]))
                await until(lambda: not old.exists(), "the end of the old version")

            gate = ThoughtfulGate(Access("token", BrowserRules(True, frozenset(), frozenset()), None))
            gate.meanwhile = meanwhile
            settings = parse_settings(Settings, {})
            metrics = GatewayMetrics(Slot(Scoreboard()))
            invocations = Invocations(settings, Functions(local.table), gate, build_via("token"), metrics)
            body = Body(None, lambda: None)
            body.feed(b"echo $V")
            body.finish()
            request = Request("POST", b"/function/f", b"/function/f", b"", b"localhost", (), body)
            response = await invocations.answer(request, "f", b"/")
            if is_removed:
                assert response.status == 404
            else:
                assert response.status == 200
                assert b"".join([piece async for piece in cast(Stream, response.body)]) == b"new\n"
            await invocations.close()

    run(test())
