"""Runs: how they end, are cancelled, and what a lease is worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from faashound.calls.model import (
    EXCERPT_BYTES,
    HISTORY_COUNT,
    CallFinished,
    CallUnknown,
    Lease,
    LeaseLost,
    QueueUnavailable,
    State,
)
from faashound.calls.steps import LOST_ERROR
from testkit.queue_kit import LEASE_S, QUEUE, START_S, Desk, finish, inline

LONG_S = 20.0  # how long a test waits for what should come at once


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
    assert desk.do(desk.queue.renew([kept, lost], LEASE_S)).lost == {lost.fence}
    desk.finish(kept)


def test_renew_tells_a_lost_callback_from_the_run_of_the_same_call(desk: Desk) -> None:
    call = desk.put(callback_url="http://127.0.0.1:1/")
    desk.finish(desk.claim_one(), State.DEAD)
    (callback,) = desk.claim_callbacks()
    desk.do(desk.queue.requeue_dead(call.id))
    run = desk.claim_one()
    assert desk.do(desk.queue.renew([callback, run], LEASE_S)).lost == {callback.fence}


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
