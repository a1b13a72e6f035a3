"""How many watchdogs a local function has, and for how long: the labels of OpenFaaS, read and judged.

    com.openfaas.scale.min             so many are started with the gateway, and whenever the function is woken
    com.openfaas.scale.max             more than so many cannot be asked for (default 20); if it is set, there are more
                                       up to it, and fewer again, as its load wants it
    com.openfaas.scale.target          calls in flight that one is started for, then; if it is not set, one is for 50 of
                                       them, or for 5 calls a second, by which OpenFaaS scales
    com.openfaas.scale.zero            false: it is started with the gateway, and stays
    com.openfaas.scale.zero-duration   without a call for so long it is put to rest (default 15m)

Without any of them a function has no process until a call comes.  Pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..watchdog import parse_bool, parse_count, parse_positive_count, parse_positive_duration

SCALE_PREFIX = "com.openfaas.scale."


DEFAULT_MAX_COUNT = 20  # as in OpenFaaS


HIGHEST_MAX_COUNT = 1000


DEFAULT_TARGET_COUNT = 50  # as in OpenFaaS


DEFAULT_TARGET_RATE = 5.0  # calls a second: above it OpenFaaS' alert APIHighInvocationRate has a function scaled up


LOAD_WINDOW_S = 10.0  # that the alert's rate is measured over; fewer are wanted only after so long with less load


DEFAULT_ZERO_DURATION_S = 900.0


class BadLabels(ValueError):
    """Labels that mean something to us make no sense.  `problems` has what is wrong under each label's name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Scale:
    """What the labels of a function ask for; `min_count` 0: nothing is started before a call comes."""

    min_count: int = 0
    max_count: int = DEFAULT_MAX_COUNT
    rests: bool = True
    zero_duration_s: float = DEFAULT_ZERO_DURATION_S
    target_count: int = DEFAULT_TARGET_COUNT
    target_rate: float | None = DEFAULT_TARGET_RATE  # None: calls in flight alone count
    grows: bool = False

    @property
    def woken_count(self) -> int:
        """How many watchdogs it has when it is awake, unless an operator has asked for more."""
        return max(self.min_count, 1)

    @property
    def started_count(self) -> int:
        """How many are started with the gateway."""
        return self.min_count if self.rests else self.woken_count

    def count_for(self, in_flight_count: int, calls_per_s: float = 0.0) -> int:
        """Return how many watchdogs so many calls in flight, or so many a second, want."""
        by_rate = 0 if self.target_rate is None else math.ceil(calls_per_s / self.target_rate)
        wanted_count = max(-(-in_flight_count // self.target_count), by_rate)
        return min(max(wanted_count, self.woken_count), max(self.max_count, self.woken_count))


class Load:
    """What a function had to do in the last LOAD_WINDOW_S, by looks from time to time.  Times are monotonic."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, int]] = deque()

    def look(self, now_s: float, calls_count: int, in_flight_count: int) -> None:
        """Take note of how many calls there have been so far, and how many are in flight."""
        while self._looks and self._looks[0][0] < now_s - LOAD_WINDOW_S:
            self._looks.popleft()
        self._looks.append((now_s, calls_count, in_flight_count))

    @property
    def in_flight_count(self) -> int:
        """The most calls that were in flight at one look."""
        return max((in_flight_count for _, _, in_flight_count in self._looks), default=0)

    @property
    def calls_per_s(self) -> float:
        """How many calls there were in a second, over the whole window: a short burst counts for little."""
        return (self._looks[-1][1] - self._looks[0][1]) / LOAD_WINDOW_S if self._looks else 0.0


def _parse_max(text: str) -> int:
    count = parse_positive_count(text)
    if count > HIGHEST_MAX_COUNT:
        raise ValueError(f"allowed: 1 to {HIGHEST_MAX_COUNT}")
    return count


_ROWS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "min": ("min_count", parse_count),
    "max": ("max_count", _parse_max),
    "target": ("target_count", parse_positive_count),
    "zero": ("rests", parse_bool),
    "zero-duration": ("zero_duration_s", parse_positive_duration),
}


def parse_scale(labels: Mapping[str, str]) -> Scale:
    """Return what `labels` ask for; raises BadLabels with all that is wrong.  Labels of others are not looked at."""
    values: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, (attribute, parse) in _ROWS.items():
        text = labels.get(SCALE_PREFIX + name)
        if text is None:
            continue
        try:
            values[attribute] = parse(text)
        except ValueError as error:
            problems[SCALE_PREFIX + name] = f"{text!r}: {error}"
    if "target_count" in values:
        values["target_rate"] = None
    scale = Scale(**values, grows="max_count" in values)
    if not problems and scale.min_count > scale.max_count:
        problems[SCALE_PREFIX + "min"] = f"is more than {SCALE_PREFIX}max ({scale.max_count})"
    if problems:
        raise BadLabels(problems)
    return scale
