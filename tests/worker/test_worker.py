"""The worker as its users see it: the contract's section 4 and what it promises of faults, on real processes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from faashound.calls.callbacks import CallbackRefused
from faashound.calls.model import QueueDamaged, QueueFull, QueueUnavailable
from faashound.calls.retries import End, Outcome
from faashound.draining.breakers import FAILURES_COUNT
from faashound.draining.shares import LEND_AFTER_S
from faashound.watchdog import OutOfResources, PeerGone, Unreachable, UpstreamTimeout
from faashound.worker import REFUSED_TEXT, outcome_of_error
from testkit.harness import crowding, free_port, http_request, noise_s, run, wait_until
from testkit.system import FUNCTIONS, Received, Receiver, Reply, System, Worker, always, in_turn, rows

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
RUNS = b'echo "$Http_X_Call_Id" >>"$TMPDIR/runs"\n'  # a script's first line, so that its runs can be counted


def runs(system: System) -> list[str]:
    """Return the ids of the calls that began with RUNS, in the order in which they ran."""
    path = system.temporary / "runs"
    return path.read_text().split() if path.exists() else []


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A system that signs its callbacks, with a short lease."""
    system = System(FUNCTIONS, {"ack_wait": "1s", "upstream_timeout": "500ms"})
    (system.temporary / "secret").write_text(SECRET)
    system.environment["callback_secret_file"] = str(system.temporary / "secret")
    with system:
        yield system


def calling(receiver: Receiver, **annotations: str) -> str:
    """Return a functions file with one function, `up`, that is `receiver`."""
    lines = [f'annotations."com.openfaas.{name.replace("__", ".")}" = "{value}"' for name, value in annotations.items()]
    return "\n".join([f'[up]\nurl = "{receiver.url("/fn")}"', *lines])


# The call


def test_worker_sends_body_path_query_and_headers_as_they_were_submitted() -> None:
    body = bytes(range(256)) * 1024
    with Receiver() as receiver, System(calling(receiver)) as system:
        headers = {"X-Mine": "ä", "Content-Type": "image/png", "X-Forwarded-For": "192.0.2.1", "X-Delay": "1ms"}
        call_id = system.submit("up/a%20b/c?d=e%26f", body, headers)
        system.ended(call_id)
        (got,) = receiver.received()
    assert (got.method, got.path, got.body) == ("POST", "/fn/a%20b/c?d=e%26f", body)
    assert (got.headers["x-mine"], got.headers["content-type"]) == ("ä", "image/png")
    assert got.headers["x-call-id"] == call_id
    assert got.headers["x-forwarded-for"] == "192.0.2.1, 127.0.0.1"
    assert got.headers["x-forwarded-host"] == f"127.0.0.1:{system.port}"
    assert "x-delay" not in got.headers


def test_call_outlasts_upstream_timeout_and_lease_and_runs_once(system: System) -> None:
    call_id = system.submit("shell", RUNS + b"sleep 2.5; echo done")
    status = system.ended(call_id)
    assert (status["state"], status["attempts"]) == ("done", 1)
    assert runs(system).count(call_id) == 1


def test_call_timeout_ends_the_function_and_is_reported_as_504() -> None:
    with Receiver() as receiver, System(FUNCTIONS, {"call_timeout": "300ms", "max_retry_attempts": "1"}) as system:
        call_id = system.submit("shell", b"sleep 60", {"X-Callback-Url": receiver.url()})
        status = system.ended(call_id)
        assert (status["state"], status["status"]) == ("dead", 504)
        system.wait_idle()
        (got,) = receiver.wait_for(1)
        assert (got.headers["x-function-status"], got.body) == ("504", b"")


def test_exec_timeout_of_the_function_holds_for_calls_of_the_worker() -> None:
    with System('[shell]\nfprocess = "sh"\nexec_timeout = "200ms"', {"max_retry_attempts": "1"}) as system:
        call_id = system.submit("shell", b"sleep 60")
        assert system.ended(call_id)["status"] == 408
        assert system.request("GET", f"/async-function/{call_id}/result").text == "Killed process.\n"


