"""Two processes at one call: what the other one does while the first is between the two halves of a step.

The first is stopped where it talks to the servers, by `stopped`, and goes on when the other has done.  Nothing may be
lost by that, and nothing done twice.  And claims that come half-way, since servers do not answer or refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest
import uvloop

from faashound.calls.model import (
    Attempt,
    CallbackState,
    CallUnknown,
    Lease,
    LeaseLost,
    NewCall,
    QueueFull,
    QueueUnavailable,
    RunEnd,
    State,
)
from faashound.calls.steps import LOST_ERROR
from faashound.queues.jetstream import queue as queue_module
from faashound.queues.jetstream.connection import Connection, Options, Write, connect
from faashound.queues.jetstream.queue import JetStream
from faashound.queues.jetstream.subjects import FlowName
from faashound.watchdog import log
from testkit.harness import crowding, eventually
from testkit.nats_servers import Cluster
from testkit.queue_kit import LEASE_S, QUEUE, fill, finish, inline, new_call, read_all

LONG_S = 30.0
FAILED = Attempt(1.0, 2.0, 500, "e")

_IS_STOPPED: ContextVar[bool] = ContextVar("_IS_STOPPED", default=False)


@contextlib.asynccontextmanager
async def stopped(
    monkeypatch: pytest.MonkeyPatch, method: str, is_there: Callable[..., bool], work: Coroutine[Any, Any, Any]
) -> AsyncIterator[asyncio.Task[Any]]:
    """Begin `work`; yield it when it is about to say what `is_there` knows, and let it go on to its end afterwards."""
    original, reached, go_on = getattr(Connection, method), asyncio.Event(), asyncio.Event()

    async def stop(self: Connection, *arguments: Any) -> Any:
        if _IS_STOPPED.get() and is_there(*arguments):
            reached.set()
            await go_on.wait()
        return await original(self, *arguments)

    context = copy_context()
    context.run(_IS_STOPPED.set, True)
    with monkeypatch.context() as patch:
        patch.setattr(Connection, method, stop)
        task = asyncio.get_running_loop().create_task(work, context=context)
        async with asyncio.timeout(LONG_S * crowding()):
            await reached.wait()
    try:
        yield task
    finally:
        go_on.set()
        await task


def is_ack(_: str, payload: bytes = b"", *__: str) -> bool:
    return payload == b"+ACK"


def is_record(write: Write) -> bool:
    return ".rec." in write.subject


def with_two(options: Options, scenario: Callable[[JetStream, JetStream], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario with two queues of their own on the same streams."""

    async def run() -> None:
        one, other = await JetStream.open(options), await JetStream.open(options)
        try:
            await scenario(one, other)
        finally:
            await other.close()
            await one.close()

    uvloop.run(run())


@contextlib.asynccontextmanager
async def bare(options: Options) -> AsyncIterator[Connection]:
    """A connection beside the queues: to see what the servers have, and to take their room."""
    connection = await connect(options)
    try:
        yield connection
    finally:
        await connection.close()


async def claim_one(queue: JetStream, owner: str, kind: str = "call", lease_s: float = LEASE_S) -> Lease:
    claim = queue.claim if kind == "call" else queue.claim_callbacks
    async with asyncio.timeout(LONG_S * crowding()):
        while not (leases := await claim([QUEUE], owner, lease_s, 1)):
            await queue.wait_for_work(1.0)
    return leases[0]


# -- the message of an end that is still to be acknowledged


def test_dead_letter_runs_again_when_it_is_requeued_before_its_message_is_acknowledged(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner)
        async with stopped(monkeypatch, "tell", is_ack, finish(worker, lease, State.DEAD, None)):
            assert (await other.requeue_dead(call.id)).state is State.QUEUED
        again = await claim_one(other, await other.enlist())
        assert (again.call.id, again.call.attempts) == (call.id, 1)
        await finish(other, again, State.DONE, None)
        stats = await other.stats()
        assert (stats.by_state[State.DONE], stats.by_state[State.QUEUED]) == (1, 0)

    with_two(options, scenario)


