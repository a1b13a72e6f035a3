"""What a claim costs: every statement of the hot path uses its index, and its work does not grow with the backlog."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator

import pytest

from faashound.calls.model import State
from faashound.calls.names import parse_function_name
from faashound.queues.spool.claims import Wanted, pick
from faashound.queues.spool.database import migrate_schema
from faashound.queues.spool.reads import Page, choose_page
from faashound.queues.spool.statements import (
    CALL_FLOWS,
    CALLBACK_FLOWS,
    SQL_CALLBACK_COUNT,
    SQL_DEAD_COUNT,
    SQL_EXPIRING,
    SQL_LAST_ENDS,
    SQL_NEW_CALLS,
    SQL_NEW_ENDS,
    SQL_NEXT_CALLBACK,
    SQL_NEXT_DUE,
    SQL_NO_LONGER_LEASED,
    SQL_OLD_CALLS,
    SQL_OLD_DEAD_CALLBACKS,
    SQL_OLD_LETTERS,
    SQL_OLD_RESULTS,
    SQL_PAGE,
    SQL_PAGE_OF_BOTH,
    SQL_PAGE_OF_CALLBACKS,
    SQL_PAGE_OF_FUNCTION,
    SQL_PAGE_OF_IDS,
    SQL_PAGE_OF_STATE,
    SQL_READY_CALLBACKS,
    SQL_RUNNING,
    SQL_STALE,
)

NOW_S = 1000.0


@pytest.fixture
def db() -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(":memory:", isolation_level=None)
    migrate_schema(db)
    yield db
    db.close()


def add_calls(db: sqlite3.Connection, function: str, count: int, due_s: float, state: str = "queued") -> None:
    db.execute(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
        " INSERT INTO calls (id, function, queue, state, due_s, accepted_s)"
        " SELECT :function || printf('%09d', i) || :due_s || :state, :function, 'q', :state, :due_s, :due_s FROM n",
        {"count": count, "function": function, "due_s": due_s, "state": state},
    )


def plan(db: sqlite3.Connection, sql: str, values: object) -> list[str]:
    steps = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]  # type: ignore[arg-type]
    return [step for step in steps if "calls" in step or "callbacks" in step or "results" in step or "TEMP" in step]


def steps(db: sqlite3.Connection, work: Callable[[], object]) -> int:
    """How many instructions of SQLite's virtual machine `work` takes: a cost without a clock."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    db.set_progress_handler(tick, 1)
    work()
    db.set_progress_handler(None, 1)
    return count


AFTER = {"queue": "q", "after": "", "now_s": 1}
PAGE = {
    "state": "done",
    "function": "f",
    "callback": "dead",
    "prefix": "0",
    "behind": "1",
    "below": 9,
    "limit": 9,
}
OLD = {"before_s": 1, "after_s": 0, "after_seq": 0, "limit": 9}


