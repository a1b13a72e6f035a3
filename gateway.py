"""fgateway: every function under one address, now or later.

    fgateway                                                    # or: python -m faashound.gateway
    curl -d hello http://127.0.0.1:8080/function/cat            # now: the answer
    curl -d hello http://127.0.0.1:8080/async-function/cat      # later: 202 and a call id

Routes, with the names, codes and headers of the OpenFaaS gateway:

    ANY    /function/NAME[/path]           proxied to the function; 404 unknown, 502 down, 504 past upstream_timeout
    POST   /async-function/NAME[/path]     202 once the call is durable, 503 or 507 if it cannot be
    GET    /async-function/ID              where the call stands; ?wait=30s waits for its end
    GET    /async-function/ID/result       the response of the function
    DELETE /async-function/ID              cancels, queued or running
    GET    /system/functions               the functions of the table; /system/function/NAME for one
    GET    /healthz                        200 while it serves

What it promises: a 202 is never given for a call that a crash could lose.  Beside itself it runs a watchdog for each
local function and, with a spool, a worker; all of them end when it ends, whatever way.  What it refuses to do: run
anything itself, retry, or follow redirects.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hmac
import json
import math
import os
import re
import socket
import sys
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import prometheus_client
import uvloop

from .callbacks import CallbackAllow, CallbackPolicy, build_policy, parse_callback_allow
from .functions import (
    BadFunctions,
    Function,
    Functions,
    LocalFunctions,
    parse_function_url,
    read_functions,
)
from .keeper import Keeper
from .retries import BadAnnotations, parse_annotations
from .spool import (
    FINAL,
    Call,
    CallUnknown,
    NewCall,
    Spool,
    State,
    StoredBody,
    new_call_id,
    parse_queue_name,
    parse_queue_url,
)
from .watchdog import (
    LONGEST_DURATION_S,
    TEXT_PLAIN,
    BadSettings,
    BodyTooLarge,
    CannotStart,
    Client,
    FaashoundError,
    Header,
    MethodNotAllowed,
    NotReady,
    Request,
    Response,
    Server,
    ServerTimeouts,
    Signals,
    Url,
    call_id_of,
    describe_socket,
    drain_server,
    end_to_end,
    finished_first,
    flag_answer,
    help_text,
    load_settings,
    log,
    open_sockets,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_port,
    parse_positive_duration,
    parse_settings,
    parse_size,
    parse_text,
    parse_url,
    read_file,
    serve_metrics,
    setting,
    settings_table,
    start_metrics,
    watch_lifeline,
)
from .worker import Settings as WorkerSettings

MAX_WAIT_S = 600.0  # of ?wait: longer than proxies keep a silent connection
MAX_KEY_CHARS = 255  # of an Idempotency-Key, as the drafts and peers have it
SWEEP_EVERY_S = 60.0  # between two rounds of housekeeping in the queue
DEFAULT_QUEUE = "faas-request"
QUEUE_ANNOTATION = "com.openfaas.queue"
WORKER_TOKEN = b"x-worker-token"  # who has it can open the queue, so it is a worker of ours


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator asked of this gateway; see `watchdog.settings_table`."""

    host: str | None = setting("host", "127.0.0.1", parse_text, "address to listen on; 0.0.0.0 serves others")
    port: int = setting("port", "8080", parse_port, "port to listen on; 0 picks a free one and logs it")
    metrics_port: int = setting("metrics_port", "8082", parse_port, "port of /metrics; 0 disables it")
    read_timeout_s: float = setting(
        "read_timeout", "60s", parse_positive_duration, "time to receive a whole request, from its first byte"
    )
    write_timeout_s: float = setting(
        "write_timeout", "60s", parse_positive_duration, "time to send a whole response, from its first byte"
    )
    upstream_timeout_s: float = setting(
        "upstream_timeout",
        "60s",
        parse_positive_duration,
        "time a caller waits for a function; calls of a worker do not",
    )
    functions: str = setting("functions", "functions.toml", parse_text, "path of the functions file")
    function_url: str | None = setting(
        "function_url", "", parse_function_url, "where functions answer that the file does not list: http://{name}:8080"
    )
    queue_url: Path = setting("queue_url", "spool:./spool", parse_queue_url, "the queue: spool:DIRECTORY")
    worker: str = setting("worker", "local", parse_choice("local", "none"), "local: run a worker beside the gateway")
    max_body_bytes: int = setting(
        "max_body", "512MiB", parse_size, "largest body of an asynchronous call, above it 413"
    )
    keep_results_s: float = setting("keep_results", "1h", parse_duration, "how long a result can be fetched")
    retention_s: float = setting("retention", "24h", parse_duration, "how long a finished call is remembered")
    callback_allow: CallbackAllow | None = setting(
        "callback_allow", "", parse_callback_allow, "hosts and networks that callbacks may go to besides public ones"
    )
    basic_auth: bool = setting(
        "basic_auth", "false", parse_bool, "ask for a password for /system and for reading and cancelling calls"
    )
    secret_mount_path: str = setting(
        "secret_mount_path", "/run/secrets", parse_text, "directory of basic-auth-user and basic-auth-password"
    )
    log_format: str = setting("log_format", "text", parse_choice("text", "json"), "how log lines look: text or json")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        if self.port and self.port == self.metrics_port:
            yield f"metrics_port={self.metrics_port} contradicts port={self.port}; allowed: two different ports"
        if self.keep_results_s > self.retention_s:
            yield "keep_results is longer than retention; allowed: up to retention, which forgets the call"


