"""What the processes of a function take of the machine: processor and memory, with all that they have started.

    usage = await measure_usage([pid])                       # takes SAMPLE_S

Contract: memory that processes share counts once, divided among them (PSS, proc(5)): watchdogs are forked, and share
most of theirs.  A process that ends meanwhile counts as far as it was seen; nothing is remembered between two calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import psutil

from .function_views import Usage

SAMPLE_S = 0.1  # between two looks at the processor's clock, which ticks a hundred times a second


async def measure_usage(pids: Sequence[int]) -> Usage:
    """Return what the processes `pids`, and those that descend from them, take now."""
    loop = asyncio.get_running_loop()
    before_s, _ = await loop.run_in_executor(None, _look, pids)
    await asyncio.sleep(SAMPLE_S)
    after_s, memory_bytes = await loop.run_in_executor(None, _look, pids)
    return Usage(round(max(after_s - before_s, 0.0) / SAMPLE_S * 1000), memory_bytes)


def _look(pids: Sequence[int]) -> tuple[float, int]:
    """Return the seconds of processor that the living have used, children that have ended included, and their bytes."""
    total_s, total_bytes = 0.0, 0
    for pid in pids:
        with suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.Error):
                    total_s += sum(process.cpu_times()[:4])
                    total_bytes += _memory_bytes(process)
    return total_s, total_bytes


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:  # of another user, and we are not root
        return int(process.memory_info().rss)
