"""The queue of many machines: the interface and the promises of spool.py, kept on NATS JetStream.

Use: `await queues.open_queue(url, settings)`; every method of JetStream is described at `spool.Spool`.

How it is kept.  Each call is one message, its *record*, on a subject of its own in a stream that keeps only the last
message of a subject.  A step of a call's life is one publish that names the revision (the stream's sequence) it
follows, so of two who would take the same step one gets a conflict and reads again: there is no second place that
could contradict the record.  The fence of a lease is the revision that its claim followed.  What decides who may run
stands in the record's header, so an index of the queue is had by following the headers alone.

Who runs what is proposed by one of the workers, the *foreman*.  It follows the headers, keeps the calls due in order
and deals them to workers that ask; each worker then takes what it was dealt by its own publish.  The foreman writes
nothing that another could not write, so it needs no lease of its own: two at once, or none for a moment, cost time and
conflicts, never a call.  Whoever needs one and hears none becomes it.

Contract:
- What `put`, `finish` and the other writes have returned for has the stream's acknowledgement: it is with `replicas`
  servers, and as safe as these keep it (README: sync_interval).
- No write waits longer than WRITE_S for one: then it raises QueueUnavailable.  Of a write that was on its way when its
  time was up nobody knows whether it happened, as with any network; `put` again with the same id or key tells.
- A lease ends when its owner has not renewed it for `lease_s`, by the foreman's own clock and only while the foreman
  follows the stream: nobody's calls are taken over because the servers were away.
- Within a function calls run in the order (due_s, id) as far as the foreman has heard; between functions they take
  turns, all workers together.

It refuses to: change a stream that is there already (what differs is told); run on servers older than MIN_VERSION.

In the account, with the prefix P: the streams `P-calls` (subjects `P.call.*`, `P.key.*`, `P.meta.*`) and `P-bodies`
(`P.body.*.*`); outside of any stream `P.event.*` (records as they are stored), `P.foreman.*` and `P.owner.*`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import re
import secrets
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js import api
from nats.js.errors import APIError, NotFoundError

from .calls import steps
from .calls.model import (
    EXCERPT_BYTES,
    FINAL,
    Attempt,
    Bounds,
    Call,
    Callback,
    CallbackState,
    CallExists,
    CallFinished,
    CallUnknown,
    KeyReused,
    Kind,
    Lease,
    LeaseLost,
    NewCall,
    QueueDamaged,
    QueueFull,
    QueueUnavailable,
    Renewal,
    RunEnd,
    State,
    Stats,
    StoredBody,
    Swept,
    check_same_request,
    destination_of,
)
from .calls.names import DEFAULT_NAMESPACE, FunctionName
from .calls.steps import Event
from .watchdog import BodyTooLarge, CannotStart, log

T = TypeVar("T")
Json = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------
# Limits.
# ---------------------------------------------------------------------------------------------------------------

MIN_VERSION = (2, 11)  # of the servers: time-to-live of single messages
INLINE_BYTES = 16 * 1024  # up to here a body is part of its record, and written again with each step of the call
CHUNK_BYTES = 128 * 1024  # longer bodies are cut into messages of this size (max_payload is 1 MiB, seldom less)
CHUNKS_IN_FLIGHT_COUNT = 4  # of one body: bounds its memory
CONNECT_S = 10.0
WRITE_S = 10.0  # longest wait for an acknowledgement; a leader that dies is replaced within 4 to 9 s
TRY_S = 2.0  # of one try within it
RETRY_PAUSE_S = 0.1
ASK_S = 15.0  # longest wait for a foreman's answer, its election included
OWNER_TRY_COUNT = 4  # questions within TRY_S to an owner
PARK_S = 2.0  # longest wait for work in one request: bounds the harm of a word that was lost, or of a foreman
SILENCE_S = 1.0  # a foreman that cannot be reached for so long is replaced
RESERVED_S = 5.0  # a call that was dealt is not dealt again for so long: until its taking is heard of
LAPSE_GRACE_S = 1.0  # a lease that has run out is left alone for so long, unless someone asks
TICK_S = 1.0
POLL_S = 5.0  # between two looks of someone who waits for a call's end: bounds the harm of a lost event
GOODBYE_S = 3.0  # for what is said when a queue is closed
SYNC_S = 60.0  # longest wait for an index to be read
HEARTBEAT_S = 1.0  # of the servers, to those who follow a stream
FEED_PAUSE_S = 0.5
STEP_COUNT = 64  # records that housekeeping writes at the same time
SCAN_COUNT = 5000  # entries looked at before others get their turn on the event loop
ORPHAN_S = 3600.0  # a stored body that no record names after this time is a crash's leftover
HELD_S = 1e12  # the due time of a call that is held back: no clock will show it
TOMBSTONE_S = 600  # that a deleted call can be told from one that never was: for those who follow the stream
RECORD_BYTES = 1024  # of a record without bodies, about
KEPT_ROOM = 0.1  # part of nats_max_bytes that `put` leaves free, for the steps of what is in already
ROOM_KNOWN_S = 1.0  # how long the streams' size is believed

HEADER = "Faashound-Call"
ORIGIN_HEADER = "Faashound-Origin"
EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
TTL_HEADER = "Nats-TTL"

_FULL_CODES = frozenset({10002, 10023, 10028, 10047})  # resources of account, server, memory, storage
_STORE_FAILED = 10077  # "maximum bytes exceeded" among other reasons
_WRONG_SEQUENCE = (10071, 10164)  # the second: somebody's write to the subject is still on its way through the cluster


class _Conflict(Exception):
    """Someone else has written the subject since it was read."""


class _Passed(Exception):
    """The step does not apply to the call any more, and nobody minds."""


# ---------------------------------------------------------------------------------------------------------------
# Records (pure): what is known of a call, as a message, and the steps from one to the next.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hold:
    """The other side of a lease."""

    kind: Kind
    owner: str
    fence: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class Record:
    """A call, who holds it, when its result was stored, and the revision of all that; `origin` tells its put."""

    call: Call
    hold: Hold | None = None
    stored_s: float | None = None
    revision: int = 0
    origin: str = ""


@dataclass(slots=True)
class Entry:
    """What the header of a record tells.  `files` are the bodies that it names."""

    id: str
    revision: int
    function: FunctionName
    queue: str
    state: State
    due_s: float
    expires_s: float | None
    accepted_s: float
    finished_s: float | None
    stored_s: float | None
    callback: CallbackState | None
    callback_due_s: float
    destination: str  # of the callback
    hold: Hold | None
    cancel: bool
    files: tuple[str, ...]


def build_summary(record: Record) -> str:
    """Return a record's header, one line of ASCII."""
    call, callback, hold = record.call, record.call.callback, record.hold
    bodies = [body.file for body in (call.body, call.result) if body is not None and body.file is not None]
    facts: Json = {"f": call.function, "q": call.queue, "s": call.state.value, "d": call.due_s, "a": call.accepted_s}
    optional: Json = {
        "x": call.expires_s,
        "e": call.finished_s,
        "t": record.stored_s if call.result is not None else None,
        "c": callback and [callback.state.value, callback.due_s, destination_of(call.callback_url or "")],
        "h": hold and [hold.kind, hold.owner, hold.fence, hold.lease_s],
        "n": call.cancel_requested or None,
        "b": bodies or None,
    }
    facts.update((name, value) for name, value in optional.items() if value is not None)
    return json.dumps(facts, separators=(",", ":"))


def parse_summary(call_id: str, revision: int, header: str) -> Entry:
    """Return what the header of a record tells."""
    facts = json.loads(header)
    callback, hold = facts.get("c"), facts.get("h")
    return Entry(
        id=call_id,
        revision=revision,
        function=_whole_name(facts["f"]),
        queue=facts["q"],
        state=State(facts["s"]),
        due_s=facts["d"],
        expires_s=facts.get("x"),
        accepted_s=facts["a"],
        finished_s=facts.get("e"),
        stored_s=facts.get("t"),
        callback=CallbackState(callback[0]) if callback else None,
        callback_due_s=callback[1] if callback else 0.0,
        destination=callback[2] if callback and len(callback) > 2 else "",  # records of earlier versions have none
        hold=Hold(*hold) if hold else None,
        cancel=bool(facts.get("n")),
        files=tuple(facts.get("b", ())),
    )


def _whole_name(text: str) -> FunctionName:
    """The function of a record; earlier versions knew no namespaces, and wrote the name alone."""
    return FunctionName(text if "." in text else f"{text}.{DEFAULT_NAMESPACE}")


_JSON_FIELDS = (
    *("method", "path", "query", "headers", "callback_url", "idempotency_key", "attempts", "started_s", "status"),
    *("error", "duration_s", "result_headers"),
)


def build_payload(record: Record) -> bytes:
    """Return the rest of a record: the length of a JSON text in four bytes, the text, the bytes that it counts."""
    call, callback = record.call, record.call.callback
    inline = (call.body.inline or b"", (call.result and call.result.inline) or b"")
    excerpt = None if call.excerpt == _build_excerpt(call.result) else call.excerpt
    facts: Json = {name: getattr(call, name) for name in _JSON_FIELDS}
    facts["body"] = _build_body(call.body)
    facts["body_digest"] = call.body_digest
    facts["result"] = call.result and _build_body(call.result)
    facts["excerpt"] = None if excerpt is None else len(excerpt)
    facts["stored_s"] = record.stored_s
    facts["callback"] = callback and [callback.attempts, callback.status, callback.error]
    facts["history"] = [dataclasses.astuple(attempt) for attempt in call.history]
    head = json.dumps(facts, separators=(",", ":")).encode()
    return b"".join((len(head).to_bytes(4, "big"), head, *inline, excerpt or b""))


def _build_body(body: StoredBody) -> list[object]:
    return [body.bytes_count, body.file]


