"""Pools of threads that are whole from the start.

pool = start_threads(4, "spool-files")                 # all of them run, or RuntimeError
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


def start_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Return a pool that needs no further thread.  Raises RuntimeError, with none left, if the system has no more.

    A pool starts its threads as work comes.  One that cannot be started then fails its caller, but leaves the work in
    the pool's queue: it would be done when nobody expects it any more.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    all_run = threading.Barrier(count)  # else one thread might do all that is to start the others
    try:
        for _ in range(count):
            pool.submit(all_run.wait)
    except RuntimeError:
        all_run.abort()
        pool.shutdown()
        raise
    return pool