# Retries


def test_worker_tries_again_with_the_same_id_until_the_function_succeeds() -> None:
    with Receiver(in_turn(500, 429, 200)) as receiver, System(calling(receiver)) as system:
        call_id = system.submit("up", b"payload")
        status = system.ended(call_id)
        assert (status["state"], status["status"], status["attempts"]) == ("done", 200, 3)
        assert {(got.headers["x-call-id"], got.body) for got in receiver.received()} == {(call_id, b"payload")}


@pytest.mark.parametrize(
    ("status", "headers", "attempts", "state"),
    [
        (404, {}, 1, "done"),
        (503, {}, 1, "done"),
        (503, {"X-OpenFaaS-Internal": "provider"}, 3, "dead"),
        (502, {}, 3, "dead"),
        (408, {}, 3, "dead"),
    ],
)
def test_worker_retries_what_the_contract_names(
    status: int, headers: dict[str, str], attempts: int, state: str
) -> None:
    with Receiver(always(status, headers)) as receiver, System(calling(receiver)) as system:
        ended = system.ended(system.submit("up"))
        assert (ended["state"], ended["attempts"], len(receiver.received())) == (state, attempts, attempts)


def test_function_chooses_its_own_retries_by_annotation() -> None:
    with Receiver(always(418)) as receiver:
        functions = calling(receiver, retry__attempts="2", retry__codes="418", retry__min_wait="1ms")
        with System(functions) as system:
            status = system.ended(system.submit("up"))
            assert (status["state"], status["attempts"], status["status"]) == ("dead", 2, 418)


def test_retry_after_wins_over_the_backoff() -> None:
    times: list[float] = []

    def busy_once(_: Received) -> Reply:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"") if len(times) == 1 else (200, {}, b"")

    with Receiver(busy_once) as receiver, System(calling(receiver)) as system:
        assert system.ended(system.submit("up"))["state"] == "done"
    assert 1.0 <= times[1] - times[0] < 1.0 + noise_s()


def test_call_whose_stored_body_is_lost_is_a_dead_letter_at_once(system: System) -> None:
    call_id = system.submit("cat", b"x" * 100_000, {"X-Delay": "1s"})
    (system.spool / "bodies" / system.row(call_id)["file"]).unlink()
    status = system.ended(call_id)
    assert (status["state"], status["attempts"], status["status"]) == ("dead", 1, 500)
    assert "is gone" in status["error"]


# Callbacks


def test_callback_carries_the_answer_and_what_the_contract_names(system: System) -> None:
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
    standardwebhooks.Webhook(SECRET).verify(got.body, dict(got.headers))
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(got.body + b" ", dict(got.headers))


def test_failing_callback_is_repeated_and_the_function_is_not(system: System) -> None:
    with Receiver(in_turn(500, 200)) as receiver:
        call_id = system.submit("shell", RUNS, {"X-Callback-Url": receiver.url()})
        assert system.ended(call_id)["state"] == "done"
        first, second = receiver.wait_for(2)
        assert first.headers["x-call-id"] == second.headers["x-call-id"] == call_id
        status = system.until(call_id, lambda status: status["callback"]["state"] == "delivered")
        assert (status["attempts"], status["callback"]["attempts"]) == (1, 2)
    assert runs(system).count(call_id) == 1