@pytest.mark.parametrize(
    ("sql", "values", "index"),
    [
        pytest.param(CALL_FLOWS.flows, AFTER, "calls_queued", id="functions"),
        pytest.param(CALL_FLOWS.due, ("q", "f", 1, 1), "calls_queued", id="due"),
        pytest.param(CALLBACK_FLOWS.flows, AFTER, "callbacks_ready", id="destinations"),
        pytest.param(SQL_EXPIRING, {"now_s": 1, "limit": 1}, "calls_expiring", id="expiring"),
        pytest.param(CALLBACK_FLOWS.due, ("q", "a:80", 1, 1), "callbacks_ready", id="due-callbacks"),
        pytest.param(SQL_NEXT_DUE, {"after_s": 1}, "calls_queued", id="next-due"),
        pytest.param(SQL_NEXT_CALLBACK, {"after_s": 1}, "callbacks_due", id="next-callback"),
        pytest.param(SQL_OLD_RESULTS, OLD, "results_stored", id="old-results"),
        pytest.param(SQL_OLD_CALLS, OLD, "calls_finished", id="old-calls"),
        pytest.param(SQL_STALE, {"before_s": 1, "limit": 1}, "calls_queued", id="stale"),
        pytest.param(SQL_OLD_LETTERS, {"before_s": 1, "limit": 1}, "calls_dead", id="old-letters"),
        pytest.param(SQL_PAGE_OF_BOTH, PAGE, "calls_state", id="page-of-both"),
        pytest.param(SQL_PAGE_OF_IDS, PAGE, "sqlite_autoindex_calls_1", id="page-of-ids"),
        pytest.param(SQL_RUNNING, {}, "calls_state", id="running"),
        pytest.param(SQL_CALLBACK_COUNT, ("dead",), "callbacks_state", id="callbacks-counted"),
        pytest.param(SQL_DEAD_COUNT, {}, "calls_dead", id="dead-counted"),
        *(pytest.param(sql, (), "calls_", id="last-ends") for sql in SQL_LAST_ENDS),
        *(pytest.param(sql, (1, 9, 1), "calls_", id="new-ends") for sql in SQL_NEW_ENDS),
        pytest.param(SQL_OLD_DEAD_CALLBACKS, {"before_s": 1, "limit": 1}, "callbacks_state", id="old-callbacks"),
    ],
)
def test_statement_searches_by_its_index(db: sqlite3.Connection, sql: str, values: object, index: str) -> None:
    found = [step for step in plan(db, sql, values) if "PRIMARY KEY" not in step]
    assert found
    assert all(f"INDEX {index}" in step for step in found)


def test_callbacks_that_fall_due_are_found_by_their_index(db: sqlite3.Connection) -> None:
    found = plan(db, SQL_READY_CALLBACKS, {"now_s": 1, "limit": 1})
    assert any("SEARCH" in step and "INDEX callbacks_due (" in step for step in found)
    assert not any("SCAN" in step or "TEMP" in step for step in found)


@pytest.mark.parametrize(
    ("sql", "values"),
    [
        pytest.param(SQL_PAGE, PAGE, id="page"),
        pytest.param(SQL_PAGE_OF_FUNCTION, PAGE, id="page-of-function"),
        pytest.param(SQL_PAGE_OF_STATE, PAGE, id="page-of-state"),
        pytest.param(SQL_PAGE_OF_CALLBACKS, PAGE, id="page-of-callbacks"),
        pytest.param(SQL_NEW_CALLS, (1, 9), id="new-calls"),
        pytest.param(SQL_NO_LONGER_LEASED, ("[]", 9), id="no-longer-leased"),
    ],
)
def test_list_for_people_never_reads_the_queue_from_end_to_end(
    db: sqlite3.Connection, sql: str, values: object
) -> None:
    found = plan(db, sql, values)
    assert any(step.startswith(("SEARCH calls", "SEARCH callbacks")) for step in found)
    assert not any(step.startswith(("SCAN calls", "SCAN callbacks")) for step in found)


@pytest.mark.parametrize("state", ["done", "dead", None])
@pytest.mark.parametrize("function", ["a", None])
def test_page_for_people_costs_the_same_whatever_the_queue_holds(
    db: sqlite3.Connection, state: str | None, function: str | None
) -> None:
    page = Page(
        None if state is None else State(state),
        parse_function_name(function) if function else None,
        None,
        None,
        20,
        None,
    )
    sql = choose_page(page)
    values = {"state": state, "function": "a.openfaas-fn", "below": 1 << 62, "limit": 20}
    costs = []
    for count in (300, 9_000):
        for each in ("done", "dead"):
            add_calls(db, "a.openfaas-fn", count, float(count), each)
            add_calls(db, "b.openfaas-fn", count, float(count), each)
        costs.append(steps(db, lambda: db.execute(sql, values).fetchall()))
    assert costs[1] < 1.5 * costs[0], costs


