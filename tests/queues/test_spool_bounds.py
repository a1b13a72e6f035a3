"""What one function may have waiting, and what of it ends by itself."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.model import INLINE_BYTES, Bounds, QueueLimits, RunEnd, State, TooManyBytesQueued, TooManyQueued
from faashound.calls.names import parse_function_name
from faashound.queues.spool import database, puts
from faashound.queues.spool.limits import DATABASE, DEAD_LETTER_BYTES, STEP_COUNT
from faashound.queues.spool.queue import Spool
from faashound.queues.spool.schema import MIGRATIONS
from faashound.watchdog import log
from testkit.spool_kit import LEASE_S, START_S, Desk, inline, new_call

DAY_S = 86400.0
BIG = bytes(INLINE_BYTES + 1)


class LimitedDesk(Desk):
    """A desk whose functions may have ten calls and 1000 bytes waiting."""

    async def open_queue(self) -> Spool:
        limits = QueueLimits(calls_count=10, bytes_count=1000)
        return await Spool.open(self.directory, limits=limits, now=self.clock)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[LimitedDesk]:
    desk = LimitedDesk(tmp_path / "spool")
    yield desk
    desk.close()


def waiting(desk: Desk) -> dict[str, tuple[int, int]]:
    """What the queue has kept count of."""
    rows = desk.rows("SELECT function, calls, bytes FROM waiting")
    return {function: (calls, bytes_count) for function, calls, bytes_count in rows if calls or bytes_count}


# -- caps


def test_put_is_refused_when_the_function_has_too_many_calls_waiting(desk: LimitedDesk) -> None:
    for _ in range(10):
        desk.put("f", body=inline(b""))
    with pytest.raises(TooManyQueued, match=r"f\.openfaas-fn has 10 calls waiting; max_queued allows 10") as caught:
        desk.put("f", body=inline(b""))
    assert caught.value.status == 429
    desk.put("g", body=inline(b""))


def test_put_is_refused_when_the_function_has_too_many_bytes_waiting(desk: LimitedDesk) -> None:
    desk.put("f", body=inline(bytes(600)))
    with pytest.raises(TooManyBytesQueued, match="max_queued_bytes allows 1000") as caught:
        desk.put("f", body=inline(bytes(401)))
    assert caught.value.status == 507
    desk.put("f", body=inline(bytes(400)))
    desk.put("g", body=inline(bytes(1000)))


def test_put_is_refused_when_as_many_functions_wait_as_may(desk: LimitedDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts, "FUNCTIONS_COUNT", 2)
    for name in "fg":
        desk.put(name)
    with pytest.raises(TooManyQueued, match=r"2 functions have calls waiting, and h\.openfaas-fn is none of them"):
        desk.put("h")
    desk.put("f")
    (running,) = (each for each in desk.claim() if each.call.function.name == "g")
    desk.finish(running)
    desk.put("h")


def test_puts_in_a_group_are_refused_each_for_itself_when_there_is_room_for_some(desk: LimitedDesk) -> None:
    async def scenario() -> list[Any]:
        puts = [desk.spool.put(new_call(function, body=inline(b""))) for _ in range(15) for function in "fg"]
        return await asyncio.gather(*puts, return_exceptions=True)

    outcomes = Counter(type(outcome).__name__ for outcome in desk.do(scenario()))
    assert outcomes == {"NewCall": 20, "TooManyQueued": 10}
    assert waiting(desk) == {"f.openfaas-fn": (10, 0), "g.openfaas-fn": (10, 0)}


def test_refused_call_leaves_no_body_when_the_function_has_too_many_bytes(desk: LimitedDesk) -> None:
    with pytest.raises(TooManyBytesQueued):
        desk.put(body=desk.do(desk.spool.store_body(BIG)))
    assert desk.body_files() == set()


@pytest.mark.parametrize("end", ["done", "dead", "cancelled", "cancelled-running", "expired", "all-cancelled"])
def test_room_of_a_call_is_free_when_it_has_ended(desk: LimitedDesk, end: str) -> None:
    call = desk.put(body=inline(bytes(1000)), expires_s=START_S + 60)
    assert waiting(desk) == {"f.openfaas-fn": (1, 1000)}
    match end:
        case "done" | "dead":
            desk.finish(desk.claim_one(), State(end))
        case "cancelled":
            desk.do(desk.spool.cancel(call.id))
        case "cancelled-running":
            lease = desk.claim_one()
            desk.do(desk.spool.cancel(call.id))
            desk.do(desk.spool.release(lease))
        case "expired":
            desk.clock.now_s += 61
            assert desk.claim() == []
        case "all-cancelled":
            assert desk.do(desk.spool.cancel_queued()) == 1
    assert waiting(desk) == {}
    desk.put(body=inline(bytes(1000)))


def test_room_of_a_call_is_taken_while_it_runs_and_between_attempts_and_again_when_it_is_requeued(
    desk: LimitedDesk,
) -> None:
    call = desk.put(body=inline(bytes(700)))
    desk.do(desk.spool.retry(desk.claim_one(), attempt=desk.attempt(500), due_s=START_S))
    desk.do(desk.spool.release(desk.claim_one()))
    lease = desk.claim_one()
    assert waiting(desk) == {"f.openfaas-fn": (1, 700)}
    desk.finish(lease, State.DEAD)
    assert waiting(desk) == {}
    desk.do(desk.spool.requeue_dead(call.id))
    assert waiting(desk) == {"f.openfaas-fn": (1, 700)}


def test_functions_that_have_nothing_waiting_are_forgotten(desk: LimitedDesk) -> None:
    desk.put("made-up")
    desk.finish(desk.claim_one())
    desk.do(desk.spool.sweep(60, 60))
    assert desk.rows("SELECT count(*) FROM waiting") == [(0,)]


# -- cancelling all


def test_cancel_queued_ends_what_waits_of_one_function_and_drops_its_payloads(
    desk: LimitedDesk, tmp_path: Path
) -> None:
    roomy = Desk(tmp_path / "roomy")
    count = STEP_COUNT + 7

    async def fill() -> None:
        body = await roomy.spool.store_body(BIG)
        await roomy.spool.put(new_call("f", body=body, due_s=START_S + DAY_S))
        await asyncio.gather(*(roomy.spool.put(new_call("f")) for _ in range(count)))

    roomy.do(fill())
    running, other = roomy.claim_one(), roomy.put("g")
    assert roomy.do(roomy.spool.cancel_queued(function=parse_function_name("f"))) == count
    assert roomy.body_files() == set()
    assert roomy.get(running.call.id).state is State.RUNNING
    assert roomy.get(other.id).state is State.QUEUED
    assert roomy.do(roomy.spool.cancel_queued()) == 1
    assert roomy.do(roomy.spool.stats()).by_state[State.CANCELLED] == count + 1
    roomy.close()


# -- what would wait for ever


def test_call_expires_when_it_has_been_due_for_longer_than_the_bound(desk: LimitedDesk) -> None:
    old, young = desk.put(queue="unclaimed"), desk.put(queue="unclaimed", due_s=START_S + 2 * DAY_S)
    desk.clock.now_s += 3 * DAY_S
    assert desk.do(desk.spool.sweep(60, 9 * DAY_S, Bounds(queue_age_s=2 * DAY_S))).expired_count == 1
    assert (desk.get(old.id).state, desk.get(old.id).error) == (State.EXPIRED, "it was not run within max_queue_age")
    assert desk.get(young.id).state is State.QUEUED
    assert waiting(desk) == {"f.openfaas-fn": (1, 2)}


@pytest.mark.parametrize("way", ["released", "taken back"])
def test_call_that_ran_for_longer_than_the_bound_and_was_handed_back_is_run_again(desk: LimitedDesk, way: str) -> None:
    call = desk.put()
    lease = desk.claim_one(lease_s=0.0 if way == "taken back" else LEASE_S)
    desk.clock.now_s += 3 * DAY_S
    desk.do(desk.spool.release(lease) if way == "released" else desk.spool.reclaim())
    assert desk.do(desk.spool.sweep(60, 9 * DAY_S, Bounds(queue_age_s=2 * DAY_S))).expired_count == 0
    assert desk.claim_one().call.id == call.id


def test_call_expires_when_its_next_attempt_has_been_due_for_longer_than_the_bound(desk: LimitedDesk) -> None:
    call = desk.put()
    desk.do(desk.spool.retry(desk.claim_one(), attempt=desk.attempt(500, "no"), due_s=START_S + 60))
    desk.clock.now_s += 3 * DAY_S
    assert desk.do(desk.spool.sweep(60, 9 * DAY_S, Bounds(queue_age_s=2 * DAY_S))).expired_count == 1
    assert (desk.get(call.id).state, desk.get(call.id).error) == (State.EXPIRED, "no")


def dead_letters(desk: Desk, count: int) -> list[str]:
    """Letters with 500 bytes each, an hour apart, in turn of both kinds."""
    made = []
    for number in range(count):
        desk.clock.now_s = START_S + 3600 * number
        call = desk.put(body=inline(bytes(500)), callback_url="http://caller/" if number % 2 else None)
        lease = desk.claim_one()
        end = RunEnd(State.DONE if number % 2 else State.DEAD, desk.attempt(), 200, 0.1)
        desk.do(desk.spool.finish(lease, end))
        if number % 2:
            desk.do(desk.spool.callback_dead(desk.claim_callback(), desk.attempt(500, "no")))
        made.append(call.id)
    return made


@pytest.mark.parametrize(
    ("bounds", "kept_count"),
    [
        pytest.param(Bounds(), 6, id="none"),
        pytest.param(Bounds(dead_s=2.5 * 3600), 3, id="age"),
        pytest.param(Bounds(dead_bytes=4 * (500 + DEAD_LETTER_BYTES)), 4, id="bytes"),
        pytest.param(Bounds(dead_s=1.5 * 3600, dead_bytes=10**9), 2, id="both"),
        pytest.param(Bounds(dead_bytes=0), 0, id="nothing"),
    ],
)
def test_oldest_dead_letters_go_when_there_are_bounds(
    desk: LimitedDesk, capfd: pytest.CaptureFixture[str], bounds: Bounds, kept_count: int
) -> None:
    letters = dead_letters(desk, 6)
    desk.clock.now_s += 1
    swept = desk.do(desk.spool.sweep(9 * DAY_S, 9 * DAY_S, bounds))
    left = [call.id for call in desk.do(desk.spool.calls())]
    assert left == letters[6 - kept_count :][::-1]
    assert swept.dead_count == 6 - kept_count
    log.flush()
    said = capfd.readouterr().err
    assert all((f"call_id={call_id}" in said) == (call_id not in left) for call_id in letters)


@pytest.mark.parametrize("state", [State.DONE, State.DEAD])
def test_result_is_kept_from_the_end_of_its_last_delivery_on(desk: LimitedDesk, state: State) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one(), state)
    desk.clock.now_s += 2 * DAY_S
    desk.do(desk.spool.callback_dead(desk.claim_callback(), desk.attempt(500, "no")))
    desk.clock.now_s += 0.5 * DAY_S
    assert desk.do(desk.spool.sweep(60, 60, Bounds(dead_s=DAY_S))).dead_count == 0
    assert desk.get(call.id).result is not None
    desk.clock.now_s += DAY_S
    assert desk.do(desk.spool.sweep(60, 60, Bounds(dead_s=DAY_S))).dead_count == 1


def test_results_that_were_given_up_last_are_the_newest(desk: LimitedDesk) -> None:
    calls = [desk.put(callback_url=f"http://{name}/") for name in "ab"]
    for lease in desk.claim():
        desk.finish(lease, result=None)
    deliveries = {lease.call.id: lease for lease in desk.claim_callbacks()}
    for call in calls[::-1]:
        desk.clock.now_s += 60
        desk.do(desk.spool.callback_dead(deliveries[call.id], desk.attempt(500, "no")))
    desk.do(desk.spool.sweep(DAY_S, DAY_S, Bounds(dead_bytes=DEAD_LETTER_BYTES + 100)))
    assert [call.id for call in desk.do(desk.spool.calls())] == [calls[0].id]


def test_dead_letter_that_is_being_delivered_stays_when_its_time_is_over(desk: LimitedDesk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one(), State.DEAD)
    desk.clock.now_s += 9 * DAY_S
    assert desk.do(desk.spool.sweep(DAY_S, DAY_S, Bounds(dead_s=DAY_S))).dead_count == 0
    assert desk.get(call.id).state is State.DEAD


def test_older_file_knows_what_waits_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", MIGRATIONS[:-1])
        Desk.create(tmp_path / "spool")
    with contextlib.closing(sqlite3.connect(tmp_path / "spool" / DATABASE)) as db:
        for number, state in enumerate(["queued", "running", "queued", "done"]):
            call = number, str(number), state
            db.execute(
                "INSERT INTO calls (seq, id, function, queue, state, due_s, accepted_s)"
                " VALUES (?, ?, 'f.openfaas-fn', 'q', ?, 0, 0)",
                call,
            )
            db.execute(
                "INSERT INTO requests (seq, method, path, query, headers, bytes_count)"
                " VALUES (?, 'POST', '/', '', '[]', ?)",
                (number, 100 * number),
            )
        db.commit()
    desk = Desk(tmp_path / "spool")
    assert waiting(desk) == {"f.openfaas-fn": (3, 300)}
    desk.close()
