"""Files that are whole or not there, whenever the power fails: a directory of documents, each under a name.

    documents = Documents(Path("state/functions"))
    documents.write("cat.openfaas-fn", b"...")       # when it returns, the document is on the disk
    documents.read_all(); documents.delete("cat.openfaas-fn")
    parse_document(b'{"created_s": 1.5}')            # JSON, and a ValueError for all that is not quite that

Written is a temporary file beside it, which is synced and then takes the name; the directory is synced last.  A crash
at any instant leaves the old document or the new one, and perhaps a temporary file, which the next start removes.

The directory is for its owner only (0700, files 0600).  What changes documents holds its lock: two gateways on one
state would each take the other's for its own.  Everything here blocks on the disk: it belongs in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..calls.names import is_label
from ..watchdog import CannotStart, FaashoundError

_NEW = ".new"  # behind the name of a file that is being written; no document's name begins with a dot
MAX_NAME_BYTES = 255  # of a file (NAME_MAX)


class NotStored(FaashoundError):
    """The disk did not take a document; the text says why."""

    status = 507


class Store(Protocol):
    """Documents, each under a name, which is a part of a file's name.  What changes them blocks."""

    def place(self, name: str) -> str:
        """Return where a document is, for people."""

    def names(self) -> list[str]:
        """Return the names of all documents."""

    def read_all(self) -> Iterator[tuple[str, bytes | OSError]]:
        """Yield the name and the content of each document, or the error that it cannot be read with."""

    def read(self, name: str) -> bytes | None:
        """Return a document; None if there is none of this name."""

    def write(self, name: str, content: bytes) -> None:
        """Have `content` under `name`, for good; what was there is there still if NotStored or the like is raised."""

    def delete(self, name: str) -> None:
        """Have nothing under `name`, for good.  Raises as `write`."""


class Shelves(Protocol):
    """A `Store` for each of some spaces."""

    def spaces(self) -> list[str]:
        """Return the spaces that there are."""

    def space(self, name: str) -> Store:
        """Return the documents of a space, which is made if need be.  Raises NotStored."""


class Documents:
    """The documents in `directory`, which is made if it is not there.  Raises CannotStart."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            for path in directory.glob(f".*{_NEW}"):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotStart(f"state: {directory}: {error.strerror}") from None

    def place(self, name: str) -> str:
        """See `Store`."""
        return str(self.directory / name)

    def read_all(self) -> Iterator[tuple[str, bytes | OSError]]:
        """See `Store`."""
        for path in sorted(self.directory.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                try:
                    yield path.name, path.read_bytes()
                except OSError as error:
                    yield path.name, error

    def names(self) -> list[str]:
        """See `Store`."""
        return [path.name for path in sorted(self.directory.iterdir()) if not path.name.startswith(".")]

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        try:
            return (self.directory / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """See `Store`."""
        try:
            write_whole(self.directory / name, content)
        except OSError as error:
            raise NotStored(f"cannot be stored: {error.strerror}") from None

    def delete(self, name: str) -> None:
        """See `Store`."""
        try:
            (self.directory / name).unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise NotStored(f"cannot be removed: {error.strerror}") from None


class DocumentShelves:
    """A directory of documents for each space, below `directory`; see `Shelves`.  Raises CannotStart."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        Documents(directory)
        self._spaces = {name: Documents(directory / name) for name in self.spaces()}

    def spaces(self) -> list[str]:
        """See `Shelves`."""
        return sorted(path.name for path in self._directory.iterdir() if path.is_dir() and is_label(path.name))

    def space(self, name: str) -> Documents:
        """See `Shelves`."""
        if name not in self._spaces:
            try:
                (self._directory / name).mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise NotStored(f"cannot be stored: {error.strerror}") from None
            self._spaces[name] = Documents(self._directory / name)
        return self._spaces[name]


MAX_TIME_S = 253402300799  # the last second of the year 9999, behind which our calendars end

MAX_DIGITS_COUNT = 300  # of a whole number: a longer one is no float


def parse_document(text: bytes | str) -> Any:
    """Return what a document holds; ValueError for what is no JSON, nested too deep, or no finite number.

    A program may have been killed over it, or a person has edited it: Python takes Infinity and NaN too, which no int()
    takes, and numbers that no float() does.
    """
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def _parse_int(text: str) -> int:
    if len(text) > MAX_DIGITS_COUNT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number that is not finite")
    return number


_DECODER = json.JSONDecoder(parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)


def parse_time(value: object) -> float:
    """Return a time of a document, in seconds since the epoch; ValueError for what is none that calendars have."""
    if not isinstance(value, int | float) or not 0 <= value <= MAX_TIME_S:
        raise ValueError("a time that no calendar has")
    return float(value)


def name_of_new(name: str) -> str:
    """Return what a file is called while it is written; long names that end differently have one in common."""
    return f".{name}"[: MAX_NAME_BYTES - len(_NEW)] + _NEW


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` under the name `path`, whole or not at all, readable for its owner only.  Raises OSError."""
    new = path.with_name(name_of_new(path.name))
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        new.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Have the names in a directory on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def hold_state(directory: Path) -> Iterator[Path]:
    """Have a state directory for ourselves alone; raises CannotStart if another gateway has it."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CannotStart(f"state: {directory}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(f"state: {directory} is another gateway's; allowed: one of its own for each") from None
        yield directory
    finally:
        os.close(fd)
