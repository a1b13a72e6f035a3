"""A queue that several processes share, and what is left of it when one of them is killed."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faashound.calls.model import INLINE_BYTES, Attempt, Call, LeaseLost, RunEnd, State
from faashound.queues.spool.limits import ORPHAN_S
from testkit.harness import ROOT
from testkit.queue_kit import accepted, read_all
from testkit.spool_kit import LEASE_S, QUEUE, START_S, Desk, Remote, inline, new_call

LONG_S = 20.0
BIG = os.urandom(INLINE_BYTES + 1)


@pytest.fixture
def remote(desk: Desk) -> Iterator[Remote]:
    remote = Remote(desk.directory)
    yield remote
    remote.kill()


def test_two_processes_that_claim_at_once_never_get_the_same_call(desk: Desk, remote: Remote) -> None:
    made = {desk.put().id for _ in range(120)}
    mine: list[str] = []
    theirs: list[str] = []
    while len(mine) + len(theirs) < len(made):
        remote.send("claim", [QUEUE], remote.owner, LEASE_S, 3)
        mine += [lease.call.id for lease in desk.claim(3)]
        theirs += [lease.call.id for lease in remote.receive()]
    assert len(mine) + len(theirs) == len(made)
    assert {*mine, *theirs} == made
    assert mine
    assert theirs


def test_put_in_another_process_wakes_a_worker(desk: Desk, remote: Remote) -> None:
    remote.send("put", new_call())
    assert desk.do(desk.spool.wait_for_work(LONG_S))
    assert len(desk.claim()) == 1


def test_put_wakes_a_worker_though_its_process_dies_in_the_moment_of_the_answer(desk: Desk) -> None:
    for _ in range(10):
        Remote(desk.directory).put_and_die(new_call(due_s=START_S + 3600.0))
        assert desk.do(desk.spool.wait_for_work(LONG_S)), "only a wake-up ends the sleep: nothing is due"


def test_call_of_a_killed_worker_is_taken_over_at_once(desk: Desk, remote: Remote) -> None:
    call = desk.put()
    (lost,) = remote.call("claim", [QUEUE], remote.owner, 3600.0, 1)
    remote.kill()
    assert desk.do(desk.spool.reclaim()) == 1
    taken = desk.claim_one()
    assert (taken.call.id, taken.call.attempts) == (call.id, 2)
    with pytest.raises(LeaseLost):
        desk.finish(lost)


def test_idle_worker_notices_the_death_of_another(desk: Desk, remote: Remote) -> None:
    desk.put()
    remote.call("claim", [QUEUE], remote.owner, 3600.0, 1)
    desk.do(desk.spool.wait_for_work(0))
    remote.kill()
    began_s = time.monotonic()
    assert desk.do(desk.spool.wait_for_work(LONG_S))
    assert time.monotonic() - began_s < LONG_S / 2
    assert len(desk.claim()) == 1


def test_callback_of_a_killed_worker_is_taken_over(desk: Desk, remote: Remote) -> None:
    desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    assert len(remote.call("claim_callbacks", [QUEUE], remote.owner, 3600.0, 1)) == 1
    remote.kill()
    assert desk.do(desk.spool.reclaim()) == 1
    assert desk.claim_callback().call.state is State.DONE


def test_dead_owner_and_its_bell_leave_no_files(desk: Desk, remote: Remote) -> None:
    owners, bells = desk.directory / "owners", desk.directory / "bells"
    assert len(list(owners.iterdir())) == 2
    remote.kill()
    desk.put()
    desk.do(desk.spool.sweep(60, 60))
    assert [path.name for path in owners.iterdir()] == [desk.owner]
    deadline_s = time.monotonic() + LONG_S
    while len(list(bells.iterdir())) > 1:
        assert time.monotonic() < deadline_s
        desk.put()


def test_body_stored_by_a_process_killed_before_its_put_is_swept_later(desk: Desk, remote: Remote) -> None:
    orphan = remote.call("store_body", BIG)
    kept = remote.call("put", new_call(body=remote.call("store_body", BIG)))
    remote.kill()
    assert desk.do(desk.spool.sweep(60, 60)).file_count == 0  # perhaps it is just about to be put
    for name in desk.body_files():
        os.utime(desk.directory / "bodies" / name, (time.time() - ORPHAN_S - 1,) * 2)
    assert desk.do(desk.spool.sweep(60, 60)).file_count == 1
    assert desk.body_files() == {kept.body.file} != {orphan.file}


@pytest.mark.parametrize("method", ["put", "finish", "retry", "requeue_dead"])
def test_write_killed_before_any_of_its_statements_happened_not_at_all(tmp_path: Path, method: str) -> None:
    """Every statement but the first comes after a change that must not stay."""
    statements = 0
    for statement in itertools.count(1):
        directory = tmp_path / str(statement)
        remote = Remote(directory)
        before, args, kwargs = prepare(remote, method)
        answered = remote.crash(statement, method, *args, **kwargs)
        remote.kill()
        if answered:
            break
        statements += 1
        desk = Desk(directory)
        desk.do(desk.spool.reclaim())
        found = desk.do(desk.spool.get(before.id))
        if method == "put":
            assert found is None
            assert desk.do(desk.spool.stats()).by_state[State.QUEUED] == 0
        else:
            assert found is not None
            assert (found.attempts, found.result, found.callback) == (before.attempts, before.result, before.callback)
            assert len(found.history) == len(before.history) + (found.state is State.QUEUED)  # the attempt that died
        desk.close()
    assert statements >= 4


def prepare(remote: Remote, method: str) -> tuple[Call, tuple[object, ...], dict[str, object]]:
    """A call in the state that `method` needs, as it is then, and what to pass to the method."""
    new = new_call(callback_url="http://caller/")
    if method == "put":
        return accepted(new), (new,), {}
    call: Call = remote.call("put", new)
    (lease,) = remote.call("claim", [QUEUE], remote.owner, LEASE_S, 1)
    attempt = Attempt(START_S, START_S, 500, "failed")
    if method == "retry":
        return lease.call, (lease,), {"attempt": attempt, "due_s": START_S, "excerpt": b"why"}
    end = RunEnd(State.DEAD, attempt, status=500, duration_s=0.1, result=inline(b"out"))
    if method == "finish":
        return lease.call, (lease, end), {}
    remote.call("finish", lease, end)
    return remote.call("get", call.id), (call.id,), {}


def test_what_was_acknowledged_survives_a_kill(desk: Desk, remote: Remote) -> None:
    calls = [remote.call("put", new_call(due_s=START_S - 1)) for _ in range(20)]
    remote.kill()
    desk.do(desk.spool.close())
    spool = desk.open()
    assert [desk.do(spool.get(call.id)) for call in calls] == [accepted(call) for call in calls]


def test_copy_is_made_while_the_system_runs_and_put_back_as_the_page_says(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "spool")
    section = (
        (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Copies")[2].partition("\n## ")[0]
    )
    make, put_back = (
        block.replace("/var/lib/faashound/spool", str(desk.directory)).replace("/copies", str(tmp_path / "copies"))
        for block in re.findall("```sh\n(.*?)```", section, re.DOTALL)
    )
    (tmp_path / "copies").mkdir()
    call = desk.put(body=desk.do(desk.spool.store_body(BIG)))
    subprocess.run(["/bin/sh", "-ec", make], check=True)
    desk.do(desk.spool.cancel(call.id))
    later = desk.put()
    desk.close()
    subprocess.run(["/bin/sh", "-ec", put_back], check=True)
    restored = Desk(desk.directory)
    (lease,) = restored.claim(2)
    assert restored.do(read_all(restored.spool, lease.call.body)) == BIG
    assert restored.do(restored.spool.get(later.id)) is None
    restored.close()
