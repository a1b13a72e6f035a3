"""breakers.py: destinations that cannot be reached are tried less often, and no others suffer for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from faashound.draining.breakers import (
    FAILURES_COUNT,
    FIRST_PAUSE_S,
    GIVEN_UP_AFTER_S,
    LONGEST_PAUSE_S,
    MAX_ERROR_CHARS,
    MAX_KEPT_COUNT,
    Breakers,
)

BAD, WORSE = "bad.example:443", "worse.example:80"
ONE_SENT = {BAD: 1}


def opened(*names: str, probes_count: int = 4) -> Breakers:
    """Breakers that have been opened at 0 s for `names`."""
    breakers = Breakers(probes_count)
    for name in names:
        assert [breakers.on_failure(name, "timed out", -1.0, 0.0) for _ in range(FAILURES_COUNT)][-1]
    return breakers


def test_breaker_stays_closed_below_its_count_of_failures() -> None:
    breakers = Breakers(4)
    for _ in range(FAILURES_COUNT - 1):
        assert not breakers.on_failure(BAD, "refused", 0.0, 1.0)
    assert breakers.capacities({}, 1.0) == {}
    assert breakers.next_probe_s(1.0) is None


def test_breaker_counts_failures_in_a_row_only() -> None:
    breakers = Breakers(4)
    for _ in range(10 * FAILURES_COUNT):
        assert not breakers.on_failure(BAD, "refused", 0.0, 1.0)
        assert not breakers.on_answer(BAD)


def test_open_breaker_lets_nothing_through_until_its_pause_is_over_and_then_one() -> None:
    breakers = opened(BAD)
    assert breakers.capacities({}, FIRST_PAUSE_S - 0.1) == {BAD: 0}
    assert breakers.next_probe_s(0.0) == FIRST_PAUSE_S
    assert breakers.capacities({}, FIRST_PAUSE_S) == {BAD: 1}
    assert breakers.capacities(ONE_SENT, FIRST_PAUSE_S) == {BAD: 0}


def test_answer_to_a_probe_closes_the_breaker() -> None:
    breakers = opened(BAD)
    assert breakers.on_answer(BAD)
    assert breakers.capacities({}, 0.0) == {}
    assert breakers.open_count == 0


def test_failure_of_a_probe_doubles_the_pause_up_to_the_longest() -> None:
    breakers, now_s, pauses_s = opened(BAD), 0.0, []
    for _ in range(6):
        probe_s = breakers.next_probe_s(now_s)
        assert probe_s is not None
        pauses_s.append(probe_s - now_s)
        now_s = probe_s
        assert not breakers.on_failure(BAD, "timed out", now_s, now_s)
    assert pauses_s == [5.0, 10.0, 20.0, 40.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_failure_of_what_was_sent_before_the_breaker_opened_prolongs_nothing() -> None:
    breakers = opened(BAD)
    for _ in range(13):
        breakers.on_failure(BAD, "timed out", -1.0, 2.0)
    assert breakers.next_probe_s(2.0) == FIRST_PAUSE_S


def test_breaker_holds_back_no_other_destination() -> None:
    assert WORSE not in opened(BAD).capacities({}, 0.0)


def test_probes_of_many_destinations_hold_a_part_of_the_slots_only() -> None:
    names = [f"host-{number}:80" for number in range(100)]
    breakers = opened(*names)
    capacities = breakers.capacities({names[0]: 1}, FIRST_PAUSE_S)
    assert sum(capacities.values()) == 3
    assert capacities.keys() == set(names)


def test_callbacks_to_a_destination_that_was_unreachable_for_long_fail_without_being_sent() -> None:
    breakers, now_s = opened(BAD), GIVEN_UP_AFTER_S
    assert breakers.objection(BAD, now_s) is None, "a probe is due"
    breakers.on_failure(BAD, "timed out", now_s, now_s)
    assert BAD not in breakers.capacities({}, now_s)
    assert breakers.objection(BAD, now_s + 1) == (
        f"not tried: {BAD} could not be reached for 601 s, 4 times in a row (timed out)"
    )
    assert breakers.objection(WORSE, now_s) is None
    probe_s = breakers.next_probe_s(now_s)
    assert probe_s is not None
    assert breakers.objection(BAD, probe_s) is None
    assert breakers.capacities({}, probe_s) == {BAD: 1}


def test_breakers_forget_who_failed_longest_ago_however_many_names_strangers_make_up() -> None:
    breakers = opened(BAD)
    for number in range(3 * MAX_KEPT_COUNT):
        for _ in range(FAILURES_COUNT):
            breakers.on_failure(f"made-up-{number}:80", "x" * 10_000, 0.0, 0.0)
    assert breakers.open_count == MAX_KEPT_COUNT
    assert BAD not in breakers.capacities({}, 0.0)
    assert len(breakers.objection(f"made-up-{3 * MAX_KEPT_COUNT - 1}:80", 0.0) or "") < 2 * MAX_ERROR_CHARS


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.floats(0, 100)), max_size=100))
def test_destination_is_probed_again_within_the_longest_pause_whatever_came_before(
    events: list[tuple[str, bool, float]],
) -> None:
    breakers, now_s = Breakers(3), 0.0
    for name, is_failure, later_s in events:
        now_s += later_s
        if is_failure:
            breakers.on_failure(name, "refused", now_s, now_s)
        else:
            breakers.on_answer(name)
        assert all(capacity == 1 for capacity in breakers.capacities({}, now_s + LONGEST_PAUSE_S).values())
