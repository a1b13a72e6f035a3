"""FIXDOC."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import (
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, cast

from ...calls.model import (
    EXCERPT_BYTES,
    HISTORY_COUNT,
    Attempt,
    Bounds,
    Call,
    CallbackState,
    CallExists,
    CallFinished,
    CallNotDead,
    CallUnknown,
    Kind,
    Lease,
    LeaseLost,
    NewCall,
    QueueLimits,
    Renewal,
    RunEnd,
    State,
    Stats,
    TooManyBytesQueued,
    TooManyQueued,
    check_same_request,
)
from ...calls.names import FunctionName
from ...calls.steps import (
    CALLBACK_TRANSITIONS,
    EXPIRED_ERROR,
    EXPIRED_STATUS,
    LOST_ERROR,
    TRANSITIONS,
    Event,
    lost_wait_s,
    next_callback_state,
    next_state,
    run_event,
)
from ...watchdog import log
from .limits import BUSY_S, LETTER_BYTES, ROWS_COUNT, SET_BACK_S, SPARE_PAGE_COUNT
from .notifier import Ring
from .statements import (
    CALLBACKS_LINE,
    CALLS_LINE,
    SQL_ADD_WAITING,
    SQL_CALL,
    SQL_CALL_LISTED,
    SQL_ENDED,
    SQL_EXPIRING,
    SQL_FILES,
    SQL_LETTER_SIZES,
    SQL_NEXT_CALLBACK,
    SQL_NEXT_DUE,
    SQL_OLD_CALLS,
    SQL_OLD_DEAD_CALLBACKS,
    SQL_OLD_LETTERS,
    SQL_OLD_RESULTS,
    SQL_OPEN_CALLBACK,
    SQL_READY_CALLBACKS,
    SQL_STALE,
    Line,
    _headers_text,
    _parse_call,
)
from .transaction import _Transaction

# --------------------------------------------------------------------------------------------------------------------
# Operations
#
# Plain functions on a transaction (`tx`) or, for reads, on a connection. They look before they write: a FaashoundError
# leaves nothing half done. They touch no file and keep nothing in memory, so that the writer may run one again.
# --------------------------------------------------------------------------------------------------------------------


def _rows(db: sqlite3.Connection, sql: str, values: Sequence[object]) -> list[sqlite3.Row]:
    cursor = db.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, values).fetchall()


def _load(db: sqlite3.Connection, seq: int) -> Call:
    (row,) = _rows(db, SQL_CALL + "WHERE calls.seq = ?", (seq,))
    return _parse_call(row, _history(db, seq))


def _history(db: sqlite3.Connection, seq: int) -> tuple[Attempt, ...]:
    rows = db.execute("SELECT started_s, finished_s, status, error FROM attempts WHERE seq = ? ORDER BY number", (seq,))
    return tuple(itertools.starmap(Attempt, rows))


def _find(db: sqlite3.Connection, call_id: str) -> tuple[int, State]:
    row = db.execute("SELECT seq, state FROM calls WHERE id = ?", (call_id,)).fetchone()
    if row is None:
        raise CallUnknown(f"no call has the id {call_id}")
    return row[0], State(row[1])


def _get(db: sqlite3.Connection, call_id: str) -> Call | None:
    for row in _rows(db, SQL_CALL + "WHERE calls.id = ?", (call_id,)):
        return _parse_call(row, _history(db, row["seq"]))
    return None


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


def _requests_values(seq: int, put: _Put) -> tuple[object, ...]:
    call, body = put.call, put.call.body
    address = call.method, call.path, call.query, call.callback_url
    return seq, *address, put.headers, body.bytes_count, body.file, body.inline, call.body_digest


@dataclass(frozen=True, slots=True)
class _Put:
    """A call on its way into the queue; run by itself, or with others by `_put_all`."""

    call: NewCall
    headers: str
    limits: QueueLimits

    def __call__(self, tx: _Transaction) -> Call | None:
        """None: the call is in the queue. A Call: this is the one that its idempotency key stands for."""
        call = self.call
        if call.idempotency_key is not None:
            key = call.function, call.idempotency_key
            row = tx.db.execute("SELECT seq FROM calls WHERE function = ? AND idempotency_key = ?", key).fetchone()
            if row is not None:
                earlier = _load(tx.db, row[0])
                check_same_request(earlier, call)
                return earlier
        waiting = _check_limits(tx.db, call.function, 1, call.body.bytes_count, self.limits)
        cursor = tx.db.execute(_sql_put_calls(1) + " ON CONFLICT (id) DO NOTHING", _calls_values(call))
        if cursor.rowcount == 0:
            raise CallExists(f"the call id {call.id} is in use")
        tx.db.execute(_sql_put_requests(1), _requests_values(cast(int, cursor.lastrowid), self))
        tx.db.execute(SQL_ADD_WAITING, waiting)
        tx.ring |= Ring.WORK
        return None


def _check_limits(
    db: sqlite3.Connection, function: FunctionName, calls_count: int, bytes_count: int, limits: QueueLimits
) -> tuple[FunctionName, int, int]:
    """What `SQL_ADD_WAITING` adds for so many new calls of a function; TooManyQueued if it may not have them."""
    row = db.execute("SELECT calls, bytes FROM waiting WHERE function = ?", (function,)).fetchone()
    calls, total_bytes = row or (0, 0)
    if limits.calls_count is not None and calls + calls_count > limits.calls_count:
        raise TooManyQueued(f"{function} has {calls} calls waiting; max_queued allows {limits.calls_count}")
    if limits.bytes_count is not None and total_bytes + bytes_count > limits.bytes_count:
        raise TooManyBytesQueued(
            f"the calls of {function} that wait have {total_bytes} bytes, this one {bytes_count};"
            f" max_queued_bytes allows {limits.bytes_count}"
        )
    return function, calls_count, bytes_count


def _put_all(tx: _Transaction, puts: Sequence[_Put]) -> None:
    """Queues calls without an idempotency key, all or none; TooManyQueued, sqlite3.IntegrityError if an id is in use.

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
        # Each row got a number one above the greatest (sqlite.org/autoinc.html), and nobody else is writing.
        seqs = itertools.count(cast(int, last) - count + 1)
        requests = itertools.chain.from_iterable(map(_requests_values, seqs, chunk))
        tx.db.execute(_sql_put_requests(count), tuple(requests))
        done_count += count
    tx.ring |= Ring.WORK


