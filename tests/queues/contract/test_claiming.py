"""Claiming: which calls are taken, in which order, and which wait or expire instead."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from faashound.calls.model import Lease, State
from faashound.calls.names import parse_function_name
from faashound.calls.steps import EXPIRED_ERROR, EXPIRED_STATUS
from faashound.queues.spool.limits import STEP_COUNT
from testkit.queue_kit import LEASE_S, QUEUE, START_S, Desk, new_call

LONG_S = 20.0  # how long a test waits for what should come at once
DYING_COUNT = STEP_COUNT + 50  # more than a queue ends in one step


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


def test_claim_takes_no_more_than_the_limit_behind_as_many_that_wait(desk: Desk) -> None:
    for _ in range(8):
        desk.put(due_s=START_S + 3600)
    for _ in range(40):
        desk.put()
    assert len(desk.claim(8)) == 8


def test_claim_takes_no_more_of_a_function_than_its_capacity_beside_another_that_waits(desk: Desk) -> None:
    for _ in range(10):
        desk.put("waiting", due_s=START_S + 3600)
        desk.put("busy")
    assert [lease.call.function.name for lease in desk.claim(8, capacity=by_function({"busy": 1}))] == ["busy"]


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
        for _ in range(20):  # each put has a limit, which 2,000 at once would meet on a busy machine
            await asyncio.gather(*(desk.queue.put(new_call("bulk")) for _ in range(100)))

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
