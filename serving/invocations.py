"""/function/NAME: a request goes to its function and the answer comes back, while the caller waits.

    invocations = Invocations(settings, functions, gate, via, metrics)
    response = await invocations.answer(request, "cat", b"/path")
    await invocations.close()

What it promises: status, headers (but see function_pages.py) and body as the function sent them, streamed both ways as
they come, of a 101 (WebSocket and the like) until neither side has said a word for upstream_timeout; every answer, ours
too, carries X-Call-Id and X-Start-Time, is counted, and is a line in the log.  A failure of ours bears
X-OpenFaaS-Internal, by which a worker knows that not the function has spoken, and tells a stranger no address.

What it refuses to do: retry, follow redirects, or cut a worker's call, which waits for as long as it likes.
"""

from __future__ import annotations

import asyncio
import math
import time

from ..calls.ids import new_call_id
from ..functions.exposure import TRUST
from ..functions.table import Function, Functions, completes_host
from ..network.addresses import AddressRefused, guard_functions
from ..network.lookups import strangers_names, system_names
from ..watchdog import (
    CLIENT_GONE_STATUS,
    Client,
    ClientResponse,
    FaashoundError,
    Header,
    NotReady,
    PeerGone,
    Request,
    Response,
    Unreachable,
    UpstreamTimeout,
    call_id_of,
    check_path,
    end_to_end,
    error_response,
    format_duration,
    log,
    relayed,
    sent_body,
)
from .answers import NO_FUNCTION
from .function_pages import fields_for_browsers, place_of_pages
from .gates import FunctionGate, check_enabled
from .metrics import GatewayMetrics
from .proxying import ID_FIELDS, OurVia, RequestIds, fields_of_worker, fields_passed_on, function_target
from .settings import Settings

MOVES_WITHIN_S = 10.0  # a function whose process has died; what takes its place imports nothing and starts at once


MOVED_POLL_S = 0.05


class OurFailure(FaashoundError):
    """The gateway's own answer in place of a function's: marked so that a worker knows it and tries again."""

    headers = ((b"X-OpenFaaS-Internal", b"gateway"),)

    def __init__(self, status: int, text: str) -> None:
        self.status = status  # type: ignore[misc]  # the one error whose status is another's
        super().__init__(text)


class Invocations:
    """Passes requests on to functions."""

    def __init__(
        self, settings: Settings, functions: Functions, gate: FunctionGate, via: OurVia, metrics: GatewayMetrics
    ) -> None:
        self._upstream_timeout_s = settings.upstream_timeout_s
        self._pages = settings.function_pages
        self._functions = functions
        self._gate = gate
        self._via = via
        self._metrics = metrics
        self._names = system_names()
        self._client = Client(self._names)
        self._found_names = strangers_names()
        guarded = completes_host(settings.function_url)
        self._found_client = Client(guard_functions(self._found_names)) if guarded else self._client

    async def close(self) -> None:
        """Let go of the connections to functions."""
        for each in (self._client, self._found_client, self._names, self._found_names):
            await each.close()

    async def answer(self, request: Request, name: str, rest: bytes) -> Response:
        """Pass a request on to its function; the errors that may come of it are answers too."""
        by_worker = self._gate.access.is_worker(request)
        start_time = (by_worker and request.header(b"x-start-time")) or b"%d" % time.time_ns()
        ids = RequestIds(call_id_of(request) or new_call_id(), start_time)
        function, refusal = self._find(name)
        label = self._metrics.begin(function, listed=function is not None and function.name in self._functions)
        started_s, status = time.perf_counter(), CLIENT_GONE_STATUS
        reason: dict[str, object] = {}
        try:
            if function is None:
                raise refusal
            response = await self._call(request, function, rest, ids, by_worker)
            status = response.status
        except FaashoundError as error:
            response = error_response(error)
            response.headers = (*response.headers, *ids.fields)
            status, reason = error.status, {"error": error.__cause__ or error}
        finally:
            duration_s = time.perf_counter() - started_s
            self._metrics.end(label, status, duration_s)
            log.info(
                f"Forwarded [{request.method[:20]}] to /function/{name[:100]} - [{status}] - {duration_s:f}s",
                call_id=ids.call_id,
                **reason,
            )
        return response

    def _find(self, name: str) -> tuple[Function | None, OurFailure]:
        """Return the function, and what to answer if there is none."""
        try:
            return self._functions.lookup(name), OurFailure(404, NO_FUNCTION)
        except NotReady as error:
            return None, OurFailure(503, str(error))

    async def _call(
        self, request: Request, function: Function, rest: bytes, ids: RequestIds, by_worker: bool
    ) -> Response:
        check_path(rest)
        if not by_worker:  # whose request bears our entry since its submission
            self._via.check(request)
        dropped = await self._gate.admit(request, function)
        check_enabled(function)
        is_trusted = (function.exposure.pages or self._pages) == TRUST
        leads = None if is_trusted else place_of_pages(request)
        if leads is not None:
            return leads
        headers = (
            fields_of_worker(request, ids, self._via)
            if by_worker
            else fields_passed_on(request, ids, self._via, *dropped)
        )
        if function.local:
            self._metrics.asked(function.name)
        response = await self._send(request, function, rest, headers, by_worker)
        self._metrics.answered(function.name)
        fields = [*end_to_end(response.headers, *ID_FIELDS), *ids.fields]
        if not by_worker:
            fields = fields_for_browsers(request, fields, is_trusted=is_trusted)
        answer = relayed(response, fields, response.body, self._upstream_timeout_s)
        if by_worker:
            answer.write_timeout_s = math.inf
        return answer

    async def _send(
        self, request: Request, function: Function, rest: bytes, headers: list[Header], by_worker: bool
    ) -> ClientResponse:
        """Send the request; raises OurFailure where no answer comes, whose cause is for the log and our workers."""
        limit_s = self._upstream_timeout_s
        deadline_s = None if by_worker else time.monotonic() + limit_s
        body = sent_body(request)  # taken once, and then sent as often as it has to be
        try:
            while True:
                target, client = function_target(function, request, rest), self._client_of(function)
                try:
                    return await client.request(request.method, target, headers, body, request.body.length, deadline_s)
                except Unreachable:  # nothing was sent
                    moved = await self._moved(function, deadline_s or math.inf)
                    if moved is None:
                        raise
                    function = moved
        except UpstreamTimeout as error:
            text = f"{function.name.short} did not answer within upstream_timeout ({format_duration(limit_s)})"
            raise OurFailure(504, text) from error
        except (Unreachable, PeerGone, AddressRefused) as error:
            raise OurFailure(502, f"{function.name.short}: {error if by_worker else 'no answer'}") from error

    async def _moved(self, function: Function, deadline_s: float) -> Function | None:
        """Return a function that has another address than when it was looked up; None if it gets none in time.

        Another version may have taken over while the caller waited to be let in.  Where several processes serve, those
        functions that came after the start end with the process that runs them, and its successor gives them other
        addresses: that is waited for.  Raises OurFailure if there is no such function any more.
        """
        end_s = min(time.monotonic() + MOVES_WITHIN_S, deadline_s)
        while function.local:
            found = self._functions.lookup(function.name)
            if found is None:
                raise OurFailure(404, NO_FUNCTION)
            if found.url != function.url:
                return found
            if not self._functions.are_elsewhere or time.monotonic() >= end_s:
                break
            await asyncio.sleep(MOVED_POLL_S)
        return None

    def _client_of(self, function: Function) -> Client:
        """Return what reaches a function; the address of one that function_url found may have to be judged first."""
        return self._client if function.name in self._functions else self._found_client
