"""What is counted of calls, minute by minute over the last hour (pure).

    counted = read_counters(slot.scoreboard.counters.totals())        # of all processes of the gateway
    counted = parse_worker_metrics(text)                              # of a worker, from its /metrics
    figures = Hour()
    figures.add(now_s, deltas(before, counted))
    figures.window(now_s, minutes_count=5)["cat.openfaas-fn"].per_minute

A source's counters only grow, until its process is another: then they begin at zero, as Prometheus' `rate` takes it.
Percentiles are those of `histogram_quantile`: within a bucket as if durations were spread evenly over it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..watchdog import BUCKETS_S

MINUTES_COUNT = 60  # that are shown
BUCKETS_COUNT = len(BUCKETS_S)

_OF_WORKERS = re.compile(
    r'gateway_function(?P<kind>_invocation_started|s_seconds_bucket)\{(?:code="(?P<code>[0-9]{1,3})",)?'
    r'function_name="(?P<name>[^"\\\n]{1,300})"(?:,le="(?P<le>[0-9.+Inf]{1,8})")?\} (?P<value>[0-9.e+]{1,24})',
    re.ASCII,
)


class Counted(NamedTuple):
    """What a source has counted of one function: calls begun, calls that failed, and how many took how long."""

    started: int
    failed: int
    buckets: tuple[int, ...]

    @property
    def ended(self) -> int:
        """Calls that are over."""
        return sum(self.buckets)


NOTHING = Counted(0, 0, (0,) * BUCKETS_COUNT)


def is_failure(status: int) -> bool:
    """Tell whether a status is the function's failure and not an answer: it broke, took too long, or was not there."""
    return status >= 500 or status == 408


def _sum(one: Counted, other: Counted) -> Counted:
    buckets = tuple(a + b for a, b in zip(one.buckets, other.buckets, strict=True))
    return Counted(one.started + other.started, one.failed + other.failed, buckets)


def read_counters(totals: Mapping[str, Sequence[float]]) -> dict[str, Counted]:
    """Return what the processes of a gateway have counted, by function; see serving/metrics.py for the keys."""
    found: dict[str, Counted] = {}
    for key, numbers in totals.items():
        kind, name, *status = (*key.split(), "")
        if kind == "started":
            counted = Counted(int(numbers[0]), 0, NOTHING.buckets)
        elif kind == "seconds":
            buckets = tuple(map(int, numbers[1:]))
            counted = Counted(0, sum(buckets) if is_failure(int(status[0])) else 0, buckets)
        else:
            continue
        found[name] = _sum(found.get(name, NOTHING), counted)
    return found


def parse_worker_metrics(text: str) -> dict[str, Counted]:
    """Return what a worker has counted of the calls that it makes by itself, by function."""
    started: dict[str, int] = {}
    cumulated: dict[tuple[str, str], list[int]] = {}
    for match in _OF_WORKERS.finditer(text):
        value = int(float(match["value"]))
        if match["kind"] == "_invocation_started":
            started[match["name"]] = value
        else:
            cumulated.setdefault((match["name"], match["code"] or "0"), []).append(value)
    found = {name: Counted(count, 0, NOTHING.buckets) for name, count in started.items()}
    for (name, code), counts in cumulated.items():
        if len(counts) == BUCKETS_COUNT:
            failed = counts[-1] if is_failure(int(code)) else 0
            buckets = (counts[0], *(after - before for before, after in pairwise(counts)))
            found[name] = _sum(found.get(name, NOTHING), Counted(0, failed, buckets))
    return found


