"""/system: the gateway and its functions, as faas-cli and other clients of OpenFaaS' gateway ask for them.

    GET /system/info                      what this gateway is
    GET /system/functions                 functions of ?namespace= (openfaas-fn; * is all of them)
    GET /system/function/NAME             one of them, or one that function_url finds; ?usage=1 adds what it takes now
    GET /system/namespaces                the namespaces that functions may be in; /system/namespace/NAME for one

Contract: JSON out; an error is a text.  What this gateway has not, a client is told with 501 and a sentence, so that it
neither takes it for a fault nor for a function that is not there.
"""

from __future__ import annotations

import hashlib
import platform
import urllib.parse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..calls.names import DEFAULT_NAMESPACE, FunctionName
from ..draining.gateway import DIRECT_CALLS
from ..functions.local import LocalStatus
from ..functions.table import Function, Functions
from ..network.machine import network_identity
from ..watchdog import VERSION, FaashoundError, Request, Response
from .access import Access
from .answers import NotFound, allow, json_response
from .function_views import ELSEWHERE, Replicas, describe_function, describe_gateway, describe_namespace
from .invocation_counts import InvocationCounts
from .usage import measure_usage

EVERY_NAMESPACE = "*"

# What OpenFaaS' gateway has, and clients may ask for, under its first segments.
NOT_OFFERED = {
    "alert": "functions are not scaled by alerts of a Prometheus: the gateway sees their calls itself",
    "telemetry": "this gateway gathers no telemetry",
    "scale-function": "this gateway does not scale functions on request",
    "secrets": "this gateway keeps no secrets: a function's are in its environment, or in files of its own",
    "logs": "this gateway keeps no logs: the lines of its functions are in its own log",
}
PATHS = (
    *("/system/info", "/system/functions", "/system/function/NAME", "/system/namespaces", "/system/namespace/NAME"),
    *("/system/calls", "/system/calls/CALL-ID"),
)
GIVES_NO_TOKENS = "this gateway gives no tokens: it takes a user and a password (basic_auth)"
DEPLOYS_NOTHING = "this gateway deploys nothing: its functions are those of its functions file"
MAKES_NO_NAMESPACE = "namespaces are not made here: a function's name in the functions file says which one it is in"


class NotOffered(FaashoundError):
    """This gateway has no such thing, or it is turned off (RFC 9110 15.6.2)."""

    status = 501


@cache
def sources_sha() -> str:
    """Return a digest of the sources that run, in the place of a commit's, which an installed package does not know."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha1(usedforsecurity=False)
    rooms = {path.parent for path in root.glob("*/__init__.py")}
    for path in sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def parse_parameters(query: bytes) -> Mapping[str, str]:
    """Return the parameters of a query, the first of each name; clients send some that mean nothing here."""
    found: dict[str, str] = {}
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1")):
        found.setdefault(name, value)
    return found


def parse_direct_calls(request: Request) -> int:
    """Return how many calls of a function a worker of ours has made without us since it asked about it last."""
    text = request.header(DIRECT_CALLS.lower()) or b""
    return int(text) if text.isdigit() else 0


def describe_upstream(function: Function, *, is_guarded: bool) -> dict[str, object]:
    """Return where a function answers, for workers of ours, which call it there.

    `is_guarded`: a caller's word completes its host.  `network` tells a worker whether loopback is the same for both.
    """
    return {"url": function.url, "guarded": is_guarded, "network": network_identity()}


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """Shows functions; the caller has been let in by then.  Workers of ours are told besides where they answer.

    `status` tells of functions that are run here; `namespaces` are those in which function_url finds functions, if any.
    """

    functions: Functions
    access: Access
    status: Callable[[], Mapping[FunctionName, LocalStatus]]
    counts: InvocationCounts
    namespaces: Collection[str]

    async def answer(self, request: Request, area: str, rest: str) -> Response:
        """Answer a request for what stands behind /system/`area`."""
        name = rest.removeprefix("/")
        match area:
            case "info" if not name:
                allow(request, "GET")
                return json_response(200, describe_gateway(VERSION, sources_sha(), platform.machine()))
            case "functions" if not name:
                return self._list(request)
            case "function" if name:
                return await self._show(request, name)
            case "namespaces" if not name:
                allow(request, "GET")
                return json_response(200, self._known_namespaces())
            case "namespace":
                return self._namespace(request, name)
        if area in NOT_OFFERED:
            raise NotOffered(NOT_OFFERED[area])
        raise NotFound(f"not found; allowed: {', '.join(PATHS)}")

    def _list(self, request: Request) -> Response:
        if request.method in ("POST", "PUT", "DELETE"):
            raise NotOffered(DEPLOYS_NOTHING)
        allow(request, "GET")
        wanted = parse_parameters(request.query).get("namespace", DEFAULT_NAMESPACE)
        counts, status = self.counts.totals(), self.status()
        chosen = [each for each in self.functions if wanted in (EVERY_NAMESPACE, each.name.namespace)]
        described = [
            describe_function(function, _replicas(function, status), counts.get(function.name, 0))
            for function in chosen
        ]
        return json_response(200, described)

    async def _show(self, request: Request, name: str) -> Response:
        allow(request, "GET")
        parameters = parse_parameters(request.query)
        namespace = parameters.get("namespace", DEFAULT_NAMESPACE)
        function = self.functions.lookup(name if "." in name else f"{name}.{namespace}")
        if function is None:
            raise NotFound("no function has this name")
        status, usage = self.status(), None
        if parameters.get("usage") in ("1", "true") and function.name in status:
            usage = await measure_usage(status[function.name].pids)
        by_worker = self.access.is_worker(request)
        if by_worker and function.name in self.functions:
            self.counts.add(function.name, parse_direct_calls(request))
        count = self.counts.totals().get(function.name, 0)
        described = describe_function(function, _replicas(function, status), count, usage)
        if by_worker:
            described["upstream"] = describe_upstream(function, is_guarded=self.functions.is_guarded(function.name))
        return json_response(200, described)

    def _known_namespaces(self) -> list[str]:
        """Return the namespaces that functions may be in, the default one first."""
        found = {function.name.namespace for function in self.functions} | set(self.namespaces) - {DEFAULT_NAMESPACE}
        return [DEFAULT_NAMESPACE, *sorted(found - {DEFAULT_NAMESPACE})]

    def _namespace(self, request: Request, name: str) -> Response:
        if request.method in ("POST", "PUT", "DELETE"):
            raise NotOffered(MAKES_NO_NAMESPACE)
        allow(request, "GET")
        if name not in self._known_namespaces():
            raise NotFound("no namespace has this name")
        return json_response(200, describe_namespace(name))


def _replicas(function: Function, status: Mapping[FunctionName, LocalStatus]) -> Replicas:
    found = status.get(function.name)
    return ELSEWHERE if found is None else Replicas(found.wanted_count, found.available_count)