def parse_record(call_id: str, revision: int, headers: Mapping[str, str], payload: bytes) -> Record:
    """Return a record from its message; QueueDamaged if it is none."""
    try:
        entry = parse_summary(call_id, revision, headers[HEADER])
        head_end = 4 + int.from_bytes(payload[:4], "big")
        facts = json.loads(payload[4:head_end])
        rest = memoryview(payload)[head_end:]
        body, rest = _parse_body(facts["body"], rest)
        result, rest = _parse_body(facts["result"], rest) if facts["result"] else (None, rest)
        call = Call(
            **{name: facts[name] for name in _JSON_FIELDS if not name.endswith("headers")},
            id=call_id,
            function=entry.function,
            queue=entry.queue,
            headers=tuple((name, value) for name, value in facts["headers"]),
            body=body or StoredBody(0, b"", None),
            body_digest=facts.get("body_digest"),  # records of earlier versions have none
            due_s=entry.due_s,
            expires_s=entry.expires_s,
            accepted_s=entry.accepted_s,
            state=entry.state,
            finished_s=entry.finished_s,
            cancel_requested=entry.cancel,
            result=result,
            result_headers=tuple((name, value) for name, value in facts["result_headers"]),
            excerpt=_build_excerpt(result) if facts["excerpt"] is None else bytes(rest[: facts["excerpt"]]),
            callback=_parse_callback(entry, facts["callback"]),
            history=tuple(itertools.starmap(Attempt, facts["history"])),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise QueueDamaged(f"the record of call {call_id} (revision {revision}) cannot be read: {error!r}") from error
    return Record(call, entry.hold, facts["stored_s"], revision, headers.get(ORIGIN_HEADER, ""))


def _parse_body(facts: Sequence[Any], rest: memoryview) -> tuple[StoredBody | None, memoryview]:
    bytes_count, file = facts
    if file is not None:
        return StoredBody(bytes_count, None, file), rest
    return StoredBody(bytes_count, bytes(rest[:bytes_count]), None), rest[bytes_count:]


def _build_excerpt(result: StoredBody | None) -> bytes | None:
    """An inline result is its own excerpt."""
    return result.inline[:EXCERPT_BYTES] if result is not None and result.inline is not None else None


def _parse_callback(entry: Entry, facts: Sequence[Any] | None) -> Callback | None:
    if entry.callback is None or facts is None:
        return None
    attempts, status, error = facts
    return Callback(entry.callback, attempts, entry.callback_due_s, status, error)


def accept(call: NewCall) -> Record:
    """Return the record that a call begins with."""
    return Record(steps.build_call(call, steps.accept(call)), origin=secrets.token_hex(8))


def rename(record: Record, call_id: str) -> Record:
    """Return the same call under another id; the header field that carries the id follows."""
    call, old = record.call, record.call.id
    headers = tuple(
        (name, call_id if name.lower() == "x-call-id" and value == old else value) for name, value in call.headers
    )
    return dataclasses.replace(record, call=dataclasses.replace(call, id=call_id, headers=headers))


def _with_call(record: Record, **changes: Any) -> Record:
    return dataclasses.replace(record, call=dataclasses.replace(record.call, **changes))


def after(record: Record, step: Callable[[steps.Record], steps.Record]) -> Record:
    """Return the record after a step of the law."""
    before = steps.build_record(record.call, _law_hold(record.hold), record.stored_s or 0.0)
    changed = step(before)
    stored_s = None if changed.answer is None else changed.answer.stored_s
    hold = record.hold if changed.hold == before.hold else None
    return dataclasses.replace(record, call=steps.build_call(record.call, changed), hold=hold, stored_s=stored_s)


def _law_hold(hold: Hold | None) -> steps.Hold | None:
    return None if hold is None else steps.Hold(hold.kind, hold.owner, hold.fence)


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims what, for how long, and when that is."""

    kind: Kind
    owner: str
    lease_s: float
    now_s: float


def take(record: Record, claimant: Claimant) -> Record:
    """A worker takes a call, or its callback."""
    hold = Hold(claimant.kind, claimant.owner, record.revision, claimant.lease_s)
    held = steps.Hold(hold.kind, hold.owner, hold.fence)
    return dataclasses.replace(after(record, partial(steps.claim, hold=held, now_s=claimant.now_s)), hold=hold)


def expire(record: Record, now_s: float) -> Record:
    """The call has waited too long; _Passed if something else has become of it."""

    def step(before: steps.Record) -> steps.Record:
        if not steps.is_expired(before, now_s):
            raise _Passed
        return steps.expire(before, now_s)

    return after(record, step)


def may_forget_result(entry: Entry, before_s: float) -> bool:
    """Tell whether the result has been kept long enough, and whoever wanted it delivered has it."""
    delivered = entry.callback in (None, CallbackState.DELIVERED)
    return entry.stored_s is not None and entry.stored_s < before_s and delivered


def may_forget(entry: Entry, before_s: float) -> bool:
    """Tell whether the call has been remembered long enough; never a dead letter."""
    if entry.state not in FINAL or entry.state is State.DEAD or entry.finished_s is None:
        return False
    return entry.finished_s < before_s and entry.callback in (None, CallbackState.DELIVERED)


def may_purge(entry: Entry, state: State, function: FunctionName | None) -> bool:
    """Tell whether a person may delete the call."""
    under_way = entry.callback in (CallbackState.PENDING, CallbackState.RUNNING)
    return entry.state is state and function in (None, entry.function) and not under_way


# ---------------------------------------------------------------------------------------------------------------
# The index (pure): every call, by what the headers tell, and the counts.
# ---------------------------------------------------------------------------------------------------------------


class Index:
    """All calls that have been heard of."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.by_function: Counter[tuple[FunctionName, State]] = Counter()
        self.callbacks: Counter[CallbackState] = Counter()

    def apply(self, entry: Entry) -> None:
        """Take note of what a record is now."""
        self.remove(entry.id)
        self.entries[entry.id] = entry
        self._count(entry, 1)

    def remove(self, call_id: str) -> None:
        """The record is gone."""
        entry = self.entries.pop(call_id, None)
        if entry is not None:
            self._count(entry, -1)

    def _count(self, entry: Entry, change: int) -> None:
        self.by_function[entry.function, entry.state] += change
        if entry.callback is not None:
            self.callbacks[entry.callback] += change

    def stats(self, now_s: float, commit_count: int) -> Stats:
        """Return the queue in figures."""
        by_state = dict.fromkeys(State, 0)
        for (_, state), count in self.by_function.items():
            by_state[state] += count
        oldest_s = None
        if by_state[State.QUEUED]:
            oldest_s = min(entry.due_s for entry in self.entries.values() if entry.state is State.QUEUED)
        return Stats(
            by_state=by_state,
            by_function={key: count for key, count in self.by_function.items() if count},
            waiting=Counter(
                entry.queue
                for entry in self.entries.values()
                for waits in (entry.state is State.QUEUED, entry.callback is CallbackState.PENDING)
                if waits
            ),
            oldest_due_age_s=None if oldest_s is None or oldest_s > now_s else now_s - oldest_s,
            callback_pending_count=self.callbacks[CallbackState.PENDING] + self.callbacks[CallbackState.RUNNING],
            callback_dead_count=self.callbacks[CallbackState.DEAD],
            commit_count=commit_count,
        )

    def newest_first(
        self, state: State | None, function: FunctionName | None, before: str | None, limit: int
    ) -> list[str]:
        """Return the ids of a page; CallUnknown if `before` is gone."""
        end: tuple[float, str] | None = None
        if before is not None:
            if before not in self.entries:
                raise CallUnknown(f"no call has the id {before}")
            end = self.entries[before].accepted_s, before
        wanted = (
            (entry.accepted_s, entry.id)
            for entry in self.entries.values()
            if state in (None, entry.state) and function in (None, entry.function)
        )
        return [call_id for _, call_id in heapq.nlargest(limit, (key for key in wanted if end is None or key < end))]


# ---------------------------------------------------------------------------------------------------------------
# The schedule (pure): what the foreman keeps besides the index.
#
# A heap's element is (due_s, id, revision), and void as soon as the index has another revision of the id: nothing is
# ever searched for or removed from the middle.  A call that was dealt is void for the same reason once its taking is
# heard of; until then it is `reserved`.  Wall-clock times are `now_s`; leases and reservations run on `clock_s`, which
# is monotonic and the foreman's own.
# ---------------------------------------------------------------------------------------------------------------

Flow = tuple[str, str]  # queue; function or destination
_Due = tuple[float, str, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much a claim may take: from which queues, how many in all, and how many of each flow named in `room`."""

    queues: tuple[str, ...]
    limit: int
    room: Mapping[str, int]


@dataclass(slots=True)
class Schedule:
    """What is due, in which order, and what is held until when.

    `generation` grows whenever there is something that was not there to be dealt before.
    """

    index: Index
    flows: Mapping[Kind, dict[Flow, list[_Due]]] = field(default_factory=lambda: {"call": {}, "callback": {}})
    delayed: list[_Due] = field(default_factory=list)
    expiring: list[_Due] = field(default_factory=list)
    reserved: dict[str, int] = field(default_factory=dict)
    reservations: deque[tuple[float, str, int]] = field(default_factory=deque)
    lapses: dict[str, tuple[int, float]] = field(default_factory=dict)  # of what is held: fence, clock_s
    generation: int = 0
    last_flow: dict[Kind, Flow] = field(default_factory=lambda: {"call": ("", ""), "callback": ("", "")})

    def apply(self, entry: Entry, now_s: float, clock_s: float) -> None:
        """Find the place of a record as it is now."""
        if entry.hold is not None:
            fence = entry.hold.fence
            if self.lapses.get(entry.id, (None, 0.0))[0] != fence:
                self.lapses[entry.id] = fence, clock_s + entry.hold.lease_s
            return
        self.lapses.pop(entry.id, None)
        if entry.state is State.QUEUED:
            if entry.expires_s is not None:
                heapq.heappush(self.expiring, (entry.expires_s, entry.id, entry.revision))
            self._place(entry, entry.due_s, now_s)
        elif entry.callback is CallbackState.PENDING:
            self._place(entry, entry.callback_due_s, now_s)

    def remove(self, call_id: str) -> None:
        """The record is gone."""
        self.lapses.pop(call_id, None)

    def _place(self, entry: Entry, due_s: float, now_s: float) -> None:
        element = (due_s, entry.id, entry.revision)
        if due_s > now_s:
            heapq.heappush(self.delayed, element)
            return
        kind: Kind = "call" if entry.state is State.QUEUED else "callback"
        name = entry.function if kind == "call" else entry.destination
        heapq.heappush(self.flows[kind].setdefault((entry.queue, name), []), element)
        self.generation += 1

    def _find(self, element: _Due) -> Entry | None:
        """The entry that an element of a heap is for, unless the element is void."""
        entry = self.index.entries.get(element[1])
        if entry is None or entry.revision != element[2] or self.reserved.get(entry.id) == entry.revision:
            return None
        return entry

    def advance(self, now_s: float, clock_s: float) -> None:
        """Move what has fallen due, and what was dealt but never taken, to where it can be dealt."""
        while self.delayed and (self.delayed[0][0] <= now_s or self._find(self.delayed[0]) is None):
            element = heapq.heappop(self.delayed)
            entry = self._find(element)
            if entry is not None:
                self._place(entry, element[0], now_s)
        while self.reservations and self.reservations[0][0] <= clock_s:
            _, call_id, revision = self.reservations.popleft()
            if self.reserved.get(call_id) == revision:
                del self.reserved[call_id]
                entry = self.index.entries.get(call_id)
                if entry is not None and entry.revision == revision:
                    self.apply(entry, now_s, clock_s)

    def has_ready(self) -> bool:
        """Tell whether there may be something to deal."""
        return any(any(flows.values()) for flows in self.flows.values())

    def next_due_s(self) -> float | None:
        """Return when the next call or callback falls due."""
        return self.delayed[0][0] if self.delayed else None

    def take_expired(self, now_s: float, limit: int) -> list[Entry]:
        """Return calls that have waited too long; `apply` those again that could not be ended."""
        found: list[Entry] = []
        while self.expiring and self.expiring[0][0] <= now_s and len(found) < limit:
            entry = self._find(heapq.heappop(self.expiring))
            if entry is not None:
                found.append(entry)
        return found

    def deal(self, kind: Kind, wanted: Wanted, now_s: float, clock_s: float) -> list[_Due]:
        """Deal calls or callbacks in turns, beginning behind the flow that was served last."""
        left, flows = dict(wanted.room), self.flows[kind]
        ring = deque(self._ring(kind, wanted))
        dealt: list[_Due] = []
        while ring and len(dealt) < wanted.limit:
            flow = ring.popleft()
            if left.get(flow[1], 1) <= 0:
                continue
            element = self._pop(flows[flow], now_s)
            if element is None:
                del flows[flow]
                continue
            if flow[1] in left:
                left[flow[1]] -= 1  # one function, or destination, in two queues shares one room
            self.last_flow[kind] = flow
            dealt.append(self._reserve(element, clock_s))
            ring.append(flow)
        return dealt

    def _ring(self, kind: Kind, wanted: Wanted) -> list[Flow]:
        flows, last = sorted(flow for flow in self.flows[kind] if flow[0] in wanted.queues), self.last_flow[kind]
        return [flow for flow in flows if flow > last] + [flow for flow in flows if flow <= last]

    def _pop(self, ready: list[_Due], now_s: float) -> _Due | None:
        while ready:
            element = heapq.heappop(ready)
            entry = self._find(element)
            if entry is not None and (entry.expires_s is None or entry.expires_s > now_s or entry.state in FINAL):
                return element
        return None

    def _reserve(self, element: _Due, clock_s: float) -> _Due:
        _, call_id, revision = element
        self.reserved[call_id] = revision
        self.reservations.append((clock_s + RESERVED_S, call_id, revision))
        return element

    def is_held(self, call_id: str, fence: int) -> bool:
        """Tell whether a lease is still the one on its call."""
        return self.lapses.get(call_id, (None, 0.0))[0] == fence

    def renew(self, call_id: str, fence: int, until_s: float) -> None:
        """Let a lease run until `until_s`, of the clock."""
        self.lapses[call_id] = fence, until_s

    def void(self, owner: str) -> None:
        """An owner has said good-bye: all it holds lapses now."""
        for call_id, (fence, _) in self.lapses.items():
            hold = self.index.entries[call_id].hold
            if hold is not None and hold.owner == owner:
                self.lapses[call_id] = fence, float("-inf")

    def extend(self, clock_s: float) -> None:
        """Nobody could renew for a while: every lease has its whole time before it."""
        for call_id, (fence, until_s) in self.lapses.items():
            hold = self.index.entries[call_id].hold
            if hold is not None and until_s > float("-inf"):
                self.lapses[call_id] = fence, max(until_s, clock_s + hold.lease_s)

    def lapsed(self, clock_s: float) -> list[str]:
        """Return the calls whose lease has run out."""
        return [call_id for call_id, (_, until_s) in self.lapses.items() if until_s <= clock_s]


# ---------------------------------------------------------------------------------------------------------------
# The link: one connection, and what is asked of the streams through it.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Names:
    """The names of streams and subjects that begin with one prefix."""

    prefix: str

    @property
    def calls(self) -> str:
        """The stream of records, keys and secrets."""
        return f"{self.prefix}-calls"

    @property
    def bodies(self) -> str:
        """The stream of long bodies."""
        return f"{self.prefix}-bodies"

    def subject(self, kind: str, *tokens: object) -> str:
        """A subject such as `P.call.ID`."""
        return ".".join((self.prefix, kind, *map(str, tokens)))

    def call(self, call_id: str) -> str:
        """The subject of a call's record."""
        return self.subject("call", build_token(call_id))

    def key(self, function: FunctionName, key: str) -> str:
        """The subject that tells which call an idempotency key stands for; as earlier versions have named it."""
        return self.subject("key", hashlib.sha256(f"{function.short}\0{key}".encode()).hexdigest()[:40])


_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)


def build_token(text: str) -> str:
    """Return `text` as one token of a subject: as it is where it may be, else in hexadecimal behind a `=`."""
    return text if _TOKEN.fullmatch(text) else "=" + text.encode("utf-8", "surrogatepass").hex()


def parse_token(token: str) -> str:
    """Return what `build_token` was given."""
    return bytes.fromhex(token[1:]).decode("utf-8", "surrogatepass") if token.startswith("=") else token


def queue_error(error: Exception) -> QueueFull | QueueUnavailable:
    """Return what an error of NATS means to whoever uses the queue."""
    if isinstance(error, APIError):
        full = error.err_code in _FULL_CODES or (
            error.err_code == _STORE_FAILED and "maximum" in (error.description or "")
        )
        if full:
            return QueueFull(f"NATS has no room for the queue: {error.description}")
        return QueueUnavailable(f"NATS refuses: {error.description} ({error.err_code})")
    return QueueUnavailable(f"NATS cannot be used: {error or type(error).__name__}")


def _may_pass(error: Exception) -> bool:
    """Tell whether an error may be over in a moment: no leader yet, no answer, a server that starts."""
    if isinstance(error, APIError):
        return error.code == 503 and isinstance(queue_error(error), QueueUnavailable)
    return isinstance(error, TimeoutError | NoRespondersError | NatsError)


class _Reporter:
    """Tells the log how the connection fares."""

    def __init__(self) -> None:
        self.last = "no answer"
        self.closing = False

    async def on_error(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if text != self.last:
            log.warning(f"NATS: {text}")
        self.last = text

    async def on_disconnect(self) -> None:
        if not self.closing:
            log.warning("the connection to NATS is lost; trying again until there is one")

    async def on_reconnect(self) -> None:
        self.last = "no answer"
        log.info("connected to NATS again")


class Link:
    """A connection to the servers, and the names on them."""

    def __init__(self, client: NatsClient, names: Names, reporter: _Reporter) -> None:
        self.client = client
        self._reporter = reporter
        self.names = names
        self.commit_count = 0
        self.last_revision = 0  # of the records that we have written
        self.js = client.jetstream(timeout=TRY_S)
        self._troubled_s = float("-inf")  # when something could last not be done
        self.name = secrets.token_hex(6)  # tells our writes and requests from those of others
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()

    @property
    def healthy(self) -> bool:
        """Whether we are connected, and no write has failed just now."""
        return bool(self.client.is_connected) and self._loop.time() - self._troubled_s > WRITE_S

    async def close(self) -> None:
        """Hang up."""
        self._reporter.closing = True
        with contextlib.suppress(NatsError):
            await self.client.close()

    async def insist(self, work: Callable[[float], Awaitable[T]]) -> T:
        """What `work(timeout_s)` returns, tried again while that may help, up to WRITE_S.

        Raises QueueUnavailable and QueueFull; other errors of ours pass.
        """
        deadline_s = self._loop.time() + WRITE_S
        while True:
            left_s = deadline_s - self._loop.time()
            try:
                if not self.client.is_connected:
                    raise QueueUnavailable("no NATS server can be reached")
                return await work(min(TRY_S, left_s))
            except QueueUnavailable as error:
                problem: Exception = error
            except (NatsError, TimeoutError) as error:
                problem = queue_error(error)
                if not _may_pass(error):
                    self._troubled_s = self._loop.time()
                    raise problem from error
            if deadline_s - self._loop.time() <= RETRY_PAUSE_S:
                self._troubled_s = self._loop.time()
                raise problem
            await asyncio.sleep(RETRY_PAUSE_S)

    async def save(self, subject: str, payload: bytes, headers: Mapping[str, str], expected: int | None) -> int:
        """Write a message that must follow the revision `expected` of its subject, 0 for none; return its own.

        Raises _Conflict when it does not, QueueUnavailable, QueueFull.
        """
        number = f"{self.name}.{next(self._numbers)}"
        fields = {**headers, "Faashound-Write": number}
        if expected is not None:
            fields[EXPECTED_HEADER] = str(expected)
        tries = 0

        async def publish(timeout_s: float) -> int:
            nonlocal tries
            tries += 1
            try:
                ack = await self.js.publish(subject, payload, timeout_s, headers=dict(fields))
            except APIError as error:
                if error.err_code not in _WRONG_SEQUENCE:
                    raise
                stored = await self.load(subject) if tries > 1 else None
                if stored is None or (stored.headers or {}).get("Faashound-Write") != number:
                    raise _Conflict from error
                return int(stored.seq or 0)  # an earlier try was heard after all
            return int(ack.seq)

        revision = await self.insist(publish)
        self.commit_count += 1
        return revision

    async def load(self, subject: str, *, stream: str | None = None) -> api.RawStreamMsg | None:
        """Return the last message of a subject as the stream's leader has it, or None."""
        get = partial(self._get, stream or self.names.calls, subject, False)
        return await self.insist(get)

    async def load_near(self, subject: str, *, stream: str | None = None) -> api.RawStreamMsg | None:
        """Return the last message of a subject as some server has it, which may be a little behind; or None."""
        get = partial(self._get, stream or self.names.calls, subject, True)
        return await self.insist(get)

    async def _get(self, stream: str, subject: str, direct: bool, timeout_s: float) -> api.RawStreamMsg | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.js.get_last_msg(stream, subject, direct=direct)
        except NotFoundError as error:
            if error.err_code == 10059:  # the stream, not the message
                raise QueueUnavailable(f"the stream {stream} is gone") from error
            return None

    async def erase(self, stream: str, revision: int) -> None:
        """Remove one message, unless it is gone already."""

        async def delete(timeout_s: float) -> None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self.js.delete_msg(stream, revision)
            except NotFoundError:
                pass
            except APIError as error:
                if error.err_code not in (10043, 10057):  # no message found; message delete failed: it is not there
                    raise

        await self.insist(delete)

    async def purge(self, stream: str, subject: str) -> None:
        """Remove all messages of a subject, which may have wildcards."""

        async def work(timeout_s: float) -> None:
            async with asyncio.timeout(timeout_s):
                await self.js.purge_stream(stream, subject=subject)

        await self.insist(work)

    async def info(self, stream: str, subjects: str | None = None) -> api.StreamInfo:
        """Return what the servers know of a stream, with its subjects that match if asked for."""

        async def work(timeout_s: float) -> api.StreamInfo:
            async with asyncio.timeout(timeout_s):
                return await self.js.stream_info(stream, subjects)

        return await self.insist(work)


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended: asyncio.wait_for, which nats-py uses, can lose a cancellation (bpo-37658)."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=RETRY_PAUSE_S)


class Records:
    """The records of calls, read and written through a link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def load(self, call_id: str) -> Record | None:
        """Return the call as the stream's leader has it, or None."""
        message = await self._link.load(self._link.names.call(call_id))
        return self._parse(call_id, message)

    async def load_revision(self, call_id: str, revision: int) -> Record | None:
        """Return the call if this is its revision, else None."""
        subject = self._link.names.call(call_id)
        message = await self._link.load_near(subject)
        if message is None or (message.seq or 0) < revision:
            message = await self._link.load(subject)
        record = self._parse(call_id, message)
        return record if record is not None and record.revision == revision else None

    def _parse(self, call_id: str, message: api.RawStreamMsg | None) -> Record | None:
        if message is None or HEADER not in (message.headers or {}):
            return None
        return parse_record(call_id, message.seq or 0, message.headers or {}, message.data or b"")

    async def save(self, record: Record) -> Record:
        """Write a record behind the revision that it has; raises _Conflict."""
        headers = {HEADER: build_summary(record)} | ({ORIGIN_HEADER: record.origin} if record.origin else {})
        subject = self._link.names.call(record.call.id)
        revision = await self._link.save(subject, build_payload(record), headers, record.revision)
        self._link.last_revision = max(self._link.last_revision, revision)
        return dataclasses.replace(record, revision=revision)

    async def create(self, record: Record) -> Record:
        """Write the first record of a call.  Raises CallExists."""
        subject = self._link.names.call(record.call.id)
        while True:
            try:
                return await self.save(record)
            except _Conflict:
                message = await self._link.load(subject)
                existing = self._parse(record.call.id, message)
            if existing is not None:
                if record.origin and existing.origin == record.origin:
                    return existing  # our own, whose acknowledgement was lost
                raise CallExists(f"the call id {record.call.id} is in use")
            if message is None:  # somebody's write is on its way, or has failed, or a tombstone has just gone
                await asyncio.sleep(RETRY_PAUSE_S)
            revision = 0 if message is None else message.seq or 0  # behind the tombstone of a call that was deleted
            record = dataclasses.replace(record, revision=revision)

    async def change(self, call_id: str, step: Callable[[Record], Record], known: Record | None = None) -> Record:
        """Take a step from what the call is now; `known` is what it was when last seen.

        Raises CallUnknown, and what `step` raises.
        """
        record = known or await self.load(call_id)
        while record is not None:
            try:
                return await self.save(step(record))
            except _Conflict:
                record = await self.load(call_id)
        raise CallUnknown(f"no call has the id {call_id}")

    async def forget(self, record: Record) -> None:
        """Delete a call that is still at this revision, and all that hangs on it.  Raises _Conflict."""
        call, link = record.call, self._link
        if call.idempotency_key is not None:
            await self._forget_key(call)
        subject = link.names.call(call.id)
        try:
            revision = await link.save(subject, b"", {TTL_HEADER: f"{TOMBSTONE_S}s"}, record.revision)
            link.last_revision = max(link.last_revision, revision)
        except QueueFull:  # no room even to say that there will be room
            await link.erase(link.names.calls, record.revision)
        for body in (call.body, call.result):
            if body is not None:
                await self.drop_body(body)

    async def _forget_key(self, call: Call) -> None:
        key = await self._link.load(self._link.names.key(call.function, call.idempotency_key or ""))
        if key is not None and key.data == call.id.encode():
            await self._link.erase(self._link.names.calls, key.seq or 0)

    async def drop_body(self, body: StoredBody) -> None:
        """Remove the messages of a body that no call names."""
        if body.file is not None:
            await self._link.purge(self._link.names.bodies, self._link.names.subject("body", body.file, "*"))


# ---------------------------------------------------------------------------------------------------------------
# Following the stream.
#
# A push consumer without acknowledgements, headers only, that the servers keep in memory.  Its messages are numbered:
# a gap, a number that comes twice, or silence without heartbeats means that something was lost, and the answer to
# everything is the same: a new consumer, from the last message that was heard on.
# ---------------------------------------------------------------------------------------------------------------


class Mirror:
    """The index of the queue, kept up to date.  `watcher` is told of every change."""

    def __init__(self, link: Link) -> None:
        self.index = Index()
        self.watcher: Foreman | None = None
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._seen = 0
        self._delivered = 0  # by the consumer of now
        self._heard_s = float("-inf")
        self._synced = asyncio.Event()
        self._broken = asyncio.Event()
        self._news = asyncio.Event()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._tickets = itertools.count()
        self._task = asyncio.create_task(self._follow())

    @property
    def current(self) -> bool:
        """Whether everything has been heard until a moment ago."""
        return self._synced.is_set() and self._loop.time() - self._heard_s < 2.5 * HEARTBEAT_S

    async def ready(self) -> Index:
        """The index once it has been read to its end.  Raises QueueUnavailable after SYNC_S."""
        try:
            async with asyncio.timeout(SYNC_S):
                await self._synced.wait()
        except TimeoutError:
            raise QueueUnavailable(f"the queue's index could not be read within {SYNC_S:g}s") from None
        await self.reach(self._link.last_revision)
        return self.index

    async def reach(self, revision: int) -> None:
        """Wait until a revision has been heard of; not longer than TRY_S, as it may have been removed since."""
        if self._seen >= revision:
            return
        future = self._loop.create_future()
        heapq.heappush(self._waiting, (revision, next(self._tickets), future))
        await asyncio.wait([future], timeout=TRY_S)

    async def hear(self) -> bool:
        """Tell whether the index is current; wait for a sign of life if there was none a moment ago."""
        if self._synced.is_set() and not self.current:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.5 * HEARTBEAT_S):
                    while not self.current:
                        self._news.clear()
                        await self._news.wait()
        return self.current

    async def stop(self) -> None:
        """Follow no longer."""
        await end_tasks([self._task])

    async def _follow(self) -> None:
        complaint = ""
        while True:
            subscription: Subscription | None = None
            try:
                subscription = await self._subscribe()
                complaint = ""
                await self._listen()
            except (NatsError, TimeoutError) as error:
                if str(error) != complaint:
                    log.warning(f"the queue's stream cannot be followed: {queue_error(error)}")
                complaint = str(error)
            finally:
                if subscription is not None:
                    with contextlib.suppress(NatsError):
                        await subscription.unsubscribe()
            await asyncio.sleep(FEED_PAUSE_S)

    async def _subscribe(self) -> Subscription:
        self._delivered = 0
        self._broken.clear()
        inbox = self._link.client.new_inbox()
        config = api.ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=self._seen + 1,
            ack_policy=api.AckPolicy.NONE,
            headers_only=True,
            mem_storage=True,
            num_replicas=1,
            flow_control=True,
            idle_heartbeat=HEARTBEAT_S,
        )
        subscription = await self._link.client.subscribe(inbox, cb=self._on_message)
        with contextlib.ExitStack() as stack:
            stack.callback(self._broken.set)
            info = await self._link.js.add_consumer(self._link.names.calls, config)
            stack.pop_all()
        self._heard_s = self._loop.time()
        if not info.num_pending:
            self._catch_up()
        return subscription

    async def _listen(self) -> None:
        """Return when the consumer is lost."""
        while not self._broken.is_set() and self._loop.time() - self._heard_s < 3 * HEARTBEAT_S:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._broken.wait()
        self._synced.clear()

    async def _on_message(self, message: Msg) -> None:
        if message.headers and "Status" in message.headers:
            await self._on_status(message)
            return
        tokens = message.reply.split(".")
        stream_seq, consumer_seq, _, pending = map(int, tokens[5:9] if len(tokens) == 9 else tokens[7:11])
        if consumer_seq != self._delivered + 1 or self._broken.is_set():
            self._broken.set()
            return
        self._delivered, self._seen, self._heard_s = consumer_seq, stream_seq, self._loop.time()
        self._apply(message, stream_seq)
        if not pending:
            self._catch_up()
        while self._waiting and self._waiting[0][0] <= stream_seq:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)

    async def _on_status(self, message: Msg) -> None:
        headers = message.headers or {}
        stalled = headers.get("Nats-Consumer-Stalled") or message.reply
        if stalled:
            with contextlib.suppress(NatsError):
                await self._link.client.publish(stalled)  # flow control: we have come so far
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._delivered:
            self._broken.set()
            return
        self._heard_s = self._loop.time()
        self._news.set()

    def _catch_up(self) -> None:
        if not self._synced.is_set():
            self._synced.set()
            if self.watcher is not None:
                self.watcher.on_resume()
        self._news.set()

    def _apply(self, message: Msg, revision: int) -> None:
        _, kind, token = message.subject.split(".", 2)
        if kind == "call":
            call_id, header = parse_token(token), (message.headers or {}).get(HEADER)
            if header is None:
                self.forget(call_id)
                return
            try:
                entry = parse_summary(call_id, revision, header)
            except (KeyError, ValueError, TypeError) as error:
                log.error(f"the record of call {call_id} (revision {revision}) cannot be read: {error!r}")
                return
            self.index.apply(entry)
            if self.watcher is not None:
                self.watcher.on_entry(entry)
        elif (kind, token) == ("meta", "foreman") and self.watcher is not None:
            self.watcher.on_foreman(revision)

    def forget(self, call_id: str) -> None:
        """A call is gone."""
        self.index.remove(call_id)
        if self.watcher is not None:
            self.watcher.schedule.remove(call_id)


