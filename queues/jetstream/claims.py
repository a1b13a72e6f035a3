"""Taking calls and callbacks, and ending what was taken.

A message that is delivered says only that there may be something to do; `_judge` looks at the record and decides.  The
common case, a call that was never taken, is not looked up: its record is written as the first one, and if there is one
already that fails, and we look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ...calls.model import (
    FINAL,
    CallbackState,
    CallNotDead,
    Kind,
    Lease,
    LeaseLost,
    QueueDamaged,
    QueueFull,
    QueueUnavailable,
)
from ...calls.steps import Hold, Record, claim, expire, is_expired, requeue_callback, requeue_dead, take_back
from .connection import RevisionChanged
from .flows import LOOK_LEASE_S, MIN_LEASE_S, Delivery, Flows, Wanted
from .owners import Held, Owners
from .records import REVIVES_HEADER, Standing, join, parse_waiting, tell_damaged
from .store import Store

UNKNOWN_S = 1.0  # before an owner that could not be asked is asked again
DAMAGED_S = 60.0  # before a message that cannot be read is looked at again
MAX_FETCH_COUNT = 256  # messages that are looked at together
LATER_S = 3.0  # for all that a claim fetches when it has leased something: that is not to wait, or its lease runs out


class Verdict(Enum):
    """What is to be done with a message that was delivered."""

    TAKE = "take"  # now
    WAIT = "wait"  # until it is due
    EXPIRE = "expire"  # it has waited too long
    ASK = "ask"  # its record says that it is held
    DONE = "done"  # nothing is left, or only what follows from an end


def judge(record: Record, kind: Kind, now_s: float, accepted_s: float) -> Verdict:
    """Return what a record says of a message of its call, which was accepted at `accepted_s` by a gateway's clock.

    A call that is due since then and was never tried is due by every clock: ours may be behind.
    """
    if record.hold is not None:
        return Verdict.ASK if record.hold.kind == kind else Verdict.DONE
    if kind == "callback":
        callback = record.callback
        if callback is None or callback.state is not CallbackState.PENDING:
            return Verdict.DONE
        return Verdict.WAIT if callback.due_s > now_s else Verdict.TAKE
    if record.state in FINAL:
        return Verdict.DONE
    if is_expired(record, now_s):
        return Verdict.EXPIRE
    is_delayed = record.attempts > 0 or record.due_s > accepted_s
    return Verdict.WAIT if is_delayed and record.due_s > now_s else Verdict.TAKE


def revive(standing: Standing, kind: Kind, revives: str | None, now_s: float) -> Record:
    """Return a dead record as its message queues it again, if the step was not written before its writer died."""
    if revives is None or standing.revision != int(revives):
        return standing.record
    try:
        return (requeue_dead if kind == "call" else requeue_callback)(standing.record, now_s)
    except CallNotDead:
        return standing.record


def is_written(found: Record, wanted: Record, kind: Kind) -> bool:
    """Tell whether a record is what our step has made, in an earlier try whose acknowledgement was lost.

    Of a call its last attempt tells, whose times are ours, also when its callback is under way by now.  A callback's
    attempts are not kept: it is as we have left it, or it is another's.
    """
    if kind == "callback":
        return found.hold is None and (found.state, found.callback) == (wanted.state, wanted.callback)
    new = wanted.history[-1:]
    is_ended = found.hold is None or found.hold.kind == "callback"
    return bool(new) and is_ended and (found.state, found.history[-1:]) == (wanted.state, new)


@dataclass(slots=True)
class Room:
    """What a claim may still take: `count` in all, and of each name in `capacity` so many."""

    count: int
    capacity: dict[str, int]

    def take(self, name: str) -> bool:
        """Take the place of one of a name; False if there is none."""
        left_count = self.capacity.get(name, 1)
        if self.count <= 0 or left_count <= 0:
            return False
        self._change(name, -1)
        return True

    def give_back(self, name: str) -> None:
        """The place is not needed."""
        self._change(name, 1)

    def _change(self, name: str, by: int) -> None:
        self.count += by
        if name in self.capacity:
            self.capacity[name] += by


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims what, for how long, and how many."""

    kind: Kind
    owner: str
    lease_s: float
    room: Room


