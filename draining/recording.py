"""How what a worker has done gets into the queue: surely, and each outcome once.

    recorder = Recorder(queue, in_flight)
    await recorder.end_run(lease, step, attempt, outcome)

Contract: an outcome that the queue cannot take now is offered again until it can, since what is not recorded would
happen once more; it keeps its slot meanwhile.  LeaseLost goes to the caller: another worker has the
call, and its outcome counts.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from functools import partial

from ..calls.model import Attempt, Lease, QueueDamaged, QueueFull, QueueUnavailable, RunEnd, State
from ..calls.retries import AttemptOutcome, Dead, Done, RetryAt
from ..queues import Queue
from ..watchdog import log
from .bodies import drop, take_excerpt
from .in_flight import InFlightTable

PAUSE_S = 1.0  # before the queue is asked again after it failed


class Recorder:
    """Writes what has become of leases."""

    def __init__(self, queue: Queue, in_flight: InFlightTable) -> None:
        self._queue = queue
        self._in_flight = in_flight

    async def end_run(
        self, lease: Lease, step: Done | RetryAt | Dead, attempt: Attempt, outcome: AttemptOutcome
    ) -> None:
        """Record an attempt at a call, and the step that follows from it."""
        match step:
            case RetryAt(due_s):
                excerpt = await take_excerpt(self._queue, outcome.body)
                again = partial(self._queue.retry, lease, attempt=attempt, due_s=due_s, excerpt=excerpt)
                await self._with_retries(lease, again)
            case Done(status):
                await self._finish(lease, run_end(State.DONE, status, attempt, outcome))
            case Dead(_, status, with_answer):
                if not with_answer:
                    await drop(self._queue, outcome.body)
                    outcome = outcome._replace(body=None, headers=())
                await self._finish(lease, run_end(State.DEAD, status, attempt, outcome))

    async def end_delivery(self, lease: Lease, step: Done | RetryAt | Dead, attempt: Attempt) -> None:
        """Record an attempt at a callback, and the step that follows from it."""
        match step:
            case Done():
                await self._with_retries(lease, partial(self._queue.callback_done, lease, attempt))
            case RetryAt(due_s):
                await self._with_retries(lease, partial(self._queue.callback_retry, lease, attempt, due_s))
            case Dead():
                await self._with_retries(lease, partial(self._queue.callback_dead, lease, attempt))

    async def release(self, lease: Lease) -> None:
        """Hand a lease back; its attempt does not count."""
        await self._with_retries(lease, partial(self._queue.release, lease))

    async def _finish(self, lease: Lease, end: RunEnd) -> None:
        try:
            await self._with_retries(lease, partial(self._queue.finish, lease, end))
        except QueueDamaged as error:  # the stored result is gone: no reason to run the function again
            attempt = dataclasses.replace(end.attempt, error=str(error))
            dead = RunEnd(State.DEAD, attempt, end.status, end.duration_s)
            await self._with_retries(lease, partial(self._queue.finish, lease, dead))

    async def _with_retries(self, lease: Lease, record: Callable[[], Awaitable[object]]) -> None:
        self._in_flight.begin_recording(lease)
        last_error = ""
        while True:
            try:
                await record()
                if last_error:
                    log.info(f"the outcome cannot be recorded yet: {last_error}: over", call_id=lease.call.id)
                return
            except (QueueUnavailable, QueueFull) as error:
                if str(error) != last_error:
                    log.error(f"the outcome cannot be recorded yet: {error}", call_id=lease.call.id)
                last_error = str(error)
                self._in_flight.hold(lease)  # what cannot be recorded keeps its slot, or all of it would pile up
                await asyncio.sleep(PAUSE_S)


def run_end(state: State, status: int, attempt: Attempt, outcome: AttemptOutcome) -> RunEnd:
    """Return how a run ended, for the queue."""
    return RunEnd(state, attempt, status, outcome.duration_s, outcome.body, outcome.headers)
