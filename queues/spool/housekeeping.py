"""Housekeeping: what has waited too long ends, what has been kept long enough goes, and its room is given back.

It goes through old rows in steps, each a commit of its own, so that no writer waits long.  A step begins where the one
before it ended: rows that must stay (callbacks not delivered) are passed once, not once per step.

What may go is decided in calls/steps.py (`may_forget` and its like); the statements here say the same of many rows, and
a test compares them for every state (test_spool_law.py).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...calls import steps
from ...calls.model import EXCERPT_BYTES, Bounds, State
from ...calls.names import FunctionName
from ...calls.steps import STALE_ERROR
from ...watchdog import log
from .limits import BUSY_S, DEAD_LETTER_BYTES, SET_BACK_S, SPARE_PAGE_COUNT
from .notifier import WakeUp
from .rows import read_stored, save
from .statements import (
    SQL_DROP_PAYLOAD,
    SQL_EXPIRING,
    SQL_FILES,
    SQL_LETTER_SIZES,
    SQL_OLD_CALLS,
    SQL_OLD_DEAD_CALLBACKS,
    SQL_OLD_LETTERS,
    SQL_OLD_RESULTS,
    SQL_STALE,
)
from .transaction import Transaction


def expire(tx: Transaction, now_s: float) -> int:
    """End calls whose time is up, one step of them; return how many."""
    return _expire(tx, SQL_EXPIRING, {"now_s": now_s, "limit": tx.step_count}, now_s, steps.EXPIRED_ERROR)


def expire_stale(tx: Transaction, now_s: float, before_s: float) -> int:
    """End calls that have been due since `before_s`: their queue has no worker, or none that keeps up."""
    return _expire(tx, SQL_STALE, {"before_s": before_s, "limit": tx.step_count}, now_s, STALE_ERROR)


def _expire(tx: Transaction, sql: str, values: dict[str, float], now_s: float, error: str) -> int:
    rows = [seq for (seq,) in tx.db.execute(sql, values)]
    for stored in read_stored(tx.db, rows) if rows else ():
        save(tx, stored, steps.expire(stored.record, now_s, error), now_s)
    return len(rows)


def follow_clock(tx: Transaction, boot: str, offset_s: float) -> float:
    """Have a wall clock that was set back take with it what was due by then, which would wait for it to catch up.

    `offset_s` is the wall clock less the clock of this boot, which cannot be set; the greatest seen is remembered, and
    returned: a call that is put by a clock far from it must come behind this, or it would be taken along.

    A clock that is set forward takes nothing along, since it may be the time that has leapt: so wakes a machine that
    its host had halted.  What waits comes early then, and calls may expire.  Nor is anything shifted after a boot: its
    clock may be the wrong one, as on a board that keeps no time.
    """
    row = tx.db.execute("SELECT boot, offset_s FROM clock").fetchone()
    back_s = row[1] - offset_s if row is not None and row[0] == boot else 0.0
    if row is not None and row[0] == boot and abs(back_s) <= SET_BACK_S:
        return float(row[1])
    if back_s > 0:
        log.warning(f"the wall clock was set back by {back_s:.0f} s: due times of what waits are set back as well")
        tx.db.execute(
            "UPDATE calls SET due_s = due_s - :back_s, expires_s = expires_s - :back_s, started_s = started_s - :back_s"
            " WHERE state = 'queued'",
            {"back_s": back_s},
        )
        tx.db.execute("UPDATE callbacks SET due_s = due_s - ? WHERE state = 'pending'", (back_s,))
        tx.wake_up |= WakeUp.WORK
    if row is None:
        tx.db.execute("INSERT INTO clock VALUES (?, ?)", (boot, offset_s))
    else:
        tx.db.execute("UPDATE clock SET boot = ?, offset_s = ?", (boot, offset_s))
    return offset_s


Position = tuple[float, int]  # of the row where a step has ended: its time and its number


START: Position = (-1e300, -1)


@dataclass(frozen=True, slots=True)
class Dropped:
    """What one step removed: rows, files that nothing names now, and where to go on (None: the end is reached)."""

    count: int
    files: tuple[str, ...]
    next: Position | None


class DropStep(Protocol):
    """One step of dropping what is dropped in many."""

    def __call__(self, tx: Transaction, *, after: Position) -> Dropped: ...


def _read_step(tx: Transaction, sql: str, before_s: float, after: Position) -> list[tuple[Any, ...]]:
    values = {"before_s": before_s, "after_s": after[0], "after_seq": after[1], "limit": tx.step_count}
    return tx.db.execute(sql, values).fetchall()


def drop_results(tx: Transaction, before_s: float, after: Position) -> Dropped:
    """Drop results stored before `before_s`, all but how they begin: one step."""
    rows = _read_step(tx, SQL_OLD_RESULTS, before_s, after)
    tx.db.executemany(
        "UPDATE results SET excerpt = coalesce(excerpt, substr(inline, 1, ?)), headers = '[]',"
        " bytes_count = NULL, file = NULL, inline = NULL WHERE seq = ?",
        [(EXCERPT_BYTES, seq) for seq, _, _ in rows],
    )
    files = tuple(file for _, _, file in rows if file is not None)
    return Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def drop_calls(tx: Transaction, before_s: float, after: Position) -> Dropped:
    """Delete calls that ended before `before_s`, with all that hangs on them: one step."""
    rows = _read_step(tx, SQL_OLD_CALLS, before_s, after)
    files = _delete(tx, [seq for seq, _ in rows])
    return Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def dead_letters_before(db: sqlite3.Connection, now_s: float, bounds: Bounds) -> float:
    """The time up to which dead letters are too old, or too many with those that are newer."""
    before_s = now_s - bounds.dead_s
    left_bytes = float("inf") if bounds.dead_bytes is None else bounds.dead_bytes
    if left_bytes != float("inf"):
        for died_s, bytes_count in db.execute(SQL_LETTER_SIZES):
            left_bytes -= bytes_count + DEAD_LETTER_BYTES
            if left_bytes < 0 or died_s <= before_s:
                return max(before_s, float(died_s))
    return before_s


def drop_dead_letters(tx: Transaction, before_s: float) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """One step of dropping dead letters; return id and function of each, and files that nothing names now."""
    values = {"before_s": before_s, "limit": tx.step_count}
    rows = tx.db.execute(SQL_OLD_LETTERS, values).fetchall() or tx.db.execute(SQL_OLD_DEAD_CALLBACKS, values).fetchall()
    files = _delete(tx, [seq for seq, _, _ in rows])
    return [(call_id, function) for _, call_id, function in rows], files


def _delete(tx: Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Delete calls and all that hangs on them; return the body files they named."""
    files: list[str] = []
    for seq in rows:
        files.extend(file for (file,) in tx.db.execute(SQL_FILES, {"seq": seq}))
        tx.db.execute("DELETE FROM calls WHERE seq = ?", (seq,))
    return tuple(files)


