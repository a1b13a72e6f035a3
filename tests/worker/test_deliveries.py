"""How the worker delivers results to callbacks, and what it does when they cannot be delivered."""

from __future__ import annotations

import base64
import os
import signal
import threading
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from faashound.draining.breakers import FAILURES_COUNT
from faashound.draining.outcomes import REFUSED_TEXT
from testkit.harness import free_port
from testkit.system import (
    NOTES_RUN,
    SIGNING_SECRET,
    Received,
    Receiver,
    Reply,
    System,
    Worker,
    always,
    functions_at,
    in_turn,
    runs,
)

# Callbacks


def test_callback_carries_the_answer_and_the_facts_of_its_call(system: System) -> None:
    with Receiver() as receiver:
        headers = {"X-Callback-Url": receiver.url("/done?x=1"), "Content-Type": "text/csv"}
        call_id = system.submit("cat", b"a,b", headers)
        (got,) = receiver.wait_for(1)
    assert (got.method, got.path, got.body) == ("POST", "/done?x=1", b"a,b")
    assert got.headers["content-type"] == "text/csv"
    assert got.headers["x-call-id"] == call_id
    assert got.headers["x-function-name"] == "cat.openfaas-fn"
    assert got.headers["x-function-status"] == "200"
    assert float(got.headers["x-duration-seconds"]) > 0
    assert (got.headers["x-retry"], got.headers["x-retry-max"]) == ("0", "2")
    assert got.headers["user-agent"].startswith("faashound/")
    assert "x-worker-token" not in got.headers
    system.until(call_id, lambda status: status["callback"]["state"] == "delivered")


def test_callback_of_a_failed_call_tells_how_often_it_was_tried(system: System) -> None:
    with Receiver() as receiver:
        system.submit("shell", b"echo why; exit 7", {"X-Callback-Url": receiver.url()})
        (got,) = receiver.wait_for(1)
    assert (got.headers["x-function-status"], got.body) == ("500", b"exit status 7\nwhy\n")
    assert (got.headers["x-retry"], got.headers["x-retry-max"]) == ("2", "2")


def test_callback_of_an_unreachable_function_says_503_with_an_empty_body() -> None:
    functions = f'[down]\nurl = "http://127.0.0.1:{free_port()}"'
    with Receiver() as receiver, System(functions) as system:
        system.submit("down", b"x", {"X-Callback-Url": receiver.url()})
        (got,) = receiver.wait_for(1)
        assert (got.headers["x-function-status"], got.headers["content-length"], got.body) == ("503", "0", b"")


@pytest.mark.parametrize("size", [0, 10, 200_000])
def test_signature_is_accepted_by_the_standard_verifier(system: System, size: int) -> None:
    with Receiver() as receiver:
        call_id = system.submit("cat", b"{" + b" " * size + b"}", {"X-Callback-Url": receiver.url()})
        (got,) = receiver.wait_for(1)
    assert got.headers["webhook-id"] == call_id
    standardwebhooks.Webhook(SIGNING_SECRET).verify(got.body, dict(got.headers))
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SIGNING_SECRET).verify(got.body + b" ", dict(got.headers))


def test_failing_callback_is_repeated_and_the_function_is_not(system: System) -> None:
    with Receiver(in_turn(500, 200)) as receiver:
        call_id = system.submit("shell", NOTES_RUN, {"X-Callback-Url": receiver.url()})
        assert system.ended(call_id)["state"] == "done"
        first, second = receiver.wait_for(2, 30)
        assert first.headers["x-call-id"] == second.headers["x-call-id"] == call_id
        status = system.until(call_id, lambda status: status["callback"]["state"] == "delivered")
        assert (status["attempts"], status["callback"]["attempts"]) == (1, 2)
    assert runs(system).count(call_id) == 1


def test_receiver_knows_the_callback_of_another_end_from_a_repetition(system: System) -> None:
    gate = system.temporary / "gate"
    with Receiver(in_turn(200, 500, 200)) as receiver:
        script = f"test -e {gate} || exit 1".encode()
        call_id = system.submit("shell", script, {"X-Callback-Url": receiver.url()})
        system.until(call_id, lambda status: status.get("callback", {}).get("state") == "delivered", 30)
        gate.touch()
        assert system.request("POST", f"/system/calls/{call_id}/retry").status == 202
        got = receiver.wait_for(3, 30)
    first, again, repeated = (each.headers["x-callback-id"] for each in got)
    assert (first, repeated) == (call_id, again)
    assert again != first
    assert [each.headers["webhook-id"] for each in got] == [first, again, repeated]
    for each in got:
        standardwebhooks.Webhook(SIGNING_SECRET).verify(each.body, dict(each.headers), json_parse=False)


