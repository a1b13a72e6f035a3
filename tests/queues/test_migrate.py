"""Calls move from a spool to NATS whole and once, however often the program that moves them is killed."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faashound.calls.model import INLINE_BYTES, Attempt, Call, NewCall, QueueUnavailable, State
from faashound.queues.jetstream.connection import Options
from faashound.queues.jetstream.queue import JetStream
from faashound.queues.migrate import Migrated, migrate
from faashound.queues.spool.queue import Spool
from testkit.harness import ROOT, Program, run
from testkit.queue_kit import QUEUE, finish, inline, new_call, read_all
from testkit.system import QUICK, WORKER_READY, Receiver

BIG = os.urandom(INLINE_BYTES + 1)


async def move(directory: Path, options: Options) -> Migrated:
    target = await JetStream.open(options)
    try:
        return await migrate(directory, target, lambda _: None)
    finally:
        await target.close()


def run_migrate(directory: Path, options: Options) -> str:
    """Carry out the command, which is to succeed, and return what it says."""
    done = migrate_command(directory, options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def migrate_command(directory: Path, options: Options) -> subprocess.CompletedProcess[str]:
    arguments = ["migrate", "--from", f"spool:{directory}", "--to", options.servers[0]]
    return run("worker", arguments, {"nats_prefix": options.prefix})


async def look(options: Options) -> list[Call]:
    target = await JetStream.open(options)
    try:
        return [call for listed in await target.calls(limit=1000) if (call := await target.get(listed.id)) is not None]
    finally:
        await target.close()


def test_migrate_moves_a_call_as_it_is(tmp_path: Path, options: Options) -> None:
    async def scenario() -> tuple[NewCall, Call | None, bytes, int]:
        spool = await Spool.open(tmp_path)
        body = await spool.store_body(BIG)
        call = await spool.put(
            new_call(
                body=body,
                due_s=time.time() + 60,
                expires_s=time.time() + 90,
                idempotency_key="k",
                headers=(("A", "b"),),
            )
        )
        await spool.close()
        await move(tmp_path, options)
        target = await JetStream.open(options)
        moved = await target.get(call.id)
        moved_body = b"" if moved is None else await read_all(target, moved.body)
        await target.close()
        spool = await Spool.open(tmp_path)
        left = len(await spool.calls())
        await spool.close()
        return call, moved, moved_body, left

    call, moved, body, left = asyncio.run(scenario())
    assert moved is not None
    facts = ("function", "queue", "headers", "due_s", "expires_s", "idempotency_key", "accepted_s")
    assert [getattr(moved, name) for name in facts] == [getattr(call, name) for name in facts]
    assert moved.state is State.QUEUED
    assert body == BIG
    assert left == 0


def test_migrate_leaves_dead_letters_and_says_so(tmp_path: Path, options: Options) -> None:
    async def scenario() -> tuple[Migrated, list[Call]]:
        spool = await Spool.open(tmp_path)
        await spool.put(new_call())
        (lease,) = await spool.claim([QUEUE], await spool.enlist(), 60, 1)
        await finish(spool, lease, State.DEAD, inline(b"no"))
        await spool.close()
        return await move(tmp_path, options), await look(options)

    assert asyncio.run(scenario()) == (Migrated(0, 0, 1, 0), [])


async def end_one(directory: Path, state: State, callback_url: str, *, deliver: bool = True) -> str:
    """Put a call that ends so, and give its callback up if it is not to be delivered; return its id."""
    spool = await Spool.open(directory)
    owner = await spool.enlist()
    call = await spool.put(new_call(callback_url=callback_url))
    (lease,) = await spool.claim([QUEUE], owner, 60, 1)
    await finish(spool, lease, state, inline(b"out"))
    if not deliver:
        (lease,) = await spool.claim_callbacks([QUEUE], owner, 60, 1)
        await spool.callback_dead(lease, Attempt(0.0, 1.0, 410, "gone"))
    await spool.close()
    return call.id


def test_command_counts_the_dead_letters_that_can_be_listed(tmp_path: Path, options: Options) -> None:
    for state in (State.DEAD, State.DONE):
        asyncio.run(end_one(tmp_path, state, "http://caller/", deliver=False))
    moved = run_migrate(tmp_path, options)
    assert moved == "moved 0 calls, 0 were known, 2 dead letters stay\n"
    assert len(run("worker", ["dead", "list", "--json"], {"queue_url": f"spool:{tmp_path}"}).stdout.splitlines()) == 2


def test_command_says_how_callbacks_that_are_still_to_be_delivered_are(tmp_path: Path, options: Options) -> None:
    with Receiver() as receiver:
        call_id = asyncio.run(end_one(tmp_path, State.DONE, receiver.url()))
        told, advice = run_migrate(tmp_path, options).splitlines()
        assert told == "moved 0 calls, 0 were known, 0 dead letters stay"
        assert advice.startswith("1 callbacks are still to be delivered")
        assert receiver.received() == []
        with Program("worker", QUICK | {"queue_url": f"spool:{tmp_path}"}, ready_line=WORKER_READY) as worker:
            assert worker.environment["queue_url"] in advice
            (got,) = receiver.wait_for(1)
            worker.wait_log("callback delivered")
    assert got.headers["x-call-id"] == call_id
    assert run_migrate(tmp_path, options) == "moved 0 calls, 0 were known, 0 dead letters stay\n"


def test_migrate_refuses_a_spool_that_a_worker_drains(tmp_path: Path, options: Options) -> None:
    async def scenario() -> None:
        spool = await Spool.open(tmp_path)
        await spool.enlist()
        await spool.put(new_call())
        try:
            with pytest.raises(QueueUnavailable, match="worker"):
                await move(tmp_path, options)
        finally:
            await spool.close()

    asyncio.run(scenario())


def test_migrate_takes_a_call_whose_key_is_known_for_the_same(tmp_path: Path, options: Options) -> None:
    async def scenario() -> tuple[Migrated, list[str], str]:
        target = await JetStream.open(options)
        known = await target.put(new_call(idempotency_key="k"))
        await target.close()
        spool = await Spool.open(tmp_path)
        await spool.put(new_call(idempotency_key="k"))
        await spool.close()
        return await move(tmp_path, options), [call.id for call in await look(options)], known.id

    migrated, found, known = asyncio.run(scenario())
    assert (migrated, found) == (Migrated(0, 1, 0, 0), [known])


def test_command_names_a_call_whose_key_stands_for_another_request_and_moves_the_others(
    tmp_path: Path, options: Options
) -> None:
    async def fill() -> tuple[str, str]:
        target = await JetStream.open(options)
        await target.put(new_call(idempotency_key="k", body_digest="one"))
        await target.close()
        spool = await Spool.open(tmp_path)
        older, refused = new_call(), new_call(idempotency_key="k", body_digest="another")
        for call in (older, refused):
            await spool.put(call)
        await spool.close()
        return older.id, refused.id

    older_id, refused_id = asyncio.run(fill())
    for moved_count in (1, 0):
        done = migrate_command(tmp_path, options)
        assert (done.returncode, done.stderr) == (1, "")
        told, moved = done.stdout.splitlines()
        assert told.startswith(f"the call {refused_id} stays: this idempotency key came with another request")
        assert moved == f"moved {moved_count} calls, 0 were known, 0 dead letters stay"
    assert older_id in {call.id for call in asyncio.run(look(options))}


MOVER = """
import asyncio, sys
from pathlib import Path
from faashound.queues.jetstream.connection import Options
from faashound.queues.jetstream.queue import JetStream
from faashound.queues.migrate import migrate
async def main():
    target = await JetStream.open(Options((sys.argv[2],), prefix=sys.argv[3]))
    print("ready", flush=True)
    await migrate(Path(sys.argv[1]), target, lambda _: None)
    await target.close()
