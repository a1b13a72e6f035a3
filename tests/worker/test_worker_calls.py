"""How the worker makes calls: what it sends, when it tries again, in which order, how many at once."""

from __future__ import annotations

import re
import threading
import time

import pytest

from testkit.harness import free_port, http_request, noise_s, wait_until
from testkit.system import (
    FUNCTIONS,
    NOTES_RUN,
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

# The call


def test_worker_sends_body_path_query_and_headers_as_they_were_submitted() -> None:
    body = bytes(range(256)) * 1024
    with Receiver() as receiver, System(functions_at(receiver)) as system:
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
    call_id = system.submit("shell", NOTES_RUN + b"sleep 6.5; echo done")
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
    with Receiver(in_turn(500, 429, 200)) as receiver, System(functions_at(receiver)) as system:
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
def test_worker_retries_the_listed_codes_and_failures_of_the_gateway(
    status: int, headers: dict[str, str], attempts: int, state: str
) -> None:
    with Receiver(always(status, headers)) as receiver, System(functions_at(receiver)) as system:
        ended = system.ended(system.submit("up"))
        assert (ended["state"], ended["attempts"], len(receiver.received())) == (state, attempts, attempts)


def test_function_chooses_its_own_retries_by_annotation() -> None:
    with Receiver(always(418)) as receiver:
        functions = functions_at(receiver, retry__attempts="2", retry__codes="418", retry__min_wait="1ms")
        with System(functions) as system:
            status = system.ended(system.submit("up"))
            assert (status["state"], status["attempts"], status["status"]) == ("dead", 2, 418)


def test_retry_after_wins_over_the_backoff() -> None:
    times: list[float] = []

    def busy_once(_: Received) -> Reply:
        times.append(time.monotonic())
        return (429, {"Retry-After": "1"}, b"") if len(times) == 1 else (200, {}, b"")

    with Receiver(busy_once) as receiver, System(functions_at(receiver)) as system:
        assert system.ended(system.submit("up"))["state"] == "done"
    assert times[1] - times[0] >= 1.0


def test_call_whose_stored_body_is_lost_is_a_dead_letter_at_once() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("cat", b"x" * 100_000)
        (system.spool / "bodies" / system.row(call_id)["file"]).unlink()
        with Worker(system):
            status = system.ended(call_id)
    assert (status["state"], status["attempts"], status["status"]) == ("dead", 1, 500)
    assert "is gone" in status["error"]


# Delay, expiry, order, queues


def test_delayed_call_runs_when_it_is_due(system: System) -> None:
    def is_in_time() -> bool:
        started_s = time.time()
        status = system.ended(system.submit("cat", b"", {"X-Delay": "700ms"}))
        assert status["state"] == "done"
        took_s = time.time() - started_s
        assert took_s >= 0.7
        return took_s < 0.7 + 2 * noise_s()

    assert any(is_in_time() for _ in range(4)), "one may be held up by what else the machine does, not each"


def test_call_that_no_worker_took_in_time_is_expired_and_never_runs() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("shell", NOTES_RUN, {"X-Expires": "300ms"})
        wait_until(lambda: time.time() > system.row(call_id)["expires_s"], 5, "its time has passed")
        with Worker(system):
            assert system.ended(call_id)["state"] == "expired"
        assert system.request("GET", f"/async-function/{call_id}/result").status == 404
        assert runs(system) == []


def test_calls_of_a_function_run_in_the_order_of_submission_and_functions_take_turns() -> None:
    functions = FUNCTIONS + '[other]\nfprocess = "sh"'
    with System(functions, {"worker": "none"}) as system:
        first = [system.submit("shell", NOTES_RUN) for _ in range(30)]
        other = system.submit("other", NOTES_RUN)
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
            assert system.ended(system.submit("cat"))["state"] == "done"
        states = [[system.status(call_id)["state"] for call_id in calls].count("running") for calls in (hanging, also)]
        assert states == [8, 1]


def test_local_worker_drains_every_queue_that_a_function_names() -> None:
    with Receiver() as receiver, System(functions_at(receiver, queue="gpu")) as system:
        call_id = system.submit("up")
        assert system.row(call_id)["queue"] == "gpu"
        assert system.ended(call_id)["state"] == "done"


@pytest.mark.parametrize("limit", [1, 4])
def test_worker_makes_no_more_calls_at_once_than_max_inflight_and_no_fewer(limit: int) -> None:
    """Though it claims the next call while the outcome of the one before is still being recorded."""
    at_once: list[int] = []
    active, lock, is_full = 0, threading.Lock(), threading.Event()

    def answer(_: Received) -> Reply:
        nonlocal active
        with lock:
            active += 1
            at_once.append(active)
            if active >= limit:
                is_full.set()
        is_full.wait(60)  # the first ones, for those that may come besides
        time.sleep(0.01)
        with lock:
            active -= 1
        return 200, {}, b""

    with Receiver(answer) as receiver, System(functions_at(receiver), {"worker": "none"}) as system:
        calls = [system.submit("up") for _ in range(60)]
        with Worker(system, {"max_inflight": str(limit)}):
            assert {system.ended(call_id)["state"] for call_id in calls} == {"done"}
    assert len(at_once) == len(calls)
    assert max(at_once) == limit


def test_worker_hears_of_every_call_that_comes_while_it_looks_for_work() -> None:
    """One that is put between a claim that finds nothing and its answer must not wait for the next wake-up."""
    with System(settings={"ack_wait": "10m"}) as system:
        for number in range(150):
            assert system.ended(system.submit("cat", b"%d" % number))["state"] == "done"


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
        assert system.ended(system.submit("wide"))["state"] == "done", "another function is not held up"
        assert {system.ended(call_id, 30)["state"] for call_id in calls} == {"done"}
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
            assert time.monotonic() - started_s < 15, "not with the next renewal, which is in 20 s"