def test_callback_that_is_not_answered_in_time_or_at_all_is_tried_again() -> None:
    waits = threading.Event()

    def stalls(_: Received) -> Reply:
        waits.wait(10)
        return 200, {}, b""

    with Receiver(stalls) as receiver, System(settings={"callback_timeout": "200ms"}) as system:
        late = system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        lost = system.submit("cat", b"", {"X-Callback-Url": f"http://127.0.0.1:{free_port()}/"})
        for call_id, error in ((late, "before the deadline"), (lost, "cannot connect")):
            status = system.until(call_id, lambda status: status.get("callback", {}).get("error"))
            assert error in status["callback"]["error"]
            assert (status["state"], status["callback"]["state"]) == ("done", "pending")
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
        status = system.until(call_id, lambda status: status.get("callback", {}).get("status") == 302)
        assert status["callback"]["state"] == "pending"
        assert [got.path for got in receiver.received()] == ["/old"]


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ((410, {}, b""), "status 410"),
        ((307, {"Location": "http://169.254.169.254/"}, b""), REFUSED_TEXT),
    ],
)
def test_callback_ends_when_nobody_wants_it_or_it_would_go_where_it_may_not(
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
    with Receiver() as receiver, function, System(calling(function)) as system:
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
        status = system.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead")
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
            healthy.wait_for(count, LEND_AFTER_S + noise_s())
        assert len(hanging.received()) == 4
        waits.set()


def test_callbacks_to_a_receiver_that_hangs_wait_until_it_answers_again() -> None:
    answers = threading.Event()

    def stalls(_: Received) -> Reply:
        answers.wait(60)
        return 200, {}, b""

    with Receiver(stalls) as receiver, System(settings={"callback_timeout": "200ms"}) as system:
        for _ in range(FAILURES_COUNT):
            system.submit("cat", b"", {"X-Callback-Url": receiver.url()})
        system.wait_log(f"callbacks to 127.0.0.1:{receiver.port} are held back")
        call_id = system.submit("cat", b"", {"X-Callback-Url": receiver.url("/later")})
        assert system.ended(call_id)["state"] == "done"
        answers.set()
        status = system.until(call_id, lambda status: status["callback"]["state"] == "delivered", 15)
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
            receiver.wait_for(begun)
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
    (tmp_path / "secrets").write_text(f"127.0.0.1 {SECRET}")
    with Receiver() as receiver, System(settings={"callback_secret_file": str(tmp_path / "secrets")}) as system:
        for host in ("127.0.0.1", "localhost"):
            system.submit("cat", b"x", {"X-Callback-Url": f"http://{host}:{receiver.port}/"})
        got = receiver.wait_for(2)
    assert {each.headers["host"].partition(":")[0]: "webhook-signature" in each.headers for each in got} == {
        "127.0.0.1": True,
        "localhost": False,
    }


# Delay, expiry, order, queues


def test_delayed_call_runs_when_it_is_due(system: System) -> None:
    started_s = time.time()
    status = system.ended(system.submit("cat", b"", {"X-Delay": "700ms"}))
    assert status["state"] == "done"
    assert 0.7 <= time.time() - started_s < 0.7 + 2 * noise_s()


def test_call_that_nobody_took_in_time_is_expired_and_never_runs() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("shell", RUNS, {"X-Expires": "300ms"})
        wait_until(lambda: time.time() > system.row(call_id)["expires_s"], 5, "its time has passed")
        with Worker(system):
            assert system.ended(call_id)["state"] == "expired"
        assert system.request("GET", f"/async-function/{call_id}/result").status == 404
        assert runs(system) == []


def test_calls_of_a_function_run_in_the_order_of_submission_and_functions_take_turns() -> None:
    functions = FUNCTIONS + '[other]\nfprocess = "sh"'
    with System(functions, {"worker": "none"}) as system:
        first = [system.submit("shell", RUNS) for _ in range(30)]
        other = system.submit("other", RUNS)
        with Worker(system, {"max_inflight": "1"}):
            system.ended(first[-1])
        order = runs(system)
    assert [call_id for call_id in order if call_id != other] == first
    assert order.index(other) <= 2, "it waits for no more than its turn"


def test_call_runs_soon_though_another_function_hangs_in_every_slot() -> None:
    functions = FUNCTIONS + '[hangs]\nfprocess = "sleep 60"\n[also-hangs]\nfprocess = "sleep 60"'
    with System(functions, {"worker": "none"}) as system, Worker(system, {"max_inflight": "8", "drain_timeout": "0"}):
        hanging = [system.submit("hangs") for _ in range(20)]
        system.until(hanging[7], lambda status: status["state"] == "running")
        also = [system.submit("also-hangs") for _ in range(20)]
        for _ in range(3):
            assert system.ended(system.submit("cat"), "5s")["state"] == "done"
        states = [[system.status(call_id)["state"] for call_id in calls].count("running") for calls in (hanging, also)]
        assert states == [8, 1]


def test_local_worker_drains_every_queue_that_a_function_names() -> None:
    with Receiver() as receiver, System(calling(receiver, queue="gpu")) as system:
        call_id = system.submit("up")
        assert system.row(call_id)["queue"] == "gpu"
        assert system.ended(call_id)["state"] == "done"


@pytest.mark.parametrize("limit", [1, 4])
def test_worker_makes_no_more_calls_at_once_than_max_inflight_and_no_fewer(limit: int) -> None:
    """Though it claims the next call while the outcome of the one before is still being recorded."""
    at_once: list[int] = []
    active, lock = 0, threading.Lock()

    def answer(_: Received) -> Reply:
        nonlocal active
        with lock:
            active += 1
            at_once.append(active)
        time.sleep(0.01)
        with lock:
            active -= 1
        return 200, {}, b""

    with Receiver(answer) as receiver, System(calling(receiver), {"worker": "none"}) as system:
        calls = [system.submit("up") for _ in range(60)]
        with Worker(system, {"max_inflight": str(limit)}):
            assert {system.ended(call_id)["state"] for call_id in calls} == {"done"}
    assert len(at_once) == len(calls)
    assert max(at_once) == limit


def test_worker_hears_of_every_call_that_comes_while_it_looks_for_work(system: System) -> None:
    """One that is put between a claim that finds nothing and its answer must not wait for the next bell."""
    for number in range(150):
        call_id = system.submit("cat", b"%d" % number)
        began_s = time.monotonic()
        assert system.ended(call_id)["state"] == "done"
        assert time.monotonic() - began_s < 5 * crowding()


def test_worker_takes_only_from_the_queues_it_is_given() -> None:
    functions = FUNCTIONS + '[slow]\nfprocess = "cat"\nannotations.com.openfaas.queue = "slow"'
    with System(functions, {"worker": "none"}) as system:
        fast, slow = system.submit("cat"), system.submit("slow")
        with Worker(system, {"queues": "slow"}):
            assert system.ended(slow)["state"] == "done"
            assert system.status(fast)["state"] == "queued"


def test_concurrency_adapts_to_a_function_that_refuses() -> None:
    functions = '[narrow]\nfprocess = "sleep 0.1"\nmax_inflight = 2\n[wide]\nfprocess = "true"'
    settings = {"max_retry_attempts": "50", "max_inflight": "16", "metrics_port": str(free_port())}
    metrics_port = free_port()
    with System(functions, settings | {"worker_metrics_port": str(metrics_port)}) as system:
        calls = [system.submit("narrow") for _ in range(40)]
        assert system.ended(system.submit("wide"), "5s")["state"] == "done", "another function is not held up"
        assert {system.ended(call_id, "30s")["state"] for call_id in calls} == {"done"}
        system.wait_log("narrow.openfaas-fn refuses calls: at most")
        shown = http_request(metrics_port, "GET", "/metrics").text
        refused = re.search(
            r'worker_attempts_total\{function_name="narrow.openfaas-fn",outcome="429"\} ([0-9.]+)', shown
        )
        assert re.search(r'worker_function_limit\{function_name="narrow\.openfaas-fn"\} [1-9]\.0', shown)
        assert "wide" not in "".join(re.findall(r"worker_function_limit\{.*", shown))
        assert refused is not None
        assert float(refused[1]) < 80, "without adapting, most attempts are refused"


def test_cancel_reaches_a_call_at_whatever_moment_it_comes() -> None:
    """Also between the claim and the start of the run, where it was once lost until the lease was renewed."""
    with System() as system:
        for _ in range(20):
            call_id = system.submit("shell", b"sleep 60")
            started_s = time.monotonic()
            assert system.request("DELETE", f"/async-function/{call_id}").status == 202
            assert system.ended(call_id)["state"] == "cancelled"
            assert time.monotonic() - started_s < noise_s(), "not with the next renewal, which is in 20 s"


# Several workers, and faults


def test_several_workers_run_each_call_once() -> None:
    with System(settings={"worker": "none"}) as system:
        calls = [system.submit("shell", RUNS) for _ in range(60)]
        with Worker(system, {"max_inflight": "3"}), Worker(system, {"max_inflight": "3"}):
            assert {system.ended(call_id)["state"] for call_id in calls} == {"done"}
        owners = rows(system.spool, "SELECT count(*) AS n FROM attempts")
        assert sorted(runs(system)) == sorted(calls)
        assert owners[0]["n"] == len(calls)


def test_sigterm_lets_what_runs_finish_and_claims_nothing_more() -> None:
    with System(settings={"worker": "none"}) as system:
        running = system.submit("shell", b"sleep 1")
        with Worker(system, {"max_inflight": "1"}) as worker:
            system.until(running, lambda status: status["state"] == "running")
            waiting = system.submit("cat")
            worker.terminate()
            assert worker.wait_exit() == 0
        assert system.status(running)["state"] == "done"
        assert system.status(waiting)["state"] == "queued"


def test_worker_hands_back_what_does_not_finish_in_time_and_another_runs_it() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("shell", b'[ -e "$TMPDIR/go" ] || sleep 60; echo done')
        with Worker(system, {"drain_timeout": "200ms"}) as worker:
            system.wait_started(2)
            worker.terminate()
            assert worker.wait_exit(5) == 0
        status = system.status(call_id)
        assert (status["state"], status["attempts"]) == ("queued", 0)
        system.wait_idle()
        (system.temporary / "go").touch()
        with Worker(system):
            assert system.ended(call_id)["state"] == "done"


def test_idle_worker_stops_at_once() -> None:
    with System(settings={"worker": "none"}) as system, Worker(system) as worker:
        started_s = time.monotonic()
        worker.terminate()
        assert worker.wait_exit() == 0
        assert time.monotonic() - started_s < noise_s()


def test_call_that_kills_each_worker_ends_as_a_dead_letter_and_blocks_nobody() -> None:
    with System(settings={"max_retry_attempts": "1"}) as system:
        poison = system.submit("shell", b"exec sleep 60")
        for begun in range(1, 5):
            system.until(poison, partial(has_begun, begun))
            os.kill(system.worker_pid(), signal.SIGKILL)
        assert system.ended(system.submit("cat", b"hello"))["state"] == "done"
        ended = system.ended(poison)
        assert (ended["state"], ended["attempts"]) == ("dead", 5)
        assert "the workers that ran it died" in ended["error"]


def test_put_that_the_queue_does_not_take_is_503_in_bounded_time(system: System) -> None:
    with (system.spool / "writer.lock").open("rb") as held:  # as by a process that was stopped in the middle of a write
        fcntl.flock(held, fcntl.LOCK_EX)
        stuck = system.request("POST", "/async-function/cat", b"x")
    assert stuck.status == 503
    assert f"held for 8 s by process {os.getpid()}" in stuck.text
    assert system.ended(system.submit("cat", b"y"))["state"] == "done"


def test_call_of_a_killed_worker_is_taken_over_and_told_of() -> None:
    with System() as system:
        call_id = system.submit("shell", RUNS + b'[ -e "$TMPDIR/go" ] || sleep 60')
        system.wait_started(2)
        (system.temporary / "go").touch()
        os.kill(system.worker_pid(), signal.SIGKILL)
        system.wait_log("the worker was ended by SIGKILL")
        status = system.ended(call_id)
        assert (status["state"], status["attempts"]) == ("done", 2)
        whole = json.loads(system.request("GET", f"/system/calls/{call_id}").body)
        assert [attempt.get("error") for attempt in whole["history"]] == ["the worker that ran it is gone", None]


def has_begun(count: int, status: dict[str, Any]) -> bool:
    """Tell whether a call's run number `count` is under way."""
    return (status["state"], status["attempts"]) == ("running", count)


def test_suspended_worker_does_not_overwrite_what_its_successor_recorded() -> None:
    script = RUNS + b'wc -l <"$TMPDIR/runs"; sleep 0.5'
    with System(settings={"worker": "none"}) as system, Worker(system, {"ack_wait": "1s"}) as first:
        call_id = system.submit("shell", script)
        system.wait_started(2)
        first.process.send_signal(signal.SIGSTOP)
        with Worker(system, {"ack_wait": "1s"}):
            status = system.ended(call_id)
            assert (status["state"], status["attempts"]) == ("done", 2)
            first.process.send_signal(signal.SIGCONT)
            first.wait_log("the lease was lost")
            assert system.request("GET", f"/async-function/{call_id}/result").text.strip() == "2"
            assert system.status(call_id) == status


def test_worker_that_slept_past_its_own_lease_ends_the_earlier_run() -> None:
    script = RUNS + b'[ "$(wc -l <"$TMPDIR/runs")" -gt 1 ] || sleep 60; echo second'
    with System(settings={"worker": "none"}) as system, Worker(system, {"ack_wait": "1s"}) as worker:
        call_id = system.submit("shell", script)
        system.wait_started(2)
        worker.process.send_signal(signal.SIGSTOP)
        until_s = rows(system.spool, "SELECT until_s FROM leases")[0]["until_s"]
        wait_until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > until_s, 5, "the lease has run out")
        run("worker", ["dead", "list"], {"queue_url": f"spool:{system.spool}"})  # whoever opens the queue takes it back
        assert rows(system.spool, "SELECT * FROM leases") == []
        worker.process.send_signal(signal.SIGCONT)
        assert system.ended(call_id)["state"] == "done"
        assert system.request("GET", f"/async-function/{call_id}/result").text == "second\n"
        system.wait_idle()


