"""The spool against the law: every operation, on calls in every state at once, does what calls/steps.py says, no more.

On a real file stand calls in all states, with callbacks in all states, due and not due, expired and not.  An operation
is done; the law says of each call what must have become of it, and of all others that nothing has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from faashound.calls import steps
from faashound.calls.model import (
    FINAL,
    Attempt,
    Bounds,
    Call,
    CallbackState,
    CallFinished,
    CallNotDead,
    Kind,
    Lease,
    LeaseLost,
    RunEnd,
    State,
)
from faashound.calls.steps import CALLBACK_TRANSITIONS, TRANSITIONS, Event, Hold, Record
from faashound.queues.spool.queue import Spool
from testkit.queue_kit import inline
from testkit.spool_kit import LEASE_S, START_S, Desk

DAY_S = 86400.0
CALLER = "http://caller/"
OUT = inline(b"out")
Calls = dict[str, Record]


class Cabinet:
    """A queue with a call in each state; `leases` are those that are held, by the id of their call."""

    def __init__(self, directory: Path) -> None:
        self.desk = Desk(directory)
        self.leases: dict[str, Lease] = {}
        self.ids: dict[str, str] = {}
        desk = self.desk
        for state in (State.DONE, State.DEAD):
            for callback in (None, CallbackState.DELIVERED, CallbackState.DEAD, CallbackState.RUNNING):
                self.add_ended(state, callback)
            self.add_given_up_later(state)
        self.add_expired(None)
        for callback in (CallbackState.DELIVERED, CallbackState.DEAD, CallbackState.RUNNING):
            self.add_expired(callback)
        self.add("cancelled", desk.put(callback_url=CALLER))
        desk.do(desk.spool.cancel(self.ids["cancelled"]))
        for name, cancelled in {"running": False, "running-cancelled": True}.items():
            self.add_running(name)
            if cancelled:
                desk.do(desk.spool.cancel(self.ids[name]))
        for state in (State.DONE, State.DEAD):
            self.add_ended(state, CallbackState.PENDING)
        self.add_expired(CallbackState.PENDING)
        self.add_tried()
        self.add("queued-handed-back", desk.put(due_s=START_S - DAY_S))
        desk.do(desk.spool.release(desk.claim_one()))
        self.add("queued", desk.put(callback_url=CALLER))
        self.add("queued-later", desk.put(due_s=START_S + 600, expires_s=START_S + 900))
        self.add("queued-expiring", desk.put(expires_s=START_S + 60))
        self.add("queued-expired", desk.put(expires_s=START_S - 1, callback_url=CALLER))
        self.add("queued-stale", desk.put(due_s=START_S - DAY_S))

    def add(self, name: str, call: Call) -> None:
        self.ids[name] = call.id

    def add_running(self, name: str, callback_url: str | None = None) -> Lease:
        call = self.desk.put(callback_url=callback_url)
        lease = self.desk.claim_one()
        assert lease.call.id == call.id
        self.ids[name] = call.id
        self.leases[call.id] = lease
        return lease

    def add_ended(self, state: State, callback: CallbackState | None) -> None:
        name = f"{state.value}-{callback.value if callback else 'quiet'}"
        lease = self.add_running(name, callback_url=CALLER if callback else None)
        self.desk.finish(self.leases.pop(lease.call.id), state, status=404)
        self.deliver(callback)

    def add_given_up_later(self, state: State) -> None:
        """A call that has ended long before its callback was given up."""
        self.add_ended(state, CallbackState.PENDING)
        self.ids[f"{state.value}-dead-later"] = self.ids.pop(f"{state.value}-pending")
        given_up = Attempt(START_S, START_S + 1.5 * DAY_S, 410, "gone")
        self.desk.do(self.desk.spool.callback_dead(self.desk.claim_callback(), given_up))

    def add_expired(self, callback: CallbackState | None) -> None:
        name = f"expired-{callback.value if callback else 'quiet'}"
        self.add(name, self.desk.put(expires_s=START_S - 1, callback_url=CALLER if callback else None))
        assert self.desk.claim() == []
        self.deliver(callback)

    def deliver(self, callback: CallbackState | None) -> None:
        """Take the only callback that is pending as far as that."""
        if callback in (None, CallbackState.PENDING):
            return
        lease, spool = self.desk.claim_callback(), self.desk.spool
        if callback is CallbackState.RUNNING:
            self.leases[lease.call.id] = lease
        elif callback is CallbackState.DELIVERED:
            self.desk.do(spool.callback_done(lease, self.desk.attempt()))
        else:
            self.desk.do(spool.callback_dead(lease, self.desk.attempt(410, "gone")))

    def add_tried(self) -> None:
        lease = self.add_running("queued-tried")
        del self.leases[lease.call.id]
        attempt = self.desk.attempt(429, "busy")
        self.desk.do(self.desk.spool.retry(lease, attempt=attempt, due_s=START_S, excerpt=b"oh"))

    def look(self) -> Calls:
        """The records of all calls, by the names they have here."""
        holds = {
            call_id: Hold(kind, owner, fence)
            for call_id, kind, owner, fence in self.desk.rows(
                "SELECT id, kind, owner, fence FROM leases JOIN calls USING (seq)"
            )
        }
        stored = dict(self.desk.rows("SELECT id, stored_s FROM results JOIN calls USING (seq)"))
        found: Calls = {}
        for name, call_id in self.ids.items():
            call = self.desk.do(self.desk.spool.get(call_id))
            if call is not None:
                found[name] = steps.build_record(call, holds.get(call_id), stored.get(call_id, 0.0))
        return found

    def lease_of(self, name: str, kind: Kind) -> Lease:
        """The lease on a call, or one that has been lost."""
        call_id = self.ids[name]
        lease = self.leases.get(call_id)
        return lease if lease and lease.kind == kind else Lease(self.desk.get(call_id), kind, "gone", 10_000)


@pytest.fixture
def cabinet(tmp_path: Path) -> Iterator[Cabinet]:
    cabinet = Cabinet(tmp_path / "spool")
    yield cabinet
    cabinet.desk.close()


NAMES = (
    *(f"{state}-{callback}" for state in ("done", "dead") for callback in ("quiet", "delivered", "dead", "running")),
    *(f"expired-{callback}" for callback in ("quiet", "delivered", "dead", "running", "pending")),
    *("done-dead-later", "dead-dead-later", "done-pending", "dead-pending"),
    *("cancelled", "running", "running-cancelled", "queued", "queued-tried"),
    *("queued-later", "queued-expiring", "queued-expired", "queued-stale", "queued-handed-back"),
)


def test_cabinet_has_every_state(cabinet: Cabinet) -> None:
    records = cabinet.look()
    assert set(records) == set(NAMES)
    assert {record.state for record in records.values()} == set(State)
    callbacks = {(record.state, record.callback.state) for record in records.values() if record.callback}
    assert callbacks == {(state, callback) for state in steps.CALLS_BACK for callback in CallbackState}


def test_call_that_was_put_is_as_it_was_accepted(cabinet: Cabinet) -> None:
    call = cabinet.desk.new_call(callback_url=CALLER, expires_s=START_S + 9)
    assert cabinet.desk.do(cabinet.desk.spool.put(call)) is call
    assert steps.accept(call) == steps.build_record(cabinet.desk.get(call.id))


# -- one call: each event of the tables

ATTEMPT = Attempt(START_S - 2, START_S - 1, 500, "failed")
DONE = RunEnd(State.DONE, ATTEMPT, 404, 1.5, OUT, (("A", "b"),))
DEAD = RunEnd(State.DEAD, ATTEMPT, 500, 1.5, callback_due_s=START_S + 30)

Act = Callable[[Spool, Lease], object]
RUN_EVENTS: Mapping[str, tuple[Event, Act, Callable[[Record], Record]]] = {
    "succeed": (
        Event.SUCCEED,
        lambda s, lease: s.finish(lease, DONE),
        lambda r: steps.end_run(r, DONE, b"out", START_S),
    ),
    "give-up": (Event.GIVE_UP, lambda s, lease: s.finish(lease, DEAD), lambda r: steps.end_run(r, DEAD, None, START_S)),
    "retry": (
        Event.RETRY,
        lambda s, lease: s.retry(lease, attempt=ATTEMPT, due_s=START_S + 9, excerpt=b"oh"),
        lambda r: steps.retry_run(r, ATTEMPT, START_S + 9, b"oh"),
    ),
    "release": (Event.HAND_BACK, lambda s, lease: s.release(lease), lambda r: steps.release(r, START_S)),
    "stop": (Event.STOP, lambda s, lease: s.finish_cancelled(lease, ATTEMPT), lambda r: steps.stop_run(r, ATTEMPT)),
}
DELIVERY_EVENTS: Mapping[str, tuple[Event, Act, Callable[[Record], Record]]] = {
    "succeed": (
        Event.SUCCEED,
        lambda s, lease: s.callback_done(lease, ATTEMPT),
        lambda r: steps.end_callback(r, Event.SUCCEED, ATTEMPT),
    ),
    "give-up": (
        Event.GIVE_UP,
        lambda s, lease: s.callback_dead(lease, ATTEMPT),
        lambda r: steps.end_callback(r, Event.GIVE_UP, ATTEMPT),
    ),
    "retry": (
        Event.RETRY,
        lambda s, lease: s.callback_retry(lease, ATTEMPT, START_S + 9),
        lambda r: steps.end_callback(r, Event.RETRY, ATTEMPT, START_S + 9),
    ),
    "release": (Event.HAND_BACK, lambda s, lease: s.release(lease), lambda r: steps.release(r, START_S)),
}
EVENTS = {"call": RUN_EVENTS, "callback": DELIVERY_EVENTS}


@pytest.mark.parametrize(
    ("kind", "event"), [(kind, event) for kind, events in EVENTS.items() for event in events], ids=lambda each: each
)
def test_end_of_a_lease_is_the_step_of_the_law_in_every_state(cabinet: Cabinet, kind: Kind, event: str) -> None:
    named, act, step = EVENTS[kind][event]
    for name in NAMES:
        before = cabinet.look()
        record = before[name]
        lease = cabinet.lease_of(name, kind)
        held = record.hold is not None and record.hold.kind == kind
        callback = record.callback.state if record.callback else None
        if held:
            cabinet.desk.do(act(cabinet.desk.spool, lease))  # type: ignore[arg-type]
            before[name] = step(record)
        else:
            with pytest.raises(LeaseLost):
                cabinet.desk.do(act(cabinet.desk.spool, lease))  # type: ignore[arg-type]
        if kind == "call":
            assert held == ((record.state, named) in TRANSITIONS)
        else:
            assert held == (callback is not None and (callback, named) in CALLBACK_TRANSITIONS)
        assert cabinet.look() == before


PEOPLE: Mapping[str, tuple[Callable[[Spool, str], object], Callable[[Record], Record]]] = {
    "cancel": (lambda spool, call_id: spool.cancel(call_id), partial(steps.cancel, now_s=START_S)),
    "requeue-dead": (lambda spool, call_id: spool.requeue_dead(call_id), partial(steps.requeue_dead, now_s=START_S)),
    "requeue-callback": (
        lambda spool, call_id: spool.requeue_callback(call_id),
        partial(steps.requeue_callback, now_s=START_S),
    ),
}


@pytest.mark.parametrize("event", PEOPLE)
def test_what_a_person_does_is_the_step_of_the_law_in_every_state(cabinet: Cabinet, event: str) -> None:
    act, step = PEOPLE[event]
    for name in NAMES:
        before = cabinet.look()
        try:
            after = step(before[name])
        except (CallFinished, CallNotDead) as error:
            with pytest.raises(type(error)):
                cabinet.desk.do(act(cabinet.desk.spool, cabinet.ids[name]))  # type: ignore[arg-type]
        else:
            cabinet.desk.do(act(cabinet.desk.spool, cabinet.ids[name]))  # type: ignore[arg-type]
            before[name] = after
        assert cabinet.look() == before


# -- many calls at once


def test_claim_takes_what_the_law_lets_it_take(cabinet: Cabinet) -> None:
    before = cabinet.look()
    taken = {lease.call.id: lease for lease in cabinet.desk.claim()}
    for name, record in before.items():
        assert steps.may_claim(record, "call", START_S) == (cabinet.ids[name] in taken)
        if steps.is_expired(record, START_S):
            before[name] = steps.expire(record, START_S)
        elif cabinet.ids[name] in taken:
            lease = taken[cabinet.ids[name]]
            before[name] = steps.claim(record, Hold("call", lease.owner, lease.fence), START_S)
            assert steps.build_record(lease.call, before[name].hold, stored_s(before[name])) == before[name]
    assert cabinet.look() == before


def stored_s(record: Record) -> float:
    return record.answer.stored_s if record.answer else 0.0


def test_claim_of_callbacks_takes_what_the_law_lets_it_take(cabinet: Cabinet) -> None:
    cabinet.desk.do(
        cabinet.desk.spool.callback_retry(cabinet.lease_of("done-running", "callback"), ATTEMPT, START_S + 9)
    )
    before = cabinet.look()
    taken = {lease.call.id: lease for lease in cabinet.desk.claim_callbacks()}
    for name, record in before.items():
        assert steps.may_claim(record, "callback", START_S) == (cabinet.ids[name] in taken)
        if cabinet.ids[name] in taken:
            lease = taken[cabinet.ids[name]]
            before[name] = steps.claim(record, Hold("callback", lease.owner, lease.fence), START_S)
    assert cabinet.look() == before


def test_taking_back_is_the_step_of_the_law_for_all_that_is_held(cabinet: Cabinet) -> None:
    desk = cabinet.desk
    desk.do(desk.spool.renew(list(cabinet.leases.values()), 0.0))
    before = cabinet.look()
    held = {name for name, record in before.items() if record.hold is not None}
    assert desk.do(desk.spool.reclaim()) == len(held) == 5
    for name in held:
        before[name] = steps.take_back(before[name], START_S)
    assert cabinet.look() == before


def test_cancelling_all_is_the_step_of_the_law_for_all_that_is_queued(cabinet: Cabinet) -> None:
    before = cabinet.look()
    queued = {name for name, record in before.items() if record.state is State.QUEUED}
    assert cabinet.desk.do(cabinet.desk.spool.cancel_queued()) == len(queued)
    for name in queued:
        before[name] = steps.cancel(before[name], START_S)
    assert cabinet.look() == before


def test_clock_that_is_set_back_takes_with_it_what_the_law_says(cabinet: Cabinet) -> None:
    before = cabinet.look()
    cabinet.desk.clock.now_s -= 3600
    cabinet.desk.do(cabinet.desk.spool.reclaim())
    after = cabinet.look()
    back_s = before["queued"].due_s - after["queued"].due_s
    assert 3600 <= back_s < 3600 + LEASE_S  # our clock stands still, and the machine's goes on
    assert {name: rounded(steps.set_back(record, back_s)) for name, record in before.items()} == {
        name: rounded(record) for name, record in after.items()
    }


def rounded(record: Record) -> Record:
    callback = record.callback and replace(record.callback, due_s=round(record.callback.due_s, 3))
    expires_s = None if record.expires_s is None else round(record.expires_s, 3)
    return record._replace(due_s=round(record.due_s, 3), expires_s=expires_s, callback=callback)


@pytest.mark.parametrize("state", sorted(FINAL, key=str), ids=lambda state: state.value)
def test_purge_deletes_what_the_law_lets_it_delete(cabinet: Cabinet, state: State) -> None:
    before = cabinet.look()
    gone = {name for name, record in before.items() if steps.may_purge(record, state)}
    assert cabinet.desk.do(cabinet.desk.spool.purge(state=state)) == len(gone)
    assert cabinet.look() == {name: record for name, record in before.items() if name not in gone}


def swept(record: Record, now_s: float, keep_s: float, bounds: Bounds) -> Record | None:
    """What the law says of a call when all is swept; None: it goes."""
    if steps.is_expired(record, now_s):
        record = steps.expire(record, now_s)
    elif steps.is_stale(record, now_s - bounds.queue_age_s):
        record = steps.expire(record, now_s, steps.STALE_ERROR)
    if steps.may_forget_result(record, now_s - keep_s) and record.answer is not None:
        record = record._replace(answer=record.answer._replace(result=None, headers=()))
    if steps.may_forget(record, now_s - keep_s) or steps.may_drop_dead_letter(record, now_s - bounds.dead_s):
        return None
    return record


@pytest.mark.parametrize(
    ("later_s", "bounds"),
    [
        pytest.param(0.0, Bounds(), id="now"),
        pytest.param(120.0, Bounds(), id="soon"),
        pytest.param(2 * DAY_S, Bounds(), id="later"),
        pytest.param(120.0, Bounds(queue_age_s=DAY_S / 2), id="stale"),
        pytest.param(0.0, Bounds(dead_s=0.0), id="dead-letters-up-to-now"),
        pytest.param(2 * DAY_S, Bounds(queue_age_s=DAY_S, dead_s=DAY_S), id="everything"),
    ],
)
def test_sweep_does_what_the_law_says_of_each_call(cabinet: Cabinet, later_s: float, bounds: Bounds) -> None:
    before = cabinet.look()
    cabinet.desk.clock.now_s += later_s
    cabinet.desk.do(cabinet.desk.spool.sweep(60.0, 60.0, bounds))
    said = {name: swept(record, START_S + later_s, 60.0, bounds) for name, record in before.items()}
    assert cabinet.look() == {name: record for name, record in said.items() if record is not None}