@dataclass(frozen=True, slots=True)
class _Claimant:
    """Who claims, when, and until when: the wall clock decides what is due, the boot clock when the lease ends."""

    owner: str
    now_s: float
    boot: str
    until_s: float


def _lease(tx: _Transaction, seq: int, kind: Kind, claimant: _Claimant) -> Lease:
    cursor = tx.db.execute(
        "INSERT INTO leases (seq, kind, owner, boot, until_s) VALUES (?, ?, ?, ?, ?)",
        (seq, kind, claimant.owner, claimant.boot, claimant.until_s),
    )
    if cursor.lastrowid is None:
        raise AssertionError("an INSERT that succeeded has a row id")
    return Lease(_load(tx.db, seq), kind, claimant.owner, cursor.lastrowid)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How much a claim may take: from which queues, how many in all, and how many of each flow named in `room`."""

    queues: tuple[str, ...]
    limit: int
    room: Mapping[str, int]


_Flow = tuple[str, str]  # queue; function or destination


_Claimed = tuple[list[Lease], _Flow]  # and the flow that was served last


def _claim(tx: _Transaction, wanted: _Wanted, last: _Flow, claimant: _Claimant) -> _Claimed:
    """Takes calls in turns, beginning behind the flow that was served `last`."""
    if _expire(tx, claimant.now_s) == tx.step_count:
        tx.ring |= Ring.WORK  # more are waiting to be expired, and may hide live ones: come again
    picked = _pick(tx.db, CALLS_LINE, wanted, last, claimant.now_s)
    state = next_state(State.QUEUED, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE calls SET state = ?, attempts = attempts + 1, started_s = ? WHERE seq = ?",
        [(state, claimant.now_s, seq) for seq, _ in picked],
    )
    leases = [_lease(tx, seq, "call", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def _claim_callbacks(tx: _Transaction, wanted: _Wanted, last: _Flow, claimant: _Claimant) -> _Claimed:
    """Takes callbacks in turns, as `_claim` takes calls."""
    ready = {"now_s": claimant.now_s, "limit": tx.step_count}
    if tx.db.execute(SQL_READY_CALLBACKS, ready).rowcount == tx.step_count:
        tx.ring |= Ring.WORK  # more are due than one step may touch: come again
    picked = _pick(tx.db, CALLBACKS_LINE, wanted, last, claimant.now_s)
    state = next_callback_state(CallbackState.PENDING, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE callbacks SET state = ?, attempts = attempts + 1 WHERE seq = ?", [(state, seq) for seq, _ in picked]
    )
    leases = [_lease(tx, seq, "callback", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def _pick(db: sqlite3.Connection, line: Line, wanted: _Wanted, last: _Flow, now_s: float) -> list[tuple[int, _Flow]]:
    """The rows to claim, one from each flow in turn, round after round, until the limit or the work is reached."""
    flows = list(itertools.islice(_walk_flows(db, line, wanted, last, now_s), wanted.limit))
    if not flows:
        return []

    def due(flow: _Flow, count: int) -> list[tuple[int, _Flow]]:
        count = min(count, wanted.room.get(flow[1], count))
        return [(seq, flow) for (seq,) in db.execute(line.due, (*flow, now_s, count))]

    share = -(-wanted.limit // len(flows))
    heads = {flow: due(flow, share) for flow in flows}
    if sum(map(len, heads.values())) < wanted.limit:  # some flows are short: the others get their part
        heads = {flow: due(flow, wanted.limit) if len(head) == share else head for flow, head in heads.items()}
    left = dict(wanted.room)
    picked: list[tuple[int, _Flow]] = []
    for entry in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*heads.values()))):
        name = entry[1][1]
        if left.setdefault(name, wanted.limit) > 0 and len(picked) < wanted.limit:
            left[name] -= 1  # one function, or destination, in two queues shares one room
            picked.append(entry)
    return picked


def _walk_flows(db: sqlite3.Connection, line: Line, wanted: _Wanted, last: _Flow, now_s: float) -> Iterator[_Flow]:
    """Flows with work due, in a ring that begins behind `last` and ends with it."""
    queues = sorted(set(wanted.queues))
    later = [(name, "", None) for name in queues if name > last[0]]
    earlier = [(name, "", None) for name in queues if name < last[0]]
    own = last[0] in queues
    segments = [(last[0], last[1], None)] * own + later + earlier + [(last[0], "", last[1])] * own
    for queue_name, after, upto in segments:
        rows = db.execute(line.flows, {"queue": queue_name, "after": after, "now_s": now_s})
        for (flow,) in rows:
            if upto is not None and flow > upto:
                break
            if wanted.room.get(flow, 1) > 0:
                yield queue_name, flow


def _expire(tx: _Transaction, now_s: float) -> int:
    rows = tx.db.execute(SQL_EXPIRING, {"now_s": now_s, "limit": tx.step_count}).fetchall()
    return _end_expired(tx, rows, now_s, EXPIRED_ERROR)


def _end_expired(tx: _Transaction, rows: Sequence[tuple[int]], now_s: float, error: str) -> int:
    state = next_state(State.QUEUED, Event.EXPIRE).value
    tx.db.executemany(
        "UPDATE calls SET state = ?, finished_s = ?, status = coalesce(status, ?), error = coalesce(error, ?)"
        " WHERE seq = ?",
        [(state, now_s, EXPIRED_STATUS, error, seq) for (seq,) in rows],
    )
    _count_rows(tx, [seq for (seq,) in rows], -1)
    for (seq,) in rows:
        _open_callback(tx, seq, now_s)
        tx.ring |= Ring.FINISHED
    return len(rows)


def _open_callback(tx: _Transaction, seq: int, due_s: float, ready: bool = True) -> None:
    """A call has ended: its outcome is to be delivered, if that was asked for."""
    if tx.db.execute(SQL_OPEN_CALLBACK, (seq, due_s, ready)).rowcount:
        tx.ring |= Ring.WORK


STALE_ERROR = "it was not run within max_queue_age"


def _expire_stale(tx: _Transaction, now_s: float, before_s: float) -> int:
    """Ends calls that have been due since `before_s`: their queue has no worker, or none that keeps up."""
    rows = tx.db.execute(SQL_STALE, {"before_s": before_s, "limit": tx.step_count}).fetchall()
    return _end_expired(tx, rows, now_s, STALE_ERROR)


def _end_lease(tx: _Transaction, lease: Lease, kind: Kind) -> int:
    """Ends a lease and returns the row that it was for; LeaseLost unless owner and fence still match."""
    if lease.kind != kind:
        raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
    sql = "DELETE FROM leases WHERE fence = ? AND owner = ? RETURNING seq"
    row = tx.db.execute(sql, (lease.fence, lease.owner)).fetchone()
    if row is None:
        raise LeaseLost(f"the lease on call {lease.call.id} has passed to someone else")
    seq: int = row[0]
    return seq


def _unlease(tx: _Transaction, fence: int) -> None:
    tx.db.execute("DELETE FROM leases WHERE fence = ?", (fence,))


def _add_attempt(tx: _Transaction, seq: int, attempt: Attempt) -> None:
    (number,) = tx.db.execute(
        "INSERT INTO attempts (seq, number, started_s, finished_s, status, error)"
        " SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, ?4, ?5 FROM attempts WHERE seq = ?1 RETURNING number",
        (seq, attempt.started_s, attempt.finished_s, attempt.status, attempt.error),
    ).fetchone()
    if number > HISTORY_COUNT:
        tx.db.execute("DELETE FROM attempts WHERE seq = ? AND number <= ?", (seq, number - HISTORY_COUNT))


@dataclass(frozen=True, slots=True)
class _Ending:
    """A run's end, ready to be written: with the beginning of a result that is in a file, and its callback's time."""

    run: RunEnd
    excerpt: bytes | None
    callback_due_s: float


def _finish(tx: _Transaction, lease: Lease, ending: _Ending) -> tuple[str, ...]:
    """Ends a call, with its result; returns files that nothing names now.

    On a disk that is short of room a call that is done gives its payload, which will not be sent again, for its result.
    """
    seq = _end_lease(tx, lease, "call")
    run, attempt = ending.run, ending.run.attempt
    files = _drop_payloads(tx, [seq]) if tx.short and run.state is State.DONE else ()
    tx.count_waiting(lease.call.function, -1, -lease.call.body.bytes_count)
    _add_attempt(tx, seq, attempt)
    tx.db.execute(
        "UPDATE calls SET state = ?, finished_s = ?, status = ?, error = ?, duration_s = ? WHERE seq = ?",
        (
            next_state(State.RUNNING, run_event(run)).value,
            attempt.finished_s,
            run.status,
            attempt.error,
            run.duration_s,
            seq,
        ),
    )
    _store_result(tx, seq, ending)
    tx.ring |= Ring.FINISHED
    if lease.call.callback_url is not None:
        _open_callback(tx, seq, ending.callback_due_s, ready=run.callback_due_s is None)
    return files


def _drop_payloads(tx: _Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Forgets the bodies of calls that will not run again, but not how long they were; returns the files they named."""
    files: list[str] = []
    for seq in rows:
        files.extend(
            file for (file,) in tx.db.execute("SELECT file FROM requests WHERE seq = ? AND file IS NOT NULL", (seq,))
        )
        tx.db.execute("UPDATE requests SET file = NULL, inline = NULL WHERE seq = ?", (seq,))
    return tuple(files)


