"""The queue of many machines: the interface and the promises of `Spool`, kept on NATS JetStream.

Use: `await queues.open_queue(url, settings)`; every method of JetStream is described at `Spool`.

How it is kept.  The broker is the queue.  A call waits as a message of a stream from which an acknowledgement removes
it, and each flow's consumer keeps order, lease (`ack_wait`, extended by "in progress"), redelivery and delay ("not
acknowledged", with a delay).  What the broker cannot know is in one small record a call: state, attempts, owner,
result.  A put is one write; a claim writes the record; an end writes it again, with the result, and then acknowledges
the message.
No process keeps a list of calls, and none is elected.

Contract:
- What `put`, `finish` and the other writes have returned for has the stream's acknowledgement: it is with `replicas`
  servers, and as safe as these keep it (docs/nats.md: sync_interval).
- Each step is right when we die between its two halves: the record is written first, and a message that comes again is
  judged by it.  Final: it is acknowledged, and what was left to do is done.  Running: its owner is asked, and only if
  that is gone the call is taken over.  The fence of a lease is the revision that its claim wrote.
- A lease ends when its owner has not renewed it for `lease_s`; while the servers were away none does.
- Within a function calls run in the order they were put; functions take turns, each worker on its own.

It refuses to: change a stream that is there already (what differs is told); run on servers older than MIN_VERSION.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from ...calls.ids import made_s
from ...calls.model import (
    EXCERPT_BYTES,
    FINAL,
    Attempt,
    Backlog,
    Bounds,
    Call,
    CallbackState,
    CallExists,
    CallFinished,
    CallUnknown,
    Changes,
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
    TooManyQueued,
    check_same_request,
)
from ...calls.names import FunctionName
from ...calls.steps import (
    Event,
    Record,
    accept,
    cancel,
    end_callback,
    end_run,
    release,
    requeue_callback,
    requeue_dead,
    retry_run,
    stop_run,
)
from ...calls.views import CallFilter
from .bodies import CHUNK_BYTES, Bodies
from .claims import Claims
from .connection import WRITE_S, Connection, Options, RevisionChanged, Write, connect, end_tasks
from .flows import Flows, Wanted
from .owners import Held, Owners
from .people import People
from .records import HELD_S, Standing, rename
from .store import Store
from .streams import ensure_streams, read_token
from .subjects import flows_of

RECORD_BYTES = 512  # of a record, besides what the message of its call has
KEPT_ROOM = 0.1  # part of the records' room that `put` leaves free, for the ends of what is in already
ROOM_KNOWN_S = 1.0  # how long the streams' size is believed
POLL_S = 5.0  # between two looks while waiting for a call's end: bounds the harm of a lost event
GOODBYE_S = 3.0  # for what is said when a queue is closed


def is_made_for(call: NewCall, now_s: float) -> bool:
    """Tell whether the id of a call was made for it: then it can have no record yet, and none is looked for.

    One that came with the request is older than that, unless the clock that made it is ahead, and by just the time
    between.
    """
    return math.floor(call.accepted_s * 1000) / 1000 <= made_s(call.id) <= now_s


class JetStream:
    """A queue on NATS, open in this process; every method is described at `Spool`."""

    def __init__(self, connection: Connection, token: str, rooms: Mapping[str, int], now: Callable[[], float]) -> None:
        """Not for callers: use `JetStream.open`."""
        self.token = token
        self._connection = connection
        self._names = connection.names
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._bodies = Bodies(connection)
        self._flows = Flows(connection)
        self._store = Store(connection, self._flows, self._bodies, now)
        self._owners = Owners(connection)
        self._claims = Claims(self._store, self._flows, self._owners, now)
        self._people = People(connection, self._store, self._flows, self._owners, self._bodies, now)
        self._rooms = rooms
        self._room_s, self._room_bytes = float("-inf"), 0  # when it was asked for, and what is left since
        self._chores: set[asyncio.Task[Any]] = set()
        self._closed = False

    @classmethod
    async def open(cls, options: Options, *, now: Callable[[], float] = time.time) -> JetStream:
        """Open the queue, or create it; raises QueueUnavailable, and CannotStart if a package is missing."""
        connection = await connect(options)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(connection.close)
            rooms = await ensure_streams(connection, options)
            queue = cls(connection, await read_token(connection), rooms, now)
            await queue._flows.start()
            await queue._store.start()
            stack.pop_all()
        return queue

    @property
    def healthy(self) -> bool:
        """Whether the servers can be reached, as far as is known."""
        return not self._closed and self._connection.healthy

    async def close(self) -> None:
        """Let go of everything; leases still held become void.  May be repeated."""
        if self._closed:
            return
        self._closed = self._bodies.closed = True
        if self._chores and self._connection.client.is_connected:  # an end that is cut would be taken for none
            await asyncio.wait(self._chores, timeout=GOODBYE_S)
        await end_tasks(self._chores)
        if self._connection.client.is_connected:
            with contextlib.suppress(QueueUnavailable, TimeoutError):
                async with asyncio.timeout(GOODBYE_S):
                    await self._flows.close()
                    held, self._owners.held = list(self._owners.held.values()), {}
                    await asyncio.gather(*(self._flows.nak(each.delivery) for each in held))
        await self._connection.close()

    def _check_open(self) -> None:
        if self._closed:
            raise QueueUnavailable("the queue is closed")

    def _do(self, work: Any) -> asyncio.Task[Any]:
        """Begin something whose end nothing waits for."""
        task = asyncio.create_task(work)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)
        return task

    # -- bodies

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody:
        """Make a body safe; up to INLINE_BYTES it stays in memory and becomes part of its message."""
        self._check_open()
        return await self._bodies.store(chunks, limit_bytes)

    async def store_result(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody:
        """As `store_body`, for what a function has answered: it waits for room, however long."""
        self._check_open()
        return await self._bodies.store_result(chunks, limit_bytes, length)

    async def open_body(self, body: StoredBody, chunk_bytes: int = CHUNK_BYTES) -> AsyncGenerator[bytes, None]:
        """The bytes of a stored body, in pieces of at most `chunk_bytes`; QueueDamaged if not all are there."""
        if body.file is not None:
            self._check_open()
        async for piece in self._bodies.open(body, chunk_bytes):
            yield piece

    async def drop_body(self, body: StoredBody) -> None:
        """Remove a body that no call names."""
        self._check_open()
        await self._bodies.drop(body)

    # -- submitting and following calls

    async def put(self, call: NewCall) -> NewCall:
        """Queue a call and return it; the stream has acknowledged it by then, or QueueUnavailable after WRITE_S."""
        return await self._accept(call, self._create)

    async def _accept(self, call: NewCall, create: Callable[[NewCall], Awaitable[None]]) -> NewCall:
        self._check_open()
        try:
            async with asyncio.timeout(WRITE_S):
                return await self._put(call, create)
        except TimeoutError:
            raise QueueUnavailable(f"NATS has not acknowledged the call within {WRITE_S:g} s") from None

    async def _put(self, call: NewCall, create: Callable[[NewCall], Awaitable[None]]) -> NewCall:
        try:
            await self._flows.check_room(flows_of(call))
            await self._take_room(call)
            if call.idempotency_key is None:
                await create(call)
                return call
            earlier = await self._put_keyed(call, call.idempotency_key, create)
        except (CallExists, KeyReused, QueueFull, TooManyQueued):
            await self.drop_body(call.body)
            raise
        if earlier.body.file != call.body.file:
            await self.drop_body(call.body)
        return earlier

    async def _create(self, call: NewCall) -> None:
        """Write the message of a new call.  Raises CallExists."""
        await self._bodies.name(call.body, call.id)
        if not is_made_for(call, time.time()) and await self._store.find_record(call.id) is not None:
            raise CallExists(f"the call id {call.id} is in use")
        if call.expires_s is not None:
            await self._store.put_timer(call)
        try:
            await self._store.put_waiting(call)
        except RevisionChanged:
            raise CallExists(f"the call id {call.id} is in use") from None

    async def _put_keyed(self, call: NewCall, key: str, create: Callable[[NewCall], Awaitable[None]]) -> NewCall:
        """The call that the key stands for from now on.

        The key is written first and decides the call's id.  A process that finds a key without a call puts the call
        under that id: then it does not matter which comes first, or dies between the two.
        """
        subject = self._names.key(call.function, key)
        while True:
            first_id, revision = await self._claim_key(subject, call.id)
            found = None if first_id == call.id else await self._store.load(first_id)
            if found is None:
                try:
                    own = call if first_id == call.id else rename(call, first_id)
                    await create(own)
                    if first_id != call.id:
                        # Who wrote the key may just have taken it back; without it the call is in all the same.
                        with contextlib.suppress(QueueFull, QueueUnavailable):
                            await self._store.put_key(own)
                    return own
                except CallExists:
                    found = await self._store.load(first_id)
                except QueueFull:  # keys without calls would be what leaves no room for good
                    if first_id == call.id:
                        await self._store.take_key_back(call, revision)
                    raise
            if found is None:
                continue  # deleted meanwhile
            if (found.accepted.function, found.accepted.idempotency_key) == (call.function, key):
                check_same_request(found.call, call)
                return found.call
            await self._connection.erase(self._names.records, revision)  # a key for an id of another call
            if first_id == call.id:
                raise CallExists(f"the call id {call.id} is in use")

    async def _claim_key(self, subject: str, call_id: str) -> tuple[str, int]:
        """The id that a key stands for, ours if it is new, and the key's revision."""
        while True:
            with contextlib.suppress(RevisionChanged):
                return call_id, await self._connection.publish(Write(subject, call_id.encode(), {}, 0))
            stored = await self._connection.load(subject)
            if stored is not None:
                return stored.data.decode(), stored.revision

    async def _take_room(self, call: NewCall) -> None:
        """Raise QueueFull if the ends of the calls that are in may soon have no room."""
        room = self._rooms[self._names.records]
        if room < 0:  # a stream that was made by hand: as much as the servers have
            return
        if self._loop.time() - self._room_s > ROOM_KNOWN_S:
            queue, records = await asyncio.gather(
                *(self._connection.info(name) for name in (self._names.queue, self._names.records))
            )
            used = records["state"]["bytes"] + queue["state"]["bytes"] + RECORD_BYTES * queue["state"]["messages"]
            self._room_s, self._room_bytes = self._loop.time(), int(room * (1 - KEPT_ROOM)) - used
        self._room_bytes -= 2 * RECORD_BYTES + len(call.body.inline or b"")
        if self._room_bytes < 0:
            raise QueueFull(f"the queue's streams are full: nats_max_bytes leaves {room} for records")

    async def get(self, call_id: str) -> Call | None:
        """The call, or None."""
        self._check_open()
        standing = await self._store.load(call_id)
        return None if standing is None else standing.call

    async def wait(self, call_id: str, timeout_s: float) -> Call:
        """The call once it is final, or as it is after `timeout_s`; CallUnknown if there is none (any more)."""
        self._check_open()
        deadline_s, changed = self._loop.time() + timeout_s, asyncio.Event()

        async def on_event(_: Msg) -> None:
            changed.set()

        subscription = await self._connection.subscribe(self._names.event(call_id), on_event)
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

    async def cancel(self, call_id: str) -> State:
        """CANCELLED: it was queued and will not run.  RUNNING: its worker is told."""
        self._check_open()
        before, after = await self._store.change(call_id, partial(cancel, now_s=self._now()))
        if after.record.hold is not None:
            await self._owners.tell_cancel(call_id, after.record.hold)
        else:
            await self._store.follow_end(before, after)
        return after.record.state

    async def cancel_queued(self, *, function: FunctionName | None = None) -> int:
        """Cancel every queued call, of one function or of all; return how many."""
        self._check_open()

        def step(record: Record) -> Record:
            if record.state is not State.QUEUED:
                raise CallFinished("the call has begun to run")
            return cancel(record, self._now())

        count = 0
        async for call_id in self._people.walk_waiting(function):
            with contextlib.suppress(CallFinished, CallUnknown):
                await self._store.follow_end(*await self._store.change(call_id, step))
                count += 1
        return count

    # -- owners and leases

    async def enlist(self, owner: str | None = None) -> str:
        """Make this process an owner of leases; what an earlier life of the same name held is taken back."""
        self._check_open()
        name = owner or f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        if "/" in name or "\0" in name or name.startswith("."):
            raise AssertionError(f"an owner's name is the name of a file: {name!r}")
        await self._owners.enlist(name)
        return name

    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due calls from `queues`, and no more of a function than `capacity` says."""
        return await self._claim("call", owner, Wanted("call", tuple(queues), limit, dict(capacity or {}), lease_s))

    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due callbacks of `queues`, and no more of a destination than `capacity` says."""
        return await self._claim(
            "callback", owner, Wanted("callback", tuple(queues), limit, dict(capacity or {}), lease_s)
        )

    async def _claim(self, kind: Kind, owner: str, wanted: Wanted) -> list[Lease]:
        if owner not in self._owners:
            raise AssertionError(f"{owner} has not been enlisted: it could not be told of a cancel")
        if wanted.limit <= 0:
            return []
        self._check_open()
        task = self._do(self._claims.claim(kind, owner, wanted))
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

    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal:
        """Let the leases last `lease_s` seconds from now; tell which are lost and which calls to cancel."""
        self._check_open()
        held = [self._owners.get(lease) for lease in leases]
        lost = {lease.fence for lease, each in zip(leases, held, strict=True) if each is None} - self._owners.ending
        known = [each for each in held if each is not None]
        for each in known:
            each.until_s, each.lease_s = self._loop.time() + lease_s, lease_s
            await self._flows.progress(each.delivery)
        for each in self._owners.drop_lapsed():  # which is not renewed any more: its work ended without a word
            await self._flows.nak(each.delivery)
        cancelled = set[str]()
        for each, (is_lost, is_cancelled) in zip(known, await asyncio.gather(*map(self._look, known)), strict=True):
            fence = each.standing.revision
            if fence in self._owners.ending or fence not in self._owners.held:
                continue  # it is being ended here, or has been meanwhile, and that may be what was seen
            if is_lost:
                lost.add(fence)
                del self._owners.held[fence]
            elif each.kind == "call" and (is_cancelled or each.standing.id in self._owners.cancelled):
                cancelled.add(each.standing.id)
        return Renewal(frozenset(lost), frozenset(cancelled))

    async def _look(self, held: Held) -> tuple[bool, bool]:
        """See whether a lease has passed on, and whether the end of its call is wanted."""
        try:
            kept = await self._store.find_near(held.standing.id)
        except QueueDamaged:  # who ends the lease is told; here it would keep all others from being renewed
            return False, False
        if kept is None or kept.revision <= held.standing.revision:
            return False, False
        return kept.record.hold != held.standing.record.hold, kept.record.cancel_requested

    async def cancelled_ids(self, owner: str) -> frozenset[str]:
        """The calls that `owner` runs and that are to be cancelled."""
        held = self._owners.held.values()
        self._owners.cancelled &= {each.standing.id for each in held}.union(self._claims.coming)
        mine = {each.standing.id for each in held if (each.owner, each.kind) == (owner, "call")}
        return frozenset(mine & self._owners.cancelled)

    async def reclaim(self) -> int:
        """Take back what owners that are gone hold and what was not renewed in time; return how many."""
        self._check_open()
        return await self._claims.reclaim()

    # -- ending a lease

    async def _end(self, lease: Lease, kind: Kind, step: Callable[[Record], Record]) -> Record:
        """Take a step that ends a lease, and do what follows also when the caller is cancelled meanwhile."""
        self._check_open()
        record: Record = await asyncio.shield(self._do(self._claims.end(lease, kind, step)))
        return record

    async def finish(self, lease: Lease, end: RunEnd) -> None:
        """The call has ended, also when a cancel came too late. On LeaseLost a result of no record is dropped."""
        excerpt = await self._read_excerpt(end.result)
        try:
            if self._owners.get(lease) is None:  # before a body that no record will have takes room
                raise LeaseLost(f"the lease on call {lease.call.id} has passed to another worker")
            await self._bodies.name(end.result, lease.call.id)
            await self._end(lease, "call", partial(end_run, end=end, excerpt=excerpt, now_s=self._now()))
        except LeaseLost:
            if end.result is not None and end.result.file is not None:
                await self._drop_unnamed(end.result, lease.call.id)
            raise

    async def _drop_unnamed(self, result: StoredBody, call_id: str) -> None:
        """Remove a result, unless the call names it: an earlier try was heard, and its acknowledgement lost."""
        standing = await self._store.load(call_id)
        answer = None if standing is None else standing.record.answer
        if answer is None or answer.result is None or answer.result.file != result.file:
            await self.drop_body(result)

    async def _read_excerpt(self, result: StoredBody | None) -> bytes | None:
        if result is None:
            return None
        if result.inline is not None:
            return result.inline[:EXCERPT_BYTES]
        async for piece in self.open_body(result, EXCERPT_BYTES):
            return piece
        return b""

    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State:
        """Back into the queue until `due_s`; or CANCELLED, if asked for."""
        kept = None if excerpt is None else excerpt[:EXCERPT_BYTES]
        record = await self._end(lease, "call", partial(retry_run, attempt=attempt, due_s=due_s, excerpt=kept))
        return record.state

    async def release(self, lease: Lease) -> None:
        """Hand back a call or a callback that was not tried."""
        await self._end(lease, lease.kind, partial(release, now_s=self._now()))

    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None:
        """The run was stopped because the call was cancelled."""
        await self._end(lease, "call", partial(stop_run, attempt=attempt))

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None:
        """The outcome was delivered."""
        await self._end(lease, "callback", partial(end_callback, attempt=attempt, event=Event.SUCCEED))

    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None:
        """The delivery failed and is to be tried again at `due_s`."""
        await self._end(lease, "callback", partial(end_callback, attempt=attempt, event=Event.RETRY, due_s=due_s))

    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None:
        """The delivery has failed for good."""
        await self._end(lease, "callback", partial(end_callback, attempt=attempt, event=Event.GIVE_UP))

    # -- waiting

    async def wait_for_work(self, timeout_s: float) -> bool:
        """True when there may be something to claim.  False after `timeout_s`."""
        self._check_open()
        return await self._flows.wait(timeout_s)

    async def wait_for_cancel(self, timeout_s: float) -> bool:
        """True when the end of a call that runs here has been asked for; see `cancelled_ids`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._owners.cancel.wait()
        except TimeoutError:
            return False
        self._owners.cancel.clear()
        return True

    # -- for people

    async def calls(
        self,
        *,
        state: State | None = None,
        function: FunctionName | None = None,
        limit: int = 100,
        before: str | None = None,
        callback: CallbackState | None = None,
        id_start: str | None = None,
    ) -> list[Call]:
        """Calls, newest first, without inline bodies and history (`get` has them); `id_start` is the whole id here."""
        self._check_open()
        return await self._people.page(CallFilter(state, function, callback, limit, before, id_start))

    async def changes(self, mark: str | None, leased_ids: Collection[str], limit: int) -> Changes:
        """What has been put and written since `mark`; that a call has begun to run is written nowhere."""
        self._check_open()
        return await self._people.changes(mark, limit)

    async def backlog(self) -> Backlog:
        """What is still to be done and what was given up."""
        self._check_open()
        return await self._people.backlog()

    async def requeue_dead(self, call_id: str) -> Call:
        """A dead letter is queued as if new."""
        self._check_open()
        standing = await self._load(call_id)
        while True:
            again = await self._requeue(standing)
            if (again.record.state, again.record.finished_s) != (State.DEAD, standing.record.finished_s):
                break
            standing = again  # its callback was claimed meanwhile, which wrote behind the record that we had
        if standing.record.answer is not None:
            await self._bodies.drop(standing.record.answer.result)
        return again.call

    async def _requeue(self, standing: Standing) -> Standing:
        record = requeue_dead(standing.record, self._now())
        accepted = dataclasses.replace(standing.accepted, due_s=record.due_s, expires_s=None)
        await self._store.end_callback(standing.id)
        await self._store.put_waiting(accepted, standing.revision)
        return await self._revive(standing, record)

    async def requeue_callback(self, call_id: str) -> Call:
        """A dead callback is due now, attempts from 0."""
        self._check_open()
        standing = await self._load(call_id)
        record = requeue_callback(standing.record, self._now())
        await self._store.put_callback(standing._replace(record=record), standing.revision)
        return (await self._revive(standing, record)).call

    async def _revive(self, standing: Standing, record: Record) -> Standing:
        """Write what the message that waits by now says as well; a worker that has seen it has done so."""
        try:
            return await self._store.save(standing, record)
        except RevisionChanged:
            return await self._load(standing.id)

    async def _load(self, call_id: str) -> Standing:
        standing = await self._store.load(call_id)
        if standing is None:
            raise CallUnknown(f"no call has the id {call_id}")
        return standing

    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int:
        """Delete calls in a final state, except those with a callback under way; return how many."""
        if state not in FINAL:
            raise AssertionError(f"calls that are {state.value} are not for purging: cancel them")
        self._check_open()
        return await self._people.purge(state, function, call_id)

    async def stats(self) -> Stats:
        """The queue in figures."""
        self._check_open()
        return await self._people.stats()

    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept:
        """Drop what has been final for longer, and bodies of no call; `bounds` are a spool's."""
        self._check_open()
        return await self._people.sweep(keep_results_s, retention_s)

    # -- for migrations

    async def put_held(self, call: NewCall) -> NewCall:
        """Queue a call that does not run before `let_go`; as `put` otherwise."""
        return await self._accept(dataclasses.replace(call, due_s=HELD_S), self._create_held)

    async def _create_held(self, call: NewCall) -> None:
        await self._bodies.name(call.body, call.id)
        if await self._store.find_waiting(call.id) is not None:
            raise CallExists(f"the call id {call.id} is in use")
        try:
            await self._store.save(Standing(call, accept(call)), accept(call), "held")
        except RevisionChanged:
            raise CallExists(f"the call id {call.id} is in use") from None

    async def held_ids(self) -> list[str]:
        """The calls that were put held and not let go."""
        return [kept.call_id async for kept in self._store.walk("held")]

    async def is_held(self, call_id: str) -> bool:
        """Whether the call was put held and not let go."""
        kept = await self._store.find_record(call_id)
        return kept is not None and kept.place == "held"

    async def let_go(self, call_id: str, due_s: float, expires_s: float | None) -> None:
        """Let a held call run; nothing happens to one that is not held."""
        kept = await self._store.find_record(call_id)
        if kept is None or kept.accepted is None or kept.place != "held":
            return
        call = dataclasses.replace(kept.accepted, due_s=due_s, expires_s=expires_s)
        if expires_s is not None:
            await self._store.put_timer(call)
        with contextlib.suppress(RevisionChanged):  # an earlier run of the migration has come so far
            await self._store.put_waiting(call)
        await self._connection.erase(self._names.records, kept.revision)