# ---------------------------------------------------------------------------------------------------------------
# The foreman.
# ---------------------------------------------------------------------------------------------------------------


class Foreman:
    """Deals calls to workers that ask.  It is in office from `start` until `retire`, or until somebody replaces it."""

    def __init__(self, link: Link, mirror: Mirror, term: str, revision: int, now: Callable[[], float]) -> None:
        self.term = term
        self.schedule = Schedule(mirror.index)
        self.in_office = True
        self._link = link
        self._mirror = mirror
        self._records = Records(link)
        self._revision = revision
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._alarm_s: float | None = None
        self._parked: dict[str, asyncio.Future[None]] = {}  # in the order of their coming
        self._woken = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscription: Subscription | None = None
        self._retirement: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take office: whoever knows the term can ask from now on."""
        for entry in self._mirror.index.entries.values():
            self.on_entry(entry)
        self._mirror.watcher = self
        subject = self._link.names.subject("foreman", self.term)
        self._subscription = await self._link.client.subscribe(subject, cb=self._on_request)
        self._begin(self._tick())

    async def retire(self) -> None:
        """Let someone else do it."""
        self.in_office = False
        self._mirror.watcher = None
        await end_tasks(self._tasks)
        with contextlib.suppress(NatsError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()

    async def hand_over(self) -> None:
        """Retire and say so, so that nobody waits for us.  The next one reads the queue anew."""
        await self.retire()
        with contextlib.suppress(_Conflict, QueueUnavailable, QueueFull):
            await self._link.save(self._link.names.subject("meta", "foreman"), b"", {}, self._revision)

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What the mirror tells.

    def on_entry(self, entry: Entry) -> None:
        """A record has changed."""
        self.schedule.apply(entry, self._now(), self._loop.time())
        due_s = self.schedule.next_due_s()
        if due_s is not None and (self._alarm_s is None or due_s < self._alarm_s):
            self._changed.set()
        self._wake()

    def on_resume(self) -> None:
        """The stream is followed again after a pause, in which no renewal could reach us."""
        self.schedule.extend(self._loop.time())

    def on_foreman(self, revision: int) -> None:
        """Somebody has taken office."""
        if revision > self._revision and self.in_office:
            log.info("another worker deals the calls now")
            self.in_office = False
            self._retirement = asyncio.create_task(self.retire())

    def _wake(self) -> None:
        """As many as there is new work for."""
        count = self.schedule.generation - self._woken
        self._woken = self.schedule.generation
        while self._parked and count > 0:
            future = self._parked.pop(next(iter(self._parked)))
            if not future.done():
                future.set_result(None)
                count -= 1

    async def _tick(self) -> None:
        """See to what time brings: calls that fall due, leases that run out."""
        while True:
            now_s, clock_s = self._now(), self._loop.time()
            self._alarm_s = self.schedule.next_due_s()
            due_in_s = float("inf") if self._alarm_s is None else max(0.0, self._alarm_s - now_s)
            self._changed.clear()
            try:
                async with asyncio.timeout(min(due_in_s, TICK_S)):
                    await self._changed.wait()
            except TimeoutError:
                if due_in_s <= TICK_S:
                    self.schedule.generation += 1  # by our own patience: the wall clock may have been set meanwhile
            if self._loop.time() - clock_s > 3 * TICK_S:
                self.schedule.extend(self._loop.time())  # we were asleep: renewals wait in our socket
            self.schedule.advance(self._now(), self._loop.time())
            self._wake()
            if self._mirror.current:
                try:
                    await self._take_back(self._loop.time() - LAPSE_GRACE_S)
                except (QueueUnavailable, QueueFull) as error:
                    log.warning(f"leases that ran out cannot be taken back yet: {error}")

    # What workers ask.

    async def _on_request(self, message: Msg) -> None:
        self._begin(self._reply(message))

    async def _reply(self, message: Msg) -> None:
        request = json.loads(message.data)
        answer: Json = {"wait": True}  # if we retire meanwhile
        try:
            answer = await self.answer(request.pop("op"), request)
        except (QueueUnavailable, QueueFull) as error:
            answer = {"error": str(error), "full": isinstance(error, QueueFull)}
        finally:
            with contextlib.suppress(NatsError):
                await message.respond(json.dumps(answer).encode())

    async def answer(self, op: str, request: Json) -> Json:
        """Answer one request of a worker, here or elsewhere."""
        if not await self._mirror.hear():
            return {"wait": True}
        await self._mirror.reach(max(request["seen"], self._link.last_revision))
        match op:
            case "claim":
                return await self._deal(request)
            case "park":
                return await self._park(request["who"], request["generation"], request["timeout_s"])
            case "renew":
                return self._renew(request)
            case "reclaim":
                return {"count": await self._take_back(self._loop.time())}
            case "bye":
                self.schedule.void(request["owner"])
                return {"count": await self._take_back(self._loop.time()) if request["now"] else 0}
        raise AssertionError(f"no worker asks {op}")

    async def _deal(self, request: Json) -> Json:
        now_s, clock_s = self._now(), self._loop.time()
        self._parked.pop(request["who"], None)  # whatever it waited for, it is awake
        self.schedule.advance(now_s, clock_s)
        expired = self.schedule.take_expired(now_s, STEP_COUNT)
        if expired:
            await asyncio.gather(*(self._expire(entry, now_s) for entry in expired))
        generation = self.schedule.generation
        wanted = Wanted(tuple(request["queues"]), request["limit"], request["room"])
        dealt = self.schedule.deal(request["kind"], wanted, now_s, clock_s)
        return {"dealt": [element[1:] for element in dealt], "generation": f"{self.term}.{generation}"}

    async def _expire(self, entry: Entry, now_s: float) -> None:
        try:
            await self._records.change(entry.id, partial(expire, now_s=now_s))
        except (_Passed, CallUnknown):
            pass  # something else has become of it
        except (QueueUnavailable, QueueFull):
            self.schedule.apply(entry, now_s, self._loop.time())
            raise

    async def _park(self, who: str, generation: str, timeout_s: float) -> Json:
        """Answer when there is work that nobody else was told of.

        Somebody is parked once: who asks again has given up the earlier request, and must not be told through that.
        """
        self.schedule.advance(self._now(), self._loop.time())
        self._wake()
        if not generation.startswith(self.term) and not self.schedule.has_ready():
            generation = f"{self.term}.{self.schedule.generation}"  # a newcomer, with nothing to do yet
        if generation == f"{self.term}.{self.schedule.generation}":
            future = self._parked[who] = self._loop.create_future()
            try:
                await asyncio.wait([future], timeout=timeout_s)
            finally:
                if self._parked.get(who) is future:
                    del self._parked[who]
        known, generation = generation, f"{self.term}.{self.schedule.generation}"
        return {"work": known != generation, "generation": generation}

    def _renew(self, request: Json) -> Json:
        lost, cancelled, until_s = [], [], self._loop.time() + request["lease_s"]
        for call_id, fence in request["leases"]:
            if not self.schedule.is_held(call_id, fence):
                lost.append(call_id)
                continue
            self.schedule.renew(call_id, fence, until_s)
            entry = self._mirror.index.entries[call_id]
            if entry.cancel and entry.hold is not None and entry.hold.kind == "call":
                cancelled.append(call_id)
        return {"lost": lost, "cancelled": cancelled}

    async def _take_back(self, clock_s: float) -> int:
        """End the leases that had run out by then; return how many."""
        count = 0
        for call_id in self.schedule.lapsed(clock_s):
            fence = self.schedule.lapses[call_id][0]

            def step(record: Record, fence: int = fence) -> Record:
                if record.hold is None or record.hold.fence != fence:
                    raise _Passed
                return after(record, partial(steps.take_back, now_s=self._now()))

            with contextlib.suppress(_Passed, CallUnknown):
                await self._records.change(call_id, step)
                count += 1
        await self._mirror.reach(self._link.last_revision)
        return count


# ---------------------------------------------------------------------------------------------------------------
# Opening: the connection, and the streams.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    """Where the servers are, how to log in (arguments of `Client.connect`), and what the streams are to be."""

    servers: tuple[str, ...]
    login: Mapping[str, Any] = field(default_factory=dict, repr=False)
    prefix: str = "faashound"
    replicas: int = 1
    max_bytes: int = 4 << 30


def build_streams(names: Names, options: Options) -> tuple[api.StreamConfig, api.StreamConfig]:
    """Return the streams of calls and of bodies as they are to be."""
    base = partial(
        api.StreamConfig,
        retention=api.RetentionPolicy.LIMITS,
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,  # full means full: a call that was accepted is never pushed out
        max_msgs_per_subject=1,
        max_bytes=options.max_bytes,
        num_replicas=options.replicas,
        allow_direct=True,
    )
    event = api.RePublish(
        src=names.subject("call", "*"), dest=names.subject("event", "{{wildcard(1)}}"), headers_only=True
    )
    calls = base(
        name=names.calls,
        subjects=[names.subject(kind, "*") for kind in ("call", "key", "meta")],
        republish=event,
        allow_msg_ttl=True,
    )
    return calls, base(name=names.bodies, subjects=[names.subject("body", "*", "*")])


_ESSENTIAL = ("subjects", "retention", "discard", "max_msgs_per_subject", "republish", "allow_msg_ttl", "max_age")


def compare_streams(wanted: api.StreamConfig, found: api.StreamConfig) -> tuple[list[str], list[str]]:
    """Return what differs, a line each: what the queue cannot work with, and what it can."""
    bad: list[str] = []
    odd: list[str] = []
    for name in (*_ESSENTIAL, "storage", "num_replicas", "max_bytes", "allow_direct", "max_msgs"):
        ours, theirs = getattr(wanted, name) or None, getattr(found, name) or None
        if ours is None and theirs in (None, -1):
            continue
        if ours != theirs:
            line = f"the stream {wanted.name} has {name} {_shown(theirs)}, wanted is {_shown(ours)}"
            (bad if name in _ESSENTIAL else odd).append(line)
    return bad, odd


def _shown(value: object) -> str:
    return str(getattr(value, "value", value))


async def ensure_stream(link: Link, wanted: api.StreamConfig) -> api.StreamConfig:
    """Create a stream unless it is there; return it as it is.  One that differs is told, or raises QueueUnavailable."""
    name = wanted.name or ""

    async def find(timeout_s: float) -> api.StreamConfig:
        async with asyncio.timeout(timeout_s):
            try:
                return (await link.js.stream_info(name)).config
            except NotFoundError:
                try:
                    return (await link.js.add_stream(wanted)).config
                except APIError as error:
                    if error.err_code != 10058:  # somebody has just made it, and not like this
                        raise
                    return (await link.js.stream_info(name)).config

    try:
        found = await link.insist(find)
    except (QueueUnavailable, QueueFull) as error:
        room = f"nats_max_bytes={wanted.max_bytes} on nats_replicas={wanted.num_replicas}"
        raise type(error)(f"{error}; the stream {name} wants {room}") from error
    bad, odd = compare_streams(wanted, found)
    if bad:
        raise QueueUnavailable("; ".join([*bad, "it has been left as it is: mend or remove it, or set nats_prefix"]))
    for line in odd:
        log.warning(f"{line}; it has been left as it is")
    return found


async def connect(options: Options, reporter: _Reporter) -> NatsClient:
    """Return a connection that comes back by itself whenever it is lost.  Raises QueueUnavailable, CannotStart."""
    client = NatsClient()
    try:
        async with asyncio.timeout(CONNECT_S):
            await client.connect(
                list(options.servers),
                error_cb=reporter.on_error,
                disconnected_cb=reporter.on_disconnect,
                reconnected_cb=reporter.on_reconnect,
                name="faashound",
                connect_timeout=2,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]  # it goes to asyncio.sleep
                max_reconnect_attempts=-1,
                ping_interval=5,
                max_outstanding_pings=2,
                **options.login,
            )
    except ImportError as error:
        raise CannotStart("NKeys and creds files need the package nkeys: pip install 'faashound[nats]'") from error
    except (NatsError, OSError, TimeoutError, ValueError) as error:
        with contextlib.suppress(NatsError, OSError):
            await client.close()
        reason = reporter.last if isinstance(error, TimeoutError) else (str(error) or type(error).__name__)
        raise QueueUnavailable(f"cannot connect to NATS at {','.join(options.servers)}: {reason}") from error
    version = client.connected_server_version
    if (version.major, version.minor) < MIN_VERSION:
        await client.close()
        raise QueueUnavailable(f"NATS {version.major}.{version.minor} is too old; needed: 2.11 or newer")
    return client


async def read_token(link: Link) -> str:
    """Return the queue's secret, made by whoever opens the queue first."""
    subject = link.names.subject("meta", "token")
    while True:
        message = await link.load(subject)
        if message is not None:
            return (message.data or b"").decode("ascii")
        with contextlib.suppress(_Conflict):
            await link.save(subject, secrets.token_urlsafe(32).encode(), {}, 0)


