"""/async-function/ID: what becomes of one call, for the caller who knows its id.

    GET     where it stands; ?wait=30s waits for its end
    GET     .../result, the response of the function
    DELETE  cancels, queued or running

What it promises: a wait ends with the call, with its time, or when the gateway begins to drain, and then tells how the
call stands.  What it refuses: more waits at once than `max_long_polls`, since each holds a connection for minutes.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from contextlib import suppress

from ..calls.model import FINAL, Call, State
from ..calls.views import describe_call
from ..queues import Queue
from ..queues.inspection import find_call
from ..watchdog import FaashoundError, Request, Response, end_to_end, parse_duration
from .access import Access
from .answers import BadField, Conflict, Gone, NotFound, allow, json_response
from .function_pages import fields_of_result

MAX_WAIT_S = 600.0  # of ?wait: longer than proxies keep a silent connection
LONG_POLL_RETRY_S = 5  # after so long a caller may try to wait again, if there are too many


class TooManyWaits(FaashoundError):
    """As many callers as may wait for calls to end already do."""

    status = 503
    headers = ((b"Retry-After", b"%d" % LONG_POLL_RETRY_S),)

    def __init__(self, limit_count: int) -> None:
        super().__init__(f"{limit_count} callers wait for calls to end, which is max_long_polls; ask without wait")


def parse_wait(query: bytes) -> float:
    """Return the seconds of ?wait=30s, 0 without it; BadField for anything else in the query."""
    wait_s = 0.0
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name != "wait":
            raise BadField(f"unknown query parameter {name[:100]!r}; allowed: wait")
        try:
            wait_s = parse_duration(value)
        except ValueError as error:
            raise BadField(f"wait={value[:100]!r}: {error}") from None
    if wait_s > MAX_WAIT_S:
        raise BadField(f"wait: allowed: up to {MAX_WAIT_S:g}s")
    return wait_s


class CallStatus:
    """Tells of calls in a queue; `max_long_polls` is what one process may have waiting, `told_limit` what all may."""

    def __init__(self, queue: Queue, access: Access, max_long_polls: int, told_limit: int) -> None:
        self._queue = queue
        self._access = access
        self._max_long_polls = max_long_polls
        self._told_limit = told_limit
        self._waits: set[asyncio.Timeout] = set()
        self._draining = False

    def drain(self) -> None:
        """Let no caller wait any longer for a call to end."""
        self._draining = True
        for limit in self._waits:
            if not limit.expired():  # its task may be yet to find out, and then it can be set no more
                limit.reschedule(asyncio.get_running_loop().time())

    async def answer(self, request: Request, call_id: str, rest: bytes) -> Response:
        """GET status or result, DELETE: of one call."""
        if rest not in (b"", b"/result"):
            raise NotFound("not found; allowed: /async-function/CALL-ID and /async-function/CALL-ID/result")
        allow(request, *(("GET",) if rest else ("GET", "DELETE")))
        await self._access.authorize(request)
        if request.method == "DELETE":
            state = await self._queue.cancel(call_id)
            return json_response(202, {"id": call_id, "state": state.value, "cancel_requested": True})
        call = await self._wait(call_id, parse_wait(request.query))
        return await self._result(request, call) if rest else json_response(200, describe_call(call))

    async def _wait(self, call_id: str, wait_s: float) -> Call:
        """Return the call when it has ended, or as it is after `wait_s` or when we begin to drain."""
        call = await find_call(self._queue, call_id)
        if not wait_s or self._draining or call.state in FINAL:
            return call
        if len(self._waits) >= self._max_long_polls:
            raise TooManyWaits(self._told_limit)
        limit = asyncio.timeout(wait_s)
        self._waits.add(limit)
        try:
            with suppress(TimeoutError):
                async with limit:
                    return await self._queue.wait(call_id, wait_s)
        finally:
            self._waits.discard(limit)
        return await find_call(self._queue, call_id)

    async def _result(self, request: Request, call: Call) -> Response:
        """Return what the function answered, as it answered, to be saved and not shown (function_pages.py)."""
        if call.state not in FINAL:
            raise Conflict(f"the call is {call.state.value}; ?wait=30s waits for its end")
        if call.result is None or call.status is None:
            dropped = call.state is State.DONE or (call.state is State.DEAD and call.excerpt is not None)
            if dropped:
                raise Gone("the result is no longer kept (keep_results)")
            raise NotFound(f"the call is {call.state.value} and has no result: {call.error or 'it never ran'}")
        fields = [(name.encode(), value.encode("latin-1")) for name, value in call.result_headers]
        fields = [*fields_of_result(end_to_end(fields, b"x-call-id")), (b"X-Call-Id", call.id.encode())]
        body = b"" if request.method == "HEAD" else self._queue.open_body(call.result)
        return Response(call.status, fields, body, call.result.bytes_count)