def has_failed(error: str, status: dict[str, Any]) -> bool:
    """Tell whether a callback has failed with `error` and waits for its next attempt."""
    callback = status.get("callback", {})
    return callback.get("state") == "pending" and error in (callback.get("error") or "")


def test_callback_that_is_not_answered_in_time_or_at_all_is_tried_again() -> None:
    waits = threading.Event()

    def stalls(_: Received) -> Reply:
        waits.wait(10)
        return 200, {}, b""

    with Receiver(stalls) as receiver, System(settings={"callback_timeout": "200ms"}) as system:
        late = system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        lost = system.submit("cat", b"", {"X-Callback-Url": f"http://127.0.0.1:{free_port()}/"})
        for call_id, error in ((late, "before the deadline"), (lost, "cannot connect")):
            status = system.until(call_id, partial(has_failed, error), 60)  # one may be late that could not connect
            assert status["state"] == "done"
        waits.set()


@pytest.mark.parametrize("status", [307, 308])
def test_callback_follows_a_redirect_that_keeps_method_and_body(system: System, status: int) -> None:
    def moved(received: Received) -> Reply:
        return (status, {"Location": "/new"}, b"") if received.path == "/old" else (200, {}, b"")

    with Receiver(moved) as receiver:
        system.submit("cat", b"hello", {"X-Callback-Url": receiver.url("/old")})
        seen = [(got.method, got.path, got.body) for got in receiver.wait_for(2)]
    assert seen == [("POST", "/old", b"hello"), ("POST", "/new", b"hello")]


def test_callback_follows_no_other_redirect_and_is_tried_again(system: System) -> None:
    with Receiver(always(302, {"Location": "/new"})) as receiver:
        call_id = system.submit("cat", b"hello", {"X-Callback-Url": receiver.url("/old")})
        system.until(call_id, partial(has_failed, "302"))
        assert {got.path for got in receiver.received()} == {"/old"}


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((410, {}, b""), "status 410"),
        ((307, {"Location": "http://169.254.169.254/"}, b""), REFUSED_TEXT),
    ],
)
def test_callback_ends_when_its_receiver_wants_no_more_or_it_would_go_where_it_may_not(
    system: System, reply: Reply, error: str
) -> None:
    with Receiver(lambda _: reply) as receiver:
        call_id = system.submit("cat", b"hello", {"X-Callback-Url": receiver.url()})
        status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead")
        assert (status["state"], status["callback"]["attempts"]) == ("done", 1)
        assert error in status["callback"]["error"]


def test_worker_judges_the_address_itself_whatever_the_gateway_let_through() -> None:
    with Receiver() as receiver, System(settings={"worker": "none"}) as system:
        call_id = system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        with Worker(system, {"callback_allow": "example.com"}) as worker:
            status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead")
            assert "127.0.0.1 is loopback; callback_allow can permit it" in worker.wait_log("callback to")
        assert status["callback"]["error"] == REFUSED_TEXT, "what it resolved to is not for strangers"
        assert receiver.received() == []


def test_credentials_and_hop_by_hop_fields_of_the_answer_are_not_passed_on() -> None:
    secret = {"Set-Cookie": "a=b", "WWW-Authenticate": "x", "X-Api-Key": "k", "Connection": "X-Hop", "X-Hop": "1"}
    function = Receiver(always(200, secret | {"X-Answer": "yes"}))
    with Receiver() as receiver, function, System(functions_at(function)) as system:
        system.submit("up", b"", {"X-Callback-Url": receiver.url()})
        (got,) = receiver.wait_for(1)
    assert got.headers["x-answer"] == "yes"
    assert not {name.lower() for name in secret} - {"connection"} & got.headers.keys()


def test_callback_reaches_a_function_of_the_same_gateway_without_callback_allow() -> None:
    system = System()
    del system.environment["callback_allow"]
    with system:
        call_id = system.submit(
            "cat", b"echo got it", {"X-Callback-Url": f"http://localhost:{system.port}/function/shell"}
        )
        status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "delivered")
        assert status["callback"]["attempts"] == 1


def test_callback_whose_stored_result_is_lost_is_given_up_with_the_reason_after_its_attempts() -> None:
    def lose(_: Received) -> Reply:
        for path in (settled.spool / "bodies").iterdir():
            path.unlink()
        return 500, {}, b""

    settled = System(settings={"callback_retry_attempts": "2"})
    with Receiver(lose) as receiver, settled as system:
        call_id = system.submit("cat", b"x" * 200_000, {"X-Callback-Url": receiver.url()})
        status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead", 30)
        assert (status["state"], status["status"], status["callback"]["attempts"]) == ("done", 200, 2)
        assert status["callback"]["error"] == "gave up after 2 attempts: the file of a stored body is gone"
        assert len(receiver.received()) == 1, "nothing goes out under the function's status that is not its answer"


