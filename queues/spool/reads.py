"""Reading: lists and counts for people, what a worker has to stop, who has ended, and when work falls due next.

Contract: each reads one state of the queue, changes nothing, and goes by an index: the cost of a list is that of its
page, of a count that of what is not yet over (tests/queues/test_spool_plan.py looks at each statement's plan).
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...calls.model import Backlog, Call, CallbackState, Changes, State, Stats
from ...calls.names import FunctionName
from .rows import SQL_CALL_LISTED, find_seq, parse_call
from .statements import (
    SQL_CALLBACK_COUNT,
    SQL_DEAD_COUNT,
    SQL_ENDED,
    SQL_LAST_ENDS,
    SQL_NEW_CALLS,
    SQL_NEW_ENDS,
    SQL_NEW_LEASES,
    SQL_NEXT_CALLBACK,
    SQL_NEXT_DUE,
    SQL_NO_LONGER_LEASED,
    SQL_PAGE,
    SQL_PAGE_OF_BOTH,
    SQL_PAGE_OF_CALLBACKS,
    SQL_PAGE_OF_FUNCTION,
    SQL_PAGE_OF_IDS,
    SQL_PAGE_OF_STATE,
    SQL_RUNNING,
)

NO_SEQ = (1 << 63) - 1  # greater than that of any row
BEHIND_IDS = "\x7f"  # sorts behind whatever may follow the beginning of an id
COMMITTED_WITHIN_S = 1.0  # a call's end is stamped before it is committed, by another process's clock
COUNTED = frozenset({CallbackState.PENDING, CallbackState.RUNNING, CallbackState.DEAD})

_MARK = re.compile(r"s([0-9]{1,18})-([0-9]{1,18})-([0-9]{1,12}\.[0-9]{6})", re.ASCII)


def cancelled_ids(db: sqlite3.Connection, owner: str) -> frozenset[str]:
    """Return the calls that `owner` runs and that are to be cancelled."""
    rows = db.execute(
        "SELECT calls.id FROM leases JOIN calls USING (seq)"
        " WHERE leases.owner = ? AND leases.kind = 'call' AND calls.cancel_requested",
        (owner,),
    )
    return frozenset(row[0] for row in rows)


@dataclass(frozen=True, slots=True)
class Page:
    """Which calls to list: all conditions that are not None hold; newest first, behind the call `before`."""

    state: State | None
    function: FunctionName | None
    callback: CallbackState | None
    id_start: str | None
    limit: int
    before: str | None


def choose_page(wanted: Page) -> str:
    """Return the statement that finds a page at the least cost (pure)."""
    if wanted.id_start is not None:
        return SQL_PAGE_OF_IDS
    if wanted.callback is not None:
        return SQL_PAGE_OF_CALLBACKS
    match wanted.state, wanted.function:
        case None, None:
            return SQL_PAGE
        case None, _:
            return SQL_PAGE_OF_FUNCTION
        case _, None:
            return SQL_PAGE_OF_STATE
    return SQL_PAGE_OF_BOTH


def list_calls(db: sqlite3.Connection, wanted: Page) -> list[Call]:
    start = wanted.id_start or ""
    values = {
        "state": wanted.state and wanted.state.value,
        "function": wanted.function,
        "callback": wanted.callback and wanted.callback.value,
        "prefix": start,
        "behind": start + BEHIND_IDS if wanted.before is None else wanted.before,
        "below": NO_SEQ if wanted.before is None else find_seq(db, wanted.before),
        "limit": wanted.limit,
    }
    return read_listed(db, [seq for (seq,) in db.execute(choose_page(wanted), values)])


def read_listed(db: sqlite3.Connection, found: Sequence[int]) -> list[Call]:
    """The calls of some rows, in their order, as lists have them; rows that are gone are left out."""
    rows = db.execute(f"{SQL_CALL_LISTED} WHERE calls.seq IN (SELECT value FROM json_each(?))", (json.dumps(found),))
    by_seq = {row[0]: parse_call(row, ()) for row in rows.fetchall()}
    return [by_seq[seq] for seq in found if seq in by_seq]


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
    queued = db.execute(
        "SELECT queue, count(*), min(due_s) FROM calls WHERE state = 'queued' GROUP BY queue"
    ).fetchall()
    waiting = Counter({queue: count for queue, count, _ in queued})
    waiting.update(dict(db.execute("SELECT queue, count(*) FROM callbacks WHERE state = 'pending' GROUP BY queue")))
    return Stats(
        by_state=by_state,
        by_function=by_function,
        waiting=waiting,
        oldest_due_ages_s={queue: now_s - due_s for queue, _, due_s in queued if due_s <= now_s},
        callback_pending_count=callbacks.get("pending", 0) + callbacks.get("running", 0),
        callback_dead_count=callbacks.get("dead", 0),
        commit_count=commit_count,
    )


def count_backlog(db: sqlite3.Connection, now_s: float) -> Backlog:
    running = dict(db.execute(SQL_RUNNING).fetchall())
    open_counts = dict(db.execute("SELECT function, calls FROM waiting WHERE calls > 0").fetchall())
    by_function = {
        FunctionName(name): (max(open_counts.get(name, 0) - running.get(name, 0), 0), running.get(name, 0))
        for name in open_counts.keys() | running.keys()
    }
    callbacks = {state: _count(db, SQL_CALLBACK_COUNT, state.value) for state in COUNTED}
    return Backlog(
        queued_count=sum(queued for queued, _ in by_function.values()),
        running_count=sum(running.values()),
        dead_count=_count(db, SQL_DEAD_COUNT),
        callback_pending_count=callbacks[CallbackState.PENDING] + callbacks[CallbackState.RUNNING],
        callback_dead_count=callbacks[CallbackState.DEAD],
        oldest_due_age_s=_oldest_age_s(db, now_s),
        by_function=by_function,
    )


def _count(db: sqlite3.Connection, sql: str, *values: object) -> int:
    (count,) = db.execute(sql, values).fetchone()
    return int(count)


def _oldest_age_s(db: sqlite3.Connection, now_s: float) -> float | None:
    """How long the call that is due longest has waited; None if none is."""
    (oldest_s,) = db.execute(SQL_NEXT_DUE, {"after_s": -1e300}).fetchone()
    return None if oldest_s is None or oldest_s > now_s else now_s - oldest_s


# --------------------------------------------------------------------------------------------------------------------
# What has changed: new rows, new leases, and new ends are found by their keys, which only grow.  What was leased when
# it was told last, and is no more, has changed as well (a call to be tried again, a callback that is delivered).  An
# end in the future was stamped by a clock that has been set back since: what ends now comes before it, and is not to
# be missed until then.
# --------------------------------------------------------------------------------------------------------------------


def find_changes(
    db: sqlite3.Connection, mark: str | None, leased_ids: Collection[str], limit: int, now_s: float
) -> Changes:
    now, ahead_s = _read_mark(db, now_s), now_s + COMMITTED_WITHIN_S
    before = None if mark is None else _parse_mark(mark)
    if before is None or before[0] > now[0] or before[2] > ahead_s:
        return Changes((), _build_mark(now), is_whole=mark is None)
    seq, fence, finished_s = before
    questions: list[tuple[str, tuple[object, ...]]] = [
        (SQL_NO_LONGER_LEASED, (json.dumps(list(leased_ids)),)),
        (SQL_NEW_CALLS, (seq,)),
        (SQL_NEW_LEASES, (fence,)),
        *((sql, (finished_s - COMMITTED_WITHIN_S, ahead_s)) for sql in SQL_NEW_ENDS),
    ]
    found = dict.fromkeys(row[0] for sql, values in questions for row in db.execute(sql, (*values, limit + 1)))
    return Changes(read_listed(db, list(found)[:limit]), _build_mark(now), is_whole=len(found) <= limit)


Mark = tuple[int, int, float]


def _read_mark(db: sqlite3.Connection, now_s: float) -> Mark:
    (seq,) = db.execute("SELECT coalesce(max(seq), 0) FROM calls").fetchone()
    (fence,) = db.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'leases'").fetchone()
    finished_s = max(db.execute(sql).fetchone()[0] or 0.0 for sql in SQL_LAST_ENDS)
    return seq, fence, min(finished_s, now_s)


def _build_mark(mark: Mark) -> str:
    return f"s{mark[0]}-{mark[1]}-{mark[2]:.6f}"


def _parse_mark(text: str) -> Mark | None:
    """The mark that a text is; None if it is of another queue, or of a stranger's making."""
    found = _MARK.fullmatch(text)
    return found and (int(found[1]), int(found[2]), float(found[3]))
