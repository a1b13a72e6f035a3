"""What a spool does on a disk that is full: it takes no calls, and everything that ends calls goes on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.model import (
    INLINE_BYTES,
    Call,
    CallExists,
    QueueFull,
    QueueLimits,
    ResultLost,
    RunEnd,
    State,
    StoredBody,
)
from faashound.queues.spool.limits import AMPLE_BYTES
from faashound.queues.spool.queue import Spool
from faashound.watchdog import PeerGone, log
from testkit.disks import fill, mount_small_disk
from testkit.harness import eventually
from testkit.queue_kit import read_all, results_wait
from testkit.spool_kit import LEASE_S, QUEUE, START_S, Desk, Remote, inline, new_call

DISK_BYTES = 2 << 20
LONG_S = 20.0


@pytest.fixture
def desk(small_disk: Path) -> Iterator[Desk]:
    desk = Desk(small_disk / "spool")
    yield desk
    desk.close()


def put_until_full(desk: Desk, body: Callable[[], StoredBody], **changes: Any) -> list[Call]:
    """As submitters do that stop only when they are refused."""
    calls = []
    with contextlib.suppress(QueueFull):
        while True:
            calls.append(desk.put(body=body(), **changes))
    return calls


def long_body(desk: Desk) -> StoredBody:
    return desk.do(desk.spool.store_body(os.urandom(INLINE_BYTES + 1)))


def short_body(_: Desk) -> StoredBody:
    return inline(os.urandom(50_000))


async def once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def run(desk: Desk, result_bytes_count: int) -> int:
    """Claims what is due and ends it with a result; how many calls that were."""
    leases = desk.claim(16)
    for lease in leases:
        result = desk.do(desk.spool.store_result(once(os.urandom(result_bytes_count))))
        desk.do(desk.spool.finish(lease, RunEnd(State.DONE, desk.attempt(), 200, 0.1, result)))
    return len(leases)


# -- draining


@pytest.mark.parametrize("body", [short_body, long_body], ids=lambda body: body.__name__)
def test_queue_drains_when_calls_have_filled_its_disk(desk: Desk, body: Callable[[Desk], StoredBody]) -> None:
    calls = put_until_full(desk, lambda: body(desk))
    size = calls[0].body.bytes_count
    assert len(calls) * size > DISK_BYTES / 4  # it was of use before
    while run(desk, size):
        pass
    stats = desk.do(desk.spool.stats())
    assert stats.by_state[State.DONE] == len(calls)
    assert desk.spool.trouble is None or body is short_body  # which leaves free pages, for `sweep` to give back
    desk.clock.now_s += 3600
    desk.do(desk.spool.sweep(60, 60))
    assert desk.spool.trouble is None
    desk.put(body=body(desk))


def test_room_can_be_given_back_when_results_have_taken_what_they_may(desk: Desk) -> None:
    """Results in rows, each larger than the payload that its call gives up for it: no reserve is enough for all."""
    count = len(put_until_full(desk, lambda: inline(b""), headers=()))
    with pytest.raises(QueueFull):
        deque((run(desk, 2000) for _ in range(count)), 0)
    done = desk.do(desk.spool.stats()).by_state[State.DONE]
    assert 0 < done < count
    assert desk.do(desk.spool.purge(state=State.DONE)) == done
    assert desk.do(desk.spool.cancel_queued()) > 0
    desk.clock.now_s += 3600
    desk.do(desk.spool.sweep(60, 60))
    assert desk.spool.trouble is None
    desk.put()


@pytest.mark.parametrize("end", ["cancelled", "done"])
def test_disk_is_free_again_when_header_fields_have_filled_it_and_the_calls_have_ended(desk: Desk, end: str) -> None:
    headers = (("X-Long", os.urandom(30_000).hex()),)
    count = len(put_until_full(desk, lambda: inline(b""), headers=headers))
    if end == "cancelled":
        assert desk.do(desk.spool.cancel_queued()) == count
    else:
        while run(desk, 100):
            pass
        assert desk.do(desk.spool.stats()).by_state[State.DONE] == count
        desk.clock.now_s += 3600
    desk.do(desk.spool.sweep(60, 60))
    assert desk.spool.trouble is None
    desk.put(headers=headers)


@pytest.mark.parametrize("body", [short_body, long_body], ids=lambda body: body.__name__)
def test_every_end_of_a_call_goes_on_when_another_program_has_filled_the_disk(
    small_disk: Path, desk: Desk, body: Callable[[Desk], StoredBody]
) -> None:
    calls = [desk.put(body=body(desk)) for _ in range(6)]
    ballast = fill(small_disk)
    put_until_full(desk, lambda: inline(b"in"))
    assert desk.spool.trouble is not None
    (first, second, third) = desk.claim(3)
    desk.finish(first)
    desk.finish(second, State.DEAD, bytes(INLINE_BYTES))
    desk.do(desk.spool.release(third))
    desk.do(desk.spool.renew([third], LEASE_S))
    assert desk.do(desk.spool.cancel(calls[-1].id)) is State.CANCELLED
    assert desk.do(desk.spool.purge(state=State.CANCELLED)) == 1
    assert desk.do(desk.spool.requeue_dead(second.call.id)).state is State.QUEUED
    ballast.unlink()
    desk.do(desk.spool.sweep(60, 60))
    assert desk.spool.trouble is None
    desk.put()


def test_worker_can_enlist_and_take_over_when_the_disk_is_full(small_disk: Path) -> None:
    remote = Remote(small_disk / "spool")
    call = remote.call("put", new_call())
    remote.call("claim", [QUEUE], remote.owner, LEASE_S, 1)
    remote.kill()
    fill(small_disk)
    for _ in range(2):  # the second time the journal and its index have to be made anew
        desk = Desk(small_disk / "spool")
        (lease,) = desk.claim(1)
        assert lease.call.id == call.id
        desk.do(desk.spool.release(lease))
        desk.close()


def test_queue_of_an_older_version_drains_when_its_disk_is_full_and_has_no_reserve(small_disk: Path) -> None:
    """What was let go of cannot be had, so room has to come; but nothing is in the way of using it."""

    async def scenario() -> None:
        spool = await Spool.open(small_disk / "spool", limits=QueueLimits(reserve_bytes=0))
        await asyncio.gather(*(spool.put(new_call()) for _ in range(50)))
        await spool.close()

    asyncio.run(scenario())
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - (160 << 10))
    desk = Desk(small_disk / "spool")
    assert desk.spool.trouble is not None
    while run(desk, 10):
        pass
    assert desk.do(desk.spool.stats()).by_state[State.DONE] == 50
    desk.close()


# -- the reserve


def test_reserve_is_taken_up_again_when_there_is_room(small_disk: Path, desk: Desk) -> None:
    desk.put()
    assert desk.do(desk.spool.stats()).reserve_bytes == DISK_BYTES // 8
    ballast = fill(small_disk)
    desk.release_reserve()
    fill(small_disk).rename(small_disk / "more")
    with pytest.raises(QueueFull):
        desk.put()
    assert "bytes are free" in str(desk.spool.trouble)
    assert desk.do(desk.spool.stats()).reserve_bytes == DISK_BYTES // 8, "what is to be kept, or 0 were enough"
    for path in (ballast, small_disk / "more"):
        path.unlink(missing_ok=True)
    desk.put()
    assert desk.spool.trouble is None
    stats = desk.do(desk.spool.stats())
    assert stats.reserve_bytes == DISK_BYTES // 8
    assert stats.free_bytes is not None
    assert stats.free_bytes > DISK_BYTES // 4


def test_reserve_is_taken_up_again_by_an_operators_command_that_has_used_it(small_disk: Path, desk: Desk) -> None:
    """It asks for none of its own, and takes what it finds for the whole."""
    for _ in range(100):
        desk.put(body=inline(bytes(4096)))
    command = desk.do(Spool.open(desk.directory, limits=QueueLimits(reserve_bytes=None)))
    reserve = desk.directory / "reserve"
    fill(small_disk)
    for call in desk.do(command.calls(limit=100)):
        desk.do(command.cancel(call.id))
        assert reserve.stat().st_size == DISK_BYTES // 8
    desk.do(command.close())


def test_reserve_of_another_process_is_respected(desk: Desk) -> None:
    desk.release_reserve()
    other = desk.open()
    assert other.trouble is None
    assert desk.spool.trouble is None


def test_reserve_is_as_large_as_asked_for(tmp_path: Path) -> None:
    async def size(reserve_bytes: int | None) -> int | None:
        spool = await Spool.open(tmp_path / "spool", limits=QueueLimits(reserve_bytes=reserve_bytes))
        stats = await spool.stats()
        await spool.close()
        return stats.reserve_bytes

    assert [asyncio.run(size(wanted)) for wanted in (None, 1 << 20, 3 << 20, None, 2 << 20, 0)] == [
        0,
        1 << 20,
        3 << 20,
        3 << 20,
        2 << 20,
        0,
    ]


def test_refused_calls_leave_no_body_when_the_disk_is_full(small_disk: Path, desk: Desk) -> None:
    body = long_body(desk)
    fill(small_disk)
    put_until_full(desk, lambda: inline(bytes(20_000)))
    desk.release_reserve()
    with pytest.raises(QueueFull):
        desk.do(desk.spool.store_body(os.urandom(INLINE_BYTES + 1)))
    fill(small_disk).rename(small_disk / "more")
    with pytest.raises(QueueFull):
        desk.put(body=body)
    assert desk.body_files() == set()


def test_refused_call_does_not_fail_others_of_its_group_when_the_disk_is_full(small_disk: Path, desk: Desk) -> None:
    known = desk.put()
    desk.put()
    desk.put()
    leases = desk.claim(3)
    fill(small_disk)

    async def scenario() -> list[Any]:
        end = RunEnd(State.DONE, desk.attempt(), 200, 0.1, inline(bytes(20_000)))
        steps = [desk.spool.put(new_call(body=inline(bytes(60_000)))) for _ in range(20)]
        steps += [desk.spool.put(new_call(id=known.id))]
        return await asyncio.gather(*steps, *(desk.spool.finish(x, end) for x in leases), return_exceptions=True)

    assert len(leases) == 3
    *refused, twice, one, two, three = desk.do(scenario())
    assert {type(outcome) for outcome in refused} == {QueueFull}
    assert isinstance(twice, (CallExists, QueueFull))
    assert [one, two, three] == [None] * 3


# -- results


async def wait_for_want_of_room(desk: Desk) -> None:
    """Wait until a result waits: it has taken the half of the reserve that is for results, and that was not enough."""

    async def is_half_gone() -> bool:
        return (desk.directory / "reserve").stat().st_size < DISK_BYTES // 8

    await eventually(is_half_gone, LONG_S, "a result waits for room")


def test_result_waits_for_room_and_is_stored_whole(small_disk: Path, desk: Desk) -> None:
    result = os.urandom(DISK_BYTES // 2)
    ballast = fill(small_disk)

    async def scenario() -> StoredBody:
        storing = asyncio.create_task(desk.spool.store_result(in_pieces(result)))
        await wait_for_want_of_room(desk)
        assert not storing.done()
        ballast.unlink()
        return await storing

    assert desk.do(read(desk, scenario())) == result


def test_result_waits_on_while_its_disk_answers_nothing(
    small_disk: Path, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = os.urandom(DISK_BYTES // 2)
    ballast = fill(small_disk)
    asked: list[int] = []

    def fail(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def has_asked_again() -> bool:
        return len(asked) > 2

    async def scenario() -> StoredBody:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstatvfs", fail)
            storing = asyncio.create_task(desk.spool.store_result(in_pieces(result)))
            await eventually(has_asked_again, LONG_S, "the result has asked for room more than once")
        ballast.unlink()
        return await storing

    assert desk.do(read(desk, scenario())) == result


async def read(desk: Desk, storing: Any) -> bytes:
    return await read_all(desk.spool, await storing)


async def in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


def test_results_that_wait_are_stored_one_after_another(
    small_disk: Path, desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    """Side by side, none of them would ever have all of its room."""
    count, size = 4, DISK_BYTES // 4
    ballast = fill(small_disk)

    async def scenario() -> list[bytes]:
        async def store() -> bytes:
            body = await desk.spool.store_result(in_pieces(os.urandom(size)))
            found = await read_all(desk.spool, body)
            await desk.spool.drop_body(body)
            return found

        storing = [asyncio.create_task(store()) for _ in range(count)]
        await results_wait(capfd, count)
        os.truncate(ballast, ballast.stat().st_size - (size + (64 << 10) * count))
        return await asyncio.gather(*storing)

    assert [len(found) for found in desk.do(scenario())] == [size] * count
    log.flush()
    assert capfd.readouterr().err.count("a result that waited to be stored is stored") == count


def test_result_whose_function_is_slow_keeps_no_other_waiting_once_there_is_ample_room(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    size = 6 << 20  # more than results may have of the reserve

    async def slowly(is_silent: asyncio.Event, goes_on: asyncio.Event) -> AsyncIterator[bytes]:
        async for piece in in_pieces(bytes(size)):
            yield piece
        is_silent.set()
        await goes_on.wait()
        yield b"rest"

    async def scenario(desk: Desk, ballast: Path, full_bytes: int) -> tuple[int, int]:
        is_silent, goes_on = asyncio.Event(), asyncio.Event()
        slow = asyncio.create_task(desk.spool.store_result(slowly(is_silent, goes_on)))
        await results_wait(capfd, 1)
        quick = asyncio.create_task(desk.spool.store_result(in_pieces(bytes(size))))
        await results_wait(capfd, 1)
        os.truncate(ballast, full_bytes - size - (1 << 20))  # room for one of them
        await is_silent.wait()
        assert not quick.done()
        os.truncate(ballast, 0)
        stored = await quick
        assert not slow.done()
        goes_on.set()
        return stored.bytes_count, (await slow).bytes_count

    with mount_small_disk(tmp_path / "disk", AMPLE_BYTES + (32 << 20)):
        desk = Desk(tmp_path / "disk" / "spool")
        try:
            ballast = fill(tmp_path / "disk")
            assert desk.do(scenario(desk, ballast, ballast.stat().st_size)) == (size, size + 4)
        finally:
            desk.close()


def test_result_that_breaks_off_while_it_waits_is_told_from_one_that_never_came(small_disk: Path, desk: Desk) -> None:
    async def broken(after_bytes: int) -> AsyncIterator[bytes]:
        yield bytes(after_bytes)
        raise PeerGone("the function hung up")

    with pytest.raises(PeerGone):
        desk.do(desk.spool.store_result(broken(INLINE_BYTES * 2)))
    ballast = fill(small_disk)

    async def scenario() -> None:
        storing = asyncio.create_task(desk.spool.store_result(broken(DISK_BYTES // 2)))
        await wait_for_want_of_room(desk)
        ballast.unlink()
        await storing

    with pytest.raises(ResultLost, match="the function hung up"):
        desk.do(scenario())
    assert desk.body_files() == set()


def test_call_that_is_done_gives_its_payload_only_when_the_disk_is_short(small_disk: Path, desk: Desk) -> None:
    calls = [desk.put(body=inline(bytes(1000))) for _ in range(3)]
    leases = desk.claim(3)
    desk.finish(leases[0])
    fill(small_disk)
    desk.release_reserve()
    fill(small_disk).rename(small_disk / "more")
    (small_disk / "more").unlink()  # room for steps, none for the whole reserve
    fill_but(small_disk, DISK_BYTES // 16)
    desk.finish(leases[1])
    desk.finish(leases[2], State.DEAD)
    kept = [desk.get(call.id).body for call in calls]
    assert [body.inline is not None for body in kept] == [True, False, True]  # a dead letter may be run again
    assert [body.bytes_count for body in kept] == [1000] * 3
    assert desk.get(calls[1].id).result == inline(b"out")
    assert START_S  # the clock stands still


def test_call_is_done_with_its_result_when_the_payload_that_made_room_cannot_be_removed(
    small_disk: Path, desk: Desk
) -> None:
    call = desk.put(body=long_body(desk))
    result = long_body(desk)
    (lease,) = desk.claim(1)
    keep_from_being_removed(desk, call.body)
    fill(small_disk)
    desk.release_reserve()
    fill_but(small_disk, DISK_BYTES // 16)  # room for steps, none for the whole reserve
    desk.do(desk.spool.finish(lease, RunEnd(State.DONE, desk.attempt(), 200, 0.1, result)))
    found = desk.get(call.id)
    assert (found.state, found.body.file, found.result) == (State.DONE, None, result)


@pytest.mark.parametrize("step", ["requeue_dead", "purge"])
def test_step_that_is_on_disk_is_told_as_done_when_a_file_cannot_be_removed(desk: Desk, step: str) -> None:
    call = desk.put()
    result = long_body(desk)
    desk.do(desk.spool.finish(desk.claim_one(), RunEnd(State.DEAD, desk.attempt(), 500, 0.1, result)))
    keep_from_being_removed(desk, result)
    if step == "requeue_dead":
        assert desk.do(desk.spool.requeue_dead(call.id)).state is State.QUEUED
    else:
        assert desk.do(desk.spool.purge(state=State.DEAD)) == 1


def keep_from_being_removed(desk: Desk, body: StoredBody) -> None:
    path = desk.directory / "bodies" / str(body.file)
    path.unlink()
    path.mkdir()


def fill_but(directory: Path, left_bytes: int) -> None:
    ballast = fill(directory).rename(directory / "rest")
    os.truncate(ballast, max(0, ballast.stat().st_size - left_bytes))


def test_short_result_passes_a_long_one_that_waits(small_disk: Path, desk: Desk) -> None:
    """The long one holds nothing while it waits, and so the room that the short one leaves is its own at last."""
    long, short = os.urandom(DISK_BYTES), os.urandom(INLINE_BYTES * 2)

    async def scenario() -> None:
        waiting = asyncio.create_task(desk.spool.store_result(in_pieces(long), None, len(long)))
        stored = await desk.spool.store_result(in_pieces(short), None, len(short))
        assert await read_all(desk.spool, stored) == short
        assert not waiting.done()
        assert sum(path.stat().st_size for path in (desk.directory / "bodies").iterdir()) == len(short)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert desk.body_files() == {stored.file}

    desk.do(scenario())


@pytest.mark.parametrize("announced", [100_000, 400_000])
def test_result_of_another_length_than_announced_is_stored_as_it_came(desk: Desk, announced: int) -> None:
    body = os.urandom(200_000)
    stored = desk.do(desk.spool.store_result(in_pieces(body), None, announced))
    assert stored.bytes_count == len(body)
    assert desk.do(read_all(desk.spool, stored)) == body
