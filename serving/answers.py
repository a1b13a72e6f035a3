"""What answers of the gateway have in common: JSON, the methods of a route, and the errors that several routes raise.

    allow(request, "GET", "DELETE")                   # MethodNotAllowed for any other method
    return json_response(200, {"cancelled": 3})

Contract: an error carries the status and the headers to answer, and a text that any caller may read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..watchdog import FaashoundError, Header, MethodNotAllowed, Request, Response


class NotFound(FaashoundError):
    """Nothing has this address."""

    status = 404


class BadField(FaashoundError):
    """A header field, query parameter or member of a body makes no sense."""

    status = 400


class Forbidden(FaashoundError):
    """The caller may not have this."""

    status = 403


class Conflict(FaashoundError):
    """What is asked for does not go together with the state that a thing is in."""

    status = 409


class Gone(FaashoundError):
    """It was there and has been dropped."""

    status = 410


def json_response(status: int, value: object, headers: Sequence[Header] = ()) -> Response:
    """Return `value` as a JSON document, readable in a terminal."""
    body = json.dumps(value, indent=2).encode() + b"\n"
    return Response(status, ((b"Content-Type", b"application/json"), *headers), body)


def allow(request: Request, *methods: str) -> None:
    """Raise MethodNotAllowed unless the request's method is one of `methods`, or HEAD where GET is (RFC 9110 9.3.2)."""
    allowed = [each for method in methods for each in (("GET", "HEAD") if method == "GET" else (method,))]
    if request.method not in allowed:
        raise MethodNotAllowed(allowed)
