"""The durable queue of one machine: a directory that gateways and workers share, with no broker between them.

Use:

    spool = await Spool.open(Path("spool"))
    call = await spool.put(NewCall(...))                  # on disk when this returns
    owner = await spool.enlist()                          # a worker's name, good for as long as it lives
    for lease in await spool.claim(["faas-request"], owner, lease_s=60, limit=16):
        await spool.finish(lease, RunEnd(...))            # or retry, release, finish_cancelled
    await spool.close()

Contract:
- What `put`, `finish` and the other writes have returned for is on disk (WAL, `synchronous=FULL`), and so is every
  body file they name.
- Delivery is at least once. A lease is an owner and a fence; the holder of an older fence gets `LeaseLost` and must
  drop its result. A lease ends with its owner's life (at once, by a file lock) or with its deadline.
- Within a function calls run in the order (due_s, id); between functions they take turns.
- A write either happens whole or raises: `QueueFull` (no room), `QueueUnavailable` (any other trouble with the disk),
  `QueueDamaged`. After the first two the queue goes on by itself as soon as the disk lets it.
- On a full disk only new calls are refused. What ends calls (claim, finish, cancel, purge, sweep) uses the reserve, and
  a result that finds no room waits for it: a queue that has filled its own disk drains.

It refuses to: start on a file that is damaged, foreign or newer than this program (`set_aside` is the operator's
remedy, never ours); empty or overwrite such a file; drop a dead letter or an undelivered callback that no bound
(`Bounds`: keep_dead, keep_dead_bytes) and no operator gave up.

In the directory (0700): `spool.sqlite3` and its `-wal` and `-shm`; `bodies/`, what is longer than `INLINE_BYTES`;
`owners/`, one locked file per live worker; `bells/`, one datagram socket per open Spool; `writer.lock`; `token`;
`reserve`, which has no content but its size.

A Spool belongs to the event loop it was opened on, and does not survive a fork: locks and connections would be shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ...calls.model import (
    EXCERPT_BYTES,
    FINAL,
    Attempt,
    Backlog,
    Bounds,
    Call,
    CallbackState,
    CallUnknown,
    Changes,
    Kind,
    Lease,
    LeaseLost,
    NewCall,
    QueueFull,
    QueueLimits,
    QueueUnavailable,
    Renewal,
    RunEnd,
    State,
    Stats,
    StoredBody,
    Swept,
)
from ...calls.names import FunctionName
from ...calls.steps import Event
from ...watchdog import log, reason_of
from . import claims, ends, housekeeping, reads
from .bodies import Bodies
from .claims import Claimant, Claimed, Flow, Wanted
from .directory import LockHeld
from .errors import disk_error
from .housekeeping import START, Dropped, DropStep, Position
from .limits import DATABASE, FILE_CHUNK_BYTES, IDLE_S, ORPHAN_S, RECLAIM_S, SET_BACK_S, STOOD_STILL_S
from .notifier import WakeUp
from .owners import boot_s, is_dead, lock_owner, read_boot_id, remove_dead_owners
from .parts import Parts, open_parts
from .puts import Put
from .reads import Outlook, Page
from .rows import build_headers, find_call
from .transaction import Transaction
from .waiters import Waiters
from .writer import Writer

T = TypeVar("T")


class Spool:
    """A queue, open in this process. Every method may raise QueueUnavailable, QueueFull or QueueDamaged.

    Writes are durable when they return. A write whose caller is cancelled may still happen.
    """

    def __init__(self, parts: Parts, now: Callable[[], float]) -> None:
        """Not for callers: use `Spool.open`."""
        self.token = parts.token  # known only to those who can open the queue: how gateway and worker trust each other
        self._directory = parts.directory
        self._limits = parts.limits
        self._reserve = parts.reserve
        self._readers = parts.readers
        self._now = now
        self._boot = read_boot_id()
        self._loop = asyncio.get_running_loop()
        self._notifier = parts.notifier
        self._bodies = Bodies(parts.directory, parts.reserve, parts.body_threads, self._tidy)
        self._writer = Writer(parts, self._on_wake_up)
        self._owners: dict[str, int] = {}
        self._last_flow: dict[Kind, Flow] = {"call": ("", ""), "callback": ("", "")}
        self._reclaimed_s = self._woke_s = -RECLAIM_S
        self._slept_s = boot_s() - time.monotonic()
        self._known_offset_s = self._offset_s()  # that the file knew of when it was last told
        self._call_seen_s = self._callback_seen_s = -1e300  # what was due by then has been claimed or reported
        self._takes_claims = True
        self._claims_count = 0  # under way
        self._lock_error: LockHeld | None = None  # of the last one
        self._claim_ended = asyncio.Event()  # one of them; it is set for those who wait, and for nobody who comes later
        self._work = asyncio.Event()
        self._cancel = asyncio.Event()
        self._waiters = Waiters(self._read, self._notifier)
        self._closed = False
        self._loop.add_reader(self._notifier.fileno(), self._on_notified)

    # -- opening and closing

    @classmethod
    async def open(
        cls, directory: Path, *, limits: QueueLimits | None = None, now: Callable[[], float] = time.time
    ) -> Spool:
        """Open the queue in `directory`, or create it (0700); `now` is the wall clock, in seconds since the epoch.

        Brings an older file to the newest version. Raises QueueDamaged, naming file and remedy, for a file that is
        damaged, foreign or newer; QueueUnavailable, naming path and owner, when it may not be used.
        """
        undo = contextlib.ExitStack()
        try:
            parts = await asyncio.to_thread(open_parts, Path(directory), limits or QueueLimits())
            undo.enter_context(parts.undo)
            spool = cls(parts, now)
        except (RuntimeError, OSError) as error:  # no thread to be had, or no descriptor
            undo.close()
            raise QueueUnavailable(f"the queue cannot be used: {reason_of(error)}") from error
        try:
            await spool.reclaim()
        except QueueFull:
            log.warning(f"the disk of the queue in {directory} is full")  # it can be read, and room may come
        except BaseException:
            await spool.close()
            raise
        return spool

    async def close(self) -> None:
        """Finish the writes under way and let go of everything; leases still held become void. May be repeated."""
        self._takes_claims = False
        while self._claims_count and not self._closed:  # ends may wait behind it, and go before us then
            await self._claim_ended.wait()
        if self._closed:
            return
        self._closed = True
        self._bodies.refuse()
        self._loop.remove_reader(self._notifier.fileno())
        self._waiters.close()
        self._writer.hand_over()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._bodies.close()
        self._readers.close()
        self._writer.stop()
        self._notifier.close()
        with contextlib.suppress(QueueUnavailable, OSError), self._directory.writer_lock():
            for owner in self._owners:
                os.unlink(owner, dir_fd=self._directory.owners_fd)  # an owner without a file, or its lock, is dead
        for fd in self._owners.values():
            os.close(fd)
        self._reserve.close()
        self._directory.close()

    def _write(
        self, run: Callable[[Transaction], T], *, alone: bool = False, body: StoredBody | None = None
    ) -> asyncio.Future[T]:
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        return self._writer.submit(run, alone=alone, body=body)

    async def _tidy(self) -> None:
        await self._write(lambda _: self._writer.tidy(), alone=True)

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        return await self._readers.run(read)

    # -- bodies

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody:
        """Make a body safe before the call that names it is put, or the result finished.

        Up to INLINE_BYTES it stays in memory and goes into the row; beyond that into a file, on disk when this returns.
        The body must be named within ORPHAN_S, else `sweep` takes it for a crash's leftover. Raises BodyTooLarge above
        `limit_bytes`. On any error, also when cancelled, nothing is left of the body; or, if the queue has been closed
        meanwhile, what `sweep` finds.
        """
        return await self._bodies.store(chunks, limit_bytes)

    async def store_result(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody:
        """As `store_body`, for what a function has answered: it waits for room, however long.

        It may use half of the reserve. If its `length` is known it takes all its room at once or none: results that
        hold a part each, and wait for the rest, would wait for one another. The others are written one after another.
        Raises ResultLost if `chunks` breaks off after it has been kept waiting.
        """
        return await self._bodies.store_result(chunks, limit_bytes, length)

    def open_body(self, body: StoredBody, chunk_bytes: int = FILE_CHUNK_BYTES) -> AsyncGenerator[bytes, None]:
        """The bytes of a stored body, in pieces of at most `chunk_bytes`; `aclose` it if you stop early.

        Raises QueueDamaged if the file is proved to be gone or of another length than it was; QueueUnavailable for
        whatever else keeps it from being read (no descriptors or memory, an I/O error), which may pass.
        """
        return self._bodies.open(body, chunk_bytes)

    async def drop_body(self, body: StoredBody) -> None:
        """Remove the file of a body that no call names; one that cannot be removed now is found by `sweep`."""
        if body.file is not None:
            await self._bodies.drop([body.file])

    # -- submitting and following calls

    async def put(self, call: NewCall) -> NewCall:
        """Queue a call and return it; it is on disk when this returns.

        The same idempotency key for the same function, while that call is remembered: the earlier Call is returned
        and the new body dropped. Raises KeyReused when that was another request, CallExists when the id is in use,
        TooManyQueued when the function has as many calls or bytes waiting as it may. Whatever this raises, the body is
        gone, also when the caller is cancelled, unless the call got into the queue all the same. A queue that is closed
        leaves it to `sweep`.
        """
        put = Put(call, build_headers(call.headers), self._limits)
        if abs(self._offset_s() - self._known_offset_s) > SET_BACK_S:
            try:  # before it is in: it is not to be taken along
                self._known_offset_s = await self._write(self._follow_clock)
            except BaseException:
                await self.drop_body(call.body)
                raise
        earlier = await self._write(put)
        return call if earlier is None else earlier

    async def get(self, call_id: str) -> Call | None:
        """The call, or None."""
        return await self._read(partial(find_call, call_id=call_id))

    async def wait(self, call_id: str, timeout_s: float) -> Call:
        """The call once it is final, or as it is after `timeout_s`; CallUnknown if there is none (any more)."""
        with self._waiters.waiting(call_id) as ended:
            call = await self.get(call_id)
            if call is not None and call.state not in FINAL:
                await asyncio.wait([ended], timeout=timeout_s)
                call = await self.get(call_id)
        if call is None:
            raise CallUnknown(f"no call has the id {call_id}")
        return call

    async def cancel(self, call_id: str) -> State:
        """CANCELLED: it was queued and will not run. RUNNING: its worker is told. Raises CallFinished, CallUnknown."""
        return await self._write(partial(ends.cancel, call_id=call_id, now_s=self._now()))

    async def cancel_queued(self, *, function: FunctionName | None = None) -> int:
        """Cancel every queued call, of one function or of all, and drop their payloads; return how many.

        In steps, so calls that come meanwhile may be among them. What runs goes on.
        """

        def step(tx: Transaction, *, after: Position) -> Dropped:
            return ends.cancel_queued(tx, function, self._now(), after)  # each step by its own time: pages go by that

        count, _ = await self._repeat(step)
        return count

    # -- owners and leases

    async def enlist(self, owner: str | None = None) -> str:
        """Make this process an owner of leases, for as long as it lives, and return the owner's name.

        What an earlier life of the same name still held is taken back. QueueUnavailable if the name is at work.
        """
        name = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
        if "/" in name or "\0" in name or name.startswith("."):
            raise AssertionError(f"an owner's name is the name of a file: {name!r}")

        def lock(_: Transaction) -> None:
            self._owners[name] = lock_owner(self._directory, name)

        await self.reclaim()  # before the lock: afterwards what an earlier life left would seem alive
        await self._write(lock, alone=True)
        return name

    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due calls from `queues`, and no more of a function than `capacity` says if it names it.

        A function whose capacity is 0 is passed over. `owner` must be enlisted here. Taking leases costs one commit;
        finding nothing costs none. If the caller is cancelled, what was claimed for it is released.
        """
        claimant, wanted = self._claimant(owner, lease_s), Wanted(tuple(queues), limit, dict(capacity or {}))
        if limit <= 0:
            return []
        leases = await self._claimed("call", claims.claim_calls, wanted, claimant)
        self._call_seen_s = claimant.now_s
        return leases

    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Lease up to `limit` due callbacks of calls of `queues`; otherwise as `claim`.

        Destinations take turns as functions do, and `capacity` is theirs: see `destination_of`. Within one, the longest
        due comes first.
        """
        claimant, wanted = self._claimant(owner, lease_s), Wanted(tuple(queues), limit, dict(capacity or {}))
        if limit <= 0:
            return []
        leases = await self._claimed("callback", claims.claim_callbacks, wanted, claimant)
        self._callback_seen_s = claimant.now_s
        return leases

    def _claimant(self, owner: str, lease_s: float) -> Claimant:
        if owner not in self._owners:
            raise AssertionError(f"{owner} has not been enlisted: its leases would be void at once")
        return Claimant(owner, self._now(), self._boot, lease_s)

    async def _claimed(
        self,
        kind: Kind,
        claim: Callable[[Transaction, Wanted, Flow, Claimant], Claimed],
        wanted: Wanted,
        claimant: Claimant,
    ) -> list[Lease]:
        asked_s = boot_s()

        def work(tx: Transaction) -> list[Lease]:
            self._reclaim_sometimes(tx, asked_s)
            leases, self._last_flow[kind] = claim(tx, wanted, self._last_flow[kind], claimant)
            return leases

        if not self._takes_claims:
            raise QueueUnavailable("the queue is closed")
        future = self._write(work)
        self._claims_count, self._lock_error = self._claims_count + 1, None
        try:
            leases = await asyncio.shield(future)
            self._lock_error = None
            return leases
        except LockHeld as error:
            self._lock_error = error
            raise
        except asyncio.CancelledError:
            future.add_done_callback(self._on_unwanted)
            raise
        finally:
            self._claims_count -= 1
            self._claim_ended.set()
            self._claim_ended.clear()

    def _on_unwanted(self, future: asyncio.Future[list[Lease]]) -> None:
        if not (future.cancelled() or future.exception() or self._closed):
            self._write(partial(ends.release_all, leases=future.result(), now_s=self._now()))

    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal:
        """Let the leases last `lease_s` seconds from now; tell which are lost and which calls to cancel."""

        def work(tx: Transaction) -> Renewal:
            return claims.renew(tx, leases, self._boot, boot_s() + lease_s)

        return await self._write(work)

    async def cancelled_ids(self, owner: str) -> frozenset[str]:
        """The calls that `owner` runs and that are to be cancelled; ask when `wait_for_cancel` returns."""
        return await self._read(partial(reads.cancelled_ids, owner=owner))

    async def reclaim(self) -> int:
        """Take back what dead owners hold and what was not renewed in time; return how many. `claim` does it too."""
        return await self._write(self._take_back)

    def _reclaim_sometimes(self, tx: Transaction, expected_s: float) -> None:
        if boot_s() - self._reclaimed_s >= RECLAIM_S or self._offset_s() < self._known_offset_s - SET_BACK_S:
            self._take_back_if_awake(tx, expected_s)

    def _take_back_if_awake(self, tx: Transaction, expected_s: float) -> None:
        """Take back, unless this process has just stood still: then its own leases, run out meanwhile, come first.

        `expected_s` is when this was to be done. A disk that is always slow does not put it off for ever.
        """
        now_s, slept_s = boot_s(), boot_s() - time.monotonic()  # which grows only while the machine is suspended
        stood_s, self._slept_s = max(now_s - expected_s, slept_s - self._slept_s), slept_s
        if stood_s > STOOD_STILL_S and self._woke_s <= self._reclaimed_s:  # once between two
            self._woke_s = now_s
        if now_s - self._woke_s >= STOOD_STILL_S:
            self._take_back(tx)

    def _offset_s(self) -> float:
        return self._now() - boot_s()

    def _follow_clock(self, tx: Transaction) -> float:
        return housekeeping.follow_clock(tx, self._boot, self._offset_s())

    def _take_back(self, tx: Transaction) -> int:
        self._reclaimed_s = boot_s()
        self._known_offset_s = self._follow_clock(tx)
        owners = tx.db.execute("SELECT DISTINCT owner FROM leases").fetchall()
        dead = {owner for (owner,) in owners if is_dead(self._directory, owner)}
        return ends.take_back(tx, dead, self._boot, self._reclaimed_s, self._now())

    # -- ending a lease on a call: LeaseLost if it has ended, or another worker has it by now

    async def _end(self, run: Callable[[Transaction], T], *, body: StoredBody | None = None) -> T:
        """Write how something ended; behind a claim under way, where the writer would do it alone, with the next claim.

        A worker claims again as soon as it has what it has claimed: so a call takes one commit, and not two.
        """
        if self._claims_count and not self._writer.is_gathering:
            await self._claim_ended.wait()
            if self._lock_error is not None:  # as the writer has it: it has waited for the same process
                raise self._lock_error
        return await self._write(run, body=body)

    async def finish(self, lease: Lease, end: RunEnd) -> None:
        """The call has ended, also when a cancel came too late. On LeaseLost the result's file is dropped."""
        result, excerpt = end.result, None  # an inline body is its own excerpt, as long as it is kept
        if result is not None and result.file is not None:
            excerpt = await self._bodies.read_excerpt(result)
        step = partial(ends.finish, lease=lease, end=end, excerpt=excerpt, now_s=self._now())
        try:
            files = await self._end(step, body=result)
        except LeaseLost:
            if result is not None:
                await self.drop_body(result)
            raise
        await self._bodies.drop(files)

    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State:
        """Back into the queue until `due_s`; or CANCELLED, if asked for. `excerpt`: how the failed response begins."""
        kept = None if excerpt is None else excerpt[:EXCERPT_BYTES]
        return await self._end(partial(ends.retry, lease=lease, attempt=attempt, due_s=due_s, excerpt=kept))

    async def release(self, lease: Lease) -> None:
        """Hand back a call or a callback that was not tried: at once, in its old place, the attempt not counted."""
        await self._write(partial(ends.release, lease=lease, now_s=self._now()))

    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None:
        """The run was stopped because the call was cancelled."""
        await self._write(partial(ends.finish_cancelled, lease=lease, attempt=attempt))

    # -- ending a lease on a callback

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None:
        """The outcome was delivered."""
        await self._end(partial(ends.end_callback, lease=lease, attempt=attempt, event=Event.SUCCEED))

    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None:
        """The delivery failed and is to be tried again at `due_s`."""
        await self._end(partial(ends.end_callback, lease=lease, attempt=attempt, event=Event.RETRY, due_s=due_s))

    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None:
        """The delivery has failed for good; kept until an operator requeues or purges it, or `Bounds` are passed."""
        await self._end(partial(ends.end_callback, lease=lease, attempt=attempt, event=Event.GIVE_UP))

    # -- waiting

    async def wait_for_work(self, timeout_s: float) -> bool:
        """True when there may be something to claim: another process told, or a time has come. False after `timeout_s`.

        Each reason is given once: claim until nothing comes, or until there is no room, before waiting again. Sleeps
        at most IDLE_S; while idle it looks for dead owners once a second if others hold leases, else not at all.
        """
        deadline_s = self._loop.time() + min(timeout_s, IDLE_S)
        while not self._work.is_set():
            outlook = await self._read(
                partial(
                    reads.look_ahead,
                    call_after_s=self._call_seen_s,
                    callback_after_s=self._callback_seen_s,
                    mine=tuple(self._owners),
                )
            )
            left_s = max(0.0, deadline_s - self._loop.time())
            due_in_s = self._due_in_s(outlook)
            pause_s = min(left_s, due_in_s, RECLAIM_S if outlook.others_lease else IDLE_S)
            until_s = boot_s() + pause_s
            if await self._waited(self._work, pause_s):
                return True
            if due_in_s <= pause_s:
                self._mark_seen(outlook)
                return True
            if left_s <= pause_s:
                return False
            await self._write(partial(self._take_back_if_awake, expected_s=until_s))
        self._work.clear()
        return True

    def _due_in_s(self, outlook: Outlook) -> float:
        due = [due_s for due_s in (outlook.call_due_s, outlook.callback_due_s) if due_s is not None]
        return max(0.0, min(due) - self._now()) if due else float("inf")

    def _mark_seen(self, outlook: Outlook) -> None:
        """What has just been reported is not reported again, even if there is no room to claim it."""
        now_s = self._now()
        if outlook.call_due_s is not None and outlook.call_due_s <= now_s:
            self._call_seen_s = max(self._call_seen_s, outlook.call_due_s)
        if outlook.callback_due_s is not None and outlook.callback_due_s <= now_s:
            self._callback_seen_s = max(self._callback_seen_s, outlook.callback_due_s)

    async def wait_for_cancel(self, timeout_s: float) -> bool:
        """True when the end of a running call has been asked for, here or elsewhere; see `cancelled_ids`."""
        return await self._waited(self._cancel, timeout_s)

    async def _waited(self, event: asyncio.Event, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        event.clear()
        return True

    def _on_notified(self) -> None:
        self._on_wake_up(self._notifier.read())

    def _on_wake_up(self, wake_up: int) -> None:
        if wake_up & WakeUp.WORK:
            self._work.set()
        if wake_up & WakeUp.CANCEL:
            self._cancel.set()
        if wake_up & WakeUp.FINISHED:
            self._waiters.look()

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
        """Calls, newest first, without what may be long: path, query, callback URL, header fields, bodies, history.

        (`get` has them; they are empty or None here, and so one page takes little memory whatever callers send.)
        A page begins behind the call `before`, the last one of the page in front; CallUnknown if it is gone by now.
        What it costs does not grow with the queue, but with the functions where only a state is wanted, and with the
        calls that share `id_start`, the beginning of their id, or the state of their callback.
        """
        wanted = Page(state, function, callback, id_start, limit, before)
        return await self._read(partial(reads.list_calls, wanted=wanted))

    async def changes(self, mark: str | None, leased_ids: Collection[str], limit: int) -> Changes:
        """What has changed since `mark`, None: nothing yet, where does one begin?

        `leased_ids` are the calls that ran, or whose callback was on its way, when they were told last.
        """
        find = partial(reads.find_changes, mark=mark, leased_ids=leased_ids, limit=limit, now_s=self._now())
        return await self._read(find)

    async def backlog(self) -> Backlog:
        """What is still to be done and what was given up; what has ended well is not looked at."""
        return await self._read(partial(reads.count_backlog, now_s=self._now()))

    async def requeue_dead(self, call_id: str) -> Call:
        """A dead letter is queued as if new: due now, no expiry, attempts from 0. Or CallNotDead, CallUnknown."""
        call, files = await self._write(partial(ends.requeue_dead, call_id=call_id, now_s=self._now()))
        await self._bodies.drop(files)
        return call

    async def requeue_callback(self, call_id: str) -> Call:
        """A dead callback is due now, attempts from 0. Raises CallNotDead, CallUnknown."""
        return await self._write(partial(ends.requeue_callback, call_id=call_id, now_s=self._now()))

    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int:
        """Delete calls in a final state, except those with a callback under way; return how many."""
        if state not in FINAL:
            raise AssertionError(f"calls that are {state.value} are not for purging: cancel them")
        count, _ = await self._repeat(partial(housekeeping.purge, state=state, function=function, call_id=call_id))
        return count

    async def stats(self) -> Stats:
        """The queue in figures; reads an index from end to end, so not for every request."""
        stats = await self._read(partial(reads.count_calls, now_s=self._now(), commit_count=self._writer.commit_count))
        try:
            disk = await asyncio.to_thread(os.fstatvfs, self._directory.root_fd)
            free_bytes = disk.f_bavail * disk.f_frsize
            return replace(stats, free_bytes=free_bytes, reserve_bytes=self._reserve.target_bytes)
        except OSError as error:
            raise disk_error(error) from error

    @property
    def trouble(self) -> str | None:
        """What keeps the queue from taking calls, for /healthz; None if nothing is known to."""
        return None if self._closed else self._reserve.trouble()

    # -- housekeeping

    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept:
        """Drop results and calls that have been final for longer, leftovers of crashes, and give their room back.

        Never touches dead letters or calls whose callback is not delivered, except for a dead letter's result, unless
        `bounds` says so; each of those that goes is logged. Works in small steps: writers are never kept waiting for
        more than one.
        """
        with contextlib.suppress(QueueFull):  # what is dropped here makes room for it
            self._known_offset_s = await self._write(self._follow_clock)
        now_s, bounds = self._now(), bounds or Bounds()
        expired = 0
        while count := await self._write(partial(housekeeping.expire, now_s=now_s)):
            expired += count
        while count := await self._write(
            partial(housekeeping.expire_stale, now_s=now_s, before_s=now_s - bounds.queue_age_s)
        ):
            expired += count
        results, files = await self._repeat(partial(housekeeping.drop_results, before_s=now_s - keep_results_s))
        calls, more_files = await self._repeat(partial(housekeeping.drop_calls, before_s=now_s - retention_s))
        letters, letter_files = await self._drop_dead_letters(now_s, bounds)
        files += more_files + letter_files + await self._drop_orphans()
        await self._write(housekeeping.forget_idle)
        await self._write(lambda _: remove_dead_owners(self._directory), alone=True)
        return Swept(expired, results, calls, files, await self._shrink(), letters)

    async def _drop_dead_letters(self, now_s: float, bounds: Bounds) -> tuple[int, int]:
        if bounds.dead_s == float("inf") and bounds.dead_bytes is None:
            return 0, 0
        before_s = await self._read(partial(housekeeping.dead_letters_before, now_s=now_s, bounds=bounds))
        count = files_count = 0
        while True:
            letters, files = await self._write(partial(housekeeping.drop_dead_letters, before_s=before_s))
            if not letters:
                return count, files_count
            for call_id, function in letters:
                log.warning("a dead letter was dropped: keep_dead is over", call_id=call_id, function=function)
            files_count += await self._bodies.drop(files)
            count += len(letters)

    async def _repeat(self, step: DropStep) -> tuple[int, int]:
        """Repeat a step to its end; return how many rows and files it has dropped."""
        position: Position | None = START
        rows = files = 0
        while position is not None:
            dropped = await self._write(partial(step, after=position))
            files += await self._bodies.drop(dropped.files)
            rows += dropped.count
            position = dropped.next
        return rows, files

    async def _drop_orphans(self) -> int:
        old = await self._bodies.list_old(time.time() - ORPHAN_S)
        unnamed = await self._read(partial(housekeeping.find_unnamed, files=old)) if old else []
        return await self._bodies.drop_orphans(unnamed) if unnamed else 0

    async def _shrink(self) -> int:
        """Return bytes given back: free pages at the end of the file, and the journal."""
        before = self._size_bytes()
        with contextlib.suppress(QueueFull):  # moving pages takes room; the rest is moved when there is some
            while await self._write(housekeeping.vacuum):
                pass
        await self._write(lambda tx: housekeeping.truncate_journal(tx.db), alone=True)
        return max(0, before - self._size_bytes())

    def _size_bytes(self) -> int:
        journal = self._directory.path / f"{DATABASE}-wal"
        try:
            return sum(path.stat().st_size for path in (self._directory.database, journal) if path.exists())
        except OSError as error:
            raise disk_error(error) from error
