"""Claiming: which calls and callbacks come next, the leases on them, and how long those last.

A flow is what takes turns: the calls of one function in one queue, or the callbacks to one destination.  Those with
work due stand in a ring; a claim begins behind the flow that was served last and takes one of each in turn, round after
round (fair queueing).  Taking is set-wise, one statement for all that was picked: it writes what `steps.claim` says.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ...calls.model import CallbackState, Kind, Lease, Renewal, State
from ...calls.steps import Event, next_callback_state, next_state
from .housekeeping import expire
from .notifier import WakeUp
from .owners import boot_s
from .rows import read_call
from .statements import CALL_FLOWS, CALLBACK_FLOWS, SQL_READY_CALLBACKS, FlowStatements
from .transaction import Transaction


class Claimant(NamedTuple):
    """Who claims, when, and for how long: the wall clock decides what is due, the boot clock when the lease ends."""

    owner: str
    now_s: float
    boot: str
    lease_s: float


def _lease(tx: Transaction, seq: int, kind: Kind, claimant: Claimant) -> Lease:
    cursor = tx.db.execute(
        "INSERT INTO leases (seq, kind, owner, boot, until_s) VALUES (?, ?, ?, ?, ?)",
        (seq, kind, claimant.owner, claimant.boot, boot_s() + claimant.lease_s),
    )
    if cursor.lastrowid is None:
        raise AssertionError("an INSERT that succeeded has a row id")
    return Lease(read_call(tx.db, seq), kind, claimant.owner, cursor.lastrowid)


class Wanted(NamedTuple):
    """How much a claim may take: from which queues, how many in all, and how many of each flow named in `capacity`."""

    queues: tuple[str, ...]
    limit: int
    capacity: Mapping[str, int]


Flow = tuple[str, str]  # queue; function or destination


Claimed = tuple[list[Lease], Flow]  # and the flow that was served last


def claim_calls(tx: Transaction, wanted: Wanted, last: Flow, claimant: Claimant) -> Claimed:
    """Take calls in turns, beginning behind the flow that was served `last`."""
    if expire(tx, claimant.now_s) == tx.step_count:
        tx.wake_up |= WakeUp.WORK  # more are waiting to be expired, and may hide live ones: come again
    picked = pick(tx.db, CALL_FLOWS, wanted, last, claimant.now_s)
    state = next_state(State.QUEUED, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE calls SET state = ?, attempts = attempts + 1, started_s = ? WHERE seq = ?",
        [(state, claimant.now_s, seq) for seq, _ in picked],
    )
    leases = [_lease(tx, seq, "call", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def claim_callbacks(tx: Transaction, wanted: Wanted, last: Flow, claimant: Claimant) -> Claimed:
    """Take callbacks in turns, as `claim_calls` takes calls."""
    ready = {"now_s": claimant.now_s, "limit": tx.step_count}
    if tx.db.execute(SQL_READY_CALLBACKS, ready).rowcount == tx.step_count:
        tx.wake_up |= WakeUp.WORK  # more are due than one step may touch: come again
    picked = pick(tx.db, CALLBACK_FLOWS, wanted, last, claimant.now_s)
    state = next_callback_state(CallbackState.PENDING, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE callbacks SET state = ?, attempts = attempts + 1 WHERE seq = ?", [(state, seq) for seq, _ in picked]
    )
    leases = [_lease(tx, seq, "callback", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def pick(
    db: sqlite3.Connection, statements: FlowStatements, wanted: Wanted, last: Flow, now_s: float
) -> list[tuple[int, Flow]]:
    """The rows to claim, one from each flow in turn, round after round, until the limit or the work is reached."""
    flows = list(itertools.islice(_walk_flows(db, statements, wanted, last, now_s), wanted.limit))
    if not flows:
        return []

    def due(flow: Flow, count: int) -> list[tuple[int, Flow]]:
        count = min(count, wanted.capacity.get(flow[1], count))
        return [(seq, flow) for (seq,) in db.execute(statements.due, (*flow, now_s, count))]

    if len(flows) == 1:
        return due(flows[0], wanted.limit)
    share = -(-wanted.limit // len(flows))
    heads = {flow: due(flow, share) for flow in flows}
    if sum(map(len, heads.values())) < wanted.limit:  # some flows are short: the others get their part
        heads = {flow: due(flow, wanted.limit) if len(head) == share else head for flow, head in heads.items()}
    left = dict(wanted.capacity)
    picked: list[tuple[int, Flow]] = []
    for entry in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*heads.values()))):
        name = entry[1][1]
        if left.setdefault(name, wanted.limit) > 0 and len(picked) < wanted.limit:
            left[name] -= 1  # one function, or destination, in two queues shares one capacity
            picked.append(entry)
    return picked


def _walk_flows(
    db: sqlite3.Connection, statements: FlowStatements, wanted: Wanted, last: Flow, now_s: float
) -> Iterator[Flow]:
    """Flows with work due, in a ring that begins behind `last` and ends with it."""
    queues = sorted(set(wanted.queues))
    later = [(name, "", None) for name in queues if name > last[0]]
    earlier = [(name, "", None) for name in queues if name < last[0]]
    own = last[0] in queues
    segments = [(last[0], last[1], None)] * own + later + earlier + [(last[0], "", last[1])] * own
    for queue_name, after, upto in segments:
        rows = db.execute(statements.flows, {"queue": queue_name, "after": after, "now_s": now_s})
        for (flow,) in rows:
            if upto is not None and flow > upto:
                break
            if wanted.capacity.get(flow, 1) > 0:
                yield queue_name, flow


def renew(tx: Transaction, leases: Sequence[Lease], boot: str, until_s: float) -> Renewal:
    """Let leases last until `until_s`, by the clock of this boot; tell which are gone, and what is to be cancelled."""
    lost, cancelled = set[int](), set[str]()
    for lease in leases:
        cursor = tx.db.execute(
            "UPDATE leases SET boot = ?, until_s = ? WHERE fence = ? AND owner = ?",
            (boot, until_s, lease.fence, lease.owner),
        )
        if cursor.rowcount == 0:
            lost.add(lease.fence)
        elif lease.kind == "call":
            row = tx.db.execute("SELECT cancel_requested FROM calls WHERE id = ?", (lease.call.id,)).fetchone()
            cancelled |= {lease.call.id} if row[0] else set()
    return Renewal(frozenset(lost), frozenset(cancelled))
