"""One attempt at a call: send it to its function, store what the function answers.

    outcome = await Caller(queue, client, gateway, CallLimits(...)).attempt(call)

Contract: `attempt` raises nothing but CancelledError, which cuts the connection and so ends the function.  An answer
that cannot be stored is an outcome too, and what was sent of it is dropped.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from ..calls.model import Call, QueueFull, QueueUnavailable, ResultLost
from ..calls.retries import AttemptOutcome, OutcomeKind
from ..queues import Queue
from ..watchdog import BodyTooLarge, Client, ClientResponse, Header
from .bodies import sendable
from .gateway import GatewayAccess
from .outcomes import kept_headers, outcome_of_error, outcome_of_response


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one attempt may take: time until the last byte of the answer, 0 is no limit, and bytes of the answer."""

    call_timeout_s: float
    max_result_bytes: int


class Caller:
    """Makes calls, each in one attempt."""

    def __init__(self, queue: Queue, client: Client, gateway: GatewayAccess, limits: CallLimits) -> None:
        self._queue = queue
        self._client = client
        self._gateway = gateway
        self._limits = limits

    async def attempt(self, call: Call) -> AttemptOutcome:
        """Send a call to its function and store what it answers."""
        started = time.monotonic()
        try:
            async with await self._send(call, started) as response:
                outcome = await self._store(response)
        except Exception as error:  # noqa: BLE001 - an attempt's boundary: what it raises is recorded, whatever it is
            outcome = outcome_of_error(error, call.id)
        return dataclasses.replace(outcome, duration_s=time.monotonic() - started)

    async def _send(self, call: Call, started: float) -> ClientResponse:
        return await self._client.request(
            call.method,
            self._gateway.function_url(call),
            [*call_fields(call), self._gateway.token_field],
            await sendable(self._queue, call.body),
            call.body.bytes_count,
            started + self._limits.call_timeout_s if self._limits.call_timeout_s else None,
        )

    async def _store(self, response: ClientResponse) -> AttemptOutcome:
        """Store an answer; where that fails the function has run nevertheless, and the outcome says so."""
        limit_bytes = self._limits.max_result_bytes
        try:
            body = await self._queue.store_result(response.body, limit_bytes, response.body.length)
        except BodyTooLarge:
            text = f"the answer is longer than max_result, which is {limit_bytes} bytes"
            return AttemptOutcome(OutcomeKind.UNSTORED, error=text)
        except ResultLost as error:
            return AttemptOutcome(OutcomeKind.UNSTORED, error=str(error))
        except (QueueUnavailable, QueueFull) as error:
            return AttemptOutcome(OutcomeKind.UNREACHABLE, error=f"the answer could not be stored: {error}")
        return dataclasses.replace(outcome_of_response(response), body=body, headers=kept_headers(response))


def call_fields(call: Call) -> list[Header]:
    """Return the header fields of a call as it was submitted."""
    return [(name.encode(), value.encode("latin-1")) for name, value in call.headers]
