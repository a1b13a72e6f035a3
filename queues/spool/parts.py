"""FIXDOC."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ...calls.model import QueueLimits, QueueUnavailable
from .database import _open_in_room
from .directory import _open_tree, _read_token, _Tree
from .errors import _open_error, _sqlite_error
from .notifier import _Bells
from .readers import _Readers
from .reserve import _Reserve
from .schema import SQLITE_VERSION

# --------------------------------------------------------------------------------------------------------------------
# The Spool
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """What opening a queue yields, before there is a thread or a socket."""

    limits: QueueLimits
    tree: _Tree
    token: str
    db: sqlite3.Connection
    reserve: _Reserve
    readers: _Readers
    bells: _Bells


def _open_parts(path: Path, limits: QueueLimits) -> _Parts:
    path = path.absolute()
    if sqlite3.sqlite_version_info < SQLITE_VERSION:
        raise QueueUnavailable(
            f"the queue needs SQLite {'.'.join(map(str, SQLITE_VERSION))}, this Python has {sqlite3.sqlite_version}"
        )
    try:
        with contextlib.ExitStack() as stack:
            tree = stack.enter_context(contextlib.closing(_open_tree(path)))
            with tree.turn():
                reserve = stack.enter_context(contextlib.closing(_Reserve(tree, limits.reserve_bytes)))
                db = stack.enter_context(contextlib.closing(_open_in_room(tree, reserve)))
                token = _read_token(tree)
                reserve.open()
                db.execute(f"PRAGMA wal_autocheckpoint = {reserve.journal_pages}")
            readers = stack.enter_context(contextlib.closing(_Readers(tree.database)))
            bells = _Bells(tree.bells_fd)
            stack.pop_all()
    except OSError as error:
        raise _open_error(path, error) from error
    except sqlite3.Error as error:
        raise _sqlite_error(error) from error
    return _Parts(limits, tree, token, db, reserve, readers, bells)
