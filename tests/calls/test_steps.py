"""The law of a call: each step in each state, by the tables; and what holds after any steps in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from faashound.calls import steps
from faashound.calls.model import (
    FINAL,
    HISTORY_COUNT,
    Attempt,
    Callback,
    CallbackState,
    CallFinished,
    CallNotDead,
    NewCall,
    RunEnd,
    State,
    StoredBody,
)
from faashound.calls.names import FunctionName
from faashound.calls.steps import (
    CALLBACK_TRANSITIONS,
    CALLS_BACK,
    TRANSITIONS,
    Event,
    Hold,
    Record,
    StoredAnswer,
    next_callback_state,
    next_state,
)

NOW_S = 1_700_000_000.0
ATTEMPT = Attempt(NOW_S - 2, NOW_S - 1, 500, "failed")
BODY = StoredBody(3, b"out", None)
RUN, DELIVERY = Hold("call", "w", 7), Hold("callback", "w", 8)
STATE_EVENTS = list(itertools.product(State, Event))
CALLBACK_EVENTS = list(itertools.product(CallbackState, Event))

Step = Callable[[Record], Record]

# One step for each event; `release` and `take_back` are both HAND_BACK.
CALL_STEPS: Mapping[Event, list[Step]] = {
    Event.CLAIM: [lambda record: steps.claim(record, RUN, NOW_S)],
    Event.SUCCEED: [lambda record: steps.end_run(record, RunEnd(State.DONE, ATTEMPT, 200, 1.0, BODY), None, NOW_S)],
    Event.GIVE_UP: [lambda record: steps.end_run(record, RunEnd(State.DEAD, ATTEMPT, 500, 1.0), None, NOW_S)],
    Event.RETRY: [lambda record: steps.retry_run(record, ATTEMPT, NOW_S + 10, b"oh")],
    Event.HAND_BACK: [
        lambda record: steps.release(record, NOW_S),
        lambda record: steps.take_back(record._replace(hold=RUN), NOW_S),
    ],
    Event.CANCEL: [lambda record: steps.cancel(record, NOW_S)],
    Event.STOP: [lambda record: steps.stop_run(record, ATTEMPT)],
    Event.EXPIRE: [lambda record: steps.expire(record, NOW_S)],
    Event.REQUEUE: [lambda record: steps.requeue_dead(record, NOW_S)],
}

CALLBACK_STEPS: Mapping[Event, list[Step]] = {
    Event.CLAIM: [lambda record: steps.claim(record, DELIVERY, NOW_S)],
    Event.SUCCEED: [lambda record: steps.end_callback(record, Event.SUCCEED, ATTEMPT)],
    Event.GIVE_UP: [lambda record: steps.end_callback(record, Event.GIVE_UP, ATTEMPT)],
    Event.RETRY: [lambda record: steps.end_callback(record, Event.RETRY, ATTEMPT, NOW_S + 10)],
    Event.HAND_BACK: [
        lambda record: steps.release(record._replace(hold=DELIVERY), NOW_S),
        lambda record: steps.take_back(record._replace(hold=DELIVERY), NOW_S),
    ],
    Event.REQUEUE: [lambda record: steps.requeue_callback(record, NOW_S)],
}


def new_call(**changes: Any) -> NewCall:
    fields: dict[str, Any] = {
        "id": "c",
        "function": FunctionName("f.ns"),
        "queue": "q",
        "method": "POST",
        "path": "/",
        "query": "",
        "headers": (),
        "body": StoredBody(2, b"in", None),
        "callback_url": "http://a/",
        "due_s": NOW_S,
        "expires_s": None,
        "idempotency_key": None,
        "accepted_s": NOW_S,
    }
    return NewCall(**(fields | changes))


def record_in(state: State) -> Record:
    """A call in `state` that was begun once before."""
    hold = RUN if state is State.RUNNING else None
    return steps.accept(new_call())._replace(state=state, attempts=1, started_s=NOW_S - 2, hold=hold)


def record_owing(callback: CallbackState) -> Record:
    """A call that is done, with its callback in that state."""
    hold = DELIVERY if callback is CallbackState.RUNNING else None
    owed = Callback(callback, 1, NOW_S - 5, None, None)
    return record_in(State.DONE)._replace(finished_s=NOW_S - 1, callback=owed, hold=hold)


# -- the tables


@pytest.mark.parametrize(("state", "event"), STATE_EVENTS, ids=lambda each: each.value)
def test_a_call_moves_only_as_the_table_says(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match="cannot"):
            next_state(state, event)


@pytest.mark.parametrize(("state", "event"), CALLBACK_EVENTS, ids=lambda each: each.value)
def test_a_callback_moves_only_as_the_table_says(state: CallbackState, event: Event) -> None:
    if (state, event) in CALLBACK_TRANSITIONS:
        assert next_callback_state(state, event) is CALLBACK_TRANSITIONS[state, event]
    else:
        with pytest.raises(AssertionError, match="cannot"):
            next_callback_state(state, event)


def test_only_a_dead_letter_leaves_a_final_state() -> None:
    assert {pair for pair in TRANSITIONS if pair[0] in FINAL} == {(State.DEAD, Event.REQUEUE)}


@pytest.mark.parametrize(("state", "event"), STATE_EVENTS, ids=lambda each: each.value)
def test_each_step_of_a_call_follows_the_table(state: State, event: Event) -> None:
    for step in CALL_STEPS[event]:
        if (state, event) in TRANSITIONS:
            after = step(record_in(state))
            assert after.state is TRANSITIONS[state, event]
            assert (after.hold is not None) == (after.state is State.RUNNING)
            assert (after.callback is not None) == (after.state in CALLS_BACK)
        else:
            with pytest.raises((AssertionError, CallFinished, CallNotDead)):
                step(record_in(state))


@pytest.mark.parametrize(("state", "event"), CALLBACK_EVENTS, ids=lambda each: each.value)
def test_each_step_of_a_callback_follows_the_table(state: CallbackState, event: Event) -> None:
    for step in CALLBACK_STEPS.get(event, []):
        if (state, event) in CALLBACK_TRANSITIONS:
            after = step(record_owing(state))
            assert after.callback is not None
            assert after.callback.state is CALLBACK_TRANSITIONS[state, event]
            assert (after.hold is not None) == (after.callback.state is CallbackState.RUNNING)
            assert after.state is State.DONE
        else:
            with pytest.raises((AssertionError, CallNotDead)):
                step(record_owing(state))


def test_every_event_of_the_tables_has_a_step() -> None:
    assert {event for _, event in TRANSITIONS} == set(CALL_STEPS)
    assert {event for _, event in CALLBACK_TRANSITIONS} == set(CALLBACK_STEPS)


@pytest.mark.parametrize("step", [step for each in CALLBACK_STEPS.values() for step in each])
def test_a_callback_that_is_not_there_takes_no_step(step: Step) -> None:
    with pytest.raises((AssertionError, CallNotDead)):
        step(record_in(State.DONE))


# -- what each step does besides


@pytest.mark.parametrize("state", [State.QUEUED, State.RUNNING, State.CANCELLED, State.EXPIRED])
def test_a_run_ends_done_or_dead_and_no_other_way(state: State) -> None:
    with pytest.raises(AssertionError, match="done or dead"):
        steps.end_run(record_in(State.RUNNING), RunEnd(state, ATTEMPT, 200, 1.0), None, NOW_S)


def test_a_run_that_ends_keeps_the_answer_and_its_attempt() -> None:
    end = RunEnd(State.DONE, ATTEMPT, 404, 1.5, BODY, (("a", "b"),))
    after = steps.end_run(record_in(State.RUNNING), end, b"o", NOW_S)
    assert after.answer == StoredAnswer(BODY, (("a", "b"),), b"o", ATTEMPT.finished_s)
    assert (after.status, after.error, after.duration_s, after.history) == (404, "failed", 1.5, (ATTEMPT,))


@pytest.mark.parametrize(("asked_s", "due_s"), [(None, NOW_S), (NOW_S + 60, NOW_S + 60)])
def test_a_callback_is_due_at_once_or_when_the_worker_says(asked_s: float | None, due_s: float) -> None:
    end = RunEnd(State.DONE, ATTEMPT, 200, 1.0, callback_due_s=asked_s)
    after = steps.end_run(record_in(State.RUNNING), end, None, NOW_S)
    assert after.callback == Callback(CallbackState.PENDING, 0, due_s, None, None)


@pytest.mark.parametrize("step", [*CALL_STEPS[Event.RETRY], *CALL_STEPS[Event.HAND_BACK]])
def test_a_call_that_would_wait_again_is_cancelled_when_that_was_asked_for(step: Step) -> None:
    after = step(steps.cancel(record_in(State.RUNNING), NOW_S))
    assert (after.state, after.hold, after.callback) == (State.CANCELLED, None, None)
    assert after.finished_s is not None


def test_a_call_that_is_released_has_not_been_tried() -> None:
    before = record_in(State.QUEUED)
    after = steps.release(steps.claim(before, RUN, NOW_S), NOW_S + 1)
    assert after == before._replace(started_s=NOW_S)


def test_a_call_that_is_taken_back_has_been_tried() -> None:
    after = steps.take_back(steps.claim(record_in(State.QUEUED), RUN, NOW_S), NOW_S + 1)
    assert (after.attempts, after.due_s, after.status, after.error) == (2, NOW_S, None, steps.LOST_ERROR)
    assert after.history == (Attempt(NOW_S, NOW_S + 1, None, steps.LOST_ERROR),)


@pytest.mark.parametrize(
    ("attempts", "wait_s"), [(1, 0.0), (2, 1.0), (3, 2.0), (8, 60.0), (5000, 60.0)], ids=lambda value: str(value)
)
def test_a_callback_that_is_taken_back_waits_longer_each_time(attempts: int, wait_s: float) -> None:
    owed = Callback(CallbackState.RUNNING, attempts, NOW_S, 500, "before")
    after = steps.take_back(record_owing(CallbackState.RUNNING)._replace(callback=owed), NOW_S)
    assert after.callback == Callback(CallbackState.PENDING, attempts, NOW_S + wait_s, None, steps.LOST_ERROR)


def test_a_call_that_expires_keeps_what_an_attempt_has_given_it() -> None:
    fresh = steps.expire(record_in(State.QUEUED), NOW_S)
    tried = steps.expire(record_in(State.QUEUED)._replace(status=429, error="busy"), NOW_S)
    assert (fresh.status, fresh.error) == (steps.EXPIRED_STATUS, steps.EXPIRED_ERROR)
    assert (tried.status, tried.error) == (429, "busy")


def test_the_history_holds_the_last_attempts() -> None:
    record = record_in(State.RUNNING)
    for number in range(HISTORY_COUNT + 5):
        attempt = Attempt(float(number), float(number), 500, None)
        record = steps.claim(steps.retry_run(record, attempt, NOW_S, None), RUN, NOW_S)
    assert [attempt.started_s for attempt in record.history] == [float(n) for n in range(5, HISTORY_COUNT + 5)]


def test_a_dead_letter_that_is_sent_again_is_as_new() -> None:
    run = record_in(State.RUNNING)._replace(expires_s=NOW_S + 1)
    dead = steps.end_run(run, RunEnd(State.DEAD, ATTEMPT, 500, 1.0, BODY), None, NOW_S)
    after = steps.requeue_dead(dead, NOW_S + 9)
    new = steps.accept(new_call(due_s=NOW_S + 9))
    assert after == new._replace(status=500, error="failed", history=(ATTEMPT,))


# -- what holds after any steps

ANY_STEP = st.sampled_from([step for each in (*CALL_STEPS.values(), *CALLBACK_STEPS.values()) for step in each])


@given(st.booleans(), st.lists(ANY_STEP, max_size=30))
def test_a_record_makes_sense_after_any_steps(wants_callback: bool, chain: list[Step]) -> None:
    record = steps.accept(new_call(callback_url="http://a/" if wants_callback else None))
    for step in chain:
        try:
            after = step(record)
        except (AssertionError, CallFinished, CallNotDead):
            continue
        record = after
    callback = record.callback.state if record.callback else None
    assert (record.hold == RUN) == (record.state is State.RUNNING)
    assert (record.hold == DELIVERY) == (callback is CallbackState.RUNNING)
    assert (record.finished_s is not None) == (record.state in FINAL)
    assert (callback is not None) == (wants_callback and record.state in CALLS_BACK)
    assert record.attempts >= 0
    assert not (steps.may_forget(record, NOW_S + 99) and steps.may_drop_dead_letter(record, NOW_S + 99))


@given(st.booleans(), st.lists(ANY_STEP, max_size=12))
def test_a_whole_call_has_all_of_its_record(wants_callback: bool, chain: list[Step]) -> None:
    accepted = new_call(callback_url="http://a/" if wants_callback else None)
    record = steps.accept(accepted)
    for step in chain:
        try:
            record = step(record)
        except (AssertionError, CallFinished, CallNotDead):
            continue
    call = steps.build_call(accepted, record)
    stored_s = 0.0 if record.answer is None else record.answer.stored_s
    assert steps.build_record(call, record.hold, stored_s) == record


# -- what may go


@pytest.mark.parametrize("callback", [None, *CallbackState])
@pytest.mark.parametrize("state", list(State))
def test_only_what_is_owed_to_no_receiver_is_forgotten(state: State, callback: CallbackState | None) -> None:
    owed = callback and Callback(callback, 1, NOW_S, None, None)
    answer = StoredAnswer(BODY, (), None, NOW_S)
    record = record_in(state)._replace(finished_s=NOW_S, callback=owed, answer=answer)
    delivered = callback in (None, CallbackState.DELIVERED)
    under_way = callback in (CallbackState.PENDING, CallbackState.RUNNING)
    assert steps.may_forget_result(record, NOW_S + 1) == delivered
    assert not steps.may_forget_result(record, NOW_S)
    assert steps.may_forget(record, NOW_S + 1) == (delivered and state in FINAL and state is not State.DEAD)
    assert not steps.may_forget(record, NOW_S)
    assert steps.may_purge(record, state) == (state in FINAL and not under_way)
    letter = callback is CallbackState.DEAD or (state is State.DEAD and not under_way)
    assert steps.may_drop_dead_letter(record, NOW_S) == letter
    assert not steps.may_drop_dead_letter(record, NOW_S - 1)
