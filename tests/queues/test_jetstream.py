"""What only the queue on NATS does: records, the schedule, the foreman's end, streams that differ, logging in."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
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
from nats.js.api import StreamConfig

from faashound import jetstream
from faashound.calls.ids import new_call_id
from faashound.calls.model import (
    EXCERPT_BYTES,
    Attempt,
    Call,
    Callback,
    CallbackState,
    CallExists,
    Lease,
    LeaseLost,
    QueueDamaged,
    QueueUnavailable,
    State,
    StoredBody,
)
from faashound.calls.names import parse_function_name
from faashound.jetstream import (
    HEADER,
    Hold,
    Index,
    JetStream,
    Options,
    Record,
    Schedule,
    Wanted,
    accept,
    build_payload,
    build_summary,
    build_token,
    parse_record,
    parse_summary,
    parse_token,
    take,
)
from faashound.queues import open_queue, trouble_of
from faashound.queues.nats_settings import NatsSettings
from faashound.queues.urls import NatsUrl, parse_queue_url
from faashound.watchdog import BadSettings, CannotStart, parse_settings
from testkit.nats_servers import Cluster
from testkit.needed import tool
from testkit.queue_kit import LEASE_S, QUEUE, START_S, finish, inline, new_call, read_all

LONG_S = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def options(server: Cluster) -> Options:
    return server.options(f"t{uuid.uuid4().hex[:12]}")


async def opened(options: Options, count: int = 1) -> AsyncIterator[JetStream]:
    for _ in range(count):
        yield await JetStream.open(options)


def with_queues(options: Options, count: int, scenario: Callable[..., Awaitable[Any]]) -> Any:
    """What `scenario` returns, given so many queues of their own on the same streams."""

    async def run() -> Any:
        queues = [queue async for queue in opened(options, count)]
        try:
            return await scenario(*queues)
        finally:
            for queue in queues[::-1]:
                await queue.close()

    return uvloop.run(run())


# -- records

texts = st.text(max_size=20)
seconds = st.floats(0, 1e10, allow_nan=False)
bodies = st.one_of(
    st.binary(max_size=5000).map(inline), st.builds(StoredBody, st.integers(0), st.none(), st.uuids().map(str))
)
headers = st.lists(st.tuples(texts, texts), max_size=3).map(tuple)
attempts = st.builds(Attempt, seconds, seconds, st.none() | st.integers(100, 599), st.none() | texts)


@st.composite
def records(draw: st.DrawFn) -> Record:
    result = draw(st.none() | bodies)
    excerpt = draw(st.none() | st.binary(max_size=100))
    if result is not None and result.inline is not None:
        excerpt = result.inline[:EXCERPT_BYTES]
    callbacks = st.builds(Callback, st.sampled_from(CallbackState), st.integers(0), seconds, st.none(), texts)
    call = Call(
        **dataclasses.asdict(new_call()) | {"body": draw(bodies), "headers": draw(headers)},
        state=draw(st.sampled_from(State)),
        attempts=draw(st.integers(0, 99)),
        finished_s=draw(st.none() | seconds),
        cancel_requested=draw(st.booleans()),
        result=result,
        result_headers=draw(headers),
        excerpt=excerpt,
        callback=draw(st.none() | callbacks),
        history=tuple(draw(st.lists(attempts, max_size=3))),
    )
    hold = draw(st.none() | st.builds(Hold, st.sampled_from(["call", "callback"]), texts, st.integers(0), seconds))
    return Record(call, hold, draw(st.none() | seconds), draw(st.integers(1)), draw(st.sampled_from(["", "abc"])))


@given(records())
def test_record_comes_back_from_its_message(record: Record) -> None:
    fields = {HEADER: build_summary(record), jetstream.ORIGIN_HEADER: record.origin}
    assert fields[HEADER].isascii()
    assert parse_record(record.call.id, record.revision, fields, build_payload(record)) == record


@pytest.mark.parametrize(
    "payload", [b"", b"\0\0\0\2{}", b"\0\0\0\5{}", b"\xff" * 20], ids=["empty", "bare", "short", "odd"]
)
def test_record_that_is_damaged_is_not_passed_off_as_whole(payload: bytes) -> None:
    with pytest.raises(QueueDamaged, match="cannot be read"):
        parse_record("x", 1, {HEADER: build_summary(accept(new_call()))}, payload)


def test_record_of_an_earlier_version_is_of_the_default_namespace() -> None:
    record = accept(new_call())
    header = build_summary(record).replace('"f.openfaas-fn"', '"f"')
    found = parse_record(record.call.id, 1, {HEADER: header}, build_payload(record)).call.function
    assert (found, found.namespace) == ("f.openfaas-fn", "openfaas-fn")


@given(st.text(max_size=30))
def test_token_comes_back_and_is_one(text: str) -> None:
    token = build_token(text)
    assert parse_token(token) == text
    assert not set(token) & set(" .*>\r\n\t")


# -- the schedule


def schedule(*calls: tuple[str, float], now_s: float = START_S) -> Schedule:
    made = Schedule(Index())
    for number, (function, due_s) in enumerate(calls, 1):
        record = accept(new_call(function, id=f"{function}{number}", due_s=due_s))
        entry = parse_summary(record.call.id, number, build_summary(record))
        made.index.apply(entry)
        made.apply(entry, now_s, 0.0)
    return made


def dealt(made: Schedule, limit: int, now_s: float = START_S, clock_s: float = 0.0) -> list[str]:
    made.advance(now_s, clock_s)
    return [element[1] for element in made.deal("call", Wanted((QUEUE,), limit, {}), now_s, clock_s)]


def test_schedule_deals_a_call_once_and_again_when_nobody_took_it() -> None:
    made = schedule(("f", START_S))
    assert [dealt(made, 5), dealt(made, 5)] == [["f1"], []]
    before = made.generation
    assert dealt(made, 5, clock_s=jetstream.RESERVED_S) == ["f1"]
    assert made.generation > before


def test_schedule_forgets_what_was_dealt_when_it_is_taken() -> None:
    made = schedule(("f", START_S))
    dealt(made, 1)
    record = take(accept(new_call(id="f1")), jetstream.Claimant("call", "w", LEASE_S, START_S))
    entry = parse_summary("f1", 7, build_summary(record))
    made.index.apply(entry)
    made.apply(entry, START_S, 1.0)
    assert dealt(made, 5, clock_s=jetstream.RESERVED_S) == []
    assert made.lapsed(1.0 + LEASE_S) == ["f1"]
    assert made.lapsed(LEASE_S) == []


def test_schedule_gives_leases_their_whole_time_after_a_pause() -> None:
    made = schedule()
    record = take(accept(new_call(id="f1")), jetstream.Claimant("call", "w", LEASE_S, START_S))
    entry = parse_summary("f1", 7, build_summary(record))
    made.index.apply(entry)
    made.apply(entry, START_S, 0.0)
    made.extend(500.0)
    assert made.lapsed(500.0 + LEASE_S - 1) == []
    made.void("w")
    made.extend(600.0)  # an owner that has gone stays gone
    assert made.lapsed(600.0) == ["f1"]


def test_schedule_announces_a_delayed_call_when_it_falls_due() -> None:
    made = schedule(("f", START_S + 10))
    assert (made.generation, made.next_due_s(), dealt(made, 5)) == (0, START_S + 10, [])
    assert dealt(made, 5, START_S + 10) == ["f1"]
    assert (made.generation, made.next_due_s()) == (1, None)


# -- keys


def test_put_finishes_what_another_put_of_the_same_key_began(options: Options) -> None:
    """The other one died between the key and the call: whoever comes next puts the call, under the first one's id."""

    async def scenario(queue: JetStream) -> None:
        first = new_call_id()
        await queue._link.save(queue._names.key(parse_function_name("f"), "k"), first.encode(), {}, 0)
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
        assert (await queue.put(call)).state is State.QUEUED  # the same id too, though a tombstone is on it

    with_queues(options, 1, scenario)


