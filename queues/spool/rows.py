"""Rows of the queue's file, read as calls or as the records that the law works on, and written back after a step.

    stored = find_stored(tx.db, call_id)
    save(tx, stored, steps.cancel(stored.record, now_s))

`save` writes what the step has changed, and nothing else; it keeps the counts of what waits, and notes whom to wake.
Leases are not written here: claims.py and ends.py do that first, since the row of a lease is what decides whether there
may be a step at all.

It refuses to: decide anything.  What may happen to a call, and what follows from it, stands in calls/steps.py.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple, cast

from ...calls.destinations import destination_of
from ...calls.model import (
    EXCERPT_BYTES,
    HISTORY_COUNT,
    Attempt,
    Call,
    Callback,
    CallbackState,
    CallUnknown,
    Headers,
    Lease,
    State,
    StoredBody,
)
from ...calls.names import FunctionName
from ...calls.steps import UNREAD_ANSWER, WAITING, Hold, Record, StoredAnswer
from .notifier import WakeUp
from .transaction import Transaction

# --------------------------------------------------------------------------------------------------------------------
# Calls
# --------------------------------------------------------------------------------------------------------------------

_SQL_CALL = """
    SELECT calls.*, requests.method, {long}, requests.body_digest, requests.bytes_count, requests.file,
        results.bytes_count AS result_bytes_count, results.file AS result_file,
        callbacks.state AS callback_state, callbacks.attempts AS callback_attempts, callbacks.due_s AS callback_due_s,
        callbacks.status AS callback_status, callbacks.error AS callback_error
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq) LEFT JOIN callbacks USING (seq)
"""

SQL_CALL = _SQL_CALL.format(
    long="requests.path, requests.query, requests.callback_url, requests.headers, requests.inline,"
    " results.headers AS result_headers, results.inline AS result_inline,"
    f" coalesce(results.excerpt, substr(results.inline, 1, {EXCERPT_BYTES})) AS excerpt"
)

# A list leaves out what callers may make long: a thousand calls with 40 KB of header fields each would be 40 MB.
SQL_CALL_LISTED = _SQL_CALL.format(
    long="'' AS path, '' AS query, NULL AS callback_url, NULL AS headers, NULL AS inline,"
    " NULL AS result_headers, NULL AS result_inline, NULL AS excerpt"
)


def read_rows(db: sqlite3.Connection, sql: str, values: Sequence[object]) -> list[sqlite3.Row]:
    """Return the rows of a query, with the names of their columns."""
    cursor = db.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, values).fetchall()


def read_call(db: sqlite3.Connection, seq: int) -> Call:
    """Return the call of a row that is there."""
    (row,) = read_rows(db, SQL_CALL + "WHERE calls.seq = ?", (seq,))
    return parse_call(row, _read_history(db, seq))


def find_call(db: sqlite3.Connection, call_id: str) -> Call | None:
    """Return the call with an id, or None."""
    for row in read_rows(db, SQL_CALL + "WHERE calls.id = ?", (call_id,)):
        return parse_call(row, _read_history(db, row["seq"]))
    return None


def find_seq(db: sqlite3.Connection, call_id: str) -> int:
    """Return the row of a call; CallUnknown if there is none."""
    row = db.execute("SELECT seq FROM calls WHERE id = ?", (call_id,)).fetchone()
    if row is None:
        raise CallUnknown(f"no call has the id {call_id}")
    return cast(int, row[0])


def _read_history(db: sqlite3.Connection, seq: int) -> tuple[Attempt, ...]:
    rows = db.execute("SELECT started_s, finished_s, status, error FROM attempts WHERE seq = ? ORDER BY number", (seq,))
    return tuple(itertools.starmap(Attempt, rows))


def build_headers(headers: Headers) -> str:
    """Return header fields as they are stored, in JSON: pairs of text, for which no encoder has to be made."""
    quoted = encode_basestring_ascii
    return f"[{','.join([f'[{quoted(name)},{quoted(value)}]' for name, value in headers])}]"


def parse_headers(text: str | None) -> Headers:
    """Return stored header fields."""
    return tuple((name, value) for name, value in json.loads(text)) if text and text != "[]" else ()


def parse_call(row: sqlite3.Row, history: tuple[Attempt, ...]) -> Call:
    """Return the call that a row of `SQL_CALL` is."""
    return Call(
        id=row["id"],
        function=FunctionName(row["function"]),
        queue=row["queue"],
        method=row["method"],
        path=row["path"],
        query=row["query"],
        headers=parse_headers(row["headers"]),
        body=StoredBody(row["bytes_count"], row["inline"], row["file"]),
        callback_url=row["callback_url"],
        due_s=row["due_s"],
        expires_s=row["expires_s"],
        idempotency_key=row["idempotency_key"],
        accepted_s=row["accepted_s"],
        body_digest=row["body_digest"],
        state=State(row["state"]),
        attempts=row["attempts"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        status=row["status"],
        error=row["error"],
        duration_s=row["duration_s"],
        cancel_requested=bool(row["cancel_requested"]),
        result=_parse_result(row),
        result_headers=parse_headers(row["result_headers"]),
        excerpt=row["excerpt"],
        callback=_parse_callback(row),
        history=history,
    )


def _parse_result(row: sqlite3.Row) -> StoredBody | None:
    if row["result_bytes_count"] is None:
        return None
    return StoredBody(row["result_bytes_count"], row["result_inline"], row["result_file"])


def _parse_callback(row: sqlite3.Row) -> Callback | None:
    if row["callback_state"] is None:
        return None
    return Callback(
        CallbackState(row["callback_state"]),
        row["callback_attempts"],
        row["callback_due_s"],
        row["callback_status"],
        row["callback_error"],
    )


# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A call as steps need it: its row, the record, and what its function is charged while it waits.

    `attempt_count` are the attempts in its history, if that is known.
    """

    seq: int
    function: str
    queue: str
    callback_url: str | None
    bytes_count: int
    record: Record
    attempt_count: int | None = None


