"""Taking calls and callbacks, and ending what was taken.

A message that is delivered says only that there may be something to do; `_judge` looks at the record and decides.  The
common case, a call that was never taken, is not looked up: its record is written as the first one, and if there is one
already that fails, and we look.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
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
    State,
)
from ...jetstream import Claimant, Record, accept, expire, requeue_callback, requeue_dead, take, take_back
from ...watchdog import log
from .connection import Conflict, Connection
from .flows import Delivery, Flows, Wanted
from .owners import Held, Owners
from .records import REVIVES_HEADER, join, parse_waiting
from .store import Store

UNKNOWN_S = 1.0  # before an owner that could not be asked is asked again
MAX_DELAY_S = 30 * 86400.0  # longest delay that is asked of the servers at once
MAX_FETCH_COUNT = 256  # messages that are looked at together


class Verdict(Enum):
    """What is to be done with a message that was delivered."""

    TAKE = "take"  # now
    WAIT = "wait"  # until it is due
    EXPIRE = "expire"  # it has waited too long
    ASK = "ask"  # its record says that it is held
    DONE = "done"  # nothing is left, or only what follows from an end


def judge(record: Record, kind: Kind, now_s: float) -> Verdict:
    """Return what a record says of a message of its call."""
    call, callback = record.call, record.call.callback
    if record.hold is not None:
        return Verdict.ASK if record.hold.kind == kind else Verdict.DONE
    if kind == "callback":
        if callback is None or callback.state is not CallbackState.PENDING:
            return Verdict.DONE
        return Verdict.WAIT if callback.due_s > now_s else Verdict.TAKE
    if call.state in FINAL:
        return Verdict.DONE
    if call.expires_s is not None and call.expires_s <= now_s:
        return Verdict.EXPIRE
    return Verdict.WAIT if call.due_s > now_s else Verdict.TAKE


def revive(record: Record, kind: Kind, revives: str | None, now_s: float) -> Record:
    """Return a dead record as its message queues it again, if the step was not written before its writer died."""
    if revives is None or record.revision != int(revives):
        return record
    try:
        return requeue_dead(record, now_s) if kind == "call" else requeue_callback(record, now_s)
    except CallNotDead:
        return record


class Claims:
    """The claims of one process."""

    def __init__(
        self, connection: Connection, store: Store, flows: Flows, owners: Owners, now: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._store = store
        self._flows = flows
        self._owners = owners
        self._now = now
        self._loop = asyncio.get_running_loop()

    # -- taking

    async def claim(self, claimant: Claimant, wanted: Wanted) -> list[Lease]:
        """Lease what there is, up to the limit."""
        leases: list[Lease] = []
        count = wanted.limit
        while len(leases) < wanted.limit:
            rest = dataclasses.replace(wanted, limit=count)
            deliveries = await self._flows.fetch(rest)
            if not deliveries:
                break
            outcomes = await asyncio.gather(*(self._take(each, claimant) for each in deliveries), return_exceptions=True)
            new = [outcome for outcome in outcomes if isinstance(outcome, Lease)]
            leases += new
            for outcome in outcomes:
                if isinstance(outcome, BaseException) and not leases:
                    raise outcome
            if new and len(deliveries) < count:
                break
            count = wanted.limit - len(leases) if new else min(2 * count, MAX_FETCH_COUNT)
            if any(isinstance(outcome, BaseException) for outcome in outcomes):
                break
        return leases

    async def _take(self, delivery: Delivery, claimant: Claimant) -> Lease | None:
        """Do with a message what its record says; return a lease if that is to take it."""
        try:
            record = await self._read(delivery, claimant.kind)
            while record is not None:
                record = revive(record, claimant.kind, delivery.headers.get(REVIVES_HEADER), self._now())
                try:
                    return await self._act(record, delivery, claimant)
                except Conflict:
                    record = await self._store.load(delivery.call_id)
        except QueueDamaged as error:  # it keeps no other from its run
            log.error(str(error), call_id=delivery.call_id)
            await self._flows.nak(delivery, claimant.lease_s)
            return None
        except (QueueUnavailable, QueueFull):
            await self._flows.nak(delivery)
            raise
        await self._flows.ack(delivery)  # its call is gone
        return None

    async def _read(self, delivery: Delivery, kind: Kind) -> Record | None:
        if kind == "callback":
            return await self._store.load(delivery.call_id)
        waiting = parse_waiting(delivery.data)
        if delivery.count == 1 and REVIVES_HEADER not in delivery.headers:
            return accept(waiting)
        kept = await self._store.find_record(delivery.call_id)
        if kept is None:
            return accept(waiting)
        if kept.place == "held":
            return dataclasses.replace(accept(waiting), revision=kept.record.revision)
        return join(kept, waiting)

    async def _act(self, record: Record, delivery: Delivery, claimant: Claimant) -> Lease | None:
        before, verdict = record, judge(record, claimant.kind, self._now())
        if verdict is Verdict.ASK:
            taken_over = await self._take_over(record, delivery, claimant)
            if taken_over is None:
                return None
            record = taken_over
            verdict = judge(record, claimant.kind, self._now())
            if verdict is not Verdict.TAKE:
                record = await self._store.save(record, before)
        if verdict is Verdict.TAKE:
            return await self._lease(record, before, delivery, claimant)
        if verdict is Verdict.WAIT:
            await self._delay(record, delivery, claimant.kind)
            return None
        if verdict is Verdict.EXPIRE:
            record = await self._store.save(expire(record, self._now()), record)
        await self.settle(record, delivery, claimant.kind)
        return None

    async def _lease(self, record: Record, before: Record, delivery: Delivery, claimant: Claimant) -> Lease:
        taken = await self._store.save(take(record, claimant), before)
        until_s = self._loop.time() + claimant.lease_s
        held = Held(taken, delivery, claimant.kind, claimant.owner, until_s, claimant.lease_s)
        self._owners.held[taken.revision] = held
        self._owners.cancelled.discard(taken.call.id)
        return Lease(taken.call, claimant.kind, claimant.owner, taken.revision)

    async def _take_over(self, record: Record, delivery: Delivery, claimant: Claimant) -> Record | None:
        """Return the call as it is without the owner that its record has; None if that lives, or may live."""
        hold = record.hold
        if hold is None:
            raise AssertionError("only what is held can be taken over")
        ours = self._owners.find(record.call.id, hold.fence)
        if ours is not None:
            ours.delivery = delivery  # the servers have begun anew with it, and so do we
            await self._flows.progress(delivery)
            return None
        is_held = await self._owners.is_held(record.call.id, hold)
        if is_held is False:
            return take_back(record, self._now())
        await self._flows.nak(delivery, UNKNOWN_S if is_held is None else max(hold.lease_s, UNKNOWN_S))
        return None

    # -- after a step

    async def settle(self, record: Record, delivery: Delivery, kind: Kind) -> None:
        """Do what follows from a record that was written; what fails here is done when the message comes again."""
        call, callback = record.call, record.call.callback
        with contextlib.suppress(QueueUnavailable, QueueFull):
            if kind == "call" and call.state in FINAL:
                if callback is not None and callback.state is CallbackState.PENDING:
                    await self._store.put_callback(call)
                await self._flows.ack(delivery)
            elif kind == "callback" and (callback is None or callback.state is not CallbackState.PENDING):
                await self._flows.ack(delivery)
            else:
                await self._delay(record, delivery, kind)

    async def _delay(self, record: Record, delivery: Delivery, kind: Kind) -> None:
        callback = record.call.callback
        due_s = callback.due_s if kind == "callback" and callback is not None else record.call.due_s
        await self._flows.nak(delivery, min(max(0.0, due_s - self._now()), MAX_DELAY_S))

    # -- ending

    async def end(self, lease: Lease, kind: Kind, step: Callable[[Record], Record]) -> Record:
        """Take a step that ends a lease; LeaseLost if it has passed on."""
        if lease.kind != kind:
            raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
        held = self._owners.get(lease)
        if held is None:
            raise LeaseLost(f"the lease on call {lease.call.id} has passed to another worker")
        record: Record | None = held.record
        while True:
            if record is None or record.hold != held.record.hold:
                self._owners.held.pop(lease.fence, None)
                raise LeaseLost(f"the lease on call {lease.call.id} has passed to another worker")
            try:
                ended = await self._store.save(step(record), record)
                break
            except Conflict:
                record = await self._store.load(lease.call.id)
        self._owners.held.pop(lease.fence, None)
        await self.settle(ended, held.delivery, kind)
        return ended

    async def reclaim(self, queues: tuple[str, ...] | None = None) -> int:
        """Take back what owners that are gone hold, and what was not renewed in time; return how many."""
        await asyncio.gather(*(self._flows.nak(held.delivery) for held in self._owners.drop_lapsed()))
        names = await self._flows.refresh()
        count = 0
        for kind in ("call", "callback"):
            queues = tuple({name.queue for name in names})
            wanted = Wanted(kind, queues, MAX_FETCH_COUNT, {}, 1.0)
            for delivery in await self._flows.fetch(wanted):
                count += await self._take_back(delivery, kind)
        return count

    async def _take_back(self, delivery: Delivery, kind: Kind) -> bool:
        """Take back one call if its owner is gone; either way its message goes back."""
        record = await self._store.load(delivery.call_id) if delivery.count > 1 else None
        if record is None or judge(record, kind, self._now()) is not Verdict.ASK:
            await self._flows.nak(delivery)
            return False
        claimant = Claimant(kind, "", 1.0, self._now())
        back = await self._take_over(record, delivery, claimant)
        if back is None:
            return False
        try:
            back = await self._store.save(back, record)
        except Conflict:
            await self._flows.nak(delivery)
            return False
        await self.settle(back, delivery, kind)
        return True