def test_callback_is_delivered_at_once_beside_a_receiver_that_hangs() -> None:
    waits = threading.Event()

    def stalls(_: Received) -> Reply:
        waits.wait(60)
        return 200, {}, b""

    system = System(settings={"max_inflight": "4"})
    with Receiver(stalls) as hanging, Receiver() as healthy, system:
        for call_id in [system.submit("cat", b"", {"X-Callback-Url": hanging.url()}) for _ in range(12)]:
            system.ended(call_id)
        hanging.wait_for(4)
        for count in range(1, 4):
            call_id = system.submit("cat", b"", {"X-Callback-Url": healthy.url()})
            assert system.ended(call_id)["state"] == "done"
            healthy.wait_for(count, 15)  # the hanging ones have half a minute
        assert len(hanging.received()) == 4
        waits.set()


def test_callbacks_to_a_receiver_that_hangs_wait_until_it_answers_again() -> None:
    answers = threading.Event()

    def stalls(_: Received) -> Reply:
        answers.wait(60)
        return 200, {}, b""

    with Receiver(stalls) as receiver, System(settings={"callback_timeout": "2s"}) as system:
        for _ in range(FAILURES_COUNT):
            system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        system.wait_log(f"callbacks to 127.0.0.1:{receiver.port} are held back")
        call_id = system.submit("cat", b"", {"X-Callback-Url": receiver.url("/later")})
        assert system.ended(call_id)["state"] == "done"
        answers.set()
        status = system.until(call_id, lambda status: status["callback"]["state"] == "delivered", 30)
        assert status["callback"]["attempts"] == 1
        system.wait_log(f"callbacks to 127.0.0.1:{receiver.port} are sent again")
        assert [got.path for got in receiver.received()].count("/later") == 1


def test_callback_that_kills_each_worker_is_given_up() -> None:
    waits = threading.Event()

    def stalls(_: Received) -> Reply:
        waits.wait(20)
        return 200, {}, b""

    with Receiver(stalls) as receiver, System(settings={"callback_retry_attempts": "1"}) as system:
        call_id = system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        for begun in range(1, 5):
            receiver.wait_for(begun, 30)
            os.kill(system.worker_pid(), signal.SIGKILL)
        status = system.until(call_id, lambda status: status["callback"]["state"] == "dead")
        assert (status["state"], status["attempts"], status["callback"]["attempts"]) == ("done", 1, 5)
        assert "the workers that ran it died" in status["callback"]["error"]
        waits.set()


def test_callback_cannot_reach_what_operators_do_at_the_gateway() -> None:
    with System(settings={"worker": "none"}) as system:
        url = f"http://localhost:{system.port}/system/calls/{uuid.uuid4()}/retry"
        answer = system.request("POST", "/async-function/cat", b"", {"X-Callback-Url": url})
        assert answer.status == 400
        assert "it is the gateway; allowed there: /function/ and /async-function/" in answer.text


def test_callback_is_signed_for_the_hosts_of_the_secrets_only(tmp_path: Path) -> None:
    (tmp_path / "secrets").write_text(f"127.0.0.1 {SIGNING_SECRET}")
    with Receiver() as receiver, System(settings={"callback_secret_file": str(tmp_path / "secrets")}) as system:
        for host in ("127.0.0.1", "localhost"):
            system.submit("cat", b"x", {"X-Callback-Url": f"http://{host}:{receiver.port}/"})
        got = receiver.wait_for(2)
    assert {each.headers["host"].partition(":")[0]: "webhook-signature" in each.headers for each in got} == {
        "127.0.0.1": True,
        "localhost": False,
    }


def test_worker_reads_its_secrets_again_at_sighup_and_keeps_them_if_the_file_is_wrong(tmp_path: Path) -> None:
    path, other_secret = tmp_path / "secrets", f"whsec_{base64.b64encode(bytes(24)).decode()}"
    path.write_text(SIGNING_SECRET)
    with Receiver() as receiver, System(settings={"callback_secret_file": str(path)}) as system:

        def verify(secret: str, count: int) -> None:
            system.submit("cat", b"{}", {"X-Callback-Url": receiver.url()})
            got = receiver.wait_for(count)[-1]
            standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))

        verify(SIGNING_SECRET, 1)
        pid = system.worker_pid()
        for text, told in ((other_secret, "are signed with the secrets that"), ("short", "are signed as before")):
            path.write_text(text)
            os.kill(pid, signal.SIGHUP)
            system.wait_log(told)
        verify(other_secret, 2)
        assert system.worker_pid() == pid


def test_worker_without_secrets_lives_on_at_sighup() -> None:
    with System(settings={"worker": "none"}) as system, Worker(system) as worker:
        worker.process.send_signal(signal.SIGHUP)
        assert system.ended(system.submit("cat"))["state"] == "done"
        worker.terminate()
        assert worker.wait_exit() == 0
