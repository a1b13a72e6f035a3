"""What a sweep of the queue on NATS leaves alone: what is being written beside it, and what it cannot read."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop

from faashound.calls.ids import new_call_id
from faashound.calls.model import Attempt, NewCall, QueueFull, RunEnd, State
from faashound.queues.jetstream import bodies as bodies_module
from faashound.queues.jetstream import flows as flows_module
from faashound.queues.jetstream import people as people_module
from faashound.queues.jetstream.connection import Connection, Options, Write, connect
from faashound.queues.jetstream.queue import JetStream
from faashound.watchdog import log
from testkit.harness import eventually
from testkit.queue_kit import QUEUE, fill, finish, inline, new_call, read_all

LONG_S = 20.0
BODY = bytes(100_000)


def with_queues(options: Options, count: int, scenario: Callable[..., Awaitable[Any]]) -> Any:
    """What `scenario` returns, given a bare connection and so many queues of their own on the same streams."""

    async def run() -> Any:
        async with contextlib.AsyncExitStack() as stack:
            queues: list[JetStream] = []
            for _ in range(count):
                queues.append(await JetStream.open(options))
                stack.push_async_callback(queues[-1].close)
            connection = await connect(options)
            stack.push_async_callback(connection.close)
            return await scenario(connection, *queues)

    return uvloop.run(run())


async def put_expired(queue: JetStream, **changes: Any) -> NewCall:
    """A call that a sweep is to end."""
    return await queue.put(new_call(due_s=0.0, expires_s=time.time() - 1, **changes))


async def damage(connection: Connection, call: NewCall) -> None:
    """Have something else stand where the call waits."""
    names = connection.names
    await connection.purge(names.queue, names.waiting_of("call", call.id))
    await connection.publish(Write(names.waiting("call", call.id, QUEUE, call.function), b"?"))


def test_sweep_expires_all_calls_but_one_that_cannot_be_read(
    options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario(connection: Connection, queue: JetStream) -> None:
        odd, call = await put_expired(queue), await put_expired(queue)
        await damage(connection, odd)
        assert (await queue.sweep(60, 60)).expired_count == 1
        expired = await queue.get(call.id)
        assert expired is not None
        assert expired.state is State.EXPIRED
        assert capfd.readouterr().err.count(f"whether the call {odd.id} has expired") == 1
        assert await connection.count(connection.names.timer(odd.id)) == 1  # it may be mended

    with_queues(options, 1, scenario)


def test_message_that_cannot_be_read_is_told_once_with_its_place(
    options: Options, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scenario(connection: Connection, queue: JetStream) -> None:
        odd, call = await queue.put(new_call(due_s=0.0)), await queue.put(new_call(due_s=0.0))
        await damage(connection, odd)
        names, record = connection.names, connection.names.record("dead", "odd", odd.function)
        await connection.publish(Write(record, b"?"))
        for _ in range(3):
            assert (await queue.stats()).oldest_due_age_s is not None
            assert [each.id for each in await queue.calls()] == [call.id]
        log.flush()
        told = [line for line in capfd.readouterr().err.splitlines() if "cannot be read" in line]
        for subject in (names.waiting("call", odd.id, QUEUE, odd.function), record):
            stored = await connection.load(subject)
            assert stored is not None
            (line,) = (line for line in told if f"{subject}, number {stored.revision} of its stream" in line)
            assert f"error: {'the record of call odd' if subject == record else 'a message of the queue'}" in line
        assert len(told) == 2

    with_queues(options, 1, scenario)


def test_sweep_drops_all_orphans_and_keeps_the_body_of_a_call_that_cannot_be_read(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bodies_module, "ORPHAN_S", -1.0)

    async def scenario(connection: Connection, queue: JetStream) -> None:
        odd = await queue.put(new_call(body=await queue.store_body(BODY)))
        await queue.store_body(BODY)
        await damage(connection, odd)
        assert (await queue.sweep(60, 60)).file_count == 1
        assert await read_all(queue, odd.body) == BODY
        assert capfd.readouterr().err.count("the body of a call that cannot be read is kept") == 1

    with_queues(options, 1, scenario)


async def put(queue: JetStream, call: NewCall) -> None:
    await queue.put(call)


async def put_and_let_go(queue: JetStream, call: NewCall) -> None:
    await queue.put_held(dataclasses.replace(call, expires_s=None))
    await queue.let_go(call.id, call.due_s, call.expires_s)


@pytest.mark.parametrize("way", [put, put_and_let_go])
def test_call_expires_though_a_sweep_has_met_its_timer_before_its_message(
    options: Options, monkeypatch: pytest.MonkeyPatch, way: Callable[[JetStream, NewCall], Coroutine[Any, Any, None]]
) -> None:
    monkeypatch.setattr(people_module, "PUT_PAUSE_S", 0.01)
    publish, is_swept = Connection.publish, asyncio.Event()

    async def publish_late(self: Connection, write: Write) -> int:
        if write.subject.split(".")[1] == "call":
            await is_swept.wait()
        return await publish(self, write)

    async def scenario(connection: Connection, submitter: JetStream, sweeper: JetStream) -> None:
        call = new_call(due_s=0.0, expires_s=time.time() - 1)
        monkeypatch.setattr(Connection, "publish", publish_late)
        putting = asyncio.create_task(way(submitter, call))
        await eventually(lambda: connection.count(connection.names.timer(call.id)), LONG_S, "a timer")
        assert (await sweeper.sweep(60, 60)).expired_count == 0
        is_swept.set()
        await putting

        async def expired_count() -> int:
            return (await sweeper.sweep(60, 60)).expired_count

        await eventually(expired_count, LONG_S, "the call has expired")

    with_queues(options, 2, scenario)


def test_call_expires_soon_after_the_clock_of_who_sweeps_is_right_again(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows_module, "MAX_DELAY_S", 0.5)

    async def scenario(_: Connection, gateway: JetStream) -> None:
        behind_s = 9 * 365 * 86400.0
        await put_expired(gateway)
        sweeper = await JetStream.open(options, now=lambda: time.time() - behind_s)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(sweeper.close)
            assert (await sweeper.sweep(60, 60)).expired_count == 0
            behind_s = 0.0

            async def expired_count() -> int:
                return (await sweeper.sweep(60, 60)).expired_count

            await eventually(expired_count, LONG_S, "the call has expired")

    with_queues(options, 1, scenario)


def test_timer_of_a_call_that_never_came_is_dropped_in_time(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(people_module, "PUT_S", -1.0)

    async def scenario(connection: Connection, queue: JetStream) -> None:
        timer = connection.names.timer(new_call_id())
        await connection.publish(Write(timer, b""))
        await queue.sweep(60, 60)
        await queue.stats()  # the servers have heard what was acknowledged before
        assert await connection.count(timer) == 0

    with_queues(options, 1, scenario)


async def slow_result(started: asyncio.Event, go_on: asyncio.Event) -> AsyncIterator[bytes]:
    yield 2 * BODY
    started.set()
    await go_on.wait()
    yield 2 * BODY


def test_result_that_comes_slowly_is_not_swept_while_it_comes(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies_module, "SIGN_S", 1.0)
    monkeypatch.setattr(bodies_module, "SIGNS_COUNT", 60)  # that the servers keep it for is no matter of this test

    async def scenario(connection: Connection, worker: JetStream, sweeper: JetStream) -> None:
        started, go_on = asyncio.Event(), asyncio.Event()
        storing = asyncio.create_task(worker.store_result(slow_result(started, go_on)))
        await started.wait()
        await spared_by_a_sign(connection, sweeper, monkeypatch)
        go_on.set()
        assert await read_all(worker, await storing) == 4 * BODY

    with_queues(options, 2, scenario)


async def has_sign(connection: Connection) -> bool:
    found = await connection.read_batch(connection.names.subject("meta", "*"), 1)
    return any(".writing-" in each.subject for each in found)


async def spared_by_a_sign(connection: Connection, sweeper: JetStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a sign of the body that is being written; see that a sweep of all that is old leaves the body."""
    await eventually(lambda: has_sign(connection), LONG_S, "a sign")
    with monkeypatch.context() as later:
        later.setattr(bodies_module, "ORPHAN_S", -1.0)
        assert (await sweeper.sweep(60, 60)).file_count == 0


