"""The leases that a worker has in flight: their slots, their renewal, and what ends one early.

    table = InFlightTable(queue, owner, slots)
    entry = table.add(lease)                # then start its task, and in the end:
    table.remove(entry)

A lease is renewed while its work runs, so it is never a limit to how long a function may take.  It ends early when
the call is cancelled, when another worker has it (this process slept past the lease), or when the worker drains.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..calls.destinations import destination_of
from ..calls.model import Kind, Lease, Renewal
from ..queues import Queue
from ..watchdog import FaashoundError, Trouble, log
from .shares import Slots

RENEWALS_COUNT = 3  # in the time of one lease: two may fail before it runs out
LOOK_S = 0.5  # between two looks at the clock, as long as a spool waits for a process that stood still to renew
NOTHING_NEW = Renewal(frozenset(), frozenset())


def _boot_s() -> float:
    """Return a clock that also ticks while the machine is suspended, as leases run by one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class EarlyEnd(Enum):
    """Why work was ended before it was done."""

    CANCELLED = "cancelled"
    LOST = "lost"
    DRAINED = "drained"


@dataclass(slots=True, eq=False)
class InFlight:
    """A lease at work.

    `flow` is whose slot it holds: the function's, or the callback's destination's.  Once a function has answered, and
    only the outcome is still to be recorded, it holds none; whether the lease is lost the queue says then.
    """

    lease: Lease
    flow: str
    task: asyncio.Task[None] | None = None
    begun: bool = False
    holds_slot: bool = False
    recording: bool = False
    ended_by: EarlyEnd | None = None

    def end(self, why: EarlyEnd) -> None:
        """Cancel the work for a reason; the first one counts.

        A task that has not made its first step is not cancelled, since then it could record nothing: it looks itself.
        """
        if self.ended_by is not None:
            return
        self.ended_by = why
        if self.begun and self.task is not None:
            self.task.cancel()


class InFlightTable:
    """All leases at work in this worker, by their fence.  `slots` are what each kind of work holds."""

    def __init__(self, queue: Queue, owner: str, slots: Mapping[Kind, Slots]) -> None:
        self._queue = queue
        self._owner = owner
        self._slots = slots
        self._entries: dict[int, InFlight] = {}
        self._renewed_s = _boot_s()
        self._trouble = Trouble(log.error)  # of the last renewal
        self._cancelled_early: frozenset[str] = frozenset()  # calls of this worker that its claim has not returned yet

    def add(self, lease: Lease) -> InFlight:
        """Take a lease in, with a slot.  An earlier one on the same work has run out unnoticed, and is ended."""
        for earlier in self._entries.values():
            if earlier.lease.call.id == lease.call.id and earlier.lease.kind == lease.kind:
                earlier.end(EarlyEnd.LOST)
        flow = lease.call.function if lease.kind == "call" else destination_of(lease.call.callback_url or "")
        entry = self._entries[lease.fence] = InFlight(lease, flow)
        self.hold(lease)
        if lease.kind == "call" and lease.call.id in self._cancelled_early:
            entry.end(EarlyEnd.CANCELLED)
        return entry

    def remove(self, entry: InFlight) -> bool:
        """Forget a lease whose work is over, and free its slot; tell whether it held one still."""
        del self._entries[entry.lease.fence]
        return self.free(entry)

    def begin_recording(self, lease: Lease) -> None:
        """Take note that an outcome is on its way to the queue: a renewal that crosses it finds the lease ended."""
        self._entries[lease.fence].recording = True

    def hold(self, lease: Lease) -> None:
        """Have the work of a lease hold a slot, if it holds none."""
        entry = self._entries[lease.fence]
        if not entry.holds_slot:
            entry.holds_slot = True
            self._slots[lease.kind].take(entry.flow)

    def free(self, entry: InFlight) -> bool:
        """Free the slot of work that needs it no more, if it holds one; tell whether it did."""
        if not entry.holds_slot:
            return False
        entry.holds_slot = False
        self._slots[entry.lease.kind].give_back(entry.flow, time.monotonic())
        return True

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """The tasks of all that is at work."""
        return [entry.task for entry in self._entries.values() if entry.task is not None]

    def counts(self) -> Counter[Kind]:
        """Return how many there are of each kind of work."""
        return Counter(entry.lease.kind for entry in self._entries.values())

    def end_all(self) -> None:
        """Hand back at once whatever is at work."""
        for entry in self._entries.values():
            entry.end(EarlyEnd.DRAINED)

    async def keep_renewing(self, lease_s: float) -> None:
        """Renew what is at work long before its lease ends, for ever; end what is lost or cancelled.

        The loop's clock stands while the machine is suspended, and leases run out then: so it looks at the other one.
        """
        while True:
            await asyncio.sleep(min(lease_s / RENEWALS_COUNT, LOOK_S))
            await self.renew_if_due(lease_s, lease_s / RENEWALS_COUNT)

    async def renew_if_due(self, lease_s: float, after_s: float) -> bool:
        """Renew what is at work if that was done longer ago than `after_s`; False if it cannot be done."""
        if _boot_s() - self._renewed_s < after_s:
            return True
        began_s = _boot_s()
        leases = [entry.lease for entry in self._entries.values()]
        try:
            renewal = await self._queue.renew(leases, lease_s) if leases else NOTHING_NEW
        except FaashoundError as error:  # it is tried again at the next look
            self._trouble.tell(f"leases could not be renewed: {error}")
            return False
        self._renewed_s = began_s
        self._trouble.over()
        for fence in renewal.lost & self._entries.keys():
            entry = self._entries[fence]
            if entry.recording or entry.ended_by is not None:  # we have given it up ourselves
                continue
            log.warning("the lease was lost: it ran out, and the call was taken back", call_id=entry.lease.call.id)
            entry.end(EarlyEnd.LOST)
        self._end_cancelled(renewal.cancelled)
        return True

    async def watch_cancels(self, timeout_s: float) -> None:
        """End a run as soon as its cancellation is asked for, for ever; the queue is asked each `timeout_s` anyhow."""
        trouble = Trouble(log.error)
        while True:
            await self._queue.wait_for_cancel(timeout_s)
            try:
                cancelled = await self._queue.cancelled_ids(self._owner)
            except FaashoundError as error:
                trouble.tell(f"cancellations could not be read: {error}")
                continue
            trouble.over()
            self._end_cancelled(cancelled)
            self._cancelled_early = cancelled - {entry.lease.call.id for entry in self._entries.values()}

    def _end_cancelled(self, ids: frozenset[str]) -> None:
        for entry in self._entries.values():
            if entry.lease.kind == "call" and entry.lease.call.id in ids:
                entry.end(EarlyEnd.CANCELLED)
