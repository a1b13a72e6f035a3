"""Body files: written under their final name, on disk before a row names them, removed when no row does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import (
    Iterable,
    Sequence,
)
from typing import BinaryIO

from ...calls.model import EXCERPT_BYTES, QueueDamaged, QueueFull, QueueUnavailable
from ...watchdog import log
from .directory import SpoolDirectory
from .errors import disk_error

# --------------------------------------------------------------------------------------------------------------------
# Bodies
#
# A body's file is written under its final name, which is random and means nothing until a row names it; the row is
# submitted after file and directory are on disk. Whatever dies in between leaves a file that no row names. While a file
# grows it is locked, so that `sweep` tells a slow body from an orphan.
# --------------------------------------------------------------------------------------------------------------------


class BodyFile:
    """A body on its way to disk. Its methods block, so run in a thread, one at a time; `keep` or `discard` ends it.

    One that has failed for want of room may be called again: it goes on where it stopped.
    """

    def __init__(self, bodies_fd: int, length: int = 0) -> None:
        """If its `length` is known, `create` takes all the room at once, or fails."""
        self._bodies_fd = bodies_fd
        self._fd = -1
        self._length = length
        self._written = 0
        self._left = memoryview(b"")
        self.name = ""  # until there is a file: most bodies need none

    def create(self) -> None:
        if self._fd < 0:
            self.name = uuid.uuid4().hex
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self.name, flags, 0o600, dir_fd=self._bodies_fd)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._length:
            _allocate(self._fd, self._length)

    def add(self, pieces: Sequence[bytes]) -> None:
        """What is to be written next; only once all before it is."""
        self._left = memoryview(b"".join(pieces))

    def write(self) -> None:
        while self._left:
            count = os.write(self._fd, self._left)
            self._left = self._left[count:]
            self._written += count

    def keep(self) -> None:
        if self._length:
            os.ftruncate(self._fd, self._written)  # it may have had less to say than it announced
        os.utime(self._fd)  # the last bytes may be hours old; the time to name the file begins now
        os.fsync(self._fd)
        os.fsync(self._bodies_fd)
        self._close()

    def discard(self) -> None:
        self._close()
        if self.name:
            unlink_bodies(self._bodies_fd, [self.name])

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _allocate(fd: int, bytes_count: int) -> None:
    """Take up room for a file, all of it or none; OSError if there is not as much."""
    before_bytes = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, 0, bytes_count)
    except OSError as error:
        os.ftruncate(fd, before_bytes)  # some file systems keep what they could get
        if isinstance(disk_error(error), QueueFull):
            raise
        log.warning(f"no room can be taken up beforehand: {error.strerror}")


def unlink_bodies(bodies_fd: int, files: Iterable[str]) -> int:
    """Remove files, those that are there; return how many were."""
    count = 0
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=bodies_fd)
            count += 1
    return count


def list_old_bodies(bodies_fd: int, before_s: float) -> list[str]:
    """Body files not written to since `before_s`, of the file system's own clock."""
    old = []
    for entry in os.scandir(bodies_fd):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_mtime < before_s:
                old.append(entry.name)
    return old


def unlink_orphans(bodies_fd: int, files: Iterable[str]) -> int:
    """Remove those of `files` that are not being written just now; return how many that were."""
    count = 0
    for name in files:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=bodies_fd)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count += unlink_bodies(bodies_fd, [name])
        except BlockingIOError:
            pass  # it is still being written
        finally:
            os.close(fd)
    return count


def open_body_file(directory: SpoolDirectory, name: str, bytes_count: int) -> BinaryIO:
    """The file of a body, checked as far as can be without reading it; QueueDamaged only for what no retry mends."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.bodies_fd)
    except FileNotFoundError as error:
        if (
            not directory.has_bodies
        ):  # a directory that was moved, or whose disk is not mounted, tells nothing of its files
            raise QueueUnavailable("the directory of stored bodies was moved or removed") from error
        raise QueueDamaged("the file of a stored body is gone") from error
    file = os.fdopen(fd, "rb")
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        size_bytes = os.fstat(fd).st_size
        if size_bytes != bytes_count:
            raise QueueDamaged(f"the file of a stored body has {size_bytes} bytes instead of {bytes_count}")
        stack.pop_all()
    return file


def read_excerpt(directory: SpoolDirectory, name: str, bytes_count: int) -> bytes:
    """How a result begins; its time to be named begins anew, since a full disk may keep it waiting for hours."""
    with open_body_file(directory, name, bytes_count) as file:
        os.utime(file.fileno())
        return file.read(EXCERPT_BYTES)
