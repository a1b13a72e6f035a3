"""What a gateway checks and changes in a request that it passes on to a function.

    our_via.check(request)                            # LoopDetected for what has come through us already
    fields = fields_passed_on(request, RequestIds("0190...", b"1700000000000000000"), our_via)
    url = function_target(function, request, rest)

Contract: pure, from the request's fields to the fields that go on.  A function sees who asked (X-Forwarded-*) and
through whom (Via, RFC 9110 7.6.3), and nothing under another path than its own, however an upstream decodes paths.

What it refuses: to pass on what comes round.  Every gateway of one deployment has the same pseudonym, made from what
only they know, so a call that returns to any of them ends there.  A function that calls the gateway on purpose makes a
request of its own, without the Via of the one it got; one that passes on fields as a proxy does must leave Via out.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass
from typing import NamedTuple

from ..calls.callbacks import CALLBACK_PROOF
from ..draining.gateway_access import WORKER_TOKEN
from ..functions.table import Function, parse_upstream
from ..network.paths import below
from ..watchdog import FaashoundError, Header, Request, Url, end_to_end


class LoopDetected(FaashoundError):
    """The request has been here before (RFC 5842 7.2).  Not marked as ours: to try again would be another round."""

    status = 508


def forwarded(request: Request) -> list[Header]:
    """Return the fields that tell the function who asked: X-Forwarded-For, -Host and -Proto."""
    peer, host = request.peer.encode(), request.header(b"x-forwarded-host") or request.host
    before = _values(request, b"x-forwarded-for")
    chain = b", ".join([part for part in (*before, peer) if part])
    fields = ((b"X-Forwarded-For", chain), (b"X-Forwarded-Host", host))
    proto = request.header(b"x-forwarded-proto") or b"http"
    return [*(field for field in fields if field[1]), (b"X-Forwarded-Proto", proto)]


@dataclass(frozen=True, slots=True)
class OurVia:
    """The entry that this deployment adds to Via.  Made by `build_via`."""

    pseudonym: bytes

    def has_passed(self, request: Request) -> bool:
        """Tell whether a request has come through this deployment before."""
        return any(self.pseudonym in re.split(rb"[\s,]+", value.lower()) for value in _values(request, b"via"))

    def check(self, request: Request) -> None:
        """Raise LoopDetected for a request that has come through this deployment before."""
        if self.has_passed(request):
            raise LoopDetected(
                "loop detected: this request has come through this gateway already (RFC 9110 7.6.3); a function's"
                " address leads back here, or a function passes on the Via of the request that it got"
            )

    def extend(self, request: Request) -> Header:
        """Return the Via of a request as it is passed on; one that was here before (a worker's) stays as it is."""
        entries = _values(request, b"via")
        if not entries or not self.has_passed(request):
            entries = [*entries, b"1.1 " + self.pseudonym]
        return b"Via", b", ".join(entries)


def _values(request: Request, name: bytes) -> list[bytes]:
    """Return all values of a field; of one that is not there, which is the usual case, for next to nothing."""
    return [] if request.header(name) is None else [value for each, value in request.headers if each == name]


class RequestIds(NamedTuple):
    """What ties the records of one call together: its id, and its start in ns since the epoch, as a field has it."""

    call_id: str
    start_time: bytes

    @property
    def fields(self) -> tuple[Header, Header]:
        """The header fields that carry them, in requests and responses."""
        return (b"X-Call-Id", self.call_id.encode()), (b"X-Start-Time", self.start_time)


ID_FIELDS = (b"x-call-id", b"x-start-time")
_NEVER_PASSED_ON = (b"host", b"expect", WORKER_TOKEN.lower(), CALLBACK_PROOF.lower(), *ID_FIELDS, b"via")
_FORWARDED = (b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto")


def fields_passed_on(request: Request, ids: RequestIds, via: OurVia, *dropped: bytes) -> list[Header]:
    """Return the fields of a caller's request as its function is to get them, without those that `dropped` names."""
    fields = end_to_end(request.headers, *_NEVER_PASSED_ON, *_FORWARDED, *dropped)
    return [*fields, *forwarded(request), *ids.fields, via.extend(request)]


def fields_of_worker(request: Request, ids: RequestIds, via: OurVia) -> list[Header]:
    """Return the fields of a worker's request for a function; who asked and through whom was told at submission."""
    return [*end_to_end(request.headers, *_NEVER_PASSED_ON), *ids.fields, via.extend(request)]


def function_target(function: Function, request: Request, rest: bytes) -> Url:
    """Return where a request for a function goes: the function's address, the rest of the path, the query."""
    if function.url is None:
        raise AssertionError(f"{function.name} has no address: local functions get theirs when they are started")
    return below(parse_upstream(function.url), rest.decode(), request.query.decode())


def build_via(token: str) -> OurVia:
    """Return the entry of the deployment whose gateways and workers share `token`, of which it tells nothing."""
    return OurVia(b"faashound-" + hmac.new(token.encode(), b"via", hashlib.sha256).hexdigest()[:16].encode())
