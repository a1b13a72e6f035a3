"""The rules of calls/retries.py: what follows from an attempt, how long to wait, and how many calls may run at once."""

from __future__ import annotations

import dataclasses
import random
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faashound.calls.model import StoredBody
from faashound.calls.retries import (
    CALLBACK_POLICY,
    MAX_RETRY_AFTER_S,
    AttemptOutcome,
    BadAnnotations,
    Concurrency,
    Dead,
    Done,
    HandBack,
    OutcomeKind,
    Progress,
    RetryAnnotations,
    RetryAt,
    RetryPolicy,
    is_poison,
    next_callback_step,
    next_step,
    parse_annotations,
    parse_retry_after,
    parse_retry_codes,
    policy_for,
    retry_wait_s,
)
from faashound.calls.steps import LOST_ERROR

NOW_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
POLICY = RetryPolicy()
UNREACHABLE = AttemptOutcome(OutcomeKind.UNREACHABLE, error="connection refused")
TIMED_OUT = AttemptOutcome(OutcomeKind.TIMED_OUT, error="over call_timeout (60s)")
CUT = AttemptOutcome(OutcomeKind.BROKEN_OFF, error="cut", body=StoredBody(4, b"half", None))
LATE_ANSWER = AttemptOutcome(OutcomeKind.TIMED_OUT, error="late", body=StoredBody(4, b"half", None))
REFUSED = AttemptOutcome(OutcomeKind.REFUSED, error="refused: not allowed by callback_allow")
HELD_BACK = AttemptOutcome(OutcomeKind.HELD_BACK, error="not tried: a:80 cannot be reached")
LOST = AttemptOutcome(OutcomeKind.UNREADABLE, error="the file is gone")
FAULT = AttemptOutcome(OutcomeKind.FAILED, error="a fault of the worker")
PREVENTED = AttemptOutcome(OutcomeKind.PREVENTED, error="no descriptors")


def answered(status: int, *, retry_after: str | None = None, internal: bool = False) -> AttemptOutcome:
    return AttemptOutcome(OutcomeKind.ANSWERED, status, retry_after, internal)


def gave_up(cause: str, status: int, with_answer: bool) -> Dead:
    return Dead(f"gave up after 10 attempts: {cause}", status, with_answer)


def never() -> float:
    raise AssertionError("no chance is needed here")


# --- Calls -----------------------------------------------------------------------------------------------------

FIRST, LAST = Progress(1), Progress(10)
LATE = Progress(1, expires_s=NOW_S + 10)
IN_TIME = Progress(1, expires_s=NOW_S + 10.5)
RETRY = RetryAt(NOW_S + 10)
EXPIRED = Dead("expires before its next attempt, after 1 attempt: status 500", 500, True)

STEPS = {
    "success": (FIRST, answered(200), Done(200)),
    "a function's own 404": (FIRST, answered(404), Done(404)),
    "503 is not among the codes": (FIRST, answered(503, retry_after="5"), Done(503)),
    "a redirect": (FIRST, answered(302), Done(302)),
    "success that carries the internal mark": (FIRST, answered(200, internal=True), Done(200)),
    "500": (FIRST, answered(500), RETRY),
    "408, the watchdog's exec_timeout": (FIRST, answered(408), RETRY),
    "429 of max_inflight": (FIRST, answered(429, internal=True), RETRY),
    "503 of the system": (FIRST, answered(503, internal=True), RETRY),
    "404 of the system": (FIRST, answered(404, internal=True), RETRY),
    "unreachable": (FIRST, UNREACHABLE, RETRY),
    "timed out": (FIRST, TIMED_OUT, RETRY),
    "broken off": (FIRST, CUT, RETRY),
    "broken off at last": (LAST, CUT, gave_up("cut", 502, True)),
    "timed out at last, with a part": (LAST, LATE_ANSWER, gave_up("late", 504, True)),
    "second attempt": (Progress(2), answered(500), RetryAt(NOW_S + 20)),
    "ninth attempt": (Progress(9), answered(500), RetryAt(NOW_S + 120)),
    "500 at last": (LAST, answered(500), gave_up("status 500", 500, True)),
    "429 at last": (LAST, answered(429, internal=True), gave_up("status 429", 429, True)),
    "gateway's 502 at last": (LAST, answered(502, internal=True), gave_up("status 502", 503, False)),
    "function's 502 at last": (LAST, answered(502), gave_up("status 502", 502, True)),
    "unreachable at last": (LAST, UNREACHABLE, gave_up("connection refused", 503, False)),
    "timed out at last": (LAST, TIMED_OUT, gave_up("over call_timeout (60s)", 504, False)),
    "success at last": (LAST, answered(200), Done(200)),
    "expires before": (LATE, answered(500), EXPIRED),
    "expires after": (IN_TIME, answered(500), RETRY),
    "success, about to expire": (LATE, answered(200), Done(200)),
    "its body is lost": (FIRST, LOST, Dead("not to be retried: the file is gone", 500, False)),
    "a fault of ours": (FIRST, FAULT, RETRY),
    "a fault of ours at last": (LAST, FAULT, gave_up("a fault of the worker", 500, False)),
    "no descriptors": (FIRST, PREVENTED, HandBack()),
    "no descriptors at last": (LAST, PREVENTED, HandBack()),
}


