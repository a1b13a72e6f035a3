"""The statements that search: each names its index, and costs the same however long the queue (test_spool_plan.py)."""

from __future__ import annotations

from dataclasses import dataclass

from ...calls.model import State
from .limits import KEPT_HEADERS_CHARS

# --------------------------------------------------------------------------------------------------------------------
# Statements
#
# The loose index scans: `min(function)` beyond the last one is one descent of the b-tree, where DISTINCT would read
# every row. INDEXED BY, since without statistics the planner takes `calls_state` for as good; if an index is ever
# missing, it is an error rather than a slow queue.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlowStatements:
    """The statements that find what is due in flows: calls by function, or callbacks by destination.

    `flows`, of one queue behind `:after`: those with something due at `:now_s`. `due`, of a queue and a flow (?1, ?2):
    the first ?4 rows that are due at ?3.
    """

    flows: str
    due: str


def _build_flows(index: str, waits: str, flow: str, order: str, unless: str = "") -> FlowStatements:
    """The statements for the table that `index` is on: an index over queue, `flow` and `order`, of what `waits`."""
    rows = f"{index.partition('_')[0]} INDEXED BY {index} WHERE {waits} AND queue"
    first = f"SELECT min({flow}) FROM {rows} = :queue AND {flow}"
    flows = f"""
    WITH RECURSIVE found (flow) AS (
        {first} > :after
        UNION ALL
        SELECT ({first} > found.flow) FROM found WHERE found.flow IS NOT NULL
    )
    SELECT flow FROM found WHERE flow IS NOT NULL AND EXISTS (
        SELECT 1 FROM {rows} = :queue AND {flow} = found.flow AND due_s <= :now_s)
"""
    due = f"SELECT seq FROM {rows} = ?1 AND {flow} = ?2 AND due_s <= ?3 {unless} ORDER BY {order} LIMIT ?4"
    return FlowStatements(flows, due)


CALL_FLOWS = _build_flows(
    "calls_queued", "state = 'queued'", "function", "due_s, id", "AND (expires_s IS NULL OR expires_s > ?3)"
)


CALLBACK_FLOWS = _build_flows("callbacks_ready", "state = 'pending' AND ready = 1", "destination", "due_s, seq")


SQL_NEXT_DUE = """
    WITH RECURSIVE queues (queue) AS (
        SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued'
        UNION ALL
        SELECT (SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued' AND queue > queues.queue)
        FROM queues WHERE queues.queue IS NOT NULL
    ), flows (queue, function) AS (
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = queues.queue)
        FROM queues WHERE queues.queue IS NOT NULL
        UNION ALL
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = flows.queue AND calls.function > flows.function)
        FROM flows WHERE flows.function IS NOT NULL
    )
    SELECT min((SELECT min(due_s) FROM calls INDEXED BY calls_queued
        WHERE state = 'queued' AND calls.queue = flows.queue AND calls.function = flows.function AND due_s > :after_s))
    FROM flows WHERE flows.function IS NOT NULL
"""


SQL_ADD_WAITING = """
    INSERT INTO waiting (function, calls, bytes) VALUES (?, ?, ?)
    ON CONFLICT (function) DO UPDATE SET calls = calls + excluded.calls, bytes = bytes + excluded.bytes
"""


SQL_STALE = f"""
    {SQL_NEXT_DUE[: SQL_NEXT_DUE.rindex("SELECT min((")]}
    SELECT seq FROM flows CROSS JOIN calls INDEXED BY calls_queued
    WHERE state = 'queued' AND calls.queue = flows.queue AND calls.function = flows.function AND due_s < :before_s
    AND (started_s IS NULL OR started_s < due_s) LIMIT :limit
"""


SQL_OLD_LETTERS = """
    SELECT seq, id, function FROM calls INDEXED BY calls_dead WHERE state = 'dead' AND finished_s <= :before_s
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = calls.seq
        AND (state IN ('pending', 'running') OR state = 'dead' AND due_s > :before_s))
    LIMIT :limit
"""


