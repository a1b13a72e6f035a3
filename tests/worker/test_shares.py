"""shares.py: who gets the slots of a worker, however long each holds them."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.draining.shares import LEND_AFTER_S, Allotment, Slots, lend, share_fairly, share_rest

FAIR = {
    "idle": ({}, 0, 16, {}),
    "alone": ({"a": 10}, 1, 6, {"a": 6}),
    "alone and full": ({"a": 16}, 1, 0, {"a": 0}),
    "two at work": ({"a": 12, "b": 1}, 2, 3, {"a": 0, "b": 7}),
    "one at work, another lately": ({"a": 6}, 2, 10, {"a": 2}),
    "three at work, rounded up": ({"a": 5, "b": 6, "c": 1}, 3, 4, {"a": 1, "b": 0, "c": 5}),
    "more flows than slots": (dict.fromkeys(map(str, range(20)), 1), 20, 0, dict.fromkeys(map(str, range(20)), 0)),
    "some are lent": ({"a": 16, "b": 2}, 2, 0, {"a": 0, "b": 6}),
}

LENT = {
    "to a second": (16, {"a": 16}, 2, {"a": 0}),
    "to a third": (16, {"a": 16, "b": 2}, 1, {"a": 0, "b": 0}),
    "to a fourth": (16, {"a": 16, "b": 2, "c": 1}, 1, {"a": 0, "b": 0, "c": 0}),
    "nothing is left": (16, {"a": 16, "b": 2, "c": 1, "d": 1}, 0, {"a": 0, "b": 0, "c": 0, "d": 0}),
    "one of four": (4, {"a": 4}, 1, {"a": 0}),
    "none of three": (3, {"a": 3}, 0, {"a": 0}),
    "none of one": (1, {"a": 1}, 0, {"a": 0}),
}


@pytest.mark.parametrize(("held", "flows_count", "limit", "capacities"), FAIR.values(), ids=FAIR)
def test_free_slots_go_first_to_flows_below_their_share(
    held: dict[str, int], flows_count: int, limit: int, capacities: dict[str, int]
) -> None:
    assert share_fairly(16, held, flows_count) == Allotment(limit, capacities)


def test_free_slots_go_to_any_flow_when_no_flow_is_below_its_share() -> None:
    assert share_rest(16, {"a": 12, "b": 1}) == Allotment(3)


@pytest.mark.parametrize(("slots_count", "held", "limit", "capacities"), LENT.values(), ids=LENT)
def test_slots_are_lent(slots_count: int, held: dict[str, int], limit: int, capacities: dict[str, int]) -> None:
    assert lend(slots_count, held) == Allotment(limit, capacities)


def test_allotment_is_narrowed_to_the_least_that_is_said_of_a_flow() -> None:
    narrowed = Allotment(5, {"a": 3, "b": 1}).narrowed({"a": 1, "c": 2}, {"a": 4, "c": 0})
    assert narrowed == Allotment(5, {"a": 1, "b": 1, "c": 0})


class Desk:
    """A worker's slots, a clock, and flows that want slots; the queue takes turns among them, as `claim` does."""

    def __init__(self, slots_count: int) -> None:
        self.slots = Slots(slots_count)
        self.now_s = 0.0
        self.waiting: Counter[str] = Counter()
        self.turn = count()
        self.claims_count = 0

    def put(self, flow: str, number: int = 1) -> None:
        self.waiting[flow] += number
        self.slots.wake_up()

    def work(self, later_s: float = 0.0) -> None:
        """Claim for as long as the slots say, `later_s` seconds later."""
        self.now_s += later_s
        while (allotment := self.slots.next_claim(self.now_s)) is not None:
            self.claims_count += 1
            if not self.slots.found(allotment, self._claim(allotment)):
                break

    def _claim(self, allotment: Allotment) -> int:
        taken: Counter[str] = Counter()
        while taken.total() < allotment.limit:
            may = [flow for flow in +self.waiting if taken[flow] < allotment.capacities.get(flow, allotment.limit)]
            if not may:
                break
            flow = may[next(self.turn) % len(may)]
            taken[flow] += 1
            self.waiting[flow] -= 1
            self.slots.take(flow)
        return taken.total()

    def end(self, flow: str, number: int = 1) -> None:
        for _ in range(number):
            self.slots.give_back(flow, self.now_s)