# ---------------------------------------------------------------------------------------------------------------
# The queue.
# ---------------------------------------------------------------------------------------------------------------


class JetStream:
    """A queue on NATS, open in this process; every method is described at `spool.Spool`."""

    def __init__(self, link: Link, token: str, max_bytes: int, now: Callable[[], float]) -> None:
        """Not for callers: use `JetStream.open`."""
        self.token = token
        self._link = link
        self._names = link.names
        self._max_bytes = max_bytes
        self._now = now
        self._records = Records(link)
        self._loop = asyncio.get_running_loop()
        self._mirror: Mirror | None = None
        self._keeps_index = False  # somebody has asked for it, beside our foreman
        self._foreman: Foreman | None = None
        self._election = asyncio.Lock()
        self._office: tuple[str, int] = ("", 0)  # the foreman's term, as far as we know, and its revision
        self._generation = ""
        self._owners: dict[str, Subscription] = {}
        self._held: dict[int, Record] = {}  # by the lease's fence
        self._cancelled: set[str] = set()
        self._cancel = asyncio.Event()
        self._chores: set[asyncio.Task[Any]] = set()
        self._room_s, self._room_bytes = float("-inf"), 0  # when it was asked for, and what is left since
        self._closed = False

    @classmethod
    async def open(cls, options: Options, *, now: Callable[[], float] = time.time) -> JetStream:
        """Open the queue, or create it; raises QueueUnavailable, and CannotStart if a package is missing."""
        reporter = _Reporter()
        client = await connect(options, reporter)
        async with contextlib.AsyncExitStack() as stack:
            link = Link(client, Names(options.prefix), reporter)
            stack.push_async_callback(link.close)
            calls, _ = [await ensure_stream(link, stream) for stream in build_streams(link.names, options)]
            queue = cls(link, await read_token(link), calls.max_bytes or -1, now)
            stack.pop_all()
        return queue

    @property
    def healthy(self) -> bool:
        """Whether the servers can be reached, as far as is known."""
        return not self._closed and self._link.healthy

    async def close(self) -> None:
        """Let go of everything; leases still held become void.  May be repeated."""
        if self._closed:
            return
        with contextlib.suppress(QueueUnavailable, QueueFull, TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await self._say_goodbye()
        self._closed = True
        await end_tasks(self._chores)
        if self._foreman is not None:
            await self._foreman.retire()
        if self._mirror is not None:
            await self._mirror.stop()
        await self._link.close()

    async def _say_goodbye(self) -> None:
        """Void our leases, and let another one deal the calls."""
        if not self._link.client.is_connected:
            return
        mine = self._foreman is not None and self._foreman.in_office
        for owner in self._owners:
            await self._ask("bye", owner=owner, now=mine)
        if self._foreman is not None and self._foreman.in_office:
            await self._foreman.hand_over()

    def _check_open(self) -> None:
        if self._closed:
            raise QueueUnavailable("the queue is closed")

    def _do(self, work: Any) -> asyncio.Task[Any]:
        """Begin something whose end nobody waits for."""
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task

    async def _index(self) -> Index:
        """The index of all calls, read when it is first asked for."""
        self._check_open()
        self._keeps_index = True
        if self._mirror is None:
            self._mirror = Mirror(self._link)
        return await self._mirror.ready()

    # -- the foreman, wherever it is

    async def _ask(self, op: str, **request: Any) -> Json:
        """Return the foreman's answer; become the foreman if there is none.  Raises QueueUnavailable, QueueFull."""
        self._check_open()
        deadline_s, silent_s = self._loop.time() + ASK_S + request.get("timeout_s", 0.0), self._loop.time()
        request |= {"who": self._link.name, "seen": self._link.last_revision}
        while self._loop.time() < deadline_s:
            answer = await self._ask_once(op, request)
            if answer is not None and "wait" not in answer:
                return answer
            if answer is not None:
                silent_s = self._loop.time()  # it is there, and reads the queue
                await asyncio.sleep(RETRY_PAUSE_S)
                continue
            patient = self._loop.time() - silent_s < SILENCE_S
            if await self._look_for_foreman(patient):
                silent_s = self._loop.time()
            else:
                await asyncio.sleep(RETRY_PAUSE_S)
        raise QueueUnavailable(
            "no worker deals the calls: NATS cannot be used, or the queue's index is still being read"
        )

    async def _ask_once(self, op: str, request: Json) -> Json | None:
        """The answer of the foreman we know, which may be to wait; None if it gives none, or there is none."""
        if self._foreman is not None and self._foreman.in_office:
            return await self._foreman.answer(op, request)
        if not self._office[0]:
            return None
        subject = self._names.subject("foreman", self._office[0])
        try:
            payload = json.dumps({"op": op, **request}).encode()
            message = await self._link.client.request(subject, payload, TRY_S + request.get("timeout_s", 0.0))
        except (NatsError, TimeoutError):
            return None
        answer: Json = json.loads(message.data)
        if "error" in answer:
            raise (QueueFull if answer["full"] else QueueUnavailable)(answer["error"])
        return answer

    async def _look_for_foreman(self, patient: bool = False) -> bool:
        """Learn who is foreman now, and take office if nobody is or, unless `patient`, the one we know is silent.

        False: it still is the one we know.
        """
        async with self._election:
            if self._foreman is not None and self._foreman.in_office:
                return True
            if self._foreman is not None:
                self._resign()
            subject = self._names.subject("meta", "foreman")
            message = await self._link.load(subject)
            found = ((message.data or b"").decode(), message.seq or 0) if message is not None else ("", 0)
            if found[0] and found == self._office and patient:
                return False
            if found[0] and found != self._office:
                self._office = found
                return True
            term = secrets.token_hex(6)
            try:
                revision = await self._link.save(subject, term.encode(), {}, found[1])
            except _Conflict:
                return True
            await self._take_office(term, revision)
            return True

    async def _take_office(self, term: str, revision: int) -> None:
        """Be there at once, so that nobody else stands; calls are dealt as soon as the queue has been read."""
        if self._mirror is None:
            self._mirror = Mirror(self._link)
        self._foreman, self._office = Foreman(self._link, self._mirror, term, revision, self._now), (term, revision)
        try:
            await self._foreman.start()
        except NatsError as error:
            self._foreman.in_office = False
            raise queue_error(error) from error

    def _resign(self) -> None:
        """Another one deals the calls: what we have read of the queue is of no use any more."""
        if self._mirror is not None and not self._keeps_index:
            self._do(self._mirror.stop())
            self._mirror = None
        self._foreman = None

    # -- bodies

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody:
        """Make a body safe; up to INLINE_BYTES it stays in memory and becomes part of the record."""
        self._check_open()
        source = _once(chunks) if isinstance(chunks, bytes) else chunks
        inline_bytes = min(INLINE_BYTES, self._link.client.max_payload // 8)
        writer: _BodyWriter | None = None
        held, total = bytearray(), 0
        async with contextlib.AsyncExitStack() as stack:
            async for piece in source:
                total += len(piece)
                if limit_bytes is not None and total > limit_bytes:
                    raise BodyTooLarge(limit_bytes)
                if writer is None and len(held) + len(piece) > inline_bytes:
                    writer = _BodyWriter(self._link)
                    stack.push_async_callback(writer.discard)
                    await writer.write(held)
                    held = bytearray()
                if writer is None:
                    held += piece
                else:
                    await writer.write(piece)
            if writer is None:
                return StoredBody(total, bytes(held), None)
            await writer.finish()
            stack.pop_all()
        return StoredBody(total, None, writer.name)

    async def store_result(
        self, chunks: AsyncIterator[bytes], limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody:
        """As `store_body`; it does not wait for room yet, and `length` does not matter."""
        return await self.store_body(chunks, limit_bytes)

    async def open_body(self, body: StoredBody, chunk_bytes: int = CHUNK_BYTES) -> AsyncGenerator[bytes, None]:
        """The bytes of a stored body, in pieces of at most `chunk_bytes`; QueueDamaged if not all are there."""
        if body.file is None:
            for start in range(0, len(body.inline or b""), chunk_bytes):
                yield (body.inline or b"")[start : start + chunk_bytes]
            return
        self._check_open()
        left = body.bytes_count
        for number in itertools.count():
            if left <= 0:
                return
            chunk = await self._read_chunk(self._names.subject("body", body.file, number))
            if chunk is None:
                raise QueueDamaged(f"a stored body is {left} bytes too short")
            left -= len(chunk)
            for start in range(0, len(chunk), chunk_bytes):
                yield chunk[start : start + chunk_bytes]

    async def _read_chunk(self, subject: str) -> bytes | None:
        message = await self._link.load_near(subject, stream=self._names.bodies)
        if message is None:  # that server may not have heard of it yet
            message = await self._link.load(subject, stream=self._names.bodies)
        return None if message is None else message.data or b""

    async def drop_body(self, body: StoredBody) -> None:
        """Remove a body that no call names."""
        self._check_open()
        await self._records.drop_body(body)

    # -- submitting and following calls

    async def put(self, call: NewCall) -> Call:
        """Queue a call; the stream has acknowledged it when this returns, or QueueUnavailable after WRITE_S in all."""
        self._check_open()
        try:
            async with asyncio.timeout(WRITE_S):
                return await self._put(call)
        except TimeoutError:
            raise QueueUnavailable(f"NATS has not acknowledged the call within {WRITE_S:g} s") from None

    async def _put(self, call: NewCall) -> Call:
        await self._take_room(call)
        record = accept(call)
        try:
            if call.idempotency_key is None:
                return (await self._records.create(record)).call
            earlier = await self._put_keyed(record, call.idempotency_key)
        except (CallExists, KeyReused):
            await self.drop_body(call.body)
            raise
        if earlier.body.file != call.body.file:
            await self.drop_body(call.body)
        return earlier

    async def _put_keyed(self, record: Record, key: str) -> Call:
        """The call that the key stands for from now on.

        The key is written first and decides the call's id.  Whoever finds a key without a call puts the call under
        that id: then it does not matter who comes first, or dies between the two.
        """
        subject, own_id = self._names.key(record.call.function, key), record.call.id
        while True:
            first_id, revision = await self._claim_key(subject, own_id)
            try:
                return (await self._records.create(record if first_id == own_id else rename(record, first_id))).call
            except CallExists:
                found = await self._records.load(first_id)
                if found is None:
                    continue  # deleted meanwhile
                known = found.call
            if (known.function, known.idempotency_key) == (record.call.function, key):
                check_same_request(known, record.call)
                return known
            await self._link.erase(self._names.calls, revision)  # a key for an id that belongs to another call
            if first_id == own_id:
                raise CallExists(f"the call id {own_id} is in use")

    async def _claim_key(self, subject: str, call_id: str) -> tuple[str, int]:
        """The id that a key stands for, ours if it is new, and the key's revision."""
        while True:
            message = await self._link.load(subject)
            if message is not None:
                return (message.data or b"").decode(), message.seq or 0
            with contextlib.suppress(_Conflict):
                return call_id, await self._link.save(subject, call_id.encode(), {}, 0)

    async def _take_room(self, call: NewCall) -> None:
        """Raise QueueFull if the stream is so full that the steps of the calls in it may soon have no room."""
        if self._max_bytes < 0:  # a stream that somebody else has made: as much as the servers have
            return
        if self._loop.time() - self._room_s > ROOM_KNOWN_S:
            info = await self._link.info(self._names.calls)
            self._room_s = self._loop.time()
            self._room_bytes = int(self._max_bytes * (1 - KEPT_ROOM)) - info.state.bytes
        self._room_bytes -= RECORD_BYTES + len(call.body.inline or b"")
        if self._room_bytes < 0:
            raise QueueFull(f"the queue's stream is full: nats_max_bytes is {self._max_bytes}")

    async def get(self, call_id: str) -> Call | None:
        """The call, or None."""
        self._check_open()
        record = await self._records.load(call_id)
        return None if record is None else record.call

    async def wait(self, call_id: str, timeout_s: float) -> Call:
        """The call once it is final, or as it is after `timeout_s`; CallUnknown if there is none (any more)."""
        self._check_open()
        deadline_s, changed = self._loop.time() + timeout_s, asyncio.Event()

        async def on_event(_: Msg) -> None:
            changed.set()

        subscription = await self._subscribe(self._names.subject("event", build_token(call_id)), on_event)
        try:
            while True:
                changed.clear()
                call = await self.get(call_id)
                if call is None:
                    raise CallUnknown(f"no call has the id {call_id}")
                left_s = deadline_s - self._loop.time()
                if call.state in FINAL or left_s <= 0:
                    return call
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, POLL_S)):
                        await changed.wait()
        finally:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()

    async def _subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        try:
            return await self._link.client.subscribe(subject, cb=callback)
        except NatsError as error:
            raise queue_error(error) from error

    async def cancel(self, call_id: str) -> State:
        """CANCELLED: it was queued and will not run.  RUNNING: its worker is told."""
        self._check_open()
        record = await self._records.change(call_id, partial(after, step=partial(steps.cancel, now_s=self._now())))
        if record.hold is not None:
            with contextlib.suppress(NatsError):  # it is told again when it renews
                subject = self._names.subject("owner", build_token(record.hold.owner))
                await self._link.client.publish(subject, call_id.encode())
        return record.call.state

    async def cancel_queued(self, *, function: FunctionName | None = None) -> int:
        """Cancel every queued call, of one function or of all; return how many."""
        count = 0
        queued = await self._scan(lambda each: each.state is State.QUEUED and function in (None, each.function))
        for call_id in queued:
            with contextlib.suppress(CallFinished, CallUnknown):
                count += await self.cancel(call_id) is State.CANCELLED
        return count

    # -- owners and leases

    async def enlist(self, owner: str | None = None) -> str:
        """Make this process an owner of leases; what an earlier life of the same name held is taken back."""
        self._check_open()
        name = owner or f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        if "/" in name or "\0" in name or name.startswith("."):
            raise AssertionError(f"an owner's name is the name of a file: {name!r}")
        subject = self._names.subject("owner", build_token(name))
        if await self._is_at_work(subject):
            raise QueueUnavailable(f"the owner {name} is at work already")
        await self._ask("bye", owner=name, now=True)
        self._owners[name] = await self._subscribe(subject, self._on_word)
        return name

    async def _is_at_work(self, subject: str) -> bool:
        """Whether an owner answers; one that has just hung up may take a question with it, so ask again."""
        for _ in range(OWNER_TRY_COUNT):
            try:
                await self._link.client.request(subject, b"", TRY_S / OWNER_TRY_COUNT)
                return True
            except NoRespondersError:
                return False
            except TimeoutError:
                continue
            except NatsError as error:
                raise queue_error(error) from error
        raise QueueUnavailable("the owner of that name is there but does not answer, or NATS does not")

    async def _on_word(self, message: Msg) -> None:
        """Somebody asks whether we live, or wants a call of ours cancelled."""
        if message.data:
            self._cancelled.add(message.data.decode())
            self._cancel.set()
        else:
            await message.respond(b"here")

    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due calls from `queues`, and no more of a function than `room` says."""
        wanted = {"queues": list(queues), "limit": limit, "room": dict(room or {})}
        return await self._claimed(Claimant("call", owner, lease_s, self._now()), wanted)

    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due callbacks of `queues`, and no more of a destination than `room` says."""
        wanted = {"queues": list(queues), "limit": limit, "room": dict(room or {})}
        return await self._claimed(Claimant("callback", owner, lease_s, self._now()), wanted)

    async def _claimed(self, claimant: Claimant, wanted: Json) -> list[Lease]:
        if claimant.owner not in self._owners:
            raise AssertionError(f"{claimant.owner} has not been enlisted: nobody could tell it of a cancel")
        if wanted["limit"] <= 0:
            return []
        self._check_open()
        task = self._do(self._claim(claimant, wanted))
        try:
            leases: list[Lease] = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._on_unwanted)
            raise
        return leases

    def _on_unwanted(self, task: asyncio.Task[list[Lease]]) -> None:
        if task.cancelled() or task.exception() is not None or self._closed:
            return
        for lease in task.result():
            self._do(self._release_unwanted(lease))

    async def _release_unwanted(self, lease: Lease) -> None:
        with contextlib.suppress(LeaseLost, QueueUnavailable, QueueFull):
            await self.release(lease)

    async def _claim(self, claimant: Claimant, wanted: Json) -> list[Lease]:
        """Take what the foreman deals; ask again when others were faster at all of it."""
        while True:
            answer = await self._ask("claim", kind=claimant.kind, **wanted)
            self._generation = answer["generation"]
            takes = (self._take(call_id, revision, claimant) for call_id, revision in answer["dealt"])
            outcomes = await asyncio.gather(*takes, return_exceptions=True)
            leases = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
            if leases or not outcomes:
                return leases
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    raise outcome

    async def _take(self, call_id: str, revision: int, claimant: Claimant) -> Lease | None:
        record = await self._records.load_revision(call_id, revision)
        if record is None:
            return None
        try:
            taken = await self._records.save(take(record, claimant))
        except _Conflict:
            return None
        self._held[revision] = taken
        self._cancelled.discard(call_id)
        return Lease(taken.call, claimant.kind, claimant.owner, revision)

    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal:
        """Let the leases last `lease_s` seconds from now; tell which are lost and which calls to cancel."""
        known = [[lease.call.id, lease.fence] for lease in leases]
        answer = await self._ask("renew", leases=known, lease_s=lease_s)
        told = self._cancelled & {lease.call.id for lease in leases if lease.kind == "call"}
        lost = frozenset(answer["lost"])
        return Renewal(lost, (frozenset(answer["cancelled"]) | told) - lost)

    async def cancelled_ids(self, owner: str) -> frozenset[str]:
        """The calls that `owner` runs and someone wants cancelled."""
        held = {r.call.id for r in self._held.values() if r.hold and (r.hold.owner, r.hold.kind) == (owner, "call")}
        self._cancelled &= {record.call.id for record in self._held.values()}
        return frozenset(held & self._cancelled)

    async def reclaim(self) -> int:
        """Take back what owners that are gone hold and what was not renewed in time; return how many."""
        return int((await self._ask("reclaim"))["count"])

    # -- ending a lease

    async def _end(self, lease: Lease, kind: Kind, step: Callable[[steps.Record], steps.Record]) -> Record:
        """Take a step that ends a lease; LeaseLost if someone else has it by now."""
        if lease.kind != kind:
            raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
        self._check_open()

        def checked(record: Record) -> Record:
            steps.check_held(_law_hold(record.hold), lease)
            return after(record, step)

        try:
            record = await self._records.change(lease.call.id, checked, self._held.get(lease.fence))
        except CallUnknown:
            self._held.pop(lease.fence, None)
            raise LeaseLost(f"the call {lease.call.id} is gone") from None
        except LeaseLost:
            if lease.owner in self._owners:
                self._held.pop(lease.fence, None)
            raise
        self._held.pop(lease.fence, None)
        return record

    async def finish(self, lease: Lease, end: RunEnd) -> None:
        """The call has ended, also when a cancel came too late. On LeaseLost the result's file is dropped."""
        excerpt = await self._read_excerpt(end.result)
        try:
            await self._end(lease, "call", partial(steps.end_run, end=end, excerpt=excerpt, now_s=self._now()))
        except LeaseLost:
            if end.result is not None:
                await self.drop_body(end.result)
            raise

    async def _read_excerpt(self, result: StoredBody | None) -> bytes | None:
        if result is None:
            return None
        async for piece in self.open_body(result, EXCERPT_BYTES):
            return piece
        return b""

    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State:
        """Back into the queue until `due_s`; or CANCELLED, if asked for."""
        kept = None if excerpt is None else excerpt[:EXCERPT_BYTES]
        record = await self._end(lease, "call", partial(steps.retry_run, attempt=attempt, due_s=due_s, excerpt=kept))
        return record.call.state

    async def release(self, lease: Lease) -> None:
        """Hand back a call or a callback that was not tried."""
        await self._end(lease, lease.kind, partial(steps.release, now_s=self._now()))

    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None:
        """The run was stopped because someone cancelled the call."""
        await self._end(lease, "call", partial(steps.stop_run, attempt=attempt))

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None:
        """The outcome was delivered."""
        await self._end(lease, "callback", partial(steps.end_callback, attempt=attempt, event=Event.SUCCEED))

    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None:
        """The delivery failed and is to be tried again at `due_s`."""
        await self._end(lease, "callback", partial(steps.end_callback, attempt=attempt, event=Event.RETRY, due_s=due_s))

    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None:
        """The delivery has failed for good."""
        await self._end(lease, "callback", partial(steps.end_callback, attempt=attempt, event=Event.GIVE_UP))

    # -- waiting

    async def wait_for_work(self, timeout_s: float) -> bool:
        """True when there may be something to claim.  False after `timeout_s`."""
        deadline_s = self._loop.time() + timeout_s
        while True:
            left_s = max(0.0, deadline_s - self._loop.time())
            answer = await self._ask("park", generation=self._generation, timeout_s=min(left_s, PARK_S))
            self._generation = answer["generation"]
            if answer["work"] or left_s <= 0:
                return bool(answer["work"])

    async def wait_for_cancel(self, timeout_s: float) -> bool:
        """True when someone has asked for the end of a call that runs here; see `cancelled_ids`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._cancel.wait()
        except TimeoutError:
            return False
        self._cancel.clear()
        return True

    # -- for people

    async def calls(
        self,
        *,
        state: State | None = None,
        function: FunctionName | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Call]:
        """Calls, newest first, without inline bodies and history (`get` has them)."""
        index = await self._index()
        found: list[Call] = []
        for call_ids in _batches(index.newest_first(state, function, before, limit)):
            records = await asyncio.gather(*map(self._records.load, call_ids))
            for call_id, record in zip(call_ids, records, strict=True):
                if record is not None:
                    found.append(_listed(record.call))
                elif self._mirror is not None:
                    self._mirror.forget(call_id)
        return found

    async def requeue_dead(self, call_id: str) -> Call:
        """A dead letter is queued as if new."""
        self._check_open()
        dropped: list[StoredBody] = []

        def step(record: Record) -> Record:
            again = after(record, partial(steps.requeue_dead, now_s=self._now()))
            dropped[:] = [record.call.result] if record.call.result is not None else []
            return again

        record = await self._records.change(call_id, step)
        for body in dropped:
            await self.drop_body(body)
        return record.call

    async def requeue_callback(self, call_id: str) -> Call:
        """A dead callback is due now, attempts from 0."""
        self._check_open()
        return (
            await self._records.change(call_id, partial(after, step=partial(steps.requeue_callback, now_s=self._now())))
        ).call

    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int:
        """Delete calls in a final state, except those with a callback under way; return how many."""
        if state not in FINAL:
            raise AssertionError(f"calls that are {state.value} are not for purging: cancel them")
        may = partial(may_purge, state=state, function=function)
        if call_id is not None:
            self._check_open()
            return int(await self._forget(call_id, may))
        return await self._forget_all(may)

    async def _forget(self, call_id: str, may: Callable[[Entry], bool]) -> bool:
        """Delete a call if it may be; tell whether it was."""
        while True:
            record = await self._records.load(call_id)
            if record is None:
                if self._mirror is not None:
                    self._mirror.forget(call_id)  # whose end it has missed
                return False
            if not may(parse_summary(call_id, record.revision, build_summary(record))):
                return False
            try:
                await self._records.forget(record)
            except _Conflict:
                continue
            if self._mirror is not None:
                self._mirror.forget(call_id)
            return True

    async def _forget_all(self, may: Callable[[Entry], bool]) -> int:
        count = 0
        for call_ids in _batches(await self._scan(may)):
            count += sum(await asyncio.gather(*(self._forget(call_id, may) for call_id in call_ids)))
        return count

    async def _scan(self, wanted: Callable[[Entry], bool]) -> list[str]:
        """The ids of calls, by what the index tells; lets others have their turn meanwhile."""
        found = []
        for number, entry in enumerate(list((await self._index()).entries.values())):
            if wanted(entry):
                found.append(entry.id)
            if number % SCAN_COUNT == SCAN_COUNT - 1:
                await asyncio.sleep(0)
        return found

    async def stats(self) -> Stats:
        """The queue in figures."""
        return (await self._index()).stats(self._now(), self._link.commit_count)

    # -- for migrations

    async def put_held(self, call: NewCall) -> Call:
        """Queue a call that does not run before `let_go`; as `put` otherwise."""
        return await self.put(dataclasses.replace(call, due_s=HELD_S))

    async def held_ids(self) -> list[str]:
        """The calls that were put held and not let go."""
        return await self._scan(lambda entry: entry.state is State.QUEUED and entry.due_s == HELD_S)

    async def is_held(self, call_id: str) -> bool:
        """Whether the call was put held and not let go."""
        call = await self.get(call_id)
        return call is not None and (call.state, call.due_s) == (State.QUEUED, HELD_S)

    async def let_go(self, call_id: str, due_s: float, expires_s: float | None) -> None:
        """Let a held call run; nothing happens to one that is not held."""

        def step(record: Record) -> Record:
            if (record.call.state, record.call.due_s) != (State.QUEUED, HELD_S):
                raise _Passed
            return _with_call(record, due_s=due_s, expires_s=expires_s)

        with contextlib.suppress(_Passed):
            await self._records.change(call_id, step)

    # -- housekeeping

    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept:
        """Drop results and calls that have been final for longer, and bodies of no call; `bounds` are a spool's."""
        now_s, before_bytes = self._now(), await self._size_bytes()
        expired = await self._expire_all(now_s)
        results = await self._drop_results(now_s - keep_results_s)
        calls = await self._forget_all(partial(may_forget, before_s=now_s - retention_s))
        files = await self._drop_orphans()
        return Swept(expired, results, calls, files, max(0, before_bytes - await self._size_bytes()))

    async def _size_bytes(self) -> int:
        infos = [await self._link.info(name) for name in (self._names.calls, self._names.bodies)]
        return sum(info.state.bytes for info in infos)

    async def _expire_all(self, now_s: float) -> int:
        def due(entry: Entry) -> bool:
            return entry.state is State.QUEUED and entry.expires_s is not None and entry.expires_s <= now_s

        return await self._change_all(await self._scan(due), partial(expire, now_s=now_s))

    async def _drop_results(self, before_s: float) -> int:
        dropped: list[StoredBody] = []

        def step(record: Record) -> Record:
            entry = parse_summary(record.call.id, record.revision, build_summary(record))
            if record.call.result is None or not may_forget_result(entry, before_s):
                raise _Passed
            dropped.append(record.call.result)
            return _with_call(record, result=None, result_headers=())

        count = await self._change_all(await self._scan(partial(may_forget_result, before_s=before_s)), step)
        for body in dropped:
            await self.drop_body(body)
        return count

    async def _change_all(self, call_ids: Sequence[str], step: Callable[[Record], Record]) -> int:
        """Take a step with each call that it still applies to; return how many."""

        async def change(call_id: str) -> bool:
            try:
                await self._records.change(call_id, step)
            except (_Passed, CallUnknown):
                return False
            return True

        count = 0
        for batch in _batches(call_ids):
            count += sum(await asyncio.gather(*map(change, batch)))
        return count

    async def _drop_orphans(self) -> int:
        """Remove bodies that no call names and that nobody has written to for ORPHAN_S."""
        index = await self._index()
        info = await self._link.info(self._names.bodies, self._names.subject("body", "*", 0))
        stored = {subject.split(".")[2] for subject in info.state.subjects or {}}
        index = await self._index()  # once more: what was put meanwhile is no orphan
        named = {file for entry in index.entries.values() for file in entry.files}
        count = 0
        for file in stored - named:
            subject = self._names.subject("body", file, "*")
            last = await self._link.load(subject, stream=self._names.bodies)
            if last is not None and last.time is not None and time.time() - last.time.timestamp() > ORPHAN_S:
                await self._link.purge(self._names.bodies, subject)
                count += 1
        return count


