"""The law of a call: every step from its acceptance to its end, pure, and the same in every queue.

    record = accept(new_call)                                   # it waits
    record = claim(record, Hold("call", owner, fence), now_s)   # a worker runs it
    record = end_run(record, end, excerpt, now_s)               # or retry_run, stop_run, release, take_back

A queue builds the `Record` of a call from what it stores, takes one step, and stores what the step has changed, all
of it or nothing.  A queue that keeps whole calls has `build_record` and `build_call` for that.

    what happens                     step                      raises, when it does not apply
    a worker takes a call            claim
    the function has answered        end_run                   AssertionError for a state no run ends in
    it is to run again later         retry_run
    a run was stopped                stop_run
    a worker could not try           release
    a worker is gone                 take_back
    the caller wants an end          cancel                    CallFinished
    its time was up before it ran    expire                    ask `is_expired` or `is_stale` first
    a person sends it again          requeue_dead              CallNotDead
    a worker takes a callback        claim
    a delivery has ended             end_callback
    a person sends that again        requeue_callback          CallNotDead
    its result, or all of it, goes   (none)                    ask `may_forget_result`, `may_forget`, `may_purge`

Contract: a state changes only as `TRANSITIONS` and `CALLBACK_TRANSITIONS` say; any other pair is an AssertionError, a
fault of the queue and not of its caller.  A call whose run ends in any way holds no lease any more.  Once a call has
reached one of `CALLS_BACK` its callback is due, by the same step.

It refuses to: read a clock, know a disk or a server, or keep anything between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import NamedTuple

from ..watchdog import IdentityEnum
from .model import (
    FINAL,
    HISTORY_COUNT,
    Attempt,
    Call,
    Callback,
    CallbackState,
    CallFinished,
    CallNotDead,
    Headers,
    Kind,
    NewCall,
    RunEnd,
    State,
    StoredBody,
)

# ---------------------------------------------------------------------------------------------------------------
# States.
#
# A call and its callback are two small machines.  The callback's machine starts when the call ends in one of
# `CALLS_BACK`, in the same step.  That a worker holds a lease is not a state: a RUNNING call, or a RUNNING callback,
# has exactly one, and losing it is the event HAND_BACK.
# ---------------------------------------------------------------------------------------------------------------


class Event(IdentityEnum):
    """What can happen to a call or to a callback."""

    CLAIM = "claim"
    SUCCEED = "succeed"
    RETRY = "retry"
    HAND_BACK = "hand back"
    GIVE_UP = "give up"
    CANCEL = "cancel"
    STOP = "stop"
    EXPIRE = "expire"
    REQUEUE = "requeue"


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.QUEUED, Event.CLAIM): State.RUNNING,
    (State.QUEUED, Event.CANCEL): State.CANCELLED,
    (State.QUEUED, Event.EXPIRE): State.EXPIRED,
    (State.RUNNING, Event.CANCEL): State.RUNNING,  # a request: the worker ends it with STOP, or the function ends first
    (State.RUNNING, Event.SUCCEED): State.DONE,
    (State.RUNNING, Event.GIVE_UP): State.DEAD,
    (State.RUNNING, Event.STOP): State.CANCELLED,
    (State.RUNNING, Event.RETRY): State.QUEUED,
    (State.RUNNING, Event.HAND_BACK): State.QUEUED,
    (State.DEAD, Event.REQUEUE): State.QUEUED,
}

CALLBACK_TRANSITIONS: Mapping[tuple[CallbackState, Event], CallbackState] = {
    (CallbackState.PENDING, Event.CLAIM): CallbackState.RUNNING,
    (CallbackState.RUNNING, Event.SUCCEED): CallbackState.DELIVERED,
    (CallbackState.RUNNING, Event.RETRY): CallbackState.PENDING,
    (CallbackState.RUNNING, Event.HAND_BACK): CallbackState.PENDING,
    (CallbackState.RUNNING, Event.GIVE_UP): CallbackState.DEAD,
    (CallbackState.DEAD, Event.REQUEUE): CallbackState.PENDING,
}

CALLS_BACK = FINAL - {State.CANCELLED}  # the ends that a callback URL is told of: the caller who cancelled knows
WAITING = frozenset(State) - FINAL  # what counts against the bounds of its function

_RUN_ENDS: Mapping[State, Event] = {State.DONE: Event.SUCCEED, State.DEAD: Event.GIVE_UP}  # how a run ends by itself


def next_state(state: State, event: Event) -> State:
    """Return where `event` takes a call; AssertionError for a pair that is not in `TRANSITIONS`."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise AssertionError(f"a call that is {state.value} cannot {event.value}") from None


