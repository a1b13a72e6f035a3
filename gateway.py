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
    GET    /system/calls                   calls by ?state= ?function= ?callback= ?limit= ?before=; DELETE deletes
    POST   /system/calls/cancel            cancels all that is queued, or with ?function= of one function
    GET    /system/calls/ID                payload, headers, attempts; POST .../retry for dead letters; DELETE
    GET    /healthz                        200 while it and what is behind it work, else 503 and what does not

HEAD works wherever GET does.  What comes round through us again is answered with 508, a browser's page that is a
stranger's with 403, one that has bound its own name to our address with 421 (see browsers.py).

What it promises: a 202 is never given for a call that a crash could lose.  Beside itself it runs a watchdog for each
local function and, with a spool, a worker; all of them end when it ends, whatever way.  What it refuses to do: run
anything itself, retry, or follow redirects.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import re
import socket
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import uvloop
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from .calls.callbacks import (
    CALLBACK_PROOF,
    CallbackAllow,
    CallbackPolicy,
    build_policy,
    build_proof,
    parse_callback_allow,
)
from .calls.ids import new_call_id
from .calls.model import FINAL, Bounds, Call, NewCall, QueueLimits, QueueUnavailable, State, Stats
from .calls.names import DEFAULT_NAMESPACE, FunctionName, parse_namespaces
from .calls.views import Choice, describe_call, parse_choice_query
from .functions.local import LocalFunctions
from .functions.supervisor import Program, Supervisor, python_command
from .functions.table import (
    DEFAULT_QUEUE,
    BadFunctions,
    Function,
    Functions,
    completes_host,
    parse_function_url,
    parse_upstream,
    read_functions,
)
from .network.addresses import AddressRefused, guard_functions, parse_literal
from .network.lookups import strangers_names, system_names
from .queues import Queue, open_queue, trouble_of
from .queues.letters import describe_call_whole, find_call, list_calls, purge_call, retry_letter
from .queues.nats_settings import NatsSettings
from .queues.urls import QUEUE_RESERVE_HELP, QueueUrl, parse_queue_url
from .serving.browsers import (
    BrowserRules,
    PageRefused,
    UnknownHost,
    check_own_page,
    parse_hosts,
    parse_origins,
    with_fields,
)
from .serving.health import TROUBLE_KEY, Health, stray_queues
from .serving.passwords import Credentials, PasswordDoor
from .serving.proxying import build_via, check_path, forwarded
from .watchdog import (
    CLIENT_GONE_STATUS,
    CONNECTIONS_DEFAULT,
    CONNECTIONS_HELP,
    LONGEST_DURATION_S,
    PER_ADDRESS_DEFAULT,
    PER_ADDRESS_HELP,
    TEXT_PLAIN,
    WORKERS_HELP,
    Aftercare,
    BadSettings,
    Body,
    BodyTooLarge,
    CannotStart,
    Client,
    ClientResponse,
    Doors,
    Duty,
    FaashoundError,
    Header,
    Histogram,
    MethodNotAllowed,
    NotReady,
    PeerGone,
    Request,
    Response,
    Seat,
    Server,
    ServerTimeouts,
    Signals,
    Unreachable,
    UpstreamTimeout,
    Url,
    call_id_of,
    connection_limits,
    cumulated,
    drain_server,
    end_to_end,
    error_response,
    finished_first,
    flag_answer,
    format_duration,
    help_text,
    log,
    log_origin,
    lookalikes,
    open_doors,
    parse_bool,
    parse_choice,
    parse_duration,
    parse_port,
    parse_positive_count,
    parse_positive_duration,
    parse_settings,
    parse_size,
    parse_text,
    parse_workers,
    read_file,
    run_members,
    serve_metrics,
    setting,
    settings_table,
    settle_descriptors,
    start_metrics,
    watch_lifeline,
    whole,
)
from .worker import WORKER_TOKEN
from .worker import Settings as WorkerSettings

T = TypeVar("T")

MAX_PUT_S = 10.0  # for a queue to take a call; a disk, or whoever holds the queue's lock, may be stuck
MAX_WAIT_S = 600.0  # of ?wait: longer than proxies keep a silent connection
LONG_POLL_RETRY_S = 5  # after so long a caller may try to wait again, if there are too many
MAX_KEY_CHARS = 255  # of an Idempotency-Key, as the drafts and peers have it
SWEEP_EVERY_S = 60.0  # between two rounds of housekeeping in the queue
WORKER_METRICS_PORT = 8083
MAX_TOLD_COUNT = 20  # functions listed in the log at the start, a line each
MAX_LABELS_COUNT = 1000  # functions that function_url finds and that have metrics of their own