steps = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(-20, 20), st.sampled_from([0.0, 0.5, 2.0])))
slots_counts = st.integers(1, 64)


@given(slots_counts, steps)
def test_no_slot_stays_free_while_anything_waits_and_a_quarter_more_are_held_at_most(
    slots_count: int, story: list[tuple[str, int, float]]
) -> None:
    desk = Desk(slots_count)
    for flow, number, later_s in story:
        if number > 0:
            desk.put(flow, number)
        else:
            desk.end(flow, min(-number, desk.slots.held[flow]))
        desk.work(later_s)
        held_count, waiting_count = desk.slots.held.total(), desk.waiting.total()
        assert held_count >= slots_count or not waiting_count
        assert held_count <= slots_count + slots_count // 4


@given(slots_counts, st.integers(1, 100))
def test_flow_that_is_alone_holds_every_slot_and_no_more_however_long_it_takes(slots_count: int, late_s: int) -> None:
    desk = Desk(slots_count)
    desk.put("a", 1000)
    desk.work()
    desk.work(late_s)
    assert desk.slots.held == {"a": slots_count}


def test_flow_that_is_alone_costs_one_claim_for_each_slot_that_comes_free() -> None:
    desk = Desk(16)
    for _ in range(100):
        desk.put("a", 2)
        desk.work(0.01)
        desk.end("a", min(desk.slots.held["a"], 1))
    before_count = desk.claims_count
    desk.work()
    assert desk.claims_count - before_count <= 1


@pytest.mark.parametrize(("slots_count", "hanging_count"), [(4, 1), (8, 2), (16, 3), (32, 4), (64, 5)])
def test_flow_that_comes_late_gets_a_slot_beside_flows_that_hang(slots_count: int, hanging_count: int) -> None:
    desk = Desk(slots_count)
    for number in range(hanging_count):  # each hangs with all it can get before the next comes
        desk.put(f"hangs-{number}", 1000)
        desk.work()
        desk.work(LEND_AFTER_S)
    desk.put("late")
    desk.work()
    assert desk.slots.held["late"] == 1


def test_slots_are_lent_only_when_all_have_been_held_for_a_while() -> None:
    desk = Desk(16)
    desk.put("a", 1000)
    desk.work()
    desk.put("b", 10)
    desk.work(LEND_AFTER_S / 2)
    assert "b" not in desk.slots.held
    assert desk.slots.lends_at_s == LEND_AFTER_S
    desk.end("a", 2)
    desk.work(LEND_AFTER_S / 2)
    assert desk.slots.held == {"a": 15, "b": 1}, "a turn for each, and nothing is lent"


@pytest.mark.parametrize("at_once_count", [1, 8])
def test_slow_flow_gets_its_share_and_not_what_quick_ones_give_back(at_once_count: int) -> None:
    desk = Desk(16)
    desk.put("quick", 100_000)
    desk.put("hangs", 1000)
    for _ in range(100):
        desk.work(0.01)
        desk.end("quick", min(at_once_count, desk.slots.held["quick"]))
    desk.work()
    assert desk.slots.held == {"hangs": 8, "quick": 8}


def test_flow_that_was_passed_over_is_claimed_when_it_may() -> None:
    slots = Slots(16)
    allotment = slots.next_claim(0.0)
    assert allotment is not None
    assert not slots.found(allotment.narrowed({"a": 0}), 0)
    assert slots.next_claim(0.0) is not None
    assert not slots.found(allotment, 0)
    assert slots.next_claim(0.0) is None


def test_claim_that_brings_less_than_it_might_is_the_last_until_there_is_more() -> None:
    """One more would find nothing, and cost a turn of the queue's writer for each call."""
    desk = Desk(16)
    for _ in range(10):
        desk.put("a")
        desk.work()
        desk.end("a")
        desk.work()
    assert desk.claims_count == 10
