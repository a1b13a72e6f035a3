"""GET /system/metrics: rates, failures and durations of functions, and the depth of the queue, over the last hour.

    history = History(sources, path, life)
    asyncio.create_task(history.run())
    await history.answer(request)                            # ?function=NAME&minutes=5
    history.save()                                           # at the end

    {"time", "known_since", "window_seconds", "workers": "counted" | "unknown",
     "queue": {"kind", "queued", "running", "dead", ...},    null while it cannot be asked
     "totals": {"calls", "errors", "per_minute", "p50_seconds", "p95_seconds", "in_flight"},
     "functions": {NAME: the same, and what it has "queued" and "running"},
     "minutes": [[epoch, calls, errors] | null, ...],        of ?function=, else of all
     "depth": [[epoch, queued, running, oldest_due_seconds], ...]}

Contract: the figures are those of /metrics, of all processes of this gateway and of the worker beside it, read when
they are asked for; so both say the same at the same moment.  They are kept over a restart of the gateway: a gateway
that is killed loses what came since the last `save`.  What cannot be known is null, or left out, and never zero:
workers of other machines, and those beside us that came after the start, count for themselves ("unknown").

What it refuses to do: look at calls that have ended, or fail because the queue does.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..calls.model import Backlog
from ..calls.names import BadFunctionName, FunctionName, parse_function_name
from ..calls.views import format_time
from ..functions.documents import parse_document, parse_time, write_whole
from ..queues import Queue
from ..watchdog import (
    Client,
    FaashoundError,
    Request,
    Response,
    Slot,
    Trouble,
    Url,
    in_thread,
    log,
    parse_number,
    reason_of,
)
from .answers import BadField, allow, parse_parameters
from .figures import (
    MINUTES_COUNT,
    NOTHING,
    Counted,
    Figures,
    Hour,
    Row,
    deltas,
    parse_worker_metrics,
    read_counters,
    sum_figures,
)

SAMPLED_EVERY_S = 10.0
SAVED_EVERY_S = 60.0
FRESH_S = 0.25  # a reading that is younger need not be taken again
WORKER_DEADLINE_S = 5.0
MAX_WORKER_BYTES = 64 << 20  # of a worker's /metrics: thousands of functions
DEPTHS_COUNT = int(MINUTES_COUNT * 60 / SAMPLED_EVERY_S)
WINDOW_MINUTES_COUNT = 5

Depth = tuple[int, int, int, float | None]


@dataclass(frozen=True, slots=True)
class Sources:
    """What is read: the gateway's counters, the queue, and the /metrics of the worker beside us, if it has them."""

    slot: Slot
    queue: Queue
    queue_kind: str
    worker: Url | None
    client: Client = field(default_factory=Client)

    async def read_worker(self) -> dict[str, Counted] | None:
        """Return what the worker has counted; None if it cannot be asked."""
        if self.worker is None:
            return None
        deadline_s = asyncio.get_running_loop().time() + WORKER_DEADLINE_S
        try:
            response = await self.client.request("GET", self.worker, deadline_s=deadline_s)
            async with response:
                text = await response.body.read(MAX_WORKER_BYTES)
        except FaashoundError:  # it starts, or is being started again; its own troubles are told elsewhere
            return None
        if response.status != 200:
            return None
        return await asyncio.to_thread(parse_worker_metrics, text.decode("utf-8", "replace"))


@dataclass(slots=True)
class Readings:
    """What was read last.  `worker` is None while it cannot be asked."""

    gateway: Mapping[str, Counted]
    worker: Mapping[str, Counted] | None = None
    worker_before: Mapping[str, Counted] = field(default_factory=dict)
    backlog: Backlog | None = None
    at_s: float = float("-inf")

    def in_flight(self, name: str) -> int:
        """Return how many calls of a function are under way, as far as is known."""
        known = (source.get(name, NOTHING) for source in (self.gateway, self.worker or {}))
        return sum(max(counted.started - counted.ended, 0) for counted in known)


