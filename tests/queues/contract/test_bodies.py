"""Bodies: stored, read, dropped, and gone with their calls."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from faashound.calls.model import INLINE_BYTES
from faashound.watchdog import BodyTooLarge
from testkit.harness import eventually
from testkit.queue_kit import Desk, pieces, read_all

LONG_S = 20.0  # how long a test waits for what should come at once


@pytest.mark.parametrize(
    ("sizes", "is_apart"),
    [
        pytest.param([], False, id="nothing"),
        pytest.param([0, 1, 0, 2], False, id="short"),
        pytest.param([-1, 1], False, id="just-inline"),
        pytest.param([-1, 1, 1], True, id="just-too-long"),
        pytest.param([100_000] * 13, True, id="many-pieces"),
        pytest.param([1_300_000], True, id="one-long-piece"),
    ],
)
def test_body_comes_back_as_it_was_stored(desk: Desk, sizes: list[int], is_apart: bool) -> None:
    parts = [os.urandom(size if size >= 0 else desk.inline_bytes + size) for size in sizes]
    body = desk.do(desk.queue.store_body(pieces(*parts)))
    assert (body.file is not None, body.inline is None) == (is_apart, is_apart)
    assert body.bytes_count == len(b"".join(parts))
    assert desk.do(read_all(desk.queue, body, 1000)) == b"".join(parts)


@pytest.mark.parametrize("limit_bytes", [10, INLINE_BYTES + 10, 5 * INLINE_BYTES], ids=["memory", "edge", "file"])
def test_body_over_the_limit_is_refused_and_removed(desk: Desk, limit_bytes: int) -> None:
    parts = [bytes(limit_bytes // 4 + 1)] * 4
    with pytest.raises(BodyTooLarge, match=str(limit_bytes)):
        desk.do(desk.queue.store_body(pieces(*parts), limit_bytes))
    assert desk.bodies() == set()
    assert desk.do(desk.queue.store_body(bytes(limit_bytes), limit_bytes)).bytes_count == limit_bytes


@pytest.mark.parametrize("size", [0, 10, INLINE_BYTES, INLINE_BYTES + 1, 5 * INLINE_BYTES])
def test_result_that_has_come_whole_is_stored_or_refused(desk: Desk, size: int) -> None:
    result = os.urandom(size)
    stored = desk.do(desk.queue.store_result(result, size))
    assert stored.bytes_count == size
    assert desk.do(read_all(desk.queue, stored)) == result
    desk.do(desk.queue.drop_body(stored))
    with pytest.raises(BodyTooLarge, match=str(size)):
        desk.do(desk.queue.store_result(result + b"x", size))
    assert desk.bodies() == set()


async def something_is_stored(desk: Desk) -> None:
    await eventually(desk.stored_bodies, LONG_S, "a body is stored")


def test_body_whose_sender_fails_is_removed(desk: Desk) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield desk.big() * 20
        await something_is_stored(desk)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        desk.do(desk.queue.store_body(failing()))
    assert desk.bodies() == set()


def test_body_whose_storing_is_cancelled_is_removed(desk: Desk) -> None:
    async def scenario() -> None:
        begun = asyncio.Event()

        async def endless() -> AsyncIterator[bytes]:
            yield desk.big() * 20
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(desk.queue.store_body(endless()))
        await begun.wait()
        await something_is_stored(desk)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    desk.do(scenario())
    assert desk.bodies() == set()


def test_body_survives_a_restart_with_its_call(desk: Desk) -> None:
    call = desk.put(body=desk.do(desk.queue.store_body(desk.big())))
    desk.do(desk.queue.close())
    assert desk.do(read_all(desk.open(), call.body)) == desk.big()


def test_dropped_body_leaves_no_file(desk: Desk) -> None:
    body = desk.do(desk.queue.store_body(desk.big()))
    desk.do(desk.queue.drop_body(body))
    assert desk.bodies() == set()
    desk.do(desk.queue.drop_body(body))
