"""FIXDOC."""

from __future__ import annotations

import json
import operator
import sqlite3
from dataclasses import dataclass, fields

from ...calls.model import EXCERPT_BYTES, Attempt, Call, Callback, CallbackState, Headers, NewCall, State, StoredBody
from ...calls.names import FunctionName

# --------------------------------------------------------------------------------------------------------------------
# Statements
#
# The loose index scans: `min(function)` beyond the last one is one descent of the b-tree, where DISTINCT would read
# every row. INDEXED BY, since without statistics the planner takes `calls_state` for as good; if an index is ever
# missing, it is an error rather than a slow queue.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What waits in flows, calls by function or callbacks by destination: the statements that find what is due.

    `flows`, of one queue behind `:after`: those with something due at `:now_s`. `due`, of a queue and a flow (?1, ?2):
    the first ?4 rows that are due at ?3.
    """

    flows: str
    due: str


def _build_line(index: str, waits: str, flow: str, order: str, unless: str = "") -> Line:
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
    return Line(flows, due)


CALLS_LINE = _build_line(
    "calls_queued", "state = 'queued'", "function", "due_s, id", "AND (expires_s IS NULL OR expires_s > ?3)"
)


CALLBACKS_LINE = _build_line("callbacks_ready", "state = 'pending' AND ready = 1", "destination", "due_s, seq")


SQL_NEXT_DUE = """
    WITH RECURSIVE line (queue) AS (
        SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued'
        UNION ALL
        SELECT (SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued' AND queue > line.queue)
        FROM line WHERE line.queue IS NOT NULL
    ), lane (queue, function) AS (
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = line.queue)
        FROM line WHERE line.queue IS NOT NULL
        UNION ALL
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function > lane.function)
        FROM lane WHERE lane.function IS NOT NULL
    )
    SELECT min((SELECT min(due_s) FROM calls INDEXED BY calls_queued
        WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function = lane.function AND due_s > :after_s))
    FROM lane WHERE lane.function IS NOT NULL
"""


SQL_ADD_WAITING = """
    INSERT INTO waiting (function, calls, bytes) VALUES (?, ?, ?)
    ON CONFLICT (function) DO UPDATE SET calls = calls + excluded.calls, bytes = bytes + excluded.bytes
"""


SQL_STALE = f"""
    {SQL_NEXT_DUE[: SQL_NEXT_DUE.rindex("SELECT min((")]}
    SELECT seq FROM lane CROSS JOIN calls INDEXED BY calls_queued
    WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function = lane.function AND due_s < :before_s
    LIMIT :limit
"""


SQL_OLD_LETTERS = """
    SELECT seq, id, function FROM calls INDEXED BY calls_dead WHERE state = 'dead' AND finished_s <= :before_s
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = calls.seq AND state IN ('pending', 'running'))
    LIMIT :limit
"""


SQL_OLD_DEAD_CALLBACKS = """
    SELECT seq, id, function FROM callbacks INDEXED BY callbacks_state CROSS JOIN calls USING (seq)
    WHERE callbacks.state = 'dead' AND calls.state <> 'dead' AND finished_s <= :before_s LIMIT :limit
"""


SQL_LETTER_SIZES = """
    SELECT finished_s, requests.bytes_count + coalesce(results.bytes_count, 0)
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq)
    WHERE seq IN (SELECT seq FROM calls INDEXED BY calls_dead WHERE state = 'dead')
    OR seq IN (SELECT seq FROM callbacks INDEXED BY callbacks_state WHERE state = 'dead')
    ORDER BY finished_s DESC
"""


SQL_EXPIRING = """
    SELECT seq FROM calls INDEXED BY calls_expiring
    WHERE state = 'queued' AND expires_s IS NOT NULL AND expires_s <= :now_s ORDER BY expires_s LIMIT :limit
"""


SQL_OPEN_CALLBACK = """
    INSERT INTO callbacks (seq, state, due_s, queue, destination, ready)
    SELECT seq, 'pending', ?2, queue, destination_of(callback_url), ?3 FROM calls JOIN requests USING (seq)
    WHERE seq = ?1 AND callback_url IS NOT NULL
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


SQL_ENDED = """
    SELECT value FROM json_each(?)
    WHERE NOT EXISTS (SELECT 1 FROM calls WHERE id = value AND state IN ('queued', 'running'))
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


_encode_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each call


def _headers_text(headers: Headers) -> str:
    return _encode_json(headers) if headers else "[]"


def _parse_headers(text: str | None) -> Headers:
    return tuple((name, value) for name, value in json.loads(text)) if text and text != "[]" else ()


def _parse_call(row: sqlite3.Row, history: tuple[Attempt, ...]) -> Call:
    return Call(
        id=row["id"],
        function=FunctionName(row["function"]),
        queue=row["queue"],
        method=row["method"],
        path=row["path"],
        query=row["query"],
        headers=_parse_headers(row["headers"]),
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
        result_headers=_parse_headers(row["result_headers"]),
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


_accepted_values = operator.attrgetter(*(field.name for field in fields(NewCall)))  # Call begins with the same fields


def _accepted(call: NewCall) -> Call:
    """The Call that a NewCall has just become."""
    return Call(*_accepted_values(call))