# ---------------------------------------------------------------------------------------------------------------
# Errors.
# ---------------------------------------------------------------------------------------------------------------


class NotFound(FaashoundError):
    """Nothing has this address."""

    status = 404


class OurFailure(FaashoundError):
    """The gateway's own answer in place of a function's: marked so that a worker knows it and tries again."""

    headers = ((b"X-OpenFaaS-Internal", b"gateway"),)

    def __init__(self, status: int, text: str) -> None:
        self.status = status  # type: ignore[misc]  # the one error whose status is somebody else's
        super().__init__(text)


class BadField(FaashoundError):
    """A header field or query parameter of a submission makes no sense."""

    status = 400


class Conflict(FaashoundError):
    """The call is not in a state for this."""

    status = 409


class Gone(FaashoundError):
    """The result was there and has been dropped (keep_results)."""

    status = 410


class Unauthorized(FaashoundError):
    """No credentials, or the wrong ones (RFC 7617)."""

    status = 401
    headers = ((b"WWW-Authenticate", b'Basic realm="faashound", charset="UTF-8"'),)


# ---------------------------------------------------------------------------------------------------------------
# Reading a submission and showing a call (pure).
# ---------------------------------------------------------------------------------------------------------------

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_KEY = re.compile(rf"[\x21-\x7e](?:[\x20-\x7e]{{0,{MAX_KEY_CHARS - 2}}}[\x21-\x7e])?", re.ASCII)

# Ours, or meant for the queue: not the function's business when the call is made.
_SUBMISSION_FIELDS = (b"x-callback-url", b"x-delay", b"x-expires", b"idempotency-key", WORKER_TOKEN, b"expect", b"host")


def parse_span(request: Request, name: str) -> float | None:
    """Return the seconds that a header field such as X-Delay asks for; BadField names it and what is allowed."""
    value = request.header(name.lower().encode())
    if value is None:
        return None
    try:
        return parse_duration(value.decode("latin-1"))
    except ValueError as error:
        raise BadField(f"{name}: {value.decode('latin-1')!r}: {error}") from None


def parse_key(request: Request) -> str | None:
    """Return the Idempotency-Key of a submission; BadField for one that is no visible text of a sane length."""
    value = request.header(b"idempotency-key")
    if value is None:
        return None
    text = value.decode("latin-1")
    if not _KEY.fullmatch(text):
        raise BadField(f"Idempotency-Key: allowed: 1 to {MAX_KEY_CHARS} visible ASCII characters")
    return text


