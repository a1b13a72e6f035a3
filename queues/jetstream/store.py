"""Calls as they stand: records and waiting messages, read together and written one behind the other.

Law of a change: the record first, then what follows from it (the callback's message, the end of the waiting one).  A
record is written behind the revision that was read, of whatever subject it is on, so of two who would take the same
step one gets Conflict and reads again.  If we die between the two halves, the message is delivered again after its
lease, and the record tells what is left to do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from nats.aio.msg import Msg

from ...calls.model import Call, CallbackState, CallUnknown, Kind, QueueDamaged, State, destination_of
from ...jetstream import Record, accept
from ...watchdog import log
from .bodies import Bodies
from .connection import TTL_HEADER, Conflict, Connection, Stored, Write
from .flows import DUE_HEADER, Flows
from .records import (
    REVIVES_HEADER,
    Kept,
    build_record,
    build_waiting,
    forget_result,
    is_settled,
    join,
    parse_record,
    parse_waiting,
    place_of,
)
from .subjects import FlowName, Place

FOREVER_S = 10 * 365 * 86400.0
READ_PAUSE_S = 0.05  # between two looks at a call that is on its way from one place to another
READ_COUNT = 40  # of them: a record that is short, and whose message is gone, is damaged


@dataclass(slots=True)
class Retention:
    """How long what has ended is kept; the process that sweeps tells all others.  None: not told yet."""

    results_s: float | None = None
    calls_s: float | None = None


class Store:
    """The calls of a queue."""

    def __init__(self, connection: Connection, flows: Flows, bodies: Bodies, now: Callable[[], float]) -> None:
        self.retention = Retention()
        self._connection = connection
        self._names = connection.names
        self._flows = flows
        self._bodies = bodies
        self._now = now
        self._chores: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Learn how long calls are remembered, now and when it changes."""
        subject = self._names.subject("meta", "retention")
        await self._connection.client.subscribe(subject, cb=self._on_retention)
        stored = await self._connection.load(subject)
        if stored is not None:
            self._set_retention(stored.data)

    async def _on_retention(self, message: Msg) -> None:
        self._set_retention(message.data)

    def _set_retention(self, data: bytes) -> None:
        facts = json.loads(data)
        self.retention = Retention(facts["results_s"], facts["calls_s"])

    async def tell_retention(self, results_s: float, calls_s: float) -> None:
        """Have all that ends from now on forgotten in time, by the servers."""
        if self.retention != Retention(results_s, calls_s):
            data = json.dumps({"results_s": results_s, "calls_s": calls_s}).encode()
            await self._connection.publish(Write(self._names.subject("meta", "retention"), data))
            self.retention = Retention(results_s, calls_s)

    # -- reading

    async def find_record(self, call_id: str) -> Kept | None:
        """Return the record of a call as it is kept, or None: it has never been taken, or there is none."""
        stored = await self._connection.load(self._names.record_of(call_id))
        return None if stored is None else self._parse(stored)

    async def find_near(self, call_id: str) -> Kept | None:
        """As `find_record`, of some server, which may be a little behind."""
        stored = await self._connection.load_near(self._names.record_of(call_id))
        return None if stored is None else self._parse(stored)

    async def find_waiting(self, call_id: str) -> Stored | None:
        """Return the message that waits for a call to be run, or None."""
        return await self._connection.load(self._names.waiting_of("call", call_id))

    async def load(self, call_id: str) -> Record | None:
        """Return a call as it stands, whole, or None."""
        for _ in range(READ_COUNT):
            kept, waiting = await asyncio.gather(self.find_record(call_id), self.find_waiting(call_id))
            if kept is None and waiting is None:
                kept = await self.find_record(call_id)  # it may have gone from the one to the other
                if kept is None:
                    return None
            if kept is None or kept.place == "held":
                if waiting is not None:
                    revision = 0 if kept is None else kept.record.revision
                    return dataclasses.replace(accept(parse_waiting(waiting.data)), revision=revision)
            if kept is not None and (kept.whole or waiting is not None):
                record = kept.record if waiting is None else join(kept, parse_waiting(waiting.data))
                return self._without_old_result(record)
            await asyncio.sleep(READ_PAUSE_S)
        raise QueueDamaged(f"the call {call_id} has a record, but its request is gone")

    def _without_old_result(self, record: Record) -> Record:
        kept_s = self.retention.results_s
        return record if kept_s is None else forget_result(record, self._now() - kept_s)

    def _parse(self, stored: Stored) -> Kept:
        return parse_record(stored)

    async def walk(self, *places: Place, function: str = "*") -> AsyncIterator[Kept]:
        """Yield the records of some places, oldest change first within each."""
        for place in places:
            subject, revision = self._names.subject("rec", place, "*", function), 1
            while page := await self._connection.read_batch(subject, revision, 100):
                for stored in page:
                    try:
                        yield self._parse(stored)
                    except QueueDamaged as error:
                        log.error(str(error))
                revision = page[-1].revision + 1

    # -- writing

    async def save(self, record: Record, before: Record | None = None, place: Place | None = None) -> Record:
        """Write a record behind the revision that it has; `before` is what it was there.  Raises Conflict."""
        call = record.call
        place = place or place_of(call)
        headers = {}
        if is_settled(call):
            ttl_s = await self._prepare_end(call)
            if ttl_s is not None:
                headers[TTL_HEADER] = f"{ttl_s}s"
        write = Write(
            self._names.record(place, call.id, call.function),
            build_record(record),
            headers,
            record.revision,
            self._names.record_of(call.id),
        )
        revision = await self._connection.publish(write)
        if before is not None and record.revision and place_of(before.call) != place:
            await self._connection.erase(self._names.records, record.revision)
        return dataclasses.replace(record, revision=revision)

    async def _prepare_end(self, call: Call) -> int | None:
        """How many seconds the record is to be kept, None: until it is swept; its key goes with it."""
        kept_s = self.retention.calls_s
        if kept_s is None or kept_s > FOREVER_S:
            return None
        age_s = self._now() - (call.finished_s or self._now())
        ttl_s = max(1, math.ceil(kept_s - max(0.0, age_s)))
        if call.idempotency_key is not None:
            headers = {TTL_HEADER: f"{ttl_s}s"}
            await self._connection.publish(
                Write(self._names.key(call.function, call.idempotency_key), call.id.encode(), headers)
            )
        return ttl_s

    async def change(self, call_id: str, step: Callable[[Record], Record]) -> tuple[Record, Record]:
        """Take a step from what the call is now; return it before and after.  Raises CallUnknown, and what `step` does."""
        while True:
            record = await self.load(call_id)
            if record is None:
                raise CallUnknown(f"no call has the id {call_id}")
            try:
                return record, await self.save(step(record), record)
            except Conflict:
                continue

    async def put_waiting(self, call: Call, revives: int | None = None) -> None:
        """Let a call wait to be run; `revives` is the dead record that it had.  Raises Conflict if it waits already."""
        await self._flows.announce(FlowName("call", call.queue, call.function))
        headers = {DUE_HEADER: repr(call.due_s)}
        if revives is not None:
            headers[REVIVES_HEADER] = str(revives)
        await self._put("call", call, call.queue, call.function, build_waiting(call), headers)

    async def put_callback(self, call: Call, revives: int | None = None) -> None:
        """Let the outcome of a call wait to be delivered; nothing happens if it does already."""
        if call.callback is None or call.callback_url is None:
            raise AssertionError(f"the call {call.id} has no callback")
        destination = destination_of(call.callback_url)
        await self._flows.announce(FlowName("callback", call.queue, destination))
        headers = {DUE_HEADER: repr(call.callback.due_s)}
        if revives is not None:
            headers[REVIVES_HEADER] = str(revives)
        try:
            await self._put("callback", call, call.queue, destination, b"", headers)
        except Conflict:
            return

    async def _put(
        self, kind: Kind, call: Call, queue: str, name: str, data: bytes, headers: dict[str, str]
    ) -> None:
        subject = self._names.waiting(kind, call.id, queue, name)
        await self._connection.publish(Write(subject, data, headers, 0, self._names.waiting_of(kind, call.id)))

    async def put_timer(self, call: Call) -> None:
        """Have someone look whether the call has expired, when it may have."""
        await self._connection.publish(Write(self._names.timer(call.id), b"", {DUE_HEADER: repr(call.expires_s)}))

    async def end_waiting(self, call_id: str) -> None:
        """The call will not be run from the message that waits."""
        waiting = await self.find_waiting(call_id)
        if waiting is not None:
            await self._connection.erase(self._names.queue, waiting.revision)

    async def follow_end(self, before: Call, call: Call) -> None:
        """Do what follows from a record that has just become final, other than by its worker."""
        if call.callback is not None and call.callback.state is CallbackState.PENDING:
            await self.put_callback(call)
        if before.state is State.QUEUED:
            await self.end_waiting(call.id)

    async def forget(self, record: Record) -> None:
        """Delete the record of a call, and all that hangs on it."""
        call = record.call
        if call.idempotency_key is not None:
            key = await self._connection.load(self._names.key(call.function, call.idempotency_key))
            if key is not None and key.data == call.id.encode():
                await self._connection.erase(self._names.records, key.revision)
        await self._connection.erase(self._names.records, record.revision)
        for body in (call.body, call.result):
            await self._bodies.drop(body)
