"""Measure the queues alone, without HTTP and functions: how fast calls go in, and how fast workers take them out.

    python -m bench.queues                     # the spool, NATS with one server and with three; about two minutes
    python -m bench.queues --calls 2000 --only nats3

In: some connections in one process put small calls, each waiting for its own to be durable.  Out: one to four worker
processes, each claiming up to 16 calls at once and finishing them with a small result.  Servers and workers share this
machine, so with two cores the figures tell the cost of a step, not what a cluster can do.  `sync` is the servers'
`sync_interval: always`, which is what the spool's figure is to be compared with.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import uvloop

from faashound.calls.model import State
from faashound.queues import Queue, open_queue
from faashound.queues.nats_settings import NatsSettings, default_nats_settings
from faashound.queues.urls import parse_queue_url
from testkit.nats_servers import Cluster
from testkit.queue_kit import QUEUE, finish, inline, new_call

LEASE_S = 60.0
CLAIM_COUNT = 16
IN_FLIGHT_COUNTS = (1, 16, 64)
WORKER_COUNTS = (1, 2, 4)
ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Engine:
    """A queue to measure: `url` as an operator types it, and how many servers keep a call."""

    name: str
    url: str
    replicas: int = 1
    prefix: str = ""

    async def open(self) -> Queue:
        settings: NatsSettings = default_nats_settings()
        values = {row: getattr(settings, row) for row in NatsSettings.__dataclass_fields__}
        changes = {"nats_prefix": self.prefix or "bench", "nats_replicas": self.replicas}
        return await open_queue(parse_queue_url(self.url), NatsSettings(**values | changes))


@contextlib.contextmanager
def engine(name: str) -> Iterator[Engine]:
    """The engine called `spool`, or `nats` and a count of servers, `-sync` behind it for `sync_interval: always`."""
    with contextlib.ExitStack() as stack:
        if name == "spool":
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-spool-"))
            yield Engine(name, f"spool:{directory}")
            return
        count = int(name.removeprefix("nats").removesuffix("-sync"))
        sync = ALWAYS if name.endswith("-sync") else "2m"
        cluster = stack.enter_context(Cluster(count, sync_interval=sync))
        url = cluster.servers[0].url.removesuffix("/")
        yield Engine(name, url, count, f"b{uuid.uuid4().hex[:8]}")


async def put_all(queue: Queue, count: int, in_flight_count: int) -> float:
    """Calls per second."""
    numbers = iter(range(count))

    async def put() -> None:
        for _ in numbers:
            await queue.put(new_call("fgh"[_ % 3], due_s=0.0, body=inline(bytes(200))))

    began_s = time.perf_counter()
    await asyncio.gather(*(put() for _ in range(in_flight_count)))
    return count / (time.perf_counter() - began_s)


async def drain(queue: Queue) -> None:
    """Finish calls until there are none."""
    owner = await queue.enlist()
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    while leases := await queue.claim([QUEUE], owner, LEASE_S, CLAIM_COUNT):
        await asyncio.gather(*(finish(queue, lease, State.DONE, inline(bytes(200))) for lease in leases))
    print("done", flush=True)
    await asyncio.to_thread(sys.stdin.readline)


def drain_by(engine: Engine, worker_count: int, count: int) -> float:
    """Calls per second by so many worker processes."""
    command = [sys.executable, "-m", "bench.queues", "--drain", engine.url, str(engine.replicas), engine.prefix]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environ) for _ in range(worker_count)]
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    began_s = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    rate = count / (time.perf_counter() - began_s)
    for worker in workers:
        worker.communicate("that is all\n")
    return rate


async def run_drain(arguments: Sequence[str]) -> None:
    """What a worker process does."""
    url, replicas, prefix = arguments
    queue = await Engine("", url, int(replicas), prefix).open()
    await drain(queue)
    await queue.close()


async def fill(engine: Engine, count: int, in_flight_count: int) -> float:
    """Put calls into the queue; return how many a second."""
    queue = await engine.open()
    try:
        return await put_all(queue, count, in_flight_count)
    finally:
        await queue.close()


def measure(name: str, count: int) -> list[str]:
    """A row of the table: puts per second, then calls drained per second."""
    row = [name]
    with engine(name) as chosen:
        for in_flight_count in IN_FLIGHT_COUNTS:
            row.append(f"{uvloop.run(fill(chosen, count, in_flight_count)):,.0f}")
        uvloop.run(drain_quietly(chosen))
        for worker_count in WORKER_COUNTS:
            uvloop.run(fill(chosen, count, 64))
            row.append(f"{drain_by(chosen, worker_count, count):,.0f}")
    return row


async def drain_quietly(engine: Engine) -> None:
    """Finish all calls that are left of the measurement."""
    queue = await engine.open()
    owner = await queue.enlist()
    while leases := await queue.claim([QUEUE], owner, LEASE_S, 64):
        await asyncio.gather(*(finish(queue, lease, State.DONE, None) for lease in leases))
    await queue.close()


def main(argv: Sequence[str]) -> int:
    """Print the table; the exit status is 0."""
    if argv[:1] == ["--drain"]:
        uvloop.run(run_drain(argv[1:]))
        return 0
    parser = argparse.ArgumentParser("bench.queues", description="Calls per second into and out of each queue.")
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--only", default="spool,nats1,nats1-sync,nats3,nats3-sync")
    options = parser.parse_args(argv)
    heads = [f"put, {count} at once" for count in IN_FLIGHT_COUNTS] + [f"{count} workers" for count in WORKER_COUNTS]
    print("| queue | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name in options.only.split(","):
        print("| " + " | ".join(measure(name, options.calls)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
