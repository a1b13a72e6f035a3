"""Those who wait for calls to end: one look at the queue for all of them, however many calls end meanwhile.

    waiters = Waiters(spool._read, notifier)
    with waiters.waiting(call_id) as ended: ...            # a future, done once the call has ended
    waiters.look()                                         # some calls have ended: is one of them waited for?

Other processes tell of ends only while somebody waits here: see notifier.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

from ...watchdog import FaashoundError, log
from . import reads
from .notifier import Notifier


class Waiters:
    """Who waits in this process; `read` runs a look-up on a connection of its own."""

    def __init__(
        self, read: Callable[[Callable[[sqlite3.Connection], Any]], Awaitable[Any]], notifier: Notifier
    ) -> None:
        self._read = read
        self._notifier = notifier
        self._futures: dict[str, set[asyncio.Future[None]]] = {}
        self._has_news = False
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    @contextlib.contextmanager
    def waiting(self, call_id: str) -> Iterator[asyncio.Future[None]]:
        """Yield what is done once the call has ended; what has ended before is to be looked for after this."""
        ended = asyncio.get_running_loop().create_future()
        self._futures.setdefault(call_id, set()).add(ended)
        self._notifier.hear_of_ends(True)
        try:
            yield ended
        finally:
            waiting = self._futures.get(call_id, set())
            waiting.discard(ended)
            if not waiting:
                self._futures.pop(call_id, None)
            if not self._futures and not self._closed:
                self._notifier.hear_of_ends(False)

    def look(self) -> None:
        """Some calls have ended: look which of them are waited for."""
        if self._futures:
            self._has_news = True
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._settle())

    async def _settle(self) -> None:
        while self._has_news and self._futures and not self._closed:
            self._has_news = False
            try:
                ended = await self._read(partial(reads.find_ended, call_ids=tuple(self._futures)))
            except FaashoundError as error:
                log.error(f"cannot look for finished calls: {error}")
                return
            for call_id in ended:
                for future in self._futures.pop(call_id, ()):
                    if not future.done():
                        future.set_result(None)

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        if self._looking is not None:
            self._looking.cancel()
