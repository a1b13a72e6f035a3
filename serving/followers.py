"""Clients that follow what goes on: how many there may be, and how long one may stall, or go on without its right.

    followers = Followers("events", "ask /system/calls instead", settings.write_timeout_s)
    body = followers.join(request, body)                      # TooManyFollowers
    body = Watched(body, request, is_allowed)                 # for whom a right was checked

What it promises: one address never has more than half of the places; a place is given back when its client has gone, or
has taken nothing of what was sent to it for as long as a whole answer may take; who loses the right to follow is cut
off within WATCHED_EVERY_S.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Self

from ..watchdog import FaashoundError, Request, Stream
from .passwords import network_of

MAX_FOLLOWERS_COUNT = 40  # of one thing; the socket by which other processes of ours ask has room for those of all
MAX_OF_ADDRESS_COUNT = MAX_FOLLOWERS_COUNT // 2
RETRY_S = 5
WATCHED_EVERY_S = 0.5


class TooManyFollowers(FaashoundError):
    """As many clients as may follow already do, of all addresses or of this one."""

    status = 503
    headers = ((b"Retry-After", b"%d" % RETRY_S),)


class Followers:
    """The clients that follow one thing, `what`; `advice` tells those that cannot what to do."""

    def __init__(self, what: str, advice: str, write_timeout_s: float) -> None:
        self._what = what
        self._advice = advice
        self._write_timeout_s = write_timeout_s
        self._addresses: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._addresses.total()

    def join(self, request: Request, body: Stream) -> Stream:
        """Return `body` as it is sent to a client that has a place until it is closed; raises TooManyFollowers."""
        address = network_of(request.peer)
        for count, limit, whose in (
            (self.count, MAX_FOLLOWERS_COUNT, ""),
            (self._addresses[address], MAX_OF_ADDRESS_COUNT, " of this address"),
        ):
            if count >= limit:
                raise TooManyFollowers(f"{limit} clients{whose} follow {self._what} already; {self._advice}")
        self._addresses[address] += 1
        return _Followed(body, request, self._write_timeout_s, lambda: self._leave(address))

    def _leave(self, address: str) -> None:
        self._addresses[address] -= 1
        self._addresses += Counter()  # without those that have none


class _Passed:
    """A stream as it comes, which is watched by a timer."""

    def __init__(self, body: Stream) -> None:
        self._body = body
        self._pieces = aiter(body)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._pieces)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def aclose(self) -> None:
        """Release what the pieces come from."""
        self._stop_timer()
        await self._body.aclose()


class _Followed(_Passed):
    """A stream with a place: the client that lets a piece lie is cut off."""

    def __init__(self, body: Stream, request: Request, write_timeout_s: float, leave: Callable[[], None]) -> None:
        super().__init__(body)
        self._request = request
        self._write_timeout_s = write_timeout_s
        self._leave: Callable[[], None] | None = leave

    async def __anext__(self) -> bytes:
        self._stop_timer()
        piece = await super().__anext__()
        self._timer = self._loop.call_later(self._write_timeout_s, self._request.abort)
        return piece

    async def aclose(self) -> None:
        """Give the place back."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()
        await super().aclose()


class Watched(_Passed):
    """A stream whose client is cut off as soon as `is_allowed` says no."""

    def __init__(self, body: Stream, request: Request, is_allowed: Callable[[], bool]) -> None:
        super().__init__(body)
        self._request = request
        self._is_allowed = is_allowed
        self._look()

    def _look(self) -> None:
        if self._is_allowed():
            self._timer = self._loop.call_later(WATCHED_EVERY_S, self._look)
        else:
            self._request.abort()
