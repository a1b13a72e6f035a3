"""The directory of a queue: checked before anything in it is trusted, and the lock by which writers take turns.

    directory = open_directory(path)                       # made if it is not there, 0700
    with directory.writer_lock(): ...                      # LockHeld, which names the holder, after LOCK_S

What it refuses, with QueueUnavailable and a remedy: a directory, or a file in it, that another user owns or may write
to, and links in the place of either.  Every file is opened by the directory's descriptor, so none is swapped meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from ...calls.model import QueueUnavailable
from .errors import open_error, user_name
from .limits import DATABASE, LOCK_PAUSE_S, LOCK_S

# --------------------------------------------------------------------------------------------------------------------
# The directory
#
# Descriptors of its sub-directories are kept open: names below them stay short (a socket's address has 108 bytes, a
# directory's path may have more) and stay right if the path above is renamed.
#
# `writer.lock` is what makes many processes share one SQLite file well. SQLite waits for its lock by sleeping and
# asking again, so some waiters starve (p99 760 ms with two writers); flock wakes them (113 ms). It also means that no
# two processes ever checkpoint at once. SQLite's own locking stays on: the flock is for turns, not for safety.
#
# What is in the directory is trusted: the token opens `/system`, a row is a call that is run. So directory and files
# must be ours, and no other user may write them. Wider modes are refused and not mended, as there is no telling what
# was written meanwhile; modes that only let others read are the operator's business. The directory is looked at first:
# where only we can make names, nothing can be exchanged between a look and its use. All that we open below it is opened
# without following a link.
# --------------------------------------------------------------------------------------------------------------------


class LockHeld(QueueUnavailable):
    """`writer.lock` could not be had in time; the text names the process that holds it."""


class WriterLock:
    """A turn at writing, to be had by `with`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        _take_writer_lock(self._fd)

    def __exit__(self, *exc_info: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


TOKEN_CHARS = 32  # at least; ours have 43, which are 256 bits


@dataclass(frozen=True, slots=True)
class SpoolDirectory:
    """The open directory of a queue."""

    path: Path
    root_fd: int
    lock_fd: int
    bodies_fd: int
    owners_fd: int
    notifiers_fd: int

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    @property
    def has_bodies(self) -> bool:
        """Whether the directory of bodies is still the one that was opened."""
        try:
            return os.path.samestat((self.path / "bodies").stat(), os.fstat(self.bodies_fd))
        except FileNotFoundError:
            return False

    def writer_lock(self) -> WriterLock:
        """Return what holds `writer.lock` by `with`: every write, checkpoint and owner look-up happens inside.

        LockHeld if it cannot be had: the process that holds it may be suspended, or stuck on a disk.
        """
        return WriterLock(self.lock_fd)

    def close(self) -> None:
        for fd in (self.root_fd, self.lock_fd, self.bodies_fd, self.owners_fd, self.notifiers_fd):
            os.close(fd)


def _take_writer_lock(lock_fd: int) -> None:
    """Lock `writer.lock`, within LOCK_S; LockHeld after that.

    flock(2) has no time limit, so it is asked again and again; a commit holds it for a millisecond or so, and its next
    group needs longer to gather than we sleep, so that processes really take turns.
    """
    started_s = time.monotonic()
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - started_s
        if waited_s > LOCK_S:
            raise LockHeld(f"the queue's lock has been held for {LOCK_S:g} s by {_lock_holder(lock_fd)}")
        time.sleep(max(LOCK_PAUSE_S, min(waited_s / 50, 0.02)))


def _lock_holder(lock_fd: int) -> str:
    """Who holds a flock, as /proc/locks has it (proc(5))."""
    inode = str(os.fstat(lock_fd).st_ino)
    try:
        with open("/proc/locks", encoding="ascii") as file:
            for fields in map(str.split, file):
                if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                    return f"process {fields[4]}"
    except OSError:  # no descriptors, or no such file where /proc is a part of one
        return "a process that cannot be named"
    return "a process that /proc/locks does not show"


def open_directory(path: Path) -> SpoolDirectory:
    """Open the directory of a queue, made if it is not there (0700), whole on disk with its path.

    Raises QueueUnavailable for one that others may write, or that is not ours; OSError.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in missing:  # else a power cut may take the directory, and every call in it
        sync_directory(place.parent)
    with contextlib.ExitStack() as stack:

        def hold(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        root_fd = hold(_open_root(path))
        lock_fd = hold(open_ours(root_fd, path / "writer.lock", os.O_RDWR | os.O_CREAT))
        fds = []
        for name in ("bodies", "owners", "bells"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=root_fd)
            fds.append(hold(open_ours(root_fd, path / name, os.O_RDONLY | os.O_DIRECTORY)))
        for tail in ("", "-wal", "-shm"):  # SQLite opens them itself, and by name
            _check_name(root_fd, path / f"{DATABASE}{tail}")
        stack.pop_all()
    return SpoolDirectory(path, root_fd, lock_fd, *fds)


def _open_root(path: Path) -> int:
    """The directory itself; a link to it is followed only if we or root have made it."""
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
        raise _not_ours(path, link)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        _check_ours(path, os.fstat(fd))
        stack.pop_all()
    return fd


def open_ours(root_fd: int, path: Path, flags: int) -> int:
    """A file of the directory by its name, checked; without waiting, as for a FIFO that was put in its place."""
    try:
        fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    except OSError as error:
        _check_name(root_fd, path)  # says more than "too many levels of symbolic links"
        raise OSError(error.errno, error.strerror, str(path)) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        _check_ours(path, os.fstat(fd))
        stack.pop_all()
    return fd


def _check_name(root_fd: int, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _check_ours(path, os.stat(path.name, dir_fd=root_fd, follow_symlinks=False))


def _check_ours(path: Path, info: os.stat_result) -> None:
    """QueueUnavailable unless it is a file or directory of ours that no other user may write."""
    if info.st_uid != os.geteuid() or not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise _not_ours(path, info)
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise QueueUnavailable(
            f"{path} may be written by others (mode {stat.S_IMODE(info.st_mode):04o}), and what is in it is trusted."
            f" If it has not been tampered with: chmod go-w {shlex.quote(str(path))}"
        )


def _not_ours(path: Path, info: os.stat_result) -> QueueUnavailable:
    kind = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}
    what = kind.get(stat.S_IFMT(info.st_mode), "special file")
    return QueueUnavailable(
        f"{path} is a {what} that belongs to {user_name(info.st_uid)} (mode {stat.S_IMODE(info.st_mode):04o}); this"
        f" process runs as {user_name(os.geteuid())} and uses only what is its own. Name another directory, run as"
        f" the user that the queue belongs to, or remove it"
    )


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_token(directory: SpoolDirectory) -> str:
    """The queue's secret, made by the process that opens the queue first; renamed into place, so never half written.

    QueueUnavailable for a short one: an empty token would be equal to the one of a request that has none.
    """
    path = directory.path / "token"
    try:
        fd = open_ours(directory.root_fd, path, os.O_RDONLY)
    except FileNotFoundError:
        _create_token(directory)
        fd = open_ours(directory.root_fd, path, os.O_RDONLY)
    with os.fdopen(fd, encoding="ascii", errors="replace") as file:
        token = file.read().strip()
    if len(token) < TOKEN_CHARS:
        raise QueueUnavailable(
            f"{path} has {len(token)} characters; allowed: {TOKEN_CHARS} or more. Remove it while nothing uses the"
            f" queue: a new one is made at the next start"
        )
    return token


def _create_token(directory: SpoolDirectory) -> None:
    draft = "token.new"
    with contextlib.suppress(FileNotFoundError):  # of a process that died over it
        os.unlink(draft, dir_fd=directory.root_fd)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory.root_fd)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32))
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, "token", src_dir_fd=directory.root_fd, dst_dir_fd=directory.root_fd)
    os.fsync(directory.root_fd)


def set_aside(directory: Path | str) -> Path:
    """Move a queue's file, its journal and its bodies out of the way, whole, under names ending in `.damaged-<time>`.

    For a person to call once everything that uses the queue is stopped. The next `Spool.open` begins an empty queue.
    Returns the new path of the file. Raises QueueUnavailable when there is nothing to set aside, or no access.
    """
    path = Path(directory) / DATABASE
    suffix = time.strftime(".damaged-%Y%m%dT%H%M%SZ", time.gmtime())
    try:
        opened = open_directory(Path(directory))
        with contextlib.closing(opened), opened.writer_lock():
            target = path.with_name(path.name + suffix)
            if target.exists():
                raise QueueUnavailable(f"{target} exists already")
            if not any(path.with_name(path.name + tail).exists() for tail in ("", "-wal")):
                raise QueueUnavailable(f"there is no {path} to set aside")
            moves = {f"{path.name}{tail}": f"{target.name}{tail}" for tail in ("-wal", "-shm", "")}
            for name, new_name in {"bodies": f"bodies{suffix}", **moves}.items():
                with contextlib.suppress(FileNotFoundError):
                    (path.parent / name).rename(path.parent / new_name)
            sync_directory(path.parent)
    except OSError as error:
        raise open_error(Path(directory), error) from error
    return target
