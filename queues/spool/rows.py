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

# In the order in which `parse_call` takes them: a look at a row by the names of its columns goes through all of them.
_SQL_CALL = """
    SELECT calls.seq, {long}, calls.id, function, calls.queue, method, requests.bytes_count, requests.file,
        calls.due_s, expires_s, idempotency_key, accepted_s, body_digest,
        calls.state, calls.attempts, started_s, finished_s, calls.status, calls.error, duration_s, cancel_requested,
        results.bytes_count, results.file,
        callbacks.state, callbacks.attempts, callbacks.due_s, callbacks.status, callbacks.error
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq) LEFT JOIN callbacks USING (seq)
"""

SQL_CALL = _SQL_CALL.format(
    long="EXISTS (SELECT 1 FROM attempts WHERE attempts.seq = calls.seq), path, query, callback_url, requests.headers,"
    " requests.inline, results.headers, results.inline,"
    f" coalesce(results.excerpt, substr(results.inline, 1, {EXCERPT_BYTES}))"
)

# A list leaves out what callers may make long: a thousand calls with 40 KB of header fields each would be 40 MB.
SQL_CALL_LISTED = _SQL_CALL.format(long="0, '', '', NULL, NULL, NULL, NULL, NULL, NULL")


def read_call(db: sqlite3.Connection, seq: int) -> Call:
    """Return the call of a row that is there."""
    (row,) = db.execute(SQL_CALL + "WHERE calls.seq = ?", (seq,)).fetchall()
    return _read_whole(db, row)


def find_call(db: sqlite3.Connection, call_id: str) -> Call | None:
    """Return the call with an id, or None."""
    for row in db.execute(SQL_CALL + "WHERE calls.id = ?", (call_id,)).fetchall():
        return _read_whole(db, row)
    return None


def find_seq(db: sqlite3.Connection, call_id: str) -> int:
    """Return the row of a call; CallUnknown if there is none."""
    row = db.execute("SELECT seq FROM calls WHERE id = ?", (call_id,)).fetchone()
    if row is None:
        raise CallUnknown(f"no call has the id {call_id}")
    return cast(int, row[0])


def _read_whole(db: sqlite3.Connection, row: Sequence[Any]) -> Call:
    seq, has_history, *_ = row
    return parse_call(row, _read_history(db, seq) if has_history else ())


def _read_history(db: sqlite3.Connection, seq: int) -> tuple[Attempt, ...]:
    rows = db.execute("SELECT started_s, finished_s, status, error FROM attempts WHERE seq = ? ORDER BY number", (seq,))
    return tuple(itertools.starmap(Attempt, rows))


_decode_json = json.JSONDecoder().decode  # json.loads looks at all its options first


def build_headers(headers: Headers) -> str:
    """Return header fields as they are stored, in JSON: pairs of text, for which no encoder has to be made."""
    quoted = encode_basestring_ascii
    return f"[{','.join([f'[{quoted(name)},{quoted(value)}]' for name, value in headers])}]"


def parse_headers(text: str | None) -> Headers:
    """Return stored header fields."""
    return tuple(map(tuple, _decode_json(text))) if text and text != "[]" else ()


def parse_call(row: Sequence[Any], history: tuple[Attempt, ...]) -> Call:
    """Return the call that a row of `SQL_CALL` is."""
    _, _, path, query, callback_url, headers, inline, result_headers, result_inline, excerpt, *short = row
    call_id, function, queue, method, bytes_count, file, due_s, expires_s, key, accepted_s, digest, *facts = short
    state, attempts, started_s, finished_s, status, error, duration_s, cancel_requested, *ended = facts
    result_bytes_count, result_file, *callback = ended
    return Call(
        call_id,
        FunctionName(function),
        queue,
        method,
        path,
        query,
        parse_headers(headers),
        StoredBody(bytes_count, inline, file),
        callback_url,
        due_s,
        expires_s,
        key,
        accepted_s,
        digest,
        State(state),
        attempts,
        started_s,
        finished_s,
        status,
        error,
        duration_s,
        bool(cancel_requested),
        None if result_bytes_count is None else StoredBody(result_bytes_count, result_inline, result_file),
        parse_headers(result_headers),
        excerpt,
        None if callback[0] is None else _build_callback(*callback),
        history,
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