def next_callback_state(state: CallbackState, event: Event) -> CallbackState:
    """Return where `event` takes a callback; AssertionError for a pair that is not in `CALLBACK_TRANSITIONS`."""
    try:
        return CALLBACK_TRANSITIONS[state, event]
    except KeyError:
        raise AssertionError(f"a callback that is {state.value} cannot {event.value}") from None


# ---------------------------------------------------------------------------------------------------------------
# Records.
#
# Named tuples, where our other records are frozen dataclasses: a busy queue builds and replaces some ten thousand a
# second, and a tuple takes a fifth of the time.
# ---------------------------------------------------------------------------------------------------------------


class Hold(NamedTuple):
    """The queue's side of a lease.  `fence` only ever grows: who holds an older one has lost it."""

    kind: Kind
    owner: str
    fence: int


class StoredAnswer(NamedTuple):
    """What is kept of a function's answer: a result until that is forgotten, or the beginning of a failed one."""

    result: StoredBody | None
    headers: Headers
    excerpt: bytes | None
    stored_s: float


UNREAD_ANSWER = StoredAnswer(None, (), None, 0.0)  # of a record read without its answer, which stays as it is stored


class Record(NamedTuple):
    """Where a call and its callback stand: all that a step looks at, and all that it changes.

    No step looks at `history` or `answer`.  So a queue may build a record with an empty history, to which a step adds
    at most one attempt, and with `UNREAD_ANSWER`, which a step replaces or leaves alone.
    """

    state: State
    due_s: float
    expires_s: float | None
    wants_callback: bool
    attempts: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    status: int | None = None
    error: str | None = None
    duration_s: float | None = None
    cancel_requested: bool = False
    callback: Callback | None = None
    hold: Hold | None = None
    history: tuple[Attempt, ...] = ()
    answer: StoredAnswer | None = None


def build_record(call: Call, hold: Hold | None = None, stored_s: float = 0.0) -> Record:
    """Return the record of a whole call; `stored_s` tells when its result was stored."""
    answer = None
    if call.result is not None or call.result_headers or call.excerpt is not None:
        answer = StoredAnswer(call.result, call.result_headers, call.excerpt, stored_s)
    return Record(
        state=call.state,
        due_s=call.due_s,
        expires_s=call.expires_s,
        wants_callback=call.callback_url is not None,
        attempts=call.attempts,
        started_s=call.started_s,
        finished_s=call.finished_s,
        status=call.status,
        error=call.error,
        duration_s=call.duration_s,
        cancel_requested=call.cancel_requested,
        callback=call.callback,
        hold=hold,
        history=call.history,
        answer=answer,
    )


def build_call(accepted: NewCall, record: Record) -> Call:
    """Return the whole call: what was accepted, and where it stands now."""
    answer = record.answer
    return Call(
        **{name: getattr(accepted, name) for name in _ACCEPTED},
        **{name: getattr(record, name) for name in _CHANGING},
        result=None if answer is None else answer.result,
        result_headers=() if answer is None else answer.headers,
        excerpt=None if answer is None else answer.excerpt,
    )


_CHANGING = tuple(name for name in Record._fields if name in {each.name for each in fields(Call)})
_ACCEPTED = tuple(each.name for each in fields(NewCall) if each.name not in _CHANGING)


# ---------------------------------------------------------------------------------------------------------------
# The life of a call.
# ---------------------------------------------------------------------------------------------------------------