def parse_wait(query: bytes) -> float:
    """Return the seconds of ?wait=30s, 0 without it; BadField for anything else in the query."""
    wait_s = 0.0
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name != "wait":
            raise BadField(f"unknown query parameter {name!r}; allowed: wait")
        try:
            wait_s = parse_duration(value)
        except ValueError as error:
            raise BadField(f"wait={value!r}: {error}") from None
    if wait_s > MAX_WAIT_S:
        raise BadField(f"wait: allowed: up to {MAX_WAIT_S:g}s")
    return wait_s


def forwarded(request: Request) -> list[Header]:
    """Return the fields that tell the function who asked: X-Forwarded-For, -Host and -Proto."""
    before = request.header(b"x-forwarded-for")
    chain = b", ".join(part for part in (before, request.peer.encode()) if part)
    fields = [(b"X-Forwarded-For", chain)] if chain else []
    fields.append((b"X-Forwarded-Host", request.header(b"x-forwarded-host") or request.host))
    fields.append((b"X-Forwarded-Proto", request.header(b"x-forwarded-proto") or b"http"))
    return [field for field in fields if field[1]]


_FORWARDED = (b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto")


def format_time(epoch_s: float | None) -> str | None:
    """Return RFC 3339 in UTC, to the millisecond."""
    if epoch_s is None:
        return None
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_call(call: Call) -> dict[str, object]:
    """Return what a caller may know of a call, as JSON members."""
    facts: dict[str, object] = {
        "id": call.id,
        "function": call.function,
        "state": call.state.value,
        "attempts": call.attempts,
        "accepted": format_time(call.accepted_s),
        "due": format_time(call.due_s) if call.state is State.QUEUED else None,
        "expires": format_time(call.expires_s),
        "started": format_time(call.started_s),
        "finished": format_time(call.finished_s),
        "status": call.status,
        "duration_seconds": call.duration_s,
        "error": call.error,
        "cancel_requested": call.cancel_requested or None,
        "result_bytes": None if call.result is None else call.result.bytes_count,
    }
    if call.callback is not None:
        facts["callback"] = {
            "state": call.callback.state.value,
            "attempts": call.callback.attempts,
            "status": call.callback.status,
            "error": call.callback.error,
        }
    return {name: value for name, value in facts.items() if value is not None}


def describe_function(function: Function) -> dict[str, object]:
    """Return what the gateway knows of a function, as JSON members."""
    return {
        "name": function.name,
        "local": function.local,
        "annotations": dict(function.annotations),
        "labels": dict(function.labels),
    }


def json_response(status: int, value: object, headers: Sequence[Header] = ()) -> Response:
    """Return `value` as a JSON document, readable in a terminal."""
    body = json.dumps(value, indent=2).encode() + b"\n"
    return Response(status, ((b"Content-Type", b"application/json"), *headers), body)


@lru_cache(maxsize=1024)
def base_url(text: str) -> Url:
    """Return the parts of a function's base URL."""
    return parse_url(text)


def function_target(function: Function, request: Request, rest: bytes) -> Url:
    """Return where a request for a function goes: the function's address, the rest of the path, the query."""
    if function.url is None:
        raise AssertionError(f"{function.name} has no address: local functions get theirs when they are started")
    base = base_url(function.url)
    target = base.target.rstrip("/") + (rest.decode() or "/") + (f"?{request.query.decode()}" if request.query else "")
    return Url(base.scheme, base.host, base.port, target)


def split_path(path: bytes) -> tuple[str, str, bytes]:
    """Return (area, name, rest) of `/area/name/rest`; rest keeps its slash."""
    _, area, *more = path.split(b"/", 3)
    name = more[0].decode("latin-1") if more else ""
    return area.decode("latin-1"), name, b"/" + more[1] if len(more) > 1 else b""


# ---------------------------------------------------------------------------------------------------------------
# The application.
# ---------------------------------------------------------------------------------------------------------------


class GatewayMetrics:
    """The metrics of the OpenFaaS gateway, under the same names, and the queue's depth."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._total = prometheus_client.Counter(
            "gateway_function_invocation",
            "Function invocations, by outcome",
            ("function_name", "code"),
            registry=self.registry,
        )
        self._started = prometheus_client.Counter(
            "gateway_function_invocation_started",
            "Function invocations begun",
            ("function_name",),
            registry=self.registry,
        )
        self._seconds = prometheus_client.Histogram(
            "gateway_functions_seconds", "Function time taken", ("function_name",), registry=self.registry
        )
        self._queue = prometheus_client.Gauge(
            "gateway_queue_calls", "Asynchronous calls, by state", ("state",), registry=self.registry
        )

    def begin(self, function: str) -> float:
        """Count the start of an invocation; return when it was, for `end`."""
        self._started.labels(function).inc()
        return time.perf_counter()

    def end(self, function: str, status: int, started_s: float) -> None:
        """Count the end of an invocation."""
        self._total.labels(function, str(status)).inc()
        self._seconds.labels(function).observe(time.perf_counter() - started_s)

    def show_queue(self, by_state: Mapping[State, int]) -> None:
        """Set the depth of the queue."""
        for state in State:
            self._queue.labels(state.value).set(by_state.get(state, 0))


@dataclass(frozen=True, slots=True)
class Credentials:
    """The one user that may see and end the calls of others."""

    user: str
    password: str

    def match(self, request: Request) -> bool:
        """Tell whether a request carries them (RFC 7617), in constant time."""
        expected = b"Basic " + base64.b64encode(f"{self.user}:{self.password}".encode())
        return hmac.compare_digest(request.header(b"authorization") or b"", expected)


class Gateway:
    """Handler of the gateway's server."""

    def __init__(
        self,
        settings: Settings,
        functions: Functions,
        queue: Spool,
        policy: CallbackPolicy,
        credentials: Credentials | None,
    ) -> None:
        self.metrics = GatewayMetrics()
        self.accepting = True
        self.client = Client()
        self._settings = settings
        self._functions = functions
        self._queue = queue
        self._policy = policy
        self._credentials = credentials
        self._token = queue.token.encode()

    async def __call__(self, request: Request) -> Response:
        """Answer one request; cancelled when the client has gone."""
        area, name, rest = split_path(request.path)
        if area == "function":
            return await self._invoke(request, name, rest)
        if area == "async-function":
            if _UUID.fullmatch(name):
                return await self._on_call(request, name.lower(), rest)
            return await self._submit(request, name, rest)
        if area == "system":
            return self._system(request, name, rest)
        if request.path == b"/healthz":
            return self._health(request)
        raise NotFound("not found; allowed: /function/NAME, /async-function/NAME, /async-function/CALL-ID, /healthz")

    def _health(self, request: Request) -> Response:
        if request.method != "GET":
            raise MethodNotAllowed(("GET",))
        if not self.accepting:
            raise NotReady("draining")
        return Response(200, (TEXT_PLAIN,), b"OK")

    async def serve_metrics(self, request: Request) -> Response:
        """Answer GET /metrics, on a port of its own."""
        self.metrics.show_queue((await self._queue.stats()).by_state)
        return await serve_metrics(self.metrics.registry, request)

    def _is_worker(self, request: Request) -> bool:
        return hmac.compare_digest(request.header(WORKER_TOKEN) or b"", self._token)

    def _authorize(self, request: Request) -> None:
        if self._credentials is None or self._credentials.match(request) or self._is_worker(request):
            return
        raise Unauthorized("credentials are needed: basic-auth-user and basic-auth-password")

    def _lookup(self, name: str) -> Function:
        function = self._functions.lookup(name)
        if function is None:
            raise OurFailure(404, f"no function is named {name[:100]!r}")
        return function

    # Now.

    async def _invoke(self, request: Request, name: str, rest: bytes) -> Response:
        function = self._lookup(name)
        started_s, status = self.metrics.begin(function.name), 499
        try:
            response = await self._proxy(request, function, rest)
            status = response.status
            return response
        except FaashoundError as error:
            status = error.status
            raise
        finally:
            self.metrics.end(function.name, status, started_s)

    async def _proxy(self, request: Request, function: Function, rest: bytes) -> Response:
        call_id = call_id_of(request) or new_call_id()
        worker = self._is_worker(request)
        if worker:
            headers = end_to_end(request.headers, b"host", b"expect", WORKER_TOKEN)
            start_time = request.header(b"x-start-time") or b""
        else:
            start_time = str(time.time_ns()).encode()
            headers = end_to_end(
                request.headers, b"host", b"expect", WORKER_TOKEN, b"x-call-id", b"x-start-time", *_FORWARDED
            )
            headers += [(b"X-Call-Id", call_id.encode()), (b"X-Start-Time", start_time), *forwarded(request)]
        deadline_s = None if worker else time.monotonic() + self._settings.upstream_timeout_s
        target = function_target(function, request, rest)
        try:
            response = await self.client.request(
                request.method, target, headers, request.body, request.body.length, deadline_s
            )
        except FaashoundError as error:
            raise OurFailure(error.status, f"{function.name}: {error}") from None
        fields = end_to_end(response.headers, b"x-call-id", b"x-start-time", b"date")
        fields += [(b"X-Call-Id", call_id.encode()), (b"X-Start-Time", start_time)]
        return Response(response.status, fields, response.body, response.body.length, math.inf if worker else None)

    # Later.

    async def _submit(self, request: Request, name: str, rest: bytes) -> Response:
        if request.method != "POST":
            raise MethodNotAllowed(("POST",))
        function = self._lookup(name)
        limit_bytes = self._settings.max_body_bytes
        if request.body.length is not None and request.body.length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        call = self._parse_submission(request, function, rest)
        body = await self._queue.store_body(request.body, limit_bytes)
        accepted = await self._queue.put(dataclasses.replace(call, body=body))
        headers = (
            (b"X-Call-Id", accepted.id.encode()),
            (b"X-Start-Time", _start_time(accepted.accepted_s)),
            (b"Location", b"/async-function/" + accepted.id.encode()),
        )
        return Response(202, headers)

    def _parse_submission(self, request: Request, function: Function, rest: bytes) -> NewCall:
        """Return the call that a request asks for, its body still to come; everything in it has been checked."""
        now_s = time.time()
        delay_s, expires_s = parse_span(request, "X-Delay"), parse_span(request, "X-Expires")
        if delay_s is not None and expires_s is not None and expires_s <= delay_s:
            raise BadField("X-Expires is not longer than X-Delay: the call could never run")
        call_id, key = self._identify(request)
        callback = request.header(b"x-callback-url")
        if callback is not None:
            self._policy.check_url(callback.decode("latin-1"))
        fields = end_to_end(request.headers, *_SUBMISSION_FIELDS, b"x-call-id", b"x-start-time", *_FORWARDED)
        fields += [(b"X-Call-Id", call_id.encode()), (b"X-Start-Time", _start_time(now_s)), *forwarded(request)]
        return NewCall(
            id=call_id,
            function=function.name,
            queue=function.annotations.get(QUEUE_ANNOTATION, DEFAULT_QUEUE),
            method=request.method,
            path=rest.decode(),
            query=request.query.decode(),
            headers=tuple((name.decode(), value.decode("latin-1")) for name, value in fields),
            body=StoredBody(0, b"", None),
            callback_url=None if callback is None else callback.decode("latin-1"),
            due_s=now_s + (delay_s or 0.0),
            expires_s=None if expires_s is None else now_s + expires_s,
            idempotency_key=key,
            accepted_s=now_s,
        )

    def _identify(self, request: Request) -> tuple[str, str | None]:
        """Return a call's id and its idempotency key.

        A callback of ours that submits the next call of a chain carries the id of the call it reports on: that id is
        in use, and it is what makes a repeated callback the same submission.
        """
        given = request.header(b"x-call-id")
        text = given.decode("latin-1").lower() if given is not None else ""
        if not _UUID.fullmatch(text):
            return new_call_id(), parse_key(request)
        if self._is_worker(request):
            return new_call_id(), f"callback of {text}"
        return text, parse_key(request)

    async def _on_call(self, request: Request, call_id: str, rest: bytes) -> Response:
        """GET status or result, DELETE: of one call."""
        if rest not in (b"", b"/result"):
            raise NotFound("not found; allowed: /async-function/CALL-ID and /async-function/CALL-ID/result")
        allowed = ("GET",) if rest else ("GET", "DELETE")
        if request.method not in allowed:
            raise MethodNotAllowed(allowed)
        self._authorize(request)
        if request.method == "DELETE":
            state = await self._queue.cancel(call_id)
            return json_response(202, {"id": call_id, "state": state.value, "cancel_requested": True})
        call = await self._find(call_id, parse_wait(request.query))
        return await self._result(call) if rest else json_response(200, describe_call(call))

    async def _find(self, call_id: str, wait_s: float) -> Call:
        call = await (self._queue.wait(call_id, wait_s) if wait_s else self._queue.get(call_id))
        if call is None:
            raise CallUnknown(f"no call has the id {call_id}")
        return call

    async def _result(self, call: Call) -> Response:
        """Return what the function answered, as it answered."""
        if call.state not in FINAL:
            raise Conflict(f"the call is {call.state.value}; ?wait=30s waits for its end")
        if call.result is None or call.status is None:
            if call.status is not None and call.state is State.DONE:
                raise Gone("the result is no longer kept (keep_results)")
            raise NotFound(f"the call is {call.state.value} and has no result: {call.error or 'it never ran'}")
        fields = [(name.encode(), value.encode("latin-1")) for name, value in call.result_headers]
        fields = [*end_to_end(fields, b"x-call-id", b"date"), (b"X-Call-Id", call.id.encode())]
        return Response(call.status, fields, self._queue.open_body(call.result), call.result.bytes_count)

    # For operators and workers.

    def _system(self, request: Request, name: str, rest: bytes) -> Response:
        if request.method != "GET":
            raise MethodNotAllowed(("GET",))
        self._authorize(request)
        if name == "functions" and not rest:
            return json_response(200, [describe_function(function) for function in self._functions])
        if name == "function" and rest:
            return json_response(200, describe_function(self._lookup(rest[1:].decode("latin-1"))))
        raise NotFound("not found; allowed: /system/functions and /system/function/NAME")


def _start_time(epoch_s: float) -> bytes:
    return b"%d" % int(epoch_s * 1e9)


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle.  SIGTERM: unhealthy; the local worker drains while we still serve, since its calls come through us;
# then no more connections, what is in flight finishes within upstream_timeout, and the local functions end.
# ---------------------------------------------------------------------------------------------------------------

FUNCTIONS_GRACE_S = 10.0  # for watchdogs whose requests are over already
WORKER_COMMAND = (sys.executable, "-m", "faashound.worker")


def load_functions(settings: Settings, environ: Mapping[str, str]) -> dict[str, Function]:
    """Return the functions of the file, their annotations checked; raises BadFunctions."""
    table = read_functions(Path(settings.functions), missing_ok=not environ.get("functions"))
    problems = []
    for function in table.values():
        try:
            parse_annotations(function.name, function.annotations)
            parse_queue_name(function.annotations.get(QUEUE_ANNOTATION, DEFAULT_QUEUE))
        except BadAnnotations as error:
            problems += str(error).splitlines()
        except ValueError as error:
            problems.append(f"function {function.name}: annotation {QUEUE_ANNOTATION}: {error}")
    if problems:
        raise BadFunctions(f"{settings.functions}: {problem}" for problem in problems)
    return table


def load_credentials(settings: Settings) -> Credentials | None:
    """Return who may see and end the calls of others; None if anybody may.  Raises CannotStart."""
    if not settings.basic_auth:
        return None
    texts = []
    for name in ("basic-auth-user", "basic-auth-password"):
        path = str(Path(settings.secret_mount_path) / name)
        text = read_file(path, "basic_auth=true needs it").strip()
        if not text:
            raise CannotStart(f"{path} is empty (basic_auth=true needs it)")
        texts.append(text)
    return Credentials(*texts)


def worker_environment(settings: Settings, environ: Mapping[str, str], port: str) -> dict[str, str]:
    """Return the environment of the worker beside this gateway: its own settings as they stand, the rest from ours.

    Raises BadSettings for what the worker would refuse.
    """
    shared = {"queue_url", "callback_allow", "log_format"}
    ours = {row.name for row in settings_table(Settings).values()} - shared
    base = {name: value for name, value in environ.items() if name not in ours and not name.startswith("LISTEN_")}
    base |= {"gateway_url": f"http://127.0.0.1:{port}", "OPENFAAS_NAME": "worker"}
    if not settings.metrics_port:
        base["metrics_port"] = "0"
    parse_settings(WorkerSettings, base)
    return base


async def keep_house(queue: Spool, settings: Settings) -> None:
    """Drop what is past its time from the queue, for ever."""
    while True:
        await asyncio.sleep(SWEEP_EVERY_S)
        try:
            await queue.sweep(settings.keep_results_s, settings.retention_s)
        except FaashoundError as error:
            log.warning(f"housekeeping in the queue failed: {error}")


async def serve(settings: Settings, environ: Mapping[str, str], sockets: Sequence[socket.socket]) -> int:
    """Serve until told to stop; return the exit status."""
    loop = asyncio.get_running_loop()
    signals = Signals(loop)
    watch_lifeline(loop, environ, signals.stop_now)
    port = describe_socket(sockets[0])
    async with AsyncExitStack() as stack:
        credentials = load_credentials(settings)
        queue = await Spool.open(settings.queue_url)
        stack.push_async_callback(queue.close)
        local = LocalFunctions(load_functions(settings, environ), environ=environ, hidden=hidden_names())
        local.start()
        stack.push_async_callback(local.stop, FUNCTIONS_GRACE_S)
        policy = build_policy([f"http://127.0.0.1:{port}"], settings.callback_allow)
        gateway = Gateway(settings, Functions(local.table, settings.function_url), queue, policy, credentials)
        stack.push_async_callback(gateway.client.close)
        metrics_server = await start_metrics(settings.host, settings.metrics_port, gateway.serve_metrics)
        stack.callback(metrics_server.abort)
        timeouts = ServerTimeouts(settings.read_timeout_s, settings.write_timeout_s, settings.read_timeout_s)
        server = Server(gateway, timeouts)
        for sock in sockets:
            await server.listen(sock)
            log.info(f"Listening on port: {describe_socket(sock)}")
        stack.callback(asyncio.create_task(keep_house(queue, settings)).cancel)
        keeper = Keeper()
        if settings.worker == "local":
            keeper.start("the worker", WORKER_COMMAND, worker_environment(settings, environ, port))
        await signals.first.wait()
        gateway.accepting = False
        await finished_first(keeper.stop(LONGEST_DURATION_S), signals.second.wait())
        await keeper.stop(0.0)
        return await drain_server(server, signals, settings.upstream_timeout_s)


def hidden_names() -> set[str]:
    """Return the names of the settings that are no business of a function."""
    return {row.name for kind in (Settings, WorkerSettings) for row in settings_table(kind).values()}


PURPOSE = "Serves every function under one address, now (/function/NAME) or later (/async-function/NAME)."


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the gateway and return its exit status: 0 stopped, 1 failed or cut calls, 2 bad settings."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    answer = flag_answer(argv, help_text("fgateway", PURPOSE, Settings))
    if answer is not None:
        return answer
    settings = load_settings(Settings, environ)
    if settings is None:
        return 2
    log.configure(settings.log_format, environ.get("OPENFAAS_NAME"))
    try:
        sockets = open_sockets(settings.host, settings.port, environ)
        return uvloop.run(serve(settings, environ, sockets))
    except (BadFunctions, BadSettings) as error:
        print(error, file=sys.stderr)
        return 2
    except FaashoundError as error:
        log.error(str(error))
        return 1
    finally:
        log.flush()


if __name__ == "__main__":
    sys.exit(main())