@pytest.mark.parametrize(("progress", "outcome", "step"), STEPS.values(), ids=STEPS)
def test_call_goes_on_with(progress: Progress, outcome: AttemptOutcome, step: object) -> None:
    assert next_step(progress, POLICY, outcome, NOW_S, never) == step


@pytest.mark.parametrize("max_attempts", [0, 1])
def test_call_is_tried_once_when_attempts_are(max_attempts: int) -> None:
    policy = RetryPolicy(max_attempts=max_attempts)
    assert next_step(FIRST, policy, answered(500), NOW_S, never) == Dead(
        "gave up after 1 attempt: status 500", 500, True
    )
    assert policy.max_retries_count == 0


def test_call_that_timed_out_is_dead_when_504_is_not_to_be_retried() -> None:
    policy = RetryPolicy(codes=frozenset({500}))
    assert next_step(FIRST, policy, TIMED_OUT, NOW_S, never) == Dead(
        "not to be retried: over call_timeout (60s)", 504, False
    )


def test_call_of_a_function_cannot_be_refused() -> None:
    with pytest.raises(AssertionError):
        next_step(FIRST, POLICY, REFUSED, NOW_S, never)


policies = st.builds(
    lambda attempts, waits, backoff, growth: RetryPolicy(
        attempts, min(waits), max(waits), backoff=backoff, growth=growth
    ),
    st.integers(0, 40),
    st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)),
    st.sampled_from(["exponential", "full", "equal"]),
    st.integers(2, 4),
)
outcomes = st.one_of(
    st.builds(
        answered,
        st.integers(200, 599),
        retry_after=st.none() | st.integers(0, 10**12).map(str) | st.text(),
        internal=st.booleans(),
    ),
    st.sampled_from([UNREACHABLE, TIMED_OUT]),
)


@settings(max_examples=300)
@given(policies, st.lists(outcomes, min_size=50, max_size=50), st.randoms(use_true_random=False))
def test_call_ends_within_its_attempts_whatever_happens(
    policy: RetryPolicy, script: list[AttemptOutcome], chance: random.Random
) -> None:
    now_s = NOW_S
    for made, outcome in enumerate(script, 1):
        step = next_step(Progress(made), policy, outcome, now_s, chance.random)
        if not isinstance(step, RetryAt):
            assert made <= max(policy.max_attempts, 1)
            return
        assert step.due_s >= now_s
        now_s = step.due_s
    pytest.fail("the call goes on for ever")


@given(policies, outcomes, st.integers(1, 40), st.floats(0, 1e10))
def test_call_is_never_retried_at_or_after_its_expiry(
    policy: RetryPolicy, outcome: AttemptOutcome, made: int, life_s: float
) -> None:
    progress = Progress(made, expires_s=NOW_S + life_s)
    step = next_step(progress, policy, outcome, NOW_S, random.random)
    assert not isinstance(step, RetryAt) or step.due_s < NOW_S + life_s


@given(policies, outcomes, st.integers(1, 40), st.integers(0, 10))
def test_more_attempts_allowed_never_end_a_call_earlier(
    policy: RetryPolicy, outcome: AttemptOutcome, made: int, extra: int
) -> None:
    patient = dataclasses.replace(policy, max_attempts=policy.max_attempts + extra)
    if isinstance(next_step(Progress(made), policy, outcome, NOW_S, random.random), RetryAt):
        assert isinstance(next_step(Progress(made), patient, outcome, NOW_S, random.random), RetryAt)


# --- Waits -----------------------------------------------------------------------------------------------------


def test_waits_double_up_to_the_longest() -> None:
    waits = [retry_wait_s(POLICY, made, answered(500), NOW_S, never) for made in range(1, 7)]
    assert waits == [10, 20, 40, 80, 120, 120]