def purge(
    tx: Transaction, state: State, function: FunctionName | None, call_id: str | None, after: Position
) -> Dropped:
    """Delete calls in a final `state`, of one function or with one id if given, behind a row: one step.

    Those with a callback under way stay.
    """
    rows = tx.db.execute(
        "SELECT seq FROM calls WHERE state = :state AND seq > :after AND (:function IS NULL OR function = :function)"
        " AND (:id IS NULL OR id = :id) AND NOT EXISTS (SELECT 1 FROM callbacks"
        " WHERE callbacks.seq = calls.seq AND callbacks.state IN ('pending', 'running')) ORDER BY seq LIMIT :limit",
        {"state": state.value, "after": after[1], "function": function, "id": call_id, "limit": tx.step_count},
    ).fetchall()
    files = _delete(tx, [seq for (seq,) in rows])
    return Dropped(len(rows), files, (0.0, rows[-1][0]) if len(rows) == tx.step_count else None)


def drop_payloads(tx: Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Forget the bodies of calls that will not run again, but not how long they were; return the files they named.

    Long header fields go as well: they can fill a disk as bodies do, and a row that kept them would be written anew.
    """
    files: list[str] = []
    for seq in rows:
        files.extend(
            file for (file,) in tx.db.execute("SELECT file FROM requests WHERE seq = ? AND file IS NOT NULL", (seq,))
        )
        tx.db.execute(SQL_DROP_PAYLOAD, (seq,))
    return tuple(files)


def truncate_journal(db: sqlite3.Connection) -> None:
    """Write the journal back and cut it to nothing, unless a reader is in it just now: then the next time."""
    db.execute("PRAGMA busy_timeout = 0")  # else it would wait for readers, and all writers with it
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")


def forget_idle(tx: Transaction) -> None:
    """Functions that have nothing waiting need no row: strangers can make up names."""
    tx.db.execute("DELETE FROM waiting WHERE calls <= 0")


def find_unnamed(db: sqlite3.Connection, files: Sequence[str]) -> list[str]:
    """Return those of `files` that no call and no result names."""
    sql = (
        "SELECT EXISTS (SELECT 1 FROM requests WHERE file = :file) OR EXISTS (SELECT 1 FROM results WHERE file = :file)"
    )
    return [file for file in files if not db.execute(sql, {"file": file}).fetchone()[0]]


def vacuum(tx: Transaction) -> int:
    """Give some free pages back to the disk; return how many, 0 when only the spare ones are left."""
    (free,) = tx.db.execute("PRAGMA freelist_count").fetchone()
    count: int = max(0, min(free - SPARE_PAGE_COUNT, tx.step_count))
    if count:
        tx.db.execute(f"PRAGMA incremental_vacuum({count})").fetchall()
    return count