class History:
    """The last hour of one gateway; `path` is None where nothing is kept, `life` tells its processes from others'."""

    def __init__(self, sources: Sources, path: Path | None, life: str, now: Callable[[], float] = time.time) -> None:
        self._sources = sources
        self._path = path
        self._life = life
        self._now = now
        self._lock = asyncio.Lock()
        self._has_failed = False
        self._trouble = Trouble(log.warning)
        self.misses_workers = False  # there are some beside us that cannot be asked
        kept = load_history(path) or Kept(now())
        self._hour = Hour(kept.since_s, kept.minutes)
        self._depths = deque(kept.depths, DEPTHS_COUNT)
        goes_on = kept.life == life  # another process of the same gateway: its counters have, and the worker's
        self._last = Readings(kept.gateway if goes_on else {}, worker_before=kept.worker if goes_on else {})

    @property
    def depth(self) -> Depth | None:
        """The newest sample of the queue; None if there is none yet."""
        return self._depths[-1] if self._depths else None

    async def run(self) -> None:
        """Take samples, and save them from time to time, until cancelled, which waits for a write that has begun."""
        saved_s = self._now()
        while True:
            await self.sample()
            if self._now() - saved_s >= SAVED_EVERY_S:
                saved_s = self._now()
                await in_thread(self._write, self._dump())
            await asyncio.sleep(SAMPLED_EVERY_S)

    async def sample(self, fresh_s: float = FRESH_S) -> None:
        """Read all sources, unless that was done less than `fresh_s` seconds ago."""
        async with self._lock:
            now_s = self._now()
            if 0 <= now_s - self._last.at_s < fresh_s:
                return
            worker, backlog = await asyncio.gather(self._sources.read_worker(), self._read_backlog())
            gateway = read_counters(self._sources.slot.scoreboard.counters.totals())
            before, counted = self._last, [(self._last.gateway, gateway)]
            if worker is not None:
                counted.append((before.worker_before, worker))
            now_s = self._now()
            for then, now in counted:
                for name, failed, buckets in deltas(then, now):
                    self._hour.add(now_s, name, failed, buckets)
            self._last = Readings(gateway, worker, before.worker_before if worker is None else worker, backlog, now_s)
            self._hour.touch(now_s)
            self._note_depth(now_s, backlog)

    async def _read_backlog(self) -> Backlog | None:
        try:
            found = await self._sources.queue.backlog()
        except FaashoundError as error:
            self._trouble.tell(f"no figures of the queue: {error}")
            return None
        self._trouble.over()
        return found

    def _note_depth(self, now_s: float, backlog: Backlog | None) -> None:
        if backlog is None or (self._depths and 0 <= now_s - self._depths[-1][0] < SAMPLED_EVERY_S / 2):
            return
        age_s = backlog.oldest_due_age_s
        self._depths.append(
            (int(now_s), backlog.queued_count, backlog.running_count, None if age_s is None else round(age_s, 1))
        )

    # -- answering

    async def answer(self, request: Request) -> Response:
        """Answer GET /system/metrics."""
        allow(request, "GET")
        wanted, minutes_count = parse_question(request.query)
        await self.sample()
        body = json.dumps(self._describe(wanted, minutes_count), separators=(",", ":")).encode() + b"\n"
        fields = ((b"Content-Type", b"application/json"), (b"Cache-Control", b"no-store"))
        return Response(200, fields, body)

    def _describe(self, wanted: FunctionName | None, minutes_count: int) -> dict[str, Any]:
        now_s, last = self._now(), self._last
        windows = self._hour.window(now_s, minutes_count)
        backlog = last.backlog
        waiting = {} if backlog is None else backlog.by_function
        in_flight = {name: last.in_flight(name) for name in last.gateway.keys() | (last.worker or {}).keys()}
        names = windows.keys() | waiting.keys() | {name for name, count in in_flight.items() if count}
        window_s = max(now_s - max((int(now_s // 60) - minutes_count + 1) * 60, self._hour.since_s), 1.0)
        idle = Figures(0, NOTHING.buckets, window_s)
        return {
            "time": format_time(now_s),
            "known_since": format_time(self._hour.since_s),
            "window_seconds": round(window_s, 1),
            "workers": "unknown" if last.worker is None or self.misses_workers else "counted",
            "queue": None if backlog is None else self._describe_queue(backlog),
            "totals": (sum_figures([*windows.values()]) if windows else idle).describe()
            | {"in_flight": sum(in_flight.values())},
            "functions": {
                name: windows.get(name, idle).describe()
                | {"in_flight": in_flight.get(name, 0)}
                | ({} if backlog is None else _describe_waiting(*waiting.get(FunctionName(name), (0, 0))))
                for name in sorted(names)
            },
            "minutes": self._hour.by_minute(now_s, wanted),
            "depth": list(self._depths),
        }

    def _describe_queue(self, backlog: Backlog) -> dict[str, object]:
        age_s = backlog.oldest_due_age_s
        return {
            "kind": self._sources.queue_kind,
            "queued": backlog.queued_count,
            "running": backlog.running_count,
            "dead": backlog.dead_count,
            "callbacks_pending": backlog.callback_pending_count,
            "callbacks_dead": backlog.callback_dead_count,
            "oldest_due_seconds": None if age_s is None else round(age_s, 3),
        }

    # -- keeping

    def _dump(self) -> dict[str, object]:
        """Return what is kept, as it is now: what changes later is not in it."""
        return {
            "life": self._life,
            "since_s": self._hour.since_s,
            "minutes": self._hour.copy(),
            "depths": list(self._depths),
            "gateway": dict(self._last.gateway),
            "worker": dict(self._last.worker_before),
        }

    def save(self) -> None:
        """Keep the hour, with what the gateway has counted since the last sample."""
        gateway = read_counters(self._sources.slot.scoreboard.counters.totals())
        for name, failed, buckets in deltas(self._last.gateway, gateway):
            self._hour.add(self._now(), name, failed, buckets)
        self._last.gateway = gateway
        self._write(self._dump())

    def _write(self, kept: dict[str, object]) -> None:
        if self._path is None:
            return
        try:
            write_whole(self._path, json.dumps(kept, separators=(",", ":")).encode())
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                log.warning(f"the last hour's figures will not survive a restart: {self._path}: {error.strerror}")
            self._has_failed = True


def _describe_waiting(queued_count: int, running_count: int) -> dict[str, object]:
    return {"queued": queued_count, "running": running_count}


def parse_question(query: bytes) -> tuple[FunctionName | None, int]:
    """Return what ?function=NAME&minutes=5 asks for; raises BadField."""
    parameters = parse_parameters(query)
    text = parameters.get("minutes", str(WINDOW_MINUTES_COUNT))
    try:
        minutes_count = parse_number(text, 1, MINUTES_COUNT)
    except ValueError as error:
        raise BadField(f"minutes={text[:20]!r}: {error}") from None
    name = parameters.get("function")
    try:
        return None if name is None else parse_function_name(name), minutes_count
    except BadFunctionName as error:
        raise BadField(f"function: {error}") from None


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of an hour: as it is in the file, and of which life of the gateway the counters are."""

    since_s: float
    life: str = ""
    minutes: Mapping[int, Mapping[str, Row]] = field(default_factory=dict)
    depths: Sequence[Depth] = ()
    gateway: Mapping[str, Counted] = field(default_factory=dict)
    worker: Mapping[str, Counted] = field(default_factory=dict)


def load_history(path: Path | None) -> Kept | None:
    """Return what was kept; None if nothing was, with a warning if it cannot be read."""
    if path is None:
        return None
    try:
        return parse_history(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning(f"the figures of the last hour begin anew: {path}: {reason_of(error, path)}")
        return None


def parse_history(text: bytes) -> Kept:
    """Return what a file has kept; ValueError if it is none of ours."""
    found = parse_document(text)
    try:
        return Kept(
            parse_time(found["since_s"]),
            str(found["life"]),
            {int(minute): {name: _row(row) for name, row in rows.items()} for minute, rows in found["minutes"].items()},
            [_depth(*sample) for sample in found["depths"]],
            {name: _counted(row) for name, row in found["gateway"].items()},
            {name: _counted(row) for name, row in found["worker"].items()},
        )
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not a history of ours") from None


def _depth(at_s: Any, queued: Any, running: Any, age_s: Any) -> Depth:
    return int(parse_time(at_s)), int(queued), int(running), None if age_s is None else float(age_s)


def _row(values: Sequence[int]) -> Row:
    if len(values) != len(NOTHING.buckets) + 1:
        raise ValueError(f"{len(values)} figures of a minute; allowed: {len(NOTHING.buckets) + 1}")
    return tuple(map(int, values))


def _counted(values: Sequence[Any]) -> Counted:
    started, failed, buckets = values
    return Counted(int(started), int(failed), _row((0, *buckets))[1:])