_COLUMNS = (
    *("state", "due_s", "expires_s", "wants_callback", "attempts", "started_s", "finished_s", "status", "error"),
    *("duration_s", "cancel_requested"),
)
if Record._fields[: len(_COLUMNS)] != _COLUMNS:
    raise AssertionError("the columns of calls stand in a record in this order")

_SQL_RECORD = """
    SELECT calls.seq, function, calls.queue, callback_url, bytes_count,
        calls.state, calls.due_s, expires_s, calls.attempts, started_s, finished_s,
        calls.status, calls.error, duration_s, cancel_requested,
        callbacks.state, callbacks.attempts, callbacks.due_s, callbacks.status, callbacks.error,
        leases.kind, leases.owner, leases.fence
    FROM calls JOIN requests USING (seq) LEFT JOIN callbacks USING (seq) LEFT JOIN leases USING (seq) WHERE
"""


def read_stored(db: sqlite3.Connection, rows: Sequence[int]) -> list[Stored]:
    """Return what steps need of the calls in `rows`."""
    found = db.execute(f"{_SQL_RECORD} calls.seq IN (SELECT value FROM json_each(?))", (json.dumps(rows),))
    return list(itertools.starmap(_parse_stored, found))


def find_stored(db: sqlite3.Connection, call_id: str) -> Stored:
    """Return what steps need of the call with an id; CallUnknown if there is none."""
    (stored,) = read_stored(db, [find_seq(db, call_id)])
    return stored


def _parse_stored(
    seq: int, function: str, queue: str, callback_url: str | None, bytes_count: int, *facts: Any
) -> Stored:
    state, due_s, expires_s, attempts, started_s, finished_s, status, error, duration_s, cancel_requested = facts[:10]
    callback, hold = facts[10:15], facts[15:]
    record = Record(
        State(state),
        due_s,
        expires_s,
        callback_url is not None,
        attempts,
        started_s,
        finished_s,
        status,
        error,
        duration_s,
        bool(cancel_requested),
        None if callback[0] is None else _build_callback(*callback),
        None if hold[0] is None else Hold(*hold),
        (),
        UNREAD_ANSWER,
    )
    return Stored(seq, function, queue, callback_url, bytes_count, record)


def _build_callback(state: str, attempts: int, due_s: float, status: int | None, error: str | None) -> Callback:
    return Callback(CallbackState(state), attempts, due_s, status, error)


def leased(lease: Lease, seq: int, cancel_requested: bool = False) -> Stored:
    """Return what steps need of a call that was leased: nothing of it has changed since, but for a cancel."""
    call = lease.call
    record = Record(
        call.state,
        call.due_s,
        call.expires_s,
        call.callback_url is not None,
        call.attempts,
        call.started_s,
        call.finished_s,
        call.status,
        call.error,
        call.duration_s,
        cancel_requested,
        call.callback,
        Hold(lease.kind, lease.owner, lease.fence),
        (),
        UNREAD_ANSWER,
    )
    url, bytes_count = call.callback_url, call.body.bytes_count
    return Stored(seq, call.function, call.queue, url, bytes_count, record, len(call.history))


