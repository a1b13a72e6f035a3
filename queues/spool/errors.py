"""What goes wrong on a disk, in the queue's own errors: full, unavailable or damaged, with what to do about it."""

from __future__ import annotations

import errno
import os
import pwd
import shlex
import sqlite3
import stat
import sys
from pathlib import Path

from ...calls.model import QueueDamaged, QueueFull, QueueUnavailable
from ...watchdog import FaashoundError
from .limits import DATABASE

NO_MEMORY = "the queue cannot be used: no memory"


DISK_FULL = "the queue's disk is full"


def disk_error(error: OSError) -> FaashoundError:
    """Return what an error of the disk is to users of the queue: QueueFull, or QueueUnavailable."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return QueueFull(DISK_FULL)
    return QueueUnavailable(f"the queue cannot use its disk: {error.strerror or type(error).__name__}")


def sqlite_error(error: sqlite3.Error) -> FaashoundError:
    """Return what an error of SQLite is to users of the queue: QueueFull, QueueDamaged or QueueUnavailable."""
    # Python hands on extended codes; the primary code is the low byte. Errors of Python's own have none.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
        return QueueFull(DISK_FULL)
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return QueueDamaged(f"the queue's file {DATABASE} is damaged ({error}): stop what uses it, then set it aside")
    return QueueUnavailable(f"the queue cannot be used: {error}")


def open_error(path: Path, error: OSError) -> FaashoundError:
    """Say what an operator needs: which path, the user that it belongs to, and the user that this process runs as."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return type(disk_error(error))(f"cannot use the queue in {path}: {error.strerror}")
    place = (Path(error.filename) if isinstance(error.filename, str) else path).absolute()  # "." is its own parent
    while True:  # the nearest that can be looked at; the root directory always can
        try:
            info = place.stat()
            break
        except (PermissionError, FileNotFoundError):
            place = place.parent
    return QueueUnavailable(
        f"cannot use the queue in {path}: {error.strerror}: {place} belongs to {user_name(info.st_uid)}"
        f" (mode {stat.S_IMODE(info.st_mode):04o}), this process runs as {user_name(os.geteuid())}"
    )


def want_queue(directory: Path) -> None:
    """Raise QueueUnavailable where there is no queue, or none that may be looked at: to open it would make one."""
    if _holds_queue(directory):
        return
    if not directory.is_dir():
        raise QueueUnavailable("there is no such directory")
    below = directory / "spool"
    hint = f"; meant is {below}?" if _holds_queue(below) else ""
    raise QueueUnavailable(f"there is no queue ({DATABASE}){hint}")


def _holds_queue(directory: Path) -> bool:
    """Tell whether a queue's file is there, or the journal of one that is lost."""
    for name in (DATABASE, f"{DATABASE}-wal"):
        try:
            (directory / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise open_error(directory, error) from error
        return True
    return False


def user_name(uid: int) -> str:
    """Return what an operator calls the user with a number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def damaged_error(path: Path, why: str) -> QueueDamaged:
    """Return the error for a file that is damaged or foreign, with what an operator may do."""
    program = f"from faashound.queues.spool.directory import set_aside; set_aside({str(path.parent)!r})"
    return QueueDamaged(
        f"{path} {why}. It has been left as it is. Start with an empty queue, or with a copy put in its place, after"
        f" {shlex.join([sys.executable, '-c', program])}"  # many a machine has no `python`, and this one knows us
    )
