"""A process dies between the two halves of a step: what the first half has written decides, and nothing is lost.

A child process takes one step on a real server, and kills itself at a place that is named: where the next half would
begin.  Then others go on: the call ends, its outcome is delivered once it is due, and nothing is left in the queue.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvloop

from faashound.calls.ids import new_call_id
from faashound.calls.model import CallbackState, State
from faashound.queues.jetstream.connection import Options, connect
from faashound.queues.jetstream.queue import JetStream
from testkit.harness import ROOT, crowding
from testkit.nats_servers import Cluster
from testkit.queue_kit import QUEUE, finish, new_call

LEASE_S = 1.0
LONG_S = 30.0

CHILD = """
import asyncio, os, signal, sys, time
from faashound.calls.model import Attempt, State
from faashound.queues.jetstream import bodies, connection, flows, owners, store
from faashound.queues.jetstream.connection import Options
from faashound.queues.jetstream.queue import JetStream
from testkit.queue_kit import QUEUE, finish, inline, new_call

url, prefix, call_id, place, steps = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    queue = await JetStream.open(Options((url,), prefix=prefix))
    owner = await queue.enlist()
    lease = None
    for step in steps.split():
        if step == "DIE":
            module, name = place.split(":")
            cls, method = name.split(".")
            setattr(getattr(globals()[module], cls), method, die)
        elif step == "put":
            await queue.put(new_call(id=call_id, due_s=0.0, expires_s=time.time() + 3600, callback_url="http://c/",
                                     idempotency_key="k"))
        elif step == "held":
            await queue.put_held(new_call(id=call_id))
        elif step == "let_go":
            await queue.let_go(call_id, 0.0, None)
        elif step == "claim":
            lease = (await queue.claim([QUEUE], owner, 1.0, 1) or [lease])[0]
        elif step == "finish":
            await finish(queue, lease, State.DONE, inline(b"out"))
        elif step == "bury":
            await finish(queue, lease, State.DEAD, None)
        elif step == "retry":
            await queue.retry(lease, attempt=Attempt(0.0, 1.0, 503, "busy"), due_s=0.0)
        elif step == "release":
            await queue.release(lease)
        elif step == "cancel":
            await queue.cancel(call_id)
        elif step == "requeue":
            await queue.requeue_dead(call_id)
        elif step == "claim_callback":
            lease = (await queue.claim_callbacks([QUEUE], owner, 1.0, 1))[0]
        elif step == "deliver":
            await queue.callback_done(lease, Attempt(0.0, 1.0, 200, None))
        elif step == "give_up":
            await queue.callback_dead(lease, Attempt(0.0, 1.0, 500, None))
        elif step == "requeue_callback":
            await queue.requeue_callback(call_id)
    raise AssertionError(f"{place} was not passed")

asyncio.run(main())
"""


@dataclass(frozen=True)
class Death:
    """What the child does, where it dies (`module:Class.method`), and how the call ends after all."""

    steps: str
    place: str
    ends: State = State.DONE
    runs: int = 1  # by those who come after


DEATHS = {
    "put: key, not the call": Death("DIE put", "store:Store.put_waiting", runs=0),
    "claim: record, not the lease": Death("put DIE claim", "owners:Held.__init__"),
    "end: record, not the callback": Death("put claim DIE finish", "store:Store.put_callback", runs=0),
    "end: record and callback, not the timer": Death("put claim DIE finish", "store:Store.end_timer", runs=0),
    "end: record and callback, not the ack": Death("put claim DIE finish", "flows:Flows.ack", runs=0),
    "dead letter: record, not its old place": Death("put claim DIE bury", "store:Store.drop_older", State.DEAD, 0),
    "retry: record, not the nak": Death("put claim DIE retry", "flows:Flows.nak"),
    "retry: record, not its old place": Death("put claim DIE retry", "store:Store.drop_older"),
    "release: record, not the nak": Death("put claim DIE release", "flows:Flows.nak"),
    "run again: record, not its old place": Death("put claim retry DIE claim", "store:Store.drop_older"),
    "cancel: record, not the message": Death("put DIE cancel", "store:Store.end_waiting", State.CANCELLED, 0),
    "requeue: message, not the record": Death("put claim bury DIE requeue", "store:Store.save"),
    "requeue: message and record, not its old place": Death("put claim bury DIE requeue", "store:Store.drop_older"),
    "delivery: record, not the ack": Death("put claim finish claim_callback DIE deliver", "flows:Flows.ack", runs=0),
    "delivery: claimed": Death("put claim finish DIE claim_callback", "owners:Held.__init__", runs=0),
    "requeue of a delivery: message, not the record": Death(
        "put claim finish claim_callback give_up DIE requeue_callback", "store:Store.save", runs=0
    ),
    "let go: message, not the held record": Death("held DIE let_go", "connection:Connection.erase"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


async def go_on(options: Options, call_id: str) -> tuple[State, int, CallbackState | None, int]:
    """The call's end, how often it ran, its callback, and how many messages are left."""
    queue, connection = await JetStream.open(options), await connect(options)
    try:
        owner, runs = await queue.enlist(), 0
        async with asyncio.timeout(LONG_S * crowding()):
            while True:
                for lease in await queue.claim([QUEUE], owner, LEASE_S, 8):
                    runs += 1
                    await finish(queue, lease, State.DONE, None)
                for lease in await queue.claim_callbacks([QUEUE], owner, LEASE_S, 8):
                    await queue.callback_done(lease, lease.call.history[-1])
                await queue.stats()  # the servers have heard what was acknowledged before
                left = (await connection.info(connection.names.queue))["state"]["messages"]
                call = await queue.get(call_id)
                if not left and (call is None or call.state is not State.QUEUED):
                    break
                await queue.wait_for_work(0.2)
        if call is None:
            return State.EXPIRED, runs, None, 0
        records = await connection.count(connection.names.record_of(call_id))
        return call.state, runs, None if call.callback is None else call.callback.state, records
    finally:
        await connection.close()
        await queue.close()


@pytest.mark.parametrize("name", DEATHS)
def test_call_goes_on_when_a_process_dies_between_two_halves(server: Cluster, name: str) -> None:
    death, call_id = DEATHS[name], new_call_id()
    options = server.options(f"t{uuid.uuid4().hex[:12]}")
    arguments = [options.servers[0], options.prefix, call_id, death.place, death.steps]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG_S * crowding(),
    )
    assert (child.returncode, child.stderr) == (-signal.SIGKILL, "")
    if name == "put: key, not the call":  # nothing was accepted: the caller's next try is the same call
        again = uvloop.run(put_again(options))
        assert again == call_id
        return
    state, runs, callback, records = uvloop.run(go_on(options, call_id))
    assert (state, runs, records) == (death.ends, death.runs, 1)
    assert callback in (None, CallbackState.DELIVERED)
    assert callback is not None or death.ends is State.CANCELLED or "let go" in name


async def put_again(options: Options) -> str:
    queue = await JetStream.open(options)
    try:
        return (await queue.put(new_call(idempotency_key="k"))).id
    finally:
        await queue.close()
