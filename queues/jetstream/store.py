"""Calls as they stand: records and waiting messages, read together and written one behind the other.

Law of a change: the record first, then what follows from it (the callback's message, the end of the waiting one).  A
record is written behind the revision that was read, of whatever subject it is on, so of two who would take the same
step one gets RevisionChanged and reads again.  If we die between the two halves, the message is delivered again after
its lease, and the record tells what is left to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from nats.aio.msg import Msg

from ...calls.destinations import destination_of
from ...calls.model import FINAL, CallDamaged, CallUnknown, NewCall, QueueUnavailable, State
from ...calls.names import FunctionName
from ...calls.steps import Record
from .bodies import Bodies
from .connection import TTL_HEADER, Connection, RevisionChanged, Stored, Write
from .flows import DUE_HEADER, Flows
from .records import (
    REVIVES_HEADER,
    Kept,
    Standing,
    build_record,
    build_waiting,
    forget_result,
    is_settled,
    join,
    parse_record,
    parse_waiting,
    place_of,
    read_record,
)
from .subjects import FlowName, Place

FOLLOWS_HEADER = "Faashound-Follows"  # the revision of the record that a callback's message follows
KEPT_S = 600.0  # that the servers keep an end at least: without it, a message that comes again would be a new call
FOREVER_S = 10 * 365 * 86400.0
READ_PAUSE_S = 0.05  # between two looks at a call that is on its way from one place to another
READ_COUNT = 40  # of them: a record that is short, and whose message is gone, is damaged


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what has ended is kept; the process that sweeps tells all others.  None: not told yet."""

    results_s: float | None = None
    calls_s: float | None = None