EXPIRED_STATUS = 504  # of a call that no attempt has given a status: its time was up before there was an answer
EXPIRED_ERROR = "expired before it was run"
STALE_ERROR = "it was not run within max_queue_age"
LOST_ERROR = "the worker that ran it is gone"
LOST_WAIT_S = 60.0  # longest wait of a callback whose workers die


def accept(call: NewCall) -> Record:
    """Return the record that a call begins with."""
    return Record(State.QUEUED, call.due_s, call.expires_s, call.callback_url is not None)


def may_claim(record: Record, kind: Kind, now_s: float) -> bool:
    """Tell whether a worker may take the call, or its callback."""
    if kind == "callback":
        callback = record.callback
        return callback is not None and callback.state is CallbackState.PENDING and callback.due_s <= now_s
    return record.state is State.QUEUED and record.due_s <= now_s and not is_expired(record, now_s)


def claim(record: Record, hold: Hold, now_s: float) -> Record:
    """A worker takes a call, or its callback, and has begun an attempt."""
    if hold.kind == "callback":
        callback, state = _callback_after(record, Event.CLAIM)
        taken = Callback(state, callback.attempts + 1, callback.due_s, callback.status, callback.error)
        return record._replace(callback=taken, hold=hold)
    return record._replace(
        state=next_state(record.state, Event.CLAIM), attempts=record.attempts + 1, started_s=now_s, hold=hold
    )


def end_run(record: Record, end: RunEnd, excerpt: bytes | None, now_s: float) -> Record:
    """The call has ended by itself, done or dead, also when a cancel came too late; `excerpt` is of its result."""
    state = next_state(record.state, run_event(end))
    return record._replace(
        state=state,
        finished_s=end.attempt.finished_s,
        status=end.status,
        error=end.attempt.error,
        duration_s=end.duration_s,
        callback=_owed(record, state, now_s if end.callback_due_s is None else end.callback_due_s),
        hold=None,
        history=_remembered(record, end.attempt),
        answer=_kept(end, excerpt),
    )


def run_event(end: RunEnd) -> Event:
    """Return what has happened to a call that ends so; AssertionError for a state that no run ends in by itself."""
    if end.state not in _RUN_ENDS:
        raise AssertionError(f"a run ends done or dead, not {end.state.value}")
    return _RUN_ENDS[end.state]


def _kept(end: RunEnd, excerpt: bytes | None) -> StoredAnswer | None:
    if end.result is None and excerpt is None and not end.result_headers:
        return None
    return StoredAnswer(end.result, end.result_headers, excerpt, end.attempt.finished_s)


def _owed(record: Record, state: State, due_s: float) -> Callback | None:
    """The callback of a call that ends in `state`: due, if that end is to be told."""
    if record.wants_callback and state in CALLS_BACK:
        return Callback(CallbackState.PENDING, 0, due_s, None, None)
    return record.callback


def _remembered(record: Record, attempt: Attempt) -> tuple[Attempt, ...]:
    return (*record.history, attempt)[-HISTORY_COUNT:]


def retry_run(record: Record, attempt: Attempt, due_s: float, excerpt: bytes | None) -> Record:
    """The call is to run again at `due_s`; of the response only its beginning, `excerpt`, is kept."""
    again = _waiting_again(record, Event.RETRY, attempt.finished_s)
    return again._replace(
        due_s=due_s if again.state is State.QUEUED else record.due_s,
        status=attempt.status,
        error=attempt.error,
        history=_remembered(record, attempt),
        answer=None if excerpt is None else StoredAnswer(None, (), excerpt, attempt.finished_s),
    )


def stop_run(record: Record, attempt: Attempt) -> Record:
    """The run was stopped because a cancel was asked for."""
    stopped = _cancelled(record, Event.STOP, attempt.finished_s)
    return stopped._replace(status=attempt.status, error=attempt.error, history=_remembered(record, attempt))


