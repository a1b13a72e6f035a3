"""The limit that many tasks have in common: each is late at its own time, and only a late one is told so."""

from __future__ import annotations

import asyncio
import time

import pytest

from faashound.serving.shared_limit import SharedLimit

LIMIT_S = 0.2
LONG_S = 60.0


def test_limit_ends_each_task_when_its_own_time_is_over() -> None:
    async def one(limit: SharedLimit, delay_s: float) -> float:
        await asyncio.sleep(delay_s)
        began_s = time.monotonic()
        with pytest.raises(TimeoutError), limit:
            await asyncio.sleep(LONG_S)
        return time.monotonic() - began_s

    async def all_of_them() -> list[float]:
        limit = SharedLimit(LIMIT_S)
        return await asyncio.gather(*(one(limit, number * LIMIT_S / 3) for number in range(5)))

    assert all(LIMIT_S - 0.01 <= taken_s < LONG_S / 4 for taken_s in asyncio.run(all_of_them()))


def test_limit_hands_on_what_the_work_brings() -> None:
    async def scenario() -> str:
        with SharedLimit(LIMIT_S):
            return await asyncio.sleep(0, "done")

    assert asyncio.run(scenario()) == "done"


def test_limit_leaves_a_cancellation_alone_when_somebody_else_wants_it() -> None:
    async def limited() -> None:
        with SharedLimit(LONG_S):
            await asyncio.sleep(LONG_S)

    async def scenario() -> asyncio.Task[None]:
        task = asyncio.create_task(limited())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task

    assert asyncio.run(scenario()).cancelled()


def test_limit_may_be_used_again_by_the_same_task() -> None:
    async def scenario() -> None:
        limit = SharedLimit(LIMIT_S)
        for _ in range(2):
            with pytest.raises(TimeoutError), limit:
                await asyncio.sleep(LONG_S)
        with limit:
            await asyncio.sleep(0)

    asyncio.run(scenario())