def test_result_that_waits_for_room_is_not_swept_while_it_waits(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bodies_module, "SIGN_S", 1.0)
    monkeypatch.setattr(bodies_module, "SIGNS_COUNT", 60)  # that the servers keep it for is no matter of this test
    monkeypatch.setattr(bodies_module, "ROOM_PAUSE_S", 0.02)

    async def scenario(connection: Connection, worker: JetStream, sweeper: JetStream) -> None:
        await sweeper.sweep(60, 60)  # tells how long calls are kept: that is a message of the same kind
        ballast = await worker.store_body(5 * BODY)
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0, body=ballast))
        (lease,) = await worker.claim([QUEUE], owner, LONG_S, 1)
        storing = asyncio.create_task(worker.store_result(in_pieces(8)))

        async def waits() -> bool:
            return "a result waits to be stored" in capfd.readouterr().err

        await eventually(waits, LONG_S, "a result that waits")
        await spared_by_a_sign(connection, sweeper, monkeypatch)
        assert not storing.done()
        await finish(worker, lease, State.DONE, None)
        assert await worker.purge(state=State.DONE, call_id=call.id) == 1
        assert await read_all(worker, await storing) == 8 * BODY

    with_queues(dataclasses.replace(options, max_bytes=1_000_000), 2, scenario)


