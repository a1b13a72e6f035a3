"""What does not work behind a gateway, for /healthz, the metrics and the log.

    health = Health(slot)
    health.worker_trouble("exited with status 1")           # "" once it works
    health.queue_refused(error)                              # and queue_took() when it takes a call again
    health.problems()                                        # [] while all works
    health.warnings()                                        # what will not work soon
    health.keep_running(stack, janitor.run())                # a warning for good, should it end by a fault of ours

Contract: a problem stops calls that a caller was promised, and is no matter of one call or one function.  It
is told by part, without the reasons, which name files and ports: those are in the log.  All processes of a gateway
share what they know of the worker and of the queue's disk, which only the first of them looks at.

What it refuses to do: look for itself.  A queue is judged by what it did with the last calls; one that has been asked
for nothing in QUEUE_MEMORY_S is believed to work again, or a balancer that heeds /healthz would never ask it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from ..calls.model import CallDamaged, QueueDamaged, QueueFull, QueueUnavailable
from ..watchdog import FaashoundError, Slot, log

QUEUE_MEMORY_S = 30.0  # longer than balancers let pass between two probes
TROUBLE_KEY = "trouble"  # of the shared counts: 1 while the part that follows does not work, or soon will not

_WORKER, _QUEUE, _ROOM, _WORK = (f"{TROUBLE_KEY} {part}" for part in ("worker", "queue", "room", "background"))


class Health:
    """The parts of one gateway that do not work."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._refused: asyncio.TimerHandle | None = None  # the end of our memory of it
        self._is_full = False
        for key in (_QUEUE, _WORK):
            slot.values(key, 1)[0] = 0.0
        if slot.is_first:
            self.worker_trouble("")  # what a process before us knew is of another worker
            self.queue_is_nearly_full(False)

    def worker_trouble(self, trouble: str) -> None:
        """Note that the worker beside us cannot keep running, or that it can."""
        self._slot.values(_WORKER, 1)[0] = float(bool(trouble))

    def queue_is_nearly_full(self, truth: bool) -> None:
        """Note whether the queue will soon have no room for calls."""
        self._slot.values(_ROOM, 1)[0] = float(truth)

    def queue_refused(self, error: FaashoundError) -> None:
        """Note that the queue could not take a call, if what it raised holds for every call.

        A full one counts for the metrics alone: another call may be small enough, and where none is the queue itself
        says so (trouble_of).  A timer ends it, and no look at us: /healthz may be asked by nothing.
        """
        if isinstance(error, CallDamaged) or not isinstance(error, QueueUnavailable | QueueDamaged | QueueFull):
            return
        if self._refused is not None:
            self._refused.cancel()
        self._refused = asyncio.get_running_loop().call_later(QUEUE_MEMORY_S, self.queue_took)
        self._is_full = isinstance(error, QueueFull)
        self._slot.values(_QUEUE, 1)[0] = 1.0

    def queue_took(self) -> None:
        """Note that the queue has taken a call."""
        if self._refused is not None:
            self._refused.cancel()
            self._refused = None
            self._slot.values(_QUEUE, 1)[0] = 0.0

    def keep_running(self, stack: AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
        """Have `work` go on until `stack` is closed, which waits for its end."""
        task = asyncio.create_task(self._run(work))

        async def end() -> None:
            task.cancel()
            await asyncio.wait((task,))

        stack.push_async_callback(end)

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001 - the task's boundary: nothing else would tell of its end before ours
            log.exception("work in the background has ended")
            self._slot.values(_WORK, 1)[0] = 1.0

    def problems(self) -> list[str]:
        """Return what does not work, a line each."""
        refuses = self._refused is not None and not self._is_full
        problems = ["the queue does not take calls; see the log"] if refuses else []
        if self._is_noted(_WORKER):
            problems.append("the local worker does not keep running, asynchronous calls wait; see the log")
        return problems

    def warnings(self) -> list[str]:
        """Return what soon will not work, or what is missed by no call, a line each."""
        warnings = ["the queue's disk is nearly full; see the log"] if self._is_noted(_ROOM) else []
        if self._is_noted(_WORK):
            warnings.append("work in the background has ended by a fault, and a restart brings it back; see the log")
        return warnings

    def _is_noted(self, key: str) -> bool:
        return bool(self._slot.scoreboard.counters.totals().get(key, [0.0])[0])