# -- the foreman


async def claim_one(queue: JetStream, owner: str) -> Lease:
    async with asyncio.timeout(LONG_S):
        while not (leases := await queue.claim([QUEUE], owner, LEASE_S, 1)):
            await queue.wait_for_work(LONG_S)
    return leases[0]


@pytest.mark.parametrize("way", ["closed", "killed"])
def test_workers_go_on_when_the_foreman_is(options: Options, way: str) -> None:
    async def scenario(foreman: JetStream, worker: JetStream) -> None:
        await foreman.enlist()
        owner = await worker.enlist()
        await worker.put(new_call(due_s=0.0))
        first = await claim_one(worker, owner)
        assert foreman._foreman is not None
        assert worker._foreman is None
        if way == "closed":
            await foreman.close()
        else:  # no good-bye: its connection is gone, and so is its subscription
            foreman._foreman.in_office = False
            await foreman._link.close()
        await worker.put(new_call(due_s=0.0))
        second = await claim_one(worker, owner)
        assert worker._foreman is not None
        assert (await worker.renew([first, second], LEASE_S)).lost == frozenset()

    with_queues(options, 2, scenario)


def test_foreman_that_is_replaced_retires(options: Options) -> None:
    async def scenario(old: JetStream, new: JetStream) -> None:
        await old.enlist()
        new._office = old._office  # it takes the old one for dead
        await new._look_for_foreman()
        async with asyncio.timeout(LONG_S):
            while old._foreman is None or old._foreman.in_office:  # noqa: ASYNC110 - it hears of it by itself
                await asyncio.sleep(0.01)
        owner = await old.enlist()
        await new.put(new_call(due_s=0.0))
        assert (await claim_one(old, owner)).call.attempts == 1

    with_queues(options, 2, scenario)


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


