"""The queue against a plain model, in a process that is killed by SIGKILL between any two steps and inside any step.

The other process does one write at a time. It is killed between steps, or before some statement of the transaction that
a step is. Reopened, the queue must hold every write that was answered, and the last one wholly or not at all. Taking
over what the dead one held is part of the model.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from faashound.calls.ids import new_call_id
from faashound.calls.model import (
    FINAL,
    Attempt,
    CallbackState,
    CallFinished,
    CallNotDead,
    Lease,
    LeaseLost,
    RunEnd,
    State,
)
from faashound.calls.names import parse_function_name
from faashound.calls.steps import CALLBACK_TRANSITIONS as CALLBACK_MOVES
from faashound.calls.steps import CALLS_BACK, Event, lost_wait_s
from faashound.calls.steps import TRANSITIONS as MOVES
from faashound.queues.spool.limits import DATABASE
from testkit.spool_kit import LEASE_S, QUEUE, START_S, Remote, inline, new_call

ATTEMPT = Attempt(START_S, START_S, 500, "failed")
FUNCTIONS = ("f", "g", "f.other")
RECEIVERS = ("a", "b")


@dataclass
class Row:
    """What the model knows of a call."""

    function: str
    due_s: float
    receiver: str | None  # of the callback
    key: str | None
    dies: bool = False  # it expires as soon as it is looked for
    state: State = State.QUEUED
    attempts: int = 0
    runs: int = 0  # entries of the history
    cancel: bool = False
    callback: CallbackState | None = None
    callback_attempts: int = 0
    callback_due_s: float = START_S
    fence: int | None = None

    def seen(self) -> tuple[object, ...]:
        return (
            self.function,
            self.due_s,
            self.state,
            self.attempts,
            self.runs,
            self.cancel,
            self.callback,
            self.callback_attempts,
        )


@dataclass
class Model:
    """The queue as a dict."""

    rows: dict[str, Row] = field(default_factory=dict)

    def put(self, call_id: str, row: Row) -> str:
        """Returns the id that the caller is told."""
        for known_id, known in self.rows.items():
            if row.key is not None and (known.function, known.key) == (row.function, row.key):
                return known_id
        self.rows[call_id] = row
        return call_id

    def due(self, now_s: float) -> dict[str, list[str]]:
        """Per function, the calls that may be claimed, in their order."""
        alive = {call_id: row for call_id, row in self.rows.items() if row.state is State.QUEUED and not row.dies}
        queued = sorted((row.due_s, call_id) for call_id, row in alive.items())
        flows: dict[str, list[str]] = {}
        for due_s, call_id in queued:
            if due_s <= now_s:
                flows.setdefault(self.rows[call_id].function, []).append(call_id)
        return flows

    def expire(self) -> None:
        for row in self.rows.values():
            if row.state is State.QUEUED and row.dies:
                row.state = MOVES[State.QUEUED, Event.EXPIRE]
                self.open_callback(row)

    def open_callback(self, row: Row) -> None:
        if row.receiver is not None and row.state in CALLS_BACK:
            row.callback, row.callback_attempts, row.callback_due_s = CallbackState.PENDING, 0, START_S

    def owed(self) -> dict[str, list[str]]:
        """Per receiver, the calls whose outcome may be delivered, in their order."""
        flows: dict[str, list[str]] = {}
        for call_id, row in self.rows.items():
            if row.callback is CallbackState.PENDING and row.receiver is not None and row.callback_due_s <= START_S:
                flows.setdefault(row.receiver, []).append(call_id)
        return flows

    def claim(self, call_id: str, fence: int) -> None:
        row = self.rows[call_id]
        row.state, row.attempts, row.fence = MOVES[row.state, Event.CLAIM], row.attempts + 1, fence

    def end(self, lease: Lease, event: Event) -> bool:
        """A run ends; False if the lease is worth nothing any more."""
        row = self.rows.get(lease.call.id)
        if row is None or row.fence != lease.fence:
            return False
        row.fence = None
        if event is Event.HAND_BACK:
            row.attempts -= 1
        else:
            row.runs += 1
        if event in (Event.RETRY, Event.HAND_BACK) and row.cancel:
            event = Event.STOP
        row.state = MOVES[State.RUNNING, event]
        row.cancel |= event is Event.STOP
        self.open_callback(row)
        return True

    def end_callback(self, lease: Lease, event: Event) -> bool:
        row = self.rows.get(lease.call.id)
        if row is None or row.fence != lease.fence:
            return False
        row.fence = None
        row.callback, row.callback_due_s = CALLBACK_MOVES[CallbackState.RUNNING, event], START_S
        return True

    def cancel(self, call_id: str) -> bool:
        row = self.rows[call_id]
        if (row.state, Event.CANCEL) not in MOVES:
            return False
        row.state, row.cancel = MOVES[row.state, Event.CANCEL], True
        return True

    def cancel_queued(self, function: str | None) -> int:
        """Returns how many calls have been ended."""
        found = [row for row in self.rows.values() if row.state is State.QUEUED and function in (None, row.function)]
        for row in found:
            row.state, row.cancel = MOVES[row.state, Event.CANCEL], True
        return len(found)

    def waiting(self) -> dict[str, int]:
        """What each function has queued and running."""
        return dict(Counter(row.function for row in self.rows.values() if row.state in (State.QUEUED, State.RUNNING)))

    def requeue(self, call_id: str) -> bool:
        row = self.rows[call_id]
        if (row.state, Event.REQUEUE) not in MOVES:
            return False
        row.state, row.attempts, row.due_s, row.cancel = State.QUEUED, 0, START_S, False
        row.dies = False
        row.callback, row.callback_attempts, row.fence = None, 0, None
        return True

    def purge(self, state: State) -> int:
        under_way = (CallbackState.PENDING, CallbackState.RUNNING)
        gone = [key for key, row in self.rows.items() if row.state is state and row.callback not in under_way]
        for call_id in gone:
            del self.rows[call_id]
        return len(gone)

    def lose_owner(self) -> None:
        """The only owner has died: the next one takes back all it held."""
        for row in self.rows.values():
            row.fence = None
            if row.callback is CallbackState.RUNNING:
                row.callback = CALLBACK_MOVES[CallbackState.RUNNING, Event.HAND_BACK]
                row.callback_due_s = START_S + lost_wait_s(row.callback_attempts)
            if row.state is State.RUNNING:
                row.runs += 1
                row.state = State.CANCELLED if row.cancel else State.QUEUED

    def seen(self) -> dict[str, tuple[object, ...]]:
        return {call_id: row.seen() for call_id, row in self.rows.items()}


class SpoolMachine(RuleBasedStateMachine):
    ids = Bundle("ids")
    leases = Bundle("leases")
    deliveries = Bundle("deliveries")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="spool-machine-"))
        self.remote = Remote(self.directory / "spool")
        self.model = Model()

    def teardown(self) -> None:
        self.remote.kill()
        shutil.rmtree(self.directory)

    def look(self) -> dict[str, tuple[object, ...]]:
        seen: dict[str, tuple[object, ...]] = {}
        for listed in self.remote.call("calls", limit=1000):
            call = self.remote.call("get", listed.id)
            seen[call.id] = (
                call.function,
                call.due_s,
                call.state,
                call.attempts,
                len(call.history),
                call.cancel_requested,
                call.callback and call.callback.state,
                call.callback.attempts if call.callback else 0,
            )
        return seen

    def reopen(self) -> None:
        self.remote.kill()
        self.remote = Remote(self.directory / "spool")

    # -- what gateways do

    @rule(
        target=ids,
        function=st.sampled_from(FUNCTIONS),
        delay_s=st.sampled_from([-1.0, 0.0, 60.0]),
        receiver=st.sampled_from([None, *RECEIVERS]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        dies=st.sampled_from([False, False, False, True]),
    )
    def put(self, function: str, delay_s: float, receiver: str | None, key: str | None, dies: bool) -> str:
        call, row = self.make(function, delay_s, receiver, key, dies)
        told = self.model.put(call.id, row)
        assert self.remote.call("put", call).id == told
        return told

    def make(
        self, function: str, delay_s: float, receiver: str | None, key: str | None = None, dies: bool = False
    ) -> tuple[Any, Row]:
        call = new_call(
            function,
            id=new_call_id(),
            due_s=START_S + delay_s,
            callback_url=receiver and f"http://{receiver}/",
            idempotency_key=key,
            expires_s=START_S if dies else None,
        )
        return call, Row(call.function, call.due_s, receiver, key, dies)

    @rule(call_id=ids)
    def cancel(self, call_id: str) -> None:
        if call_id not in self.model.rows:
            return
        may = self.model.cancel(call_id)
        self.expect(may, CallFinished, "cancel", call_id)

    def expect(self, may: bool, error: type[Exception], method: str, *args: Any, **kwargs: Any) -> None:
        """The method succeeds if it may, and raises `error` otherwise."""
        try:
            self.remote.call(method, *args, **kwargs)
        except error:
            assert not may
        else:
            assert may

    # -- what workers do

    @rule(target=leases, limit=st.integers(1, 6))
    def claim(self, limit: int) -> Any:
        flows = self.model.due(START_S)
        taken: list[Lease] = self.remote.call("claim", [QUEUE], self.remote.owner, LEASE_S, limit)
        check_turns(taken, limit, flows, lambda lease: lease.call.function)
        self.model.expire()
        for lease in taken:
            self.model.claim(lease.call.id, lease.fence)
        return multiple(*taken)

    @rule(lease=leases, event=st.sampled_from([Event.SUCCEED, Event.GIVE_UP, Event.RETRY, Event.HAND_BACK, Event.STOP]))
    def end(self, lease: Lease, event: Event) -> None:
        method, args, kwargs = ending(lease, event)
        self.expect(self.model.end(lease, event), LeaseLost, method, *args, **kwargs)

    @rule(target=deliveries, limit=st.integers(1, 3), shut=st.sampled_from([None, *RECEIVERS]))
    def claim_callbacks(self, limit: int, shut: str | None) -> Any:
        owed = self.model.owed()
        if shut is not None:
            owed.pop(shut, None)
        arguments = [QUEUE], self.remote.owner, LEASE_S, limit, {f"{shut}:80": 0}
        taken: list[Lease] = self.remote.call("claim_callbacks", *arguments)
        check_turns(taken, limit, owed, lambda lease: self.model.rows[lease.call.id].receiver)
        for lease in taken:
            row = self.model.rows[lease.call.id]
            row.callback, row.fence = CALLBACK_MOVES[CallbackState.PENDING, Event.CLAIM], lease.fence
            row.callback_attempts += 1
        return multiple(*taken)

    @rule(lease=consumes(deliveries), event=st.sampled_from([Event.SUCCEED, Event.GIVE_UP, Event.RETRY]))
    def end_callback(self, lease: Lease, event: Event) -> None:
        method = {Event.SUCCEED: "callback_done", Event.GIVE_UP: "callback_dead", Event.RETRY: "callback_retry"}[event]
        due = (START_S,) if event is Event.RETRY else ()
        self.expect(self.model.end_callback(lease, event), LeaseLost, method, lease, ATTEMPT, *due)

    @rule(lease=leases)
    def renew(self, lease: Lease) -> None:
        row = self.model.rows.get(lease.call.id)
        alive = row is not None and row.fence == lease.fence
        renewal = self.remote.call("renew", [lease], LEASE_S)
        assert renewal.lost == (frozenset() if alive else {lease.fence})
        assert renewal.cancelled == ({lease.call.id} if alive and row is not None and row.cancel else frozenset())

    # -- what people do

    @rule(call_id=ids)
    def requeue(self, call_id: str) -> None:
        if call_id in self.model.rows:
            self.expect(self.model.requeue(call_id), CallNotDead, "requeue_dead", call_id)

    @rule(state=st.sampled_from(sorted(FINAL, key=str)))
    def purge(self, state: State) -> None:
        assert self.remote.call("purge", state=state) == self.model.purge(state)

    @rule(function=st.sampled_from([None, *FUNCTIONS]))
    def cancel_queued(self, function: str | None) -> None:
        named = function and parse_function_name(function)
        assert self.remote.call("cancel_queued", function=named) == self.model.cancel_queued(named)

    # -- what fate does

    @rule()
    def kill_between_steps(self) -> None:
        self.reopen()
        self.model.lose_owner()

    @rule(
        target=ids,
        function=st.sampled_from(FUNCTIONS),
        receiver=st.sampled_from([None, *RECEIVERS]),
        statement=st.integers(1, 12),
    )
    def kill_while_putting(self, function: str, receiver: str | None, statement: int) -> Any:
        call, row = self.make(function, 0.0, receiver)
        after = copy.deepcopy(self.model)
        after.put(call.id, row)
        self.kill_inside(after, statement, "put", call)
        return multiple(call.id) if call.id in self.model.rows else multiple()

    @rule(
        lease=leases,
        event=st.sampled_from([Event.SUCCEED, Event.GIVE_UP, Event.RETRY, Event.HAND_BACK, Event.STOP]),
        statement=st.integers(1, 12),
    )
    def kill_while_ending(self, lease: Lease, event: Event, statement: int) -> None:
        after = copy.deepcopy(self.model)
        after.end(lease, event)
        method, args, kwargs = ending(lease, event)
        self.kill_inside(after, statement, method, *args, **kwargs)

    @rule(call_id=ids, statement=st.integers(1, 12))
    def kill_while_requeueing(self, call_id: str, statement: int) -> None:
        if call_id in self.model.rows:
            after = copy.deepcopy(self.model)
            after.requeue(call_id)
            self.kill_inside(after, statement, "requeue_dead", call_id)

    @rule(statement=st.integers(1, 12))
    def kill_while_claiming(self, statement: int) -> None:
        """Whatever was claimed is given back; only the attempts tell."""
        flows = self.model.due(START_S)
        due = [call_id for flow in flows.values() for call_id in flow]
        after = copy.deepcopy(self.model)
        after.expire()
        for fence, call_id in enumerate(due, 1_000_000):
            after.claim(call_id, fence)
        self.kill_inside(after, statement, "claim", [QUEUE], self.remote.owner, LEASE_S, 1000)

    def kill_inside(self, after: Model, statement: int, method: str, *args: Any, **kwargs: Any) -> None:
        """Afterwards the model is whichever the queue turned out to be; only the later one if an answer had come."""
        answered = self.remote.crash(statement, method, *args, **kwargs)
        self.reopen()
        self.model.lose_owner()
        after.lose_owner()
        seen = self.look()
        assert seen == after.seen() or (not answered and seen == self.model.seen())
        if seen == after.seen():
            self.model = after

    @rule(statement=st.integers(1, 12))
    def kill_while_cancelling_all(self, statement: int) -> None:
        after = copy.deepcopy(self.model)
        after.cancel_queued(None)
        self.kill_inside(after, statement, "cancel_queued")

    @invariant()
    def agree(self) -> None:
        assert self.look() == self.model.seen()

    @invariant()
    def count(self) -> None:
        """What is kept beside the calls says the same as they do."""
        with contextlib.closing(sqlite3.connect(self.directory / "spool" / DATABASE)) as db:
            kept = dict(db.execute("SELECT function, calls FROM waiting WHERE calls <> 0").fetchall())
        assert kept == self.model.waiting()


def check_turns(
    taken: list[Lease], limit: int, waiting: dict[str, list[str]], flow_of: Callable[[Lease], str | None]
) -> None:
    """As many as there are, of each flow the first ones, and of none two more than of another that has some left."""
    assert len(taken) == min(limit, sum(map(len, waiting.values())))
    got = {flow: [lease.call.id for lease in taken if flow_of(lease) == flow] for flow in waiting}
    assert sum(map(len, got.values())) == len(taken)
    for flow, call_ids in got.items():
        assert call_ids == waiting[flow][: len(call_ids)]
    most = max(map(len, got.values()), default=0)
    assert all(len(call_ids) >= min(most - 1, len(waiting[flow])) for flow, call_ids in got.items())


def ending(lease: Lease, event: Event) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """The call to a Spool that ends a run by `event`."""
    if event is Event.HAND_BACK:
        return "release", (lease,), {}
    if event is Event.STOP:
        return "finish_cancelled", (lease, ATTEMPT), {}
    if event is Event.RETRY:
        return "retry", (lease,), {"attempt": ATTEMPT, "due_s": lease.call.due_s}
    state = State.DONE if event is Event.SUCCEED else State.DEAD
    return "finish", (lease, RunEnd(state, ATTEMPT, status=200, duration_s=0.1, result=inline(b"out"))), {}


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(
    max_examples=10, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
