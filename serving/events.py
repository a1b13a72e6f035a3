"""GET /system/events: what changes, as it changes, in the form of server-sent events (HTML Living Standard 9.2).

    events = Events(queue, history, followers)
    asyncio.create_task(events.run())
    response = events.answer(request)
    events.functions_changed()
    events.drain()

    event: calls        {"calls": [as /system/calls has them], "more": false}; `more`: read your lists again
    event: depth        [epoch, queued, running, oldest_due_seconds], as in /system/metrics
    event: functions    {}; read /system/functions again

Contract: the id of an event is a mark of the queue.  A client that comes back with it as Last-Event-ID, at whatever
gateway, is told first what has changed meanwhile, or that it was too much to be told; some of it may be told twice.
All readers share one look at the queue, twice a second and only while there are readers; what it finds is kept for a
while in one place, so that a reader that stalls slows no other, costs no memory, and is told `more` when it goes on.

What it refuses: more readers than followers.py has places for (503; a client then asks /system/calls now and then).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from ..calls.model import Call, CallbackState, Changes, State
from ..calls.views import describe_call
from ..queues import Queue
from ..watchdog import FaashoundError, Request, Response, log
from .answers import allow
from .followers import Followers
from .history import History

LOOKED_EVERY_S = 0.5
HEARTBEAT_S = 15.0  # proxies cut connections that are silent for a minute, and a client that has gone is noticed
CALLS_AT_ONCE_COUNT = 100  # in one event
KEPT_COUNT = 64  # events that a reader may be behind
LEASED_COUNT = 1000  # calls that ran when we began to look
OPENING = b"retry: 2000\n\n"

Shown = tuple[object, ...]


def build_event(kind: str, data: object, mark: str | None) -> bytes:
    """Return one event as it is sent; JSON has no line breaks in it."""
    head = f"event: {kind}\n" if mark is None else f"id: {mark}\nevent: {kind}\n"
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def build_calls(calls: Sequence[Call], mark: str, *, more: bool) -> bytes:
    """Return the event that tells of calls."""
    return build_event("calls", {"calls": [describe_call(call) for call in calls], "more": more}, mark)


def is_leased(call: Call) -> bool:
    """Tell whether a call runs, or its callback is on its way: when that ends, the lists of a queue do not show it."""
    return call.state is State.RUNNING or (call.callback is not None and call.callback.state is CallbackState.RUNNING)


def _shown(call: Call) -> Shown:
    callback = call.callback and (call.callback.state, call.callback.attempts)
    return call.state, call.attempts, call.due_s, call.cancel_requested, callback


class Events:
    """What has changed lately in one queue, for any number of readers."""

    def __init__(self, queue: Queue, history: History, readers: Followers) -> None:
        self._queue = queue
        self._history = history
        self._kept: deque[bytes] = deque(maxlen=KEPT_COUNT)
        self._count = 0  # of events so far: the last of `_kept` is the last of these
        self._mark: str | None = None
        self._leased: set[str] = set()
        self._told: dict[str, Shown] = {}
        self._depth = history.depth
        self._readers = readers
        self._wanted = asyncio.Event()
        self._begun = asyncio.Event()
        self._news = asyncio.Event()
        self._draining = False

    def drain(self) -> None:
        """Let go of all readers."""
        self._draining = True
        self._wake()

    def functions_changed(self) -> None:
        """Tell that functions were deployed, changed or removed."""
        self._add(build_event("functions", {}, None))

    def answer(self, request: Request) -> Response:
        """Answer GET /system/events; raises TooManyFollowers."""
        allow(request, "GET")
        mark = (request.header(b"last-event-id") or b"").decode("latin-1") or None
        fields = (
            (b"Content-Type", b"text/event-stream"),
            (b"Cache-Control", b"no-store"),
            (b"X-Accel-Buffering", b"no"),
        )
        if request.method == "HEAD":
            return Response(200, fields)
        body = self._readers.join(request, self._follow(mark))
        self._wanted.set()
        return Response(200, fields, body, None, math.inf, is_live=True)

    async def _follow(self, mark: str | None) -> AsyncGenerator[bytes, None]:
        await self._begun.wait()  # or what changes between this reader's mark and the one of all would be told to none
        position = self._count
        yield OPENING + await self._catch_up(mark)
        while not self._draining:
            if position == self._count:
                if await self._is_silent():
                    yield b":\n\n"
                continue
            missed = self._count - position > len(self._kept)
            if missed:
                position = self._count
                yield build_calls((), self._mark or "", more=True)
            else:
                position += 1
                yield self._kept[position - self._count - 1]

    async def _is_silent(self) -> bool:
        """Wait for news; return True if there have been none for so long that a client should hear that we live."""
        news = self._news
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await news.wait()
        except TimeoutError:
            return True
        return False

    async def _catch_up(self, mark: str | None) -> bytes:
        """Return the event that tells what has changed since `mark`, or from where on changes will be told."""
        try:
            changes = await self._queue.changes(mark, tuple(self._leased), CALLS_AT_ONCE_COUNT)
        except FaashoundError:
            return b""
        return build_calls(changes.calls, changes.mark, more=not changes.is_whole)

    # -- looking

    async def run(self) -> None:
        """Look at the queue while there are readers, until cancelled."""
        while True:
            await self._wanted.wait()
            await self._begin()
            self._begun.set()
            while self._readers.count:
                await asyncio.sleep(LOOKED_EVERY_S)
                await self._look()
            self._wanted.clear()
            self._begun.clear()

    async def _begin(self) -> None:
        """Learn where the queue stands: what was told to readers before is no matter to those who come now."""
        self._told.clear()
        try:
            self._mark = (await self._queue.changes(None, (), 1)).mark
            running = await self._queue.calls(state=State.RUNNING, limit=LEASED_COUNT)
            called_back = await self._queue.calls(callback=CallbackState.RUNNING, limit=LEASED_COUNT)
        except FaashoundError as error:
            log.warning(f"what changes in the queue cannot be told: {error}")
        else:
            self._leased = {call.id for call in (*running, *called_back)}

    async def _look(self) -> None:
        depth = self._history.depth
        if depth is not None and depth != self._depth:
            self._depth = depth
            self._add(build_event("depth", depth, None))
        try:
            changes = await self._queue.changes(self._mark, tuple(self._leased), CALLS_AT_ONCE_COUNT)
        except FaashoundError:  # readers see it by their own requests; the log has it from the samples
            return
        self._take(changes)

    def _take(self, changes: Changes) -> None:
        """Tell what is new in `changes`: what ended lately is found more than once, and may be too much each time."""
        told, more = self._told, not changes.is_whole and changes.mark != self._mark
        new = [call for call in changes.calls if told.get(call.id) != _shown(call)]
        for call in changes.calls:
            (self._leased.add if is_leased(call) else self._leased.discard)(call.id)
        self._told = {call.id: _shown(call) for call in changes.calls}
        self._mark = changes.mark
        if new or more:
            self._add(build_calls(new, changes.mark, more=more))

    def _add(self, event: bytes) -> None:
        self._kept.append(event)
        self._count += 1
        self._wake()

    def _wake(self) -> None:
        """Wake those who wait now; who comes later waits for the next."""
        self._news.set()
        self._news = asyncio.Event()