@pytest.mark.parametrize(("backoff", "least"), [("exponential", 1.0), ("full", 0.0), ("equal", 0.5)])
def test_jitter_draws_from_its_part_of_the_wait(backoff: str, least: float) -> None:
    policy = RetryPolicy(backoff=backoff)
    assert retry_wait_s(policy, 2, answered(500), NOW_S, lambda: 0.0) == 20 * least
    assert retry_wait_s(policy, 2, answered(500), NOW_S, lambda: 1.0) == 20


@given(policies, st.integers(1, 2**31), st.floats(0, 1))
def test_wait_is_within_its_bounds_for_any_attempt(policy: RetryPolicy, made: int, chance: float) -> None:
    wait_s = retry_wait_s(policy, made, answered(500), NOW_S, lambda: chance)
    assert 0 <= wait_s <= policy.max_wait_s
    assert retry_wait_s(policy, made + 1, answered(500), NOW_S, lambda: chance) >= wait_s


RETRY_AFTERS = {
    "longer than the wait": (429, "60", 60),
    "of 503": (503, "60", 60),
    "beyond the longest wait": (429, "600", 600),
    "shorter than the first wait": (429, "3", 10),
    "of another code": (500, "60", 10),
    "nonsense": (429, "soon", 10),
    "empty": (429, "", 10),
    "date": (429, "Tue, 14 Nov 2023 22:14:20 GMT", 60),
    "date that has passed": (429, "Tue, 14 Nov 2023 22:00:00 GMT", 10),
    "absurd": (429, "9" * 5000, MAX_RETRY_AFTER_S),
}


@pytest.mark.parametrize(("status", "text", "wait_s"), RETRY_AFTERS.values(), ids=RETRY_AFTERS)
def test_retry_after_wins_over_the_backoff(status: int, text: str, wait_s: float) -> None:
    assert retry_wait_s(POLICY, 1, answered(status, retry_after=text), NOW_S, never) == wait_s


DATES = {
    "seconds": ("120", 120),
    "zero": ("0", 0),
    "IMF-fixdate": ("Tue, 14 Nov 2023 22:15:20 GMT", 120),
    "RFC 850": ("Tuesday, 14-Nov-23 22:15:20 GMT", 120),
    "asctime": ("Tue Nov 14 22:15:20 2023", 120),
    "asctime, day below ten": ("Fri Dec  1 22:13:20 2023", MAX_RETRY_AFTER_S),
    "past": ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
    "RFC 850, 49 years ahead": ("Sunday, 06-Nov-72 08:49:37 GMT", MAX_RETRY_AFTER_S),
    "RFC 850, last century": ("Sunday, 06-Nov-94 08:49:37 GMT", 0),
    "far": ("Tue, 14 Nov 2999 22:15:20 GMT", MAX_RETRY_AFTER_S),
    "negative": ("-1", None),
    "fraction": ("1.5", None),
    "sign": ("+5", None),
    "Arabic digits": ("\u0661\u0662", None),
    "Arabic digits in a date": ("Tue, 1\u0664 Nov 2023 22:15:20 GMT", None),
    "unit": ("5s", None),
    "another zone": ("Tue, 14 Nov 2023 22:15:20 +0100", None),
    "no such day": ("Tue, 31 Feb 2023 22:15:20 GMT", None),
    "leap day of a plain year": ("Tuesday, 29-Feb-23 22:15:20 GMT", None),
    "ISO 8601": ("2023-11-14T22:15:20Z", None),
    "empty": ("", None),
}


@pytest.mark.parametrize(("text", "wait_s"), DATES.values(), ids=DATES)
def test_retry_after_is_read(text: str, wait_s: float | None) -> None:
    assert parse_retry_after(text, NOW_S) == wait_s


@given(st.integers(0, int(MAX_RETRY_AFTER_S)), st.integers(0, 4_000_000_000))
def test_retry_after_date_is_its_distance_from_now_in_any_year(wait_s: int, now_s: int) -> None:
    date = datetime.fromtimestamp(now_s + wait_s, UTC)
    assert parse_retry_after(format_datetime(date, usegmt=True), now_s) == wait_s
    assert parse_retry_after(date.strftime("%A, %d-%b-%y %H:%M:%S GMT"), now_s) == wait_s
    assert parse_retry_after(date.strftime("%a %b %e %H:%M:%S %Y"), now_s) == wait_s


@given(st.text())
def test_retry_after_of_any_text_is_bounded_or_nothing(text: str) -> None:
    wait_s = parse_retry_after(text, NOW_S)
    assert wait_s is None or 0 <= wait_s <= MAX_RETRY_AFTER_S


