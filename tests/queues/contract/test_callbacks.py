"""Callbacks: claimed, delivered, tried again, given up."""

from __future__ import annotations

import pytest

from faashound.calls.callbacks import build_callback_id
from faashound.calls.destinations import destination_of
from faashound.calls.model import HISTORY_COUNT, Attempt, Callback, CallbackState, CallNotDead, Lease, State
from faashound.calls.steps import LOST_ERROR
from testkit.queue_kit import LEASE_S, QUEUE, START_S, Desk, inline


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


def test_each_end_of_a_call_has_a_callback_of_its_own(desk: Desk) -> None:
    """The first has the id of its call, however many attempts it took; one that is sent again has the id it had."""
    call = desk.put(callback_url="http://caller/")
    desk.do(desk.queue.retry(desk.claim_one(), attempt=desk.attempt(500, "no"), due_s=desk.clock.now_s))
    desk.finish(desk.claim_one(), State.DEAD)
    first = desk.claim_callback()
    desk.do(desk.queue.requeue_dead(call.id))
    desk.finish(desk.claim_one(), State.DEAD, attempt=Attempt(START_S + 1, START_S + 1.5, 500, "no"))
    second = desk.claim_callback()
    desk.do(desk.queue.callback_dead(second, desk.attempt(410, "gone")))
    desk.do(desk.queue.requeue_callback(call.id))
    again = desk.claim_callback()
    desk.do(desk.queue.requeue_dead(call.id))
    desk.finish(desk.claim_one(), attempt=Attempt(START_S + 2, START_S + 2.5, 200, None))
    third = desk.claim_callback()
    ids = [build_callback_id(lease.call) for lease in (first, second, again, third)]
    assert (ids[0], ids[1]) == (call.id, ids[2])
    assert len(set(ids)) == 3


def test_each_end_after_more_attempts_than_are_remembered_has_a_callback_of_its_own(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    ids = []
    for life in range(2):
        for _ in range(HISTORY_COUNT):
            desk.do(desk.queue.retry(desk.claim_one(), attempt=desk.attempt(500, "no"), due_s=desk.clock.now_s))
        desk.finish(desk.claim_one(), State.DEAD, attempt=Attempt(START_S, START_S + life, 500, "no"))
        ids.append(build_callback_id(desk.claim_callback().call))
        desk.do(desk.queue.requeue_dead(call.id))
    assert ids[0] != ids[1]


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
