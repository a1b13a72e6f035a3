"""Which destinations of callbacks are tried less often: a circuit breaker for each that cannot be reached.

    breakers.on_failure("a.example:443", "timed out", started_s, now_s)
    breakers.capacities(held, now_s)            # of a claim: {"a.example:443": 0}
    breakers.objection("a.example:443", now_s)
    breakers.on_answer("a.example:443")    # whatever it says: it is there

Callbacks go where strangers say, and a receiver that hangs holds a slot for callback_timeout each time.  What counts is
that it cannot be reached, or does not answer in time; an error that it answers is the business of one of its paths.

    closed      as many as the shares allow (shares.py)
    open        after FAILURES_COUNT failures in a row: its callbacks wait in the queue, and no attempt is used up
    probe       after the pause one is really sent, while the others wait: an answer closes the breaker, a failure opens
                it again for twice as long, up to LONGEST_PAUSE_S.  All probes together hold a part of the slots only
    given up    unreachable for GIVEN_UP_AFTER_S: between probes, callbacks to it count as tried, and fail at once.  So
                they come to an end in the time in which they would without a breaker, instead of piling up for ever

What it refuses to do: remember more than MAX_KEPT_COUNT destinations, whatever names strangers make up (the one that
failed longest ago is forgotten, and is then tried like any other), or to tell apart the paths of one destination.
Pure but for what it remembers; times are of one monotonic clock, in seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

FAILURES_COUNT = 3


FIRST_PAUSE_S = 5.0


LONGEST_PAUSE_S = 60.0


GIVEN_UP_AFTER_S = 600.0


MAX_KEPT_COUNT = 250  # each costs half a microsecond for each claim


MAX_ERROR_CHARS = 200


@dataclass(frozen=True, slots=True)
class Breaker:
    """The breaker of a destination that was not reached when last tried; `opened_s` is None while it is closed."""

    since_s: float
    failures_count: int = 0
    error: str = ""
    opened_s: float | None = None
    pause_s: float = FIRST_PAUSE_S

    def after_failure(self, error: str, started_s: float, now_s: float) -> Breaker:
        """Return what is known after one more attempt that was begun at `started_s`.

        One that was begun before the breaker opened is no probe: it says nothing that was not known.
        """
        more = replace(self, failures_count=self.failures_count + 1, error=error[:MAX_ERROR_CHARS])
        if self.opened_s is None:
            return replace(more, opened_s=now_s) if more.failures_count >= FAILURES_COUNT else more
        if started_s < self.opened_s:
            return more
        return replace(more, opened_s=now_s, pause_s=min(2 * self.pause_s, LONGEST_PAUSE_S))

    @property
    def probe_s(self) -> float:
        """When it may be tried again; long ago while it is closed."""
        return float("-inf") if self.opened_s is None else self.opened_s + self.pause_s

    def is_given_up(self, now_s: float) -> bool:
        """Tell whether callbacks are not to wait for the next probe."""
        return now_s < self.probe_s and now_s - self.since_s >= GIVEN_UP_AFTER_S


class Breakers:
    """The destinations that were not reached when last tried; `probes_count` of them at once are probed at most."""

    def __init__(self, probes_count: int) -> None:
        self._probes_count = probes_count
        self._breakers: OrderedDict[str, Breaker] = OrderedDict()  # the one that failed longest ago comes first

    def on_failure(self, destination: str, error: str, started_s: float, now_s: float) -> bool:
        """It was not reached; tell whether that has opened its breaker."""
        before = self._breakers.get(destination, Breaker(now_s))
        after = before.after_failure(error, started_s, now_s)
        self._breakers[destination] = after
        self._breakers.move_to_end(destination)
        if len(self._breakers) > MAX_KEPT_COUNT:
            self._breakers.popitem(last=False)
        return before.opened_s is None and after.opened_s is not None

    def on_answer(self, destination: str) -> bool:
        """It has answered; tell whether that has closed its breaker."""
        breaker = self._breakers.pop(destination, None)
        return breaker is not None and breaker.opened_s is not None

    def capacities(self, held: Mapping[str, int], now_s: float) -> dict[str, int]:
        """Return how many callbacks a claim may take for each destination held back; `held` are on their way."""
        waiting = [
            (breaker.probe_s, name)
            for name, breaker in self._breakers.items()
            if breaker.opened_s is not None and not breaker.is_given_up(now_s)
        ]
        capacities = dict.fromkeys((name for _, name in waiting), 0)
        left_count = self._probes_count - sum(name in held for name in capacities)
        due = sorted((probe_s, name) for probe_s, name in waiting if probe_s <= now_s and name not in held)
        return capacities | {name: 1 for _, name in due[: max(left_count, 0)]}

    def objection(self, destination: str, now_s: float) -> str | None:
        """Return why a callback that was claimed is not to be sent now; None if it is."""
        breaker = self._breakers.get(destination)
        if breaker is None or not breaker.is_given_up(now_s):
            return None
        return (
            f"not tried: {destination} could not be reached for {now_s - breaker.since_s:.0f} s,"
            f" {breaker.failures_count} times in a row ({breaker.error})"
        )

    def next_probe_s(self, now_s: float) -> float | None:
        """Return when the next pause ends; None if there is none."""
        return min((each.probe_s for each in self._breakers.values() if each.probe_s > now_s), default=None)

    @property
    def open_count(self) -> int:
        """How many destinations are held back."""
        return sum(breaker.opened_s is not None for breaker in self._breakers.values())
