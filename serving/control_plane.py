"""/system: which functions there are.

GET /system/functions                 every function of the table
GET /system/function/NAME             one of them, or one that function_url finds; 404 unknown
"""

from __future__ import annotations

from ..functions.table import Function, Functions
from ..watchdog import Request, Response
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


class ControlPlane:
    """Shows functions; the caller has been let in by then."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

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
            return json_response(200, describe_function(function))
        raise NotFound(
            "not found; allowed: /system/functions, /system/function/NAME, /system/calls, /system/calls/CALL-ID"
        )