def claim_cost(backlog: Callable[[sqlite3.Connection], None]) -> int:
    """What it takes to pick eight calls of three functions, with a backlog beside them."""
    db = sqlite3.connect(":memory:", isolation_level=None)
    migrate_schema(db)
    for function in "abc":
        add_calls(db, function, 20, 10.0)
    backlog(db)
    wanted = Wanted(("q",), 8, {})
    picked: list[object] = []
    cost = steps(db, lambda: picked.extend(pick(db, CALL_FLOWS, wanted, ("", ""), NOW_S)))
    assert len(picked) == 8
    db.close()
    return cost


@pytest.mark.parametrize(
    ("function", "due_s", "state"),
    [
        pytest.param("b", 20.0, "queued", id="due"),
        pytest.param("b", NOW_S + 1, "queued", id="delayed"),
        pytest.param("b", 20.0, "done", id="done"),
        pytest.param("z", NOW_S + 1, "queued", id="delayed-of-another-function"),
    ],
)
def test_claim_costs_the_same_with_a_backlog_a_hundred_times_as_long(function: str, due_s: float, state: str) -> None:
    short = claim_cost(lambda db: add_calls(db, function, 500, due_s, state))
    long = claim_cost(lambda db: add_calls(db, function, 50_000, due_s, state))
    assert long == short


def add_callbacks(db: sqlite3.Connection, destination: str, count: int, due_s: float, ready: bool) -> None:
    (first,) = db.execute("SELECT coalesce(max(seq), 0) FROM calls").fetchone()
    add_calls(db, "f", count, float(first), "done")
    db.execute(
        "INSERT INTO callbacks (seq, state, due_s, queue, destination, ready)"
        " SELECT seq, 'pending', ?, 'q', replace(?, '*', seq), ? FROM calls WHERE seq > ?",
        (due_s, destination, ready, first),
    )


@pytest.mark.parametrize(
    ("destination", "due_s", "ready"),
    [
        pytest.param("b:80", 20.0, True, id="due"),
        pytest.param("b:80", NOW_S + 1, False, id="delayed"),
        pytest.param("down*:80", NOW_S + 1, False, id="delayed-of-as-many-destinations"),
    ],
)
def test_claim_of_callbacks_costs_the_same_with_a_backlog_a_hundred_times_as_long(
    destination: str, due_s: float, ready: bool
) -> None:
    def cost(count: int) -> int:
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            migrate_schema(db)
            for name in "abc":
                add_callbacks(db, f"{name}:80", 20, 10.0, True)
            add_callbacks(db, destination, count, due_s, ready)
            wanted = Wanted(("q",), 8, {})
            taken: list[object] = []

            def claim() -> None:
                db.execute(SQL_READY_CALLBACKS, {"now_s": NOW_S, "limit": 500})
                taken.extend(pick(db, CALLBACK_FLOWS, wanted, ("", ""), NOW_S))

            spent = steps(db, claim)
            assert len(taken) == 8
            return spent

    assert cost(50_000) == cost(500)


def test_sleep_until_the_next_call_costs_the_same_with_a_long_backlog(db: sqlite3.Connection) -> None:
    def cost() -> int:
        return steps(db, lambda: db.execute(SQL_NEXT_DUE, {"after_s": NOW_S}).fetchone())

    add_calls(db, "f", 500, NOW_S + 1)
    before = cost()
    add_calls(db, "f", 50_000, NOW_S + 2)
    assert cost() == before


def test_next_due_is_the_earliest_of_all_queues_and_functions(db: sqlite3.Connection) -> None:
    for number, (queue, function) in enumerate([("q1", "f"), ("q1", "g"), ("q2", "f"), ("q2", "h")]):
        db.execute(
            "INSERT INTO calls (id, function, queue, state, due_s, accepted_s) VALUES (?, ?, ?, 'queued', ?, 0)",
            (str(number), function, queue, 40.0 - number),
        )

    def next_due(after_s: float) -> float | None:
        found: float | None = db.execute(SQL_NEXT_DUE, {"after_s": after_s}).fetchone()[0]
        return found

    assert [next_due(after_s) for after_s in (0, 37, 38, 39, 40)] == [37, 38, 39, 40, None]
