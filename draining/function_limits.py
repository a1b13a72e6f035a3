"""How many calls of each function may run at once, learnt from how the functions answer (`retries.Concurrency`).

Only functions that are held below the worker's own limit are remembered, MAX_KNOWN_COUNT of them at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from ..calls.names import FunctionName
from ..calls.retries import AttemptOutcome, Concurrency
from ..watchdog import log
from .known_functions import MAX_KNOWN_COUNT


class FunctionLimits:
    """The limits of those functions that have refused calls; all others have `ceiling`."""

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._limits: OrderedDict[FunctionName, Concurrency] = OrderedDict()

    def learn(self, function: FunctionName, outcome: AttemptOutcome, started_s: float, now_s: float) -> None:
        """Take note of how a call from `started_s` to `now_s` (monotonic) was answered."""
        before = self._limits.get(function)
        if before is None:
            if not outcome.is_refusal:  # nearly always: what has the ceiling cannot have more
                return
            before = Concurrency.start(self._ceiling)
        after = before.after(outcome, started_s, now_s)
        self._limits.pop(function, None)
        if after.limit < after.ceiling:
            self._limits[function] = after
            if len(self._limits) > MAX_KNOWN_COUNT:
                self._limits.popitem(last=False)
        if after.limit < before.limit:
            log.info(f"{function} refuses calls: at most {int(after.limit)} at once")

    def capacities(self, held: Mapping[str, int]) -> dict[str, int]:
        """Return how many more calls each limited function may get; `held` are those that it has now."""
        return {name: limit.capacity(held.get(name, 0)) for name, limit in self._limits.items()}

    def __iter__(self) -> Iterator[tuple[FunctionName, int]]:
        """Yield each limited function and its limit."""
        return ((name, int(limit.limit)) for name, limit in self._limits.items())
