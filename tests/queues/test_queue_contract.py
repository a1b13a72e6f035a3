"""What every queue promises to gateways, workers and people: one behaviour a test, by its public interface."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from faashound.calls.model import (
    EXCERPT_BYTES,
    HISTORY_COUNT,
    INLINE_BYTES,
    Callback,
    CallbackState,
    CallExists,
    CallFinished,
    CallNotDead,
    CallUnknown,
    KeyReused,
    Lease,
    LeaseLost,
    QueueUnavailable,
    State,
    destination_of,
)
from faashound.calls.names import parse_function_name
from faashound.calls.steps import EXPIRED_ERROR, EXPIRED_STATUS, LOST_ERROR
from faashound.queues.spool.limits import STEP_COUNT
from faashound.watchdog import BodyTooLarge
from testkit.harness import eventually
from testkit.queue_kit import (
    LEASE_S,
    QUEUE,
    START_S,
    Desk,
    JetDesk,
    SpoolDesk,
    finish,
    inline,
    new_call,
    pieces,
    read_all,
)

LONG_S = 20.0  # how long a test waits for what should come at once
F, G = parse_function_name("f"), parse_function_name("g")
DYING_COUNT = STEP_COUNT + 50  # more than a queue ends in one step


@pytest.fixture(params=["spool", "jetstream"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    desk: Desk
    if request.param == "spool":
        desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    else:
        desk = JetDesk(request.getfixturevalue("options"), uvloop.new_event_loop)
    yield desk
    desk.close()


# -- putting


def test_put_returns_what_get_finds_after_a_restart(desk: Desk) -> None:
    call = desk.put(
        path="/a/ü%20b",
        query="x=1&y",
        method="PUT",
        headers=(("Content-Type", "text/plain"), ("X-Odd", "caf\xe9 \x80"), ("X-Odd", "")),
        body=inline(bytes(range(256))),
        callback_url="http://caller/done",
        due_s=START_S + 5,
        expires_s=START_S + 50,
        idempotency_key="k",
    )
    desk.do(desk.queue.close())
    assert desk.do(desk.open().get(call.id)) == call
    assert (call.state, call.attempts, call.history) == (State.QUEUED, 0, ())


def test_put_returns_the_first_call_when_function_and_key_are_known(desk: Desk) -> None:
    first = desk.put(idempotency_key="k")
    second = desk.put(idempotency_key="k", body=desk.do(desk.queue.store_body(desk.big())))
    assert second == first
    assert desk.bodies() == set()  # the new body was dropped


def test_put_keeps_the_first_body_when_the_same_call_is_put_again(desk: Desk) -> None:
    body = desk.do(desk.queue.store_body(desk.big()))
    desk.put(idempotency_key="k", body=body)
    again = desk.put(idempotency_key="k", body=body)
    assert desk.do(read_all(desk.queue, again.body)) == desk.big()


def test_put_returns_the_call_as_it_is_now_when_the_key_is_known(desk: Desk) -> None:
    desk.put(idempotency_key="k")
    desk.finish(desk.claim_one())
    assert desk.put(idempotency_key="k").state is State.DONE


def test_put_makes_a_new_call_when_the_key_belongs_to_another_function(desk: Desk) -> None:
    assert desk.put("f", idempotency_key="k").id != desk.put("g", idempotency_key="k").id


def test_put_returns_the_first_call_when_the_key_comes_with_the_same_request(desk: Desk) -> None:
    first = desk.put(idempotency_key="k", body_digest="a" * 64)
    desk.finish(desk.claim_one())
    again = desk.put(idempotency_key="k", body_digest="a" * 64)
    assert (again.id, again.body_digest) == (first.id, "a" * 64)


def test_put_is_refused_and_drops_the_body_when_the_key_comes_with_another_request(desk: Desk) -> None:
    first = desk.put(idempotency_key="k", body_digest="a" * 64)
    body = desk.do(desk.queue.store_body(desk.big()))
    with pytest.raises(KeyReused, match="another request to f before") as refusal:
        desk.put(idempotency_key="k", body_digest="b" * 64, body=body)
    assert refusal.value.status == 422
    assert first.id not in str(refusal.value)  # it may be another caller's
    assert desk.bodies() == set()
    assert desk.put("f.prod", idempotency_key="k", body_digest="b" * 64).id != first.id


@pytest.mark.parametrize("digests", [(None, "b" * 64), ("a" * 64, None)], ids=["of-an-earlier-version", "unknown"])
def test_put_takes_a_request_without_a_digest_for_the_same(desk: Desk, digests: tuple[str | None, str | None]) -> None:
    first, second = (desk.put(idempotency_key="k", body_digest=digest) for digest in digests)
    assert second.id == first.id


def test_put_makes_a_new_call_when_the_key_belongs_to_another_namespace(desk: Desk) -> None:
    assert desk.put("f.prod", idempotency_key="k").id != desk.put("f.dev", idempotency_key="k").id


def test_put_raises_and_drops_the_body_when_the_id_is_in_use(desk: Desk) -> None:
    first = desk.put()
    with pytest.raises(CallExists, match=first.id):
        desk.put("g", id=first.id, body=desk.do(desk.queue.store_body(desk.big())))
    assert desk.get(first.id) == first
    assert desk.bodies() == set()


def test_put_is_refused_when_the_queue_is_closed(desk: Desk) -> None:
    desk.do(desk.queue.close())
    with pytest.raises(QueueUnavailable, match="closed"):
        desk.put()


# -- claiming


def test_claim_marks_the_call_and_counts_the_attempt(desk: Desk) -> None:
    call = desk.put()
    desk.clock.now_s += 3
    lease = desk.claim_one()
    expected = dataclasses.replace(call, state=State.RUNNING, attempts=1, started_s=desk.clock.now_s)
    assert lease.call == expected == desk.get(call.id)
    assert (lease.kind, lease.owner) == ("call", desk.owner)


def test_claim_takes_the_calls_of_a_function_by_due_time_then_id(desk: Desk) -> None:
    late, low, high = "b" * 36, "c" * 36, "d" * 36
    desk.put(id=high, due_s=START_S - 5)
    desk.put(id=late, due_s=START_S)
    desk.put(id=low, due_s=START_S - 5)
    assert [lease.call.id for lease in desk.claim()] == [low, high, late]


def test_claim_leaves_a_delayed_call_until_it_is_due(desk: Desk) -> None:
    desk.put(due_s=START_S + 10)
    assert desk.claim() == []
    desk.clock.now_s += 10
    assert len(desk.claim()) == 1


def test_claim_gives_no_call_twice(desk: Desk) -> None:
    desk.put()
    assert len(desk.claim()) == 1
    assert desk.claim() == []


def test_claim_takes_no_more_than_the_limit(desk: Desk) -> None:
    for _ in range(5):
        desk.put()
    assert [len(desk.claim(limit)) for limit in (0, 2, 2, 2)] == [0, 2, 2, 1]


def test_claim_looks_only_into_the_queues_named(desk: Desk) -> None:
    desk.put(queue="slow")
    assert desk.claim() == []
    assert len(desk.do(desk.queue.claim(["slow", QUEUE], desk.owner, LEASE_S, 5))) == 1


def test_claim_expires_what_waited_too_long(desk: Desk) -> None:
    call = desk.put(expires_s=START_S + 10)
    desk.clock.now_s += 10
    assert desk.claim() == []
    expired = desk.get(call.id)
    assert (expired.state, expired.finished_s, expired.callback) == (State.EXPIRED, START_S + 10, None)
    assert (expired.status, expired.error, expired.attempts) == (EXPIRED_STATUS, EXPIRED_ERROR, 0)


@pytest.mark.parametrize("way", ["claim", "sweep"])
def test_call_that_expires_before_its_first_run_gets_its_callback(desk: Desk, way: str) -> None:
    call = desk.put(expires_s=START_S + 10, callback_url="http://caller/")
    desk.clock.now_s += 10
    if way == "claim":
        assert desk.claim() == []
    else:
        assert desk.do(desk.queue.sweep(60, 60)).expired_count == 1
    lease = desk.claim_callback()
    assert (lease.call.id, lease.call.state, lease.call.status) == (call.id, State.EXPIRED, EXPIRED_STATUS)
    assert (lease.call.result, lease.call.result_headers, lease.call.attempts) == (None, (), 0)
    desk.clock.now_s += 1000
    assert desk.do(desk.queue.sweep(60, 60)).call_count == 0  # not before it is delivered
    desk.do(desk.queue.callback_done(lease, desk.attempt()))
    assert desk.do(desk.queue.sweep(60, 60)).call_count == 1


def test_call_that_expires_between_attempts_keeps_what_the_last_one_gave(desk: Desk) -> None:
    call = desk.put(expires_s=START_S + 10, callback_url="http://caller/")
    desk.do(desk.queue.retry(desk.claim_one(), attempt=desk.attempt(429, "busy"), due_s=START_S + 5))
    desk.clock.now_s += 10
    assert desk.claim() == []
    expired = desk.get(call.id)
    assert (expired.state, expired.status, expired.error) == (State.EXPIRED, 429, "busy")
    assert desk.claim_callback().call.id == call.id


def test_worker_is_woken_by_the_callback_of_a_call_that_expires(desk: Desk) -> None:
    desk.put(expires_s=START_S + 10, callback_url="http://caller/")
    assert desk.do(desk.queue.wait_for_work(0))
    desk.clock.now_s += 10
    desk.do(desk.queue.sweep(60, 60))
    assert desk.do(desk.queue.wait_for_work(LONG_S))


def test_call_that_is_cancelled_in_the_queue_has_no_callback(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.do(desk.queue.cancel(call.id))
    assert desk.get(call.id).callback is None
    assert desk.claim_callbacks() == []


def test_claim_comes_to_live_calls_behind_more_expired_ones_than_a_step(desk: Desk) -> None:
    async def scenario() -> None:
        dying = [new_call(expires_s=START_S + 1) for _ in range(DYING_COUNT)]
        await asyncio.gather(*map(desk.queue.put, dying))

    desk.do(scenario())
    live = desk.put(due_s=START_S + 1)
    desk.clock.now_s += 2
    assert [lease.call.id for lease in desk.claim(5)] == [live.id]


def test_claim_passes_over_a_cancelled_call(desk: Desk) -> None:
    desk.do(desk.queue.cancel(desk.put().id))
    assert desk.claim() == []


def functions(leases: list[Lease]) -> str:
    return "".join(lease.call.function.name for lease in leases)


def by_function(capacity: dict[str, int]) -> dict[str, int]:
    return {parse_function_name(name): count for name, count in capacity.items()}


@pytest.mark.parametrize(
    ("queued", "limit", "expected"),
    [
        pytest.param("aaaab", 2, "ab", id="one-of-each"),
        pytest.param("aaaabbc", 7, "abcabaa", id="round-after-round"),
        pytest.param("aaaabc", 5, "abcaa", id="what-the-short-flows-leave"),
        pytest.param("cba", 2, "ab", id="not-by-arrival"),
    ],
)
def test_claim_takes_turns_between_functions(desk: Desk, queued: str, limit: int, expected: str) -> None:
    for function in queued:
        desk.put(function)
    assert functions(desk.claim(limit)) == expected


def test_claim_goes_on_behind_the_function_it_served_last(desk: Desk) -> None:
    for function in "aaaabbbbcccc":
        desk.put(function)
    assert "".join(functions(desk.claim(limit)) for limit in (1, 1, 1, 2, 2, 1)) == "abcabcab"


def test_claim_serves_a_function_beside_a_long_backlog_with_its_first_turn(desk: Desk) -> None:
    async def scenario() -> None:
        await asyncio.gather(*(desk.queue.put(new_call("bulk")) for _ in range(2000)))

    desk.do(scenario())
    desk.claim(1)
    desk.put("rare")
    served = [desk.claim_one().call.function.name for _ in range(2)]
    assert "rare" in served


def test_claim_takes_turns_between_queues(desk: Desk) -> None:
    for name in ("q1", "q2"):
        for _ in range(3):
            desk.put(name, queue=name)

    async def claim() -> str:
        return functions(await desk.queue.claim(["q1", "q2"], desk.owner, LEASE_S, 1))

    assert "".join(desk.do(claim()) for _ in range(4)) == "q1q2q1q2"


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        pytest.param({"a": 0}, "bbb", id="none-of-a"),
        pytest.param({"a": 1, "b": 2}, "abb", id="some-of-each"),
        pytest.param({"a": 9, "b": 9, "c": 0}, "ababab", id="more-than-calls"),
    ],
)
def test_claim_takes_no_more_of_a_function_than_its_capacity(
    desk: Desk, capacity: dict[str, int], expected: str
) -> None:
    for function in "aaabbb":
        desk.put(function)
    assert functions(desk.claim(capacity=by_function(capacity))) == expected


def test_claim_counts_the_capacity_of_a_function_once_for_all_queues(desk: Desk) -> None:
    for name in ("q1", "q2"):
        desk.put("f", queue=name)
    assert len(desk.do(desk.queue.claim(["q1", "q2"], desk.owner, LEASE_S, 9, by_function({"f": 1})))) == 1


def test_claim_takes_functions_of_two_namespaces_for_two(desk: Desk) -> None:
    for function in ("f.dev", "f.dev", "f.prod", "f.prod"):
        desk.put(function)
    assert [lease.call.function for lease in desk.claim(3, capacity=by_function({"f.dev": 1}))] == [
        "f.dev",
        "f.prod",
        "f.prod",
    ]


def test_claim_is_refused_for_an_owner_not_enlisted_here(desk: Desk) -> None:
    with pytest.raises(AssertionError, match="enlisted"):
        desk.do(desk.queue.claim([QUEUE], "stranger", LEASE_S, 1))


def test_claim_gives_back_what_no_caller_waits_for_any_more(desk: Desk) -> None:
    call = desk.put()

    async def scenario() -> None:
        task = asyncio.create_task(desk.queue.claim([QUEUE], desk.owner, LEASE_S, 1))
        await asyncio.sleep(0)  # it has been submitted
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while not (leases := await desk.queue.claim([QUEUE], desk.owner, LEASE_S, 1)):
            await desk.queue.wait_for_work(LONG_S)
        assert [lease.call.attempts for lease in leases] == [1]

    desk.do(scenario())
    assert desk.get(call.id).state is State.RUNNING


# -- ending a run


def test_finish_records_the_outcome(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    attempt = desk.attempt(201)
    desk.finish(lease, attempt=attempt, status=201, duration_s=0.25, result=b"x" * 5000, result_headers=(("A", "b"),))
    done = desk.get(call.id)
    assert (done.state, done.status, done.error, done.duration_s) == (State.DONE, 201, None, 0.25)
    assert (done.result, done.result_headers) == (inline(b"x" * 5000), (("A", "b"),))
    assert (done.excerpt, done.history) == (b"x" * EXCERPT_BYTES, (attempt,))
    assert (done.finished_s, done.callback) == (attempt.finished_s, None)


def test_finish_keeps_an_excerpt_of_a_result_in_a_file(desk: Desk) -> None:
    call = desk.put()
    desk.do(finish(desk.queue, desk.claim_one(), State.DEAD, desk.do(desk.queue.store_body(desk.big()))))
    dead = desk.get(call.id)
    assert (dead.state, dead.excerpt) == (State.DEAD, desk.big()[:EXCERPT_BYTES])


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.CANCELLED, State.EXPIRED])
def test_finish_accepts_no_state_but_done_and_dead(desk: Desk, state: State) -> None:
    desk.put()
    lease = desk.claim_one()
    with pytest.raises(AssertionError, match=state.value):
        desk.finish(lease, state)


def test_retry_queues_the_call_again_with_what_is_known(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    attempt = desk.attempt(503, "busy")
    state = desk.do(desk.queue.retry(lease, attempt=attempt, due_s=START_S + 10, excerpt=b"y" * 9999))
    queued = desk.get(call.id)
    assert state is queued.state is State.QUEUED
    assert (queued.due_s, queued.attempts, queued.status, queued.error) == (START_S + 10, 1, 503, "busy")
    assert (queued.excerpt, queued.result, queued.history) == (b"y" * EXCERPT_BYTES, None, (attempt,))


def test_retried_call_ends_with_the_last_response_only(desk: Desk) -> None:
    call = desk.put()
    desk.do(desk.queue.retry(desk.claim_one(), attempt=desk.attempt(503), due_s=START_S, excerpt=b"first"))
    desk.finish(desk.claim_one(), State.DEAD, result=None)
    assert desk.get(call.id).excerpt is None


def test_call_remembers_its_last_attempts_only(desk: Desk) -> None:
    call = desk.put()
    for number in range(HISTORY_COUNT + 3):
        desk.do(desk.queue.retry(desk.claim_one(), attempt=desk.attempt(error=str(number)), due_s=START_S))
    history = desk.get(call.id).history
    assert [attempt.error for attempt in history] == [str(number) for number in range(3, HISTORY_COUNT + 3)]


def test_release_returns_the_call_to_its_place_and_uncounts_the_attempt(desk: Desk) -> None:
    first = desk.put(due_s=START_S - 1)
    desk.put()
    desk.do(desk.queue.release(desk.claim_one()))
    assert desk.get(first.id).attempts == 0
    assert desk.claim_one().call.id == first.id


# -- cancelling


def test_cancel_ends_a_queued_call_at_once(desk: Desk) -> None:
    call = desk.put()
    assert desk.do(desk.queue.cancel(call.id)) is State.CANCELLED
    cancelled = desk.get(call.id)
    assert (cancelled.state, cancelled.finished_s) == (State.CANCELLED, START_S)


def test_cancel_of_a_running_call_reaches_its_worker(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    other = desk.open()

    async def scenario() -> frozenset[str]:
        assert await other.cancel(call.id) is State.RUNNING
        assert await desk.queue.wait_for_cancel(LONG_S)
        return await desk.queue.cancelled_ids(desk.owner)

    assert desk.do(scenario()) == {call.id}
    assert desk.do(desk.queue.renew([lease], LEASE_S)).cancelled == {call.id}


def test_finish_cancelled_ends_a_run_that_was_stopped(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    lease = desk.claim_one()
    desk.do(desk.queue.cancel(call.id))
    desk.do(desk.queue.finish_cancelled(lease, desk.attempt(None, "cancelled")))
    cancelled = desk.get(call.id)
    assert (cancelled.state, cancelled.error, cancelled.callback) == (State.CANCELLED, "cancelled", None)


def test_finish_counts_when_a_cancel_came_too_late(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    desk.do(desk.queue.cancel(call.id))
    desk.finish(lease)
    assert desk.get(call.id).state is State.DONE


@pytest.mark.parametrize("way", ["retry", "release", "death"])
def test_call_that_would_run_again_is_cancelled_when_that_was_asked_for(desk: Desk, way: str) -> None:
    call = desk.put()
    lease = desk.claim_one(lease_s=0.0)
    desk.do(desk.queue.cancel(call.id))
    if way == "retry":
        assert desk.do(desk.queue.retry(lease, attempt=desk.attempt(), due_s=START_S)) is State.CANCELLED
    elif way == "release":
        desk.do(desk.queue.release(lease))
    else:
        assert desk.do(desk.queue.reclaim()) == 1
    assert desk.get(call.id).state is State.CANCELLED
    assert desk.claim() == []


def test_cancel_is_refused_when_the_call_has_ended(desk: Desk) -> None:
    call = desk.put()
    desk.finish(desk.claim_one())
    with pytest.raises(CallFinished, match="done"):
        desk.do(desk.queue.cancel(call.id))


def test_cancel_is_refused_when_the_call_is_unknown(desk: Desk) -> None:
    with pytest.raises(CallUnknown):
        desk.do(desk.queue.cancel("unknown"))


# -- leases

ENDINGS: dict[str, Callable[[Desk, Lease], Coroutine[Any, Any, object]]] = {
    "finish": lambda desk, lease: finish(desk.queue, lease, State.DONE, inline(b"late")),
    "retry": lambda desk, lease: desk.queue.retry(lease, attempt=desk.attempt(), due_s=START_S),
    "release": lambda desk, lease: desk.queue.release(lease),
    "finish_cancelled": lambda desk, lease: desk.queue.finish_cancelled(lease, desk.attempt()),
}
CALLBACK_ENDINGS: dict[str, Callable[[Desk, Lease], Coroutine[Any, Any, object]]] = {
    "callback_done": lambda desk, lease: desk.queue.callback_done(lease, desk.attempt()),
    "callback_retry": lambda desk, lease: desk.queue.callback_retry(lease, desk.attempt(), START_S),
    "callback_dead": lambda desk, lease: desk.queue.callback_dead(lease, desk.attempt()),
    "release": lambda desk, lease: desk.queue.release(lease),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_worker_whose_lease_has_passed_on_changes_nothing(desk: Desk, name: str) -> None:
    desk.put()
    old = desk.claim_one(lease_s=0.0)
    desk.do(desk.queue.reclaim())
    new = desk.claim_one()
    assert new.fence > old.fence
    before = desk.get(old.call.id)
    with pytest.raises(LeaseLost):
        desk.do(ENDINGS[name](desk, old))
    assert desk.get(old.call.id) == before
    desk.finish(new)


@pytest.mark.parametrize("name", CALLBACK_ENDINGS)
def test_worker_whose_callback_lease_has_passed_on_changes_nothing(desk: Desk, name: str) -> None:
    desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    old = desk.claim_callback(lease_s=0.0)
    desk.do(desk.queue.reclaim())
    new = desk.claim_callback()
    before = desk.get(old.call.id)
    with pytest.raises(LeaseLost):
        desk.do(CALLBACK_ENDINGS[name](desk, old))
    assert desk.get(old.call.id) == before
    desk.do(desk.queue.callback_done(new, desk.attempt()))


@pytest.mark.parametrize("name", ENDINGS)
def test_worker_ends_a_lease_only_once(desk: Desk, name: str) -> None:
    desk.put()
    lease = desk.claim_one()
    desk.do(ENDINGS[name](desk, lease))
    with pytest.raises(LeaseLost):
        desk.do(ENDINGS[name](desk, lease))


def test_lease_is_only_good_for_its_owner(desk: Desk) -> None:
    desk.put()
    lease = desk.claim_one()
    with pytest.raises(LeaseLost):
        desk.finish(dataclasses.replace(lease, owner="another"))


def test_lease_on_a_call_is_not_one_on_its_callback(desk: Desk) -> None:
    desk.put(callback_url="http://caller/")
    lease = desk.claim_one()
    with pytest.raises(AssertionError, match="callback"):
        desk.do(desk.queue.callback_done(lease, desk.attempt()))


def test_finish_drops_the_file_of_a_result_that_came_too_late(desk: Desk) -> None:
    desk.put()
    old = desk.claim_one(lease_s=0.0)
    desk.do(desk.queue.reclaim())
    with pytest.raises(LeaseLost):
        desk.do(finish(desk.queue, old, State.DONE, desk.do(desk.queue.store_body(desk.big()))))
    assert desk.bodies() == set()


def test_reclaim_returns_a_lapsed_call_with_the_lost_attempt_in_its_history(desk: Desk) -> None:
    desk.put()
    old = desk.claim_one(lease_s=0.0)
    assert desk.do(desk.queue.reclaim()) == 1
    call = desk.get(old.call.id)
    assert (call.state, call.attempts, call.error) == (State.QUEUED, 1, LOST_ERROR)
    assert [attempt.error for attempt in call.history] == [LOST_ERROR]


def test_reclaim_leaves_what_a_living_owner_holds(desk: Desk) -> None:
    desk.put()
    desk.claim_one()
    assert desk.do(desk.open().reclaim()) == 0


def test_renew_keeps_a_lease_from_lapsing_and_names_those_that_have(desk: Desk) -> None:
    for _ in range(2):
        desk.put()
    kept, lost = desk.claim(2, lease_s=0.0)
    assert desk.do(desk.queue.renew([kept], LEASE_S)).lost == frozenset()
    assert desk.do(desk.queue.reclaim()) == 1
    assert desk.do(desk.queue.renew([kept, lost], LEASE_S)).lost == {lost.call.id}
    desk.finish(kept)


def test_owner_that_closed_its_queue_holds_nothing(desk: Desk) -> None:
    desk.put()
    other = desk.open()
    owner = desk.do(other.enlist())
    assert len(desk.do(other.claim([QUEUE], owner, LEASE_S, 1))) == 1
    desk.do(other.close())
    assert desk.do(desk.queue.reclaim()) == 1


def test_enlist_refuses_a_name_that_is_at_work(desk: Desk) -> None:
    desk.do(desk.queue.enlist("w1"))
    with pytest.raises(QueueUnavailable, match="w1"):
        desk.do(desk.open().enlist("w1"))


@pytest.mark.parametrize("name", ["../w", "a/b", ".hidden", "a\0b"])
def test_enlist_refuses_a_name_that_is_no_file(desk: Desk, name: str) -> None:
    with pytest.raises(AssertionError, match="name of a file"):
        desk.do(desk.queue.enlist(name))


def test_enlist_takes_back_what_an_earlier_life_of_the_name_held(desk: Desk) -> None:
    desk.put()
    other = desk.open()
    desk.do(other.enlist("w1"))
    desk.do(other.claim([QUEUE], "w1", LEASE_S, 1))
    desk.do(other.close())
    desk.do(desk.queue.enlist("w1"))
    assert len(desk.claim()) == 1


# -- callbacks


def test_finish_opens_the_callback_of_a_call_that_asked_for_one(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one(), State.DEAD, callback_due_s=START_S + 5)
    assert desk.claim_callbacks() == []
    desk.clock.now_s += 5
    lease = desk.claim_callback()
    assert (lease.kind, lease.call.id, lease.call.result) == ("callback", call.id, inline(b"out"))
    callback = desk.get(call.id).callback
    assert callback is not None
    assert (callback.state, callback.attempts) == (CallbackState.RUNNING, 1)


def test_callback_goes_from_retry_to_delivery(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    desk.do(desk.queue.callback_retry(desk.claim_callback(), desk.attempt(500, "no"), START_S + 9))
    pending = desk.get(call.id).callback
    assert pending == Callback(CallbackState.PENDING, 1, START_S + 9, 500, "no")
    desk.clock.now_s += 9
    desk.do(desk.queue.callback_done(desk.claim_callback(), desk.attempt(204)))
    delivered = desk.get(call.id).callback
    assert delivered == Callback(CallbackState.DELIVERED, 2, START_S + 9, 204, None)


def test_dead_callback_waits_for_a_person_and_starts_afresh(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    desk.do(desk.queue.callback_dead(desk.claim_callback(), desk.attempt(410, "gone")))
    assert desk.claim_callbacks() == []
    again = desk.do(desk.queue.requeue_callback(call.id)).callback
    assert again is not None
    assert (again.state, again.attempts) == (CallbackState.PENDING, 0)
    assert desk.claim_callback().call.id == call.id


def test_released_callback_is_not_counted(desk: Desk) -> None:
    desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    desk.do(desk.queue.release(desk.claim_callback()))
    callback = desk.claim_callback().call.callback
    assert callback is not None
    assert callback.attempts == 1


def test_callback_whose_workers_die_counts_its_attempts_and_waits_longer_each_time(desk: Desk) -> None:
    call = desk.owe("http://caller/")
    desk.do(desk.queue.callback_retry(desk.claim_callback(), desk.attempt(500, "no"), START_S))
    for attempts, wait_s in enumerate([1.0, 2.0, 4.0, 8.0], 2):
        desk.claim_callback(lease_s=0.0)
        assert desk.do(desk.queue.reclaim()) == 1
        due_s = desk.clock.now_s + wait_s
        assert desk.get(call.id).callback == Callback(CallbackState.PENDING, attempts, due_s, None, LOST_ERROR)
        assert desk.claim_callbacks() == []
        desk.clock.now_s = due_s


def test_callback_whose_worker_has_died_once_is_due_at_once(desk: Desk) -> None:
    desk.owe("http://caller/")
    desk.claim_callback(lease_s=0.0)
    assert desk.do(desk.queue.reclaim()) == 1
    assert len(desk.claim_callbacks()) == 1


def test_claim_callbacks_looks_only_into_the_queues_named(desk: Desk) -> None:
    ours, theirs = desk.owe("http://caller/"), desk.owe("http://caller/", "internal")
    assert [lease.call.id for lease in desk.claim_callbacks()] == [ours.id]
    (lease,) = desk.do(desk.queue.claim_callbacks(["internal", QUEUE], desk.owner, LEASE_S, 5))
    assert lease.call.id == theirs.id


@pytest.mark.parametrize("way", ["retry", "release", "death", "requeue"])
def test_callback_stays_in_its_queue_when_it_is_to_be_delivered_again(desk: Desk, way: str) -> None:
    desk.owe("http://caller/", "internal")
    (lease,) = desk.do(desk.queue.claim_callbacks(["internal"], desk.owner, 0.0, 1))
    if way == "retry":
        desk.do(desk.queue.callback_retry(lease, desk.attempt(500), START_S))
    elif way == "release":
        desk.do(desk.queue.release(lease))
    elif way == "death":
        assert desk.do(desk.queue.reclaim()) == 1
    else:
        desk.do(desk.queue.callback_dead(lease, desk.attempt(500)))
        desk.do(desk.queue.requeue_callback(lease.call.id))
    assert desk.claim_callbacks() == []
    assert len(desk.do(desk.queue.claim_callbacks(["internal"], desk.owner, LEASE_S, 1))) == 1


def destinations(leases: list[Lease]) -> str:
    return "".join(destination_of(lease.call.callback_url or "")[0] for lease in leases)


@pytest.mark.parametrize(
    ("owed", "limit", "capacity", "expected"),
    [
        pytest.param("aaaab", 2, {}, "ab", id="one-of-each"),
        pytest.param("aaaabbc", 7, {}, "abcabaa", id="round-after-round"),
        pytest.param("cba", 2, {}, "ab", id="not-by-arrival"),
        pytest.param("aaabbb", 9, {"a:80": 0}, "bbb", id="none-of-a"),
        pytest.param("aaabbb", 9, {"a:80": 1, "b:80": 2}, "abb", id="some-of-each"),
        pytest.param("aab", 9, {"a:80": 9, "c:80": 0}, "aba", id="more-than-callbacks"),
    ],
)
def test_claim_callbacks_takes_turns_between_destinations(
    desk: Desk, owed: str, limit: int, capacity: dict[str, int], expected: str
) -> None:
    for name in owed:
        desk.owe(f"http://{name}/")
    assert destinations(desk.claim_callbacks(limit, capacity=capacity)) == expected


def test_claim_callbacks_goes_on_behind_the_destination_it_served_last(desk: Desk) -> None:
    for name in "aaabbbccc":
        desk.owe(f"http://{name}/{name}")
    assert "".join(destinations(desk.claim_callbacks(limit)) for limit in (1, 1, 1, 2, 1)) == "abcabc"


def test_claim_callbacks_counts_the_capacity_of_a_destination_once_for_all_queues(desk: Desk) -> None:
    for queue in ("q1", "q2"):
        desk.owe("http://a/", queue)
    assert len(desk.do(desk.queue.claim_callbacks(["q1", "q2"], desk.owner, LEASE_S, 9, {"a:80": 1}))) == 1


def test_claim_callbacks_serves_what_falls_due_beside_destinations_that_wait(desk: Desk) -> None:
    for name in "ab":
        desk.owe(f"http://{name}/")
    for lease in desk.claim_callbacks():
        desk.do(desk.queue.callback_retry(lease, desk.attempt(500), START_S + (60 if "//a" in str(lease) else 1)))
    assert desk.claim_callbacks() == []
    desk.clock.now_s += 1
    assert destinations(desk.claim_callbacks()) == "b"


@pytest.mark.parametrize("url", [None, "http://caller/"], ids=["without-callback", "pending-callback"])
def test_requeue_callback_is_refused_unless_it_is_dead(desk: Desk, url: str | None) -> None:
    call = desk.put(callback_url=url)
    desk.finish(desk.claim_one())
    with pytest.raises(CallNotDead):
        desk.do(desk.queue.requeue_callback(call.id))


# -- waiting


def test_wait_returns_when_the_call_is_finished_elsewhere(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    other = desk.open()

    async def scenario() -> State:
        waiting = asyncio.create_task(other.wait(call.id, LONG_S))
        await asyncio.sleep(0)  # it waits before the end comes
        await finish(desk.queue, lease, State.DONE, None)
        return (await waiting).state

    began_s = time.monotonic()
    assert desk.do(scenario()) is State.DONE
    assert time.monotonic() - began_s < LONG_S / 2


def test_wait_returns_when_the_call_expires(desk: Desk) -> None:
    call = desk.put(expires_s=START_S + 1)
    desk.clock.now_s += 2

    async def scenario() -> State:
        waiting = asyncio.create_task(desk.queue.wait(call.id, LONG_S))
        await asyncio.sleep(0)
        await desk.queue.sweep(60, 60)
        return (await waiting).state

    began_s = time.monotonic()
    assert desk.do(scenario()) is State.EXPIRED
    assert time.monotonic() - began_s < LONG_S / 2


def test_wait_serves_many_at_once(desk: Desk) -> None:
    calls = [desk.put() for _ in range(50)]
    leases = desk.claim()

    async def scenario() -> list[State]:
        waiting = [asyncio.create_task(desk.queue.wait(call.id, LONG_S)) for call in calls for _ in range(2)]
        await asyncio.gather(*(finish(desk.queue, lease, State.DONE, None) for lease in leases))
        return [call.state for call in await asyncio.gather(*waiting)]

    began_s = time.monotonic()
    assert desk.do(scenario()) == [State.DONE] * 100
    assert time.monotonic() - began_s < LONG_S / 2


def test_wait_returns_the_call_as_it_is_when_time_is_up(desk: Desk) -> None:
    assert desk.do(desk.queue.wait(desk.put().id, 0.01)).state is State.QUEUED


def test_wait_raises_when_the_call_is_unknown(desk: Desk) -> None:
    with pytest.raises(CallUnknown):
        desk.do(desk.queue.wait("unknown", LONG_S))


def test_worker_is_woken_by_a_call_put_elsewhere(desk: Desk) -> None:
    other = desk.open()

    async def scenario() -> bool:
        waiting = asyncio.create_task(desk.queue.wait_for_work(LONG_S))
        await asyncio.sleep(0)
        await other.put(new_call())
        return await waiting

    began_s = time.monotonic()
    assert desk.do(scenario())
    assert time.monotonic() - began_s < LONG_S / 2


def test_worker_is_woken_by_a_callback_that_falls_due(desk: Desk) -> None:
    desk.put(callback_url="http://caller/")
    lease = desk.claim_one()
    desk.do(desk.queue.wait_for_work(0))
    desk.finish(lease)
    assert desk.do(desk.queue.wait_for_work(0))


def forget_the_put(desk: Desk) -> None:
    """A queue may say that there is a new call though it is not due: once."""
    desk.do(desk.queue.wait_for_work(0))


def test_worker_sleeps_until_the_next_call_is_due(desk: Desk) -> None:
    desk.put(due_s=START_S + 0.2)
    assert desk.claim() == []
    forget_the_put(desk)
    began_s = time.monotonic()
    assert desk.do(desk.queue.wait_for_work(LONG_S))
    assert 0.15 < time.monotonic() - began_s < LONG_S / 2


def test_worker_is_told_of_due_work_only_once(desk: Desk) -> None:
    desk.put(due_s=START_S + 1)
    assert desk.claim() == []
    forget_the_put(desk)
    desk.clock.now_s += 5
    assert [desk.do(desk.queue.wait_for_work(0.01)) for _ in range(2)] == [True, False]
    assert len(desk.claim()) == 1


def test_worker_waits_in_vain_when_there_is_nothing(desk: Desk) -> None:
    assert not desk.do(desk.queue.wait_for_work(0.01))


# -- for people


def test_calls_lists_newest_first_by_page(desk: Desk) -> None:
    made = [desk.put().id for _ in range(5)]
    first = desk.do(desk.queue.calls(limit=3))
    rest = desk.do(desk.queue.calls(limit=3, before=first[-1].id))
    assert [call.id for call in first + rest] == made[::-1]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        pytest.param({}, "gff", id="all"),
        pytest.param({"state": State.QUEUED}, "gf", id="state"),
        pytest.param({"function": F}, "ff", id="function"),
        pytest.param({"state": State.DONE, "function": F}, "f", id="both"),
        pytest.param({"state": State.DONE, "function": G}, "", id="none"),
        pytest.param({"function": parse_function_name("f.prod")}, "", id="another-namespace"),
    ],
)
def test_calls_lists_by_state_and_function(desk: Desk, wanted: dict[str, Any], expected: str) -> None:
    for function in "ffg":
        desk.put(function)
    desk.finish(desk.claim_one())
    assert "".join(call.function.name for call in desk.do(desk.queue.calls(**wanted))) == expected


def test_requeue_dead_starts_the_call_afresh(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/", expires_s=START_S + 1)
    desk.do(finish(desk.queue, desk.claim_one(), State.DEAD, desk.do(desk.queue.store_body(desk.big()))))
    delivery = desk.claim_callback()
    desk.clock.now_s += 60
    again = desk.do(desk.queue.requeue_dead(call.id))
    assert (again.state, again.attempts, again.due_s, again.expires_s) == (State.QUEUED, 0, START_S + 60, None)
    assert (again.result, again.callback, again.finished_s) == (None, None, None)
    assert desk.bodies() == set()
    with pytest.raises(LeaseLost):
        desk.do(desk.queue.callback_done(delivery, desk.attempt()))
    assert desk.claim_one().call.attempts == 1


def test_requeue_dead_forgets_a_cancel_that_came_too_late(desk: Desk) -> None:
    call = desk.put()
    lease = desk.claim_one()
    desk.do(desk.queue.cancel(call.id))
    desk.finish(lease, State.DEAD)
    assert not desk.do(desk.queue.requeue_dead(call.id)).cancel_requested
    again = desk.claim_one()
    assert desk.do(desk.queue.renew([again], LEASE_S)).cancelled == frozenset()


def test_requeue_dead_is_refused_for_any_other_call(desk: Desk) -> None:
    with pytest.raises(CallNotDead, match="queued"):
        desk.do(desk.queue.requeue_dead(desk.put().id))
    with pytest.raises(CallUnknown):
        desk.do(desk.queue.requeue_dead("unknown"))


def test_purge_deletes_the_calls_named_with_their_bodies(desk: Desk) -> None:
    body = desk.do(desk.queue.store_body(desk.big()))
    dead = desk.put("f", body=body)
    desk.finish(desk.claim_one(), State.DEAD)
    other = desk.put("g")
    desk.finish(desk.claim_one(), State.DEAD)
    assert desk.do(desk.queue.purge(state=State.DEAD, function=F)) == 1
    assert desk.do(desk.queue.get(dead.id)) is None
    assert desk.bodies() == set()
    assert desk.do(desk.queue.purge(state=State.DEAD, call_id=other.id)) == 1
    assert desk.do(desk.queue.calls()) == []


def test_purge_leaves_a_call_whose_callback_is_under_way(desk: Desk) -> None:
    desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    assert desk.do(desk.queue.purge(state=State.DONE)) == 0
    lease = desk.claim_callback()
    assert desk.do(desk.queue.purge(state=State.DONE)) == 0
    desk.do(desk.queue.callback_done(lease, desk.attempt()))
    assert desk.do(desk.queue.purge(state=State.DONE)) == 1


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING])
def test_purge_is_refused_for_calls_that_have_not_ended(desk: Desk, state: State) -> None:
    with pytest.raises(AssertionError):
        desk.do(desk.queue.purge(state=state))


def test_stats_count_calls_and_callbacks(desk: Desk) -> None:
    for function in "ffg":
        desk.put(function, callback_url="http://caller/")
    desk.finish(desk.claim_one())
    desk.do(desk.queue.callback_dead(desk.claim_callback(), desk.attempt()))
    desk.finish(desk.claim(1, capacity={F: 0})[0])
    desk.put("f", due_s=START_S + 99)
    desk.clock.now_s += 7
    stats = desk.do(desk.queue.stats())
    assert stats.by_function == {(F, State.QUEUED): 2, (F, State.DONE): 1, (G, State.DONE): 1}
    assert (stats.by_state[State.QUEUED], stats.by_state[State.DEAD]) == (2, 0)
    assert (stats.callback_pending_count, stats.callback_dead_count, stats.oldest_due_age_s) == (1, 1, 7.0)
    assert dict(stats.waiting) == {"faas-request": 3}, "two calls and a callback"


# -- bodies


@pytest.mark.parametrize(
    ("sizes", "is_apart"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([0, 1, 0, 2], False, id="short"),
        pytest.param([-1, 1], False, id="just-inline"),
        pytest.param([-1, 1, 1], True, id="just-too-long"),
        pytest.param([100_000] * 13, True, id="many-pieces"),
        pytest.param([1_300_000], True, id="one-long-piece"),
    ],
)
def test_body_comes_back_as_it_was_stored(desk: Desk, sizes: list[int], is_apart: bool) -> None:
    parts = [os.urandom(size if size >= 0 else desk.inline_bytes + size) for size in sizes]
    body = desk.do(desk.queue.store_body(pieces(*parts)))
    assert (body.file is not None, body.inline is None) == (is_apart, is_apart)
    assert body.bytes_count == len(b"".join(parts))
    assert desk.do(read_all(desk.queue, body, 1000)) == b"".join(parts)


@pytest.mark.parametrize("limit_bytes", [10, INLINE_BYTES + 10, 5 * INLINE_BYTES], ids=["memory", "edge", "file"])
def test_body_over_the_limit_is_refused_and_removed(desk: Desk, limit_bytes: int) -> None:
    parts = [bytes(limit_bytes // 4 + 1)] * 4
    with pytest.raises(BodyTooLarge, match=str(limit_bytes)):
        desk.do(desk.queue.store_body(pieces(*parts), limit_bytes))
    assert desk.bodies() == set()
    assert desk.do(desk.queue.store_body(bytes(limit_bytes), limit_bytes)).bytes_count == limit_bytes


async def something_is_stored(desk: Desk) -> None:
    await eventually(desk.stored_bodies, LONG_S, "a body is stored")


def test_body_whose_sender_fails_is_removed(desk: Desk) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield desk.big() * 20
        await something_is_stored(desk)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        desk.do(desk.queue.store_body(failing()))
    assert desk.bodies() == set()


def test_body_whose_storing_is_cancelled_is_removed(desk: Desk) -> None:
    async def scenario() -> None:
        begun = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield desk.big() * 20
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(desk.queue.store_body(endless()))
        await begun.wait()
        await something_is_stored(desk)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    desk.do(scenario())
    assert desk.bodies() == set()


def test_body_survives_a_restart_with_its_call(desk: Desk) -> None:
    call = desk.put(body=desk.do(desk.queue.store_body(desk.big())))
    desk.do(desk.queue.close())
    assert desk.do(read_all(desk.open(), call.body)) == desk.big()


def test_dropped_body_leaves_no_file(desk: Desk) -> None:
    body = desk.do(desk.queue.store_body(desk.big()))
    desk.do(desk.queue.drop_body(body))
    assert desk.bodies() == set()
    desk.do(desk.queue.drop_body(body))