# --- Callbacks -------------------------------------------------------------------------------------------------

SOON = RetryAt(NOW_S + 2.5)  # the lower end of `equal` jitter on five seconds

CALLBACK_STEPS = {
    "200": (1, answered(200), Done(200)),
    "204": (8, answered(204), Done(204)),
    "299": (1, answered(299), Done(299)),
    "300": (1, answered(300), SOON),
    "a redirect that was not followed": (1, answered(307), SOON),
    "404": (1, answered(404), SOON),
    "410": (1, answered(410), Dead("status 410", 410, True)),
    "429 with Retry-After": (1, answered(429, retry_after="60"), RetryAt(NOW_S + 60)),
    "500": (1, answered(500), SOON),
    "second": (2, answered(500), RetryAt(NOW_S + 10)),
    "seventh": (7, answered(500), RetryAt(NOW_S + 1800)),
    "unreachable": (1, UNREACHABLE, SOON),
    "timed out": (1, TIMED_OUT, SOON),
    "refused address": (1, REFUSED, Dead("refused: not allowed by callback_allow", 0, False)),
    "held back": (1, HELD_BACK, SOON),
    "held back at last": (8, HELD_BACK, Dead(f"gave up after 8 attempts: {HELD_BACK.error}", 0, False)),
    "its result is lost": (1, LOST, SOON),
    "its result is lost at last": (8, LOST, Dead("gave up after 8 attempts: the file is gone", 500, False)),
    "a fault of ours": (1, FAULT, SOON),
    "no descriptors": (1, PREVENTED, HandBack()),
    "no descriptors at last": (8, PREVENTED, HandBack()),
    "eighth": (8, answered(500), Dead("gave up after 8 attempts: status 500", 500, True)),
    "unreachable at last": (8, UNREACHABLE, Dead("gave up after 8 attempts: connection refused", 503, False)),
}


@pytest.mark.parametrize(("made", "outcome", "step"), CALLBACK_STEPS.values(), ids=CALLBACK_STEPS)
def test_callback_goes_on_with(made: int, outcome: AttemptOutcome, step: object) -> None:
    assert next_callback_step(made, CALLBACK_POLICY, outcome, NOW_S, lambda: 0.0) == step


def test_callback_attempts_span_hours() -> None:
    waits = [retry_wait_s(CALLBACK_POLICY, made, UNREACHABLE, NOW_S, lambda: 0.5) for made in range(1, 8)]
    assert 3600 < sum(waits) < 4 * 3600


# --- Annotations -----------------------------------------------------------------------------------------------


def test_annotations_are_read() -> None:
    annotations = {
        "com.openfaas.retry.attempts": "30",
        "com.openfaas.retry.codes": "429, 503",
        "com.openfaas.retry.min_wait": "5s",
        "com.openfaas.retry.max_wait": "1m",
        "com.openfaas.queue": "slow",
    }
    parsed = parse_annotations("chaos", annotations)
    assert parsed == RetryAnnotations(30, frozenset({429, 503}), 5.0, 60.0)
    assert policy_for(POLICY, parsed) == RetryPolicy(30, 5.0, 60.0, frozenset({429, 503}))


def test_function_without_annotations_follows_the_worker() -> None:
    assert policy_for(POLICY, parse_annotations("echo", {})) == POLICY


@pytest.mark.parametrize(
    ("annotations", "waits"),
    [
        pytest.param({"com.openfaas.retry.min_wait": "5m"}, (300, 300), id="min_wait above the worker's longest"),
        pytest.param({"com.openfaas.retry.max_wait": "1s"}, (1, 1), id="max_wait below the worker's first"),
        pytest.param({"com.openfaas.retry.min_wait": "0s"}, (0, 120), id="no first wait"),
    ],
)
def test_functions_word_on_one_wait_bends_the_workers_other(
    annotations: dict[str, str], waits: tuple[int, int]
) -> None:
    policy = policy_for(POLICY, parse_annotations("echo", annotations))
    assert (policy.first_wait_s, policy.max_wait_s) == waits


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", "many"),
        ("attempts", "-1"),
        ("attempts", ""),
        ("codes", "5xx"),
        ("codes", "200"),
        ("codes", "429,"),
        ("codes", ""),
        ("min_wait", "5 s"),
        ("max_wait", "-1s"),
        ("attempt", "3"),
    ],
)
def test_bad_annotation_is_named_with_its_function_and_value(name: str, value: str) -> None:
    with pytest.raises(BadAnnotations, match="allowed") as caught:
        parse_annotations("echo", {f"com.openfaas.retry.{name}": value})
    assert f"function echo: annotation com.openfaas.retry.{name}: {value!r}: " in str(caught.value)