async def in_pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield BODY


def test_old_body_that_was_named_just_now_is_not_swept_before_its_call_says_so(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(connection: Connection, queue: JetStream) -> None:
        body = await queue.store_body(BODY)
        (head,) = await connection.read_batch(connection.names.subject("body", "*", 0), 1, 1)
        subject = connection.names.subject("body", body.file, "ref")
        await connection.publish(Write(subject, new_call_id().encode()))
        named = await connection.load(subject)
        assert named is not None
        between_s = (head.stored_s + named.stored_s) / 2
        clock = SimpleNamespace(time=lambda: between_s + bodies_module.ORPHAN_S)
        monkeypatch.setattr(bodies_module, "time", clock)
        assert (await queue.sweep(60, 60)).file_count == 0
        between_s = named.stored_s
        assert (await queue.sweep(60, 60)).file_count == 1

    with_queues(options, 1, scenario)


def test_result_that_cannot_be_named_for_want_of_room_is_not_swept(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(connection: Connection, queue: JetStream) -> None:
        owner, _ = await queue.enlist(), await queue.put(new_call(due_s=0.0))
        (lease,) = await queue.claim([QUEUE], owner, LONG_S, 1)
        result = await queue.store_result(in_pieces(2))
        await fill(connection, "body", "ballast", "n")
        end = RunEnd(State.DONE, Attempt(0.0, 1.0, 200, None), 200, 1.0, result)
        with pytest.raises(QueueFull):
            await queue.finish(lease, end)
        monkeypatch.setattr(bodies_module, "ORPHAN_S", -1.0)
        assert (await queue.sweep(60, 60)).file_count == 0
        await connection.purge(connection.names.bodies, connection.names.subject("body", "ballast", "*"))
        await queue.finish(lease, end)
        assert await read_all(queue, result) == 2 * BODY

    with_queues(dataclasses.replace(options, max_bytes=1_000_000), 1, scenario)


def test_sweep_makes_room_in_a_full_stream_of_records_when_less_is_to_be_kept(options: Options) -> None:
    async def scenario(connection: Connection, queue: JetStream) -> None:
        owner = await queue.enlist()
        await queue.sweep(3600, 3600)
        for _ in range(2):
            await queue.put(new_call(due_s=0.0))
        for lease in await queue.claim([QUEUE], owner, LONG_S, 2):
            await finish(queue, lease, State.DONE, inline(bytes(5000)))
        await put_expired(queue)
        await fill(connection, "meta", "n")
        swept = await queue.sweep(0, 0)
        assert (swept.call_count, swept.expired_count) == (2, 1)

    with_queues(dataclasses.replace(options, max_bytes=300_000), 1, scenario)
