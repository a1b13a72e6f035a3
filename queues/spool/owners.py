"""Which workers live: each holds a lock that the kernel lets go of when it dies, however it dies.

    fd = lock_owner(directory, owner)                      # alive until `fd` is closed
    is_dead(directory, owner)                              # its leases may be taken back

Contract: all of it happens under the writer lock.  What it refuses: an owner's name that is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from ...calls.model import QueueUnavailable
from .directory import SpoolDirectory

# --------------------------------------------------------------------------------------------------------------------
# Owners
#
# A worker's life is an flock on `owners/<owner>`: the kernel lets go of it however the worker dies, so a process that
# can lock the file knows that the worker is dead. All of this happens inside the writer lock: a look-up takes the lock
# for a moment, and would otherwise be taken for a living owner by another look-up.
# --------------------------------------------------------------------------------------------------------------------


def lock_owner(directory: SpoolDirectory, owner: str) -> int:
    """Return the descriptor whose lock is the life of `owner`.  Raises QueueUnavailable if it is at work already."""
    fd = os.open(owner, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory.owners_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise QueueUnavailable(f"the owner {owner} is at work already") from None
    return fd


def is_dead(directory: SpoolDirectory, owner: str) -> bool:
    """Tell whether an owner has ended; under the writer lock."""
    try:
        fd = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.owners_fd)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def remove_dead_owners(directory: SpoolDirectory) -> None:
    """Remove the files of owners that have ended; under the writer lock."""
    for owner in os.listdir(directory.owners_fd):
        if is_dead(directory, owner):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(owner, dir_fd=directory.owners_fd)


def read_boot_id() -> str:
    """Return the name of this boot: no lease of another one is held any more."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def boot_s() -> float:
    """Seconds since boot, time asleep included: a lease must run out in a machine that was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
