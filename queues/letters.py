"""What people ask of a queue: lists of calls, one call whole, and what becomes of dead letters."""

from __future__ import annotations

from collections.abc import AsyncIterator

from ..calls.model import FINAL, Call, CallbackState, CallUnknown, State, StoredBody
from ..calls.names import FunctionName
from ..calls.views import (
    MAX_LISTED_COUNT,
    SHOWN_BODY_BYTES,
    Choice,
    Json,
    _describe_attempt,
    _shown_headers,
    _without_none,
    describe_body,
    describe_call,
)
from ..watchdog import FaashoundError
from . import Queue


async def describe_call_whole(queue: Queue, call: Call) -> Json:
    """Return all that an operator may know of a call: the above, and payload, headers, attempts and response."""
    more = {
        "queue": call.queue,
        "method": call.method,
        "path": call.path,
        "query": call.query,
        "headers": _shown_headers(call.headers),
        "body": describe_body(await _read_start(queue, call.body), call.body.bytes_count),
        "callback_url": call.callback_url,
        "idempotency_key": call.idempotency_key,
        "history": [_describe_attempt(attempt) for attempt in call.history],
    }
    if call.result is not None:
        start = await _read_start(queue, call.result)
        more["result_headers"] = _shown_headers(call.result_headers)
        more["result"] = describe_body(start, call.result.bytes_count)
    elif call.excerpt is not None:
        more["excerpt"] = describe_body(call.excerpt, len(call.excerpt))
    return describe_call(call) | _without_none(more)


async def _read_start(queue: Queue, body: StoredBody) -> bytes:
    async for piece in queue.open_body(body, SHOWN_BODY_BYTES):
        return piece
    return b""


async def walk_calls(queue: Queue, choice: Choice) -> AsyncIterator[Call]:
    """Yield the calls of `choice`, newest first, whatever its limit; CallUnknown if there is none called `before`."""
    before = choice.before
    while True:
        page = await queue.calls(state=choice.state, function=choice.function, limit=MAX_LISTED_COUNT, before=before)
        for call in page:
            if choice.callback is None or (call.callback is not None and call.callback.state is choice.callback):
                yield call
        if len(page) < MAX_LISTED_COUNT:
            return
        before = page[-1].id


async def list_calls(queue: Queue, choice: Choice) -> list[Call]:
    """Return the calls of `choice`, newest first, at most as many as its limit."""
    if choice.callback is None:
        return await queue.calls(
            state=choice.state, function=choice.function, limit=choice.limit_count, before=choice.before
        )
    found = []
    async for call in walk_calls(queue, choice):
        found.append(call)
        if len(found) == choice.limit_count:
            break
    return found


async def find_call(queue: Queue, call_id: str) -> Call:
    """Return the call with this id; raises CallUnknown."""
    call = await queue.get(call_id)
    if call is None:
        raise CallUnknown(f"no call has the id {call_id[:100]}")
    return call


async def retry_letter(queue: Queue, call_id: str) -> Call:
    """Queue a dead letter again, or if only its callback is dead that one; return the call as it is now.

    Raises CallUnknown, CallNotDead.
    """
    call = await find_call(queue, call_id)
    if call.state is not State.DEAD and call.callback is not None:
        return await queue.requeue_callback(call_id)
    return await queue.requeue_dead(call_id)


class NotEnded(FaashoundError):
    """What is not over, or not delivered, cannot be deleted."""

    status = 409


async def purge_call(queue: Queue, call_id: str) -> None:
    """Delete one call that has ended.  Raises CallUnknown, NotEnded."""
    call = await find_call(queue, call_id)
    if call.state not in FINAL:
        raise NotEnded(f"the call is {call.state.value}; DELETE /async-function/{call_id} cancels it")
    if not await queue.purge(state=call.state, call_id=call_id):
        raise NotEnded("the call's callback is still to be delivered")


# ---------------------------------------------------------------------------------------------------------------
# In a shell: fworker dead ...
# ---------------------------------------------------------------------------------------------------------------


async def walk_letters(queue: Queue, function: FunctionName | None) -> AsyncIterator[Call]:
    """Yield every dead letter and every call whose callback is dead, newest first within each kind."""
    async for call in walk_calls(queue, Choice(State.DEAD, function)):
        yield call
    left = (await queue.stats()).callback_dead_count  # so that a queue without any is not read to its end
    for state in (State.DONE, State.EXPIRED) if left else ():
        async for call in walk_calls(queue, Choice(state, function, CallbackState.DEAD)):
            yield call
            left -= 1
            if not left:
                return
