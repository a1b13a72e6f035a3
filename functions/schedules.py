"""Calls at set times: what annotations ask for, and when it is due.  Pure; scheduler.py puts the calls.

    topic = "cron-function"                            the annotation by which OpenFaaS' cron connector knows a function
    schedule = "*/5 * * * *"                           five fields, @hourly and the like, @every 5m; several with ;
    schedule = "CRON_TZ=Europe/Berlin 30 2 * * *"      in that zone; without it, in UTC
    com.faashound.schedule.body = "..."                what the call brings
    com.faashound.schedule.overlap = "skip"            not while the last one runs; "allow" is the default
    com.faashound.schedule.catchup = "last"            after an outage the last tick that was missed; default "none"

Each tick is an ordinary asynchronous call whose id and idempotency key follow from the function, the expression and
the tick.  So it is put once, however many gateways there are, however often they are restarted, and whatever becomes
of the clock: a second put of it is the same call.  A tick that was not seen, because no gateway ran, is not made up
for, except for the newest of the last LATE_S seconds (a restart takes some), or with catchup.

Daylight saving is as in Debian's cron: a time that is skipped comes at the end of the gap, one that comes twice is
taken once; `*` in the hour runs through both.  The parser is cronsim's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from ..calls.names import FunctionName
from ..watchdog import parse_choice, parse_positive_duration

TOPIC, CRON_TOPIC = "topic", "cron-function"

SCHEDULE = "schedule"

BODY, OVERLAP, CATCHUP = (f"com.faashound.schedule.{name}" for name in ("body", "overlap", "catchup"))

HEADERS = (("X-Topic", CRON_TOPIC), ("X-Connector", "cron-connector"))

SHORTEST_EVERY_S = 1.0

LATE_S = 60.0  # a tick that is missed by less is put yet: a restart, or a machine that was busy

CATCHUP_S = 86400.0  # an older one is not made up for; the queue remembers for so long what was put (retention)

NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}

ALLOWED = 'allowed: five fields such as "*/5 * * * *", @hourly, @daily, @weekly, @monthly, @yearly, @every 5m'


class BadSchedule(ValueError):
    """Annotations of a schedule make no sense.  `problems` has what is wrong under each annotation's name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression: `text` as typed; `every_s`, or the five `fields` in `zone`."""

    text: str
    fields: str = ""
    zone: str = "UTC"
    every_s: float = 0.0

    def ticks(self, after_s: float) -> Iterator[float]:
        """Yield the ticks after `after_s`, in seconds since the epoch; the same ones wherever one begins."""
        if self.every_s:
            number = int(after_s // self.every_s)
            while True:
                number += 1
                yield number * self.every_s
        zone = ZoneInfo(self.zone)
        start = datetime.fromtimestamp(after_s, zone)
        earlier = datetime.fromtimestamp(after_s - 4 * 3600, zone)
        # Around a change of the clock cronsim must have seen what came before it.
        begin = start if earlier.utcoffset() == start.utcoffset() else earlier
        for moment in CronSim(self.fields, begin - timedelta(seconds=1)):
            if moment.timestamp() > after_s:
                yield moment.timestamp()

    def next_s(self, after_s: float) -> float:
        """Return the first tick after `after_s`; infinity if there is none for fifty years."""
        return next(self.ticks(after_s), float("inf"))

    def last_s(self, after_s: float, until_s: float) -> float | None:
        """Return the last tick after `after_s` that is not after `until_s`; None if there is none."""
        if self.every_s:
            found = until_s // self.every_s * self.every_s
            return found if found > after_s else None
        last = None
        for tick_s in self.ticks(after_s):
            if tick_s > until_s:
                break
            last = tick_s
        return last


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a function's annotations ask for; no expressions: nothing."""

    expressions: tuple[Expression, ...] = ()
    body: bytes = b""
    skips_overlap: bool = False
    catches_up: bool = False


def parse_expression(text: str) -> Expression:
    """Return an expression; raises ValueError, which says what is allowed."""
    text = text.strip()
    zone, rest = "UTC", text
    if match := re.fullmatch(r"(?:CRON_TZ|TZ)=(\S+)\s+(.*)", text, re.DOTALL):
        zone, rest = match[1], match[2].strip()
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"{zone!r} is no time zone here; allowed: names such as Europe/Berlin") from None
    if match := re.fullmatch(r"@every\s+(\S+)", rest):
        try:
            every_s = parse_positive_duration(match[1])
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        if every_s < SHORTEST_EVERY_S:
            raise ValueError(f"@every {match[1]}: allowed: {SHORTEST_EVERY_S:g}s and longer")
        return Expression(text, every_s=every_s)
    fields = " ".join(NICKNAMES.get(rest.lower(), rest).split())
    if len(fields.split(" ")) != 5:
        raise ValueError(f"{text!r}: {ALLOWED}")
    try:
        CronSim(fields, datetime.now(UTC))
    except CronSimError as error:
        raise ValueError(f"{text!r}: {str(error).lower()}; {ALLOWED}") from None
    return Expression(text, fields, zone)


def parse_schedules(annotations: Mapping[str, str]) -> Schedule:
    """Return the schedule that annotations ask for; raises BadSchedule with all that is wrong."""
    if annotations.get(TOPIC) != CRON_TOPIC or SCHEDULE not in annotations:
        return Schedule()
    problems: dict[str, str] = {}
    expressions = []
    try:
        expressions = [parse_expression(text) for text in annotations[SCHEDULE].split(";") if text.strip()]
        if not expressions:
            raise ValueError(ALLOWED)
    except ValueError as error:
        problems[SCHEDULE] = str(error)
    words = {OVERLAP: ("allow", "skip"), CATCHUP: ("none", "last")}
    for name, choices in words.items():
        try:
            parse_choice(*choices)(annotations.get(name, choices[0]))
        except ValueError as error:
            problems[name] = f"{annotations[name]!r}: {error}"
    if problems:
        raise BadSchedule(problems)
    body = annotations.get(BODY, "").encode()
    return Schedule(tuple(expressions), body, annotations.get(OVERLAP) == "skip", annotations.get(CATCHUP) == "last")


@dataclass(frozen=True, slots=True)
class Tick:
    """One time at which a function is to be called."""

    function: FunctionName
    expression: Expression
    at_s: float

    @property
    def key(self) -> str:
        """Its idempotency key.  No caller's key begins with a space."""
        return f" schedule {self.expression.text} at {self.at_s:.3f}"

    @property
    def call_id(self) -> str:
        """The id of its call: a UUIDv7 of the tick's time (RFC 9562 5.7), whose other bits follow from the rest."""
        digest = int.from_bytes(hashlib.sha256(f"{self.function}{self.key}".encode()).digest()[:10], "big")
        bits = (
            int(self.at_s * 1000) << 80 | 0x7 << 76 | (digest >> 64 & 0xFFF) << 64 | 0b10 << 62 | digest & (1 << 62) - 1
        )
        text = f"{bits:032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def due_ticks(function: FunctionName, schedule: Schedule, looked_s: float, now_s: float) -> list[Tick]:
    """Return what is to be put now, when the last look was at `looked_s`: of each expression one tick at most."""
    window_s = CATCHUP_S if schedule.catches_up else LATE_S
    after_s = max(looked_s, now_s - window_s)
    found = ((each, each.last_s(after_s, now_s)) for each in schedule.expressions)
    return [Tick(function, each, at_s) for each, at_s in found if at_s is not None]