def release(record: Record, now_s: float) -> Record:
    """What was claimed and not tried goes back into its old place, the attempt not counted."""
    if record.hold is not None and record.hold.kind == "callback":
        callback, state = _callback_after(record, Event.HAND_BACK)
        due_s = min(callback.due_s, now_s)
        untried = Callback(state, callback.attempts - 1, due_s, callback.status, callback.error)
        return record._replace(callback=untried, hold=None)
    again = _handed_back(record, now_s)
    return again._replace(attempts=record.attempts - 1)


def take_back(record: Record, now_s: float) -> Record:
    """The worker that held it is gone: it is due again, and the attempt counts."""
    if record.hold is None:
        raise AssertionError("only what is held can be taken back")
    if record.hold.kind == "callback":
        callback, state = _callback_after(record, Event.HAND_BACK)
        due_s = now_s + lost_wait_s(callback.attempts)
        return record._replace(callback=Callback(state, callback.attempts, due_s, None, LOST_ERROR), hold=None)
    started_s = now_s if record.started_s is None else record.started_s
    again = _handed_back(record, now_s)
    lost = Attempt(started_s, now_s, None, LOST_ERROR)
    return again._replace(status=None, error=LOST_ERROR, history=_remembered(record, lost))


def lost_wait_s(attempts: int) -> float:
    """Return how long a callback waits whose worker has died with it, at its attempt number `attempts`.

    Not at all after the first, since workers are restarted; then longer each time, as it may be what kills them. It is
    the worker that gives it up in the end, by the attempts that were begun.
    """
    return min(2.0 ** (min(attempts, 60) - 2), LOST_WAIT_S) if attempts > 1 else 0.0


def _handed_back(record: Record, now_s: float) -> Record:
    """What was due when it was claimed is due, even if the clock has been set back meanwhile."""
    return _waiting_again(record._replace(due_s=min(record.due_s, now_s)), Event.HAND_BACK, now_s)


def _waiting_again(record: Record, event: Event, now_s: float) -> Record:
    """Back into the queue, unless an end was asked for meanwhile: then this is it."""
    if record.cancel_requested:
        return _cancelled(record, Event.STOP, now_s)
    return record._replace(state=next_state(record.state, event), hold=None)


def _cancelled(record: Record, event: Event, now_s: float) -> Record:
    """The call ends, and no callback is sent: the caller has cancelled it."""
    state = next_state(record.state, event)
    return record._replace(state=state, finished_s=now_s, cancel_requested=True, hold=None)


def cancel(record: Record, now_s: float) -> Record:
    """The caller wants an end: at once of what is queued; the worker of what runs is told."""
    if (record.state, Event.CANCEL) not in TRANSITIONS:
        raise CallFinished(f"the call is {record.state.value}: there is nothing left to cancel")
    if record.state is State.QUEUED:
        return _cancelled(record, Event.CANCEL, now_s)
    return record._replace(state=next_state(record.state, Event.CANCEL), cancel_requested=True)


def is_expired(record: Record, now_s: float) -> bool:
    """Tell whether the call waits although its time is up."""
    return record.state is State.QUEUED and record.expires_s is not None and record.expires_s <= now_s


def is_stale(record: Record, before_s: float) -> bool:
    """Tell whether the call has been due since `before_s`: its queue has no worker, or none that keeps up.

    Not one that was begun since it was due and was handed back: it may have run for as long, and is the next to run.
    """
    was_begun = record.started_s is not None and record.started_s >= record.due_s
    return record.state is State.QUEUED and record.due_s < before_s and not was_begun


def expire(record: Record, now_s: float, error: str = EXPIRED_ERROR) -> Record:
    """The call has waited too long; what an earlier attempt gave stays its status and its error."""
    state = next_state(record.state, Event.EXPIRE)
    return record._replace(
        state=state,
        finished_s=now_s,
        status=EXPIRED_STATUS if record.status is None else record.status,
        error=error if record.error is None else record.error,
        callback=_owed(record, state, now_s),
    )


