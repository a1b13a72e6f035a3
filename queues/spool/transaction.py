"""What an operation writes with: the connection inside a transaction, and what is to be told once that is on disk.

    def run(tx: Transaction) -> Call:
        tx.db.execute(...)
        tx.wake_up |= WakeUp.WORK                          # told to other processes after the commit, never before

It refuses nothing, and knows no rule: those are the operation's (puts.py, claims.py, ends.py, housekeeping.py).
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field

from .limits import SHORT_STEP_COUNT, STEP_COUNT
from .notifier import WakeUp
from .statements import SQL_ADD_WAITING


@dataclass(slots=True)
class Transaction:
    """One transaction of the writer; an operation may be run in more than one of them, and counts in the last."""

    db: sqlite3.Connection
    wake_up: int = WakeUp.NOTHING
    short: bool = False  # the reserve is in use: give room back where no result is lost by it
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
        """How many rows one step of housekeeping may touch."""
        return SHORT_STEP_COUNT if self.short else STEP_COUNT