@dataclass(frozen=True, slots=True)
class Settings(NatsSettings):
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
        "function_url",
        "",
        parse_function_url,
        "where functions answer that the file does not list: http://{name}.{namespace}.svc.cluster.local:8080",
    )
    namespaces: frozenset[str] = setting(
        "namespaces", DEFAULT_NAMESPACE, parse_namespaces, "namespaces in which function_url finds functions, by commas"
    )
    queue_url: QueueUrl = setting(
        "queue_url", "spool:./spool", parse_queue_url, "the queue: spool:DIRECTORY, or nats://HOST[:PORT][,HOST...]"
    )
    worker: str | None = setting(
        "worker",
        "",
        parse_choice("local", "none"),
        "local: run a worker beside the gateway",
        default_note="local with a spool, else none",
    )
    max_connections: int | None = setting(
        "max_connections", "", parse_positive_count, CONNECTIONS_HELP, default_note=CONNECTIONS_DEFAULT
    )
    max_connections_per_address: int | None = setting(
        "max_connections_per_address", "", parse_positive_count, PER_ADDRESS_HELP, default_note=PER_ADDRESS_DEFAULT
    )
    workers: int = setting("workers", "1", parse_workers, WORKERS_HELP)
    max_body_bytes: int = setting(
        "max_body", "512MiB", parse_size, "largest body of an asynchronous call, above it 413"
    )
    worker_metrics_port: int | None = setting(
        "worker_metrics_port",
        "",
        parse_port,
        "port of the local worker's /metrics; 0 disables it",
        default_note="8083, or 0 if metrics_port is 0",
    )
    max_delay_s: float = setting("max_delay", "744h", parse_positive_duration, "longest X-Delay, above it 400")
    max_queued: int = setting(
        "max_queued", "1000000", parse_positive_count, "calls that one function may have waiting, above it 429"
    )
    max_queued_bytes: int = setting(
        "max_queued_bytes", "16GiB", parse_size, "bytes of payload that one function may have waiting, above it 507"
    )
    max_queue_age_s: float = setting(
        "max_queue_age", "744h", parse_positive_duration, "how long a call may be due and not be run; then it expires"
    )
    queue_reserve_bytes: int = setting("queue_reserve", "8MiB", parse_size, QUEUE_RESERVE_HELP)
    keep_dead_s: float = setting(
        "keep_dead", "2160h", parse_positive_duration, "how long dead letters and undelivered results are kept"
    )
    keep_dead_bytes: int = setting(
        "keep_dead_bytes", "4GiB", parse_size, "how many bytes of them are kept, the newest first"
    )
    keep_results_s: float = setting("keep_results", "1h", parse_duration, "how long a result can be fetched")
    retention_s: float = setting("retention", "24h", parse_duration, "how long a finished call is remembered")
    callback_allow: CallbackAllow | None = setting(
        "callback_allow", "", parse_callback_allow, "hosts and networks that callbacks may go to besides public ones"
    )
    allowed_hosts: frozenset[str] | None = setting(
        "allowed_hosts",
        "",
        parse_hosts,
        "host names that we answer to, by commas, besides localhost and addresses",
        default_note="none on loopback without basic_auth, else any",
    )
    allowed_origins: frozenset[bytes] | None = setting(
        "allowed_origins",
        "",
        parse_origins,
        "origins of web pages that may call functions, by commas",
        default_note="none on loopback without basic_auth, else as functions say",
    )
    max_long_polls: int = setting(
        "max_long_polls", "1000", parse_positive_count, "callers that wait for a call by ?wait= at once; above it 503"
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
        yield from NatsSettings.conflicts(self)
        port = self.local_worker_metrics_port
        if self.runs_worker and port and port in (self.port, self.metrics_port):
            yield f"worker_metrics_port={port} contradicts port or metrics_port; allowed: one of its own"
        if self.keep_results_s > self.retention_s:
            yield "keep_results is longer than retention; allowed: up to retention, which forgets the call"

    @property
    def runs_worker(self) -> bool:
        """Whether a worker is to run beside the gateway."""
        return isinstance(self.queue_url, Path) if self.worker is None else self.worker == "local"

    @property
    def local_worker_metrics_port(self) -> int:
        """The port of the local worker's /metrics; 0: it has none."""
        if self.worker_metrics_port is not None:
            return self.worker_metrics_port
        return WORKER_METRICS_PORT if self.metrics_port else 0


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


class Forbidden(FaashoundError):
    """Whoever asks may not have this."""

    status = 403


class Conflict(FaashoundError):
    """The call is not in a state for this."""

    status = 409


class TooManyWaits(FaashoundError):
    """As many callers as may wait for calls to end already do; each holds a connection for minutes."""

    status = 503
    headers = ((b"Retry-After", b"%d" % LONG_POLL_RETRY_S),)

    def __init__(self, limit_count: int) -> None:
        super().__init__(f"{limit_count} callers wait for calls to end, which is max_long_polls; ask without wait")


class Gone(FaashoundError):
    """The result was there and has been dropped (keep_results)."""

    status = 410


# ---------------------------------------------------------------------------------------------------------------
# Reading a submission and showing a call (pure).
# ---------------------------------------------------------------------------------------------------------------

_UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
_KEY = re.compile(rf"[\x21-\x7e](?:[\x20-\x7e]{{0,{MAX_KEY_CHARS - 2}}}[\x21-\x7e])?", re.ASCII)

# Ours, or meant for the queue: not the function's business when the call is made.
_SUBMISSION_FIELDS = (b"x-delay", b"x-expires", b"idempotency-key")
_FORWARDED = (b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto")
_TRACED = (b"x-call-id", b"x-start-time")
_NEVER_PASSED_ON = (b"host", b"expect", WORKER_TOKEN.lower(), CALLBACK_PROOF.lower())


def parse_span(request: Request, name: str, parse: Callable[[str], float]) -> float | None:
    """Return the seconds that a header field such as X-Delay asks for; BadField names it and what is allowed."""
    value = request.header(name.lower().encode())
    if value is None:
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


def parse_wait(query: bytes) -> float:
    """Return the seconds of ?wait=30s, 0 without it; BadField for anything else in the query."""
    wait_s = 0.0
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name != "wait":
            raise BadField(f"unknown query parameter {name[:100]!r}; allowed: wait")
        try:
            wait_s = parse_duration(value)
        except ValueError as error:
            raise BadField(f"wait={value[:100]!r}: {error}") from None
    if wait_s > MAX_WAIT_S:
        raise BadField(f"wait: allowed: up to {MAX_WAIT_S:g}s")
    return wait_s


def describe_function(function: Function) -> dict[str, object]:
    """Return what the gateway knows of a function, as JSON members."""
    return {
        "name": function.name.name,
        "namespace": function.name.namespace,
        "local": function.local,
        "annotations": dict(function.annotations),
        "labels": dict(function.labels),
    }


def json_response(status: int, value: object, headers: Sequence[Header] = ()) -> Response:
    """Return `value` as a JSON document, readable in a terminal."""
    body = json.dumps(value, indent=2).encode() + b"\n"
    return Response(status, ((b"Content-Type", b"application/json"), *headers), body)


def function_target(function: Function, request: Request, rest: bytes) -> Url:
    """Return where a request for a function goes: the function's address, the rest of the path, the query."""
    if function.url is None:
        raise AssertionError(f"{function.name} has no address: local functions get theirs when they are started")
    base = parse_upstream(function.url)
    target = base.target.rstrip("/") + (rest.decode() or "/") + (f"?{request.query.decode()}" if request.query else "")
    return Url(base.scheme, base.host, base.port, target)


def split_path(path: bytes) -> tuple[str, str, bytes]:
    """Return (area, name, rest) of `/area/name/rest`; rest keeps its slash."""
    area, *more = path.removeprefix(b"/").split(b"/", 2)
    name = more[0].decode("latin-1") if more else ""
    return area.decode("latin-1"), name, b"/" + more[1] if len(more) > 1 else b""


# ---------------------------------------------------------------------------------------------------------------
# The application.
# ---------------------------------------------------------------------------------------------------------------


class GatewayMetrics:
    """The metrics of the OpenFaaS gateway, under the same names, and the queue's depth.

    Where `function_url` finds functions, strangers can make up names: such a name is counted as its own only once a
    function has answered to it, and as "other" until then.
    """

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._answered: set[str] = set()
        self._stats: Stats | None = None

    def begin(self, function: Function | None, *, listed: bool) -> str:
        """Count the start of an invocation; return the label that `end` is to be given."""
        label = function.name if function and (listed or function.name in self._answered) else "other"
        self._seat.cell(f"started {label}", 1)[0] += 1
        return label

    def end(self, label: str, status: int, duration_s: float) -> None:
        """Count the end of an invocation."""
        Histogram.at(self._seat, f"seconds {label} {status}").observe(duration_s)

    def answered(self, name: str) -> None:
        """There is a function of this name."""
        if len(self._answered) < MAX_LABELS_COUNT:
            self._answered.add(name)

    def submitted(self, status: int) -> None:
        """Count a submission."""
        self._seat.cell(f"submitted {status}", 1)[0] += 1

    def dropped(self, count: int) -> None:
        """Count dead letters that `keep_dead` has ended."""
        self._seat.cell("dropped", 1)[0] += count

    def show_queue(self, stats: Stats) -> None:
        """Have the figures of the queue shown, from now on."""
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all processes; prometheus_client asks for them."""
        labels = ("function_name", "code")
        total = CounterMetricFamily("gateway_function_invocation", "Function invocations, by outcome", labels=labels)
        seconds = HistogramMetricFamily("gateway_functions_seconds", "Function time taken", labels=labels)
        # A gauge: OpenFaaS's counter has no _total, which a counter's name would end with.
        started = GaugeMetricFamily(
            "gateway_function_invocation_started", "Function invocations begun", labels=("function_name",)
        )
        submitted = CounterMetricFamily(
            "gateway_async_submissions", "Asynchronous calls submitted, by outcome", labels=("code",)
        )
        trouble = GaugeMetricFamily(
            "gateway_trouble", "Processes of ours that find a part behind the gateway not working", labels=("part",)
        )
        dropped = CounterMetricFamily(
            "gateway_queue_dropped_letters", "Dead letters and undelivered results that keep_dead has ended"
        )
        counters: Mapping[str, CounterMetricFamily | GaugeMetricFamily] = {
            "started": started,
            "submitted": submitted,
            "dropped": dropped,
            TROUBLE_KEY: trouble,
        }
        for key, numbers in self._seat.board.tally.totals().items():
            kind, *label = key.split()
            if kind == "seconds":
                buckets, sum_s = cumulated(numbers)
                total.add_metric(label, buckets[-1][1])
                seconds.add_metric(label, buckets, sum_s)
            else:
                counters[kind].add_metric(label, numbers[0])
        yield from (total, started, seconds, submitted, dropped, trouble)
        if self._stats is not None:
            yield from queue_metrics(self._stats)


def queue_metrics(stats: Stats) -> Iterator[Metric]:
    """Yield the figures of the queue as metrics."""
    calls = GaugeMetricFamily("gateway_queue_calls", "Asynchronous calls, by state", labels=("state",))
    for state in State:
        calls.add_metric((state.value,), stats.by_state.get(state, 0))
    yield calls
    waiting = GaugeMetricFamily("gateway_queue_waiting", "Calls and callbacks that wait, by queue", labels=("queue",))
    for name, count in stats.waiting.items():
        waiting.add_metric((name,), count)
    yield waiting
    yield GaugeMetricFamily(
        "gateway_queue_dead_callbacks", "Results that could not be delivered", value=stats.callback_dead_count
    )
    yield GaugeMetricFamily(
        "gateway_queue_oldest_due_seconds", "How long the oldest due call has waited", value=stats.oldest_due_age_s or 0
    )
    if stats.free_bytes is not None:
        yield GaugeMetricFamily("gateway_queue_free_bytes", "Room on the queue's disk", value=stats.free_bytes)
    if stats.reserve_bytes is not None:
        yield GaugeMetricFamily(
            "gateway_queue_reserve_bytes", "Room that is kept for ending calls", value=stats.reserve_bytes
        )


class Trace(NamedTuple):
    """What ties the records of one call together: its id, its start (ns since the epoch), whether a worker asks."""

    call_id: str
    start_time: bytes
    by_worker: bool

    @property
    def fields(self) -> tuple[Header, Header]:
        """The header fields that carry it, in requests and responses."""
        return (b"X-Call-Id", self.call_id.encode()), (b"X-Start-Time", self.start_time)


class SharedLimit:
    """A limit in time for many tasks, with one timer for all: whoever begins first is the first to be late."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadlines: dict[asyncio.Task[Any], float] = {}  # in the order in which they come
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, work: Awaitable[T]) -> T:
        """Return what `work` brings; TimeoutError, `work` being cancelled, when that takes too long."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        if task is None or task in self._deadlines:
            raise AssertionError("only a task can be limited, and once at a time")
        cancelling = task.cancelling()
        self._deadlines[task] = loop.time() + self._limit_s
        if self._timer is None:
            self._timer = loop.call_later(self._limit_s, self._on_time)
        try:
            return await work
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() <= cancelling:  # as asyncio.timeout has it
                raise TimeoutError from None
            raise
        finally:
            del self._deadlines[task]
            self._late.discard(task)

    def _on_time(self) -> None:
        """End what is late, and come again when the next one may be."""
        loop, self._timer = asyncio.get_running_loop(), None
        now_s = loop.time()
        for task, deadline_s in self._deadlines.items():
            if deadline_s > now_s:
                self._timer = loop.call_at(deadline_s, self._on_time)
                return
            if task not in self._late:
                self._late.add(task)
                task.cancel()


class Gateway:
    """Handler of the gateway's server."""

    def __init__(
        self,
        settings: Settings,
        functions: Functions,
        queue: Queue,
        policy: CallbackPolicy,
        door: PasswordDoor | None,
        pages: BrowserRules,
        seat: Seat,
    ) -> None:
        self.metrics = GatewayMetrics(seat)
        self.health = Health(seat)
        self._names = system_names()
        self._client = Client(self._names)
        self._found_names = strangers_names()
        guarded = completes_host(settings.function_url)
        self._found_client = Client(guard_functions(self._found_names)) if guarded else self._client
        self.draining = False
        self._pages = pages
        self._waits: set[asyncio.Timeout] = set()
        self._seat = seat
        self._put_limit = SharedLimit(MAX_PUT_S)
        self._settings = settings
        self._functions = functions
        self._queue = queue
        self._policy = policy
        self._door = door
        self._token = queue.token.encode()
        self._via = build_via(queue.token)

    async def __call__(self, request: Request) -> Response:
        """Answer one request; cancelled when the client has gone."""
        try:
            return await self._route(request)
        except PageRefused as error:
            log.warning(
                f"Refused [{request.method[:20]}] {request.path[:100].decode('latin-1')} - [{error.status}]",
                host=request.host[:100].decode("latin-1"),
                origin=(request.header(b"origin") or b"")[:100].decode("latin-1"),
                peer=request.peer,
            )
            raise

    async def _route(self, request: Request) -> Response:
        self._check_host(request)
        area, name, rest = split_path(request.path)
        if area == "function" or (area == "async-function" and not _UUID.fullmatch(name)):
            fields = self._pages.check_call(request)
            response = self._pages.answer_preflight(request)
            if response is None:
                response = await (self._invoke if area == "function" else self._on_submission)(request, name, rest)
            return with_fields(response, fields)
        if request.header(CALLBACK_PROOF.lower()) is not None:
            raise Forbidden("callbacks reach /function/NAME and /async-function/NAME, nothing else")
        if area == "async-function":
            check_own_page(request)
            return await self._on_call(request, name.lower(), rest)
        if area == "system":
            check_own_page(request)
            return await self._system(request, name, rest.decode("latin-1"))
        if request.path == b"/healthz":
            return self._answer_health(request)
        raise NotFound("not found; allowed: /function/NAME, /async-function/NAME, /async-function/CALL-ID, /healthz")

    def _check_host(self, request: Request) -> None:
        try:
            self._pages.check_host(request)
        except UnknownHost:
            if not self._is_worker(request):  # which is no browser, and may know us by another name
                raise

    def _answer_health(self, request: Request) -> Response:
        allow(request, "GET")
        found = (
            "draining" if self.draining else None,
            trouble_of(self._queue),
            *self.health.problems(time.monotonic()),
        )
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise NotReady("; ".join(problems))
        return Response(200, (TEXT_PLAIN,), b"OK")

    async def close(self) -> None:
        """Let go of the connections to functions."""
        for each in (self._client, self._found_client, self._names, self._found_names):
            await each.close()

    def drain(self) -> None:
        """Be unhealthy, and let nobody wait any longer for a call to end; everything else goes on."""
        self.draining = True
        for limit in self._waits:
            limit.reschedule(asyncio.get_running_loop().time())

    async def serve_metrics(self, request: Request) -> Response:
        """Answer GET /metrics, on a port of its own, which others may know by other names than they call us by."""
        if self._pages.on_loopback:
            self._check_host(request)
        try:
            self.metrics.show_queue(await self._queue.stats())
        except FaashoundError as error:  # the other figures matter most when the queue is in trouble
            log.warning(f"no figures of the queue: {error}")
        return await serve_metrics(self.metrics, request)

    def _is_worker(self, request: Request) -> bool:
        given = request.header(WORKER_TOKEN.lower()) or b""
        return given != b"" and hmac.compare_digest(given, self._token)  # an empty field is none, whatever our token

    async def _authorize(self, request: Request) -> None:
        if self._door is not None and not self._is_worker(request):
            await self._door.check(request)

    # Now.

    async def _invoke(self, request: Request, name: str, rest: bytes) -> Response:
        """Pass a request on to its function; whatever comes of it is counted, logged, and carries the call's id."""
        trace = self._trace(request)
        function = self._functions.lookup(name)
        label = self.metrics.begin(function, listed=function is not None and function.name in self._functions)
        started_s, status = time.perf_counter(), CLIENT_GONE_STATUS
        reason: dict[str, object] = {}
        try:
            response = await self._answer(request, function, rest, trace)
            status = response.status
        except FaashoundError as error:
            response = error_response(error)
            response.headers = (*response.headers, *trace.fields)
            status, reason = error.status, {"error": error.__cause__ or error}
        finally:
            duration_s = time.perf_counter() - started_s
            self.metrics.end(label, status, duration_s)
            log.info(
                f"Forwarded [{request.method[:20]}] to /function/{name[:100]} - [{status}] - {duration_s:f}s",
                call_id=trace.call_id,
                **reason,
            )
        return response

    def _trace(self, request: Request) -> Trace:
        by_worker = self._is_worker(request)
        start_time = (by_worker and request.header(b"x-start-time")) or b"%d" % time.time_ns()
        return Trace(call_id_of(request) or new_call_id(), start_time, by_worker)

    async def _answer(self, request: Request, function: Function | None, rest: bytes, trace: Trace) -> Response:
        if function is None:
            raise OurFailure(404, "no function has this name")
        check_path(rest)
        if not trace.by_worker:  # whose request bears our entry since its submission
            self._via.check(request)
        response = await self._ask(request, function, rest, trace)
        self.metrics.answered(function.name)
        headers = [*end_to_end(response.headers, *_TRACED, b"date"), *trace.fields]
        write_timeout_s = math.inf if trace.by_worker else None
        return Response(response.status, headers, response.body, response.body.length, write_timeout_s)

    async def _ask(self, request: Request, function: Function, rest: bytes, trace: Trace) -> ClientResponse:
        """Send the request to the function; a worker's carries the fields already that were made at submission."""
        limit_s = self._settings.upstream_timeout_s
        if trace.by_worker:
            deadline_s, headers = None, end_to_end(request.headers, *_NEVER_PASSED_ON, *_TRACED, b"via")
        else:
            deadline_s = time.monotonic() + limit_s
            headers = end_to_end(request.headers, *_NEVER_PASSED_ON, *_TRACED, *_FORWARDED, b"via")
            headers += forwarded(request)
        headers += [*trace.fields, self._via.extend(request)]
        target = function_target(function, request, rest)
        try:
            return await self._client_of(function).request(
                request.method, target, headers, whole(request.body), request.body.length, deadline_s
            )
        except UpstreamTimeout as error:
            text = f"{function.name.short} did not answer within upstream_timeout ({format_duration(limit_s)})"
            raise OurFailure(504, text) from error
        except (
            Unreachable,
            PeerGone,
            AddressRefused,
        ) as error:  # whose text names addresses: for the log, and for our worker
            raise OurFailure(502, f"{function.name.short}: {error if trace.by_worker else 'no answer'}") from error

    def _client_of(self, function: Function) -> Client:
        """Return what reaches a function; the address of one that function_url found may have to be judged first."""
        return self._client if function.name in self._functions else self._found_client

    # Later.

    async def _on_submission(self, request: Request, name: str, rest: bytes) -> Response:
        """Queue a call; whatever comes of it is counted and logged, and carries the id that the caller gave."""
        status, call_id = CLIENT_GONE_STATUS, call_id_of(request)
        reason: dict[str, object] = {}
        try:
            call = await self._submit(request, name, rest)
            call_id, status = call.id, 202
            fields = ((b"X-Call-Id", call.id.encode()), (b"X-Start-Time", _start_time(call.accepted_s)))
            return Response(202, (*fields, (b"Location", b"/async-function/" + call.id.encode())))
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

    async def _submit(self, request: Request, name: str, rest: bytes) -> Call:
        allow(request, "POST")
        function = self._functions.lookup(name)
        if function is None:
            raise NotFound("no function has this name")
        check_path(rest)
        self._via.check(request)
        limit_bytes = self._settings.max_body_bytes
        if request.body.length is not None and request.body.length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        build_call = self._parse_submission(request, function, rest)
        try:
            taken = await self._put(await self._build_call(request, rest, build_call))
        except QueueUnavailable:
            self.health.queue_refused(time.monotonic())
            raise
        self.health.queue_took()
        return taken

    async def _build_call(self, request: Request, rest: bytes, build_call: Callable[..., NewCall]) -> NewCall:
        """Store a request's body and return its call."""
        limit_bytes, body = self._settings.max_body_bytes, whole(request.body)
        if parse_key(request) is None:
            return build_call(body=await self._queue.store_body(body, limit_bytes))
        digest = RequestDigest(request, rest)
        stored = await self._queue.store_body(digest.passing(body), limit_bytes)
        return build_call(body=stored, body_digest=digest.hex())

    async def _put(self, call: NewCall) -> Call:
        try:
            return await self._put_limit.run(self._queue.put(call))
        except TimeoutError:  # it may still get in; whoever asks again with the same id learns so by a 409
            raise QueueUnavailable(f"the queue has not taken the call within {MAX_PUT_S:g}s") from None

    def _parse_submission(self, request: Request, function: Function, rest: bytes) -> Callable[..., NewCall]:
        """Return what builds the call that a request asks for, once given its `body`; all else has been checked."""
        now_s = time.time()
        delay_s = parse_span(request, "X-Delay", self._parse_delay)
        expires_s = parse_span(request, "X-Expires", parse_positive_duration)
        if delay_s is not None and expires_s is not None and expires_s <= delay_s:
            raise BadField("X-Expires is not longer than X-Delay: the call could never run")
        call_id, key = self._identify(request)
        callback_url = (request.header(b"x-callback-url") or b"").decode("latin-1") or None
        if callback_url is not None:
            self._policy.check_url(callback_url)
        fields = end_to_end(request.headers, *_NEVER_PASSED_ON, *_SUBMISSION_FIELDS, *_TRACED, *_FORWARDED, b"via")
        fields += [(b"X-Call-Id", call_id.encode()), (b"X-Start-Time", _start_time(now_s)), *forwarded(request)]
        fields.append(self._via.extend(request))
        return partial(
            NewCall,
            id=call_id,
            function=function.name,
            queue=function.queue,
            method=request.method,
            path=rest.decode(),
            query=request.query.decode(),
            headers=tuple((name.decode(), value.decode("latin-1")) for name, value in fields),
            callback_url=callback_url,
            due_s=now_s + (delay_s or 0.0),
            expires_s=None if expires_s is None else now_s + expires_s,
            idempotency_key=key,
            accepted_s=now_s,
        )

    def _parse_delay(self, text: str) -> float:
        delay_s, longest_s = parse_duration(text), self._settings.max_delay_s
        if delay_s > longest_s:
            raise ValueError(f"allowed: up to {format_duration(longest_s)} (max_delay)")
        return delay_s

    def _identify(self, request: Request) -> tuple[str, str | None]:
        """Return a call's id and its idempotency key.

        A callback of ours that submits the next call of a chain carries the id of the call it reports on: that id is
        in use, and it is what makes a repeated callback the same submission.  No caller's key begins with a space.
        """
        given = (request.header(b"x-call-id") or b"").decode("latin-1").lower()
        if not _UUID.fullmatch(given):
            return new_call_id(), parse_key(request)
        proof = request.header(CALLBACK_PROOF.lower()) or b""
        if hmac.compare_digest(proof, build_proof(self._queue.token, given).encode()):
            return new_call_id(), f" callback of {given}"
        return given, parse_key(request)

    async def _on_call(self, request: Request, call_id: str, rest: bytes) -> Response:
        """GET status or result, DELETE: of one call."""
        if rest not in (b"", b"/result"):
            raise NotFound("not found; allowed: /async-function/CALL-ID and /async-function/CALL-ID/result")
        allow(request, *(("GET",) if rest else ("GET", "DELETE")))
        await self._authorize(request)
        if request.method == "DELETE":
            state = await self._queue.cancel(call_id)
            return json_response(202, {"id": call_id, "state": state.value, "cancel_requested": True})
        call = await self._wait(call_id, parse_wait(request.query))
        return await self._result(request, call) if rest else json_response(200, describe_call(call))

    async def _wait(self, call_id: str, wait_s: float) -> Call:
        """Return the call when it has ended, or as it is after `wait_s` or when we begin to drain."""
        call = await find_call(self._queue, call_id)
        if not wait_s or self.draining or call.state in FINAL:
            return call
        if len(self._waits) >= self._seat.share_of(self._settings.max_long_polls):
            raise TooManyWaits(self._settings.max_long_polls)
        limit = asyncio.timeout(wait_s)
        self._waits.add(limit)
        try:
            async with limit:
                return await self._queue.wait(call_id, wait_s)
        except TimeoutError:
            return await find_call(self._queue, call_id)
        finally:
            self._waits.discard(limit)

    async def _result(self, request: Request, call: Call) -> Response:
        """Return what the function answered, as it answered."""
        if call.state not in FINAL:
            raise Conflict(f"the call is {call.state.value}; ?wait=30s waits for its end")
        if call.result is None or call.status is None:
            dropped = call.state is State.DONE or (call.state is State.DEAD and call.excerpt is not None)
            if dropped:
                raise Gone("the result is no longer kept (keep_results)")
            raise NotFound(f"the call is {call.state.value} and has no result: {call.error or 'it never ran'}")
        fields = [(name.encode(), value.encode("latin-1")) for name, value in call.result_headers]
        fields = [*end_to_end(fields, b"x-call-id", b"date"), (b"X-Call-Id", call.id.encode())]
        body = b"" if request.method == "HEAD" else self._queue.open_body(call.result)
        return Response(call.status, fields, body, call.result.bytes_count)

    # For operators and workers.

    async def _system(self, request: Request, name: str, rest: str) -> Response:
        await self._authorize(request)
        if name == "functions" and not rest:
            allow(request, "GET")
            return json_response(200, [describe_function(function) for function in self._functions])
        if name == "function" and rest:
            allow(request, "GET")
            function = self._functions.lookup(rest[1:])
            if function is None:
                raise NotFound("no function has this name")
            return json_response(200, describe_function(function))
        if name == "calls":
            return await self._system_calls(request, rest)
        raise NotFound(
            "not found; allowed: /system/functions, /system/function/NAME, /system/calls, /system/calls/CALL-ID"
        )

    async def _system_calls(self, request: Request, rest: str) -> Response:
        """See and act on calls: all that a query chooses, or one."""
        if not rest:
            allow(request, "GET", "DELETE")
            choice = parse_choice_query(request.query)
            return await (self._purge(choice) if request.method == "DELETE" else self._list(choice))
        call_id, _, verb = rest[1:].partition("/")
        call_id = call_id.lower()
        if call_id == "cancel" and not verb:
            allow(request, "POST")
            return await self._cancel_queued(parse_choice_query(request.query))
        if verb == "retry":
            allow(request, "POST")
            return json_response(202, describe_call(await retry_letter(self._queue, call_id)))
        if verb:
            raise NotFound("not found; allowed: /system/calls/CALL-ID and /system/calls/CALL-ID/retry")
        allow(request, "GET", "DELETE")
        if request.method == "DELETE":
            await purge_call(self._queue, call_id)
            return Response(204)
        return json_response(200, await describe_call_whole(self._queue, await find_call(self._queue, call_id)))

    async def _list(self, choice: Choice) -> Response:
        calls = await list_calls(self._queue, choice)
        before = calls[-1].id if len(calls) == choice.limit_count else None
        return json_response(200, {"calls": [describe_call(call) for call in calls], "before": before})

    async def _cancel_queued(self, choice: Choice) -> Response:
        if choice != Choice(function=choice.function):
            raise BadField("allowed: ?function=, or nothing for every function")
        return json_response(200, {"cancelled": await self._queue.cancel_queued(function=choice.function)})

    async def _purge(self, choice: Choice) -> Response:
        if choice.state not in FINAL or choice != Choice(choice.state, choice.function):
            states = ", ".join(sorted(state.value for state in FINAL))
            raise BadField(
                f"allowed: ?state= and, if need be, &function=; state must be one of {states};"
                " POST /system/calls/cancel cancels what is queued"
            )
        count = await self._queue.purge(state=choice.state, function=choice.function)
        return json_response(200, {"deleted": count})


def allow(request: Request, *methods: str) -> None:
    """Raise MethodNotAllowed unless the request's method is one of `methods`, or HEAD where GET is (RFC 9110 9.3.2)."""
    allowed = [each for method in methods for each in (("GET", "HEAD") if method == "GET" else (method,))]
    if request.method not in allowed:
        raise MethodNotAllowed(allowed)


def _start_time(epoch_s: float) -> bytes:
    return b"%d" % int(epoch_s * 1e9)


# ---------------------------------------------------------------------------------------------------------------
# What is to be run: settings of ours and of the worker beside us, the functions, the credentials.  All that is wrong
# with them is told at once.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """A gateway to be started.  `worker` is the environment of the worker beside it, but for its gateway_url."""

    settings: Settings
    functions: Mapping[FunctionName, Function]
    worker: Mapping[str, str] | None


def load_plan(environ: Mapping[str, str]) -> Plan:
    """Return what `environ` asks for; raises BadSettings with every problem in it, and in what it points to."""
    problems: list[str] = []
    settings: Settings | None = None
    functions: dict[FunctionName, Function] = {}
    try:
        settings = parse_settings(Settings, environ)
    except BadSettings as error:
        problems += error.problems
    try:
        functions = load_functions(environ)
    except BadFunctions as error:
        problems += error.problems
    runs_worker = environ.get("worker") != "none" if settings is None else settings.runs_worker
    worker = worker_environment(environ, settings, functions) if runs_worker else None
    try:
        parse_settings(WorkerSettings, worker or {})
    except BadSettings as error:
        problems += error.problems
    if problems or settings is None:
        raise BadSettings(dict.fromkeys(problems))  # what both programs read is told once
    return Plan(settings, functions, worker)


def load_functions(environ: Mapping[str, str]) -> dict[FunctionName, Function]:
    """Return the functions of the file that `functions` names; raises BadFunctions."""
    path = Path(environ.get("functions") or settings_table(Settings)["functions"].default or "")
    return read_functions(path, missing_ok=not environ.get("functions"))


def worker_environment(
    environ: Mapping[str, str], settings: Settings | None, functions: Mapping[FunctionName, Function]
) -> dict[str, str]:
    """Return the environment of the worker beside us: its own settings as they stand, the rest as ours are.

    Unless told otherwise it drains every queue that a function of the file has, or their calls would wait for ever.
    """
    shared = {row.name for row in settings_table(WorkerSettings).values()} - {"host", "metrics_port"}
    ours = {row.name for row in settings_table(Settings).values()} - shared
    base = {name: value for name, value in environ.items() if name not in ours and not name.startswith("LISTEN_")}
    base |= {"OPENFAAS_NAME": "worker"}
    base.setdefault("queues", ",".join(sorted({DEFAULT_QUEUE, *(function.queue for function in functions.values())})))
    if settings is not None:
        base |= {"host": settings.host or "", "metrics_port": str(settings.local_worker_metrics_port)}
    return base


def load_door(settings: Settings) -> PasswordDoor | None:
    """Return what asks for the password before calls and functions; None if nothing does.  Raises CannotStart."""
    if not settings.basic_auth:
        return None
    texts = []
    for name in ("basic-auth-user", "basic-auth-password"):
        path = str(Path(settings.secret_mount_path) / name)
        text = read_file(path, "basic_auth=true needs it").strip()
        if not text:
            raise CannotStart(f"{path} is empty (basic_auth=true needs it)")
        texts.append(text)
    return PasswordDoor(Credentials(*texts))


def local_url(sockets: Iterable[socket.socket]) -> str | None:
    """Return the URL at which this machine reaches one of `sockets`; None if none of them is TCP."""
    for sock in sockets:
        name = sock.getsockname()
        if isinstance(name, tuple):
            address, port = ip_address(name[0].partition("%")[0]), name[1]
            if address.is_unspecified:
                address = ip_address("127.0.0.1" if address.version == 4 else "::1")
            return f"http://{address}:{port}" if address.version == 4 else f"http://[{address}]:{port}"
    return None


def is_open_to_others(sockets: Iterable[socket.socket]) -> bool:
    """Tell whether other machines may reach one of `sockets`."""
    names = [sock.getsockname() for sock in sockets]
    return any(isinstance(name, tuple) and not ip_address(name[0].partition("%")[0]).is_loopback for name in names)


def hidden_names() -> set[str]:
    """Return the names of the settings that are no business of a function."""
    return {row.name for kind in (Settings, WorkerSettings) for row in settings_table(kind).values()}


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle.  SIGTERM: unhealthy; the local worker drains while we still serve, since its calls come through us;
# then no more connections, what is in flight finishes within upstream_timeout, and the local functions end.
# ---------------------------------------------------------------------------------------------------------------

WORKER_GONE_POLL_S = 0.05
FUNCTIONS_GRACE_S = 10.0  # for watchdogs whose requests are over already
WORKER_COMMAND = python_command("faashound.worker")


async def keep_house(queue: Queue, settings: Settings, drained: Collection[str], metrics: GatewayMetrics) -> None:
    """Drop what is past its time from the queue, for ever, and tell of calls in queues that are none of `drained`."""
    bounds = Bounds(settings.max_queue_age_s, settings.keep_dead_s, settings.keep_dead_bytes)
    shortest_s = min(settings.keep_results_s, settings.retention_s)
    told: Mapping[str, int] = {}
    while True:
        try:
            swept = await queue.sweep(settings.keep_results_s, settings.retention_s, bounds)
            metrics.dropped(swept.dead_count)
            stray = stray_queues((await queue.stats()).waiting, drained)
            if stray.keys() != told.keys():
                tell_of_stray_queues(stray)
            told = stray
        except FaashoundError as error:
            log.warning(f"housekeeping in the queue failed: {error}")
        await asyncio.sleep(min(SWEEP_EVERY_S, max(shortest_s, 1.0)))


def tell_of_stray_queues(stray: Mapping[str, int]) -> None:
    """Log which queues have calls that may wait for ever."""
    for name, count in stray.items():
        log.warning(
            f"nothing here drains the queue {name}, which no function names any more: calls and callbacks that wait in"
            f" it: {count}; a worker with queues={name} makes them"
        )


def drained_queues(plan: Plan) -> frozenset[str]:
    """Return the queues that functions name or the worker beside us drains."""
    named = {DEFAULT_QUEUE, *(function.queue for function in plan.functions.values())}
    return frozenset(named.union(() if plan.worker is None else parse_settings(WorkerSettings, plan.worker).queues))


def tell_what_is_served(plan: Plan, url: str | None, sockets: Sequence[socket.socket]) -> None:
    """Log what one can do now, and whether others can."""
    for warning in timeout_warnings(plan):
        log.warning(warning)
    names = list(plan.functions)
    for name in names[:MAX_TOLD_COUNT]:
        log.info(f"Serving {url or ''}/function/{name.short}")
    if len(names) > MAX_TOLD_COUNT:
        log.info(f"... and {len(names) - MAX_TOLD_COUNT} functions more, see {url or ''}/system/functions")
    if not names and plan.settings.function_url is None:
        log.warning(f"no functions: {plan.settings.functions} lists none, and function_url is not set")
    if is_open_to_others(sockets) and not plan.settings.basic_auth:
        log.warning(
            "other machines reach this port, and basic_auth=false: whoever does can call functions, and see and cancel"
            " the calls of others"
        )


def timeout_warnings(plan: Plan) -> Iterator[str]:
    """Yield a line for each pair of timeouts that we can see and that do not agree; see the README's table."""
    worker = None if plan.worker is None else parse_settings(WorkerSettings, plan.worker)
    waits_s = {
        "upstream_timeout": plan.settings.upstream_timeout_s,
        "call_timeout": worker.call_timeout_s if worker else 0,
    }
    for name, function in plan.functions.items():
        limit_s = parse_duration((function.settings or {}).get("exec_timeout") or "0")
        for waiting, wait_s in waits_s.items():
            if wait_s and limit_s > wait_s:
                yield (
                    f"{waiting} ({format_duration(wait_s)}) is shorter than exec_timeout of {name.short}"
                    f" ({format_duration(limit_s)}), which is cut from outside before it can end by itself"
                )


async def serve(plan: Plan, local: LocalFunctions, doors: Doors, duty: Duty) -> int:
    """Serve until told to stop; return the exit status."""
    settings, loop = plan.settings, asyncio.get_running_loop()
    signals = Signals(loop)
    watch_lifeline(loop, duty.lifeline_fd, signals.stop_now)
    url = local_url(doors.own)
    async with AsyncExitStack() as stack:
        gateway = await assemble(stack, plan, local, doors.own, duty.seat)
        metrics_server = start_metrics(doors.metrics, gateway.serve_metrics)
        stack.callback(metrics_server.abort)
        timeouts = ServerTimeouts(settings.read_timeout_s, settings.write_timeout_s, settings.read_timeout_s)
        limits = connection_limits(settings.max_connections, settings.max_connections_per_address, 3, duty.seat)
        server = Server(gateway, timeouts, seat=duty.seat, limits=limits)
        for sock in doors.own:
            server.listen(sock)
        duty.on_serving()
        supervisor = Supervisor()
        stack.push_async_callback(supervisor.stop, 0.0)
        if duty.seat.is_first and plan.worker is not None:
            environ = {**plan.worker, "gateway_url": url or ""}
            on_trouble = gateway.health.worker_trouble
            supervisor.start(Program("the worker", WORKER_COMMAND, environ, on_trouble=on_trouble))
        await signals.first.wait()
        gateway.drain()
        await finished_first(worker_gone(supervisor, duty.seat), signals.second.wait())
        if signals.second.is_set():  # whoever takes our place must not wait for the worker to be gone
            server.stop_accepting()
            metrics_server.stop_accepting()
        await supervisor.stop(0.0)
        return await drain_server(server, signals, settings.upstream_timeout_s)


async def worker_gone(supervisor: Supervisor, seat: Seat) -> None:
    """Let the local worker drain; where it is another process's, wait until that one has seen to it."""
    await supervisor.stop(LONGEST_DURATION_S)
    while not seat.is_first and seat.board.serving[0]:  # noqa: ASYNC110 - another process sets no event of ours
        await asyncio.sleep(WORKER_GONE_POLL_S)


async def assemble(
    stack: AsyncExitStack, plan: Plan, local: LocalFunctions, sockets: Sequence[socket.socket], seat: Seat
) -> Gateway:
    """Return the gateway of `sockets` with all that is behind it at work.

    That is the queue and, in the first process, the local functions and the housekeeping.  `stack` ends it all.
    Raises CannotStart and the queue's errors.
    """
    settings, url = plan.settings, local_url(sockets)
    door = load_door(settings)
    limits = QueueLimits(settings.queue_reserve_bytes, settings.max_queued, settings.max_queued_bytes)
    queue = await open_queue(settings.queue_url, settings, limits=limits)
    stack.push_async_callback(queue.close)
    if seat.is_first:
        local.start()
        stack.push_async_callback(local.stop, FUNCTIONS_GRACE_S)
    policy = build_policy([url] if url else [], settings.callback_allow)
    table = local.table if seat.is_first else local.published
    functions = Functions(table, settings.function_url, settings.namespaces)
    gateway = Gateway(settings, functions, queue, policy, door, browser_rules(settings, sockets), seat)
    stack.push_async_callback(gateway.close)
    if seat.is_first:
        housekeeping = keep_house(queue, settings, drained_queues(plan), gateway.metrics)
        stack.callback(asyncio.create_task(housekeeping).cancel)
    return gateway


def browser_rules(settings: Settings, sockets: Sequence[socket.socket]) -> BrowserRules:
    """Return what browsers' pages may do at the gateway of `sockets`."""
    on_loopback = local_url(sockets) is not None and not is_open_to_others(sockets) and not settings.basic_auth
    names = settings.allowed_hosts or frozenset()
    if on_loopback and settings.host and parse_literal(settings.host) is None:
        names |= {settings.host.lower()}  # that it listens on this name is the operator's word
    return BrowserRules(on_loopback, names, settings.allowed_origins or frozenset())


PURPOSE = "Serves every function under one address, now (/function/NAME) or later (/async-function/NAME)."


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the gateway and return its exit status: 0 stopped, 1 failed or cut calls, 2 bad settings."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    settle_descriptors()
    answer = flag_answer(argv, help_text("fgateway", PURPOSE, Settings))
    if answer is not None:
        return answer
    try:
        plan = load_plan(environ)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    log.configure(plan.settings.log_format, log_origin(environ))
    try:
        for warning in lookalikes(Settings, environ):
            log.warning(warning)
        return run(plan, environ)
    except FaashoundError as error:
        log.error(str(error))
        return 1
    finally:
        log.flush()


def run(plan: Plan, environ: Mapping[str, str]) -> int:
    """Open what is shared by all processes, and serve in them; return the exit status."""
    settings = plan.settings
    doors = open_doors(settings.host, settings.port, settings.metrics_port, environ)
    if plan.worker is not None and local_url(doors.own) is None:
        raise CannotStart("the local worker calls functions over TCP and was given a Unix socket; worker=none")
    local = LocalFunctions(plan.functions, environ=environ, hidden=hidden_names())
    local.open()

    def on_serving() -> None:
        doors.announce()
        tell_what_is_served(plan, local_url(doors.own), doors.own)

    def serve_in_loop(duty: Duty) -> int:
        return uvloop.run(serve(plan, local, doors, duty))

    return run_members(settings.workers, serve_in_loop, doors, environ, Aftercare(), on_serving)


if __name__ == "__main__":
    sys.exit(main())