def set_back(record: Record, back_s: float) -> Record:
    """The wall clock was set back: what waits comes as soon as it would have come."""
    if record.state is State.QUEUED:
        expires_s, started_s = (
            None if each is None else each - back_s for each in (record.expires_s, record.started_s)
        )
        return record._replace(due_s=record.due_s - back_s, expires_s=expires_s, started_s=started_s)
    if record.callback is not None and record.callback.state is CallbackState.PENDING:
        return record._replace(callback=replace(record.callback, due_s=record.callback.due_s - back_s))
    return record


def requeue_dead(record: Record, now_s: float) -> Record:
    """A dead letter starts afresh: no expiry, no attempts, no result, no callback; a delivery under way loses it."""
    if (record.state, Event.REQUEUE) not in TRANSITIONS:
        raise CallNotDead(f"only a dead letter can be queued again; the call is {record.state.value}")
    return Record(
        next_state(record.state, Event.REQUEUE),
        due_s=now_s,
        expires_s=None,
        wants_callback=record.wants_callback,
        status=record.status,
        error=record.error,
        history=record.history,
    )


# ---------------------------------------------------------------------------------------------------------------
# The life of a callback, which begins with the end of its call.
# ---------------------------------------------------------------------------------------------------------------


def _callback_after(record: Record, event: Event) -> tuple[Callback, CallbackState]:
    """The callback as it is, and the state that it comes into."""
    if record.callback is None:
        raise AssertionError(f"a callback that is not there cannot {event.value}")
    return record.callback, next_callback_state(record.callback.state, event)


def end_callback(record: Record, event: Event, attempt: Attempt, due_s: float | None = None) -> Record:
    """A delivery has ended: SUCCEED, GIVE_UP, or RETRY at `due_s`.  One that is given up was due last when it ended."""
    callback, state = _callback_after(record, event)
    if due_s is None:
        due_s = attempt.finished_s if event is Event.GIVE_UP else callback.due_s
    return record._replace(callback=Callback(state, callback.attempts, due_s, attempt.status, attempt.error), hold=None)


def requeue_callback(record: Record, now_s: float) -> Record:
    """A dead callback starts afresh."""
    callback = record.callback
    if callback is None or (callback.state, Event.REQUEUE) not in CALLBACK_TRANSITIONS:
        state = callback.state.value if callback else "not there"
        raise CallNotDead(f"only a dead callback can be queued again; this one is {state}")
    again = next_callback_state(callback.state, Event.REQUEUE)
    return record._replace(callback=Callback(again, 0, now_s, callback.status, callback.error))


# ---------------------------------------------------------------------------------------------------------------
# What may go.
# ---------------------------------------------------------------------------------------------------------------

_DELIVERED = (None, CallbackState.DELIVERED)  # nothing is owed any more
_UNDER_WAY = (CallbackState.PENDING, CallbackState.RUNNING)


def _callback_state(record: Record) -> CallbackState | None:
    return None if record.callback is None else record.callback.state


def may_forget_result(record: Record, before_s: float) -> bool:
    """Tell whether a result that was stored before `before_s` may go: not while it is owed to a callback."""
    answer = record.answer
    stored = answer is not None and answer.result is not None and answer.stored_s < before_s
    return stored and _callback_state(record) in _DELIVERED


def may_forget(record: Record, before_s: float) -> bool:
    """Tell whether a call that ended before `before_s` may go: never a dead letter, nor what is owed to a callback."""
    if record.state not in FINAL - {State.DEAD} or record.finished_s is None:
        return False
    return record.finished_s < before_s and _callback_state(record) in _DELIVERED


def may_drop_dead_letter(record: Record, before_s: float) -> bool:
    """Tell whether a dead letter, or a call whose callback is dead, may go: given up, both, up to `before_s`."""
    callback = record.callback
    if callback is not None and callback.state is CallbackState.DEAD:
        is_old = callback.due_s <= before_s
    else:
        is_old = record.state is State.DEAD and _callback_state(record) not in _UNDER_WAY
    return is_old and record.finished_s is not None and record.finished_s <= before_s


def may_purge(record: Record, state: State) -> bool:
    """Tell whether a person who deletes all that is in a final `state` may delete the call."""
    return record.state is state and state in FINAL and _callback_state(record) not in _UNDER_WAY
