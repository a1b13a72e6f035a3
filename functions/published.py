"""The table in force, told by the gateway process that runs the functions to those beside it.

    publish(path, table)                # one process, after each change
    table = PublishedTable(path)        # the others: a Mapping that is always that of the last `publish`

The file is replaced whole, so it is never read half.  A reader looks at each use whether it is another file by now,
which costs two microseconds: no reader is told of a change, and none misses one.  What tells files apart is their
time of change, which we set: no two have the same.  The clock's would be that of the one before within a tick of the
kernel, or for a second on some file systems; and a new file may get the number of the one before the last.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..calls.names import FunctionName
from ..watchdog import NotReady
from .table import Function


def publish(path: Path, table: Mapping[FunctionName, Function]) -> None:
    """Make `table` the one that readers of `path` see."""
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump([dataclasses.asdict(function) for function in table.values()], file)
    changed_s = max(int(time.time()), _changed_s(path) + 1)  # whole seconds: every file system keeps them
    os.utime(new, (changed_s, changed_s))
    new.rename(path)


def _changed_s(path: Path) -> int:
    try:
        return int(path.stat().st_mtime)
    except FileNotFoundError:
        return 0


class PublishedTable(Mapping[FunctionName, Function]):
    """What was published at `path` last; empty before that."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen_ns = -1
        self._table: Mapping[FunctionName, Function] = {}

    def __getitem__(self, name: FunctionName) -> Function:
        return self._current()[name]

    def __iter__(self) -> Iterator[FunctionName]:
        return iter(self._current())

    def __len__(self) -> int:
        return len(self._current())

    def _current(self) -> Mapping[FunctionName, Function]:
        try:
            found = os.stat(self._path)  # noqa: PTH116 - half of what Path takes
            text = None if found.st_mtime_ns == self._seen_ns else self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return self._table
        except OSError as error:  # there is no descriptor now: the next look reads it
            if self._seen_ns < 0:
                raise NotReady(f"the table of functions cannot be read: {error.strerror}; ask again") from None
            return self._table
        if text is not None:
            functions = [_function_of(document) for document in json.loads(text)]
            self._table = {function.name: function for function in functions}
            self._seen_ns = found.st_mtime_ns
        return self._table


def _function_of(document: dict[str, Any]) -> Function:
    return Function(**document | {"name": FunctionName(document["name"]), "secrets": tuple(document["secrets"])})