def _store_result(tx: _Transaction, seq: int, ending: _Ending) -> None:
    run, body = ending.run, ending.run.result
    if body is None and ending.excerpt is None and not run.result_headers:
        tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))  # an earlier attempt's excerpt
        return
    tx.db.execute(
        "INSERT OR REPLACE INTO results (seq, stored_s, headers, excerpt, bytes_count, file, inline)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            seq,
            run.attempt.finished_s,
            _headers_text(run.result_headers),
            ending.excerpt,
            None if body is None else body.bytes_count,
            None if body is None else body.file,
            None if body is None else body.inline,
        ),
    )


def _retry(tx: _Transaction, lease: Lease, attempt: Attempt, due_s: float, excerpt: bytes | None) -> State:
    seq = _end_lease(tx, lease, "call")
    _add_attempt(tx, seq, attempt)
    tx.db.execute("UPDATE calls SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))
    if excerpt is not None:
        tx.db.execute(
            "INSERT INTO results (seq, stored_s, headers, excerpt) VALUES (?, ?, '[]', ?)",
            (seq, attempt.finished_s, excerpt),
        )
    return _queue_again(tx, seq, Event.RETRY, due_s, attempt.finished_s)


def _queue_again(tx: _Transaction, seq: int, event: Event, due_s: float, now_s: float) -> State:
    """Back into the queue, unless someone has asked meanwhile for an end: then this is it."""
    (cancel,) = tx.db.execute("SELECT cancel_requested FROM calls WHERE seq = ?", (seq,)).fetchone()
    if cancel:
        _end_cancelled(tx, seq, State.RUNNING, Event.STOP, now_s)
        return State.CANCELLED
    state = next_state(State.RUNNING, event)
    tx.db.execute("UPDATE calls SET state = ?, due_s = ? WHERE seq = ?", (state.value, due_s, seq))
    tx.ring |= Ring.WORK
    return state


def _count_rows(tx: _Transaction, rows: Sequence[int], calls_count: int) -> None:
    """Calls are about to begin to wait (1), or no longer will (-1)."""
    for seq in rows:
        sql = "SELECT function, bytes_count FROM calls JOIN requests USING (seq) WHERE seq = ?"
        function, bytes_count = tx.db.execute(sql, (seq,)).fetchone()
        tx.count_waiting(function, calls_count, calls_count * bytes_count)


def _end_cancelled(tx: _Transaction, seq: int, state: State, event: Event, now_s: float) -> None:
    _count_rows(tx, [seq], -1)
    tx.db.execute(
        "UPDATE calls SET state = ?, finished_s = ?, cancel_requested = 1 WHERE seq = ?",
        (next_state(state, event).value, now_s, seq),
    )
    tx.ring |= Ring.FINISHED


def _finish_cancelled(tx: _Transaction, lease: Lease, attempt: Attempt) -> None:
    seq = _end_lease(tx, lease, "call")
    _add_attempt(tx, seq, attempt)
    tx.db.execute("UPDATE calls SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    _end_cancelled(tx, seq, State.RUNNING, Event.STOP, attempt.finished_s)


def _release(tx: _Transaction, lease: Lease, now_s: float) -> None:
    """Hands back what was not tried: the attempt is not counted and the place in the order is kept."""
    seq = _end_lease(tx, lease, lease.kind)
    if lease.kind == "callback":
        tx.db.execute("UPDATE callbacks SET attempts = attempts - 1 WHERE seq = ?", (seq,))
        _callback_again(tx, seq, Event.HAND_BACK, lease.call.callback.due_s if lease.call.callback else now_s)
        return
    tx.db.execute("UPDATE calls SET attempts = attempts - 1 WHERE seq = ?", (seq,))
    _queue_again(tx, seq, Event.HAND_BACK, lease.call.due_s, now_s)


def _callback_again(tx: _Transaction, seq: int, event: Event, due_s: float) -> None:
    state = next_callback_state(CallbackState.RUNNING, event).value
    tx.db.execute("UPDATE callbacks SET state = ?, due_s = ?, ready = 0 WHERE seq = ?", (state, due_s, seq))
    tx.ring |= Ring.WORK


def _end_callback(tx: _Transaction, lease: Lease, attempt: Attempt, event: Event, due_s: float | None = None) -> None:
    seq = _end_lease(tx, lease, "callback")
    tx.db.execute("UPDATE callbacks SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    if due_s is not None:
        _callback_again(tx, seq, event, due_s)
    else:
        state = next_callback_state(CallbackState.RUNNING, event).value
        tx.db.execute("UPDATE callbacks SET state = ? WHERE seq = ?", (state, seq))


def _take_back(tx: _Transaction, dead: Collection[str], boot: str, boot_s: float, now_s: float) -> int:
    """Ends every lease whose owner is in `dead`, whose deadline has passed, or which is of an earlier boot."""
    rows = tx.db.execute(
        "SELECT leases.fence, leases.seq, leases.kind, leases.owner, leases.boot, leases.until_s,"
        " calls.started_s, calls.due_s, callbacks.attempts"
        " FROM leases JOIN calls USING (seq) LEFT JOIN callbacks USING (seq)"
    ).fetchall()
    lapsed = [row for row in rows if row[3] in dead or row[4] != boot or row[5] <= boot_s]
    for fence, seq, kind, _, _, _, started_s, due_s, attempts in lapsed:
        _unlease(tx, fence)
        if kind == "callback":
            tx.db.execute("UPDATE callbacks SET status = NULL, error = ? WHERE seq = ?", (LOST_ERROR, seq))
            _callback_again(tx, seq, Event.HAND_BACK, now_s + lost_wait_s(attempts))
        else:
            _add_attempt(tx, seq, Attempt(started_s, now_s, None, LOST_ERROR))
            tx.db.execute("UPDATE calls SET status = NULL, error = ? WHERE seq = ?", (LOST_ERROR, seq))
            _queue_again(tx, seq, Event.HAND_BACK, due_s, now_s)
    return len(lapsed)


def _follow_clock(tx: _Transaction, boot: str, offset_s: float) -> None:
    """Has a wall clock that was set back take with it what was due by then, which would wait for it to catch up.

    `offset_s` is the wall clock less the clock of this boot, which nobody sets; the greatest seen is remembered.
    A clock set forward only lets things come early, and nothing is shifted for it.
    """
    row = tx.db.execute("SELECT boot, offset_s FROM clock").fetchone()
    back_s = row[1] - offset_s if row is not None and row[0] == boot else 0.0
    if back_s > SET_BACK_S:
        log.warning(f"the wall clock was set back by {back_s:.0f} s: due times of what waits are set back as well")
        tx.db.execute(
            "UPDATE calls SET due_s = due_s - :back_s, expires_s = expires_s - :back_s WHERE state = 'queued'",
            {"back_s": back_s},
        )
        tx.db.execute("UPDATE callbacks SET due_s = due_s - ? WHERE state = 'pending'", (back_s,))
        tx.ring |= Ring.WORK
    if row is None:
        tx.db.execute("INSERT INTO clock VALUES (?, ?)", (boot, offset_s))
    elif row[0] != boot or back_s > SET_BACK_S or offset_s > row[1] + SET_BACK_S:
        tx.db.execute("UPDATE clock SET boot = ?, offset_s = ?", (boot, offset_s))


def _renew(tx: _Transaction, leases: Sequence[Lease], boot: str, until_s: float) -> Renewal:
    lost, cancelled = set(), set()
    for lease in leases:
        cursor = tx.db.execute(
            "UPDATE leases SET boot = ?, until_s = ? WHERE fence = ? AND owner = ?",
            (boot, until_s, lease.fence, lease.owner),
        )
        if cursor.rowcount == 0:
            lost.add(lease.call.id)
        elif lease.kind == "call":
            row = tx.db.execute("SELECT cancel_requested FROM calls WHERE id = ?", (lease.call.id,)).fetchone()
            cancelled |= {lease.call.id} if row[0] else set()
    return Renewal(frozenset(lost), frozenset(cancelled))


def _cancel(tx: _Transaction, call_id: str, now_s: float) -> State:
    seq, state = _find(tx.db, call_id)
    if (state, Event.CANCEL) not in TRANSITIONS:
        raise CallFinished(f"the call is {state.value}: there is nothing left to cancel")
    if state is State.QUEUED:
        _end_cancelled(tx, seq, state, Event.CANCEL, now_s)
    else:
        tx.db.execute("UPDATE calls SET cancel_requested = 1 WHERE seq = ?", (seq,))
        tx.ring |= Ring.CANCEL
    return next_state(state, Event.CANCEL)


def _cancel_queued(tx: _Transaction, function: FunctionName | None, now_s: float, after_seq: int) -> _Dropped:
    """One step of cancelling what is queued. Payloads go at once: on a full disk it is them that someone wants gone."""
    rows = tx.db.execute(
        "SELECT seq FROM calls WHERE state = 'queued' AND seq > :after AND (:function IS NULL OR function = :function)"
        " ORDER BY seq LIMIT :limit",
        {"after": after_seq, "function": function, "limit": tx.step_count},
    ).fetchall()
    for (seq,) in rows:
        _end_cancelled(tx, seq, State.QUEUED, Event.CANCEL, now_s)
    files = _drop_payloads(tx, [seq for (seq,) in rows])
    return _Dropped(len(rows), files, (0.0, rows[-1][0]) if len(rows) == tx.step_count else None)


def _cancelled_ids(db: sqlite3.Connection, owner: str) -> frozenset[str]:
    rows = db.execute(
        "SELECT calls.id FROM leases JOIN calls USING (seq)"
        " WHERE leases.owner = ? AND leases.kind = 'call' AND calls.cancel_requested",
        (owner,),
    )
    return frozenset(row[0] for row in rows)


def _requeue_dead(tx: _Transaction, call_id: str, now_s: float) -> tuple[Call, list[str]]:
    """The dead letter starts afresh: no expiry, no attempts, no result, no callback. Also returns files to drop."""
    seq, state = _find(tx.db, call_id)
    if (state, Event.REQUEUE) not in TRANSITIONS:
        raise CallNotDead(f"only a dead letter can be queued again; the call is {state.value}")
    _count_rows(tx, [seq], 1)
    files = [row[0] for row in tx.db.execute("SELECT file FROM results WHERE seq = ? AND file IS NOT NULL", (seq,))]
    tx.db.execute(
        "UPDATE calls SET state = ?, due_s = ?, expires_s = NULL, attempts = 0, started_s = NULL, finished_s = NULL,"
        " duration_s = NULL, cancel_requested = 0 WHERE seq = ?",
        (next_state(state, Event.REQUEUE).value, now_s, seq),
    )
    tx.db.execute("DELETE FROM leases WHERE seq = ?", (seq,))  # a delivery under way loses it
    tx.db.execute("DELETE FROM callbacks WHERE seq = ?", (seq,))
    tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))
    tx.ring |= Ring.WORK
    return _load(tx.db, seq), files


def _requeue_callback(tx: _Transaction, call_id: str, now_s: float) -> Call:
    seq, _ = _find(tx.db, call_id)
    row = tx.db.execute("SELECT state FROM callbacks WHERE seq = ?", (seq,)).fetchone()
    if row is None or (CallbackState(row[0]), Event.REQUEUE) not in CALLBACK_TRANSITIONS:
        raise CallNotDead(f"only a dead callback can be queued again; this one is {row[0] if row else 'not there'}")
    state = next_callback_state(CallbackState(row[0]), Event.REQUEUE).value
    sql = "UPDATE callbacks SET state = ?, attempts = 0, due_s = ?, ready = 0 WHERE seq = ?"
    tx.db.execute(sql, (state, now_s, seq))
    tx.ring |= Ring.WORK
    return _load(tx.db, seq)


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which calls to list: all conditions that are not None hold; newest first."""

    state: State | None
    function: FunctionName | None
    limit: int
    before: str | None


def _list(db: sqlite3.Connection, wanted: _Filter) -> list[Call]:
    states = State if wanted.state is None else [wanted.state]
    terms: list[tuple[str, object]] = []
    if wanted.function is not None:
        terms.append(("function = ?", wanted.function))
    if wanted.before is not None:
        terms.append(("seq < ?", _find(db, wanted.before)[0]))
    if terms or wanted.state is not None:  # with the states, an index has all that the search needs
        terms = [(f"state IN ({', '.join(repr(state.value) for state in states)})", None), *terms]
    where = "WHERE " + " AND ".join(term for term, _ in terms) if terms else ""
    values = [value for _, value in terms if value is not None]
    page = f"SELECT seq FROM calls {where} ORDER BY seq DESC LIMIT ?"
    rows = _rows(db, f"{SQL_CALL_LISTED} WHERE calls.seq IN ({page}) ORDER BY calls.seq DESC", (*values, wanted.limit))
    return [_parse_call(row, ()) for row in rows]


def _ended(db: sqlite3.Connection, call_ids: Sequence[str]) -> frozenset[str]:
    """Those of `call_ids` that have reached a final state, or are gone."""
    rows = db.execute(SQL_ENDED, (json.dumps(call_ids),))
    return frozenset(call_id for (call_id,) in rows)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """When work falls due next, and whether other owners hold leases that may need taking back."""

    call_due_s: float | None
    callback_due_s: float | None
    others_lease: bool


def _look_ahead(db: sqlite3.Connection, call_after_s: float, callback_after_s: float, mine: Sequence[str]) -> _Outlook:
    (call_due_s,) = db.execute(SQL_NEXT_DUE, {"after_s": call_after_s}).fetchone()
    (callback_due_s,) = db.execute(SQL_NEXT_CALLBACK, {"after_s": callback_after_s}).fetchone()
    owners = db.execute("SELECT owner FROM leases")
    return _Outlook(call_due_s, callback_due_s, any(owner not in mine for (owner,) in owners))


def _count(db: sqlite3.Connection, now_s: float, commit_count: int) -> Stats:
    by_function: dict[tuple[FunctionName, State], int] = {}
    by_state = dict.fromkeys(State, 0)
    for state, function, count in db.execute("SELECT state, function, count(*) FROM calls GROUP BY state, function"):
        by_function[FunctionName(function), State(state)] = count
        by_state[State(state)] += count
    callbacks = dict(db.execute("SELECT state, count(*) FROM callbacks GROUP BY state").fetchall())
    waiting = Counter(dict(db.execute("SELECT queue, count(*) FROM calls WHERE state = 'queued' GROUP BY queue")))
    waiting.update(dict(db.execute("SELECT queue, count(*) FROM callbacks WHERE state = 'pending' GROUP BY queue")))
    (oldest_s,) = db.execute(SQL_NEXT_DUE, {"after_s": -1e300}).fetchone()
    return Stats(
        by_state=by_state,
        by_function=by_function,
        waiting=waiting,
        oldest_due_age_s=None if oldest_s is None or oldest_s > now_s else now_s - oldest_s,
        callback_pending_count=callbacks.get("pending", 0) + callbacks.get("running", 0),
        callback_dead_count=callbacks.get("dead", 0),
        commit_count=commit_count,
    )


# Housekeeping goes through old rows in steps, each a commit of its own, so that no writer waits long. A step begins
# where the one before it ended: rows that must stay (callbacks not delivered) are passed once, not once per step.

_Position = tuple[float, int]


_START: _Position = (-1e300, -1)


@dataclass(frozen=True, slots=True)
class _Dropped:
    """What one step removed: rows, files that nothing names now, and where to go on (None: the end is reached)."""

    count: int
    files: tuple[str, ...]
    next: _Position | None


class _Step(Protocol):
    """One step of dropping what is older than `before_s`."""

    def __call__(self, tx: _Transaction, before_s: float, after: _Position) -> _Dropped: ...


def _step(tx: _Transaction, sql: str, before_s: float, after: _Position) -> list[tuple[Any, ...]]:
    values = {"before_s": before_s, "after_s": after[0], "after_seq": after[1], "limit": tx.step_count}
    return tx.db.execute(sql, values).fetchall()


def _drop_results(tx: _Transaction, before_s: float, after: _Position) -> _Dropped:
    rows = _step(tx, SQL_OLD_RESULTS, before_s, after)
    tx.db.executemany(
        "UPDATE results SET excerpt = coalesce(excerpt, substr(inline, 1, ?)), headers = '[]',"
        " bytes_count = NULL, file = NULL, inline = NULL WHERE seq = ?",
        [(EXCERPT_BYTES, seq) for seq, _, _ in rows],
    )
    files = tuple(file for _, _, file in rows if file is not None)
    return _Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def _drop_calls(tx: _Transaction, before_s: float, after: _Position) -> _Dropped:
    rows = _step(tx, SQL_OLD_CALLS, before_s, after)
    files = _delete(tx, [seq for seq, _ in rows])
    return _Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def _letters_before(db: sqlite3.Connection, now_s: float, bounds: Bounds) -> float:
    """The time up to which letters are too old, or too many with those that are newer."""
    before_s = now_s - bounds.dead_s
    left_bytes = float("inf") if bounds.dead_bytes is None else bounds.dead_bytes
    if left_bytes != float("inf"):
        for finished_s, bytes_count in db.execute(SQL_LETTER_SIZES):
            left_bytes -= bytes_count + LETTER_BYTES
            if left_bytes < 0 or finished_s <= before_s:
                return max(before_s, float(finished_s))
    return before_s


def _drop_letters(tx: _Transaction, before_s: float) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """One step of dropping letters; returns id and function of each, and files that nothing names now."""
    values = {"before_s": before_s, "limit": tx.step_count}
    rows = tx.db.execute(SQL_OLD_LETTERS, values).fetchall() or tx.db.execute(SQL_OLD_DEAD_CALLBACKS, values).fetchall()
    files = _delete(tx, [seq for seq, _, _ in rows])
    return [(call_id, function) for _, call_id, function in rows], files


def _delete(tx: _Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Deletes calls and all that hangs on them; returns the body files they named."""
    files: list[str] = []
    for seq in rows:
        files.extend(file for (file,) in tx.db.execute(SQL_FILES, {"seq": seq}))
        tx.db.execute("DELETE FROM calls WHERE seq = ?", (seq,))
    return tuple(files)


def _purge(
    tx: _Transaction, state: State, function: FunctionName | None, call_id: str | None, after_seq: int
) -> _Dropped:
    rows = tx.db.execute(
        "SELECT seq FROM calls WHERE state = :state AND seq > :after AND (:function IS NULL OR function = :function)"
        " AND (:id IS NULL OR id = :id) AND NOT EXISTS (SELECT 1 FROM callbacks"
        " WHERE callbacks.seq = calls.seq AND callbacks.state IN ('pending', 'running')) ORDER BY seq LIMIT :limit",
        {"state": state.value, "after": after_seq, "function": function, "id": call_id, "limit": tx.step_count},
    ).fetchall()
    files = _delete(tx, [seq for (seq,) in rows])
    return _Dropped(len(rows), files, (0.0, rows[-1][0]) if len(rows) == tx.step_count else None)


def _truncate_journal(db: sqlite3.Connection) -> None:
    """Writes the journal back and cuts it to nothing, unless someone reads from it just now: then the next time."""
    db.execute("PRAGMA busy_timeout = 0")  # else it would wait for readers, and all writers with it
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")


def _forget_idle(tx: _Transaction) -> None:
    """Functions that have nothing waiting need no row: strangers can make up names."""
    tx.db.execute("DELETE FROM waiting WHERE calls <= 0")


def _unnamed(db: sqlite3.Connection, files: Sequence[str]) -> list[str]:
    sql = (
        "SELECT EXISTS (SELECT 1 FROM requests WHERE file = :file) OR EXISTS (SELECT 1 FROM results WHERE file = :file)"
    )
    return [file for file in files if not db.execute(sql, {"file": file}).fetchone()[0]]


def _vacuum(tx: _Transaction) -> int:
    """Gives some free pages back to the disk; returns how many, 0 when only the spare ones are left."""
    (free,) = tx.db.execute("PRAGMA freelist_count").fetchone()
    count: int = max(0, min(free - SPARE_PAGE_COUNT, tx.step_count))
    if count:
        tx.db.execute(f"PRAGMA incremental_vacuum({count})").fetchall()
    return count
