"""What the processes of one program count in shared memory: sums add up, whoever has died meanwhile."""

from __future__ import annotations

import os
import signal
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import COUNTERS_BYTES, Scoreboard, SharedCounters, Slot
from testkit.harness import wait_until

KEYS = st.text(max_size=40)
# (worker, key, how much); how many numbers a key has follows from the key
ADDITIONS = st.lists(st.tuples(st.integers(0, 2), KEYS, st.integers(1, 100)), max_size=60)


def size_of(key: str) -> int:
    return 1 + len(key) % 16


@given(ADDITIONS)
def test_sums_are_those_of_all_workers_when_each_adds_its_own(additions: list[tuple[int, str, int]]) -> None:
    scoreboard, expected = Scoreboard(3), defaultdict[str, float](float)
    slots = [Slot(scoreboard, index) for index in range(3)]
    for index, key, amount in additions:
        slots[index].values(key, size_of(key))[-1] += amount
        expected[key] += amount
    assert {key: numbers[-1] for key, numbers in scoreboard.counters.totals().items()} == expected
    assert all(len(numbers) == size_of(key) for key, numbers in scoreboard.counters.totals().items())


@given(ADDITIONS, ADDITIONS)
def test_sums_go_on_when_a_worker_is_replaced(
    before: list[tuple[int, str, int]], after: list[tuple[int, str, int]]
) -> None:
    scoreboard, expected = Scoreboard(3), defaultdict[str, float](float)
    for additions in (before, after):
        slots = [Slot(scoreboard, index) for index in range(3)]  # new processes, the memory of the old ones
        for index, key, amount in additions:
            slots[index].values(key, size_of(key))[0] += amount
            expected[key] += amount
    assert {key: numbers[0] for key, numbers in scoreboard.counters.totals().items()} == expected


def test_sum_can_be_read_at_any_moment_when_its_worker_is_killed_as_it_counts() -> None:
    scoreboard = Scoreboard(2)
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            slot, number = Slot(scoreboard, 1), 0
            while True:
                number += 1
                slot.values(f"key {number % 5000}", 3)[2] += 1
        wait_until(lambda: len(scoreboard.counters.totals()) > 0, 5.0, "it counts")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        totals = scoreboard.counters.totals()
        assert all(key.startswith("key ") and len(numbers) == 3 for key, numbers in totals.items())


def test_keys_that_find_no_room_are_left_out_when_a_region_is_full() -> None:
    counters = SharedCounters(1)
    count = COUNTERS_BYTES // (8 + 16 + 8 * 64) + 10
    for number in range(count):
        counters.values(0, f"key {number:010d}", 64)[0] = 1
    totals = counters.totals()
    assert count - 20 < len(totals) < count
    assert {numbers[0] for numbers in totals.values()} == {1.0}


def test_slot_of_a_dead_worker_is_free_and_its_counts_stay_when_cleared() -> None:
    scoreboard = Scoreboard(2)
    slot = Slot(scoreboard, 1)
    slot.values("key", 1)[0] = 5
    assert slot.enter(1)
    assert not Slot(scoreboard, 0).enter(1)
    scoreboard.clear(1)
    assert Slot(scoreboard, 0).enter(1)
    assert scoreboard.counters.totals() == {"key": [5.0]}