class Store:
    """The calls of a queue."""

    def __init__(self, connection: Connection, flows: Flows, bodies: Bodies, now: Callable[[], float]) -> None:
        self._retention = Retention()
        self._connection = connection
        self._names = connection.names
        self._flows = flows
        self._bodies = bodies
        self._now = now

    async def start(self) -> None:
        """Learn how long calls are remembered, now and when it changes."""
        subject = self._names.subject("meta", "retention")
        await self._connection.subscribe(subject, self._on_retention)
        stored = await self._connection.load(subject)
        if stored is not None:
            self._retention = Retention(**json.loads(stored.data))

    async def _on_retention(self, message: Msg) -> None:
        self._retention = Retention(**json.loads(message.data))

    async def tell_retention(self, results_s: float, calls_s: float) -> None:
        """Have all that ends from now on forgotten in time, by the servers."""
        if self._retention != Retention(results_s, calls_s):
            data = json.dumps({"results_s": results_s, "calls_s": calls_s}).encode()
            await self._connection.publish(Write(self._names.subject("meta", "retention"), data))
            self._retention = Retention(results_s, calls_s)

    # -- reading

    async def find_record(self, call_id: str) -> Kept | None:
        """Return the record of a call as it is kept, or None: it has never been taken, or there is none."""
        stored = await self._connection.load(self._names.record_of(call_id))
        return None if stored is None else parse_record(stored)

    async def find_near(self, call_id: str) -> Kept | None:
        """As `find_record`, of some server, which may be a little behind."""
        stored = await self._connection.load_near(self._names.record_of(call_id))
        return None if stored is None else parse_record(stored)

    async def find_waiting(self, call_id: str) -> Stored | None:
        """Return the message that waits for a call to be run, or None."""
        return await self._connection.load(self._names.waiting_of("call", call_id))

    async def load(self, call_id: str) -> Standing | None:
        """Return a call as it stands, or None."""
        for _ in range(READ_COUNT):
            kept, waiting = await asyncio.gather(self.find_record(call_id), self.find_waiting(call_id))
            if kept is None and waiting is None:
                kept = await self.find_record(call_id)  # it may have gone from the one to the other
                if kept is None:
                    return None
            if kept is None and waiting is not None and REVIVES_HEADER in waiting.headers:
                return None  # its dead letter was deleted while it was queued again
            if waiting is not None:
                return self._as_kept(join(kept, parse_waiting(waiting.data)))
            if kept is not None and kept.accepted is not None:
                return self._as_kept(Standing(kept.accepted, kept.record, kept.revision, kept.place))
            await asyncio.sleep(READ_PAUSE_S)
        raise CallDamaged(f"the call {call_id} has a record, but its request is gone")

    def _as_kept(self, standing: Standing) -> Standing:
        """The servers may still have a result that has been kept long enough."""
        kept_s = self._retention.results_s
        if kept_s is None or standing.record.answer is None:
            return standing
        return standing._replace(record=forget_result(standing.record, self._now() - kept_s))

    async def walk(self, place: Place, function: FunctionName | None = None) -> AsyncIterator[Kept]:
        """Yield the records of a place, oldest change first."""
        async for stored in self._connection.walk(self._names.records_at(place, function)):
            if (kept := read_record(stored)) is not None:
                yield kept

    # -- writing

    async def save(self, standing: Standing, record: Record, place: Place | None = None) -> Standing:
        """Write what a step has made of a call, behind the revision that it had.  Raises RevisionChanged."""
        accepted, place = standing.accepted, place or place_of(record)
        changed = Standing(accepted, record, standing.revision, place)
        headers = await self._prepare_end(accepted, record) if is_settled(record) else {}
        write = Write(
            self._names.record(place, accepted.id, accepted.function),
            build_record(changed, whole=record.state in FINAL or place == "held"),
            headers,
            standing.revision,
            self._names.record_of(accepted.id),
        )
        revision = await self._connection.publish(write)
        if record.state in FINAL:
            await self._connection.tell(self._names.event(accepted.id))
        if standing.place not in (None, place):
            await self.drop_older(accepted.id)
        return changed._replace(revision=revision)

    async def drop_older(self, call_id: str) -> None:
        """Remove what is left of a record at its old places: also where another process died before it could."""
        await self._connection.purge(self._names.records, self._names.record_of(call_id), keep=1)

    async def _prepare_end(self, accepted: NewCall, record: Record) -> dict[str, str]:
        """Return what has the servers forget the call in time; its key goes with it."""
        kept_s = self._retention.calls_s
        if kept_s is None or kept_s > FOREVER_S:
            return {}  # `sweep` will
        age_s = 0.0 if record.finished_s is None else max(0.0, self._now() - record.finished_s)
        headers = {TTL_HEADER: f"{math.ceil(max(KEPT_S, kept_s - age_s))}s"}
        if accepted.idempotency_key is not None:
            subject = self._names.key(accepted.function, accepted.idempotency_key)
            await self._connection.publish(Write(subject, accepted.id.encode(), headers))
        return headers

    async def change(self, call_id: str, step: Callable[[Record], Record]) -> tuple[Standing, Standing]:
        """Take a step from what the call is now; return both.  Raises CallUnknown, and what `step` does."""
        while True:
            standing = await self.load(call_id)
            if standing is None:
                raise CallUnknown(f"no call has the id {call_id}")
            try:
                return standing, await self.save(standing, step(standing.record))
            except RevisionChanged:
                continue

    async def put_waiting(self, call: NewCall, revives: int | None = None) -> None:
        """Let a call wait to be run; `revives` is the dead record that it had.

        Raises RevisionChanged if a new call waits already.
        """
        await self._flows.announce(FlowName("call", call.queue, call.function))
        subject = self._names.waiting("call", call.id, call.queue, call.function)
        headers = _headers(call.due_s, revives)
        among = self._names.waiting_of("call", call.id)
        write = Write(subject, build_waiting(call), headers, 0, among)
        await (self._connection.publish(write) if revives is None else self._put_behind(write, among, revives))

    async def put_callback(self, standing: Standing, revives: int | None = None) -> None:
        """Let the outcome of a call wait to be delivered; nothing happens if it does already."""
        accepted, callback = standing.accepted, standing.record.callback
        if callback is None or accepted.callback_url is None:
            raise AssertionError(f"the call {accepted.id} has no callback")
        destination = destination_of(accepted.callback_url)
        await self._flows.announce(FlowName("callback", accepted.queue, destination))
        subject = self._names.waiting("callback", accepted.id, accepted.queue, destination)
        among, revision = self._names.waiting_of("callback", accepted.id), standing.revision
        headers = _headers(callback.due_s, revives) | {FOLLOWS_HEADER: str(revision)}
        await self._put_behind(Write(subject, str(revision).encode(), headers, 0, among), among, revision)

    async def _put_behind(self, write: Write, among: str, revision: int) -> None:
        """Let wait what follows from a revision of the record; nothing happens if another has come so far already.

        What followed from an earlier one may still be there: its worker writes the record first, and acknowledges
        last.  Ours is put behind that message, which is then removed, so the acknowledgement finds nothing.  The bytes
        of the two must differ, as `publish` needs.
        """
        former: Stored | None = None
        while True:
            try:
                await self._connection.publish(replace(write, expected=former.revision if former else 0))
                break
            except RevisionChanged:
                former = await self._connection.load(among)
            if former is not None and _followed(former) >= revision:
                return
        if former is not None:
            await self._connection.erase(self._names.queue, former.revision)

    async def put_timer(self, call: NewCall) -> None:
        """Have a sweep look whether the call has expired, when it may have."""
        await self._connection.publish(Write(self._names.timer(call.id), b""))

    async def end_callback(self, call_id: str) -> None:
        """The outcome will not be delivered: one that waits would hold up that of the next end."""
        await self._connection.purge(self._names.queue, self._names.waiting_of("callback", call_id))

    async def end_timer(self, call: NewCall) -> None:
        """The call has ended: its expiry does not matter any more."""
        if call.expires_s is not None:
            await self._connection.purge(self._names.queue, self._names.timer(call.id))

    async def end_waiting(self, call_id: str) -> None:
        """The call will not be run from the message that waits."""
        waiting = await self.find_waiting(call_id)
        if waiting is not None:
            await self._connection.erase(self._names.queue, waiting.revision)

    async def follow_end(self, before: Standing, after: Standing) -> None:
        """Do what follows when a call is ended by another than its worker, as a cancel does."""
        if after.record.callback is not None:
            await self.put_callback(after)
        if before.record.state is State.QUEUED:
            await self.end_timer(after.accepted)
            await self.end_waiting(after.id)

    async def forget(self, kept: Kept | Standing) -> bool:
        """Delete the record of a call and all that hangs on it; False if the call has gone on since it was read.

        Who queues a dead letter again writes behind its record.  So once that is removed it is decided: either there
        is a newer record, or there will be none.  A message that was not acknowledged goes first: without a record it
        would be a new call.
        """
        accepted, answer = kept.accepted, kept.record.answer
        call_id = kept.id if isinstance(kept, Standing) else kept.call_id
        waiting = await self.find_waiting(call_id)
        if waiting is not None and _followed(waiting) < kept.revision:  # else a dead letter is just queued again
            found = await self.find_record(call_id)
            if found is not None and found.revision == kept.revision:  # else it may be a new call's of the same id
                await self._connection.erase(self._names.queue, waiting.revision)
        has_key = accepted is not None and await self._drop_key(accepted)
        await self._connection.erase(self._names.records, kept.revision)
        if await self.find_record(call_id) is not None:
            if accepted is not None and has_key:
                await self.put_key(accepted)
            return False
        await self._bodies.drop(None if accepted is None else accepted.body)
        await self._bodies.drop(None if answer is None else answer.result)
        return True

    async def _drop_key(self, accepted: NewCall) -> bool:
        """Let the key of a call stand for the next one; False if it does not stand for this call."""
        if accepted.idempotency_key is None:
            return False
        key = await self._connection.load(self._names.key(accepted.function, accepted.idempotency_key))
        if key is None or key.data != accepted.id.encode():
            return False
        await self._connection.erase(self._names.records, key.revision)
        return True

    async def take_key_back(self, accepted: NewCall, revision: int) -> None:
        """Let a key stand for the next call: this one was not put, or else by another process, and it stays."""
        with contextlib.suppress(QueueUnavailable):
            await self._connection.erase(self._names.records, revision)
            if await self.load(accepted.id) is not None:
                await self.put_key(accepted)

    async def put_key(self, accepted: NewCall) -> None:
        """Let the key stand for this call again, unless it stands for another by now."""
        if accepted.idempotency_key is not None:
            subject = self._names.key(accepted.function, accepted.idempotency_key)
            with contextlib.suppress(RevisionChanged):
                await self._connection.publish(Write(subject, accepted.id.encode(), {}, 0))


def _followed(waiting: Stored) -> int:
    """Return the revision of the record that a message follows; 0 of a new call's, and of an earlier version's."""
    return int(waiting.headers.get(FOLLOWS_HEADER) or waiting.headers.get(REVIVES_HEADER) or 0)


def _headers(due_s: float, revives: int | None) -> dict[str, str]:
    headers = {DUE_HEADER: repr(due_s)}
    if revives is not None:
        headers[REVIVES_HEADER] = str(revives)
    return headers