async def wait_in_line(queue: JetStream, foreman: JetStream) -> asyncio.Task[bool]:
    """A task that waits for work, and that the foreman knows of."""
    waiting = asyncio.create_task(queue.wait_for_work(LONG_S))
    async with asyncio.timeout(LONG_S):
        while foreman._foreman is None or queue._link.name not in foreman._foreman._parked:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return waiting


def test_worker_that_gave_up_waiting_takes_nobodys_call(options: Options) -> None:
    """A worker that finishes something leaves its place in the line, and comes back: it must stand there once."""

    async def scenario(foreman: JetStream, worker: JetStream, gateway: JetStream) -> None:
        await foreman.enlist()
        for queue in (foreman, worker):
            owner = await queue.enlist()
            for _ in range(3):
                waiting = await wait_in_line(queue, foreman)
                waiting.cancel()
                await asyncio.wait([waiting])
                await queue.claim([QUEUE], owner, LEASE_S, 1)
            waiting = await wait_in_line(queue, foreman)
            began_s = time.monotonic()
            await gateway.put(new_call(due_s=0.0))
            assert await waiting
            assert time.monotonic() - began_s < 1.0
            await finish(queue, await claim_one(queue, owner), State.DONE, None)

    with_queues(options, 3, scenario)


def test_lease_of_a_worker_that_died_lapses_by_the_foremans_clock(options: Options) -> None:
    async def scenario(foreman: JetStream, worker: JetStream) -> None:
        owner, dead = await foreman.enlist(), await worker.enlist()
        await foreman.put(new_call(due_s=0.0))
        (lease,) = await worker.claim([QUEUE], dead, 1.0, 1)
        began_s = time.monotonic()
        assert (await claim_one(foreman, owner)).call.attempts == 2
        assert time.monotonic() - began_s > 0.9
        with pytest.raises(LeaseLost):
            await worker.release(lease)

    with_queues(options, 2, scenario)


# -- bodies and housekeeping