def test_callback_is_due_again_when_it_is_requeued_before_its_message_is_acknowledged(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        await finish(worker, await claim_one(worker, owner), State.DONE, inline(b"out"))
        lease = await claim_one(worker, owner, "callback")
        async with stopped(monkeypatch, "tell", is_ack, worker.callback_dead(lease, FAILED)):
            again = (await other.requeue_callback(call.id)).callback
            assert again is not None
            assert again.state is CallbackState.PENDING
        again_lease = await claim_one(other, await other.enlist(), "callback")
        await other.callback_done(again_lease, Attempt(3.0, 4.0, 200, None))
        assert (await other.stats()).callback_pending_count == 0

    with_two(options, scenario)


def test_dead_letter_is_requeued_though_its_callback_is_claimed_meanwhile(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(one: JetStream, other: JetStream) -> None:
        owner, helper = await one.enlist(), await other.enlist()
        call = await one.put(new_call(due_s=0.0, callback_url="http://caller/"))
        await finish(one, await claim_one(one, owner), State.DEAD, None)
        async with contextlib.AsyncExitStack() as claim:
            claiming = stopped(monkeypatch, "publish", is_record, claim_one(other, helper, "callback"))
            delivery = await claim.enter_async_context(claiming)
            async with stopped(monkeypatch, "publish", is_record, one.requeue_dead(call.id)) as requeue:
                await claim.aclose()
            assert (await requeue).state is State.QUEUED
        await finish(one, await claim_one(one, owner), State.DONE, None)
        with pytest.raises(LeaseLost):
            await other.callback_done(await delivery, Attempt(3.0, 4.0, 200, None))

    with_two(options, scenario)


def is_callback(write: Write) -> bool:
    return ".callback." in write.subject


def test_callback_of_an_end_is_not_lost_with_that_of_an_earlier_one(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an end that does not count any more a callback comes late, and is acknowledged behind the next end."""

    async def scenario(one: JetStream, other: JetStream) -> None:
        owner, helper = await one.enlist(), await other.enlist()
        call = await one.put(new_call(due_s=0.0, callback_url="http://caller/"))
        dying = finish(one, await claim_one(one, owner), State.DEAD, None)
        async with stopped(monkeypatch, "publish", is_callback, dying):
            await other.requeue_dead(call.id)
        lease = await claim_one(one, owner)
        async with stopped(monkeypatch, "tell", is_ack, claim_one(other, helper, "callback")) as claim:
            await finish(one, lease, State.DONE, None)
        delivery = await claim
        assert delivery.call.state is State.DONE
        await other.callback_done(delivery, Attempt(3.0, 4.0, 200, None))
        assert (await other.stats()).callback_pending_count == 0

    with_two(options, scenario)


# -- a lease that is renewed, or whose worker is cancelled, while its end is under way


def is_purge(operation: str, *_: Any) -> bool:
    return operation.startswith("STREAM.PURGE")


@pytest.mark.parametrize(
    ("state", "method", "is_there"),
    [
        pytest.param(State.DEAD, "insist", is_purge, id="record-written-and-not-known-to-be"),
        pytest.param(State.DONE, "publish", is_callback, id="record-written-and-not-followed"),
    ],
)
def test_lease_is_not_lost_while_its_owner_ends_it(
    options: Options, monkeypatch: pytest.MonkeyPatch, state: State, method: str, is_there: Callable[..., bool]
) -> None:
    async def scenario(worker: JetStream, _: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        lease = await claim_one(worker, owner)
        async with stopped(monkeypatch, method, is_there, finish(worker, lease, state, None)):
            assert (await worker.renew([lease], LEASE_S)).lost == frozenset()
        assert (await worker.renew([lease], LEASE_S)).lost == {lease.fence}

    with_two(options, scenario)


def test_lease_is_not_lost_before_its_end_is_told_again(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: JetStream, _: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner)
        with deaf(monkeypatch), pytest.raises(QueueUnavailable):
            await finish(worker, lease, State.DONE, None)
        assert (await worker.renew([lease], LEASE_S)).lost == frozenset()
        await finish(worker, lease, State.DONE, None)

    with_two(options, scenario)


def test_what_follows_from_an_end_is_done_though_its_worker_is_cancelled(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner, helper = await worker.enlist(), await other.enlist()
        await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        lease = await claim_one(worker, owner)
        with pytest.raises(asyncio.CancelledError):
            async with stopped(monkeypatch, "publish", is_callback, finish(worker, lease, State.DONE, None)) as ending:
                ending.cancel()
        assert (await claim_one(other, helper, "callback")).call.state is State.DONE

    with_two(options, scenario)


def is_end(write: Write) -> bool:
    return is_record(write) and b'"state":"done"' in write.payload


@pytest.mark.parametrize(("method", "is_there"), [("publish", is_end), ("tell", is_ack)], ids=["record", "ack"])
def test_end_that_is_under_way_is_whole_when_its_queue_is_closed(
    options: Options, monkeypatch: pytest.MonkeyPatch, method: str, is_there: Callable[..., bool]
) -> None:
    monkeypatch.setattr(queue_module, "GOODBYE_S", LONG_S)

    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner)
        async with stopped(monkeypatch, method, is_there, finish(worker, lease, State.DONE, None)):
            closing = asyncio.create_task(worker.close())
            await asyncio.sleep(0)
            assert not worker.healthy  # it is being closed
        await closing
        ended = await other.get(call.id)
        assert ended is not None
        assert ended.state is State.DONE
        async with bare(options) as connection:

            async def is_acknowledged() -> bool:
                return not (await connection.info(connection.names.queue))["state"]["messages"]

            await eventually(is_acknowledged, LONG_S, "its message is acknowledged")

    with_two(options, scenario)


def test_call_that_is_deleted_before_its_message_is_acknowledged_does_not_run_again(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner)
        async with stopped(monkeypatch, "tell", is_ack, finish(worker, lease, State.DONE, None)):
            assert await other.purge(state=State.DONE) == 1
            async with bare(options) as connection:
                left = await connection.info(connection.names.queue)
            assert left["state"]["messages"] == 0

    with_two(options, scenario)


def test_call_does_not_run_again_when_it_is_kept_for_less_than_its_lease(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The acknowledgement of its message is lost, and the message comes again."""
    tell = Connection.tell

    async def mute(self: Connection, subject: str, payload: bytes = b"", reply: str = "") -> None:
        if payload != b"+ACK":
            await tell(self, subject, payload, reply)

    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner, helper = await worker.enlist(), await other.enlist()
        await worker.sweep(1, 1)  # tells for how long
        await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner, lease_s=3.0)
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "tell", mute)
            await finish(worker, lease, State.DONE, None)
        async with bare(options) as connection:

            async def is_acknowledged() -> bool:
                assert await other.claim([QUEUE], helper, LEASE_S, 1) == []
                return not (await connection.info(connection.names.queue))["state"]["messages"]

            await eventually(is_acknowledged, LONG_S, "the message that has come again is acknowledged")

    with_two(options, scenario)


# -- a dead letter that one deletes and another queues again


async def bury(queue: JetStream, owner: str, **changes: Any) -> NewCall:
    """A dead letter with a body that is stored apart."""
    body = await queue.store_body(bytes(50_000))
    call = await queue.put(new_call(due_s=0.0, body=body, **changes))
    await finish(queue, await claim_one(queue, owner), State.DEAD, None)
    return call


def test_dead_letter_that_is_requeued_while_it_is_deleted_keeps_its_body_and_its_key(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(one: JetStream, other: JetStream) -> None:
        owner = await one.enlist()
        call = await bury(one, owner, idempotency_key="k")
        async with stopped(monkeypatch, "erase", lambda *_: True, one.purge(state=State.DEAD)) as purge:
            await other.requeue_dead(call.id)
        assert await purge == 0
        lease = await claim_one(one, owner)
        assert await read_all(one, lease.call.body) == bytes(50_000)
        assert (await other.put(new_call(body=call.body, idempotency_key="k"))).id == call.id

    with_two(options, scenario)


def test_dead_letter_that_is_deleted_while_it_is_requeued_is_gone(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message waits already when its record goes: it is not to run without its body."""

    async def scenario(one: JetStream, other: JetStream) -> None:
        owner = await one.enlist()
        call = await bury(one, owner)
        with pytest.raises(CallUnknown):
            async with stopped(monkeypatch, "publish", is_record, one.requeue_dead(call.id)):
                assert await other.purge(state=State.DEAD) == 1
        assert await other.get(call.id) is None
        assert await other.claim([QUEUE], await other.enlist(), LEASE_S, 1) == []
        assert (await other.stats()).by_state[State.QUEUED] == 0

    with_two(options, scenario)


# -- a key that is written, and whose call finds no room


def test_key_is_free_again_when_its_call_finds_no_room(options: Options) -> None:
    async def scenario(queue: JetStream, _: JetStream) -> None:
        async with bare(options) as connection:
            await fill(connection, "call", "ballast", QUEUE, "n")
            for key in "klm":
                with pytest.raises(QueueFull):
                    await queue.put(new_call(idempotency_key=key))
            assert await connection.count(connection.names.subject("key", "*")) == 0
            await clear(connection)
        call = new_call(idempotency_key="k")
        assert (await queue.put(call)).id == call.id

    options = dataclasses.replace(options, max_bytes=1_000_000)
    with_two(options, scenario)


def test_key_stays_when_another_puts_its_call_meanwhile(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(one: JetStream, other: JetStream) -> None:
        call = new_call(idempotency_key="k")

        async def find_no_room(connection: Connection) -> None:
            async with stopped(monkeypatch, "erase", lambda *_: True, one.put(call)):
                await clear(connection)
                assert (await other.put(new_call(idempotency_key="k"))).id == call.id

        async with bare(options) as connection:
            await fill(connection, "call", "ballast", QUEUE, "n")
            with pytest.raises(QueueFull):
                await find_no_room(connection)
        assert (await one.put(new_call(idempotency_key="k"))).id == call.id

    options = dataclasses.replace(options, max_bytes=1_000_000)
    with_two(options, scenario)


async def clear(connection: Connection) -> None:
    """Take out what `fill` has put into the stream of what waits."""
    await connection.purge(connection.names.queue, connection.names.waiting_of("call", "ballast"))


# -- an end whose acknowledgement is lost


@contextlib.contextmanager
def deaf(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Records that are written are stored, but their writers do not hear of it."""
    original = Connection.publish

    async def publish(self: Connection, write: Write) -> int:
        revision = await original(self, write)
        if is_record(write):
            raise QueueUnavailable("no acknowledgement")
        return revision

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "publish", publish)
        yield


async def end_of(queue: JetStream) -> RunEnd:
    """The end of a run whose result is stored apart."""
    return RunEnd(State.DONE, Attempt(1.0, 2.0, 200, None), 200, 1.0, await queue.store_body(bytes(50_000)))


def test_end_that_is_told_again_keeps_its_result_when_its_callback_is_under_way(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner, helper = await worker.enlist(), await other.enlist()
        await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        lease = await claim_one(worker, owner, lease_s=1.0)
        end = await end_of(worker)
        with deaf(monkeypatch), pytest.raises(QueueUnavailable):
            await worker.finish(lease, end)

        async def callback() -> list[Lease]:
            await other.claim([QUEUE], helper, 1.0, 1)  # the message comes again, and the callback follows
            return await other.claim_callbacks([QUEUE], helper, LEASE_S, 1)

        (delivery,) = await eventually(callback, LONG_S, "the callback of the end that was heard")
        await worker.finish(lease, end)
        assert delivery.call.result is not None
        assert await read_all(other, delivery.call.result) == bytes(50_000)

    with_two(options, scenario)


def test_end_that_is_told_again_keeps_its_result_when_its_lease_has_run_out(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner, lease_s=0.0)
        end = await end_of(worker)
        with deaf(monkeypatch), pytest.raises(QueueUnavailable):
            await worker.finish(lease, end)
        await worker.reclaim()
        with pytest.raises(LeaseLost):
            await worker.finish(lease, end)
        call = await other.get(lease.call.id)
        assert call is not None
        assert call.result is not None
        assert await read_all(other, call.result) == bytes(50_000)

    with_two(options, scenario)


def test_callback_that_another_has_taken_back_is_not_taken_for_delivered(options: Options) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner, helper = await worker.enlist(), await other.enlist()
        call = await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        await finish(worker, await claim_one(worker, owner), State.DONE, None)
        await worker.callback_retry(await claim_one(worker, owner, "callback", 1.0), FAILED, 0.0)
        lease = await claim_one(worker, owner, "callback", 1.0)  # the second attempt: taken back, it waits a second

        async def is_taken_back() -> bool:
            await other.claim_callbacks([QUEUE], helper, 1.0, 1)
            found = await other.get(call.id)
            return found is not None and found.callback is not None and found.callback.error == LOST_ERROR

        await eventually(is_taken_back, LONG_S, "the callback taken back")
        with pytest.raises(LeaseLost):
            await worker.callback_done(lease, Attempt(3.0, 4.0, 200, None))

    with_two(options, scenario)


def test_callback_that_is_told_again_is_delivered_once(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: JetStream, _: JetStream) -> None:
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0, callback_url="http://caller/"))
        await finish(worker, await claim_one(worker, owner), State.DONE, None)
        lease = await claim_one(worker, owner, "callback")
        with deaf(monkeypatch), pytest.raises(QueueUnavailable):
            await worker.callback_done(lease, Attempt(3.0, 4.0, 200, None))
        await worker.callback_done(lease, Attempt(3.0, 4.0, 200, None))
        found = await worker.get(call.id)
        assert found is not None
        assert found.callback is not None
        assert found.callback.state is CallbackState.DELIVERED
        assert (await worker.stats()).callback_pending_count == 0

    with_two(options, scenario)


# -- a claim that has been written, and is not known to its owner yet


def test_cancel_reaches_a_call_whose_claim_has_just_been_written(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs for the second time, so its record has an old place to be removed from: there its worker is stopped."""

    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner = await worker.enlist()
        call = await worker.put(new_call(due_s=0.0))
        await worker.retry(await claim_one(worker, owner), attempt=FAILED, due_s=0.0)
        async with stopped(monkeypatch, "insist", is_purge, claim_one(worker, owner)):
            assert await other.cancel(call.id) is State.RUNNING
            assert await worker.wait_for_cancel(LONG_S)
            assert await worker.cancelled_ids(owner) == frozenset()
        assert await worker.wait_for_cancel(LONG_S)
        assert await worker.cancelled_ids(owner) == {call.id}

    with_two(options, scenario)


# -- a claim that asks more than once


async def refuse(self: Connection, *_: Any) -> Any:
    raise QueueUnavailable("no NATS server can be reached")


async def hang(self: Connection, *_: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("way", [refuse, hang])
def test_lease_of_a_claim_is_returned_when_its_next_look_comes_to_nothing(
    options: Options, monkeypatch: pytest.MonkeyPatch, way: Callable[..., Any]
) -> None:
    """The first look has brought one call to run and one that waits; so the claim looks for another in its stead."""

    async def scenario(worker: JetStream, _: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=time.time() + 3600))
        call = await worker.put(new_call(due_s=0.0))
        with monkeypatch.context() as patch:
            patch.setattr(Connection, "read_batch", way)
            async with asyncio.timeout(LONG_S * crowding()):
                leases = await worker.claim([QUEUE], owner, LEASE_S, 2)
        assert [lease.call.id for lease in leases] == [call.id]
        await finish(worker, leases[0], State.DONE, None)

    with_two(options, scenario)


ONE_TOO_FEW = """accounts { A { jetstream { max_consumers: 2 }, users: [ {user: u, password: p} ] } }
no_auth_user: u"""


def test_flow_whose_consumer_cannot_be_made_keeps_no_other_from_its_turn(capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario(gateway: JetStream, worker: JetStream) -> None:
        owner = await worker.enlist()
        served = {(await gateway.put(new_call(name, due_s=0.0))).id for name in "fg"}
        leases = await worker.claim([QUEUE], owner, LEASE_S, 8)
        assert {lease.call.id for lease in leases} == served
        await gateway.put(new_call("h", due_s=0.0))
        with pytest.raises(QueueUnavailable, match="maximum consumers"):
            await worker.claim([QUEUE], owner, LEASE_S, 8)
        for _ in range(2):
            waiting = asyncio.create_task(worker.wait_for_work(LONG_S))
            more = await gateway.put(new_call("f", due_s=0.0))
            assert await waiting
            assert [each.call.id for each in await worker.claim([QUEUE], owner, LEASE_S, 8)] == [more.id]
        connection = await connect(options)
        names, g = connection.names, "g.openfaas-fn"
        await connection.insist(f"CONSUMER.DELETE.{names.queue}.{names.consumer(FlowName('call', QUEUE, g))}")
        await connection.close()
        assert [each.call.function.short for each in await worker.claim([QUEUE], owner, LEASE_S, 8, {g: 0})] == ["h"]

    with Cluster(config=ONE_TOO_FEW) as cluster:
        options = cluster.options("p")
        with_two(options, scenario)
    log.flush()
    text = "what waits for h.openfaas-fn in the queue faas-request cannot be fetched"
    told = [line for line in capfd.readouterr().err.splitlines() if text in line]
    assert [line.endswith(": over") for line in told] == [False, True]


def test_claim_tells_that_the_stream_is_gone(options: Options) -> None:
    async def scenario(worker: JetStream, _: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        connection = await connect(options)
        await connection.insist(f"STREAM.DELETE.{connection.names.queue}")
        with pytest.raises(QueueUnavailable, match=r"-queue is gone"):
            await connection.purge(connection.names.queue, connection.names.waiting_of("callback", "x"))
        await connection.close()
        with pytest.raises(QueueUnavailable, match=r"-queue is gone"):
            await worker.claim([QUEUE], owner, LEASE_S, 1)

    with_two(options, scenario)
