"""The janitor: drops what is past its time from the queue, and warns of what operators should see there.

    asyncio.create_task(Janitor(queue, settings, drained, metrics, health).run())

Contract: one for all processes of a gateway.  A queue that cannot be reached is tried again in the next round; what is
found wrong is a line in the log when it begins, not one in each round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from ..calls.model import Bounds, Stats
from ..queues import Queue
from ..watchdog import FaashoundError, Trouble, log
from .health import Health
from .metrics import GatewayMetrics
from .settings import Settings

ROUND_EVERY_S = 60.0
SCARCE_RESERVES_COUNT = 4  # with fewer reserves than this free, a disk is nearly full: new calls need one


def stray_queues(waiting: Mapping[str, int], drained: Collection[str]) -> dict[str, int]:
    """Return how many calls wait in queues that nothing is known to drain."""
    return {name: count for name, count in sorted(waiting.items()) if count and name not in drained}


def is_nearly_full(free_bytes: int | None, reserve_bytes: int | None) -> bool:
    """Tell whether a queue will soon refuse calls for want of room on its disk; None: it does not know."""
    if free_bytes is None or not reserve_bytes:
        return False
    return free_bytes < SCARCE_RESERVES_COUNT * reserve_bytes


class Janitor:
    """Cleans up one queue, round by round."""

    def __init__(
        self,
        queue: Queue,
        settings: Settings,
        drained: Callable[[], Collection[str]],
        metrics: GatewayMetrics,
        health: Health,
    ) -> None:
        self._queue = queue
        self._settings = settings
        self._bounds = Bounds(settings.max_queue_age_s, settings.keep_dead_s, settings.keep_dead_bytes)
        self._drained = drained
        self._metrics = metrics
        self._health = health
        self._stray_names: Collection[str] = ()
        self._is_scarce = False

    async def run(self) -> None:
        """Go round until cancelled, at least as often as the shortest time that a result is kept."""
        shortest_s = min(self._settings.results_kept_s, self._settings.retention_s)
        trouble = Trouble(log.warning)
        while True:
            try:
                await self._go_round()
                trouble.over()
            except FaashoundError as error:
                trouble.tell(f"housekeeping in the queue failed: {error}")
            await asyncio.sleep(min(ROUND_EVERY_S, max(shortest_s, 1.0)))

    async def _go_round(self) -> None:
        swept = await self._queue.sweep(self._settings.results_kept_s, self._settings.retention_s, self._bounds)
        self._metrics.dropped(swept.dead_count)
        stats = await self._queue.stats()
        self._tell_of_stray_queues(stray_queues(stats.waiting, self._drained()))
        self._tell_of_room(stats)

    def _tell_of_stray_queues(self, stray: Mapping[str, int]) -> None:
        """Log which queues have calls that may wait for ever, when others have than in the last round."""
        for name, count in stray.items() if stray.keys() != set(self._stray_names) else ():
            log.warning(
                f"nothing here drains the queue {name}, which no function names any more: calls and callbacks that wait"
                f" in it: {count}; a worker with queues={name} makes them"
            )
        self._stray_names = stray.keys()

    def _tell_of_room(self, stats: Stats) -> None:
        is_scarce = is_nearly_full(stats.free_bytes, stats.reserve_bytes)
        self._health.queue_is_nearly_full(is_scarce)
        if is_scarce and not self._is_scarce:
            log.warning(
                f"the queue's disk is nearly full: {stats.free_bytes} bytes are free, besides the {stats.reserve_bytes}"
                " that are kept for ending calls (queue_reserve); new calls will be refused"
            )
        self._is_scarce = is_scarce
