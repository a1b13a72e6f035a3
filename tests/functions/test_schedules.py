"""Schedules: what annotations mean, when a tick is, and that each is put once."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.calls.model import CallDamaged, NewCall, QueueLimits, State
from faashound.calls.names import FunctionName, parse_function_name
from faashound.functions.scheduler import Scheduler, key_of
from faashound.functions.schedules import (
    BadSchedule,
    Schedule,
    Tick,
    due_ticks,
    parse_expression,
    parse_schedules,
)
from faashound.functions.table import Function
from faashound.queues import Queue, open_queue
from faashound.queues.spool.queue import Spool
from testkit.harness import SOON_S, eventually
from tests.functions.kit import F, run, until

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2026, 6, 1, 12, 0, tzinfo=UTC).timestamp()


def cron(schedule: str, **more: str) -> dict[str, str]:
    extra = {f"com.faashound.schedule.{name}": text for name, text in more.items()}
    return {"topic": "cron-function", "schedule": schedule, **extra}


def ticks_between(text: str, first: datetime, last: datetime) -> list[str]:
    """Return the ticks of an expression as local times in Berlin."""
    found: list[str] = []
    for at_s in parse_expression(text).ticks(first.timestamp()):
        if at_s > last.timestamp():
            break
        found.append(datetime.fromtimestamp(at_s, BERLIN).strftime("%d %H:%M%z"))
    return found


@pytest.mark.parametrize(
    ("schedule", "next_text"),
    [
        ("*/5 * * * *", "2026-06-01T12:05"),
        ("@hourly", "2026-06-01T13:00"),
        ("@daily", "2026-06-02T00:00"),
        ("CRON_TZ=Europe/Berlin 30 2 * * *", "2026-06-02T00:30"),
        ("@every 5m", "2026-06-01T12:05"),
        ("0 0 29 2 *", "2028-02-29T00:00"),
        ("0 9 * * mon-fri", "2026-06-02T09:00"),
    ],
)
def test_expression_has_its_next_tick(schedule: str, next_text: str) -> None:
    at_s = parse_expression(schedule).next_s(NOON)
    assert datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M") == next_text


def test_several_expressions_stand_in_one_annotation() -> None:
    schedule = parse_schedules(cron("0 1 * * *; CRON_TZ=Europe/Berlin @daily", body="hello", overlap="skip"))
    assert [each.text for each in schedule.expressions] == ["0 1 * * *", "CRON_TZ=Europe/Berlin @daily"]
    assert (schedule.body, schedule.skips_overlap, schedule.catches_up) == (b"hello", True, False)


@pytest.mark.parametrize("annotations", [{}, {"topic": "other", "schedule": "x"}, {"topic": "cron-function"}])
def test_function_of_another_topic_has_no_schedule(annotations: dict[str, str]) -> None:
    assert parse_schedules(annotations) == Schedule()


@pytest.mark.parametrize(
    ("annotations", "names"),
    [
        (cron("61 * * * *"), {"schedule"}),
        (cron("* * * * * *"), {"schedule"}),
        (cron(""), {"schedule"}),
        (cron("@reboot"), {"schedule"}),
        (cron("@every 1ms"), {"schedule"}),
        (cron("CRON_TZ=Nowhere/At_all * * * * *"), {"schedule"}),
        (cron("CRON_TZ=../../etc/passwd * * * * *"), {"schedule"}),
        (
            cron("x", overlap="x", catchup="x"),
            {"schedule"} | {f"com.faashound.schedule.{e}" for e in ("overlap", "catchup")},
        ),
    ],
)
def test_bad_annotations_are_named_with_what_is_allowed(annotations: dict[str, str], names: set[str]) -> None:
    with pytest.raises(BadSchedule, match="allowed: ") as caught:
        parse_schedules(annotations)
    assert set(caught.value.problems) == names


@pytest.mark.parametrize("bad", ["@every 1x", "@every 1ms", "61 * * * *", "x", "CRON_TZ=Nowhere * * * * *"])
def test_bad_expression_is_named_among_others(bad: str) -> None:
    with pytest.raises(BadSchedule, match="allowed: ") as caught:
        parse_schedules(cron(f"@every 5m; {bad}; @daily"))
    assert bad.removeprefix("CRON_TZ=").removesuffix(" * * * * *") in caught.value.problems["schedule"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "30 2 * * *", ["28 02:30+0100", "29 03:00+0200", "30 02:30+0200"], id="what is skipped comes after"
        ),
        pytest.param("30 * * * *", None, id="every hour"),
    ],
)
def test_clock_that_goes_forward_skips_no_daily_tick(text: str, expected: list[str] | None) -> None:
    first, last = datetime(2026, 3, 28, 0, 0, tzinfo=BERLIN), datetime(2026, 3, 30, 23, 0, tzinfo=BERLIN)
    found = ticks_between(f"CRON_TZ=Europe/Berlin {text}", first, last)
    assert found == expected if expected else len(found) == 70  # of 71 hours that clocks show, one did not exist


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("30 2 * * *", ["24 02:30+0200", "25 02:30+0200", "26 02:30+0100"], id="what comes twice is one"),
        pytest.param("0 2,3 25 * *", ["25 02:00+0200", "25 03:00+0100"], id="a list too"),
    ],
)
def test_clock_that_goes_back_repeats_no_daily_tick(text: str, expected: list[str]) -> None:
    first, last = datetime(2026, 10, 24, 0, 0, tzinfo=BERLIN), datetime(2026, 10, 26, 23, 0, tzinfo=BERLIN)
    assert ticks_between(f"CRON_TZ=Europe/Berlin {text}", first, last) == expected


@given(
    st.sampled_from(["30 2 * * *", "*/7 * * * *", "0 */3 * * *", "@hourly", "15 2,3 * * 0"]),
    st.sampled_from([datetime(2026, 3, 28, 22, tzinfo=UTC), datetime(2026, 10, 24, 22, tzinfo=UTC)]),
    st.integers(0, 8 * 3600),
)
def test_ticks_are_the_same_wherever_one_begins_to_look(text: str, begin: datetime, offset_s: int) -> None:
    expression = parse_expression(f"CRON_TZ=Europe/Berlin {text}")
    begin_s = begin.timestamp()
    until_s = begin_s + 10 * 3600

    def after(start_s: float) -> list[float]:
        found: list[float] = []
        for at_s in expression.ticks(start_s):
            if at_s > until_s:
                return found
            found.append(at_s)
        return found

    assert after(begin_s + offset_s) == [at_s for at_s in after(begin_s) if at_s > begin_s + offset_s]


@pytest.mark.parametrize(
    ("looked_s", "catchup", "expected"),
    [
        pytest.param(NOON - 30, "none", [NOON], id="just now"),
        pytest.param(NOON, "none", [], id="looked at already"),
        pytest.param(NOON - 3600, "none", [NOON], id="one of many that were missed"),
        pytest.param(NOON + 9999, "none", [], id="a clock that was set back"),
    ],
)
def test_ticks_since_the_last_look_are_due_once(looked_s: float, catchup: str, expected: list[float]) -> None:
    schedule = parse_schedules(cron("*/5 * * * *", catchup=catchup))
    assert [tick.at_s for tick in due_ticks(F, schedule, looked_s, NOON + 20)] == expected


def test_missed_tick_is_made_up_for_only_with_catchup() -> None:
    looked_s, now_s = NOON - 7200, NOON + 600
    assert not due_ticks(F, parse_schedules(cron("@hourly")), looked_s, now_s)
    (tick,) = due_ticks(F, parse_schedules(cron("@hourly", catchup="last")), looked_s, now_s)
    assert tick.at_s == NOON
    assert not due_ticks(F, parse_schedules(cron("@yearly", catchup="last")), 0.0, now_s)  # too long ago


def test_id_of_a_ticks_call_is_a_uuid_of_its_time_and_no_others() -> None:
    hourly, daily = parse_expression("@hourly"), parse_expression("@daily")
    ticks = [Tick(F, hourly, NOON), Tick(F, daily, NOON), Tick(F, hourly, NOON + 3600)]
    ids = [uuid.UUID(tick.call_id) for tick in (*ticks, Tick(parse_function_name("g"), hourly, NOON))]
    assert len(set(ids)) == 4
    assert {each.version for each in ids} == {7}
    assert [each.int >> 80 for each in ids] == [int(tick.at_s * 1000) for tick in (*ticks, ticks[0])]
    assert ids[0] == uuid.UUID(Tick(F, hourly, NOON).call_id)


# --- at work: a real spool, and a clock that the test sets -------------------------------------------------------


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@asynccontextmanager
async def spool(directory: Path, clock: Callable[[], float]) -> AsyncIterator[Queue]:
    queue = await open_queue(directory / "spool", now=clock)
    try:
        yield queue
    finally:
        await queue.close()


async def queued(queue: Queue) -> list[str]:
    """Return the ids of all calls, oldest first."""
    return [call.id for call in reversed(await queue.calls(limit=1000))]


def table_of(**annotations: str) -> dict[FunctionName, Function]:
    return {F: Function(F, url="http://h", annotations=annotations)}


def scheduled(schedule: str, **more: str) -> dict[FunctionName, Function]:
    return table_of(**cron(schedule, **more))


async def looks(scheduler: Scheduler, clock: Clock, *times_s: float) -> None:
    for now_s in times_s:
        clock.now_s = now_s
        await scheduler.look(now_s)


def test_each_tick_is_one_call_with_the_connectors_headers_and_its_body(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock(NOON - 1)
        async with spool(tmp_path, clock) as queue:
            scheduler = Scheduler(scheduled("*/5 * * * *", body="hello"), queue, now=clock)
            await looks(scheduler, clock, NOON - 1, NOON + 0.1, NOON + 0.2, NOON + 299, NOON + 301)
            first, second = [await queue.get(call_id) for call_id in await queued(queue)]
            assert first is not None
            assert second is not None
            assert (first.due_s, second.due_s) == (NOON, NOON + 300)
            assert {("X-Topic", "cron-function"), ("X-Connector", "cron-connector")} <= set(first.headers)
            assert dict(first.headers)["X-Start-Time"] == f"{int(first.accepted_s * 1e9)}"
            assert b"".join([chunk async for chunk in queue.open_body(first.body)]) == b"hello"
            row = scheduler.describe()[0]
            assert (row["last"], row["next"]) == ("2026-06-01T12:05:00Z", "2026-06-01T12:10:00Z")
            assert row["lastCallId"] == second.id

    run(test())


def test_tick_is_one_call_when_two_gateways_see_it_and_the_clock_is_set_back(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock(NOON - 1)
        async with spool(tmp_path, clock) as queue:
            table = scheduled("@every 10s")
            one, other = Scheduler(table, queue, now=clock), Scheduler(table, queue, now=clock)
            for now_s in (NOON - 1, NOON + 0.1, NOON - 5, NOON + 0.2, NOON + 10, NOON, NOON + 11):
                clock.now_s = now_s
                await asyncio.gather(one.look(now_s), other.look(now_s))
            assert len(await queued(queue)) == 2

    run(test())


def test_tick_during_a_restart_is_put_once(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock(NOON - 1)
        async with spool(tmp_path, clock) as queue:
            table, state = scheduled("@hourly"), tmp_path / "schedules"

            def has_looked() -> bool:
                seen = json.loads(state.read_bytes()) if state.exists() else {}
                return any(looked_s == clock.now_s for looked_s, _ in seen.values())

            for times_s in ((NOON - 2, NOON - 1), (NOON + 20,), (NOON + 25, NOON + 50)):
                scheduler = Scheduler(table, queue, state, clock)
                clock.now_s = times_s[0]
                running = asyncio.create_task(scheduler.run())
                await until(has_looked, "its first look")
                running.cancel()
                await looks(scheduler, clock, *times_s)
            assert len(await queued(queue)) == 1

    run(test())


def test_call_is_skipped_while_the_last_one_runs_only_if_asked_to(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock(NOON - 1)
        async with spool(tmp_path, clock) as queue:
            scheduler = Scheduler(scheduled("@every 10s", overlap="skip"), queue, now=clock)
            await looks(scheduler, clock, NOON - 1, NOON, NOON + 10, NOON + 20)
            (call_id,) = await queued(queue)
            await queue.cancel(call_id)
            call = await queue.get(call_id)
            assert call is not None
            assert call.state is State.CANCELLED
            await looks(scheduler, clock, NOON + 30)
            assert len(await queued(queue)) == 2

    run(test())


def test_changed_table_is_followed(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock(NOON - 1)
        async with spool(tmp_path, clock) as queue:
            table = table_of()
            scheduler = Scheduler(table, queue, now=clock)
            await looks(scheduler, clock, NOON - 1, NOON)
            table.update(scheduled("@every 10s"))
            await looks(scheduler, clock, NOON + 5, NOON + 10)
            table.clear()
            await looks(scheduler, clock, NOON + 20, NOON + 30)
            assert len(await queued(queue)) == 1
            assert scheduler.describe() == []

    run(test())


def test_function_that_may_have_no_more_calls_keeps_no_other_from_its_ticks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full, g = scheduled("@every 10s"), parse_function_name("g")
    table = {**full, g: Function(g, url="http://h", annotations=cron("@every 10s"))}

    async def test() -> None:
        clock = Clock(NOON - 1)
        queue = await Spool.open(tmp_path / "spool", now=clock, limits=QueueLimits(calls_count=1))
        try:
            scheduler = Scheduler(table, queue, now=clock)
            await looks(scheduler, clock, NOON - 1, NOON + 0.1, NOON + 10)
            assert [call.function for call in await queue.calls()] == [g, F]
            await queue.cancel_queued()
            await looks(scheduler, clock, NOON + 11)
            waiting = await queue.calls(state=State.QUEUED)
            assert {(call.function, call.due_s) for call in waiting} == {(F, NOON + 10), (g, NOON + 10)}
        finally:
            await queue.close()

    run(test())
    assert capfd.readouterr().err.count("a scheduled call could not be queued") == 2, "once of each"


def test_function_whose_last_call_is_damaged_keeps_no_other_from_its_ticks(tmp_path: Path) -> None:
    g = parse_function_name("g")
    table = {**scheduled("@every 10s"), g: Function(g, url="http://h", annotations=cron("@every 10s"))}

    class Damaged(Spool):
        """A queue in which one message cannot be read, as NATS may have it."""

        async def put(self, call: NewCall) -> NewCall:
            if call.function == F:
                raise CallDamaged("the record of the call before cannot be read")
            return await super().put(call)

    async def test() -> None:
        clock = Clock(NOON - 1)
        queue = await Damaged.open(tmp_path / "spool", now=clock)
        try:
            await looks(Scheduler(table, queue, now=clock), clock, NOON - 1, NOON + 0.1, NOON + 10)
            assert [call.function for call in await queue.calls()] == [g, g]
        finally:
            await queue.close()

    run(test())


def test_tick_that_comes_due_right_after_a_look_is_put_at_once(tmp_path: Path) -> None:
    class Ticking(Clock):
        """A clock that goes on by two milliseconds each time it is read, and stands still otherwise."""

        def __call__(self) -> float:
            self.now_s += 0.002
            return self.now_s

    async def test() -> None:
        async with spool(tmp_path, time.time) as queue:
            running = asyncio.create_task(Scheduler(scheduled("@every 10s"), queue, now=Ticking(NOON - 0.003)).run())

            async def first() -> str | None:
                return next(iter(await queued(queue)), None)

            call = await queue.get(await eventually(first, SOON_S, "the tick was put"))
            running.cancel()
            assert call is not None
            assert call.due_s == NOON

    run(test())


def test_running_scheduler_puts_a_call_when_its_time_comes(tmp_path: Path) -> None:
    async def test() -> None:
        async with spool(tmp_path, time.time) as queue:
            running = asyncio.create_task(Scheduler(scheduled("@every 1s"), queue).run())
            end_s = time.monotonic() + 20
            while len(await queued(queue)) < 2 and time.monotonic() < end_s:  # noqa: ASYNC110 - the spool sets no event
                await asyncio.sleep(0.05)
            assert len(await queued(queue)) >= 2
            running.cancel()

    run(test())


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "state",
    [
        *('{"KEY": [1, "x"]}', '{"KEY": [Infinity, null]}', '{"KEY": [NaN, 1]}', '{"KEY": [1, 1e20]}', '{"KEY": 1}'),
        *(f'{{"KEY": [{HUGE}, null]}}', f'{{"KEY": [1, {HUGE}]}}', "[1]", "[" * 9000, "", "\udcff"),
    ],
    ids=lambda state: state[:30],
)
def test_scheduler_runs_and_tells_where_its_state_is_damaged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], state: str
) -> None:
    path = tmp_path / "schedules"
    table = scheduled("@every 1s", **{"com.openfaas.schedule.overlap": "skip"})
    (expression,) = parse_schedules(table[F].annotations).expressions
    path.write_bytes(state.replace("KEY", key_of(F, expression)).encode(errors="surrogateescape"))

    async def test() -> None:
        async with spool(tmp_path, time.time) as queue:
            scheduler = Scheduler(table, queue, path)
            running = asyncio.create_task(scheduler.run())
            await until(lambda: running.done() or scheduler.describe()[0]["last"], "a tick was put")
            assert not running.done()
            running.cancel()

    run(test())
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "scheduled calls of before" in line]
    assert f"warning: {path}: " in warning
    assert "object" not in warning
