"""What people ask of a queue: lists of calls, one call whole, and what becomes of dead letters.

    await list_calls(queue, CallFilter(state=State.DEAD, limit_count=10))
    await retry_dead_letter(queue, call_id)                      # CallUnknown, CallNotDead
    await purge_call(queue, call_id)                             # CallUnknown, NotEnded

A dead letter is a call that was given up (its state is `dead`), or one whose callback was (`callback.state` is `dead`,
while the call itself may be done).  Both stay until an operator retries or purges them, or `keep_dead` ends them.

Contract: over any Queue; nothing is remembered here, and a list is read page by page.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

from ..calls.model import FINAL, Call, CallbackState, CallUnknown, State, StoredBody
from ..calls.names import FunctionName
from ..calls.views import MAX_LISTED_COUNT, SHOWN_BODY_BYTES, CallFilter, Json, describe_call_whole
from ..watchdog import FaashoundError
from . import Queue


async def show_call(queue: Queue, call: Call) -> Json:
    """Return all that an operator may know of a call; the beginnings of its bodies are read."""
    result_start = b"" if call.result is None else await _read_start(queue, call.result)
    return describe_call_whole(call, await _read_start(queue, call.body), result_start)


async def _read_start(queue: Queue, body: StoredBody) -> bytes:
    async for piece in queue.open_body(body, SHOWN_BODY_BYTES):
        return piece
    return b""


async def walk_calls(queue: Queue, wanted: CallFilter) -> AsyncIterator[Call]:
    """Yield the calls of `wanted`, newest first, whatever its limit; CallUnknown if there is none called `before`."""
    wanted = replace(wanted, limit_count=MAX_LISTED_COUNT)
    while True:
        page = await list_calls(queue, wanted)
        for call in page:
            yield call
        if len(page) < MAX_LISTED_COUNT:
            return
        wanted = replace(wanted, before=page[-1].id)


async def list_calls(queue: Queue, wanted: CallFilter) -> list[Call]:
    """Return the calls of `wanted`, newest first, at most as many as its limit."""
    return await queue.calls(
        state=wanted.state,
        function=wanted.function,
        limit=wanted.limit_count,
        before=wanted.before,
        callback=wanted.callback,
        id_start=wanted.id_start,
    )


async def find_call(queue: Queue, call_id: str) -> Call:
    """Return the call with this id; raises CallUnknown."""
    call = await queue.get(call_id)
    if call is None:
        raise CallUnknown(f"no call has the id {call_id[:100]}")
    return call


async def retry_dead_letter(queue: Queue, call_id: str) -> Call:
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


async def walk_dead_letters(queue: Queue, function: FunctionName | None) -> AsyncIterator[Call]:
    """Yield every dead letter and every call whose callback is dead, newest first within each kind."""
    async for call in walk_calls(queue, CallFilter(State.DEAD, function)):
        yield call
    left = (await queue.stats()).callback_dead_count  # so that a queue without any is not read to its end
    for state in (State.DONE, State.EXPIRED) if left else ():
        async for call in walk_calls(queue, CallFilter(state, function, CallbackState.DEAD)):
            yield call
            left -= 1
            if not left:
                return