SQL_OLD_DEAD_CALLBACKS = """
    SELECT seq, id, function FROM callbacks INDEXED BY callbacks_state CROSS JOIN calls USING (seq)
    WHERE callbacks.state = 'dead' AND calls.state <> 'dead' AND finished_s <= :before_s
    AND callbacks.due_s <= :before_s LIMIT :limit
"""


SQL_LETTER_SIZES = """
    SELECT max(finished_s, coalesce(callbacks.due_s, finished_s)) AS died_s,
        requests.bytes_count + coalesce(results.bytes_count, 0)
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq)
    LEFT JOIN callbacks ON callbacks.seq = calls.seq AND callbacks.state = 'dead'
    WHERE calls.seq IN (SELECT seq FROM calls INDEXED BY calls_dead WHERE state = 'dead')
    OR calls.seq IN (SELECT seq FROM callbacks INDEXED BY callbacks_state WHERE state = 'dead')
    ORDER BY died_s DESC
"""


SQL_EXPIRING = """
    SELECT seq FROM calls INDEXED BY calls_expiring
    WHERE state = 'queued' AND expires_s IS NOT NULL AND expires_s <= :now_s ORDER BY expires_s LIMIT :limit
"""


SQL_READY_CALLBACKS = """
    UPDATE callbacks SET ready = 1 WHERE seq IN (
        SELECT seq FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 0 AND due_s <= :now_s ORDER BY due_s LIMIT :limit)
"""


SQL_NEXT_CALLBACK = """
    SELECT min(due_s) FROM (
        SELECT min(due_s) AS due_s FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 0 AND due_s > :after_s
        UNION ALL
        SELECT min(due_s) FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 1 AND due_s > :after_s)
"""


SQL_ENDED = """
    SELECT value FROM json_each(?)
    WHERE NOT EXISTS (SELECT 1 FROM calls WHERE id = value AND state IN ('queued', 'running'))
"""


SQL_DROP_PAYLOAD = f"""
    UPDATE requests SET file = NULL, inline = NULL,
        headers = CASE WHEN length(headers) > {KEPT_HEADERS_CHARS} THEN '[]' ELSE headers END
    WHERE seq = ?
"""


SQL_FILES = """
    SELECT file FROM requests WHERE seq = :seq AND file IS NOT NULL
    UNION ALL SELECT file FROM results WHERE seq = :seq AND file IS NOT NULL
"""


SQL_OLD_RESULTS = """
    SELECT seq, stored_s, file FROM results WHERE bytes_count IS NOT NULL AND stored_s < :before_s
    AND (stored_s, seq) > (:after_s, :after_seq)
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = results.seq AND callbacks.state <> 'delivered')
    ORDER BY stored_s, seq LIMIT :limit
"""


SQL_OLD_CALLS = """
    SELECT seq, finished_s FROM calls INDEXED BY calls_finished
    WHERE state IN ('done', 'cancelled', 'expired') AND finished_s < :before_s
    AND (finished_s, seq) > (:after_s, :after_seq)
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = calls.seq AND callbacks.state <> 'delivered')
    ORDER BY finished_s, seq LIMIT :limit
"""


# --------------------------------------------------------------------------------------------------------------------
# Lists, newest first: each reads a page and no more, or a page of each state or of each function.
#
# Of one state the newest calls of all functions are wanted, in the order of `seq`, which no index has: but the newest
# :limit are among those functions whose own newest are the :limit newest, and an index has these.
# --------------------------------------------------------------------------------------------------------------------

SQL_PAGE = "SELECT seq FROM calls WHERE seq < :below ORDER BY seq DESC LIMIT :limit"


SQL_PAGE_OF_BOTH = """
    SELECT seq FROM calls INDEXED BY calls_state
    WHERE state = :state AND function = :function AND seq < :below ORDER BY seq DESC LIMIT :limit
"""


_PAGES_OF_STATES = [SQL_PAGE_OF_BOTH.replace(":state", repr(state.value)) for state in State]


