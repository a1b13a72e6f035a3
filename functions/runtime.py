"""The directory of a running gateway: the sockets of its local functions, and what its processes tell each other.

    with open_runtime_directory(environ) as directory: ...

It is only for the gateway's user (0700), has a short name (the path of a Unix socket has at most 107 bytes), and is
gone when the gateway has ended.  One that was killed leaves its directory; the next gateway of the same user removes
it.  Which directories are in use their locks tell (flock(2)), which also keep systemd-tmpfiles from cleaning them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

PREFIX = "faashound.run."


LONGEST_PARENT_BYTES = 60


def parent_directory(environ: Mapping[str, str]) -> Path:
    """Return where runtime directories are: what the operator's environment names for such things, or /tmp."""
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR", "TMPDIR"):  # systemd.exec(5), the XDG base directories, POSIX
        text = environ.get(name, "")
        if text.startswith("/") and len(os.fsencode(text)) <= LONGEST_PARENT_BYTES and os.access(text, os.W_OK):
            return Path(text)
    return Path("/tmp")  # noqa: S108 - a new directory of our own is made in it


@contextlib.contextmanager
def open_runtime_directory(environ: Mapping[str, str]) -> Iterator[Path]:
    """Make a directory, and remove it at the end; remove what killed gateways have left.  Raises OSError."""
    parent = parent_directory(environ)
    remove_abandoned(parent)
    fd = None
    while fd is None:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            fd = _hold(path)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)


def _hold(path: Path) -> int | None:
    """Lock a new directory; None if another gateway has found it before that, and removed it as abandoned."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits until that has done
            path.stat()
        except FileNotFoundError:
            return None
        stack.pop_all()
    return fd


def remove_abandoned(parent: Path) -> None:
    """Remove the runtime directories of our user that no living gateway holds."""
    for path in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
