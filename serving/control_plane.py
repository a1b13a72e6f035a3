"""/system: the gateway and its functions, as faas-cli and other clients of OpenFaaS' gateway ask for them.

    GET /system/info                      what this gateway is
    GET /system/functions                 functions of ?namespace= (openfaas-fn; * is all of them)
    GET /system/function/NAME             one of them, or one that function_url finds; ?usage=1, here and above, adds
                                          what those take now that are run here
    GET /system/namespaces                the namespaces that functions may be in
    POST, PUT, DELETE /system/functions; /system/scale-function/NAME; /system/secrets, /system/namespace/NAME,
                      /system/schedules: operations.py
    GET /system/logs                      function_logs.py
    GET /system/metrics                   history.py; /system/events: events.py

Contract: JSON out; an error is a text.  What this gateway has not, a client is told with 501 and a sentence, so that it
neither takes it for a fault nor for a function that is not there.
"""

from __future__ import annotations

import hashlib
import math
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..calls.names import DEFAULT_NAMESPACE, FunctionName
from ..draining.gateway_access import DIRECT_CALLS
from ..functions.local import LocalStatus
from ..functions.table import Function, Functions
from ..network.machine import network_identity
from ..watchdog import (
    BACKLOG,
    KEPT_S,
    VERSION,
    Client,
    ConnectionLimits,
    NotReady,
    PeerGone,
    Request,
    Response,
    Server,
    ServerTimeouts,
    Unreachable,
    Url,
    body_if_complete,
    end_to_end,
)
from .access import Access
from .answers import NO_FUNCTION, NotFound, allow, json_response, parse_parameters
from .events import Events
from .followers import MAX_FOLLOWERS_COUNT
from .function_logs import FunctionLogs
from .function_views import ELSEWHERE, Replicas, Usage, describe_function, describe_gateway
from .history import History
from .invocation_counts import InvocationCounts
from .operations import NotOffered, Operations
from .settings import Settings
from .usage import measure_usages

EVERY_NAMESPACE = "*"
CONTROL_CONNECTIONS_COUNT = 2 * MAX_FOLLOWERS_COUNT + 64  # those who follow events and lines, and room for all others

# What OpenFaaS' gateway has, and clients may ask for, under its first segments.
NOT_OFFERED = {
    "alert": "functions are not scaled by alerts of a Prometheus: the gateway sees their calls itself",
    "telemetry": "this gateway gathers no telemetry",
}
PATHS = (
    *("/system/info", "/system/functions", "/system/function/NAME", "/system/namespaces", "/system/namespace/NAME"),
    *("/system/scale-function/NAME", "/system/secrets", "/system/logs", "/system/schedules"),
    *("/system/metrics", "/system/events"),
    *("/system/calls", "/system/calls/CALL-ID"),
)
GIVES_NO_TOKENS = "this gateway gives no tokens: it takes a user and a password (basic_auth)"
ASKER_FIELD, PEER_FIELD = b"X-Faashound-Asker", b"X-Faashound-Peer"  # between processes of one gateway


@cache
def sources_sha() -> str:
    """Return a digest of the sources that run, in the place of a commit's, which an installed package does not know."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha1(usedforsecurity=False)
    rooms = {path.parent for path in root.glob("*/__init__.py")}
    for path in sorted([*root.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


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

    `status` tells of functions that are run here.
    """

    functions: Functions
    access: Access
    status: Callable[[], Mapping[FunctionName, LocalStatus]]
    counts: InvocationCounts
    operations: Operations
    logs: FunctionLogs
    history: History
    events: Events

    def drain(self) -> None:
        """Let go of clients that follow the lines of functions, or what changes."""
        self.logs.drain()
        self.events.drain()

    async def look_at_worker(self) -> None:
        """See what the worker has counted before it stops; what it does while it drains is not seen."""
        await self.history.sample(fresh_s=0.0)

    async def answer(self, request: Request, area: str, rest: str, asker: str) -> Response:
        """Answer a request for what stands behind /system/`area`; `asker` is who asks, for the log."""
        name = rest.removeprefix("/")
        if area in NOT_OFFERED:
            raise NotOffered(NOT_OFFERED[area])
        if area == "namespace":
            return await self.operations.namespace(request, name, asker)
        response = await (
            self._answer_one(request, area, name, asker) if name else self._answer_all(request, area, asker)
        )
        if response is None:
            raise NotFound(f"not found; allowed: {', '.join(PATHS)}")
        return response

    async def _answer_all(self, request: Request, area: str, asker: str) -> Response | None:
        """Answer at a path without a name; None if there is none such."""
        match area:
            case "info":
                allow(request, "GET")
                return json_response(200, describe_gateway(VERSION, sources_sha(), platform.machine()))
            case "functions" if request.method in ("POST", "PUT", "DELETE"):
                return await self.operations.change_function(request, asker)
            case "functions":
                return await self._list(request)
            case "namespaces":
                allow(request, "GET")
                return json_response(200, self.operations.control.namespace_names())
            case "secrets":
                return await self.operations.secrets(request, asker)
            case "logs":
                return await self.logs.answer(request)
            case "schedules":
                return self.operations.schedules(request)
            case "metrics":
                return await self.history.answer(request)
            case "events":
                return self.events.answer(request)
        return None

    async def _answer_one(self, request: Request, area: str, name: str, asker: str) -> Response | None:
        """Answer at the path of one function; None if there is none such."""
        match area:
            case "function":
                return await self._show(request, name)
            case "scale-function":
                return await self.operations.scale(request, name, asker)
        return None

    async def _list(self, request: Request) -> Response:
        allow(request, "GET", "POST", "PUT", "DELETE")
        parameters = parse_parameters(request.query)
        wanted = parameters.get("namespace", DEFAULT_NAMESPACE)
        counts, status = self.counts.totals(), self.status()
        chosen = [each for each in self.functions if wanted in (EVERY_NAMESPACE, each.name.namespace)]
        usages = await _usages(parameters, chosen, status)
        described = [
            describe_function(
                function,
                _replicas(function, status),
                counts.get(function.name, 0),
                usages.get(function.name),
                self.operations.control.describe(function.name),
            )
            for function in chosen
        ]
        return json_response(200, described)

    async def _show(self, request: Request, name: str) -> Response:
        allow(request, "GET")
        parameters = parse_parameters(request.query)
        namespace = parameters.get("namespace", DEFAULT_NAMESPACE)
        function = self.functions.lookup(name if "." in name else f"{name}.{namespace}")
        if function is None:
            raise NotFound(NO_FUNCTION)
        status = self.status()
        usages = await _usages(parameters, [function], status)
        by_worker = self.access.is_worker(request)
        if by_worker and function.name in self.functions:
            self.counts.add(function.name, parse_direct_calls(request))
        count = self.counts.totals().get(function.name, 0)
        deployed = self.operations.control.describe(function.name)
        described = describe_function(function, _replicas(function, status), count, usages.get(function.name), deployed)
        if by_worker:
            described["upstream"] = describe_upstream(function, is_guarded=self.functions.is_guarded(function.name))
        return json_response(200, described)


