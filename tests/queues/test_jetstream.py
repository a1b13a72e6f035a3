"""What only the queue on NATS does: what is on the wire, turns, leases, streams that differ, logging in."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import nkeys  # type: ignore[import-untyped]
import pytest
import uvloop
from hypothesis import given
from nats.aio.msg import Msg

from faashound.calls.ids import new_call_id
from faashound.calls.model import (
    EXCERPT_BYTES,
    Attempt,
    Callback,
    CallbackState,
    CallExists,
    Lease,
    LeaseLost,
    QueueDamaged,
    QueueFull,
    QueueUnavailable,
    ResultLost,
    RunEnd,
    State,
    StoredBody,
    TooManyQueued,
)
from faashound.calls.names import parse_function_name
from faashound.calls.steps import Hold, Record, StoredAnswer
from faashound.queues import open_queue, trouble_of
from faashound.queues.jetstream import bodies as bodies_module
from faashound.queues.jetstream import connection as connection_module
from faashound.queues.jetstream import flows as flows_module
from faashound.queues.jetstream import people as people_module
from faashound.queues.jetstream import store as store_module
from faashound.queues.jetstream.connection import Connection, Options, Stored, Write, connect
from faashound.queues.jetstream.flows import Delivery, Flow, Wanted, deal
from faashound.queues.jetstream.queue import JetStream, is_made_for
from faashound.queues.jetstream.records import (
    Standing,
    build_record,
    build_waiting,
    parse_record,
    parse_waiting,
    place_of,
)
from faashound.queues.jetstream.subjects import FlowName, Names, build_token, parse_token
from faashound.queues.nats_settings import NatsSettings
from faashound.queues.urls import NatsUrl, parse_queue_url
from faashound.watchdog import BadSettings, CannotStart, PeerGone, log, parse_settings
from testkit.harness import ROOT, crowding
from testkit.nats_servers import Cluster, Proxy
from testkit.needed import tool
from testkit.queue_kit import LEASE_S, QUEUE, finish, inline, new_call, read_all, results_wait

LONG_S = 20.0
NAMES = Names("p")


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def options(server: Cluster) -> Options:
    return server.options(f"t{uuid.uuid4().hex[:12]}")


def with_queues(options: Options, count: int, scenario: Callable[..., Awaitable[Any]]) -> Any:
    """What `scenario` returns, given so many queues of their own on the same streams."""

    async def run() -> Any:
        queues = [await JetStream.open(options) for _ in range(count)]
        try:
            return await scenario(*queues)
        finally:
            for queue in queues[::-1]:
                await queue.close()

    return uvloop.run(run())


def with_connection(options: Options, scenario: Callable[[Connection], Awaitable[Any]]) -> Any:
    """What `scenario` returns, given a bare connection: for what no queue does by itself."""

    async def run() -> Any:
        connection = await connect(options)
        try:
            return await scenario(connection)
        finally:
            await connection.close()

    return uvloop.run(run())


@contextlib.asynccontextmanager
async def bare(options: Options) -> AsyncIterator[Connection]:
    """A connection beside the queues: to see what the servers have, and to write what a queue would not."""
    connection = await connect(options)
    try:
        yield connection
    finally:
        await connection.close()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LONG_S * crowding()):
        while not await condition():  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0.02)


# -- what is on the wire

texts = st.text(max_size=20)
seconds = st.floats(0, 1e10, allow_nan=False)
stored_bodies = st.one_of(
    st.binary(max_size=5000).map(inline), st.builds(StoredBody, st.integers(0), st.none(), st.uuids().map(str))
)
headers = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)
attempts = st.builds(Attempt, seconds, seconds, st.none() | st.integers(100, 599), st.none() | texts)


@st.composite
def answers(draw: st.DrawFn) -> StoredAnswer:
    result = draw(st.none() | stored_bodies)
    excerpt = draw(st.none() | st.binary(max_size=100))
    if result is not None and result.inline is not None:
        excerpt = result.inline[:EXCERPT_BYTES]
    return StoredAnswer(result, draw(headers), excerpt, draw(seconds))


records = st.builds(
    Record,
    st.sampled_from([State.QUEUED, State.RUNNING, State.DONE, State.DEAD, State.EXPIRED]),
    due_s=seconds,
    expires_s=st.none() | seconds,
    wants_callback=st.booleans(),
    attempts=st.integers(0, 99),
    started_s=st.none() | seconds,
    finished_s=st.none() | seconds,
    status=st.none() | st.integers(100, 599),
    error=st.none() | texts,
    duration_s=st.none() | seconds,
    cancel_requested=st.booleans(),
    callback=st.none()
    | st.builds(
        Callback,
        st.sampled_from([CallbackState.PENDING, CallbackState.DELIVERED]),
        st.integers(0),
        seconds,
        st.none(),
        texts,
    ),
    hold=st.none() | st.builds(Hold, st.sampled_from(["call", "callback"]), texts, st.integers(0)),
    history=st.lists(attempts, max_size=3).map(tuple),
    answer=st.none() | answers(),
)


def stored_record(standing: Standing, *, whole: bool) -> Stored:
    accepted = standing.accepted
    subject = NAMES.record(place_of(standing.record), accepted.id, accepted.function)
    return Stored(subject, standing.revision, {}, build_record(standing, whole=whole), 0.0)


@given(records, stored_bodies, headers, st.booleans())
def test_record_comes_back_from_its_message(record: Record, body: StoredBody, fields: Any, whole: bool) -> None:
    standing = Standing(new_call(body=body, headers=fields), record, 7)
    kept = parse_record(stored_record(standing, whole=whole))
    assert (kept.call_id, kept.function) == (standing.id, standing.accepted.function)
    assert (kept.record, kept.revision, kept.place) == (record, 7, place_of(record))
    assert kept.accepted == (standing.accepted if whole else None)


@given(stored_bodies, headers, texts, st.none() | seconds)
def test_call_comes_back_from_its_message(body: StoredBody, fields: Any, text: str, expires_s: float | None) -> None:
    call = new_call(body=body, headers=fields, path=text, query=text, expires_s=expires_s, idempotency_key=text)
    assert parse_waiting(build_waiting(call)) == call


DAMAGED = {
    "empty": b"",
    "bare": b"\0\0\0\2{}",
    "short": b"\0\0\0\5{}",
    "odd": b"\xff" * 20,
    "text": b'\0\0\0\3"x"',
    "deep": b"\0\0\x40\0" + b"[" * 0x4000,
}


@pytest.mark.parametrize("payload", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_not_passed_off_as_whole(payload: bytes) -> None:
    with pytest.raises(QueueDamaged, match=r"cannot be read: its? ") as of_call:
        parse_waiting(payload)
    with pytest.raises(QueueDamaged, match=r"of call x .* cannot be read: its? ") as of_record:
        parse_record(Stored("p.rec.run.x.f=g", 1, {}, payload, 0.0))
    assert "Error" not in f"{of_call.value}{of_record.value}"


@given(st.text(max_size=30))
def test_token_comes_back_and_is_one(text: str) -> None:
    token = build_token(text)
    assert parse_token(token) == text
    assert token
    assert not set(token) & set(" .*>\r\n\t")


@pytest.mark.parametrize(
    "name",
    [
        FlowName("call", "faas-request", "f.openfaas-fn"),
        FlowName("callback", "q.1", "host.example:8080"),
        FlowName("callback", "q", "[2001:db8::1]:80"),
        FlowName("callback", "q", ""),
    ],
    ids=["function", "host", "address", "odd"],
)
def test_flow_comes_back_from_its_subject(name: FlowName) -> None:
    assert NAMES.parse_flow(NAMES.flow(name)) == name
    assert not set(NAMES.consumer(name)) & set(" .*>/\\")


# -- turns


def flow(name: str, count: int) -> Flow:
    made = Flow(FlowName("call", QUEUE, name), name)
    made.stash += [Delivery(made, f"{name}{number}", 0.0, "", b"", {}, number, 1, 0) for number in range(count)]
    return made


@pytest.mark.parametrize(
    ("flows", "capacity", "count", "expected"),
    [
        pytest.param({"a": 3, "b": 1}, {}, 9, "a0 b0 a1 a2", id="what-the-short-flow-leaves"),
        pytest.param({"a": 3, "b": 3}, {}, 3, "a0 b0 a1", id="no-more-than-asked"),
        pytest.param({"a": 3, "b": 3}, {"a": 1}, 9, "a0 b0 b1 b2", id="no-more-than-its-capacity"),
        pytest.param({"a": 0}, {}, 9, "", id="nothing"),
    ],
)
def test_deal_takes_turns(flows: dict[str, int], capacity: dict[str, int], count: int, expected: str) -> None:
    ring = [flow(name, size) for name, size in flows.items()]
    wanted = Wanted("call", (QUEUE,), count, capacity, 1.0)
    assert " ".join(each.call_id for each in deal(ring, wanted, dict(capacity), count)) == expected


# -- ids and keys


ID, ID_MADE_S = "018bcfe5-687b-7000-8000-000000000000", 1_700_000_000.123


@pytest.mark.parametrize(
    ("call_id", "accepted_s", "now_s", "expected"),
    [
        pytest.param(ID, ID_MADE_S - 0.002, ID_MADE_S + 9, True, id="made-behind-the-head"),
        pytest.param(ID, ID_MADE_S + 0.0009, ID_MADE_S + 9, True, id="made-in-the-same-millisecond"),
        pytest.param(ID, ID_MADE_S + 0.002, ID_MADE_S + 0.003, False, id="sent-by-the-caller"),
        pytest.param(ID, ID_MADE_S - 2, ID_MADE_S - 1, False, id="of-a-clock-that-is-ahead"),
        pytest.param("0b0f1c3e-6a52-4f0e-9d3c-9a8b7c6d5e4f", 0.0, 1.0, False, id="of-another-version"),
    ],
)
def test_id_was_made_for_the_call(call_id: str, accepted_s: float, now_s: float, expected: bool) -> None:
    assert is_made_for(new_call(id=call_id, accepted_s=accepted_s), now_s) is expected


def test_put_is_refused_when_its_id_is_that_of_a_call_that_has_just_ended(options: Options) -> None:
    async def scenario(worker: JetStream, gateway: JetStream) -> None:
        owner = await worker.enlist()
        first = await worker.put(new_call(due_s=0.0, accepted_s=time.time()))
        await finish(worker, await claim_one(worker, owner), State.DONE, None)
        await worker.stats()  # the servers have heard that its message is acknowledged
        with pytest.raises(CallExists, match=first.id):
            await gateway.put(new_call("g", id=first.id, due_s=0.0, accepted_s=time.time()))
        assert (await gateway.stats()).by_state[State.QUEUED] == 0

    with_queues(options, 2, scenario)


def test_put_finishes_what_another_put_of_the_same_key_began(options: Options) -> None:
    """The other one died between the key and the call: whoever comes next puts the call, under the first one's id."""

    async def scenario(queue: JetStream) -> None:
        first = new_call_id()
        async with bare(options) as connection:
            key = connection.names.key(parse_function_name("f"), "k")
            await connection.publish(Write(key, first.encode(), {}, 0))
        call = new_call(idempotency_key="k")
        put = await queue.put(dataclasses.replace(call, headers=(("X-Call-Id", call.id), ("X-Other", call.id))))
        assert (put.id, put.headers) == (first, (("X-Call-Id", first), ("X-Other", call.id)))
        assert (await queue.put(new_call(idempotency_key="k"))).id == first

    with_queues(options, 1, scenario)