SQL_PAGE_OF_FUNCTION = f"""
    SELECT seq FROM (
        {" UNION ALL ".join(f"SELECT * FROM ({page})" for page in _PAGES_OF_STATES)}
    ) ORDER BY seq DESC LIMIT :limit
"""


SQL_PAGE_OF_STATE = """
    WITH RECURSIVE found (function) AS (
        SELECT min(function) FROM calls INDEXED BY calls_state WHERE state = :state
        UNION ALL
        SELECT (SELECT min(function) FROM calls INDEXED BY calls_state
            WHERE state = :state AND calls.function > found.function)
        FROM found WHERE found.function IS NOT NULL
    ), newest (function, seq) AS (
        SELECT function, (SELECT max(seq) FROM calls INDEXED BY calls_state
            WHERE state = :state AND calls.function = found.function AND seq < :below) AS top
        FROM found WHERE top IS NOT NULL ORDER BY top DESC LIMIT :limit
    )
    SELECT calls.seq FROM newest CROSS JOIN calls ON calls.seq IN (
        SELECT seq FROM calls AS same INDEXED BY calls_state
        WHERE same.state = :state AND same.function = newest.function AND same.seq < :below
        ORDER BY same.seq DESC LIMIT :limit)
    ORDER BY calls.seq DESC LIMIT :limit
"""


# Calls whose callback stands so, which are few where people ask for them: those that were given up.
SQL_PAGE_OF_CALLBACKS = """
    SELECT callbacks.seq FROM callbacks INDEXED BY callbacks_state CROSS JOIN calls USING (seq)
    WHERE callbacks.state = :callback AND callbacks.seq < :below
    AND (:state IS NULL OR calls.state = :state) AND (:function IS NULL OR calls.function = :function)
    ORDER BY callbacks.seq DESC LIMIT :limit
"""


# Ids that begin alike are of the same minute; they sort as they were made, where the gateway has made them.
SQL_PAGE_OF_IDS = """
    SELECT seq FROM calls INDEXED BY sqlite_autoindex_calls_1
    WHERE id >= :prefix AND id < :behind
    AND (:state IS NULL OR state = :state) AND (:function IS NULL OR function = :function)
    ORDER BY id DESC LIMIT :limit
"""


# --------------------------------------------------------------------------------------------------------------------
# Figures and news for people.
# --------------------------------------------------------------------------------------------------------------------

SQL_RUNNING = """
    SELECT function, count(*) FROM calls INDEXED BY calls_state WHERE state = 'running' GROUP BY function
"""


SQL_DEAD_COUNT = "SELECT count(*) FROM calls INDEXED BY calls_dead WHERE state = 'dead'"


SQL_CALLBACK_COUNT = "SELECT count(*) FROM callbacks INDEXED BY callbacks_state WHERE state = ?"


SQL_LAST_ENDS = (
    "SELECT max(finished_s) FROM calls INDEXED BY calls_finished WHERE state IN ('done', 'cancelled', 'expired')",
    "SELECT max(finished_s) FROM calls INDEXED BY calls_dead WHERE state = 'dead'",
)


SQL_NEW_CALLS = "SELECT seq FROM calls WHERE seq > ? ORDER BY seq LIMIT ?"


SQL_NEW_LEASES = "SELECT seq FROM leases WHERE fence > ? ORDER BY fence LIMIT ?"


SQL_NEW_ENDS = (
    "SELECT seq FROM calls INDEXED BY calls_finished"
    " WHERE state IN ('done', 'cancelled', 'expired') AND finished_s > ? AND finished_s < ?"
    " ORDER BY finished_s LIMIT ?",
    "SELECT seq FROM calls INDEXED BY calls_dead WHERE state = 'dead' AND finished_s > ? AND finished_s < ?"
    " ORDER BY finished_s LIMIT ?",
)


SQL_NO_LONGER_LEASED = """
    SELECT seq FROM calls WHERE id IN (SELECT value FROM json_each(?))
    AND NOT EXISTS (SELECT 1 FROM leases WHERE leases.seq = calls.seq) LIMIT ?
"""
