"""One attempt at a call: send it to its function, store what the function answers.

    outcome = await Caller(queue, connections, functions, limits, invocations).attempt(call, upstream)

A call goes to where its function answers, if that is known and can be reached; else through the gateway, which then
answers in the function's place if it cannot reach it either.  So a gateway that restarts cuts no call whose function
runs elsewhere, and no call costs a second hop.  If the gateway is needed and away, the attempt was not made.

Contract: `attempt` raises nothing but CancelledError, which cuts the connection and so ends the function.  An answer
that cannot be stored is an outcome too, UNSTORED, after which the function does not run again; what was stored of it is
dropped.  Of one that breaks off, what came is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..calls.model import Call, QueueFull, QueueUnavailable, ResultLost
from ..calls.retries import AttemptOutcome, OutcomeKind
from ..network.addresses import AddressRefused
from ..network.paths import below
from ..queues import Queue
from ..watchdog import (
    CLIENT_GONE_STATUS,
    BodyTooLarge,
    ClientResponse,
    Header,
    PeerGone,
    SentBody,
    Unreachable,
    UpstreamTimeout,
    body_if_complete,
    log,
)
from .bodies import ReceivedBody, sendable
from .connections import Connections
from .known_functions import KnownAddress, KnownFunctions
from .metrics import InvocationCounters
from .outcomes import GatewayAway, kept_headers, outcome_of_error, outcome_of_part, outcome_of_response


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one attempt may take: time until the last byte of the answer, 0 is no limit, and bytes of the answer."""

    call_timeout_s: float
    max_result_bytes: int


class Caller:
    """Makes calls, each in one attempt.

    `functions` is told when nothing answers where it said; `invocations` counts calls that the gateway does not see.
    """

    def __init__(
        self,
        queue: Queue,
        connections: Connections,
        functions: KnownFunctions,
        limits: CallLimits,
        invocations: InvocationCounters,
    ) -> None:
        self._queue = queue
        self._connections = connections
        self._functions = functions
        self._limits = limits
        self._invocations = invocations

    async def attempt(self, call: Call, upstream: KnownAddress | None) -> AttemptOutcome:
        """Send a call to its function, at `upstream` if that is known, and store what it answers."""
        started = time.monotonic()
        deadline_s = started + self._limits.call_timeout_s if self._limits.call_timeout_s else None
        try:
            body = await sendable(self._queue, call.body)  # before anything is counted
            response = None
            if upstream is not None:
                response = await self._send_directly(call, body, upstream, deadline_s)
            if response is None:
                response = await self._send_through_gateway(call, body, deadline_s)
            async with response:
                outcome = await self._store(call, response)
        except Exception as error:  # noqa: BLE001 - an attempt's boundary: what it raises is recorded, whatever it is
            outcome = outcome_of_error(error, call.id)
        return outcome._replace(duration_s=time.monotonic() - started)

    async def _send_directly(
        self, call: Call, body: SentBody, upstream: KnownAddress, deadline_s: float | None
    ) -> ClientResponse | None:
        """Return the function's response, None if nothing was sent since it cannot be reached at `upstream`."""
        client = self._connections.to_found_functions if upstream.is_guarded else self._connections.to_functions
        started_s, status = time.perf_counter(), CLIENT_GONE_STATUS
        label = self._invocations.begin(call.function)
        try:
            url = below(upstream.url, call.path, call.query)
            response = await client.request(
                call.method, url, call_fields(call), body, call.body.bytes_count, deadline_s
            )
            status = response.status
            return response
        except (Unreachable, AddressRefused) as error:
            log.warning(f"{call.function} is called through the gateway: {error}", call_id=call.id)
            self._functions.on_unreachable(call.function)
            status = 0
            return None
        except UpstreamTimeout:  # whose text may name the address
            status = 504
            raise UpstreamTimeout(f"{call.function.short}: no answer before the deadline (call_timeout)") from None
        except PeerGone:
            status = 502
            raise
        finally:
            self._invocations.end(label, status, time.perf_counter() - started_s)
            if status:
                self._functions.on_direct_call(call.function)

    async def _send_through_gateway(self, call: Call, body: SentBody, deadline_s: float | None) -> ClientResponse:
        fields = [*call_fields(call), self._functions.gateway.token_field]
        url = self._functions.gateway.function_url(call)
        try:
            client = self._connections.to_functions
            return await client.request(call.method, url, fields, body, call.body.bytes_count, deadline_s)
        except Unreachable as error:  # nothing was sent
            raise GatewayAway(str(error)) from error

    async def _store(self, call: Call, response: ClientResponse) -> AttemptOutcome:
        """Store an answer, or what comes of it; where that fails the function has run all the same: an outcome too."""
        limit_bytes, received = self._limits.max_result_bytes, ReceivedBody(response.body)
        whole = body_if_complete(response.body)
        try:
            pieces = whole if isinstance(whole, bytes) else aiter(received)
            body = await self._queue.store_result(pieces, limit_bytes, response.body.length)
        except BodyTooLarge:
            text = f"the answer is longer than max_result, which is {limit_bytes} bytes"
            return AttemptOutcome(OutcomeKind.UNSTORED, error=text)
        except (ResultLost, QueueUnavailable, QueueFull) as error:
            # The queue waits for its disk or its servers by itself, for as long as it is open.  What it raises all the
            # same is no reason to run the function again: it has run, and the caller was promised that once is enough.
            return AttemptOutcome(OutcomeKind.UNSTORED, error=f"the answer could not be stored: {error}")
        headers = kept_headers(response.headers, call.headers)
        if received.error is not None:
            return outcome_of_part(received.error, received.bytes_count)._replace(body=body, headers=headers)
        return outcome_of_response(response, body, headers)


def call_fields(call: Call) -> list[Header]:
    """Return the header fields of a call, as its gateway has prepared them for the function at submission."""
    return [(name.encode(), value.encode("latin-1")) for name, value in call.headers]
