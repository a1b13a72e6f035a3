"""The queue on a real cluster of three servers that are killed, paused, cut off and filled up, against a ledger.

Submitters put calls and workers run them all the while; the ledger has what was accepted and how often it ran.  After
each fault everything must recover by itself: every accepted call has ended, none is lost, and whoever was refused was
told so in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import uvloop

from faashound.calls.model import FINAL, Lease, LeaseLost, QueueFull, QueueUnavailable, State
from faashound.queues.jetstream.connection import WRITE_S, Options, connect
from faashound.queues.jetstream.queue import JetStream
from faashound.watchdog import log
from testkit.harness import crowding, eventually
from testkit.nats_servers import Cluster, NatsServer, Proxy
from testkit.queue_kit import QUEUE, finish, inline, new_call

LEASE_S = 12.0
RECOVERY_S = 60.0  # longest time until everything is well again
LONGEST_TROUBLE_S = 3 * RECOVERY_S  # a fault lasts, servers start, and then everything is to be well
PUT_S = WRITE_S + 7.0  # by which a put has an answer, though we stand still for a while; a second WRITE_S is longer
BATCH = 60  # calls accepted before a fault, and after it

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # nats-py drops connections that come to nothing


@pytest.fixture(autouse=True)
def leftovers() -> Iterator[None]:
    """What nats-py leaves to the collector is collected here, where it is expected."""
    yield
    for _ in range(5):  # a collection may free what keeps others, as pytest's own does it
        gc.collect()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(3) as cluster:
        yield cluster


@dataclass
class Ledger:
    """What was accepted and refused, and how often each call ran."""

    accepted: set[str] = field(default_factory=set)
    refused_count: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    dead: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    slowest_put_s: float = 0.0

    @property
    def repeated_count(self) -> int:
        return sum(count - 1 for count in self.runs.values())

    def __str__(self) -> str:
        executed = len(self.accepted & self.runs.keys())
        unasked = len(self.runs.keys() - self.accepted)  # whose acknowledgement came too late for the submitter
        return (
            f"accepted {len(self.accepted)}, refused {self.refused_count}, executed {executed} (and {unasked} refused),"
            f" repeated {self.repeated_count}, dead {len(self.dead)}, lost {len(self.lost)},"
            f" slowest answer {self.slowest_put_s:.1f}s"
        )


class Traffic:
    """Two submitters and two workers, each with a connection of its own."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.ledger = Ledger()
        self.queues: list[JetStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._submitting = True

    async def open(self, options: Options | None = None) -> JetStream:
        self.queues.append(await insist(partial(JetStream.open, options or self.options)))
        return self.queues[-1]

    async def start(self, submitter: Options | None = None, worker: Options | None = None) -> None:
        for options in (worker, None):
            self._begin(self._work(await self.open(options)))
        for options in (submitter, None):
            self._begin(self._submit(await self.open(options)))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(tell_failure)
        self._tasks.append(task)

    async def _submit(self, queue: JetStream) -> None:
        while self._submitting:
            began_s, now_s = time.monotonic(), time.time()
            call = new_call("fgh"[len(self.ledger.accepted) % 3], due_s=now_s, accepted_s=now_s)
            try:
                self.ledger.accepted.add((await queue.put(call)).id)
            except (QueueUnavailable, QueueFull):
                self.ledger.refused_count += 1
            self.ledger.slowest_put_s = max(self.ledger.slowest_put_s, time.monotonic() - began_s)
            await asyncio.sleep(0.01)

    async def _work(self, queue: JetStream) -> None:
        owner = await insist(queue.enlist)
        held: dict[int, Lease] = {}
        renewing = asyncio.create_task(self._renew(queue, held))
        try:
            while True:
                leases = await insist(lambda: queue.claim([QUEUE], owner, LEASE_S, 8))
                held.update((lease.fence, lease) for lease in leases)
                await asyncio.gather(*(self._run(queue, lease, held) for lease in leases))
                if not leases:
                    await insist(lambda: queue.wait_for_work(1))
        finally:
            renewing.cancel()

    async def _run(self, queue: JetStream, lease: Lease, held: dict[int, Lease]) -> None:
        self.ledger.runs[lease.call.id] += 1
        with contextlib.suppress(LeaseLost):
            await insist(lambda: finish(queue, lease, State.DONE, None))
        held.pop(lease.fence, None)

    async def _renew(self, queue: JetStream, held: dict[int, Lease]) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            if held:
                await insist(lambda: queue.renew(list(held.values()), LEASE_S))

    async def reach(self, count: int) -> None:
        """Wait until so many calls more have been accepted."""
        goal = len(self.ledger.accepted) + count
        await until(lambda: len(self.ledger.accepted) >= goal, f"{count} more accepted")

    async def settle(self) -> Ledger:
        """No more calls; wait for the end of those that were accepted."""
        self._submitting = False
        left = set(self.ledger.accepted)
        looker = await self.open()
        deadline_s = time.monotonic() + RECOVERY_S * crowding()
        while left and time.monotonic() < deadline_s:
            for call_id in list(left):
                call = await insist(lambda call_id=call_id: looker.get(call_id))  # type: ignore[misc]
                if call is None or call.state in FINAL:
                    left.discard(call_id)
                    self.ledger.lost |= {call_id} if call is None else set()
                    self.ledger.dead |= {call_id} if call is not None and call.state is State.DEAD else set()
            await asyncio.sleep(0.1)
        self.ledger.lost |= left
        return self.ledger

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for queue in self.queues:
            await queue.close()


def tell_failure(task: asyncio.Task[None]) -> None:
    """A submitter or worker that fails would else be missed only at the end of a test's patience."""
    if not task.cancelled() and task.exception() is not None:
        print(f"FAILED: {task.exception()!r}", flush=True)
        task.print_stack()


async def insist(work: Callable[[], Awaitable[Any]]) -> Any:
    """What a worker does: whatever the queue's trouble, again until it is over; AssertionError if it never is."""
    end_s = time.monotonic() + LONGEST_TROUBLE_S * crowding()
    while True:
        try:
            return await work()
        except (QueueUnavailable, QueueFull) as error:
            if time.monotonic() > end_s:
                raise AssertionError(f"for {LONGEST_TROUBLE_S} s the queue says: {error}") from error
            await asyncio.sleep(0.1)


async def until(condition: Callable[[], bool], what: str) -> None:
    async def look() -> bool:
        return condition()

    await eventually(look, RECOVERY_S, what)


@contextlib.asynccontextmanager
async def traffic(options: Options, **ends: Options) -> AsyncIterator[Traffic]:
    under_way = Traffic(options)
    try:
        await under_way.start(**ends)
        yield under_way
    finally:
        await under_way.stop()


def prefix() -> str:
    return f"t{uuid.uuid4().hex[:12]}"


def check(name: str, ledger: Ledger, repeated_count: int = 0) -> None:
    """Nothing lost, little done twice, everybody answered in time."""
    print(f"{name}: {ledger}")
    assert not ledger.lost
    assert ledger.accepted <= ledger.runs.keys() | ledger.dead
    assert ledger.repeated_count <= repeated_count
    assert ledger.slowest_put_s < PUT_S


def faulty(cluster: Cluster, fault: Callable[[Traffic, str], Awaitable[None]]) -> Ledger:
    """The ledger of some traffic during which something happened."""

    async def scenario() -> Ledger:
        options = cluster.options(prefix())
        async with traffic(options) as under_way:
            await under_way.reach(BATCH)
            await fault(under_way, f"{options.prefix}-queue")
            await under_way.reach(BATCH)
            return await under_way.settle()

    try:
        return uvloop.run(scenario())
    finally:
        for server in cluster.servers:
            if server.process is None:
                server.start()
        cluster.wait_until_healthy()


def test_calls_run_once_when_nothing_happens(cluster: Cluster) -> None:
    async def nothing(under_way: Traffic, stream: str) -> None:
        await under_way.reach(BATCH)

    ledger = faulty(cluster, nothing)
    check("no fault", ledger)
    assert ledger.refused_count == 0


def test_three_hundred_functions_are_served_and_one_that_appears_meanwhile(cluster: Cluster) -> None:
    async def scenario() -> tuple[Ledger, float]:
        async with traffic(cluster.options(prefix())) as under_way:
            gateway, ledger = await under_way.open(), under_way.ledger
            names = [f"f{number}" for number in range(300)]
            put = set(await asyncio.gather(*(put_one(gateway, name) for name in names)))
            await until(lambda: put <= ledger.runs.keys(), "every function served")
            began_s = time.monotonic()
            appeared = await put_one(gateway, "appears")
            await until(lambda: appeared in ledger.runs, "the new function served")
            appeared_s = time.monotonic() - began_s
            ledger.accepted |= {*put, appeared}
            return await under_way.settle(), appeared_s

    ledger, appeared_s = uvloop.run(scenario())
    check(f"300 functions, one more served after {appeared_s:.1f}s", ledger)


async def put_one(queue: JetStream, function: str) -> str:
    now_s = time.time()
    put = await insist(lambda: queue.put(new_call(function, due_s=now_s, accepted_s=now_s)))
    return str(put.id)


def test_queue_goes_on_when_a_server_is_killed_and_comes_back(cluster: Cluster) -> None:
    async def kill_one(under_way: Traffic, stream: str) -> None:
        leader = await asyncio.to_thread(cluster.leader, stream)
        other = next(server for server in cluster.servers if server is not leader)
        other.kill()
        await under_way.reach(BATCH)
        other.start()
        await asyncio.to_thread(cluster.wait_until_healthy)

    check("kill -9 of one server", faulty(cluster, kill_one))


def test_queue_goes_on_when_the_leader_of_its_stream_is_killed(cluster: Cluster) -> None:
    async def kill_leader(under_way: Traffic, stream: str) -> None:
        leader = await asyncio.to_thread(cluster.leader, stream)
        leader.kill()
        await under_way.reach(BATCH)
        leader.start()
        await asyncio.to_thread(cluster.wait_until_healthy)

    check("kill -9 of the stream's leader", faulty(cluster, kill_leader))


def test_queue_refuses_in_time_and_recovers_when_two_servers_are_killed(cluster: Cluster) -> None:
    async def kill_two(under_way: Traffic, stream: str) -> None:
        for server in cluster.servers[:2]:
            server.kill()
        refused = under_way.ledger.refused_count
        await until(lambda: under_way.ledger.refused_count > refused + 1, "calls refused")
        for server in cluster.servers[:2]:
            server.start()
        await asyncio.to_thread(cluster.wait_until_healthy)

    ledger = faulty(cluster, kill_two)
    check("kill -9 of two servers", ledger)
    assert ledger.refused_count


def test_queue_recovers_when_all_servers_are_restarted(cluster: Cluster) -> None:
    async def restart(under_way: Traffic, stream: str) -> None:
        for server in cluster.servers:
            server.kill()
        for server in cluster.servers:
            server.start()
        await asyncio.to_thread(cluster.wait_until_healthy)

    check("kill -9 of all servers, restart", faulty(cluster, restart))


def test_queue_goes_on_when_the_leader_of_its_stream_hangs(cluster: Cluster) -> None:
    async def hang(under_way: Traffic, stream: str) -> None:
        leader = await asyncio.to_thread(cluster.leader, stream)
        leader.pause()
        try:
            await under_way.reach(BATCH)
        finally:
            leader.resume()
        await asyncio.to_thread(cluster.wait_until_healthy)

    check("SIGSTOP of the stream's leader", faulty(cluster, hang))


def test_client_that_is_cut_off_refuses_in_time_and_comes_back(cluster: Cluster) -> None:
    async def scenario() -> Ledger:
        options = cluster.options(prefix())
        proxy = Proxy(options)
        cuttable = await proxy.start()
        async with traffic(options, submitter=cuttable, worker=cuttable) as under_way:
            await under_way.reach(BATCH)
            proxy.cut()
            await until(lambda: under_way.ledger.refused_count > 1, "calls refused")
            proxy.mend()
            await under_way.reach(BATCH)
            ledger = await under_way.settle()
        await proxy.stop()
        return ledger

    ledger = uvloop.run(scenario())
    check("the client's network cut", ledger, repeated_count=8)
    assert ledger.refused_count


def test_queue_goes_on_when_the_leader_of_a_consumer_is_killed(cluster: Cluster) -> None:
    async def kill_leader(under_way: Traffic, stream: str) -> None:
        name = await leader_of_consumer(under_way.options, stream)
        leader = next(server for server in cluster.servers if server.name == name)
        leader.kill()
        await under_way.reach(BATCH)
        leader.start()
        await asyncio.to_thread(cluster.wait_until_healthy)

    check("kill -9 of a consumer's leader", faulty(cluster, kill_leader))


def test_outage_is_told_once_for_each_of_its_reasons(capfd: pytest.CaptureFixture[str]) -> None:
    """Servers that fail differently are tried in turns, some times a second."""
    tries_count = 0

    async def turn_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries_count
        tries_count += 1
        writer.close()

    def is_tried_again() -> bool:
        return tries_count > 5

    async def scenario(server: NatsServer, options: Options) -> None:
        nonlocal tries_count
        other = await asyncio.start_server(turn_away, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        connection = await connect(dataclasses.replace(options, servers=(url, *options.servers)))
        for _ in range(2):
            server.kill()
            tries_count = 0
            await until(is_tried_again, "it is tried again and again")
            server.start()
            await until(lambda: connection.client.is_connected, "a connection")
        await connection.close()
        other.close()

    with Cluster() as cluster:
        uvloop.run(scenario(cluster.servers[0], cluster.options("t")))
    log.flush()
    told = Counter(line.partition(" NATS: ")[2] for line in capfd.readouterr().err.splitlines() if " NATS: " in line)
    assert len(told) > 1
    assert max(told.values()) <= 2, told


async def leader_of_consumer(options: Options, stream: str) -> str:
    connection = await connect(options)
    try:
        names = await connection.insist(f"CONSUMER.NAMES.{stream}")
        info = await connection.insist(f"CONSUMER.INFO.{stream}.{names['consumers'][0]}")
    finally:
        await connection.close()
    leader: str = info["cluster"]["leader"]
    return leader


async def end_due(queue: JetStream, owner: str) -> int:
    """Run what is due, until there is no more; return how many calls that were."""
    count = 0
    while leases := await insist(partial(queue.claim, [QUEUE], owner, LEASE_S, 64)):
        assert all(lease.call.due_s <= time.time() for lease in leases)
        await asyncio.gather(
            *(insist(partial(finish, queue, lease, State.DONE, inline(b"a result"))) for lease in leases)
        )
        count += len(leases)
    return count


async def count_queued(queue: JetStream, expected: int) -> int:
    """How many calls wait; a server that is asked may be behind the others for a moment."""
    end_s = time.monotonic() + RECOVERY_S
    while True:
        found: int = (await insist(queue.stats)).by_state[State.QUEUED]
        if found == expected or time.monotonic() > end_s:
            return found
        await asyncio.sleep(0.1)


def test_delayed_calls_survive_a_restart_of_all_servers(cluster: Cluster) -> None:
    count = 10_000

    async def scenario() -> tuple[int, int]:
        options = cluster.options(prefix())
        queue: JetStream = await insist(partial(JetStream.open, options))
        owner, soon_s = await insist(queue.enlist), 20 * crowding()
        for start in range(250, count + 250, 250):
            now_s = time.time()
            due_s = now_s + (3600 if start < count else soon_s)
            await asyncio.gather(*(queue.put(new_call(due_s=due_s, accepted_s=now_s)) for _ in range(250)))
        ended = await end_due(queue, owner)  # none, unless we are slow; the servers keep the delays from now on
        for server in cluster.servers:
            server.kill()
        for server in cluster.servers:
            server.start()
        await asyncio.to_thread(cluster.wait_until_healthy)
        deadline_s = time.monotonic() + RECOVERY_S * crowding() + soon_s
        while ended < 250 and time.monotonic() < deadline_s:
            ended += await end_due(queue, owner)
            if ended < 250:
                await insist(lambda: queue.wait_for_work(0.5))
        left = await count_queued(queue, count - ended)
        await queue.close()
        return ended, left

    try:
        ended, left = uvloop.run(scenario())
    finally:
        for server in cluster.servers:
            if server.process is None:
                server.start()
        cluster.wait_until_healthy()
    print(f"restart with {count} delayed: ended {ended}, still delayed {left}")
    assert (ended, left) == (250, count - 250)


def test_worker_that_was_blocked_past_its_lease_changes_nothing_and_goes_on(cluster: Cluster) -> None:
    async def scenario() -> tuple[int, State]:
        options = cluster.options(prefix())
        sleeper, worker = [await insist(partial(JetStream.open, options)) for _ in range(2)]
        owner, other = await insist(sleeper.enlist), await insist(worker.enlist)
        call = await sleeper.put(new_call(due_s=0.0))
        async with asyncio.timeout(RECOVERY_S):
            while not (held := await sleeper.claim([QUEUE], owner, 1.0, 1)):  # a server may be behind
                await sleeper.wait_for_work(1)
        (old,) = held
        asyncio.get_running_loop().call_later(0.05, time.sleep, 2.5)  # it neither renews nor answers for the call
        await asyncio.sleep(0.1)
        async with asyncio.timeout(RECOVERY_S):
            while not (leases := await worker.claim([QUEUE], other, LEASE_S, 1)):
                await worker.wait_for_work(1)
        with pytest.raises(LeaseLost):
            await finish(sleeper, old, State.DEAD, None)
        await finish(worker, leases[0], State.DONE, None)
        ended = await sleeper.get(call.id)
        assert ended is not None
        await worker.close()
        await sleeper.close()
        found: tuple[int, State] = leases[0].call.attempts, ended.state
        return found

    assert uvloop.run(scenario()) == (2, State.DONE)


async def put_until_full(queue: JetStream) -> int:
    """How many calls there was room for."""
    count = 0
    with contextlib.suppress(QueueFull):
        while True:
            await queue.put(new_call(due_s=0.0))
            count += 1
    return count


def test_full_stream_refuses_calls_and_goes_on_with_those_it_has(cluster: Cluster) -> None:
    async def scenario() -> tuple[int, int, int]:
        queue: JetStream = await insist(partial(JetStream.open, cluster.options(prefix(), max_bytes=300_000)))
        accepted = await put_until_full(queue)
        owner = await insist(queue.enlist)
        ended = swept = 0

        async def is_empty() -> bool:
            """Go on as a worker does: a server may be behind, and what was acknowledged in vain comes once more."""
            nonlocal ended, swept
            ended += await end_due(queue, owner)
            if ended >= accepted:  # what ends behind a sweep the servers forget by themselves
                swept += (await insist(partial(queue.sweep, 0.0, 0.0))).call_count
            return swept >= accepted

        async def has_room() -> bool:
            await is_empty()
            with contextlib.suppress(QueueFull):
                await queue.put(new_call(due_s=time.time() + 3600))
                return True
            return False

        await eventually(is_empty, RECOVERY_S, f"{accepted} calls ended and swept")
        await eventually(has_room, RECOVERY_S, "room for another call")  # as soon as it is known
        await queue.close()
        return accepted, ended, swept

    accepted, ended, swept = uvloop.run(scenario())
    assert accepted == ended == swept
    assert accepted > 50
