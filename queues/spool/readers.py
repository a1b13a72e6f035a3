"""The threads that read: each look is one consistent view of the queue, and waits for no commit."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
from collections.abc import (
    Callable,
)
from pathlib import Path
from typing import TypeVar

from ...calls.model import QueueUnavailable
from .database import connect
from .errors import NO_MEMORY, sqlite_error
from .threads import start_threads

T = TypeVar("T")


class Readers:
    """A few threads with a connection each: in WAL mode reading waits for no commit."""

    THREAD_COUNT = 2

    def __init__(self, path: Path) -> None:
        self._threads = start_threads(self.THREAD_COUNT, "spool-reader")
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        for _ in range(self.THREAD_COUNT):
            db = connect(path)
            db.execute("PRAGMA query_only = ON")
            self._idle.put(db)

    async def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """What `read` returns, from one consistent view of the queue."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, read)

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        db = self._idle.get()
        try:
            db.execute("BEGIN")
            try:
                return read(db)
            finally:
                db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise sqlite_error(error) from error
        except MemoryError as error:  # how Python hands on SQLITE_NOMEM
            raise QueueUnavailable(NO_MEMORY) from error
        finally:
            self._idle.put(db)

    def close(self) -> None:
        self._threads.shutdown()
        for _ in range(self.THREAD_COUNT):
            self._idle.get().close()
