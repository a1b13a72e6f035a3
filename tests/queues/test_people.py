"""What people are told of a queue, spool or NATS: pages of calls, what is still to be done, and what has changed."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from faashound.calls.model import Call, CallbackState, Changes, State
from faashound.calls.names import parse_function_name
from testkit.nats_servers import Cluster
from testkit.queue_kit import Desk, JetDesk, SpoolDesk

F, G = parse_function_name("f"), parse_function_name("g")


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(params=["spool", "jetstream"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    desk: Desk
    if request.param == "spool":
        desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    else:
        server: Cluster = request.getfixturevalue("server")
        desk = JetDesk(server.options(f"t{uuid.uuid4().hex[:12]}"), uvloop.new_event_loop)
    yield desk
    desk.close()


def end(desk: Desk, function: str, state: State) -> Call:
    call = desk.put(function)
    desk.finish(desk.claim_one(), state)
    return call


def changes(desk: Desk, mark: str | None, leased_ids: tuple[str, ...] = (), limit: int = 100) -> Changes:
    return desk.do(desk.queue.changes(mark, leased_ids, limit))


def test_lists_are_read_page_by_page_whatever_is_wanted(desk: Desk) -> None:
    made = [
        (name, state, end(desk, name, state).id) for name, state in itertools.product("fgfg", (State.DONE, State.DEAD))
    ]
    for state, function in itertools.product((None, State.DONE, State.DEAD), (None, F, G)):
        expected = [
            call_id
            for name, its_state, call_id in reversed(made)
            if state in (None, its_state) and function in (None, parse_function_name(name))
        ]
        found: list[str] = []
        while True:
            page = desk.do(
                desk.queue.calls(state=state, function=function, limit=3, before=found[-1] if found else None)
            )
            found += [call.id for call in page]
            if len(page) < 3:
                break
        assert found == expected, (state, function)


def test_calls_whose_callback_is_dead_are_found_by_it(desk: Desk) -> None:
    for url in ("http://one/", "http://two/"):
        desk.owe(url)
    lost = desk.claim_callback()
    desk.do(desk.queue.callback_dead(lost, desk.attempt(500)))
    for _ in range(3):
        end(desk, "f", State.DONE)
    found = desk.do(desk.queue.calls(callback=CallbackState.DEAD))
    assert [call.id for call in found] == [lost.call.id]
    assert desk.do(desk.queue.calls(callback=CallbackState.DEAD, state=State.DEAD)) == []
    assert desk.do(desk.queue.calls(callback=CallbackState.DEAD, before=lost.call.id)) == []


def test_call_is_found_by_its_whole_id_and_by_what_else_is_known_of_it(desk: Desk) -> None:
    calls = [desk.put("f"), desk.put("g")]
    assert [call.id for call in desk.do(desk.queue.calls(id_start=calls[0].id))] == [calls[0].id]
    assert desk.do(desk.queue.calls(id_start=calls[0].id, function=G)) == []
    assert desk.do(desk.queue.calls(id_start=calls[0].id, state=State.DEAD)) == []
    assert desk.do(desk.queue.calls(id_start="ffffffff-0000-7000-8000-000000000000")) == []


def test_spool_finds_calls_by_the_beginning_of_their_id_newest_first(tmp_path: Path) -> None:
    desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    made = [desk.put(id=f"01234567-89ab-7000-8000-00000000000{number}").id for number in range(5)]
    desk.put(id="01234568-89ab-7000-8000-000000000000")
    first = desk.do(desk.queue.calls(id_start="01234567", limit=3))
    rest = desk.do(desk.queue.calls(id_start="01234567", limit=3, before=first[-1].id))
    assert [call.id for call in first + rest] == made[::-1]
    desk.close()


def test_backlog_counts_what_stats_counts_of_the_unfinished_and_the_dead(desk: Desk) -> None:
    end(desk, "f", State.DONE)
    end(desk, "f", State.DEAD)
    desk.owe("http://caller/")
    desk.put("g")
    desk.claim_one()
    desk.clock.now_s += 1
    for name in "fgg":
        desk.put(name)
    desk.clock.now_s += 5
    backlog, stats = desk.do(desk.queue.backlog()), desk.do(desk.queue.stats())
    assert (backlog.queued_count, backlog.running_count, backlog.dead_count) == (3, 1, 1)
    assert (stats.by_state[State.QUEUED], stats.by_state[State.RUNNING], stats.by_state[State.DEAD]) == (3, 1, 1)
    assert (backlog.callback_pending_count, backlog.callback_dead_count) == (1, 0)
    assert backlog.by_function == {F: (1, 0), G: (2, 1)}
    assert backlog.oldest_due_age_s == stats.oldest_due_age_s


def test_changes_tell_of_calls_that_were_put_and_that_ended(desk: Desk) -> None:
    before = desk.put("f")
    mark = changes(desk, None).mark
    assert not changes(desk, mark).calls
    call = desk.put("g")
    news = changes(desk, mark)
    assert ([each.id for each in news.calls], news.is_whole) == ([call.id], True)
    desk.finish(desk.claim_one())
    news = changes(desk, news.mark)
    assert {(each.id, each.state) for each in news.calls} == {(before.id, State.DONE)}
    assert changes(desk, mark).mark == news.mark, "a reader that comes back late ends where the others are"


def test_changes_tell_of_a_call_that_is_to_be_tried_again(desk: Desk) -> None:
    desk.put("f")
    lease = desk.claim_one()
    mark = changes(desk, None).mark
    desk.do(desk.queue.retry(lease, attempt=desk.attempt(500), due_s=desk.clock.now_s + 60))
    (call,) = changes(desk, mark, (lease.call.id,)).calls
    assert (call.id, call.state, call.attempts) == (lease.call.id, State.QUEUED, 1)


def test_changes_of_a_spool_tell_that_a_call_runs_and_that_its_callback_is_delivered(tmp_path: Path) -> None:
    desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    desk.put("f", callback_url="http://caller/")
    mark = changes(desk, None).mark
    lease = desk.claim_one()
    assert [call.state for call in changes(desk, mark).calls] == [State.RUNNING]
    desk.finish(lease)
    mark = changes(desk, None).mark
    delivery = desk.claim_callback()
    (call,) = changes(desk, mark).calls
    assert call.callback is not None
    assert call.callback.state is CallbackState.RUNNING
    mark = changes(desk, None).mark
    desk.do(desk.queue.callback_done(delivery, desk.attempt()))
    (call,) = changes(desk, mark, (call.id,)).calls
    assert call.callback is not None
    assert call.callback.state is CallbackState.DELIVERED
    desk.close()


def test_changes_of_a_spool_tell_of_ends_when_others_ended_while_the_clock_was_ahead(tmp_path: Path) -> None:
    desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    ahead, after = desk.put("f"), desk.put("f")
    desk.clock.now_s += 3600
    desk.do(desk.queue.cancel(ahead.id))
    of_then = changes(desk, None).mark
    desk.clock.now_s -= 3600
    mark = changes(desk, None).mark
    desk.do(desk.queue.cancel(after.id))
    assert [call.id for call in changes(desk, mark).calls] == [after.id]
    assert not changes(desk, of_then).is_whole
    desk.close()


def test_changes_say_so_where_there_are_more_than_can_be_told(desk: Desk) -> None:
    mark = changes(desk, None).mark
    for _ in range(4):
        desk.put("f")
    news = changes(desk, mark, limit=3)
    assert (len(news.calls), news.is_whole) == (3, False)
    assert changes(desk, news.mark).is_whole


@pytest.mark.parametrize("mark", ["", "x", "s1-1", "n9", "s1-1-1.000000 ", "n1-1-1.000000"])
def test_changes_since_a_mark_of_another_making_are_not_whole(desk: Desk, mark: str) -> None:
    news = changes(desk, mark)
    assert (list(news.calls), news.is_whole) == ([], False)
