"""The queue's file: connections, creating it whole or not at all, and refusing what is damaged, foreign or newer.

    db = open_database(directory, reserve)                 # under the writer lock

An older file is brought to the newest version then, one version in each transaction (schema.py).

What it refuses, with QueueDamaged: to start on a file that is not all there, not ours, or of a later version; it is
left as it is, and `set_aside` is for the operator to call, unless a newer program is all that is needed.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from ...calls.destinations import destination_of
from ...calls.model import QueueDamaged, QueueFull
from .directory import SpoolDirectory, sync_directory
from .errors import damaged_error, sqlite_error
from .limits import BUSY_S, DATABASE
from .reserve import Reserve, size_bytes
from .schema import APPLICATION_ID, MIGRATIONS

# --------------------------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------------------------


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode (we say BEGIN ourselves), to be used by one thread at a time."""
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256)
    with contextlib.ExitStack() as stack:
        stack.callback(db.close)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = FAST")  # zeros over what is deleted would go to the journal first
        db.execute("PRAGMA foreign_keys = ON")
        stack.pop_all()
    return db


def _open_database(directory: SpoolDirectory) -> sqlite3.Connection:
    """The writer's connection to a file that has been looked at; call under the writer lock."""
    path = directory.database
    if size_bytes(path) is None:
        if size_bytes(path.with_name(f"{DATABASE}-wal")):
            raise damaged_error(path, "is missing, though its journal is there")
        _create_database(path)
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise damaged_error(path, "is empty or not a queue's file")
    with contextlib.ExitStack() as stack:
        try:
            db = stack.enter_context(contextlib.closing(connect(path)))
            _check(db, path)
            migrate_schema(db)
        except sqlite3.Error as error:
            problem = sqlite_error(error)
            raise (
                damaged_error(path, f"is damaged ({error})") if isinstance(problem, QueueDamaged) else problem
            ) from error
        stack.pop_all()
    return db


def open_database(directory: SpoolDirectory, reserve: Reserve) -> sqlite3.Connection:
    """Open the file with the reserve's room if need be: its journal and the index of that are made by the first."""
    try:
        return _open_database(directory)
    except QueueFull:
        reserve.release()
        return _open_database(directory)


def _create_database(path: Path) -> None:
    """Make the file under another name first: a `spool.sqlite3` that is empty is always a damaged one."""
    draft = path.with_name(f"{DATABASE}.new")
    for tail in ("", "-wal", "-shm"):
        draft.with_name(draft.name + tail).unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # -wal and -shm take their mode from it
    try:
        with contextlib.closing(connect(draft)) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before the first page
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute("PRAGMA journal_mode = WAL")
            migrate_schema(db)
    except sqlite3.Error as error:
        raise sqlite_error(error) from error
    draft.rename(path)
    sync_directory(path.parent)


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuse what is not ours or not whole, as far as can be told without reading all of it."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise damaged_error(path, "is some other program's file")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise QueueDamaged(
            f"{path} is of version {version}, this program knows up to {len(MIGRATIONS)}: use the newer program again"
        )
    if version < 1:
        raise damaged_error(path, "has no version")
    (pages,), (page_bytes,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    if _missing_pages(path, pages, page_bytes):
        raise damaged_error(path, "is cut short")


def _missing_pages(path: Path, page_count: int, page_bytes: int) -> set[int]:
    """Pages that neither the file nor its journal holds; SQLite would take them for zeros when there is a journal.

    A file shorter than its count is no damage in itself: it grows when the journal is written back. The journal is a
    header of 32 bytes and frames of 24 + `page_bytes`, each beginning with the page's number (sqlite.org/fileformat2
    section 4.1). The page at 1 GiB is never written: SQLite's locks live there (section 1.3).
    """
    held = path.stat().st_size // page_bytes
    missing = set(range(held + 1, page_count + 1)) - {(1 << 30) // page_bytes + 1}
    journal = path.with_name(f"{DATABASE}-wal")
    if missing and size_bytes(journal):
        with journal.open("rb") as file:
            file.seek(32)
            while len(header := file.read(24)) == 24:
                missing.discard(int.from_bytes(header[:4], "big"))
                file.seek(page_bytes, os.SEEK_CUR)
    return missing


def migrate_schema(db: sqlite3.Connection) -> None:
    """Bring an older file to the newest version, one version per transaction; lend SQL what the law needs of us."""
    db.create_function("destination_of", 1, destination_of, deterministic=True)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
