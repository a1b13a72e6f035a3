"""What opening a queue yields: directory, file, reserve, readers, threads and notifier, all of them or none."""

from __future__ import annotations

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...calls.model import QueueLimits, QueueUnavailable
from .database import open_database
from .directory import SpoolDirectory, open_directory, read_token
from .errors import open_error, sqlite_error
from .notifier import Notifier
from .readers import Readers
from .reserve import Reserve
from .schema import SQLITE_VERSION
from .threads import start_threads

BODY_THREADS_COUNT = 4

# --------------------------------------------------------------------------------------------------------------------
# The Spool
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parts:
    """What opening a queue yields, before anything is written or waited for."""

    limits: QueueLimits
    directory: SpoolDirectory
    token: str
    db: sqlite3.Connection
    reserve: Reserve
    readers: Readers
    body_threads: ThreadPoolExecutor
    notifier: Notifier
    undo: contextlib.ExitStack  # closes all of it, where no Spool comes of it that would


def open_parts(path: Path, limits: QueueLimits) -> Parts:
    """Open what a queue consists of, made if it is not there.  Raises the queue's errors, with nothing left open."""
    path = path.absolute()
    if sqlite3.sqlite_version_info < SQLITE_VERSION:
        raise QueueUnavailable(
            f"the queue needs SQLite {'.'.join(map(str, SQLITE_VERSION))}, this Python has {sqlite3.sqlite_version}"
        )
    try:
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(contextlib.closing(open_directory(path)))
            with directory.writer_lock():
                reserve = stack.enter_context(contextlib.closing(Reserve(directory, limits.reserve_bytes)))
                db = stack.enter_context(contextlib.closing(open_database(directory, reserve)))
                token = read_token(directory)
                reserve.open()
                db.execute(f"PRAGMA wal_autocheckpoint = {reserve.journal_pages}")
            readers = stack.enter_context(contextlib.closing(Readers(directory.database)))
            body_threads = stack.enter_context(start_threads(BODY_THREADS_COUNT, "spool-files"))
            notifier = stack.enter_context(contextlib.closing(Notifier(directory.notifiers_fd)))
            undo = stack.pop_all()
    except OSError as error:
        raise open_error(path, error) from error
    except sqlite3.Error as error:
        raise sqlite_error(error) from error
    return Parts(limits, directory, token, db, reserve, readers, body_threads, notifier, undo)
