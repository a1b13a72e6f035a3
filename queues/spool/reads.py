"""Reading: lists and counts for people, what a worker has to stop, who has ended, and when work falls due next."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ...calls.model import Call, State, Stats
from ...calls.names import FunctionName
from .rows import SQL_CALL_LISTED, find_seq, parse_call, read_rows
from .statements import SQL_ENDED, SQL_NEXT_CALLBACK, SQL_NEXT_DUE


def cancelled_ids(db: sqlite3.Connection, owner: str) -> frozenset[str]:
    """Return the calls that `owner` runs and that are to be cancelled."""
    rows = db.execute(
        "SELECT calls.id FROM leases JOIN calls USING (seq)"
        " WHERE leases.owner = ? AND leases.kind = 'call' AND calls.cancel_requested",
        (owner,),
    )
    return frozenset(row[0] for row in rows)


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Which calls to list: all conditions that are not None hold; newest first."""

    state: State | None
    function: FunctionName | None
    limit: int
    before: str | None


def list_calls(db: sqlite3.Connection, wanted: CallFilter) -> list[Call]:
    states = State if wanted.state is None else [wanted.state]
    terms: list[tuple[str, object]] = []
    if wanted.function is not None:
        terms.append(("function = ?", wanted.function))
    if wanted.before is not None:
        terms.append(("seq < ?", find_seq(db, wanted.before)))
    if terms or wanted.state is not None:  # with the states, an index has all that the search needs
        terms = [(f"state IN ({', '.join(repr(state.value) for state in states)})", None), *terms]
    where = "WHERE " + " AND ".join(term for term, _ in terms) if terms else ""
    values = [value for _, value in terms if value is not None]
    page = f"SELECT seq FROM calls {where} ORDER BY seq DESC LIMIT ?"
    rows = read_rows(
        db, f"{SQL_CALL_LISTED} WHERE calls.seq IN ({page}) ORDER BY calls.seq DESC", (*values, wanted.limit)
    )
    return [parse_call(row, ()) for row in rows]


def find_ended(db: sqlite3.Connection, call_ids: Sequence[str]) -> frozenset[str]:
    """Those of `call_ids` that have reached a final state, or are gone."""
    rows = db.execute(SQL_ENDED, (json.dumps(call_ids),))
    return frozenset(call_id for (call_id,) in rows)


@dataclass(frozen=True, slots=True)
class Outlook:
    """When work falls due next, and whether other owners hold leases that may need taking back."""

    call_due_s: float | None
    callback_due_s: float | None
    others_lease: bool


def look_ahead(db: sqlite3.Connection, call_after_s: float, callback_after_s: float, mine: Sequence[str]) -> Outlook:
    """Return what comes next behind what was due by the times given; `mine` are the owners of this process."""
    (call_due_s,) = db.execute(SQL_NEXT_DUE, {"after_s": call_after_s}).fetchone()
    (callback_due_s,) = db.execute(SQL_NEXT_CALLBACK, {"after_s": callback_after_s}).fetchone()
    owners = db.execute("SELECT owner FROM leases")
    return Outlook(call_due_s, callback_due_s, any(owner not in mine for (owner,) in owners))


def count_calls(db: sqlite3.Connection, now_s: float, commit_count: int) -> Stats:
    """Return the queue in figures; it reads an index from end to end."""
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