def test_worker_waits_for_a_gateway_that_is_not_there_yet() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("cat")
        port = free_port()
        settings = {"gateway_url": f"http://127.0.0.1:{port}", "max_retry_attempts": "100"}
        with Worker(system, settings) as worker:
            worker.wait_log("to be tried again")
            successor = System(settings={"worker": "none", "port": str(port)}, spool=system.spool)
            with successor:
                assert successor.ended(call_id)["state"] == "done"


def test_outcome_is_recorded_when_the_queue_comes_back_and_the_call_does_not_run_again() -> None:
    with System() as system:
        call_id = system.submit("shell", RUNS + b'until [ -e "$TMPDIR/go" ]; do sleep 0.05; done; echo done')
        system.until(call_id, lambda status: status["state"] == "running")
        wait_until(lambda: runs(system), 5, "it runs")
        path = system.spool / "spool.sqlite3"
        path.rename(system.spool / "away")
        (system.temporary / "go").touch()
        system.wait_log("the outcome cannot be recorded yet")
        (system.spool / "away").rename(path)
        status = system.ended(call_id)
        assert (status["state"], status["attempts"], runs(system)) == ("done", 1, [call_id])


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_full_disk_is_507_and_is_noticed_when_there_is_room_again(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)  # needs root, as in CI
    try:
        with System(spool=tmp_path / "spool") as system:
            fill(tmp_path / "filler")
            answers = [system.request("POST", "/async-function/cat", b"x" * 70_000) for _ in range(3)]
            assert {answer.status for answer in answers} == {507}
            (tmp_path / "filler").unlink()
            assert system.ended(system.submit("cat", b"x" * 70_000))["state"] == "done"
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("size", [10, 200_000], ids=["no connection can be opened", "no body can be read"])
def test_call_uses_up_no_attempt_when_its_worker_has_no_descriptors(size: int) -> None:
    with System(settings={"worker": "none"}) as system, Worker(system, {"max_retry_attempts": "1"}) as worker:
        pid = worker.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        if size > 10:  # a kept connection: only the body is in want of a descriptor
            system.ended(system.submit("cat"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        call_id = system.submit("cat", b"x" * size)
        assert "Too many open files" in worker.wait_log("handed back")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        status = system.ended(call_id)
        assert (status["state"], status["status"], status["attempts"]) == ("done", 200, 1)


def test_results_and_calls_are_kept_as_long_as_asked_and_dead_letters_for_ever() -> None:
    with System(settings={"keep_results": "1s", "retention": "3s", "max_retry_attempts": "1"}) as system:
        done, dead = system.submit("cat", b"x"), system.submit("shell", b"exit 1")
        system.ended(done)
        assert system.ended(dead)["state"] == "dead"

        def result_status(call_id: str) -> int:
            return system.request("GET", f"/async-function/{call_id}/result").status

        assert result_status(done) == 200
        wait_until(lambda: result_status(done) == 410, 5, "the result is gone")
        assert system.status(done)["state"] == "done"
        wait_until(lambda: result_status(done) == 404, 8, "the call is forgotten")
        assert (system.status(dead)["state"], result_status(dead)) == ("dead", 410)


OUTCOMES = {
    "timed out": (UpstreamTimeout("late"), End.TIMED_OUT, "late"),
    "cannot connect": (Unreachable("refused"), End.UNREACHABLE, "refused"),
    "cut short": (PeerGone("cut"), End.UNREACHABLE, "cut"),
    "no descriptors for a connection": (OutOfResources("too many"), End.PREVENTED, "too many"),
    "no descriptors for a body": (QueueUnavailable("too many"), End.PREVENTED, "too many"),
    "no room": (QueueFull("full"), End.PREVENTED, "full"),
    "lost": (QueueDamaged("gone"), End.UNREADABLE, "gone"),
    "an inner address": (CallbackRefused("10.0.0.1 is private"), End.REFUSED, REFUSED_TEXT),
    "a fault": (ValueError("secret"), End.FAILED, "a fault of the worker: see its log"),
}


@pytest.mark.parametrize(("error", "end", "text"), OUTCOMES.values(), ids=OUTCOMES)
def test_attempt_that_raises_has_an_outcome(error: Exception, end: End, text: str) -> None:
    assert outcome_of_error(error, "id") == Outcome(end, error=text)


# Settings


def test_worker_names_every_bad_setting() -> None:
    ended = run("worker", settings={"max_inflight": "0", "backoff": "fast", "callback_allow": "a b", "ack_wait": "0"})
    assert ended.returncode == 2
    for name in ("max_inflight='0'", "backoff='fast'", "callback_allow='a b'", "ack_wait='0'"):
        assert name in ended.stderr


@pytest.mark.parametrize(
    ("text", "told"), [("short", "line 1"), (f"{SECRET}\na.example whsec_%%%", "line 2"), ("", "no secret")]
)
def test_worker_refuses_a_bad_secret_without_showing_it(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "secret").write_text(text)
    settings = {"callback_secret_file": str(tmp_path / "secret"), "queue_url": f"spool:{tmp_path}/spool"}
    ended = run("worker", settings=settings | {"metrics_port": "0"})
    assert ended.returncode == 1
    assert told in ended.stderr
    assert not text or text.split()[-1] not in ended.stderr


def test_worker_shows_version_and_help() -> None:
    assert run("worker", ["--version"]).stdout.startswith("faashound ")
    assert "drain_timeout" in run("worker", ["--help"]).stdout
    assert run("worker", ["--what"]).returncode == 2


def test_worker_answers_healthz_and_metrics() -> None:
    port = free_port()
    with System(settings={"worker": "none"}) as system, Worker(system, {"metrics_port": str(port)}):
        call_id = str(uuid.uuid4())
        system.ended(system.submit("cat", b"", {"X-Call-Id": call_id}))
        assert http_request(port, "GET", "/healthz").text == "OK"
        assert http_request(port, "POST", "/healthz").status == 405
        text = http_request(port, "GET", "/metrics").text
    assert 'worker_attempts_total{function_name="cat.openfaas-fn",outcome="200"} 1.0' in text
    assert 'worker_in_flight{kind="call"} 0.0' in text