def _listed(call: Call) -> Call:
    """A call as lists have it."""
    body = StoredBody(call.body.bytes_count, None, call.body.file)
    result = call.result and StoredBody(call.result.bytes_count, None, call.result.file)
    return dataclasses.replace(call, body=body, result=result, history=())


def _batches(ids: Iterable[str]) -> Iterable[list[str]]:
    left = iter(ids)
    while batch := list(itertools.islice(left, STEP_COUNT)):
        yield batch


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


class _BodyWriter:
    """A long body on its way into its stream, a few messages at a time; `finish` or `discard` ends it."""

    def __init__(self, link: Link) -> None:
        self.name = uuid.uuid4().hex
        self._link = link
        self._chunk_bytes = min(CHUNK_BYTES, link.client.max_payload // 2)
        self._held = bytearray()
        self._number = itertools.count()
        self._tasks: set[asyncio.Task[int]] = set()

    async def write(self, piece: bytes | bytearray) -> None:
        """Take a piece; returns when there is room for more.  Raises the queue's errors."""
        view = memoryview(piece)
        while view:
            part = view[: self._chunk_bytes - len(self._held)]
            self._held += part
            view = view[len(part) :]
            if len(self._held) == self._chunk_bytes:
                await self._send()

    async def _send(self) -> None:
        subject = self._link.names.subject("body", self.name, next(self._number))
        chunk, self._held = bytes(self._held), bytearray()
        self._tasks.add(asyncio.create_task(self._link.save(subject, chunk, {}, None)))
        while len(self._tasks) >= CHUNKS_IN_FLIGHT_COUNT:
            await self._settle(asyncio.FIRST_COMPLETED)

    async def _settle(self, when: str) -> None:
        done, self._tasks = await asyncio.wait(self._tasks, return_when=when)
        for task in done:
            task.result()

    async def finish(self) -> None:
        """Return when all of the body is acknowledged."""
        if self._held:
            await self._send()
        if self._tasks:
            await self._settle(asyncio.ALL_COMPLETED)

    async def discard(self) -> None:
        """Remove what was written; what cannot be removed now is an orphan that `sweep` finds."""
        await end_tasks(self._tasks)
        with contextlib.suppress(QueueUnavailable, QueueFull):
            await self._link.purge(self._link.names.bodies, self._link.names.subject("body", self.name, "*"))
