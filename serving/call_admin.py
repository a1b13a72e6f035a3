"""/system/calls: what operators see of calls, and do with them.

    GET     calls by ?state= ?function= ?callback= ?id= ?limit= ?before=; .../ID one of them whole
    DELETE  deletes those of ?state= that have ended; .../ID one of them
    POST    .../cancel cancels what is queued, of one ?function= or of all; .../ID/retry queues a dead letter again

What it refuses to do: delete what has not ended, or act on calls that a query does not name plainly.
"""

from __future__ import annotations

from ..calls.model import FINAL
from ..calls.views import CallFilter, describe_call, parse_call_filter
from ..queues import Queue
from ..queues.inspection import find_call, list_calls, purge_call, retry_dead_letter, show_call
from ..watchdog import Request, Response
from .answers import BadField, NotFound, allow, json_response


class CallAdmin:
    """Shows and changes the calls of a queue; the caller has been let in by then."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    async def answer(self, request: Request, rest: str) -> Response:
        """Answer a request for what stands behind /system/calls."""
        if not rest:
            allow(request, "GET", "DELETE")
            call_filter = parse_call_filter(request.query)
            return await (self._purge(call_filter) if request.method == "DELETE" else self._list(call_filter))
        call_id, _, verb = rest[1:].partition("/")
        call_id = call_id.lower()
        if call_id == "cancel" and not verb:
            allow(request, "POST")
            return await self._cancel_queued(parse_call_filter(request.query))
        if verb == "retry":
            allow(request, "POST")
            return json_response(202, describe_call(await retry_dead_letter(self._queue, call_id)))
        if verb:
            raise NotFound("not found; allowed: /system/calls/CALL-ID and /system/calls/CALL-ID/retry")
        allow(request, "GET", "DELETE")
        if request.method == "DELETE":
            await purge_call(self._queue, call_id)
            return Response(204)
        return json_response(200, await show_call(self._queue, await find_call(self._queue, call_id)))

    async def _list(self, call_filter: CallFilter) -> Response:
        calls = await list_calls(self._queue, call_filter)
        before = calls[-1].id if len(calls) == call_filter.limit_count else None
        return json_response(200, {"calls": [describe_call(call) for call in calls], "before": before})

    async def _cancel_queued(self, call_filter: CallFilter) -> Response:
        if call_filter != CallFilter(function=call_filter.function):
            raise BadField("allowed: ?function=, or nothing for every function")
        return json_response(200, {"cancelled": await self._queue.cancel_queued(function=call_filter.function)})

    async def _purge(self, call_filter: CallFilter) -> Response:
        if call_filter.state not in FINAL or call_filter != CallFilter(call_filter.state, call_filter.function):
            states = ", ".join(sorted(state.value for state in FINAL))
            raise BadField(
                f"allowed: ?state= and, if need be, &function=; state must be one of {states};"
                " POST /system/calls/cancel cancels what is queued"
            )
        count = await self._queue.purge(state=call_filter.state, function=call_filter.function)
        return json_response(200, {"deleted": count})
