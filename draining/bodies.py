"""Stored bodies as a worker handles them: sent, shown in part, dropped."""

from __future__ import annotations

from contextlib import aclosing, suppress
from functools import partial

from ..calls.model import EXCERPT_BYTES, StoredBody
from ..queues import Queue
from ..watchdog import FaashoundError, SentBody, log


async def sendable(queue: Queue, body: StoredBody) -> SentBody:
    """Return what a client can send of a stored body; raises what opening it raises, before anything is sent."""
    if body.file is None:
        return body.inline or b""
    async with aclosing(queue.open_body(body, 1)) as pieces:
        await anext(pieces, None)
    return partial(queue.open_body, body)


async def take_excerpt(queue: Queue, body: StoredBody | None) -> bytes | None:
    """Return the beginning of a failed answer, and drop the rest; None if there is no answer."""
    if body is None:
        return None
    try:
        async for chunk in queue.open_body(body, EXCERPT_BYTES):
            return chunk
        return b""
    except FaashoundError as error:  # the outcome is worth more than how the answer began
        log.warning(f"the beginning of an answer is lost: {error}")
        return None
    finally:
        await drop(queue, body)


async def drop(queue: Queue, body: StoredBody | None) -> None:
    """Drop a stored body, if there is one.  One that cannot be dropped now is found by the queue's sweep."""
    if body is not None:
        with suppress(FaashoundError):
            await queue.drop_body(body)
