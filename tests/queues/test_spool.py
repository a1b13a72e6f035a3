"""What only a spool does, beside what every queue promises (contract/): ids, states, commits, files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import resource
import shutil
import socket
import subprocess
import threading
import tracemalloc
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.model import (
    INLINE_BYTES,
    CallExists,
    QueueDamaged,
    QueueUnavailable,
    RunEnd,
    State,
)
from faashound.queues.spool import directory
from faashound.queues.spool import queue as spool_queue
from faashound.queues.spool.directory import LockHeld
from faashound.queues.spool.limits import DATABASE, STEP_COUNT
from faashound.queues.spool.notifier import Notifier, WakeUp
from faashound.queues.spool.queue import Spool
from testkit.harness import eventually, wait_until
from testkit.needed import want_root
from testkit.queue_kit import LEASE_S, QUEUE, accepted, inline, read_all
from testkit.spool_kit import START_S, Desk, as_spool, new_call, writer_has_all

NOBODY = 65534
LONG_S = 20.0  # how long a test waits for what should come at once
ROUNDED_S = 1.0  # more than what adding and taking away hours leaves of a due time
BIG = os.urandom(INLINE_BYTES + 1)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "spool")
    yield desk
    desk.close()


# -- a clock that is set back


@pytest.mark.parametrize("way", ["released", "taken back"])
def test_call_that_is_handed_back_is_due_though_the_clock_was_set_back_meanwhile(desk: Desk, way: str) -> None:
    desk.put()
    lease = desk.claim_one(lease_s=0.0 if way == "taken back" else LEASE_S)
    desk.clock.now_s -= 3600
    if way == "released":
        desk.do(desk.spool.release(lease))
    else:
        assert desk.do(desk.spool.reclaim()) == 1
    assert desk.claim_one().call.id == lease.call.id


def test_callback_that_is_handed_back_is_due_though_the_clock_was_set_back_meanwhile(desk: Desk) -> None:
    desk.put(callback_url="http://127.0.0.1:1/")
    desk.finish(desk.claim_one())
    (lease,) = desk.claim_callbacks()
    desk.clock.now_s -= 3600
    desk.do(desk.spool.release(lease))
    assert len(desk.claim_callbacks()) == 1


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0], ids=["right before", "ahead before"])
def test_call_that_is_put_after_the_clock_was_set_back_keeps_its_times(desk: Desk, ahead_s: float) -> None:
    worker = as_spool(desk.open())
    desk.clock.now_s += ahead_s
    before = desk.put(due_s=desk.clock.now_s + 600)
    desk.clock.now_s -= 3600
    now_s = desk.clock.now_s
    after = desk.put(due_s=now_s + 600, expires_s=now_s + 1800)
    desk.do(worker.reclaim())
    assert desk.get(after.id) == after
    desk.clock.now_s += 600 + ROUNDED_S
    assert {lease.call.id for lease in desk.claim()} == {before.id, after.id}


def test_call_keeps_its_times_when_another_process_alone_has_seen_the_clock_ahead(desk: Desk) -> None:
    worker = as_spool(desk.open())
    desk.clock.now_s += 3600
    desk.do(worker.reclaim())
    desk.do(desk.spool.sweep(60, 60))
    desk.clock.now_s -= 3600
    after = desk.put(expires_s=desk.clock.now_s + 1800)
    desk.do(worker.reclaim())
    assert desk.get(after.id) == after


# -- putting


def test_put_that_cannot_be_written_fails_alone_and_leaves_nothing(desk: Desk) -> None:
    good = [desk.new_call() for _ in range(20)]
    bad = desk.new_call(path="\ud800")  # no UTF-8 for it: the row of the call is in by then, its request is not

    async def scenario() -> list[Any]:
        puts = [desk.spool.put(call) for call in [*good[:10], bad, *good[10:]]]
        return await asyncio.gather(*puts, return_exceptions=True)

    outcomes = desk.do(scenario())
    assert isinstance(outcomes.pop(10), UnicodeEncodeError)
    assert [outcome.id for outcome in outcomes] == [call.id for call in good]
    assert {call.id for call in desk.do(desk.spool.calls())} == {call.id for call in good}
    assert desk.do(desk.spool.stats()).by_state[State.QUEUED] == len(good)  # a list would not show half a call


@pytest.mark.parametrize("count", [1, 2, 3, 63, 64, 65, 200])
def test_put_fails_alone_when_its_id_is_in_use(desk: Desk, count: int) -> None:
    known = desk.put()
    good = [desk.new_call(body=inline(b"%d" % number)) for number in range(count)]
    twice = good[count // 2]

    async def scenario() -> list[Any]:
        puts = [desk.spool.put(call) for call in [*good, desk.new_call(id=known.id), twice]]
        return await asyncio.gather(*puts, return_exceptions=True)

    outcomes = desk.do(scenario())
    assert [type(outcome) for outcome in outcomes[count:]] == [CallExists, CallExists]
    assert [accepted(outcome) for outcome in outcomes[:count]] == [desk.get(call.id) for call in good]
    assert [outcome.body.inline for outcome in outcomes[:count]] == [b"%d" % number for number in range(count)]
    assert desk.do(desk.spool.stats()).by_state[State.QUEUED] == count + 1


def test_puts_with_a_key_in_common_are_one_call_when_they_come_with_others(desk: Desk) -> None:
    calls = [desk.new_call(idempotency_key="k" if number % 3 == 0 else None) for number in range(30)]

    async def scenario() -> list[Any]:
        return await asyncio.gather(*(desk.spool.put(call) for call in calls))

    outcomes = desk.do(scenario())
    assert {outcome.id for outcome in outcomes[::3]} == {calls[0].id}
    assert len({outcome.id for outcome in outcomes}) == 21


def test_puts_share_a_commit_when_they_come_in_one_turn_of_the_loop(desk: Desk) -> None:
    async def scenario() -> None:
        await asyncio.gather(*(desk.spool.put(new_call()) for _ in range(200)))

    before = desk.do(desk.spool.stats()).commit_count
    desk.do(scenario())
    stats = desk.do(desk.spool.stats())
    assert stats.by_state[State.QUEUED] == 200
    assert stats.commit_count - before == 1


# -- listing


def test_list_takes_little_memory_when_callers_send_much(desk: Desk) -> None:
    """A thousand calls with 40 KB of header fields each took 230 MB."""
    long = "x" * 40_000
    facts: dict[str, Any] = {
        "headers": (("X-Long", long),),
        "query": long,
        "path": f"/{long}",
        "body": inline(bytes(60_000)),
    }

    async def fill() -> list[Any]:
        return await asyncio.gather(*(desk.spool.put(desk.new_call(**facts)) for _ in range(200)))

    made = [call.id for call in desk.do(fill())]
    tracemalloc.start()
    try:
        listed = desk.do(desk.spool.calls(limit=1000))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [call.id for call in listed] == made[::-1]
    assert peak_bytes / len(listed) < 5_000
    assert desk.get(made[0]).headers == facts["headers"]


# -- claiming


def test_claim_is_asked_for_again_when_expired_calls_took_its_turn(desk: Desk) -> None:
    async def scenario() -> None:
        dying = [new_call("a", expires_s=START_S + 1) for _ in range(STEP_COUNT + 50)]
        await asyncio.gather(*map(desk.spool.put, dying))

    desk.do(scenario())
    desk.put("b")
    desk.clock.now_s += 2
    desk.do(desk.spool.wait_for_work(0))
    assert desk.claim(1) == []
    assert desk.do(desk.spool.wait_for_work(0))
    assert [lease.call.function.name for lease in desk.claim(1)] == ["b"]


def test_end_that_comes_during_a_claim_shares_the_commit_of_the_next_claim(desk: Desk) -> None:
    for _ in range(3):
        desk.put()
    lease = desk.claim_one()

    async def claim_twice() -> None:
        for _ in range(2):
            assert len(await desk.spool.claim([QUEUE], desk.owner, LEASE_S, 1)) == 1

    async def scenario() -> int:
        before = (await desk.spool.stats()).commit_count
        with (desk.directory / "writer.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            claiming = asyncio.create_task(claim_twice())
            await writer_has_all(desk.spool)  # and waits for the lock
            ending = asyncio.create_task(desk.spool.finish(lease, RunEnd(State.DONE, desk.attempt(), 200, 0.1)))
            for _ in range(3):
                await asyncio.sleep(0)  # what is not held back is submitted by then
        await claiming
        await ending
        return (await desk.spool.stats()).commit_count - before

    assert desk.do(scenario()) == 2
    assert desk.get(lease.call.id).state is State.DONE


# -- leases


def test_reclaim_voids_leases_of_an_earlier_boot(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.put()
    desk.claim_one()
    monkeypatch.setattr(spool_queue, "read_boot_id", lambda: "another-boot")
    desk.open()  # opening takes back
    assert [call.state for call in desk.do(desk.spool.calls())] == [State.QUEUED]


# -- waiting


def test_notifier_with_an_unread_backlog_announces_everything(desk: Desk) -> None:
    """A full buffer loses wake-ups: whatever the lost ones said must be acted on."""
    (ours,) = (desk.directory / "bells").iterdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        for _ in range(3):
            other.sendto(bytes([WakeUp.WORK]), str(ours))
    assert desk.do(desk.spool.wait_for_cancel(LONG_S))


def test_notifier_is_woken_when_it_came_after_the_others_had_been_listed(desk: Desk) -> None:
    notifiers = desk.directory / "bells"
    os.utime(notifiers, (START_S, START_S))  # nothing has changed there for long: what is listed now is remembered
    desk.put()
    other = desk.open()
    assert desk.do(other.wait_for_work(LONG_S))  # of what is there already
    desk.put()
    assert desk.do(other.wait_for_work(LONG_S))


def test_notifier_whose_process_has_died_is_removed(desk: Desk) -> None:
    stale = desk.directory / "bells" / "1-dead.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        notifier.bind(str(stale))
    assert stale.exists()

    def is_gone_after_a_put() -> bool:
        desk.put()
        return not stale.exists()

    wait_until(is_gone_after_a_put, LONG_S, "the notifier is removed")


def test_notifier_is_woken_by_ends_only_while_it_wants_to_be(tmp_path: Path) -> None:
    directory_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.closing(Notifier(directory_fd)) as one, contextlib.closing(Notifier(directory_fd)) as other:

        def heard(wake_up: int) -> int:
            one.wake(wake_up)
            return other.read()

        assert heard(WakeUp.FINISHED) == WakeUp.NOTHING
        other.hear_of_ends(True)
        assert heard(WakeUp.FINISHED) == WakeUp.FINISHED
        other.hear_of_ends(False)
        assert heard(WakeUp.FINISHED) == WakeUp.NOTHING
        assert heard(WakeUp.FINISHED | WakeUp.WORK) == WakeUp.FINISHED | WakeUp.WORK
    os.close(directory_fd)


def test_notifier_of_an_earlier_version_is_woken_by_ends(desk: Desk) -> None:
    desk.put()
    lease = desk.claim_one()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
        notifier.bind(str(desk.directory / "bells" / "1-earlier.sock"))
        desk.finish(lease)
        notifier.settimeout(LONG_S)
        assert notifier.recv(1) == bytes([WakeUp.FINISHED])


def test_queue_in_a_directory_with_a_long_name_is_woken(tmp_path: Path) -> None:
    desk = Desk(tmp_path / ("d" * 200))
    other = desk.open()
    desk.do(other.put(new_call()))
    assert desk.do(desk.spool.wait_for_work(LONG_S))
    desk.close()


# -- bodies


def test_body_whose_storing_is_cancelled_in_the_middle_of_a_write_is_removed(desk: Desk) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(desk.spool.store_body(bytes(32 << 20)))
        await eventually(desk.stored_bodies, LONG_S, "the file is begun")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    desk.do(scenario())
    assert desk.body_files() == set()


@pytest.mark.parametrize("damage", ["gone", "short", "long"])
def test_body_whose_file_is_damaged_is_not_passed_off_as_whole(desk: Desk, damage: str) -> None:
    body = desk.do(desk.spool.store_body(BIG))
    path = desk.directory / "bodies" / str(body.file)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, {"short": 100, "long": len(BIG) + 1}[damage])
    with pytest.raises(QueueDamaged):
        desk.do(read_all(desk.spool, body))


@contextlib.contextmanager
def no_descriptors(_: Desk) -> Iterator[None]:
    """As few as are open now: the next open(2) is EMFILE, since the lowest free number is over the limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        gaps = [os.open("/dev/null", os.O_RDONLY)]  # every free number below the highest in use
        stack.callback(lambda: deque(map(os.close, gaps), 0))
        highest = max(map(int, os.listdir("/proc/self/fd")))
        while gaps[-1] <= highest:
            gaps.append(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (gaps[-1] + 1, before[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        yield


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """No address space for the stack of another, but some for other needs: EAGAIN, as from a limit of tasks."""
    stack_bytes = 256 << 20  # more than the C library keeps of threads that have ended
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with contextlib.ExitStack() as stack:
        stack.callback(threading.stack_size, threading.stack_size(stack_bytes))
        resource.setrlimit(resource.RLIMIT_AS, (in_use_bytes + stack_bytes // 2, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_AS, limits)
        yield


@contextlib.contextmanager
def moved_bodies(desk: Desk) -> Iterator[None]:
    """As when the disk of the bodies is not there for a moment."""
    bodies = desk.directory / "bodies"
    away = bodies.rename(desk.directory / "away")
    (away / "name").touch()
    files = {path: path.rename(desk.directory / path.name) for path in away.iterdir()}
    yield
    for path, elsewhere in files.items():
        elsewhere.rename(path)
    away.rename(bodies)


@contextlib.contextmanager
def no_permission(_: Desk) -> Iterator[None]:
    """EACCES, as when an operator has changed an owner or a mode by mistake."""
    want_root("becoming another user")
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


@contextlib.contextmanager
def failing_disk(desk: Desk) -> Iterator[None]:
    """EIO: the body lies on a device whose end has been cut off."""
    want_root("mounting a small disk")
    (body,) = (desk.directory / "bodies").iterdir()
    image, disk = desk.directory.parent / "image", desk.directory.parent / "disk"
    disk.mkdir()
    with contextlib.ExitStack() as stack:
        for command in (
            ["truncate", "-s", "8M", str(image)],
            ["mkfs.ext4", "-q", str(image)],
            ["mount", "-o", "loop", str(image), str(disk)],
        ):
            subprocess.run(command, check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
        copy = shutil.copy(body, disk)
        subprocess.run(["sync", "-f", str(copy)], check=True)
        subprocess.run(["mount", "--bind", str(copy), str(body)], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(body)], check=True)
        os.truncate(image, 65536)
        with open(body, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield


@pytest.mark.parametrize(
    "trouble", [no_descriptors, moved_bodies, no_permission, failing_disk], ids=lambda trouble: trouble.__name__
)
def test_body_that_cannot_be_read_for_a_moment_is_not_damaged(desk: Desk, trouble: Any) -> None:
    body = desk.do(desk.spool.store_body(BIG))
    with trouble(desk), pytest.raises(QueueUnavailable):
        desk.do(read_all(desk.spool, body))
    assert desk.do(read_all(desk.spool, body)) == BIG


def test_queue_needs_no_thread_beside_those_that_it_was_opened_with(desk: Desk) -> None:
    with no_threads():
        body = desk.do(desk.spool.store_body(BIG))
        call = desk.put(body=body)
        assert desk.do(read_all(desk.spool, desk.get(call.id).body)) == BIG


def test_queue_is_not_opened_without_the_threads_that_it_needs(desk: Desk, tmp_path: Path) -> None:
    before = {*os.listdir("/proc/self/fd"), *threading.enumerate()}
    with no_threads(), pytest.raises(QueueUnavailable, match="can't start new thread"):
        desk.do(Spool.open(tmp_path / "other"))
    assert {*os.listdir("/proc/self/fd"), *threading.enumerate()} <= before


def test_lock_that_is_held_is_told_as_that_when_its_holder_cannot_be_looked_up(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "LOCK_S", 0.2)
    with (desk.directory / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with no_descriptors(desk), pytest.raises(LockHeld, match=r"held for 0\.2 s by a process that cannot be named"):
            desk.do(desk.spool.put(new_call()))


@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "in a group"])
def test_put_leaves_no_body_when_its_id_is_in_use(desk: Desk, grouped: bool) -> None:
    known = desk.put()

    async def scenario() -> None:
        twice = [desk.new_call(id=known.id, body=await desk.spool.store_body(BIG)) for _ in range(1 + 2 * grouped)]
        outcomes = await asyncio.gather(*map(desk.spool.put, twice), return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {CallExists}

    desk.do(scenario())
    assert desk.body_files() == set()


def test_put_leaves_no_body_when_its_key_is_known(desk: Desk) -> None:
    first = desk.put(idempotency_key="k", body=desk.do(desk.spool.store_body(BIG)))
    assert desk.put(idempotency_key="k", body=desk.do(desk.spool.store_body(BIG))) == first
    assert desk.body_files() == {first.body.file}


def test_put_leaves_no_body_when_the_queue_is_gone(desk: Desk) -> None:
    call = desk.new_call(body=desk.do(desk.spool.store_body(BIG)))
    (desk.directory / DATABASE).rename(desk.directory / "elsewhere")
    with pytest.raises(QueueUnavailable):
        desk.do(desk.spool.put(call))
    assert desk.body_files() == set()


def test_put_leaves_no_body_when_its_caller_is_cancelled_before_its_turn(desk: Desk) -> None:
    call = desk.new_call(body=desk.do(desk.spool.store_body(BIG)))

    async def scenario() -> None:
        with (desk.directory / "writer.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = asyncio.create_task(desk.spool.put(desk.new_call()))  # the writer waits for the lock with it
            await writer_has_all(desk.spool)
            putting = asyncio.create_task(desk.spool.put(call))
            await asyncio.sleep(0)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
        await before
        await desk.spool.put(desk.new_call())  # its turn is behind the cancelled one's

    desk.do(scenario())
    known = {listed.id for listed in desk.do(desk.spool.calls())}
    assert desk.body_files() == ({call.body.file} if call.id in known else set())


def test_first_call_of_a_function_waits_for_one_turn_only_when_another_has_ten_thousand(desk: Desk) -> None:
    async def fill() -> None:
        await asyncio.gather(*(desk.spool.put(new_call("greedy")) for _ in range(10_000)))

    desk.do(fill())
    for _ in range(3):
        assert {lease.call.function.name for lease in desk.claim(16)} == {"greedy"}
    desk.put("modest")
    claimed = [lease.call.function.name for lease in desk.claim(2)]
    assert sorted(claimed) == ["greedy", "modest"]
