"""Functions behind functions: a callback that is the next call of a chain, and the demonstration that shows it all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from testkit.harness import ROOT, START_DEADLINE_S, Answer, clean_environment, crowding, http_request, wait_until
from testkit.system import FUNCTIONS, Received, Receiver, Reply, System, rows

LONG_S = 60.0  # for a call's retries, and those of its callback

NEXT = FUNCTIONS + "[next]\nfprocess = 'sh -c \"cat >>$TMPDIR/next; echo >>$TMPDIR/next\"'"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(NEXT) as system:
        yield system


def next_calls(system: System, body: bytes) -> list[str]:
    """Return the ids of the calls to `next` with this body."""
    sql = "SELECT id FROM calls JOIN requests USING (seq) WHERE function = 'next.openfaas-fn' AND inline = ?"
    return [row["id"] for row in rows(system.spool, sql, body)]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1"])
def test_callback_to_async_function_runs_the_next_function_once(system: System, host: str) -> None:
    body = f"by {host}".encode()
    call_id = system.submit("cat", body, {"X-Callback-Url": f"http://{host}:{system.port}/async-function/next"})
    status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "delivered")
    assert status["callback"]["status"] == 202
    (next_id,) = next_calls(system, body)
    assert next_id != call_id
    assert system.ended(next_id)["state"] == "done"
    assert (system.temporary / "next").read_bytes().splitlines().count(body) == 1


def test_function_that_echoes_what_it_was_sent_does_not_steer_the_next_call_of_a_chain() -> None:
    """Its answer's fields become those of a submission, where they would be the caller's word."""
    echoed = ("x-callback-url", "x-delay", "x-expires", "idempotency-key", "x-timeout", "via", "origin")

    def echo(received: Received) -> Reply:
        made_up = {"X-Delay": "1h", "X-Expires": "1ms", "Idempotency-Key": "k", "Origin": "http://evil.example"}
        echoed_fields = {name: value for name, value in received.headers.items() if name in echoed}
        return 200, made_up | echoed_fields | {"X-Callback-Url": elsewhere.url()}, b"by echo"

    with Receiver(echo) as receiver, Receiver() as elsewhere:
        with System(f'{NEXT}\n[echo]\nurl = "{receiver.url()}"') as system:
            url = f"http://127.0.0.1:{system.port}/async-function/next"
            call_id = system.submit("echo", b"x", {"X-Callback-Url": url, "X-Timeout": "10s"})
            system.until(call_id, lambda status: status.get("callback", {}).get("state") == "delivered")
            (next_id,) = next_calls(system, b"by echo")
            status = system.ended(next_id)
            assert (status["state"], status.get("callback")) == ("done", None)
        assert elsewhere.received() == []


def test_next_function_runs_once_though_its_callback_is_repeated_through_a_gateway_of_another_name(
    system: System,
) -> None:
    """The answer to the first callback is lost behind a proxy that the worker does not know as its gateway."""
    lost: list[int] = []

    def relay(received: Received) -> Reply:
        headers = {name: value for name, value in received.headers.items() if name not in ("host", "content-length")}
        answer = http_request(system.port, received.method, received.path, headers, received.body)
        lost.append(answer.status)
        return (502, {}, b"") if len(lost) == 1 else (answer.status, {}, answer.body)

    with Receiver(relay) as proxy:
        call_id = system.submit("cat", b"by proxy", {"X-Callback-Url": proxy.url("/async-function/next")})
        status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "delivered")
    assert (lost, status["callback"]["attempts"]) == ([202, 202], 2)
    (next_id,) = next_calls(system, b"by proxy")
    assert system.ended(next_id)["state"] == "done"


def fails_until_mended(name: str) -> bytes:
    """Return a script that fails until there is a file `name`."""
    return f'test -e "$TMPDIR/{name}" || {{ echo broken {name}; exit 1; }}; echo mended {name}'.encode()


def retry_mended(system: System, call_id: str, name: str) -> None:
    """Queue the dead letter of such a script again, which is to succeed now."""
    (system.temporary / name).touch()
    assert system.request("POST", f"/system/calls/{call_id}/retry").status == 202


def is_delivered(state: str, status: Mapping[str, Any]) -> bool:
    """Tell whether a call has ended in `state`, and its callback was taken."""
    return (status["state"], status.get("callback", {}).get("state")) == (state, "delivered")


def test_next_function_gets_both_outcomes_of_a_dead_letter_that_was_queued_again(system: System) -> None:
    url = f"http://127.0.0.1:{system.port}/async-function/next"
    call_id = system.submit("shell", fails_until_mended("both"), {"X-Callback-Url": url})
    system.until(call_id, partial(is_delivered, "dead"), LONG_S)
    retry_mended(system, call_id, "both")
    system.until(call_id, partial(is_delivered, "done"), LONG_S)
    for outcome in (b"exit status 1\nbroken both\n", b"mended both\n"):
        (next_id,) = next_calls(system, outcome)
        assert system.ended(next_id)["state"] == "done"


def test_callback_is_the_submission_of_the_end_that_it_proves_and_of_no_other(system: System) -> None:
    with Receiver() as receiver:
        call_id = system.submit("shell", fails_until_mended("proved"), {"X-Callback-Url": receiver.url()})
        system.until(call_id, partial(is_delivered, "dead"), LONG_S)
        retry_mended(system, call_id, "proved")
        first, later = receiver.wait_for(2, LONG_S)

    def submit_next(received: Received, callback_id: str | None) -> Answer:
        """Send it on, as the callback that it is or as another; None is what earlier workers send."""
        fields = {name: received.headers[name] for name in ("x-call-id", "x-callback-proof")}
        fields |= {} if callback_id is None else {"X-Callback-Id": callback_id}
        return system.request("POST", "/async-function/next", received.body, fields)

    first_id, later_id = (received.headers["x-callback-id"] for received in (first, later))
    taken = [submit_next(*each) for each in ((first, first_id), (first, None), (later, later_id), (later, later_id))]
    ids = [answer.headers["x-call-id"] for answer in taken]
    assert ([answer.status for answer in taken], ids[0] != ids[2]) == ([202] * 4, True)
    assert (ids[1], ids[3]) == (ids[0], ids[2])
    pretended = ((first, later_id), (first, f"{call_id}:1"), (later, first_id), (later, None))
    assert [submit_next(*each).status for each in pretended] == [409] * 4


def test_stranger_cannot_pass_for_a_callback(system: System) -> None:
    call_id = system.submit("cat", b"x")
    fields = {"X-Call-Id": call_id, "X-Callback-Proof": "0" * 64, "X-Function-Status": "200"}
    assert system.request("POST", "/async-function/next", b"forged", fields).status == 409
    assert next_calls(system, b"forged") == []


def test_chain_ends_when_the_next_function_is_unknown(system: System) -> None:
    call_id = system.submit("cat", b"x", {"X-Callback-Url": f"http://127.0.0.1:{system.port}/async-function/missing"})
    status = system.until(call_id, lambda status: status.get("callback", {}).get("status") == 404)
    assert status["state"] == "done"


def test_demonstration_finds_every_answer_right_and_keeps_nothing(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py")],
        cwd=ROOT,
        env=clean_environment({"state": str(tmp_path / "state")}),
        capture_output=True,
        text=True,
        timeout=3 * START_DEADLINE_S * crowding(),
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "Every answer was right." in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_demonstration_prints_lines_that_work_when_pasted() -> None:
    script = str(ROOT / "examples" / "demo.py")
    functions = (ROOT / "examples" / "functions.toml").read_text().replace("examples/", f"{ROOT}/examples/")
    with System(functions) as system:
        url = f"http://127.0.0.1:{system.port}"
        shown = subprocess.run([sys.executable, script, "--lines", url], capture_output=True, text=True, check=True)
        lines = [line.strip() for line in shown.stdout.splitlines() if line.strip().startswith("curl")]
        done = subprocess.run(["sh", "-ec", lines[0]], capture_output=True, text=True, check=True)
        assert "4 words" in done.stdout
        assert len(lines) >= 5
        wait_until(lambda: system.request("GET", "/healthz").status == 200, 5, "healthy")
