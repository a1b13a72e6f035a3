"""POST /async-function/NAME: a call is put into the queue, and its caller may go.

    submissions = Submissions(settings, functions, queue, policy, access, gate, ...)
    response = await submissions.answer(request, "cat", b"/path")

What it promises: 202 only for a call that is durable.  All that can be wrong with a call is told before its body is
read; the same Idempotency-Key is the same call, and another body under it is refused.  Every answer is counted and is
a line in the log; a refusal carries the id that the caller gave.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from ..calls.callbacks import CallbackPolicy
from ..calls.ids import new_call_id
from ..calls.model import NewCall, QueueUnavailable
from ..functions.table import Function, Functions
from ..queues import Queue
from ..watchdog import (
    CLIENT_GONE_STATUS,
    Body,
    BodyTooLarge,
    FaashoundError,
    Request,
    Response,
    body_if_complete,
    call_id_of,
    check_path,
    error_response,
    format_duration,
    log,
    parse_duration,
    parse_positive_duration,
)
from .access import Access
from .answers import NO_FUNCTION, BadField, NotFound, allow
from .gates import FunctionGate
from .health import Health
from .metrics import GatewayMetrics
from .proxying import OurVia, RequestIds, fields_passed_on
from .settings import Settings
from .shared_limit import SharedLimit

MAX_PUT_S = 10.0  # for a queue to take a call; a disk, or the process that holds the queue's lock, may be stuck
MAX_KEY_CHARS = 255  # of an Idempotency-Key, as the drafts and peers have it

# ---------------------------------------------------------------------------------------------------------------
# What a submission asks for (pure).
# ---------------------------------------------------------------------------------------------------------------

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_KEY = re.compile(rf"[\x21-\x7e](?:[\x20-\x7e]{{0,{MAX_KEY_CHARS - 2}}}[\x21-\x7e])?", re.ASCII)

# Meant for the queue: not the function's business when the call is made.
_SUBMISSION_FIELDS = (b"x-delay", b"x-expires", b"idempotency-key")


def is_call_id(text: str) -> bool:
    """Tell whether `text` has the form of a call's id, which no function's name has."""
    return bool(_UUID.fullmatch(text))


def parse_span(request: Request, name: str, parse: Callable[[str], float]) -> float | None:
    """Return the seconds that a header field such as X-Delay asks for; BadField names it and what is allowed."""
    value = request.header(name.lower().encode())
    if not value:
        return None
    text = value.decode("latin-1")
    try:
        return parse(text)
    except ValueError as error:
        raise BadField(f"{name}: {text[:100]!r}: {error}") from None


def parse_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a submission; BadField for one that is no visible text of a sane length."""
    value = request.header(b"idempotency-key")
    if value is None:
        return None
    text = value.decode("latin-1")
    if not _KEY.fullmatch(text):
        raise BadField(f"Idempotency-Key: allowed: 1 to {MAX_KEY_CHARS} visible ASCII characters")
    return text


class Times(NamedTuple):
    """When a call is accepted, due, and no longer wanted, in seconds since the epoch."""

    accepted_s: float
    due_s: float
    expires_s: float | None


def parse_times(request: Request, max_delay_s: float, now_s: float) -> Times:
    """Return what X-Delay and X-Expires ask for; raises BadField."""

    def parse_delay(text: str) -> float:
        delay_s = parse_duration(text)
        if delay_s > max_delay_s:
            raise ValueError(f"allowed: up to {format_duration(max_delay_s)} (max_delay)")
        return delay_s

    delay_s = parse_span(request, "X-Delay", parse_delay)
    expires_s = parse_span(request, "X-Expires", parse_positive_duration)
    if delay_s is not None and expires_s is not None and expires_s <= delay_s:
        raise BadField("X-Expires is not longer than X-Delay: the call could never run")
    return Times(now_s, now_s + (delay_s or 0.0), None if expires_s is None else now_s + expires_s)


class RequestDigest:
    """What an Idempotency-Key stands for: method, path, query, content type and body, which is fed as it passes."""

    def __init__(self, request: Request, rest: bytes) -> None:
        self._hash = hashlib.sha256()
        for part in (request.method.encode(), rest, request.query, request.header(b"content-type") or b""):
            self._hash.update(b"%d:%b" % (len(part), part))  # with its length, or parts could be shifted

    async def passing(self, body: Body | bytes) -> AsyncIterator[bytes]:
        """Yield a body, and take note of it."""
        if isinstance(body, bytes):
            self._hash.update(body)
            yield body
            return
        async for chunk in body:
            self._hash.update(chunk)
            yield chunk

    def hex(self) -> str:
        """Return the digest, once the body has passed."""
        return self._hash.hexdigest()


