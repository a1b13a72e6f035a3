"""What the processes of a function take of the machine: processor and memory, with all that they have started.

    cat, resize = await measure_usages([[pid, pid], [pid]])    # of two functions; takes SAMPLE_S

Contract: memory that processes share counts once, divided among them (PSS, proc(5)): watchdogs are forked, and share
most of theirs.  A process that ends meanwhile counts as far as it was seen; nothing is remembered between two calls.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import psutil

from ..watchdog import in_thread
from .function_views import Usage

SAMPLE_S = 0.1  # between two looks at the processor's clock, which ticks a hundred times a second


async def measure_usages(functions: Sequence[Sequence[int]]) -> list[Usage]:
    """Return what the processes of each function, given by their pids, take now with those that descend from them."""
    before = await in_thread(_look, functions)
    await asyncio.sleep(SAMPLE_S)
    after = await in_thread(_look, functions)
    return [
        Usage(round(max(after_s - before_s, 0.0) / SAMPLE_S * 1000), memory_bytes)
        for (before_s, _), (after_s, memory_bytes) in zip(before, after, strict=True)
    ]


def _look(functions: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """Return of each the seconds of processor that the living have used, ended children included, and their bytes.

    All processes of the machine are looked through once, however many functions there are.
    """
    known, children = dict[int, psutil.Process](), defaultdict[int, list[int]](list)
    for pid in psutil.pids():  # process_iter remembers processes whose number is another's by now
        with suppress(psutil.Error):
            each = psutil.Process(pid)
            children[each.ppid()].append(each.pid)
            known[each.pid] = each
    found = []
    for pids in functions:
        total_s, total_bytes, left = 0.0, 0, list(pids)
        while left:
            process = known.pop(left.pop(), None)
            if process is not None:
                left += children[process.pid]
                with suppress(psutil.Error):
                    total_s += sum(process.cpu_times()[:4])
                    total_bytes += _memory_bytes(process)
        found.append((total_s, total_bytes))
    return found


def _memory_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:  # of another user, and we are not root
        return int(process.memory_info().rss)
