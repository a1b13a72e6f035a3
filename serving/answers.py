"""What the gateway's routes have in common: methods, parameters, JSON, and the errors that several of them raise.

    allow(request, "GET", "DELETE")                   # MethodNotAllowed for any other method
    namespace = parse_parameters(request.query).get("namespace")
    return json_response(200, {"cancelled": 3})

Contract: an error carries the status and the headers to answer, and a text that any caller may read.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping, Sequence

from ..watchdog import FaashoundError, Header, MethodNotAllowed, Request, Response

NO_FUNCTION = "no function has this name"


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


def parse_parameters(query: bytes) -> Mapping[str, str]:
    """Return the parameters of a query, the first of each name; clients send some that mean nothing here."""
    found: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1")):
        found.setdefault(name, value)
    return found


def json_response(status: int, value: object, headers: Sequence[Header] = ()) -> Response:
    """Return `value` as a JSON document, readable in a terminal."""
    body = json.dumps(value, indent=2).encode() + b"\n"
    return Response(status, ((b"Content-Type", b"application/json"), *headers), body)


def allow(request: Request, *methods: str) -> None:
    """Raise MethodNotAllowed unless the request's method is one of `methods`, or HEAD where GET is (RFC 9110 9.3.2)."""
    allowed = list(methods)
    if "GET" in methods:
        allowed.insert(methods.index("GET") + 1, "HEAD")
    if request.method not in allowed:
        raise MethodNotAllowed(allowed)