# --------------------------------------------------------------------------------------------------------------------
# Writing back
# --------------------------------------------------------------------------------------------------------------------


def save(tx: Transaction, stored: Stored, after: Record, now_s: float = 0.0) -> None:
    """Write what a step has changed of a call, except its lease; a new callback that is due at `now_s` is ready."""
    seq, before = stored.seq, stored.record
    changed = tuple([i for i in _POSITIONS if after[i] is not before[i] and after[i] != before[i]])
    if changed:
        values = [after.state.value if i == _STATE else after[i] for i in changed]
        tx.db.execute(_sql_update_call(changed), (*values, seq))
    if after.state is not before.state:
        _note_state(tx, stored, after.state)
    if after.cancel_requested and after.state is State.RUNNING:
        tx.wake_up |= WakeUp.CANCEL
    for attempt in after.history:
        _add_attempt(tx, seq, attempt, stored.attempt_count)
    if after.answer is not before.answer:
        _save_answer(tx, seq, after.answer)
    if after.callback is not before.callback:
        _save_callback(tx, stored, after.callback, now_s)


_POSITIONS = range(len(_COLUMNS))
_STATE = _COLUMNS.index("state")


@lru_cache
def _sql_update_call(positions: tuple[int, ...]) -> str:
    return f"UPDATE calls SET {', '.join(f'{_COLUMNS[i]} = ?' for i in positions)} WHERE seq = ?"


def _note_state(tx: Transaction, stored: Stored, state: State) -> None:
    """Count the call in or out of what waits, and tell those who wait for it."""
    waits, waited = state in WAITING, stored.record.state in WAITING
    if not waits:
        tx.wake_up |= WakeUp.FINISHED
    elif state is State.QUEUED:
        tx.wake_up |= WakeUp.WORK
    if waits is not waited:
        change = 1 if waits else -1
        tx.count_waiting(stored.function, change, change * stored.bytes_count)


def _add_attempt(tx: Transaction, seq: int, attempt: Attempt, known_count: int | None) -> None:
    facts = attempt.started_s, attempt.finished_s, attempt.status, attempt.error
    if known_count is not None and known_count < HISTORY_COUNT:  # none has been dropped, so they are numbered from 1
        tx.db.execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?)", (seq, known_count + 1, *facts))
        return
    (number,) = tx.db.execute(
        "INSERT INTO attempts (seq, number, started_s, finished_s, status, error)"
        " SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, ?4, ?5 FROM attempts WHERE seq = ?1 RETURNING number",
        (seq, *facts),
    ).fetchone()
    if number > HISTORY_COUNT:
        tx.db.execute("DELETE FROM attempts WHERE seq = ? AND number <= ?", (seq, number - HISTORY_COUNT))


def _save_answer(tx: Transaction, seq: int, answer: StoredAnswer | None) -> None:
    if answer is None:
        tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))
        return
    result = answer.result
    body = (None, None, None) if result is None else (result.bytes_count, result.file, result.inline)
    tx.db.execute(
        "INSERT OR REPLACE INTO results (seq, stored_s, headers, excerpt, bytes_count, file, inline)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (seq, answer.stored_s, build_headers(answer.headers), answer.excerpt, *body),
    )


def _save_callback(tx: Transaction, stored: Stored, callback: Callback | None, now_s: float) -> None:
    before, seq = stored.record.callback, stored.seq
    if callback is None:
        tx.db.execute("DELETE FROM callbacks WHERE seq = ?", (seq,))
        return
    state = callback.state.value
    if before is None:
        destination = destination_of(stored.callback_url or "")
        tx.db.execute(
            "INSERT INTO callbacks (seq, state, due_s, queue, destination, ready) VALUES (?, ?, ?, ?, ?, ?)",
            (seq, state, callback.due_s, stored.queue, destination, callback.due_s <= now_s),
        )
    elif callback.state is not CallbackState.DELIVERED:
        tx.db.execute(
            "UPDATE callbacks SET state = ?, attempts = ?, due_s = ?, status = ?, error = ?, ready = 0 WHERE seq = ?",
            (state, callback.attempts, callback.due_s, callback.status, callback.error, seq),
        )
    else:  # it waits no more, and will not: its time is of no interest, and the indexes over that are left alone
        tx.db.execute(
            "UPDATE callbacks SET state = ?, status = ?, error = ? WHERE seq = ?",
            (state, callback.status, callback.error, seq),
        )
    if callback.state is CallbackState.PENDING:
        tx.wake_up |= WakeUp.WORK
