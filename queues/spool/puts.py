"""Putting a call into the queue: alone, or many by one statement; and what one function may have waiting.

The operations of the queue, here and in claims.py, ends.py, housekeeping.py and reads.py, are plain functions on a
transaction (`tx`) or, for reads, on a connection.  They look before they write: a FaashoundError leaves nothing half
done.  They touch no file and keep nothing in memory, so that the writer may run one again.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from ...calls.model import (
    Call,
    CallExists,
    NewCall,
    QueueLimits,
    TooManyBytesQueued,
    TooManyQueued,
    check_same_request,
)
from ...calls.names import FunctionName
from .limits import FUNCTIONS_COUNT, ROWS_COUNT
from .notifier import WakeUp
from .rows import read_call
from .statements import SQL_ADD_WAITING
from .transaction import Transaction


@lru_cache
def _sql_put_calls(count: int) -> str:
    columns = "id, function, queue, state, due_s, expires_s, idempotency_key, accepted_s"
    return f"INSERT INTO calls ({columns}) VALUES " + ", ".join(["(?, ?, ?, 'queued', ?, ?, ?, ?)"] * count)


def _calls_values(call: NewCall) -> tuple[object, ...]:
    times = call.due_s, call.expires_s, call.idempotency_key, call.accepted_s
    return call.id, str(call.function), call.queue, *times  # an exact str spares sqlite3 a search for adapters


@lru_cache
def _sql_put_requests(count: int) -> str:
    columns = "seq, method, path, query, callback_url, headers, bytes_count, file, inline, body_digest"
    return f"INSERT INTO requests ({columns}) VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * count)


def _requests_values(seq: int, put: Put) -> tuple[object, ...]:
    call, body = put.call, put.call.body
    address = call.method, call.path, call.query, call.callback_url
    return seq, *address, put.headers, body.bytes_count, body.file, body.inline, call.body_digest


@dataclass(frozen=True, slots=True)
class Put:
    """A call on its way into the queue; run by itself, or with others by `put_all`."""

    call: NewCall
    headers: str
    limits: QueueLimits

    def __call__(self, tx: Transaction) -> Call | None:
        """None: the call is in the queue. A Call: this is the one that its idempotency key stands for."""
        call = self.call
        if call.idempotency_key is not None:
            key = call.function, call.idempotency_key
            row = tx.db.execute("SELECT seq FROM calls WHERE function = ? AND idempotency_key = ?", key).fetchone()
            if row is not None:
                earlier = read_call(tx.db, row[0])
                check_same_request(earlier, call)
                return earlier
        waiting = _check_limits(tx.db, call.function, 1, call.body.bytes_count, self.limits)
        cursor = tx.db.execute(_sql_put_calls(1) + " ON CONFLICT (id) DO NOTHING", _calls_values(call))
        if cursor.rowcount == 0:
            raise CallExists(f"the call id {call.id} is in use")
        tx.db.execute(_sql_put_requests(1), _requests_values(cast(int, cursor.lastrowid), self))
        tx.db.execute(SQL_ADD_WAITING, waiting)
        tx.wake_up |= WakeUp.WORK
        return None


def _check_limits(
    db: sqlite3.Connection, function: FunctionName, calls_count: int, bytes_count: int, limits: QueueLimits
) -> tuple[FunctionName, int, int]:
    """What `SQL_ADD_WAITING` adds for so many new calls of a function; TooManyQueued if it may not have them."""
    row = db.execute("SELECT calls, bytes FROM waiting WHERE function = ?", (function,)).fetchone()
    if row is None and limits.calls_count is not None:
        _check_names(db, function)
    calls, total_bytes = row or (0, 0)
    if limits.calls_count is not None and calls + calls_count > limits.calls_count:
        raise TooManyQueued(f"{function} has {calls} calls waiting; max_queued allows {limits.calls_count}")
    if limits.bytes_count is not None and total_bytes + bytes_count > limits.bytes_count:
        raise TooManyBytesQueued(
            f"the calls of {function} that wait have {total_bytes} bytes, this one {bytes_count};"
            f" max_queued_bytes allows {limits.bytes_count}"
        )
    return function, calls_count, bytes_count


def _check_names(db: sqlite3.Connection, function: FunctionName) -> None:
    """Raise TooManyQueued if no function more may have calls waiting: each costs something in every claim."""
    (count,) = db.execute("SELECT count(*) FROM waiting WHERE calls > 0").fetchone()
    if count >= FUNCTIONS_COUNT:
        raise TooManyQueued(f"{count} functions have calls waiting, and {function} is none of them; that is the limit")


def put_all(tx: Transaction, puts: Sequence[Put]) -> None:
    """Queue calls without an idempotency key, all or none; TooManyQueued, sqlite3.IntegrityError if an id is in use.

    Python gives its lock away for each row that a statement yields or is run for, and a busy event loop takes its time
    to hand it back: so there is a statement for many rows, of few different lengths, as each has to be prepared.
    """
    bodies: defaultdict[FunctionName, list[int]] = defaultdict(list)
    for put in puts:
        bodies[put.call.function].append(put.call.body.bytes_count)
    for function, counts in bodies.items():
        tx.db.execute(SQL_ADD_WAITING, _check_limits(tx.db, function, len(counts), sum(counts), puts[0].limits))
    done_count = 0
    while done_count < len(puts):
        count = min(1 << (len(puts) - done_count).bit_length() - 1, ROWS_COUNT)
        chunk = puts[done_count : done_count + count]
        calls = itertools.chain.from_iterable(_calls_values(put.call) for put in chunk)
        last = tx.db.execute(_sql_put_calls(count), tuple(calls)).lastrowid
        # Each row got a number one above the greatest (sqlite.org/autoinc.html), and this transaction alone is writing.
        seqs = itertools.count(cast(int, last) - count + 1)
        requests = itertools.chain.from_iterable(map(_requests_values, seqs, chunk))
        tx.db.execute(_sql_put_requests(count), tuple(requests))
        done_count += count
    tx.wake_up |= WakeUp.WORK
