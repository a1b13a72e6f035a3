"""Puts a call into the queue for each tick of a schedule.

    scheduler = Scheduler(local.table, queue, state / "schedules")
    task = asyncio.create_task(scheduler.run())
    scheduler.describe()                                # for GET /system/schedules

What a tick is, and which are due, schedules.py says.  Here are the clock, the queue, and a file that tells after a
restart how far the schedules were looked at: ticks since then are due, as far as they are made up for at all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..calls.model import FINAL, CallDamaged, CallExists, KeyReused, NewCall, TooManyQueued
from ..calls.names import FunctionName
from ..queues import Queue
from ..watchdog import FaashoundError, Trouble, log, reason_of
from .documents import parse_document, parse_time, write_whole
from .schedules import HEADERS, Expression, Schedule, Tick, due_ticks, parse_schedules
from .table import Function

LOOK_S = 15.0  # the clock may be set: how long to sleep at most
EARLY_S = 0.002  # by which a timer of the loop may ring before its time


@dataclass(frozen=True, slots=True)
class Seen:
    """How far an expression was looked at, and its last tick that was put."""

    looked_s: float
    last_s: float | None = None


def key_of(name: FunctionName, expression: Expression) -> str:
    """Return what an expression of a function is called in the state file."""
    return f"{name} {expression.text}"


class Scheduler:
    """Puts a call into `queue` for each tick of the functions of `table`, which may change at any time.

    `state` is a file that says how far it has looked; None: what comes while no gateway runs is never made up for.
    `on_refused` is told what a look was broken off by.
    """

    def __init__(
        self,
        table: Mapping[FunctionName, Function],
        queue: Queue,
        state: Path | None = None,
        now: Callable[[], float] = time.time,
        on_refused: Callable[[FaashoundError], None] = lambda error: None,
    ) -> None:
        self._table = table
        self._queue = queue
        self._state = state
        self._now = now
        self._on_refused = on_refused
        self._known: dict[str, Seen] = {}
        self._parsed: dict[FunctionName, tuple[Mapping[str, str], Schedule]] = {}
        self._refused: set[str] = set()  # expressions that could not be put, which has been told
        self._trouble, self._state_trouble = Trouble(log.error), Trouble(log.warning)
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """The table has changed."""
        self._changed.set()

    async def run(self) -> None:
        """Put what is due, for ever."""
        self._known = self._read_state()
        while True:
            self._changed.clear()
            looked_s = self._now()
            try:
                await self.look(looked_s)
                self._trouble.over()
            except FaashoundError as error:
                looked_s = self._now()
                self._on_refused(error)
                self._trouble.tell(f"a scheduled call could not be queued, it is tried again: {error}")
            # What has come due during the look is due now, and a timer may ring a little before its time.
            wait_s = min(max(self._next_s(looked_s) - self._now(), 0.0) + EARLY_S, LOOK_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):  # wait_for swallows a cancellation that comes with the event
                    await self._changed.wait()

    async def look(self, now_s: float) -> None:
        """Put all that is due by now; raises the queue's errors, and then what is left is due at the next look."""
        seen = dict[str, Seen]()
        for function, schedule in self._schedules():
            for expression in schedule.expressions:
                key = key_of(function.name, expression)
                known = self._known.get(key, Seen(now_s))
                try:
                    known = Seen(now_s, await self._put_due(function, schedule, expression, known, now_s))
                    self._refused.discard(key)
                except (TooManyQueued, CallDamaged) as error:  # that is for this function alone: the others have a turn
                    self._tell_refused(key, error)
                self._known[key] = seen[key] = known
        if seen or self._known:
            self._known = seen
            await asyncio.to_thread(self._write_state, seen)

    def _tell_refused(self, key: str, error: FaashoundError) -> None:
        if key not in self._refused:
            log.error(f"a scheduled call could not be queued, it is tried again: {error}")
        self._refused.add(key)

    async def _put_due(
        self, function: Function, schedule: Schedule, expression: Expression, known: Seen, now_s: float
    ) -> float | None:
        """Put what is due of one expression; return the time of the last tick that was put."""
        last_s = known.last_s
        only = dataclasses.replace(schedule, expressions=(expression,))
        for tick in due_ticks(function.name, only, min(known.looked_s, now_s), now_s):
            if schedule.skips_overlap and await self._still_runs(tick, last_s):
                log.info(f"the scheduled call of {function.name.short} is skipped: the last one still runs")
            else:
                await self._put(function, schedule, tick)
                last_s = tick.at_s
        return last_s

    def describe(self) -> list[dict[str, object]]:
        """Return what GET /system/schedules tells: a row for each expression."""
        now_s, rows = self._now(), list[dict[str, object]]()
        for function, schedule in self._schedules():
            for expression in schedule.expressions:
                last_s = self._known.get(key_of(function.name, expression), Seen(now_s)).last_s
                last = None if last_s is None else Tick(function.name, expression, last_s)
                next_s = expression.next_s(now_s)
                rows.append(
                    {
                        "function": function.name.name,
                        "namespace": function.name.namespace,
                        "schedule": expression.text,
                        "next": _rfc3339(next_s) if next_s < float("inf") else None,
                        "last": _rfc3339(last.at_s) if last else None,
                        "lastCallId": last.call_id if last else None,
                    }
                )
        return rows

    def _schedules(self) -> Iterator[tuple[Function, Schedule]]:
        for function in list(self._table.values()):
            known = self._parsed.get(function.name)
            if known is None or known[0] != function.annotations:
                known = self._parsed[function.name] = function.annotations, parse_schedules(function.annotations)
            if known[1].expressions:
                yield function, known[1]

    def _next_s(self, looked_s: float) -> float:
        times = (each.next_s(looked_s) for _, schedule in self._schedules() for each in schedule.expressions)
        return min(times, default=float("inf"))

    async def _put(self, function: Function, schedule: Schedule, tick: Tick) -> None:
        accepted_s, body = self._now(), await self._queue.store_body(schedule.body)
        call = NewCall(
            id=tick.call_id,
            function=function.name,
            queue=function.queue,
            method="POST",
            path="",
            query="",
            headers=(*HEADERS, ("X-Call-Id", tick.call_id), ("X-Start-Time", f"{int(accepted_s * 1e9)}")),
            body=body,
            callback_url=None,
            due_s=tick.at_s,
            expires_s=None,
            idempotency_key=tick.key,
            accepted_s=accepted_s,
            body_digest=hashlib.sha256(tick.key.encode()).hexdigest(),
        )
        try:
            if await self._queue.put(call) is call:  # else it was in the queue: another gateway has put it
                log.info(f"Queued the scheduled call of {function.name.short}", call_id=call.id)
        except (CallExists, KeyReused):  # another gateway has put it, or we had before a restart
            await self._queue.drop_body(body)

    async def _still_runs(self, tick: Tick, last_s: float | None) -> bool:
        if last_s is None or last_s == tick.at_s:
            return False
        call = await self._queue.get(dataclasses.replace(tick, at_s=last_s).call_id)
        return call is not None and call.state not in FINAL

    def _read_state(self) -> dict[str, Seen]:
        try:
            return {} if self._state is None else parse_state(self._state.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = reason_of(error, self._state)
            log.warning(f"{self._state}: {reason}; scheduled calls of before are not made up for")
            return {}

    def _write_state(self, seen: Mapping[str, Seen]) -> None:
        if self._state is None:
            return
        try:
            write_whole(
                self._state, json.dumps({key: (each.looked_s, each.last_s) for key, each in seen.items()}).encode()
            )
        except OSError as error:
            self._state_trouble.tell(
                f"{self._state}: {error.strerror}; how far schedules were looked at is not known after a restart"
            )
        else:
            self._state_trouble.over()


def parse_state(text: bytes) -> dict[str, Seen]:
    """Return how far a file says that each expression was looked at; ValueError if it is none of ours."""
    found = parse_document(text)
    if not isinstance(found, dict) or not all(isinstance(row, list) and len(row) == 2 for row in found.values()):
        raise ValueError("not two times for each schedule")
    return {
        key: Seen(parse_time(looked_s), None if last_s is None else parse_time(last_s))
        for key, (looked_s, last_s) in found.items()
    }


def _rfc3339(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
