"""Ending: of a run, of a delivery, of a lease whose owner is gone; and what people do to a call.

Each function reads the record of a call in its transaction, takes one step of the law (calls/steps.py), and writes back
what that has changed.  Where a lease is to end, its row goes first: if it is not there any more, neither is the right
to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from ...calls import steps
from ...calls.model import Attempt, Call, Kind, Lease, LeaseLost, RunEnd, State
from ...calls.names import FunctionName
from ...calls.steps import Event, Record
from .housekeeping import Dropped, Position, drop_payloads
from .rows import find_stored, leased, read_call, read_stored, save
from .transaction import Transaction

# -- a lease ends


def _end_lease(tx: Transaction, lease: Lease, kind: Kind) -> int:
    """End a lease and return the row that it was for; LeaseLost unless owner and fence still match."""
    if lease.kind != kind:
        raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
    sql = "DELETE FROM leases WHERE fence = ? AND owner = ? RETURNING seq"
    row = tx.db.execute(sql, (lease.fence, lease.owner)).fetchone()
    if row is None:
        raise LeaseLost(f"the lease on call {lease.call.id} has ended, or passed to another worker")
    seq: int = row[0]
    return seq


def _end_call(tx: Transaction, lease: Lease, step: Callable[[Record], Record]) -> State:
    """End the lease on a call by a step that depends on whether the caller has cancelled it meanwhile."""
    seq = _end_lease(tx, lease, "call")
    (cancel_requested,) = tx.db.execute("SELECT cancel_requested FROM calls WHERE seq = ?", (seq,)).fetchone()
    stored = leased(lease, seq, bool(cancel_requested))
    after = step(stored.record)
    save(tx, stored, after)
    return after.state


def finish(tx: Transaction, lease: Lease, end: RunEnd, excerpt: bytes | None, now_s: float) -> tuple[str, ...]:
    """End a call, with its result, whose `excerpt` is given if it is in a file; return files that nothing names now.

    On a disk that is short of room a call that is done gives its payload, which will not be sent again, for its result.
    """
    seq = _end_lease(tx, lease, "call")
    files = drop_payloads(tx, [seq]) if tx.short and end.state is State.DONE else ()
    stored = leased(lease, seq)
    save(tx, stored, steps.end_run(stored.record, end, excerpt, now_s), now_s)
    return files


def retry(tx: Transaction, lease: Lease, attempt: Attempt, due_s: float, excerpt: bytes | None) -> State:
    """Queue a call again that has failed; return where it stands."""
    return _end_call(tx, lease, lambda record: steps.retry_run(record, attempt, due_s, excerpt))


def finish_cancelled(tx: Transaction, lease: Lease, attempt: Attempt) -> None:
    """End a call whose run was stopped."""
    _end_call(tx, lease, lambda record: steps.stop_run(record, attempt))


def release(tx: Transaction, lease: Lease, now_s: float) -> None:
    """Hand back a call or a callback that was not tried."""
    if lease.kind == "call":
        _end_call(tx, lease, lambda record: steps.release(record, now_s))
        return
    stored = leased(lease, _end_lease(tx, lease, "callback"))
    save(tx, stored, steps.release(stored.record, now_s))


def release_all(tx: Transaction, leases: Iterable[Lease], now_s: float) -> None:
    """Hand back what was claimed for nobody, as far as it was."""
    for lease in leases:
        with suppress(LeaseLost):
            release(tx, lease, now_s)


def end_callback(tx: Transaction, lease: Lease, attempt: Attempt, event: Event, due_s: float | None = None) -> None:
    """End a delivery; with `due_s` it is to be tried again."""
    stored = leased(lease, _end_lease(tx, lease, "callback"))
    save(tx, stored, steps.end_callback(stored.record, event, attempt, due_s))


def take_back(tx: Transaction, dead: Collection[str], boot: str, boot_s: float, now_s: float) -> int:
    """End every lease whose owner is in `dead`, whose deadline has passed, or which is of an earlier boot."""
    leases = tx.db.execute("SELECT seq, owner, boot, until_s FROM leases").fetchall()
    lapsed = [seq for seq, owner, of, until_s in leases if owner in dead or of != boot or until_s <= boot_s]
    for stored in read_stored(tx.db, lapsed):
        _drop_lease(tx, stored.seq)
        save(tx, stored, steps.take_back(stored.record, now_s))
    return len(lapsed)


def _drop_lease(tx: Transaction, seq: int) -> None:
    tx.db.execute("DELETE FROM leases WHERE seq = ?", (seq,))


# -- what people do


def cancel(tx: Transaction, call_id: str, now_s: float) -> State:
    """End a queued call, or have the worker told of a running one; return where it stands."""
    stored = find_stored(tx.db, call_id)
    after = steps.cancel(stored.record, now_s)
    save(tx, stored, after)
    return after.state


def cancel_queued(tx: Transaction, function: FunctionName | None, now_s: float, after: Position) -> Dropped:
    """Cancel some of what is queued. Payloads go at once: on a full disk it is them that the operator wants gone."""
    found = tx.db.execute(
        "SELECT seq FROM calls WHERE state = 'queued' AND seq > :after AND (:function IS NULL OR function = :function)"
        " ORDER BY seq LIMIT :limit",
        {"after": after[1], "function": function, "limit": tx.step_count},
    )
    rows = [seq for (seq,) in found]
    for stored in read_stored(tx.db, rows):
        save(tx, stored, steps.cancel(stored.record, now_s))
    files = drop_payloads(tx, rows)
    return Dropped(len(rows), files, (0.0, rows[-1]) if len(rows) == tx.step_count else None)


def requeue_dead(tx: Transaction, call_id: str, now_s: float) -> tuple[Call, list[str]]:
    """Queue a dead letter as if new; also return files that nothing names now."""
    stored = find_stored(tx.db, call_id)
    after = steps.requeue_dead(stored.record, now_s)
    results = tx.db.execute("SELECT file FROM results WHERE seq = ? AND file IS NOT NULL", (stored.seq,)).fetchall()
    _drop_lease(tx, stored.seq)  # a delivery under way loses it
    save(tx, stored, after)
    return read_call(tx.db, stored.seq), [file for (file,) in results]


def requeue_callback(tx: Transaction, call_id: str, now_s: float) -> Call:
    """Have a dead callback delivered again, as if new."""
    stored = find_stored(tx.db, call_id)
    save(tx, stored, steps.requeue_callback(stored.record, now_s))
    return read_call(tx.db, stored.seq)
