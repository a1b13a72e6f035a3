"""/system: which functions there are.

GET /system/functions                 every function of the table
GET /system/function/NAME             one of them, or one that function_url finds; 404 unknown
"""

from __future__ import annotations

from ..functions.table import Function, Functions
from ..network.machine import network_identity
from ..watchdog import Request, Response
from .access import Access
from .answers import NotFound, allow, json_response


def describe_function(function: Function) -> dict[str, object]:
    """Return what the gateway knows of a function, as JSON members."""
    return {
        "name": function.name.name,
        "namespace": function.name.namespace,
        "local": function.local,
        "annotations": dict(function.annotations),
        "labels": dict(function.labels),
    }


def describe_upstream(function: Function, *, is_guarded: bool) -> dict[str, object]:
    """Return where a function answers, for workers of ours, who call it there.

    `is_guarded`: a caller's word completes its host.  `network` tells a worker whether loopback is the same for both.
    """
    return {"url": function.url, "guarded": is_guarded, "network": network_identity()}


class ControlPlane:
    """Shows functions; the caller has been let in by then.  Workers of ours are told besides where they answer."""

    def __init__(self, functions: Functions, access: Access) -> None:
        self._functions = functions
        self._access = access

    async def answer(self, request: Request, area: str, rest: str) -> Response:
        """Answer a request for what stands behind /system/`area`."""
        if area == "functions" and not rest:
            allow(request, "GET")
            return json_response(200, [describe_function(function) for function in self._functions])
        if area == "function" and rest:
            allow(request, "GET")
            function = self._functions.lookup(rest[1:])
            if function is None:
                raise NotFound("no function has this name")
            shown = describe_function(function)
            if self._access.is_worker(request):
                is_guarded = self._functions.is_guarded(function.name)
                shown["upstream"] = describe_upstream(function, is_guarded=is_guarded)
            return json_response(200, shown)
        raise NotFound(
            "not found; allowed: /system/functions, /system/function/NAME, /system/calls, /system/calls/CALL-ID"
        )