def test_sweep_removes_bodies_that_no_call_names(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(queue: JetStream) -> None:
        named = await queue.store_body(bytes(100_000))
        await queue.put(new_call(body=named))
        lost = await queue.store_body(bytes(100_000))
        assert (await queue.sweep(60, 60)).file_count == 0  # it may be on its way into a call
        monkeypatch.setattr(jetstream, "ORPHAN_S", -1.0)
        assert (await queue.sweep(60, 60)).file_count == 1
        assert await read_all(queue, named) == bytes(100_000)
        with pytest.raises(QueueDamaged, match="too short"):
            await read_all(queue, lost)

    with_queues(options, 1, scenario)


def test_call_that_is_taken_just_before_it_expires_runs(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        call = await queue.put(new_call(due_s=0.0, expires_s=time.time() + 3600))
        assert queue._foreman is not None
        (lease,) = await queue.claim([QUEUE], owner, LEASE_S, 1)
        entry = parse_summary(call.id, 1, build_summary(accept(call)))  # what the foreman knew a moment ago
        await queue._foreman._expire(entry, time.time() + 7200)
        await finish(queue, lease, State.DONE, None)

    with_queues(options, 1, scenario)


def test_record_that_nobody_can_read_keeps_no_other_from_its_run(options: Options) -> None:
    async def scenario(queue: JetStream) -> None:
        owner = await queue.enlist()
        await queue._link.save(queue._names.call("odd"), b"", {HEADER: "{}"}, 0)
        await queue.put(new_call(due_s=0.0))
        assert (await claim_one(queue, owner)).call.attempts == 1
        with pytest.raises(QueueDamaged, match="odd"):
            await queue.get("odd")

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


def test_queue_remembers_nothing_of_what_was_swept(options: Options) -> None:
    async def scenario(queue: JetStream) -> tuple[int, int]:
        owner = await queue.enlist()
        for number in range(10):
            body = await queue.store_body(bytes(50_000))
            await queue.put(new_call(body=body, due_s=0.0, idempotency_key=str(number)))
            (lease,) = await queue.claim([QUEUE], owner, LEASE_S, 1)
            await finish(queue, lease, State.DONE, await queue.store_body(bytes(50_000)))
        swept = await queue.sweep(0, 0)
        bodies = await queue._link.info(queue._names.bodies)
        keys = await queue._link.info(queue._names.calls, queue._names.subject("key", "*"))
        assert (await queue.stats()).by_state[State.DONE] == 0
        return swept.call_count, bodies.state.messages + len(keys.state.subjects or {})

    assert with_queues(options, 1, scenario) == (10, 0)


# -- opening


def test_stream_that_differs_is_told_and_left_as_it_is(options: Options) -> None:
    name = f"{options.prefix}-calls"

    async def scenario() -> None:
        queue = await JetStream.open(options)
        config = (await queue._link.info(name)).config
        await queue._link.js.delete_stream(name)
        config = dataclasses.replace(config, max_msgs_per_subject=5)
        await queue._link.js.add_stream(config)
        with pytest.raises(QueueUnavailable, match="max_msgs_per_subject"):
            await JetStream.open(options)
        assert (await queue._link.info(name)).config.max_msgs_per_subject == 5
        await queue.close()

    uvloop.run(scenario())


def test_stream_with_other_limits_is_used_as_it_is(options: Options) -> None:
    async def scenario() -> None:
        first = await JetStream.open(options)
        other = await JetStream.open(dataclasses.replace(options, max_bytes=1 << 20))
        config: StreamConfig = (await other._link.info(f"{options.prefix}-calls")).config
        assert config.max_bytes == options.max_bytes
        await other.close()
        await first.close()

    uvloop.run(scenario())


def test_open_says_so_when_there_is_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetstream, "CONNECT_S", 0.5)
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
    monkeypatch.setattr(jetstream, "CONNECT_S", 3.0)
    with Cluster(1, config) as cluster:
        scheme = "tls" if way is login_tls else "nats"
        url = parse_queue_url(cluster.servers[0].url.replace("nats:", f"{scheme}:"))

        async def scenario() -> None:
            queue = await open_queue(url, parse_settings(NatsSettings, environ))
            assert trouble_of(queue) is None
            await queue.put(new_call())
            await queue.close()
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
