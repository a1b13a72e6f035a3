"""One limit in time for many tasks, with one timer for all of them.

    limit = SharedLimit(10.0)
    taken = await limit.run(queue.put(call))                 # TimeoutError after ten seconds

What it promises: what asyncio.timeout does, for a few additions instead of a timer each.  What it refuses: limits of
different lengths, and nesting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

T = TypeVar("T")


class SharedLimit:
    """A limit in time for many tasks, with one timer for all: the task that begins first is the first to be late."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadlines: dict[asyncio.Task[Any], float] = {}  # in the order in which they come
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, work: Awaitable[T]) -> T:
        """Return what `work` brings; TimeoutError, `work` being cancelled, when that takes too long."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None or task in self._deadlines:
            raise AssertionError("only a task can be limited, and once at a time")
        cancelling = task.cancelling()
        self._deadlines[task] = loop.time() + self._limit_s
        if self._timer is None:
            self._timer = loop.call_later(self._limit_s, self._on_time)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() <= cancelling:  # as asyncio.timeout has it
                raise TimeoutError from None
            raise
        finally:
            del self._deadlines[task]
            self._late.discard(task)

    def _on_time(self) -> None:
        """End what is late, and come again when the next one may be."""
        loop, self._timer = asyncio.get_running_loop(), None
        now_s = loop.time()
        for task, deadline_s in self._deadlines.items():
            if deadline_s > now_s:
                self._timer = loop.call_at(deadline_s, self._on_time)
                return
            if task not in self._late:
                self._late.add(task)
                task.cancel()