class Claims:
    """The claims of one process."""

    def __init__(self, store: Store, flows: Flows, owners: Owners, now: Callable[[], float]) -> None:
        self._store = store
        self._flows = flows
        self._owners = owners
        self._now = now
        self._loop = asyncio.get_running_loop()
        self.coming: list[str] = []  # the calls whose claim is being written: who reads it may want them cancelled

    # -- taking

    async def claim(self, kind: Kind, owner: str, wanted: Wanted) -> list[Lease]:
        """Lease what there is, up to the limit."""
        leases: list[Lease] = []
        room = Room(wanted.limit, dict(wanted.capacity))
        claimant = Claimant(kind, owner, wanted.lease_s, room)
        count = wanted.limit
        deadline_s: float | None = None
        while room.count:
            try:
                async with asyncio.timeout_at(deadline_s):
                    deliveries = await self._flows.fetch(replace(wanted, limit=count, capacity=dict(room.capacity)))
            except (QueueUnavailable, QueueFull, TimeoutError):
                if leases:
                    break  # no other task knows of them
                raise
            new, failed = await self._take_all(deliveries, claimant)
            leases += new
            if failed and not leases:
                raise failed[0]
            if failed or len(deliveries) < count or (leases and not new):
                break  # what is due does not wait for a long look at what is not
            if new and deadline_s is None:
                deadline_s = self._loop.time() + min(LATER_S, max(wanted.lease_s, MIN_LEASE_S) / 4)
            count = room.count if new else min(2 * count, MAX_FETCH_COUNT)
        return leases

    async def _take_all(
        self, deliveries: Sequence[Delivery], claimant: Claimant
    ) -> tuple[list[Lease], list[BaseException]]:
        """Return the leases that messages have given, and what has failed."""
        takes = (self._take(each, claimant) for each in deliveries)
        outcomes = await asyncio.gather(*takes, return_exceptions=True)
        new = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
        return new, [outcome for outcome in outcomes if isinstance(outcome, BaseException)]

    async def _take(self, delivery: Delivery, claimant: Claimant) -> Lease | None:
        """Do with a message what its record says; return a lease if that is to take it."""
        try:
            standing = await self._read(delivery, claimant.kind)
            while standing is not None:
                try:
                    return await self._act(standing, delivery, claimant)
                except RevisionChanged:
                    standing = await self._store.load(delivery.call_id)
        except QueueDamaged as error:  # it keeps no other from its run
            tell_damaged(f"{error}: at message {delivery.revision}", call_id=delivery.call_id)
            await self._flows.nak(delivery, DAMAGED_S)
            return None
        except (QueueUnavailable, QueueFull):
            await self._flows.nak(delivery)
            raise
        await self._flows.ack(delivery)  # its call is gone
        return None

    async def _read(self, delivery: Delivery, kind: Kind) -> Standing | None:
        if kind == "callback":
            return await self._store.load(delivery.call_id)
        accepted = parse_waiting(delivery.data)
        revives = REVIVES_HEADER in delivery.headers
        kept = None if delivery.count == 1 and not revives else await self._store.find_record(delivery.call_id)
        if kept is None and revives:
            return None  # its dead letter was deleted while it was queued again
        return join(kept, accepted)

    async def _act(self, standing: Standing, delivery: Delivery, claimant: Claimant) -> Lease | None:
        kind, now_s = claimant.kind, self._now()
        record = revive(standing, kind, delivery.headers.get(REVIVES_HEADER), now_s)
        accepted_s = standing.accepted.accepted_s
        verdict = judge(record, kind, now_s, accepted_s)
        if verdict is Verdict.ASK:
            if not await self._is_gone(standing, delivery):
                return None
            record = take_back(record, now_s)
            verdict = judge(record, kind, now_s, accepted_s)
        if verdict is Verdict.TAKE:
            if claimant.room.take(delivery.flow.name.name):
                return await self._lease(standing, record, delivery, claimant)
            await self._flows.nak(delivery)  # more was fetched than there is room for, to see past what is not due
            return None
        if verdict is Verdict.EXPIRE:
            record = expire(record, now_s)
        if record is not standing.record:
            standing = await self._store.save(standing, record)
        await self.settle(standing, delivery, kind)
        return None

    async def _lease(self, standing: Standing, record: Record, delivery: Delivery, claimant: Claimant) -> Lease:
        hold = Hold(claimant.kind, claimant.owner, standing.revision)
        self._owners.cancelled.discard(standing.id)  # of an earlier lease; from now on a cancel is of this one
        self.coming.append(standing.id)
        try:
            taken = await self._store.save(standing, claim(record, hold, self._now()))
            until_s = self._loop.time() + claimant.lease_s
            held = Held(taken, delivery, claimant.kind, claimant.owner, until_s, claimant.lease_s)
            self._owners.held[taken.revision] = held
        except BaseException:
            claimant.room.give_back(delivery.flow.name.name)
            raise
        finally:
            self.coming.remove(standing.id)
        if taken.id in self._owners.cancelled:
            self._owners.cancel.set()  # who was woken by the cancel has not found the lease yet
        return Lease(taken.call, claimant.kind, claimant.owner, taken.revision)

    async def _is_gone(self, standing: Standing, delivery: Delivery) -> bool:
        """Tell whether the owner that the record names is no more; if it lives, or may live, the message goes back."""
        hold = standing.record.hold
        if hold is None:
            raise AssertionError("only what is held has an owner")
        ours = self._owners.find(standing.id, hold.fence)
        if ours is not None:
            ours.delivery = delivery  # the servers have begun anew with it, and so do we
        left_s = await self._owners.ask_left_s(standing.id, hold, max(delivery.flow.lease_s or 0.0, UNKNOWN_S))
        if left_s != 0.0:
            await self._flows.nak(delivery, UNKNOWN_S if left_s is None else left_s)
        return left_s == 0.0

    # -- after a step

    async def settle(self, standing: Standing, delivery: Delivery, kind: Kind) -> None:
        """Do what follows from a record that was written; what fails here is done when the message comes again."""
        record = standing.record
        pending = record.callback is not None and record.callback.state is CallbackState.PENDING
        is_over = not pending if kind == "callback" else record.state in FINAL
        with contextlib.suppress(QueueUnavailable, QueueFull):
            if not is_over:
                await self._delay(record, delivery, kind)
                return
            if kind == "call" and pending:
                await self._store.put_callback(standing)
            if kind == "call":
                await self._store.end_timer(standing.accepted)
            if delivery.count > 1 or record.attempts != 1 or REVIVES_HEADER in delivery.headers:
                await self._store.drop_older(standing.id)  # it may have been elsewhere
            await self._flows.ack(delivery)

    async def _delay(self, record: Record, delivery: Delivery, kind: Kind) -> None:
        due_s = record.callback.due_s if kind == "callback" and record.callback is not None else record.due_s
        await self._flows.nak(delivery, due_s - self._now())

    # -- ending

    async def end(self, lease: Lease, kind: Kind, step: Callable[[Record], Record]) -> Record:
        """Take a step that ends a lease; LeaseLost if it has passed on.

        If the servers cannot be reached it is to be told again, and until then counts as under way: perhaps they have
        heard it.
        """
        if lease.kind != kind:
            raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
        held = self._owners.get(lease)
        if held is None:
            raise LeaseLost(f"the lease on call {lease.call.id} has passed to another worker")
        self._owners.ending.add(lease.fence)
        standing: Standing | None = held.standing
        wanted = step(held.standing.record)
        while True:
            if standing is not None and is_written(standing.record, wanted, kind):
                ended = standing
                break
            if standing is None or standing.record.hold != held.standing.record.hold:
                self._owners.held.pop(lease.fence, None)
                self._owners.ending.discard(lease.fence)
                raise LeaseLost(f"the lease on call {lease.call.id} has passed to another worker")
            try:
                ended = await self._store.save(standing, step(standing.record))
                break
            except RevisionChanged:
                standing = await self._store.load(lease.call.id)
        self._owners.held.pop(lease.fence, None)
        try:
            await self.settle(ended, held.delivery, kind)
        finally:
            self._owners.ending.discard(lease.fence)
        return ended.record

    async def reclaim(self) -> int:
        """Take back what owners that are gone hold, and what was not renewed in time; return how many."""
        await asyncio.gather(*(self._flows.nak(held.delivery) for held in self._owners.drop_lapsed()))
        queues = tuple({name.queue for name in await self._flows.refresh()})
        count = 0
        kinds: tuple[Kind, ...] = ("call", "callback")
        for kind in kinds:
            for delivery in await self._flows.fetch(Wanted(kind, queues, MAX_FETCH_COUNT, {}, LOOK_LEASE_S)):
                count += await self._take_back(delivery, kind)
        return count

    async def _take_back(self, delivery: Delivery, kind: Kind) -> bool:
        """Take back one call if its owner is gone; either way its message goes back."""
        standing = await self._store.load(delivery.call_id) if delivery.count > 1 else None
        now_s = self._now()
        if standing is None or judge(standing.record, kind, now_s, standing.accepted.accepted_s) is not Verdict.ASK:
            await self._flows.nak(delivery)
        elif await self._is_gone(standing, delivery):
            with contextlib.suppress(RevisionChanged):
                back = await self._store.save(standing, take_back(standing.record, self._now()))
                await self.settle(back, delivery, kind)
                return True
            await self._flows.nak(delivery)
        return False