def test_all_bad_annotations_are_told_together() -> None:
    bad = {"com.openfaas.retry.attempts": "x", "com.openfaas.retry.codes": "y", "com.openfaas.retry.min_wait": "9s"}
    with pytest.raises(ValueError, match="function echo") as caught:
        parse_annotations("echo", bad | {"com.openfaas.retry.max_wait": "1s"})
    assert len(str(caught.value).splitlines()) == 3


def test_retry_codes_are_read() -> None:
    assert parse_retry_codes("429,502, 500,504,408") == POLICY.codes


# --- Concurrency -----------------------------------------------------------------------------------------------


def test_concurrency_starts_at_the_ceiling() -> None:
    assert Concurrency.start(16).capacity(0) == 16


@pytest.mark.parametrize("status", [200, 302, 404, 408, 500, 502, 504])
def test_concurrency_is_halved_by_a_refusal_and_regained_one_per_round_of_answers(status: int) -> None:
    limit = Concurrency.start(16).after(answered(429), 0.0, 1.0)
    assert limit.capacity(0) == 8
    for _ in range(9):
        limit = limit.after(answered(status), 1.0, 2.0)
    assert limit.capacity(0) == 9


def test_concurrency_is_cut_once_by_a_burst_of_refusals() -> None:
    limit = Concurrency.start(16)
    for _ in range(15):
        limit = limit.after(answered(429), 0.0, 1.0)
    assert limit.capacity(0) == 8
    assert limit.after(answered(503), 1.5, 2.0).capacity(0) == 4


@pytest.mark.parametrize("outcome", [UNREACHABLE, TIMED_OUT, LOST, FAULT, PREVENTED, answered(502, internal=True)])
def test_concurrency_does_not_move_for_a_call_that_the_function_did_not_answer(outcome: AttemptOutcome) -> None:
    limit = Concurrency(16, 4.0)
    assert limit.after(outcome, 0.0, 1.0) == limit


def test_concurrency_has_no_room_beside_enough_running_calls() -> None:
    assert Concurrency.start(2).capacity(3) == 0


@settings(max_examples=200)
@given(st.integers(1, 1000), st.lists(st.tuples(st.sampled_from([200, 204, 429, 503, 500]), st.floats(0, 10))))
def test_concurrency_stays_between_one_and_its_ceiling(ceiling: int, answers: list[tuple[int, float]]) -> None:
    limit, now_s = Concurrency.start(ceiling), 0.0
    for status, took_s in answers:
        now_s += 1.0
        after = limit.after(answered(status), now_s - took_s, now_s)
        assert 1 <= after.capacity(0) <= ceiling
        if status not in (429, 503):
            assert limit.limit <= after.limit <= limit.limit + 1
        else:
            assert after.limit <= limit.limit
        limit = after


@given(st.integers(1, 64), st.integers(1, 64))
def test_concurrency_settles_near_what_the_function_bears(ceiling: int, capacity: int) -> None:
    limit, sizes = Concurrency.start(ceiling), []
    for round_s in range(300):
        running = limit.capacity(0)
        sizes.append(running)
        for place in range(running):
            outcome = answered(200 if place < capacity else 429)
            limit = limit.after(outcome, float(round_s), round_s + 0.5)
    settled = sizes[100:]
    assert max(settled) <= min(capacity + 1, ceiling)
    assert sum(settled) / len(settled) >= min(capacity, ceiling) / 2


@pytest.mark.parametrize(
    ("attempts_made", "max_attempts", "expected"),
    [(1, 1, False), (4, 1, False), (5, 1, True), (4, 0, False), (5, 0, True), (13, 10, False), (14, 10, True)],
)
def test_call_is_poison_when_it_was_begun_more_often_than_attempts_and_unlucky_workers_explain(
    attempts_made: int, max_attempts: int, expected: bool
) -> None:
    errors = ["status 500"] * (attempts_made - 5) + [LOST_ERROR] * min(attempts_made - 1, 4)
    assert is_poison(attempts_made, RetryPolicy(max_attempts), errors) is expected
    assert is_poison(attempts_made, RetryPolicy(max_attempts), errors[-1:]) is expected


@pytest.mark.parametrize("lost_count", range(4))
def test_call_is_no_poison_when_its_attempts_had_outcomes_and_fewer_are_allowed_than_were(lost_count: int) -> None:
    assert not is_poison(9, RetryPolicy(3), ["status 500"] * (8 - lost_count) + [LOST_ERROR] * lost_count)
