"""Waiting for work and for ends; and what people see and change."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from faashound.calls.model import CallNotDead, CallUnknown, LeaseLost, State
from faashound.calls.names import parse_function_name
from testkit.queue_kit import LEASE_S, START_S, Desk, finish, new_call

LONG_S = 20.0  # how long a test waits for what should come at once
F, G = parse_function_name("f"), parse_function_name("g")


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
    began_s = time.monotonic()  # before the queue on NATS tells its servers of the delay
    assert desk.claim() == []
    forget_the_put(desk)
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


def test_stats_tell_how_old_each_queue_is(desk: Desk) -> None:
    for queue, due_s in (("pictures", START_S - 20), ("pictures", START_S - 10), ("films", START_S - 5)):
        desk.put("f", queue=queue, due_s=due_s)
    desk.put("g", queue="books", due_s=START_S + 99)
    assert desk.do(desk.queue.stats()).oldest_due_ages_s == {"pictures": 20.0, "films": 5.0}