def _replicas(function: Function, status: Mapping[FunctionName, LocalStatus]) -> Replicas:
    found = status.get(function.name)
    return ELSEWHERE if found is None else Replicas(found.wanted_count, found.available_count)


async def _usages(
    parameters: Mapping[str, str], functions: Sequence[Function], status: Mapping[FunctionName, LocalStatus]
) -> dict[FunctionName, Usage]:
    """Return what those of `functions` take that are run here, if the parameters ask for it."""
    names = [each.name for each in functions if each.name in status]
    if not names or parameters.get("usage") not in ("1", "true"):
        return {}
    return dict(zip(names, await measure_usages([status[name].pids for name in names]), strict=True))


@dataclass(frozen=True, slots=True)
class ControlPlaneElsewhere:
    """The control plane of another process of this gateway, the one that runs the functions, asked at its socket."""

    socket_path: Path
    client: Client = field(default_factory=Client)

    async def close(self) -> None:
        """Let go of the connections."""
        await self.client.close()

    def drain(self) -> None:
        """Do nothing: that process drains as well."""

    async def look_at_worker(self) -> None:
        """Do nothing: that process does."""

    async def answer(self, request: Request, area: str, rest: str, asker: str) -> Response:
        """Have a request answered there; raises NotReady while that process is being replaced."""
        target = request.path.decode() + (f"?{request.query.decode()}" if request.query else "")
        fields = end_to_end(request.headers, b"host", b"expect", ASKER_FIELD.lower(), PEER_FIELD.lower())
        fields += [(ASKER_FIELD, asker.encode("latin-1", "replace")), (PEER_FIELD, request.peer.encode())]
        try:
            response = await self.client.request(
                request.method,
                Url("http", str(self.socket_path), 80, target),
                fields,
                body_if_complete(request.body),
                request.body.length,
            )
        except (Unreachable, PeerGone):
            raise NotReady("the process that runs the functions is being started again; ask again") from None
        fields, length = end_to_end(response.headers), response.body.length
        return Response(response.status, fields, response.body, length, math.inf, is_live=length is None)


def serve_control_plane(stack: AsyncExitStack, control_plane: ControlPlane, path: Path, settings: Settings) -> None:
    """Answer the other processes of this gateway at a socket in a directory that is its user's alone.

    They have the times that their clients have: who sends or reads slowly there does so here.
    """

    async def answer(request: Request) -> Response:
        area, _, rest = request.path.removeprefix(b"/system/").partition(b"/")
        asker = request.header(ASKER_FIELD.lower()) or b""
        request.peer = (request.header(PEER_FIELD.lower()) or b"").decode("latin-1")
        return await control_plane.answer(
            request, area.decode("latin-1"), "/" + rest.decode("latin-1"), asker.decode("latin-1")
        )

    path.unlink(missing_ok=True)  # of the process whose place we have taken
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    limits = ConnectionLimits(CONTROL_CONNECTIONS_COUNT, CONTROL_CONNECTIONS_COUNT)
    timeouts = ServerTimeouts(settings.read_timeout_s, settings.write_timeout_s, 3 * KEPT_S)
    server = Server(answer, timeouts, limits=limits)
    stack.callback(server.abort)
    server.listen(listener)
