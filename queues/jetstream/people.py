"""What people and housekeeping ask of the queue: lists, figures, deletions, and what is old.

Nothing here is on the way of a call.  Lists read backwards from the newest message, a window at a time; figures are the
servers' own counts of subjects; only what runs is asked of the workers, who know it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable

from ...calls.model import (
    FINAL,
    Backlog,
    Call,
    CallUnknown,
    Changes,
    QueueDamaged,
    State,
    Stats,
    StoredBody,
    Swept,
)
from ...calls.names import FunctionName
from ...calls.steps import expire, may_forget, may_purge
from ...calls.views import CallFilter
from .bodies import Bodies
from .connection import PAGE_COUNT, STEP_COUNT, WRITE_S, Connection, RevisionChanged, Stored, gather_in_steps
from .flows import Delivery, Flows, Wanted
from .owners import Owners
from .records import Kept, Standing, join, read_record, read_waiting, tell_damaged
from .store import Store
from .subjects import PLACES, TIMERS, UNDELIVERED, FlowName, Place, parse_token

WINDOW_COUNT = 256  # revisions that are looked at together, to begin with
TIMER_COUNT = 256  # calls whose expiry is looked at together
TIMER_PAUSE_S = 60.0  # before a call that was running when it should have expired is looked at again
PUT_S = 60.0  # that a timer stays though its call is not there: it is written first, and WRITE_S lies between at most
PUT_PAUSE_S = WRITE_S  # before such a timer is looked at again
IDLE_FLOW_S = 86400.0  # after which a flow into which no call is put is forgotten
ID_PLACES = 2, 3  # of a call's id in the subjects of what waits and of records
FRONT_COUNT = 64  # messages that are looked at to find the oldest one of a flow that waits


_MARK = re.compile(r"n([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


def places_of(states: Iterable[State]) -> list[Place]:
    """Return where the records of calls in these final states are."""
    places: list[Place] = []
    for state in states:
        places += [PLACES[state], *([UNDELIVERED[state]] if state in UNDELIVERED else [])]
    return places


def listed(call: Call) -> Call:
    """Return a call as lists have it."""
    body = StoredBody(call.body.bytes_count, None, call.body.file)
    result = call.result and StoredBody(call.result.bytes_count, None, call.result.file)
    return dataclasses.replace(call, body=body, result=result, history=())


def fits(call: Call, wanted: CallFilter) -> bool:
    """Tell whether a call meets the conditions of `wanted`."""
    callback = call.callback and call.callback.state
    return (
        wanted.state in (None, call.state)
        and wanted.function in (None, call.function)
        and wanted.callback in (None, callback)
    )


def _parse_mark(text: str) -> list[int] | None:
    found = _MARK.fullmatch(text)
    return found and [int(found[1]), int(found[2])]


class People:
    """The answers of one process."""

    def __init__(
        self,
        connection: Connection,
        store: Store,
        flows: Flows,
        owners: Owners,
        bodies: Bodies,
        now: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._names = connection.names
        self._store = store
        self._flows = flows
        self._owners = owners
        self._bodies = bodies
        self._now = now

    # -- lists

    async def page(self, wanted: CallFilter) -> list[Call]:
        """A page of what is wanted; a call is found by its whole id, since a subject cannot be searched by a part."""
        if wanted.id_start is not None:
            standing = await self._store.load(wanted.id_start)
            found = [] if standing is None or wanted.before is not None else [listed(standing.call)]
            return [call for call in found if fits(call, wanted)]
        if wanted.callback is None:
            return await self.calls(wanted.state, wanted.function, wanted.limit_count, wanted.before)
        chosen: list[Call] = []
        before = wanted.before
        while len(chosen) < wanted.limit_count:
            page = await self.calls(wanted.state, wanted.function, PAGE_COUNT, before)
            chosen += [call for call in page if fits(call, wanted)]
            if len(page) < PAGE_COUNT:
                break
            before = page[-1].id
        return chosen[: wanted.limit_count]

    async def changes(self, mark: str | None, limit: int) -> Changes:
        """The calls that were put, or whose record was written, since the revisions that `mark` stands for."""
        streams = (self._names.queue, self._names.records)
        now = [(await self._connection.info(stream))["state"]["last_seq"] for stream in streams]
        new_mark, before = "n{}-{}".format(*now), None if mark is None else _parse_mark(mark)
        if before is None:
            return Changes((), new_mark, is_whole=mark is None)
        subjects = (self._names.subject("call", "*", "*", "*"), self._names.subject("rec", "*", "*", "*"))
        found: dict[str, None] = {}
        for subject, revision, place in zip(subjects, before, ID_PLACES, strict=True):
            page = await self._connection.read_batch(subject, revision + 1, limit + 1)
            found |= dict.fromkeys(parse_token(stored.subject.split(".")[place]) for stored in page)
        standings = await gather_in_steps(self._store.load, list(found)[:limit])
        calls = [listed(standing.call) for standing in standings if standing is not None]
        return Changes(calls, new_mark, is_whole=len(found) <= limit)

    async def calls(
        self, state: State | None, function: FunctionName | None, limit: int, before: str | None
    ) -> list[Call]:
        """A page: what waits and runs, newest first, then what has ended, the last end first."""
        if state is State.RUNNING:
            return await self._running(function, limit, before)
        below_waiting, below_ended = await self._place(before)
        found: list[Call] = []
        if state in (None, State.QUEUED) and below_waiting != 0:
            async for call in self._waiting(function, below_waiting):
                if len(found) < limit and state in (None, call.state) and call.state not in FINAL:
                    found.append(listed(call))
                if len(found) >= limit:
                    return found
        if state in (None, *FINAL):
            states = [each for each in State if each in FINAL and state in (None, each)]
            async for standing in self._ended(states, function, below_ended):
                if len(found) >= limit:
                    break
                found.append(listed(standing.call))
        return found[:limit]

    async def _place(self, before: str | None) -> tuple[int | None, int | None]:
        """Below which revisions a page begins, among what waits and what has ended; None: at the newest."""
        if before is None:
            return None, None
        waiting, kept = await asyncio.gather(self._store.find_waiting(before), self._store.find_record(before))
        if kept is not None and kept.record.state in FINAL:
            return 0, kept.revision
        if waiting is None:
            raise CallUnknown(f"no call has the id {before}")
        return waiting.revision, None

    async def _running(self, function: FunctionName | None, limit: int, before: str | None) -> list[Call]:
        ids = [call_id for call_id, name, _ in await self._owners.census() if function in (None, name)]
        last = None if before is None else await self._store.load(before)
        if before is not None and last is None:
            raise CallUnknown(f"no call has the id {before}")
        found = await gather_in_steps(self._store.load, ids)
        calls = [each.call for each in found if each is not None and each.record.state is State.RUNNING]
        calls.sort(key=lambda call: (call.accepted_s, call.id), reverse=True)
        if last is not None:
            end = last.accepted.accepted_s, last.id
            calls = [call for call in calls if (call.accepted_s, call.id) < end]
        return [listed(call) for call in calls[:limit]]

    async def _waiting(self, function: FunctionName | None, below: int | None) -> AsyncIterator[Call]:
        """The calls whose message waits, newest first, as their records have them."""
        async for page in self._walk_back(self._names.queue, [self._names.waiting_for(function)], below):
            for start in range(0, len(page), STEP_COUNT):  # who lists may want no more than the first of them
                batch = page[start : start + STEP_COUNT]
                records = await asyncio.gather(*map(self._store.find_record, map(_id_of, batch)))
                for stored, kept in zip(batch, records, strict=True):
                    if (accepted := read_waiting(stored)) is not None:
                        yield join(kept, accepted).call

    async def _ended(
        self, states: list[State], function: FunctionName | None, below: int | None
    ) -> AsyncIterator[Standing]:
        subjects = [self._names.records_at(place, function) for place in places_of(states)]
        async for page in self._walk_back(self._names.records, subjects, below):
            for stored in page:
                kept = read_record(stored)
                if kept is not None and kept.accepted is not None and kept.record.state in states:
                    yield Standing(kept.accepted, kept.record, kept.revision, kept.place)

    async def _walk_back(self, stream: str, subjects: list[str], below: int | None) -> AsyncIterator[list[Stored]]:
        """Yield the messages of some filters, newest first, a window of revisions at a time."""
        state = (await self._connection.info(stream))["state"]
        first, high, width = state["first_seq"], below or state["last_seq"] + 1, WINDOW_COUNT
        while high > first:
            low = max(first, high - width)
            pages = await asyncio.gather(*(self._window(subject, low, high) for subject in subjects))
            found = sorted((stored for page in pages for stored in page), key=lambda each: -each.revision)
            yield found
            high, width = low, width if len(found) > WINDOW_COUNT // 4 else 4 * width

    async def _window(self, subject: str, low: int, high: int) -> list[Stored]:
        found: list[Stored] = []
        while low < high:
            page = await self._connection.read_batch(subject, low, min(PAGE_COUNT, high - low))
            found += [stored for stored in page if stored.revision < high]
            low = page[-1].revision + 1 if page else high
        return found

    async def walk_waiting(self, function: FunctionName | None) -> AsyncIterator[str]:
        """Yield the ids of the calls whose message waits, oldest first; some may run, or have ended."""
        async for stored in self._connection.walk(self._names.waiting_for(function)):
            yield _id_of(stored)

    # -- deletions

    async def purge(self, state: State, function: FunctionName | None, call_id: str | None) -> int:
        """Delete one call, or all in a state, unless a callback is under way; return how many."""
        if call_id is not None:
            standing = await self._store.load(call_id)
            if standing is None or not may_purge(standing.record, state):
                return 0
            return int(await self._store.forget(standing))
        return await self._forget_all(self._may_go(state, function))

    async def _may_go(self, state: State, function: FunctionName | None) -> AsyncIterator[Kept]:
        for place in places_of([state]):
            async for kept in self._store.walk(place, function):
                if may_purge(kept.record, state):
                    yield kept

    async def _forget_all(self, records: AsyncIterator[Kept]) -> int:
        count, batch = 0, list[Kept]()
        async for kept in records:
            batch.append(kept)
            if len(batch) == STEP_COUNT:
                count += sum(await gather_in_steps(self._store.forget, batch))
                batch.clear()
        return count + sum(await gather_in_steps(self._store.forget, batch))

    # -- figures

    async def stats(self) -> Stats:
        """The queue in figures, by the servers' counts."""
        await self._flows.flush()
        names = await self._flows.refresh()
        running = await self._owners.census()
        waiting = dict(zip(names, await self._count_all(map(self._names.filter, names)), strict=True))
        by_function = self._count_waiting(waiting, running)
        functions = sorted({FunctionName(each.name) for each in names if each.kind == "call"})
        by_state = dict.fromkeys(State, 0)
        for (_, state), count in by_function.items():
            by_state[state] += count
        by_state |= await self._count_ended(by_function, functions, running)
        by_queue = Counter({name.queue: 0 for name in names if name.kind != "timer"})
        for name, count in waiting.items():
            if name.kind != "timer":
                by_queue[name.queue] += count
        by_queue.subtract(queue for _, _, queue in running)
        undelivered = await self._count_all(map(self._names.records_at, UNDELIVERED.values()))
        return Stats(
            by_state=by_state,
            by_function={key: count for key, count in by_function.items() if count > 0},
            waiting=Counter({queue: count for queue, count in by_queue.items() if count > 0}),
            oldest_due_ages_s=await self._oldest_ages_s(waiting, {call_id for call_id, _, _ in running}),
            callback_pending_count=sum(count for name, count in waiting.items() if name.kind == "callback"),
            callback_dead_count=sum(undelivered),
            commit_count=self._connection.commit_count,
        )

    async def backlog(self) -> Backlog:
        """What is still to be done, by the servers' counts."""
        stats = await self.stats()
        functions = {function for function, _ in stats.by_function}
        open_counts = {
            function: (
                stats.by_function.get((function, State.QUEUED), 0),
                stats.by_function.get((function, State.RUNNING), 0),
            )
            for function in functions
        }
        return Backlog(
            queued_count=stats.by_state[State.QUEUED],
            running_count=stats.by_state[State.RUNNING],
            dead_count=stats.by_state[State.DEAD],
            callback_pending_count=stats.callback_pending_count,
            callback_dead_count=stats.callback_dead_count,
            oldest_due_age_s=stats.oldest_due_age_s,
            by_function={function: counts for function, counts in open_counts.items() if any(counts)},
        )

    async def _count_all(self, subjects: Iterable[str]) -> list[int]:
        return await gather_in_steps(self._connection.count, subjects)

    def _count_waiting(
        self, waiting: dict[FlowName, int], running: list[tuple[str, str, str]]
    ) -> Counter[tuple[FunctionName, State]]:
        counts: Counter[tuple[FunctionName, State]] = Counter()
        for name, count in waiting.items():
            if name.kind == "call":
                counts[FunctionName(name.name), State.QUEUED] += count
        for _, function, _ in running:
            counts[FunctionName(function), State.QUEUED] -= 1
            counts[FunctionName(function), State.RUNNING] += 1
        return counts

    async def _count_ended(
        self,
        counts: Counter[tuple[FunctionName, State]],
        functions: list[FunctionName],
        running: list[tuple[str, str, str]],
    ) -> dict[State, int]:
        """Add what has ended, and return how much that is, also of functions that are called no more.

        Places that hold nothing at all are not asked for each function.
        """
        ended: dict[State, int] = {}
        for state in FINAL:
            places = places_of([state])
            totals = await self._count_all(map(self._names.records_at, places))
            ended[state] = sum(totals)
            for place in (place for place, total in zip(places, totals, strict=True) if total):
                found = await self._count_all(self._names.records_at(place, each) for each in functions)
                for function, count in zip(functions, found, strict=True):
                    counts[function, state] += count
        for _, name, _ in running:
            counts[FunctionName(name), State.DONE] -= 1  # their records are where those of the ended will be
        ended[State.DONE] -= len(running)
        return ended

    async def _oldest_ages_s(self, waiting: dict[FlowName, int], running: set[str]) -> dict[str, float]:
        """How long the oldest due call of each queue has waited, by the first messages of each flow that do not run."""
        flows = [name for name, count in waiting.items() if count and name.kind == "call"]
        fronts = await gather_in_steps(
            lambda name: self._connection.read_batch(self._names.filter(name), 1, FRONT_COUNT), flows
        )
        now_s, ages_s = self._now(), dict[str, float]()
        for name, front in zip(flows, fronts, strict=True):
            for call in map(read_waiting, front):
                if call is not None and call.id not in running and call.due_s <= now_s:
                    ages_s[name.queue] = max(now_s - call.due_s, ages_s.get(name.queue, 0.0))
        return ages_s

    # -- housekeeping

    async def sweep(self, results_s: float, calls_s: float) -> Swept:
        """Drop what is old and was not dropped by the servers, and bodies of no call."""
        now_s, before_bytes = self._now(), await self._size_bytes()
        calls = await self._forget_all(self._old(now_s - calls_s))  # first: what follows writes, and needs room
        await self._store.tell_retention(results_s, calls_s)
        expired = await self.expire_due()
        files = await self._drop_orphans()
        await self._flows.forget_idle(time.time() - IDLE_FLOW_S)
        return Swept(expired, 0, calls, files, max(0, before_bytes - await self._size_bytes()))

    async def _size_bytes(self) -> int:
        streams = (self._names.queue, self._names.records, self._names.bodies)
        return sum([(await self._connection.info(name))["state"]["bytes"] for name in streams])

    async def expire_due(self) -> int:
        """End the calls that have waited too long; their timers tell."""
        count = 0
        wanted = Wanted("timer", (TIMERS.queue,), TIMER_COUNT, {}, TIMER_PAUSE_S)
        while deliveries := await self._flows.fetch(wanted):
            count += sum(await asyncio.gather(*map(self._expire, deliveries)))
        return count

    async def _expire(self, timer: Delivery) -> bool:
        try:
            return await self._expire_readable(timer)
        except QueueDamaged as error:  # the other calls expire all the same
            tell_damaged(f"it cannot be told whether the call {timer.call_id} has expired: {error}")
            await self._flows.nak(timer, TIMER_PAUSE_S)
            return False

    async def _expire_readable(self, timer: Delivery) -> bool:
        while True:
            standing = await self._store.load(timer.call_id)
            if standing is None or (standing.place == "held" and standing.record.expires_s is None):
                await self._await_call(timer)
                return False
            record = standing.record
            if record.state in FINAL or record.expires_s is None:
                await self._flows.ack(timer)
                return False
            left_s = record.expires_s - self._now()
            if left_s > 0 or record.state is State.RUNNING:
                await self._flows.nak(timer, max(left_s, TIMER_PAUSE_S if record.state is State.RUNNING else 0.0))
                return False
            try:
                expired = await self._store.save(standing, expire(record, self._now()))
            except RevisionChanged:
                continue
            await self._store.follow_end(standing, expired)
            await self._flows.ack(timer)
            return True

    async def _await_call(self, timer: Delivery) -> None:
        """Keep a timer whose call may be on its way, put or let go; drop one of a call that is gone, or never came."""
        stored = await self._connection.load(self._names.timer(timer.call_id))
        if stored is not None and time.time() - stored.stored_s < PUT_S:
            await self._flows.nak(timer, PUT_PAUSE_S)
        else:
            await self._flows.ack(timer)

    async def _old(self, before_s: float) -> AsyncIterator[Kept]:
        for place in places_of([State.DONE, State.CANCELLED, State.EXPIRED]):
            async for kept in self._store.walk(place):
                if may_forget(kept.record, before_s):
                    yield kept
                elif kept.record.finished_s is not None and kept.record.finished_s >= before_s:
                    break  # what comes behind has ended later

    async def _drop_orphans(self) -> int:
        """Remove old bodies that no call names; one that is still to be read is named by its call."""
        count = 0
        async for body, call_id in self._bodies.walk_old():
            if body.file not in await self._files_of(call_id, body.file):
                await self._bodies.drop(body)
                count += 1
        return count

    async def _files_of(self, call_id: str | None, file: str | None) -> set[str | None]:
        """The bodies that a call names; one that cannot be read may name `file`."""
        try:
            standing = None if call_id is None else await self._store.load(call_id)
        except QueueDamaged as error:
            tell_damaged(f"the body of a call that cannot be read is kept: {error}", call_id=str(call_id))
            return {file}
        answer = None if standing is None else standing.record.answer
        named = [standing and standing.accepted.body, answer and answer.result]
        return {each.file for each in named if each is not None}


def _id_of(stored: Stored) -> str:
    return parse_token(stored.subject.split(".")[2])