def test_put_with_one_key_by_many_at_once_makes_one_call(options: Options) -> None:
    async def scenario(*queues: JetStream) -> None:
        puts = [queue.put(new_call(idempotency_key="k")) for queue in queues for _ in range(10)]
        assert len({call.id for call in await asyncio.gather(*puts)}) == 1
        assert (await queues[0].stats()).by_state[State.QUEUED] == 1

    with_queues(options, 3, scenario)


def test_key_of_a_refused_call_stands_for_the_next_one(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        other = await queue.put(new_call())
        with pytest.raises(CallExists):
            await queue.put(new_call(id=other.id, idempotency_key="k"))
        call = new_call(idempotency_key="k")
        assert (await queue.put(call)).id == call.id

    with_queues(options, 1, scenario)


def test_key_is_free_again_when_its_call_is_deleted(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        call = new_call(idempotency_key="k")
        await queue.put(call)
        await queue.cancel(call.id)
        assert await queue.purge(state=State.CANCELLED) == 1
        assert await queue.get(call.id) is None
        await queue.put(call)  # the same id too
        again = await queue.get(call.id)
        assert again is not None
        assert again.state is State.QUEUED

    with_queues(options, 1, scenario)


# -- leases


async def claim_one(queue: JetStream, owner: str, lease_s: float = LEASE_S) -> Lease:
    async with asyncio.timeout(LONG_S * crowding()):
        while not (leases := await queue.claim([QUEUE], owner, lease_s, 1)):
            await queue.wait_for_work(LONG_S)
    return leases[0]


def test_two_workers_share_what_there_is_and_run_nothing_twice(options: Options) -> None:
    async def scenario(one: JetStream, other: JetStream, gateway: JetStream) -> None:
        await asyncio.gather(*(gateway.put(new_call("fg"[n % 2], due_s=0.0)) for n in range(200)))
        owners = {queue: await queue.enlist() for queue in (one, other)}
        got: dict[JetStream, list[str]] = {one: [], other: []}

        async def drain(queue: JetStream) -> None:
            while leases := await queue.claim([QUEUE], owners[queue], LEASE_S, 4):
                got[queue] += [lease.call.id for lease in leases]
                await asyncio.gather(*(finish(queue, lease, State.DONE, None) for lease in leases))

        await asyncio.gather(drain(one), drain(other))
        assert len(set(got[one]) | set(got[other])) == len(got[one] + got[other]) == 200
        assert min(map(len, got.values())) > 20

    with_queues(options, 3, scenario)


DOOMED = """
import asyncio, os, signal, sys
from faashound.queues.jetstream.connection import Options
from faashound.queues.jetstream.queue import JetStream
from testkit.queue_kit import QUEUE

async def main():
    queue = await JetStream.open(Options((sys.argv[1],), prefix=sys.argv[2]))
    assert await queue.claim([QUEUE], await queue.enlist(), 1.0, 1)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    await queue.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_call_of_a_worker_that_is_gone_is_taken_over(options: Options, way: str) -> None:
    async def scenario(worker: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        doomed = [sys.executable, "-c", DOOMED, options.servers[0], options.prefix, way]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = await asyncio.create_subprocess_exec(*doomed, env=environ, cwd=ROOT)
        assert await process.wait() == (0 if way == "closed" else -signal.SIGKILL)
        assert (await claim_one(worker, owner)).call.attempts == 2

    with_queues(options, 1, scenario)


def test_lease_that_is_not_renewed_passes_to_another_worker_though_its_owner_lives(options: Options) -> None:
    async def scenario(worker: JetStream, sleeper: JetStream) -> None:
        owner, slow = await worker.enlist(), await sleeper.enlist()
        await worker.put(new_call(due_s=0.0))
        began_s = time.monotonic()
        (lease,) = await sleeper.claim([QUEUE], slow, 1.0, 1)
        again = await claim_one(worker, owner)
        assert again.call.attempts == 2
        assert time.monotonic() - began_s > 0.9
        assert (await sleeper.renew([lease], LEASE_S)).lost == {lease.fence}
        await finish(worker, again, State.DONE, None)
        by_state = (await worker.stats()).by_state
        assert (by_state[State.DONE], by_state[State.RUNNING]) == (1, 0)
        with pytest.raises(LeaseLost):
            await sleeper.release(lease)

    with_queues(options, 2, scenario)


def test_call_whose_owner_renews_is_not_taken_over_when_the_servers_deliver_it_again(options: Options) -> None:
    async def scenario(worker: JetStream, other: JetStream) -> None:
        owner, idle = await worker.enlist(), await other.enlist()
        await worker.put(new_call(due_s=0.0))
        lease = await claim_one(worker, owner, LEASE_S)
        connection = await connect(options)
        names = await connection.insist(f"CONSUMER.NAMES.{connection.names.queue}")
        for name in names["consumers"]:  # with it goes what the servers know of the lease
            await connection.insist(f"CONSUMER.DELETE.{connection.names.queue}.{name}")
        await connection.close()
        assert await other.claim([QUEUE], idle, LEASE_S, 1) == []
        await finish(worker, lease, State.DONE, None)
        call = await other.get(lease.call.id)
        assert call is not None
        assert (call.state, call.attempts) == (State.DONE, 1)

    with_queues(options, 2, scenario)


def test_end_that_is_told_again_is_the_same_end(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first try was heard, and its acknowledgement lost: the worker tells the end once more."""
    original = Connection.publish

    async def deaf(self: Connection, write: Write) -> int:
        revision = await original(self, write)
        if ".rec." in write.subject:
            monkeypatch.undo()
            raise QueueUnavailable("no acknowledgement")
        return revision

    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        call = await queue.put(new_call(due_s=0.0, callback_url="http://caller/"))
        lease = await claim_one(queue, owner)
        result = await queue.store_body(bytes(50_000))
        end = RunEnd(State.DONE, Attempt(1.0, 2.0, 200, None), 200, 1.0, result)
        monkeypatch.setattr(Connection, "publish", deaf)
        with pytest.raises(QueueUnavailable, match="no acknowledgement"):
            await queue.finish(lease, end)
        await queue.finish(lease, end)
        ended = await queue.get(call.id)
        assert ended is not None
        assert ended.result is not None
        assert await read_all(queue, ended.result) == bytes(50_000)
        assert len(await queue.claim_callbacks([QUEUE], owner, LEASE_S, 1)) == 1

    with_queues(options, 1, scenario)


def test_leases_that_lapse_together_are_taken_back_once_by_many(options: Options) -> None:
    """Two look for what has lapsed at the same time, while one of the calls is being ended."""

    async def scenario(one: JetStream, other: JetStream) -> None:
        owner = await one.enlist()
        await asyncio.gather(*(one.put(new_call(due_s=0.0)) for _ in range(20)))
        leases = await one.claim([QUEUE], owner, 0.0, 20)
        ends = asyncio.gather(*(finish(one, lease, State.DONE, None) for lease in leases[:5]), return_exceptions=True)
        counts = await asyncio.gather(one.reclaim(), other.reclaim(), one.reclaim())
        failed = [end for end in await ends if end is not None]
        assert all(isinstance(end, LeaseLost) for end in failed)
        await one.put(new_call(due_s=0.0))
        runs = 0
        async with asyncio.timeout(LONG_S * crowding()):
            while (await one.stats()).by_state[State.DONE] < 21:
                for lease in await one.claim([QUEUE], owner, LEASE_S, 30):
                    await finish(one, lease, State.DONE, None)
                    runs += 1
        assert sum(counts) <= 20
        assert runs == 21 - (5 - len(failed))

    with_queues(options, 2, scenario)


def test_wake_up_reaches_a_worker_of_the_right_queue(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows_module, "WATCH_S", 6 * LONG_S)  # what is not told is not found by another look either

    async def scenario(one: JetStream, other: JetStream, gateway: JetStream) -> None:
        owners = {"a": await one.enlist(), "b": await other.enlist()}
        for queue, worker in (("a", one), ("b", other)):
            await gateway.put(new_call(queue=queue, due_s=0.0))
            await finish(worker, (await worker.claim([queue], owners[queue], LEASE_S, 1))[0], State.DONE, None)
            assert await worker.claim([queue], owners[queue], LEASE_S, 1) == []
        for _ in range(30):
            waiting = asyncio.create_task(other.wait_for_work(LONG_S))
            idle = asyncio.create_task(one.wait_for_work(LONG_S))
            await gateway.put(new_call(queue="b", due_s=0.0))
            assert await waiting
            (lease,) = await other.claim(["b"], owners["b"], LEASE_S, 1)
            await finish(other, lease, State.DONE, None)
            idle.cancel()

    with_queues(options, 3, scenario)


def test_owner_is_enlisted_though_the_servers_stand_still_for_longer_than_a_try(
    server: Cluster, options: Options
) -> None:
    async def scenario(queue: JetStream) -> None:
        server.servers[0].pause()
        try:
            enlisting = asyncio.create_task(queue.enlist())
            await asyncio.sleep(connection_module.TRY_S + 0.2)
        finally:
            server.servers[0].resume()
        await queue.put(new_call(due_s=0.0))
        assert (await claim_one(queue, await enlisting)).call.attempts == 1

    with_queues(options, 1, scenario)


def test_call_counts_as_running_though_its_worker_is_slow_to_say_so(options: Options) -> None:
    async def scenario(gateway: JetStream) -> None:
        call = await gateway.put(new_call(due_s=0.0))

        async def answer_late(question: Msg) -> None:
            await asyncio.sleep(0.5)
            await question.respond(json.dumps([[call.id, call.function, call.queue]]).encode())

        async with bare(options) as connection:
            await connection.subscribe(connection.names.subject("owners"), answer_late)
            await connection.client.flush()
            by_state = (await gateway.stats()).by_state
        assert (by_state[State.QUEUED], by_state[State.RUNNING]) == (0, 1)

    with_queues(options, 1, scenario)


def test_function_that_appears_is_served_by_workers_that_wait(options: Options) -> None:
    async def scenario(worker: JetStream, gateway: JetStream) -> None:
        owner = await worker.enlist()
        assert await worker.claim([QUEUE], owner, LEASE_S, 1) == []
        for number in range(5):
            waiting = asyncio.create_task(worker.wait_for_work(LONG_S))
            await asyncio.sleep(0)
            await gateway.put(new_call(f"new{number}", due_s=0.0))
            assert await waiting
            lease = await claim_one(worker, owner)
            assert lease.call.function.name == f"new{number}"
            await finish(worker, lease, State.DONE, None)

    with_queues(options, 2, scenario)


def test_function_that_appears_while_a_worker_is_cut_off_is_served_when_it_is_back(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows_module, "LOOK_S", 3600.0)  # no other look finds what was missed

    async def scenario(gateway: JetStream) -> None:
        async with contextlib.AsyncExitStack() as stack:
            proxy = Proxy(options)
            stack.push_async_callback(proxy.stop)
            worker = await JetStream.open(await proxy.start())
            stack.push_async_callback(worker.close)
            owner = await worker.enlist()
            await gateway.put(new_call("old", due_s=0.0))
            await finish(worker, await claim_one(worker, owner, 3600.0), State.DONE, None)
            await worker.stats()  # the servers have heard of it

            async def is_away() -> bool:
                return not worker.healthy

            waiting = asyncio.create_task(worker.wait_for_work(3600.0))
            proxy.hang_up()
            await until(is_away)
            await gateway.put(new_call("new", due_s=0.0))
            proxy.mend()
            async with asyncio.timeout(LONG_S * crowding()):
                assert await waiting
            assert (await claim_one(worker, owner)).call.function.name == "new"

    with_queues(options, 1, scenario)


def test_worker_looks_again_before_its_wait_is_over(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that was lost in some other way is to cost no more than that."""
    monkeypatch.setattr(flows_module, "LOOK_S", 0.1)

    async def scenario(worker: JetStream) -> None:
        async with asyncio.timeout(LONG_S * crowding()):
            assert not await worker.wait_for_work(3600.0)

    with_queues(options, 1, scenario)


def test_put_is_refused_when_as_many_functions_and_destinations_wait_as_may(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows_module, "MAX_FLOWS_COUNT", 3)  # the timers' is one of them

    async def scenario(gateway: JetStream) -> None:
        for name in ("f", "g"):
            await gateway.put(new_call(name))
        for more in (new_call("h"), new_call("f", callback_url="http://receiver/")):
            with pytest.raises(TooManyQueued, match="functions and destinations have calls waiting"):
                await gateway.put(more)
        await gateway.put(new_call("f"))

    with_queues(options, 1, scenario)


def test_function_that_another_process_has_forgotten_takes_the_place_of_no_other(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_module, "IDLE_FLOW_S", -1.0)
    monkeypatch.setattr(flows_module, "MAX_FLOWS_COUNT", 3)
    monkeypatch.setattr(flows_module, "CROWDED_S", 0.0)

    async def scenario(gateway: JetStream, worker: JetStream) -> None:
        owner = await worker.enlist()
        for name in "fg":
            await gateway.put(new_call(name, due_s=0.0))
            await finish(worker, await claim_one(worker, owner), State.DONE, None)
        await worker.stats()  # the servers have heard that nothing waits
        await worker.sweep(3600, 1e9)
        call = await gateway.put(new_call("h", due_s=0.0))
        assert (await claim_one(worker, owner)).call.id == call.id

    with_queues(options, 2, scenario)


def test_function_that_was_forgotten_is_served_when_it_is_called_again(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker still has a request for its next message with the servers, and does not know whose it was."""
    monkeypatch.setattr(people_module, "IDLE_FLOW_S", -1.0)
    monkeypatch.setattr(flows_module, "WHOLE_S", 0.0)
    monkeypatch.setattr(flows_module, "WATCH_S", 6 * LONG_S)

    async def scenario(worker: JetStream, sweeper: JetStream) -> None:
        owner = await worker.enlist()
        await sweeper.put(new_call(due_s=0.0))
        await finish(worker, await claim_one(worker, owner, 3600.0), State.DONE, None)
        assert await worker.claim([QUEUE], owner, 3600.0, 1) == []
        await sweeper.sweep(3600, 1e9)
        await worker.stats()
        async with contextlib.AsyncExitStack() as stack:
            gateway = await JetStream.open(options)
            stack.push_async_callback(gateway.close)
            call = await gateway.put(new_call(due_s=0.0))
            assert (await claim_one(worker, owner, 3600.0)).call.id == call.id

    with_queues(options, 2, scenario)


def test_flow_is_forgotten_only_when_nothing_waits_in_it(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that nobody calls any more is forgotten; the calls of one that has gone wait for its return."""
    monkeypatch.setattr(people_module, "IDLE_FLOW_S", -1.0)

    async def scenario(gateway: JetStream) -> None:
        owner = await gateway.enlist()
        waits = await gateway.put(new_call("gone", due_s=0.0))
        await gateway.put(new_call("idle", due_s=0.0))
        for lease in await gateway.claim([QUEUE], owner, LEASE_S, 2):
            await (gateway.release(lease) if lease.call.id == waits.id else finish(gateway, lease, State.DONE, None))
        assert (await gateway.stats()).by_function[waits.function, State.QUEUED] == 1
        await gateway.sweep(3600, 1e9)
        async with bare(options) as connection:
            flows = [
                connection.names.parse_flow(each.subject) async for each in connection.walk(connection.names.flows)
            ]
        assert [each.name for each in flows] == ["gone.openfaas-fn"]
        worker = await JetStream.open(options)
        assert (await worker.stats()).by_function[waits.function, State.QUEUED] == 1
        assert (await claim_one(worker, await worker.enlist())).call.id == waits.id
        await worker.close()

    with_queues(options, 1, scenario)


def test_dead_letter_counts_though_its_function_is_called_no_more(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people_module, "IDLE_FLOW_S", -1.0)

    async def scenario(worker: JetStream, gateway: JetStream) -> None:
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        await finish(worker, await claim_one(worker, owner), State.DEAD, None)
        await worker.stats()  # the servers have heard that nothing waits
        await worker.sweep(3600, 1e9)
        for queue in (worker, gateway):
            assert (await queue.stats()).by_state[State.DEAD] == 1
            assert (await queue.backlog()).dead_count == 1

    with_queues(options, 2, scenario)


def test_worker_serves_three_hundred_functions(options: Options) -> None:
    async def scenario(worker: JetStream, gateway: JetStream) -> None:
        owner = await worker.enlist()
        await asyncio.gather(*(gateway.put(new_call(f"f{number}", due_s=0.0)) for number in range(300)))
        served: set[str] = set()
        async with asyncio.timeout(LONG_S * crowding()):
            while len(served) < 300:
                leases = await worker.claim([QUEUE], owner, LEASE_S, 16)
                served |= {lease.call.function for lease in leases}
                await asyncio.gather(*(finish(worker, lease, State.DONE, None) for lease in leases))
                if not leases:  # what waited here for too long is on its way back to the servers
                    await worker.wait_for_work(1.0)

    with_queues(options, 2, scenario)


def test_call_that_is_not_delayed_is_taken_though_the_clock_of_its_worker_is_behind(options: Options) -> None:
    async def scenario(gateway: JetStream) -> None:
        now_s = time.time()
        await gateway.put(new_call("delayed", due_s=now_s + 10, accepted_s=now_s))
        call = await gateway.put(new_call(due_s=now_s, accepted_s=now_s))
        worker = await JetStream.open(options, now=lambda: now_s - 3600)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(worker.close)
            owner = await worker.enlist()
            for _ in range(2):  # also when it comes back untried
                lease = await claim_one(worker, owner)
                assert (lease.call.id, lease.call.attempts) == (call.id, 1)
                await worker.release(lease)

    with_queues(options, 1, scenario)


def test_delayed_call_runs_soon_after_the_clock_of_its_worker_is_right_again(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flows_module, "MAX_DELAY_S", 0.5)

    async def scenario(gateway: JetStream) -> None:
        now_s, behind_s = time.time(), 9 * 365 * 86400.0
        call = await gateway.put(new_call(due_s=now_s, accepted_s=now_s - 1))
        worker = await JetStream.open(options, now=lambda: time.time() - behind_s)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(worker.close)
            owner = await worker.enlist()
            assert await worker.claim([QUEUE], owner, LEASE_S, 1) == []
            behind_s = 0.0
            assert (await claim_one(worker, owner)).call.id == call.id

    with_queues(options, 1, scenario)


def test_delayed_calls_cost_a_claim_nothing_until_they_are_due(options: Options) -> None:
    """A worker looks at each once; from then on the servers keep it, and deliver what is due (or was kept for long)."""
    count = 20_000

    async def scenario(queue: JetStream) -> None:
        owner, now_s = await queue.enlist(), time.time()
        for _ in range(0, count, 500):
            await asyncio.gather(*(queue.put(new_call(due_s=now_s + 3600)) for _ in range(500)))
        soon = await queue.put(new_call("g", due_s=now_s))
        (lease,) = await queue.claim([QUEUE], owner, LEASE_S, 5)
        assert lease.call.id == soon.id
        async with bare(options) as connection:
            flow = FlowName("call", QUEUE, new_call().function)
            consumer = f"CONSUMER.INFO.{connection.names.queue}.{connection.names.consumer(flow)}"
            assert (await connection.insist(consumer))["delivered"]["consumer_seq"] < 1000  # what is due came first
            assert await queue.claim([QUEUE], owner, LEASE_S, 5) == []
            before = (await connection.insist(consumer))["delivered"]["consumer_seq"], await commits(queue)
            assert count <= before[0] < 1.1 * count  # on a busy machine some wait here for too long, and come again
            for _ in range(20):
                due = await queue.put(new_call("g", due_s=0.0))
                (lease,) = await queue.claim([QUEUE], owner, LEASE_S, 5)
                assert lease.call.id == due.id
                await finish(queue, lease, State.DONE, None)
                assert await queue.claim([QUEUE], owner, LEASE_S, 5) == []
            after = (await connection.insist(consumer))["delivered"]["consumer_seq"], await commits(queue)
        assert after == (before[0], before[1] + 20 * 3)
        assert (await queue.stats()).by_state[State.QUEUED] == count

    with_queues(options, 1, scenario)


async def commits(queue: JetStream) -> int:
    return (await queue.stats()).commit_count


# -- bodies and housekeeping


def test_sweep_removes_bodies_that_no_call_names(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(queue: JetStream) -> None:
        named = await queue.store_body(bytes(100_000))
        await queue.put(new_call(body=named))
        lost = await queue.store_body(bytes(100_000))
        assert (await queue.sweep(60, 60)).file_count == 0  # it may be on its way into a call
        monkeypatch.setattr(bodies_module, "ORPHAN_S", -1.0)
        assert (await queue.sweep(60, 60)).file_count == 1
        assert await read_all(queue, named) == bytes(100_000)
        with pytest.raises(QueueDamaged, match="too short"):
            await read_all(queue, lost)

    with_queues(options, 1, scenario)


def test_message_that_cannot_be_read_keeps_no_other_from_its_run(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        call = await queue.put(new_call(due_s=0.0))
        async with bare(options) as connection:
            await connection.publish(Write(connection.names.waiting("call", "odd", QUEUE, call.function), b"?"))
        assert (await claim_one(queue, owner)).call.id == call.id
        with pytest.raises(QueueDamaged, match="cannot be read"):
            await queue.get("odd")

    with_queues(options, 1, scenario)


def test_sweep_looks_at_more_bodies_than_one_answer_has(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "ORPHAN_S", -1.0)
    monkeypatch.setattr(connection_module, "PAGE_COUNT", 10)

    async def scenario(queue: JetStream) -> None:
        for _ in range(25):
            await queue.put(new_call(body=await queue.store_body(bytes(20_000))))
        await queue.store_body(bytes(20_000))
        assert (await queue.sweep(60, 60)).file_count == 1

    with_queues(options, 1, scenario)


def test_figures_of_all_processes_are_right_when_calls_are_purged_from_full_streams(options: Options) -> None:
    async def scenario() -> None:
        small = dataclasses.replace(options, max_bytes=200_000)
        one, other = await JetStream.open(small), await JetStream.open(small)
        count = 0
        with contextlib.suppress(QueueFull):
            while True:
                await one.put(new_call(due_s=0.0))
                count += 1
        assert (await other.stats()).by_state[State.QUEUED] == count
        assert await one.cancel_queued() == count
        assert await one.purge(state=State.CANCELLED) == count
        assert sum((await other.stats()).by_state.values()) == 0
        assert await other.calls() == []
        await other.close()
        await one.close()

    uvloop.run(scenario())


def test_what_has_ended_is_forgotten_by_the_servers(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "KEPT_S", 1.0)

    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        await queue.sweep(1, 1)  # tells how long
        call = await queue.put(new_call(due_s=0.0, idempotency_key="k"))
        lease, ending_s = await claim_one(queue, owner), time.monotonic()
        await finish(queue, lease, State.DONE, None)
        is_done = (await queue.stats()).by_state[State.DONE] == 1
        assert is_done or time.monotonic() - ending_s > 1  # we were so slow that it is forgotten already

        async def is_forgotten() -> bool:
            return await queue.get(call.id) is None

        await until(is_forgotten)
        assert (await queue.put(new_call(idempotency_key="k"))).id != call.id

    with_queues(options, 1, scenario)


def test_call_that_has_ended_leaves_no_timer(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        for _ in range(3):
            await queue.put(new_call(due_s=0.0, expires_s=time.time() + 86400))
            await finish(queue, await claim_one(queue, owner), State.DONE, None)
        await queue.cancel((await queue.put(new_call(due_s=0.0, expires_s=time.time() + 86400))).id)
        assert (await queue.stats()).waiting == {}
        async with bare(options) as connection:
            assert (await connection.info(connection.names.queue))["state"]["messages"] == 0

    with_queues(options, 1, scenario)


def test_lists_of_what_has_ended_read_only_what_they_show(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        for _ in range(4):
            await asyncio.gather(*(queue.put(new_call(due_s=0.0)) for _ in range(500)))
            while leases := await queue.claim([QUEUE], owner, LEASE_S, 64):
                await asyncio.gather(*(finish(queue, lease, State.DONE, None) for lease in leases))
        read = 0
        original = Connection.read_batch

        async def counted(self: Connection, subject: str, revision: int, count: int) -> list[Stored]:
            nonlocal read
            found = await original(self, subject, revision, count)
            read += len(found)
            return found

        monkeypatch.setattr(Connection, "read_batch", counted)
        page = await queue.calls(state=State.DONE, limit=20)
        more = await queue.calls(state=State.DONE, limit=20, before=page[-1].id)
        assert len({call.id for call in page + more}) == 40
        assert read < 1200

    with_queues(options, 1, scenario)


def test_long_body_passes_in_constant_memory(options: Options) -> None:
    piece = bytes(64 * 1024)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(512):
            yield piece

    async def scenario(queue: JetStream) -> tuple[int, int, int]:
        tracemalloc.start()
        body = await queue.store_body(source())
        count = 0
        async for part in queue.open_body(body):
            count += len(part)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return body.bytes_count, count, peak

    stored, read, peak = with_queues(options, 1, scenario)
    assert stored == read == 32 << 20
    assert peak < 8 << 20


BALLAST_BYTES, RESULT_BYTES, ROOM_BYTES = 350_000, 650_000, 1_000_000


async def in_pieces(count_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(0, count_bytes, 10_000):
        yield bytes(10_000)


def test_results_wait_for_room_and_are_stored_one_after_another(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Side by side, neither of them would ever have all of its room."""
    monkeypatch.setattr(bodies_module, "ROOM_PAUSE_S", 0.02)

    async def scenario() -> None:
        queue = await JetStream.open(dataclasses.replace(options, max_bytes=ROOM_BYTES))
        ballast = await queue.store_body(bytes(BALLAST_BYTES))

        async def store() -> int:
            result = await queue.store_result(in_pieces(RESULT_BYTES))
            found = await read_all(queue, result)
            await queue.drop_body(result)
            return len(found)

        storing = asyncio.gather(store(), store())
        await results_wait(capfd, 2)
        assert not storing.done()
        await queue.drop_body(ballast)
        async with asyncio.timeout(LONG_S * crowding()):
            assert list(await storing) == [RESULT_BYTES, RESULT_BYTES]
        await queue.close()

    uvloop.run(scenario())
    log.flush()
    assert capfd.readouterr().err.count("a result that waited to be stored is stored") == 2


def test_result_that_breaks_off_while_it_waits_is_told_from_one_that_never_came(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bodies_module, "ROOM_PAUSE_S", 0.02)

    async def broken(count_bytes: int) -> AsyncIterator[bytes]:
        async for piece in in_pieces(count_bytes):
            yield piece
        raise PeerGone("the function hung up")

    async def scenario() -> None:
        queue = await JetStream.open(dataclasses.replace(options, max_bytes=ROOM_BYTES))
        with pytest.raises(PeerGone):
            await queue.store_result(broken(RESULT_BYTES))
        ballast = await queue.store_body(bytes(2 * BALLAST_BYTES))
        storing = asyncio.create_task(queue.store_result(broken(RESULT_BYTES)))
        await results_wait(capfd, 1)
        await queue.drop_body(ballast)
        with pytest.raises(ResultLost, match="the function hung up"):
            await storing
        async with bare(options) as connection:
            assert (await connection.info(connection.names.bodies))["state"]["messages"] == 0
        await queue.close()

    uvloop.run(scenario())


def test_queue_that_is_closed_keeps_no_result_waiting(options: Options, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        queue = await JetStream.open(dataclasses.replace(options, max_bytes=ROOM_BYTES))
        await queue.store_body(bytes(2 * BALLAST_BYTES))
        storing = asyncio.create_task(queue.store_result(in_pieces(RESULT_BYTES)))
        await results_wait(capfd, 1)
        await queue.close()
        with pytest.raises((QueueFull, QueueUnavailable)):
            await storing

    uvloop.run(scenario())


def test_queue_remembers_nothing_of_what_was_swept(options: Options) -> None:
    async def scenario(queue: JetStream) -> tuple[int, int]:
        owner = await queue.enlist()
        for number in range(10):
            body = await queue.store_body(bytes(50_000))
            await queue.put(new_call(body=body, due_s=0.0, idempotency_key=str(number)))
            (lease,) = await queue.claim([QUEUE], owner, LEASE_S, 1)
            await finish(queue, lease, State.DONE, await queue.store_body(bytes(50_000)))
        swept = await queue.sweep(0, 0)
        async with bare(options) as connection:
            bodies = await connection.info(connection.names.bodies)
            keys = await connection.count(connection.names.subject("key", "*"))
        assert (await queue.stats()).by_state[State.DONE] == 0
        return swept.call_count, bodies["state"]["messages"] + keys

    assert with_queues(options, 1, scenario) == (10, 0)


# -- opening


async def stream_config(connection: Connection, name: str) -> dict[str, Any]:
    config: dict[str, Any] = (await connection.info(name))["config"]
    return config


def test_stream_that_differs_is_told_and_left_as_it_is(options: Options) -> None:
    async def scenario(connection: Connection) -> None:
        await (await JetStream.open(options)).close()
        name = connection.names.records
        config = await stream_config(connection, name) | {"max_msgs_per_subject": 5}
        await connection.insist(f"STREAM.DELETE.{name}")
        await connection.insist(f"STREAM.CREATE.{name}", config)
        with pytest.raises(QueueUnavailable, match="max_msgs_per_subject 5, wanted is 1"):
            await JetStream.open(options)
        assert (await stream_config(connection, name))["max_msgs_per_subject"] == 5

    with_connection(options, scenario)


def test_stream_with_other_limits_is_used_as_it_is(options: Options) -> None:
    async def scenario(connection: Connection) -> None:
        await (await JetStream.open(options)).close()
        await (await JetStream.open(dataclasses.replace(options, max_bytes=1 << 20))).close()
        assert (await stream_config(connection, connection.names.bodies))["max_bytes"] == options.max_bytes

    with_connection(options, scenario)


def test_queue_of_an_earlier_version_is_told_and_left_as_it_is(options: Options) -> None:
    async def scenario(connection: Connection) -> None:
        name, prefix = connection.names.old_calls, options.prefix
        subjects = [f"{prefix}.{kind}.*" for kind in ("call", "key", "meta")]
        await connection.insist(f"STREAM.CREATE.{name}", {"name": name, "subjects": subjects, "storage": "file"})
        await connection.request(f"{prefix}.call.x", b"a record", LONG_S)
        with pytest.raises(
            QueueUnavailable, match=rf"{name} is the queue of an earlier version \(1 messages\).*drain it"
        ):
            await JetStream.open(options)
        assert (await connection.info(name))["state"]["messages"] == 1

    with_connection(options, scenario)


def test_open_says_so_when_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_S", 0.5)
    with pytest.raises(QueueUnavailable, match="cannot connect to NATS at nats:"):
        uvloop.run(JetStream.open(Options(("nats://127.0.0.1:1",))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("spool:/var/x", Path("/var/x"), id="spool"),
        pytest.param("spool:~/x", Path.home() / "x", id="spool-in-the-home-directory"),
        pytest.param("spool:x/~", Path("x/~"), id="spool-called-tilde"),
        pytest.param("nats://host", NatsUrl("nats", ("host:4222",)), id="one-server"),
        pytest.param("tls://a:1,b", NatsUrl("tls", ("a:1", "b:4222")), id="two-by-tls"),
        pytest.param("nats://[::1]:7", NatsUrl("nats", ("[::1]:7",)), id="ipv6"),
    ],
)
def test_parse_queue_url_returns(text: str, expected: object) -> None:
    assert parse_queue_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nats:",
        "nats://",
        "nats://a:0",
        "nats://u:p@host",
        "http://host",
        "spool:",
        "spool:~no-such-user/x",
        "nats://a b",
    ],
)
def test_parse_queue_url_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: spool:DIRECTORY"):
        parse_queue_url(text)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        pytest.param({"nats_user": "u"}, ("nats_user", "nats_password_file"), id="user-without-password"),
        pytest.param(
            {"nats_token_file": "t", "nats_nkey_file": "n"}, ("nats_token_file", "nats_nkey_file"), id="two-ways"
        ),
        pytest.param({"nats_replicas": "2"}, ("nats_replicas",), id="replicas"),
    ],
)
def test_settings_are_refused(environ: dict[str, str], names: tuple[str, ...]) -> None:
    with pytest.raises(BadSettings) as caught:
        parse_settings(NatsSettings, environ)
    assert all(name in str(caught.value) for name in names)


# -- logging in

SECRET = "a-very-secret-word"


def login_user(directory: Path) -> tuple[str, dict[str, str]]:
    (directory / "password").write_text(f"{SECRET}\n")
    config = f'authorization {{ user: u, password: "{SECRET}" }}'
    return config, {"nats_user": "u", "nats_password_file": str(directory / "password")}


def login_token(directory: Path) -> tuple[str, dict[str, str]]:
    (directory / "token").write_text(SECRET)
    return f'authorization {{ token: "{SECRET}" }}', {"nats_token_file": str(directory / "token")}


def login_nkey(directory: Path) -> tuple[str, dict[str, str]]:
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    (directory / "seed").write_bytes(seed)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    return f"authorization {{ users: [{{ nkey: {public} }}] }}", {"nats_nkey_file": str(directory / "seed")}


def login_tls(directory: Path) -> tuple[str, dict[str, str]]:
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    config = f'tls {{ cert_file: "{certificate}", key_file: "{key}" }}'
    return config, {"nats_ca_file": str(certificate)}


@pytest.mark.parametrize("way", [login_user, login_token, login_nkey, login_tls], ids=lambda way: way.__name__)
def test_queue_opens_with_what_the_settings_say_and_not_without(
    tmp_path: Path, way: Callable[[Path], tuple[str, dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is login_tls:
        tool("openssl")
    config, environ = way(tmp_path)
    with Cluster(1, config) as cluster:
        scheme = "tls" if way is login_tls else "nats"
        url = parse_queue_url(cluster.servers[0].url.replace("nats:", f"{scheme}:"))

        async def scenario() -> None:
            queue = await open_queue(url, parse_settings(NatsSettings, environ))
            assert trouble_of(queue) is None
            await queue.put(new_call())
            await queue.close()
            monkeypatch.setattr(connection_module, "CONNECT_S", 3.0)
            with pytest.raises(QueueUnavailable) as caught:
                await open_queue(url)
            assert SECRET not in str(caught.value)

        uvloop.run(scenario())


@pytest.mark.parametrize("content", [None, ""], ids=["missing", "empty"])
def test_open_names_the_secret_file_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    settings = parse_settings(NatsSettings, {"nats_token_file": str(path)})
    with pytest.raises(CannotStart, match=str(path)):
        uvloop.run(open_queue(parse_queue_url("nats://127.0.0.1:1"), settings))
