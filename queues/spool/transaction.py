"""FIXDOC."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

from .limits import SHORT_STEP_COUNT, STEP_COUNT
from .notifier import Ring
from .statements import SQL_ADD_WAITING


@dataclass(slots=True)
class _Transaction:
    """What an operation works with: the connection, inside a transaction, and whom to ring once that is on disk."""

    db: sqlite3.Connection
    ring: Ring = Ring.NOTHING
    short: bool = False  # the reserve is in use: give room back where it costs nobody a result
    waiting: dict[str, list[int]] = field(default_factory=dict)  # how calls and bytes of a function change by this

    def count_waiting(self, function: str, calls_count: int, bytes_count: int) -> None:
        """So many calls, with so many bytes, wait more, or less if negative; written once for a group."""
        change = self.waiting.setdefault(function, [0, 0])
        change[0] += calls_count
        change[1] += bytes_count

    def write_waiting(self) -> None:
        """To be called before the commit."""
        self.db.executemany(SQL_ADD_WAITING, [(str(name), *change) for name, change in self.waiting.items()])

    @property
    def step_count(self) -> int:
        return SHORT_STEP_COUNT if self.short else STEP_COUNT
