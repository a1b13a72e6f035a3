"""One limit in time for many tasks, with one timer for all of them.

    limit = SharedLimit(10.0)
    with limit:                                              # TimeoutError after ten seconds
        taken = await queue.put(call)

What it promises: what asyncio.timeout does, for a few additions instead of a timer each.  What it refuses: limits of
different lengths, and nesting.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast


class SharedLimit:
    """A limit in time for many tasks, with one timer for all: the task that begins first is the first to be late."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadlines: dict[asyncio.Task[Any], tuple[float, int]] = {}  # in the order in which they come
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        """Begin the time of the present task."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None or task in self._deadlines:
            raise AssertionError("only a task can be limited, and once at a time")
        self._deadlines[task] = loop.time() + self._limit_s, task.cancelling()
        if self._timer is None:
            self._timer = loop.call_later(self._limit_s, self._on_time)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """End it; TimeoutError if what was done in it was cancelled because it took too long."""
        task = cast(asyncio.Task[Any], asyncio.current_task())
        _, cancelling = self._deadlines.pop(task)
        if task in self._late:
            self._late.discard(task)
            if task.uncancel() <= cancelling and kind is asyncio.CancelledError:  # as asyncio.timeout has it
                raise TimeoutError from None

    def _on_time(self) -> None:
        """End what is late, and come again when the next one may be."""
        loop, self._timer = asyncio.get_running_loop(), None
        now_s = loop.time()
        for task, (deadline_s, _) in self._deadlines.items():
            if deadline_s > now_s:
                self._timer = loop.call_at(deadline_s, self._on_time)
                return
            if task not in self._late:
                self._late.add(task)
                task.cancel()
