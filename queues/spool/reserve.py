"""Room on the disk that is kept for ending calls, so that a full queue can always be drained.

    if not reserve.has_room(len(body)): raise QueueFull    # new calls leave the reserve alone
    reserve.release(); ...; reserve.refill()               # a step that ends something had no room

Contract: steps that store a result may have three quarters of it (RESULTS_PART), the body of a long result half of it,
steps that give room back all of it.  What it refuses: room to new calls while it is not whole, and to take more than an
eighth (RESERVE_PART) of a small disk.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ...calls.model import QueueFull
from ...watchdog import log
from .directory import SpoolDirectory, open_ours
from .errors import DISK_FULL, disk_error
from .limits import AMPLE_BYTES, AMPLE_S, DATABASE, PAGE_BYTES, RESERVE_PART, SLACK_PART, TOLD_S

# --------------------------------------------------------------------------------------------------------------------
# The reserve
#
# On a full disk nothing can be written, and so nothing can end: a claim, a cancel, even a deletion goes to SQLite's
# journal first. So a file takes up room that is let go of when a step that ends calls fails for want of it. The step is
# done again, the journal is written back and cut, and the file takes up its room again, if there is any. Until it has
# all of it, the queue takes no calls: what ends gives room back, what comes would take the last of it.
#
# Everything is written twice, to the journal and from there to its place. Pages that found room in the one and have
# none in the other would be stuck, and the reserve with them. So a group is let in only if there is room for both, what
# stands in the journal already included, and the journal is written back before it holds more than half the reserve.
#
# The body of a long result may take the other half, no more, as it needs a commit to be of use. Only the writer fills
# the file, under the writer lock: between letting go and using, no other process can take the room back.
# --------------------------------------------------------------------------------------------------------------------


class Reserve:
    """The file `reserve`. Its size is all there is to it: whole, or let go of in part; every process sees it."""

    def __init__(self, directory: SpoolDirectory, wanted_bytes: int | None) -> None:
        """`wanted_bytes` is taken from disks that are large enough for it; None: take what is there for the whole."""
        self._directory = directory
        self._wanted_bytes = wanted_bytes
        self._journal = directory.path / f"{DATABASE}-wal"
        self._fd = -1
        self._full_since_s: float | None = None
        self._ample_until_s = 0.0  # there was so much room that another look before is not worth its time
        self.whole_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            flags = os.O_RDWR | (os.O_CREAT if wanted_bytes else 0)
            self._fd = open_ours(directory.root_fd, directory.path / "reserve", flags)
        if wanted_bytes is None:
            self.whole_bytes = self.held_bytes
        elif self._fd >= 0 and wanted_bytes:
            disk = os.fstatvfs(directory.root_fd)
            self.whole_bytes = min(wanted_bytes, disk.f_blocks * disk.f_frsize // RESERVE_PART)

    def open(self) -> None:
        """Take up the room, also where a copy of the directory has left a hole instead; under the writer lock."""
        try:
            if self._wanted_bytes is not None and self.held_bytes > self.whole_bytes:  # the operator wants less now
                os.ftruncate(self._fd, self.whole_bytes)
            self._fill(1)
            self.tell()
        except OSError as error:
            log.warning(f"no room can be kept for ending calls in {self._directory.path}: {error.strerror}")
            self.whole_bytes = 0

    @property
    def held_bytes(self) -> int:
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    @property
    def target_bytes(self) -> int:
        """What is to be kept, also while it is let go of; the whole is known to the programs that set its size."""
        return max(self.whole_bytes, self.held_bytes)

    @property
    def free_bytes(self) -> int:
        disk = os.fstatvfs(self._directory.root_fd)
        return disk.f_bavail * disk.f_frsize

    @property
    def is_ample(self) -> bool:
        """Whether there is room for whatever comes; False where the disk cannot be looked at."""
        try:
            return self.free_bytes >= AMPLE_BYTES
        except OSError:
            return False

    @property
    def journal_pages(self) -> int:
        """After how many the journal is to be written back; SQLite's own 1000 where the reserve has room for them."""
        return min(1000, self.whole_bytes // 2 // PAGE_BYTES) if self.whole_bytes else 1000

    def has_room(self, bytes_count: int) -> bool:
        """Whether so much may be written: to the journal, and from there to its place. No promise, but a good guess.

        Raises QueueUnavailable where the disk cannot be looked at.
        """
        now_s = time.monotonic()
        if now_s < self._ample_until_s and bytes_count < AMPLE_BYTES // 4:
            return True
        if self._full_since_s is not None:
            self.tell()
        try:
            fits = self._fits(bytes_count)
            if fits and self._fits(AMPLE_BYTES):
                self._ample_until_s = now_s + AMPLE_S
        except OSError as error:
            raise disk_error(error) from error
        return fits

    def _fits(self, bytes_count: int) -> bool:
        if not self.whole_bytes:
            return True
        needed_bytes = self.whole_bytes // SLACK_PART + 2 * bytes_count + (size_bytes(self._journal) or 0)
        return self._is_whole and self.free_bytes >= needed_bytes

    @property
    def _is_whole(self) -> bool:
        return self.held_bytes >= self.whole_bytes

    @property
    def has_half(self) -> bool:
        return self.held_bytes >= self.whole_bytes // 2

    def refill(self) -> None:
        """Take the room up again, all of it, or else the half that results may not have. Under the writer lock."""
        if not self._is_whole and not self._fill(1) and not self.has_half:
            self._fill(2)

    def _fill(self, divisor: int) -> bool:
        if not self.whole_bytes:
            return True
        held_bytes = self.held_bytes
        try:
            os.posix_fallocate(self._fd, 0, self.whole_bytes // divisor)
        except OSError as error:
            os.ftruncate(self._fd, held_bytes)  # some file systems keep what they could get
            if not isinstance(disk_error(error), QueueFull):
                raise
            return False
        return True

    def release(self, part: float = 1.0) -> None:
        """Let go of a part of the whole; of nothing if that is gone already."""
        left_bytes = int(self.whole_bytes * (1 - part))
        if self.held_bytes > left_bytes:
            os.ftruncate(self._fd, left_bytes)

    def trouble(self) -> str | None:
        """What keeps calls from being taken, for people; None if nothing does."""
        try:
            if self._fits(PAGE_BYTES):  # what a small call takes
                return None
            return f"{DISK_FULL}: {self.free_bytes} bytes are free, and new calls are refused until there are more"
        except OSError as error:
            return str(disk_error(error))

    def tell(self) -> None:
        """A line in the log when that changes, not for each call that is refused, and no more than two in TOLD_S."""
        trouble, now_s = self.trouble(), time.monotonic()
        if trouble is not None and self._full_since_s is None:
            self._full_since_s = now_s
            log.error(trouble)
        elif trouble is None and self._full_since_s is not None and now_s - self._full_since_s > TOLD_S:
            log.info(f"the queue takes calls again: they were refused in the last {now_s - self._full_since_s:.0f} s")
            self._full_since_s = None

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def size_bytes(path: Path) -> int | None:
    """None only for a file that is proved not to be there: `Path.exists` may take any error for that."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None
