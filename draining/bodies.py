"""Bodies as a worker handles them: received, stored, sent, shown in part, dropped.

Contract: what is to be sent is opened before a request begins, so that a body that is lost uses up no attempt; of an
answer that breaks off, what came is kept; what cannot be dropped now is left to the queue's sweep, and never an error.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from functools import partial

from ..calls.model import EXCERPT_BYTES, StoredBody
from ..queues import Queue
from ..watchdog import FaashoundError, PeerGone, SentBody, UpstreamTimeout, log

HELD_UP_S = 1.0  # of a reader that has no room: it may be why an answer breaks off


class ReceivedBody:
    """An answer's body that ends where it breaks off, so that what came can be kept; `error` says why it did, if so.

    One whose reader has kept it waiting breaks off as ever, since the sender may have lost its patience with us.
    """

    def __init__(self, body: AsyncIterator[bytes]) -> None:
        self.error: FaashoundError | None = None
        self.bytes_count = 0
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield what comes; raises PeerGone or UpstreamTimeout only if the reader was slow."""
        is_held_up = False
        try:
            async for piece in self._body:
                self.bytes_count += len(piece)
                given_s = time.monotonic()
                yield piece
                is_held_up |= time.monotonic() - given_s >= HELD_UP_S
        except (PeerGone, UpstreamTimeout) as error:
            if is_held_up:
                raise
            self.error = error


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