def format_start_time(epoch_s: float) -> bytes:
    """Return the X-Start-Time of a call: ns since the epoch."""
    return b"%d" % int(epoch_s * 1e9)


# ---------------------------------------------------------------------------------------------------------------
# The route.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submissions:
    """Puts calls into the queue."""

    settings: Settings
    functions: Functions
    queue: Queue
    policy: CallbackPolicy
    access: Access
    gate: FunctionGate
    via: OurVia
    metrics: GatewayMetrics
    health: Health
    _put_limit: SharedLimit = field(default_factory=partial(SharedLimit, MAX_PUT_S))

    async def answer(self, request: Request, name: str, rest: bytes) -> Response:
        """Queue a call; the errors that may come of it are answers too."""
        status, call_id = CLIENT_GONE_STATUS, call_id_of(request)
        reason: dict[str, object] = {}
        try:
            call = await self._submit(request, name, rest)
            call_id, status = call.id, 202
            ids = RequestIds(call.id, format_start_time(call.accepted_s))
            return Response(202, (*ids.fields, (b"Location", b"/async-function/" + call.id.encode())))
        except FaashoundError as error:
            status, reason = error.status, {"error": error}
            response = error_response(error)
            if call_id is not None:
                response.headers = (*response.headers, (b"X-Call-Id", call_id.encode()))
            return response
        finally:
            self.metrics.submitted(status)
            log.info(
                f"Queued [{request.method[:20]}] for /async-function/{name[:100]} - [{status}]",
                call_id=call_id or "none",
                **reason,
            )

    async def _submit(self, request: Request, name: str, rest: bytes) -> NewCall:
        """Return the call as the queue has taken it."""
        allow(request, "POST")
        function = self.functions.lookup(name)
        if function is None:
            raise NotFound(NO_FUNCTION)
        check_path(rest)
        self.via.check(request)
        limit_bytes = self.settings.max_body_bytes
        if request.body.length is not None and request.body.length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        dropped = await self.gate.admit(request, function)
        try:
            taken = await self._put(await self._build(request, function, rest, dropped))
        except FaashoundError as error:
            self.health.queue_refused(error)
            raise
        self.health.queue_took()
        return taken

    async def _build(self, request: Request, function: Function, rest: bytes, dropped: tuple[bytes, ...]) -> NewCall:
        """Return the call that a request asks for, its body stored; before that all else has been checked.

        Its function does not get the fields in `dropped`.
        """
        times = parse_times(request, self.settings.max_delay_s, time.time())
        call_id, key = self._identify(request)
        callback_url = (request.header(b"x-callback-url") or b"").decode("latin-1") or None
        if callback_url is not None:
            self.policy.check_url(callback_url)
        ids = RequestIds(call_id, format_start_time(times.accepted_s))
        fields = fields_passed_on(request, ids, self.via, *_SUBMISSION_FIELDS, *dropped)
        digest = None if request.header(b"idempotency-key") is None else RequestDigest(request, rest)
        body = body_if_complete(request.body)
        return NewCall(
            id=call_id,
            function=function.name,
            queue=function.queue,
            method=request.method,
            path=rest.decode(),
            query=request.query.decode(),
            headers=tuple([(name.decode(), value.decode("latin-1")) for name, value in fields]),
            body=await self.queue.store_body(
                body if digest is None else digest.passing(body), self.settings.max_body_bytes
            ),
            callback_url=callback_url,
            due_s=times.due_s,
            expires_s=times.expires_s,
            idempotency_key=key,
            accepted_s=times.accepted_s,
            body_digest=None if digest is None else digest.hex(),
        )

    def _identify(self, request: Request) -> tuple[str, str | None]:
        """Return a call's id and its idempotency key.

        A callback of ours that submits the next call of a chain carries the id of the call it reports on: that id is
        in use.  Its own id makes a repeated callback the same submission.  No caller's key begins with a space.
        """
        callback_id = self.access.callback_id(request)
        if callback_id is not None:
            return new_call_id(), f" callback of {callback_id}"
        given = (request.header(b"x-call-id") or b"").decode("latin-1").lower()
        return given if is_call_id(given) else new_call_id(), parse_key(request)

    async def _put(self, call: NewCall) -> NewCall:
        try:
            with self._put_limit:
                return await self.queue.put(call)
        except TimeoutError:  # it may still get in; a caller that asks again with the same id learns so by a 409
            raise QueueUnavailable(f"the queue has not taken the call within {MAX_PUT_S:g}s") from None