asyncio.run(main())
"""


def test_migrate_neither_loses_nor_doubles_a_call_when_it_is_killed_again_and_again(
    tmp_path: Path, options: Options
) -> None:
    async def fill() -> set[str]:
        spool = await Spool.open(tmp_path)
        calls = [new_call("fg"[n % 2], body=inline(b"%d" % n)) for n in range(300)]
        await asyncio.gather(*map(spool.put, calls))
        await spool.close()
        return {call.id for call in calls}

    ids = asyncio.run(fill())
    chance = random.Random(6)
    for _ in range(4):
        mover = subprocess.Popen(
            [sys.executable, "-c", MOVER, str(tmp_path), options.servers[0], options.prefix],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=ROOT.parent,
            stdout=subprocess.PIPE,
        )
        assert mover.stdout is not None
        with mover.stdout:
            assert mover.stdout.readline() == b"ready\n"
            time.sleep(chance.uniform(0.05, 0.3))  # somewhere in the middle of it
            mover.kill()
            mover.wait()
    found = asyncio.run(move_and_look(tmp_path, options))
    assert {call.id for call in found} == ids
    assert {(call.state, call.due_s) for call in found} == {(State.QUEUED, new_call().due_s)}


async def move_and_look(directory: Path, options: Options) -> list[Call]:
    await move(directory, options)
    return await look(options)


def test_command_moves_what_waits_and_says_how_much(tmp_path: Path, options: Options) -> None:
    async def fill() -> str:
        spool = await Spool.open(tmp_path)
        call = await spool.put(new_call())
        await spool.close()
        return call.id

    call_id = asyncio.run(fill())
    assert "moved 1 calls" in run_migrate(tmp_path, options)
    assert [call.id for call in asyncio.run(look(options))] == [call_id]


def test_command_leaves_a_directory_without_a_queue_as_it_is(tmp_path: Path) -> None:
    done = run("worker", ["migrate", "--from", f"spool:{tmp_path}", "--to", "nats://h"])
    assert (done.returncode, done.stdout) == (1, "")
    assert f"--from spool:{tmp_path}: there is no queue (spool.sqlite3)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "--from"),
        (["--from", "spool:/tmp", "--to", "spool:/tmp"], 2, "--to nats://HOST"),
        (["--from", "nats://h", "--to", "nats://h"], 2, "--from spool:DIRECTORY"),
        (["--from", "x", "--to", "nats://h"], 2, "--from: 'x': allowed: spool:DIRECTORY"),
        (["--from", "spool:x", "--to", "nats://u:p@h"], 2, "--to: 'nats://***@h': credentials are told by"),
        (["--from", "spool:/nowhere/at/all", "--to", "nats://h"], 1, "no such directory"),
    ],
    ids=["nothing", "to-a-spool", "from-nats", "no-queue", "credentials", "no-directory"],
)
def test_command_says_what_is_allowed_when_it_is_not_understood(arguments: list[str], status: int, said: str) -> None:
    done = run("worker", ["migrate", *arguments])
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