def deltas(before: Mapping[str, Counted], after: Mapping[str, Counted]) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yield (function, failed, buckets) of what has come between two readings of one source, where something has."""
    for name, now in after.items():
        then = before.get(name, NOTHING)
        if now.ended < then.ended:  # another process counts by now
            then = NOTHING
        if now.ended > then.ended:
            buckets = tuple(b - a for a, b in zip(then.buckets, now.buckets, strict=True))
            yield name, max(now.failed - then.failed, 0), buckets


def quantile_s(share: float, buckets: Sequence[int]) -> float | None:
    """Return the duration that `share` of the calls did not exceed, at most the last bound; None without calls."""
    total = sum(buckets)
    if not total:
        return None
    wanted = share * total
    for index, reached in enumerate(accumulate(buckets)):
        if reached >= wanted and buckets[index]:
            if index == BUCKETS_COUNT - 1:
                break
            low = BUCKETS_S[index - 1] if index else 0.0
            return low + (BUCKETS_S[index] - low) * (wanted - (reached - buckets[index])) / buckets[index]
    return BUCKETS_S[-2]


@dataclass(frozen=True, slots=True)
class Figures:
    """What came in a window of time; a rate is that of a minute at least, lest few calls at the start seem many."""

    failed: int
    buckets: tuple[int, ...]
    window_s: float

    @property
    def ended(self) -> int:
        """Calls that were over in the window."""
        return sum(self.buckets)

    def describe(self) -> dict[str, object]:
        """Return the figures as JSON members."""
        p50_s, p95_s = (quantile_s(share, self.buckets) for share in (0.5, 0.95))
        return {
            "calls": self.ended,
            "errors": self.failed,
            "per_minute": round(self.ended * 60 / max(self.window_s, 60.0), 2),
            "p50_seconds": p50_s,
            "p95_seconds": p95_s,
        }


Row = tuple[int, ...]  # failed, then the buckets


class Hour:
    """The minutes of the last hour, each with what came of each function in it.

    `since_s` is when counting began; before that nothing is known, which is not the same as nothing.
    """

    def __init__(self, since_s: float, minutes: Mapping[int, Mapping[str, Row]] | None = None) -> None:
        self.since_s = since_s
        self._minutes: dict[int, dict[str, Row]] = {minute: dict(rows) for minute, rows in (minutes or {}).items()}

    def add(self, now_s: float, name: str, failed: int, buckets: Sequence[int]) -> None:
        """Note what has come of a function by now."""
        rows = self._minutes.setdefault(int(now_s // 60), {})
        rows[name] = tuple(map(sum, zip(rows.get(name, (0,) * (1 + BUCKETS_COUNT)), (failed, *buckets), strict=True)))

    def touch(self, now_s: float) -> None:
        """Note that all that has come by now has been added, and drop what is no longer shown."""
        self._minutes.setdefault(int(now_s // 60), {})
        first = int(now_s // 60) - MINUTES_COUNT + 1
        self._minutes = {minute: rows for minute, rows in self._minutes.items() if minute >= first}
        self.since_s = max(self.since_s, first * 60.0)

    def window(self, now_s: float, minutes_count: int) -> dict[str, Figures]:
        """Return the figures of each function that was called in the last minutes, this one included."""
        first = int(now_s // 60) - minutes_count + 1
        window_s = max(now_s - max(first * 60.0, self.since_s), 1.0)
        sums: dict[str, Row] = {}
        for minute, rows in self._minutes.items():
            if minute >= first:
                for name, row in rows.items():
                    sums[name] = tuple(map(sum, zip(sums[name], row, strict=True))) if name in sums else row
        return {name: Figures(row[0], row[1:], window_s) for name, row in sums.items()}

    def by_minute(self, now_s: float, name: str | None) -> list[tuple[int, int, int] | None]:
        """Return (time, calls, errors) of each minute, of one function or of all; None where nothing was counted."""
        last = int(now_s // 60)
        found: list[tuple[int, int, int] | None] = []
        for minute in range(last - MINUTES_COUNT + 1, last + 1):
            rows = self._minutes.get(minute, {})
            chosen = rows.values() if name is None else [rows[name]] if name in rows else []
            calls, failed = sum(sum(row[1:]) for row in chosen), sum(row[0] for row in chosen)
            found.append((minute * 60, calls, failed) if minute in self._minutes else None)
        return found

    def copy(self) -> dict[int, dict[str, Row]]:
        """Return the minutes as they are now."""
        return {minute: dict(rows) for minute, rows in self._minutes.items()}


def sum_figures(each: Sequence[Figures]) -> Figures:
    """Return the figures of several functions together."""
    if not each:
        return Figures(0, NOTHING.buckets, 0.0)
    buckets = tuple(map(sum, zip(*(figures.buckets for figures in each), strict=True)))
    return Figures(sum(figures.failed for figures in each), buckets, each[0].window_s)
