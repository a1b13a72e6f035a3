"""fworker: makes the calls that wait in the queue, retries them, and posts results to their callbacks.

    fworker                                   # or: python -m faashound.worker
    queue_url=spool:/var/lib/faashound gateway_url=http://gateway:8080 max_inflight=32 fworker
    fworker dead list|show|retry|purge        # what was given up; see calls.py
    fworker cancel --all | --function NAME    # what waits in the queue

For each call that is due: lease it, send it to the function through the gateway, and record what follows from the
answer (`retries.next_step`): done, again at some time, or a dead letter.  A result that somebody asked for is
delivered as a step of its own: a failing callback never runs the function again.

What it promises: delivery is at least once, and once without faults; a lease is renewed while the function runs, so
calls may take as long as they like; what a worker held when it died is taken over.  On SIGTERM it claims nothing
more, finishes what runs within drain_timeout, and hands back the rest.  What it refuses to do: decide (the rules are
in retries.py), judge addresses (callbacks.py), know how the queue is kept (spool.py), or forget an outcome because
the queue's disk is full for a while.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import prometheus_client
import uvloop

from .calls.callbacks import (
    CALLBACK_PROOF,
    MAX_REDIRECTS_COUNT,
    CallbackAllow,
    CallbackPolicy,
    CallbackRefused,
    CallFacts,
    Signer,
    build_callback_headers,
    build_policy,
    build_proof,
    parse_callback_allow,
    parse_secrets,
)
from .calls.model import (
    EXCERPT_BYTES,
    Attempt,
    Call,
    Kind,
    Lease,
    LeaseLost,
    QueueDamaged,
    QueueFull,
    QueueLimits,
    QueueUnavailable,
    ResultLost,
    RunEnd,
    State,
    StoredBody,
    destination_of,
    parse_queue_names,
)
from .calls.names import FunctionName
from .calls.retries import (
    CALLBACK_POLICY,
    Concurrency,
    Dead,
    Done,
    End,
    HandBack,
    Outcome,
    Progress,
    RetryAt,
    RetryPolicy,
    Step,
    is_poison,
    next_callback_step,
    next_step,
    parse_annotations,
    parse_retry_codes,
    poison_step,
    policy_for,
)
from .draining.breakers import Breakers
from .draining.shares import Slots
from .network.lookups import by_origin, strangers_names, system_names
from .queues import Queue, open_queue, trouble_of
from .queues.commands import cancel_calls, dead_letters
from .queues.migrate import migrate_queue
from .queues.nats_settings import NatsSettings
from .queues.urls import QUEUE_RESERVE_HELP, QueueUrl, parse_queue_url
from .watchdog import (
    TEXT_PLAIN,
    BodyTooLarge,
    CannotStart,
    Client,
    ClientResponse,
    FaashoundError,
    Header,
    ListenSockets,
    MethodNotAllowed,
    NotReady,
    OutOfResources,
    PeerGone,
    Request,
    Response,
    SentBody,
    Signals,
    Unreachable,
    UpstreamTimeout,
    Url,
    bind_metrics_sockets,
    end_to_end,
    finished_first,
    flag_answer,
    help_text,
    load_settings,
    log,
    parent_death_fd,
    parse_choice,
    parse_count,
    parse_duration,
    parse_port,
    parse_positive_count,
    parse_positive_duration,
    parse_size,
    parse_text,
    parse_url,
    read_file,
    serve_metrics,
    setting,
    settle_descriptors,
    start_metrics,
    watch_parent_death,
)

ANNOTATIONS_KEPT_S = 30.0  # how long a function's annotations are believed before the gateway is asked again
ANNOTATIONS_TIMEOUT_S = 5.0
RENEWALS_COUNT = 3  # in the time of one lease: two may fail before it runs out
PAUSE_S = 1.0  # before the queue is asked again after it failed
PREVENTED_S = 2.0  # before a lease is handed back for want of something that this machine will have again
REFUSED_TEXT = "refused: not allowed by callback_allow"  # which names lead to inner addresses is not for strangers
PROBES_PART = 4  # one slot for so many is for trying destinations again that could not be reached
MAX_KNOWN_COUNT = 1000  # functions whose annotations and metrics are kept apart: callers can make up names
ANSWER_READ_BYTES = 1 << 20  # of the answer to a callback, which nobody wants but whose sender wants to be rid of it
WORKER_TOKEN = b"X-Worker-Token"  # who has it can open the queue, so it is a worker of ours


def parse_gateway_url(text: str) -> str:
    """Return the gateway's base URL without a trailing slash; ValueError for what is none."""
    url = parse_url(text)
    if "?" in url.target:
        raise ValueError("allowed: http://host[:port][/path]")
    return text.rstrip("/")


@dataclass(frozen=True, slots=True)
class Settings(NatsSettings):
    """What the operator asked of this worker; see `watchdog.settings_table`."""

    gateway_url: str = setting("gateway_url", "http://127.0.0.1:8080", parse_gateway_url, "where functions are called")
    queue_url: QueueUrl = setting(
        "queue_url", "spool:./spool", parse_queue_url, "the queue: spool:DIRECTORY, or nats://HOST[:PORT][,HOST...]"
    )
    queues: tuple[str, ...] = setting("queues", "faas-request", parse_queue_names, "which queues to drain, by commas")
    max_inflight: int = setting("max_inflight", "16", parse_positive_count, "calls at once, and as many callbacks")
    ack_wait_s: float = setting(
        "ack_wait", "60s", parse_positive_duration, "the lease: a worker that is silent for so long loses its calls"
    )
    call_timeout_s: float = setting("call_timeout", "0", parse_duration, "time for one attempt; 0 is no limit")
    max_retry_attempts: int = setting("max_retry_attempts", "10", parse_count, "attempts in all, the first included")
    initial_retry_wait_s: float = setting("initial_retry_wait", "10s", parse_duration, "wait before the first retry")
    max_retry_wait_s: float = setting("max_retry_wait", "120s", parse_duration, "longest wait between two attempts")
    http_retry_codes: frozenset[int] = setting(
        "http_retry_codes", "429,502,500,504,408", parse_retry_codes, "answers after which a call is tried again"
    )
    backoff: str = setting(
        "backoff",
        "exponential",
        parse_choice("exponential", "full", "equal"),
        "how waits grow: exponential, or with full or equal jitter",
    )
    callback_timeout_s: float = setting("callback_timeout", "30s", parse_positive_duration, "time for one callback")
    callback_retry_attempts: int = setting("callback_retry_attempts", "8", parse_count, "attempts of a callback in all")
    callback_secret_file: str | None = setting(
        "callback_secret_file",
        "",
        parse_text,
        "file with a line SECRET, or HOST SECRET, for each secret that signs callbacks",
    )
    callback_allow: CallbackAllow | None = setting(
        "callback_allow", "", parse_callback_allow, "hosts and networks that callbacks may go to besides public ones"
    )
    max_result_bytes: int = setting(
        "max_result", "512MiB", parse_size, "longest answer that is kept; the call of a longer one is a dead letter"
    )
    queue_reserve_bytes: int = setting("queue_reserve", "8MiB", parse_size, QUEUE_RESERVE_HELP)
    host: str | None = setting("host", "127.0.0.1", parse_text, "address of /metrics and /healthz")
    metrics_port: int = setting("metrics_port", "8083", parse_port, "port of /metrics and /healthz; 0 disables it")
    drain_timeout_s: float = setting("drain_timeout", "30s", parse_duration, "after SIGTERM: time for what runs")
    log_format: str = setting("log_format", "text", parse_choice("text", "json"), "how log lines look: text or json")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        if self.initial_retry_wait_s > self.max_retry_wait_s:
            yield "initial_retry_wait is longer than max_retry_wait; allowed: up to max_retry_wait"
        yield from NatsSettings.conflicts(self)

    def retry_policy(self) -> RetryPolicy:
        """Return the policy for functions that ask for nothing else."""
        return RetryPolicy(
            self.max_retry_attempts,
            self.initial_retry_wait_s,
            self.max_retry_wait_s,
            self.http_retry_codes,
            self.backoff,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """What one attempt brought: the outcome that the rules judge, and the response as far as there is one."""

    outcome: Outcome
    body: StoredBody | None = None
    headers: tuple[tuple[str, str], ...] = ()
    duration_s: float = 0.0


def build_call_headers(call: Call, token: str) -> list[Header]:
    """Return the fields of a call as it was submitted, and the token by which the gateway knows a worker."""
    fields = [(name.encode(), value.encode("latin-1")) for name, value in call.headers]
    return [*fields, (WORKER_TOKEN, token.encode())]


def function_url(gateway: Url, call: Call) -> Url:
    """Return where the gateway answers for a call's function."""
    base = gateway.target.rstrip("/")
    target = f"{base}/function/{call.function}{call.path}" + (f"?{call.query}" if call.query else "")
    return Url(gateway.scheme, gateway.host, gateway.port, target)


def callback_facts(call: Call, policy: RetryPolicy) -> CallFacts:
    """Return what a callback tells of its call."""
    return CallFacts(
        call_id=call.id,
        function=call.function,
        status=call.status or 503,
        duration_s=call.duration_s or 0.0,
        retries_count=max(call.attempts - 1, 0),
        max_retries_count=policy.max_retries_count,
    )


class Annotations:
    """The retry policies of functions, asked of the gateway and remembered for a while."""

    def __init__(self, client: Client, gateway: Url, token: str, base: RetryPolicy) -> None:
        self._client = client
        self._gateway = gateway
        self._token = token
        self._base = base
        self._known: OrderedDict[str, tuple[float, RetryPolicy]] = OrderedDict()

    async def policy(self, function: str) -> RetryPolicy:
        """Return the policy of `function`: the last one known, or the worker's own, when the gateway cannot tell."""
        now_s = time.monotonic()
        asked_s, policy = self._known.get(function, (float("-inf"), self._base))
        if now_s - asked_s < ANNOTATIONS_KEPT_S:
            return policy
        try:
            policy = policy_for(self._base, parse_annotations(function, await self._ask(function)))
        except (FaashoundError, ValueError) as error:
            log.warning(f"the annotations of {function} are not to be had: {error}")
        else:
            self._known[function] = (now_s, policy)
            self._known.move_to_end(function)
            if len(self._known) > MAX_KNOWN_COUNT:
                self._known.popitem(last=False)
        return policy

    async def _ask(self, function: str) -> Mapping[str, str]:
        target = f"{self._gateway.target.rstrip('/')}/system/function/{function}"
        url = dataclasses.replace(self._gateway, target=target)
        deadline_s = time.monotonic() + ANNOTATIONS_TIMEOUT_S
        headers = [(WORKER_TOKEN, self._token.encode())]
        async with await self._client.request("GET", url, headers, deadline_s=deadline_s) as response:
            body = await response.body.read(1 << 20)
        if response.status == 404:
            return {}
        if response.status != 200:
            raise FaashoundError(f"the gateway answers {response.status}")
        answer = json.loads(body)
        found = answer.get("annotations") if isinstance(answer, dict) else None
        return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


@dataclass(slots=True)
class Running:
    """A lease at work.  `ended_by` says why its task was cancelled: "cancel", "lost" or "drain".

    `flow` is whose slot it holds.  Once the function has answered, and only the outcome is still to be recorded, it
    holds none.
    """

    lease: Lease
    flow: str
    task: asyncio.Task[None] | None = None
    begun: bool = False
    holds_slot: bool = False
    ended_by: str = ""

    def end(self, why: str) -> None:
        """Cancel the work for a reason; the first one counts.

        A task that has not made its first step is not cancelled, since then it could record nothing: it looks itself.
        """
        if self.ended_by:
            return
        self.ended_by = why
        if self.begun and self.task is not None:
            self.task.cancel()


class WorkerMetrics:
    """What a worker counts.  Functions beyond MAX_KNOWN_COUNT are counted together, as "other"."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._known: set[str] = set()
        self._attempts = prometheus_client.Counter(
            "worker_attempts", "Attempts at calls, by outcome", ("function_name", "outcome"), registry=self.registry
        )
        self._limits = prometheus_client.Gauge(
            "worker_function_limit",
            "Calls of a function that may run at once, where it has refused some",
            ("function_name",),
            registry=self.registry,
        )
        self._callbacks = prometheus_client.Counter(
            "worker_callbacks", "Attempts at callbacks, by outcome", ("outcome",), registry=self.registry
        )
        self.held_back = prometheus_client.Gauge(
            "worker_callback_destinations_held_back",
            "Destinations of callbacks that are tried less often, since they could not be reached",
            registry=self.registry,
        )
        in_flight = prometheus_client.Gauge(
            "worker_in_flight", "Calls and callbacks at work", ("kind",), registry=self.registry
        )
        self.in_flight: Mapping[Kind, prometheus_client.Gauge] = {
            "call": in_flight.labels("call"),
            "callback": in_flight.labels("callback"),
        }
        self._attempts_of = lru_cache(MAX_KNOWN_COUNT)(self._attempts.labels)

    def attempt(self, function: str, outcome: Outcome) -> None:
        """Count an attempt at a call."""
        self._attempts_of(self._label(function), str(outcome.status or outcome.end.value)).inc()

    def callback(self, outcome: Outcome) -> None:
        """Count an attempt at a callback."""
        self._callbacks.labels(str(outcome.status or outcome.end.value)).inc()

    def show_limits(self, limits: Mapping[FunctionName, Concurrency]) -> None:
        """Set the limits of those functions that are held below the worker's own."""
        self._limits.clear()
        for function, limit in limits.items():
            self._limits.labels(self._label(function)).set(int(limit.limit))

    def _label(self, function: str) -> str:
        if len(self._known) < MAX_KNOWN_COUNT:
            self._known.add(function)
        return function if function in self._known else "other"


class Worker:
    """Claims what is due and sees each lease to its end.

    Obligation: `run` until it returns, which it does some time after `stop`.
    """

    def __init__(self, settings: Settings, queue: Queue, owner: str, policy: CallbackPolicy, signer: Signer | None):
        self.metrics = WorkerMetrics()
        self.queue = queue
        self._settings = settings
        self._owner = owner
        self._names, self._strangers_names = system_names(), strangers_names()
        self._client = Client(self._names)
        callback_names = by_origin(policy.is_written_out, self._names, self._strangers_names)
        self._callback_client = Client(policy.guard(callback_names))
        self._policy = policy
        self._signer = signer
        self._gateway = parse_url(settings.gateway_url)
        self._annotations = Annotations(self._client, self._gateway, queue.token, settings.retry_policy())
        self._callback_policy = dataclasses.replace(CALLBACK_POLICY, max_attempts=settings.callback_retry_attempts)
        self._running: dict[int, Running] = {}  # by the lease's fence
        self._cancelled_early: frozenset[str] = frozenset()  # calls that are ours but have not reached us yet
        self._limits: OrderedDict[FunctionName, Concurrency] = OrderedDict()
        self._slots: Mapping[Kind, Slots] = {
            "call": Slots(settings.max_inflight),
            "callback": Slots(settings.max_inflight),
        }
        self._breakers = Breakers(max(settings.max_inflight // PROBES_PART, 1))
        self._stirred = asyncio.Event()  # there is room, or maybe work, or an end: look again
        self._stopping = False
        self._complaint = ""

    # The story.  What a claim has found nothing of is not asked for again before the queue has been heard; what it
    # has found something of is claimed again as soon as a function has answered: the claim then shares the commit of
    # the outcome, and a busy worker makes one round through the queue's writer for each call.

    async def run(self) -> None:
        """Work until `stop`, then drain."""
        helpers = [asyncio.create_task(work()) for work in (self._listen, self._renew_leases, self._watch_cancels)]
        for helper in helpers:
            helper.add_done_callback(lambda _: self.stop())
        try:
            while not self._stopping:
                self._stirred.clear()  # before the claim: what ends during it makes room that it did not see
                if not await self._claim():
                    await self._wait_for_change()
            await self._drain()
            for helper in helpers:
                if helper.done():
                    helper.result()  # neither ever ends but by a fault of ours
        finally:
            for helper in helpers:
                helper.cancel()
            for part in (self._client, self._callback_client, self._names, self._strangers_names):
                await part.close()

    def stop(self) -> None:
        """Claim nothing more and drain."""
        self._stopping = True
        self._stirred.set()

    def abandon(self) -> None:
        """Hand back at once what still runs."""
        for running in list(self._running.values()):
            running.end("drain")

    async def _claim(self) -> bool:
        """Start as much as there is and as there is room for; tell whether to look again at once."""
        try:
            again = [await self._claim_kind(kind) for kind in self._slots]
        except FaashoundError as error:
            self._hear()
            self._complain(error)
            return False
        self._complaint = ""
        return any(again)

    async def _claim_kind(self, kind: Kind) -> bool:
        slots = self._slots[kind]
        allotment = slots.next_claim(time.monotonic())
        if allotment is None:
            return False
        rooms = self._rooms(kind)
        wanted = allotment.narrowed(rooms)
        claim = self.queue.claim if kind == "call" else self.queue.claim_callbacks
        leases = await claim(self._settings.queues, self._owner, self._settings.ack_wait_s, wanted.limit, wanted.rooms)
        for lease in leases:
            self._start(lease)
        return slots.found(allotment, len(leases), passed_over=0 in rooms.values())

    def _rooms(self, kind: Kind) -> dict[str, int]:
        """Return how many more each function may get that refuses calls, or each destination that is in trouble."""
        held = self._slots[kind].held
        if kind == "callback":
            return self._breakers.rooms(held, time.monotonic())
        return {name: limit.room(held[name]) for name, limit in self._limits.items()}

    def _hear(self) -> None:
        for slots in self._slots.values():
            slots.hear()

    async def _wait_for_change(self) -> None:
        """Wait until there may be something to claim, or if the queue is in trouble for a moment."""
        now_s = time.monotonic()
        changes_s = [slots.lends_at_s for slots in self._slots.values()]
        changes_s += [self._breakers.next_probe_s(now_s), now_s + PAUSE_S if self._complaint else None]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min((at_s for at_s in changes_s if at_s is not None), default=None)):
                await self._stirred.wait()

    async def _listen(self) -> None:
        """Pass on what the queue has to tell."""
        while True:
            await self._hear_of_work()
            self._hear()
            self._stirred.set()

    async def _hear_of_work(self) -> None:
        """Wait for work, or if the queue is in trouble for a moment."""
        if not self._complaint:
            try:
                await self.queue.wait_for_work(self._settings.ack_wait_s)
                return
            except FaashoundError as error:
                self._complain(error)
        await asyncio.sleep(PAUSE_S)

    def _complain(self, error: FaashoundError) -> None:
        """Log that the queue is in trouble, once for each kind of it."""
        if str(error) != self._complaint:
            log.error(f"the queue cannot be asked for work: {error}")
        self._complaint = str(error)

    def _start(self, lease: Lease) -> None:
        for earlier in list(self._running.values()):
            if (earlier.lease.kind, earlier.lease.call.id) == (lease.kind, lease.call.id):
                earlier.end("lost")  # we slept past our own lease
        flow = lease.call.function if lease.kind == "call" else destination_of(lease.call.callback_url or "")
        running = Running(lease, flow)
        self._running[lease.fence] = running
        self._hold(running)
        running.task = asyncio.create_task(self._see_to_end(running))
        running.task.add_done_callback(partial(self._on_end, lease))
        if lease.kind == "call" and lease.call.id in self._cancelled_early:
            running.end("cancel")
        self.metrics.in_flight[lease.kind].inc()

    def _hold(self, running: Running) -> None:
        if not running.holds_slot:
            running.holds_slot = True
            self._slots[running.lease.kind].take(running.flow)

    def _free(self, running: Running) -> None:
        if running.holds_slot:
            running.holds_slot = False
            self._slots[running.lease.kind].give_back(running.flow, time.monotonic())

    def _on_end(self, lease: Lease, task: asyncio.Task[None]) -> None:
        self._free(self._running.pop(lease.fence))
        self.metrics.in_flight[lease.kind].dec()
        self._stirred.set()
        if not task.cancelled() and task.exception() is not None:
            log.error(f"{task.exception()!r}; the lease runs out and it is tried again", call_id=lease.call.id)

    async def _see_to_end(self, running: Running) -> None:
        """Run one lease's work; what it could not record is told in the log and left to the lease's end."""
        lease, started_s = running.lease, time.time()
        running.begun = True
        try:
            if running.ended_by:
                raise asyncio.CancelledError
            await (self._make_call(running) if lease.kind == "call" else self._make_callback(running))
        except asyncio.CancelledError:
            await self._end_early(running, started_s)
        except LeaseLost:
            log.warning("the lease was lost; somebody else has the call", call_id=lease.call.id)

    async def _end_early(self, running: Running, started_s: float) -> None:
        lease = running.lease
        with suppress(LeaseLost):  # it was recorded already, or somebody else has it
            if running.ended_by == "cancel":
                await self.queue.finish_cancelled(lease, Attempt(started_s, time.time(), None, "cancelled"))
                log.info("cancelled", call_id=lease.call.id, function=lease.call.function)
            elif running.ended_by == "drain":
                await self.queue.release(lease)

    async def _drain(self) -> None:
        """Let what runs finish within drain_timeout, and hand back the rest."""
        tasks = [running.task for running in self._running.values() if running.task is not None]
        if tasks:
            log.info(f"draining: {len(tasks)} at work")
            await asyncio.wait(tasks, timeout=self._settings.drain_timeout_s)
            self.abandon()
            await asyncio.wait(tasks)

    # Leases.

    async def _renew_leases(self) -> None:
        """Renew what runs, long before its lease ends; end what is lost or cancelled."""
        while True:
            await asyncio.sleep(self._settings.ack_wait_s / RENEWALS_COUNT)
            leases = [running.lease for running in self._running.values()]
            if not leases:
                continue
            try:
                renewal = await self.queue.renew(leases, self._settings.ack_wait_s)
            except FaashoundError as error:
                log.error(f"leases could not be renewed: {error}")
                continue
            for lease in leases:
                if lease.call.id in renewal.lost and lease.fence in self._running:
                    log.warning("the lease was lost; somebody else has the call", call_id=lease.call.id)
                    self._running[lease.fence].end("lost")
            self._end_cancelled(renewal.cancelled)

    async def _watch_cancels(self) -> None:
        """End a run as soon as somebody asks for it."""
        while True:
            await self.queue.wait_for_cancel(self._settings.ack_wait_s)
            try:
                cancelled = await self.queue.cancelled_ids(self._owner)
            except FaashoundError as error:
                log.error(f"cancellations could not be read: {error}")
                continue
            self._end_cancelled(cancelled)
            at_work = {running.lease.call.id for running in self._running.values()}
            self._cancelled_early = cancelled - at_work  # claimed, but the claim has not returned yet

    def _end_cancelled(self, ids: frozenset[str]) -> None:
        for running in list(self._running.values()):
            if running.lease.kind == "call" and running.lease.call.id in ids:
                running.end("cancel")

    # A call.

    async def _make_call(self, running: Running) -> None:
        lease = running.lease
        call, started_s, started = lease.call, time.time(), time.monotonic()
        policy = await self._annotations.policy(call.function)
        if is_poison(call.attempts, policy):
            await self._bury(lease, poison_step(call.attempts))
            return
        answer = await self._attempt(call)
        outcome, now_s = answer.outcome, time.time()
        self._learn(call.function, outcome, started)
        step = next_step(Progress(call.attempts, call.expires_s), policy, outcome, now_s, random.random)
        self.metrics.attempt(call.function, outcome)
        self._log_step(call, step, answer)
        if isinstance(step, HandBack):
            await self._hand_back(lease)
            return
        await self._make_room(running)
        await self._record(lease, step, attempt_of(started_s, now_s, outcome, step), answer)

    async def _make_room(self, running: Running) -> None:
        """Let another call take the place of one that was answered, claimed in the commit that records the outcome."""
        self._free(running)
        self._stirred.set()
        await asyncio.sleep(0)  # the claim is submitted now, the outcome right behind it

    async def _bury(self, lease: Lease, step: Dead) -> None:
        """End a call that is not made any more."""
        log.error(f"dead letter: {step.reason}", call_id=lease.call.id, function=lease.call.function)
        now_s = time.time()
        await self._record(lease, step, Attempt(now_s, now_s, None, step.reason), Answer(Outcome(End.UNREACHABLE)))

    async def _hand_back(self, lease: Lease) -> None:
        """Give up a lease on what this machine cannot do now, after a moment in which it is not asked to do more.

        The moments differ, or all would come back together and want the same again; what idles gives way to what works.
        """
        await self._client.close()
        await self._callback_client.close()
        await asyncio.sleep(PREVENTED_S * random.uniform(0.5, 1.5))  # noqa: S311 - a wait, and no secret
        await self._insist(lease, partial(self.queue.release, lease))

    async def _record(self, lease: Lease, step: Done | RetryAt | Dead, attempt: Attempt, answer: Answer) -> None:
        match step:
            case RetryAt(due_s):
                excerpt = await self._excerpt(answer)
                again = partial(self.queue.retry, lease, attempt=attempt, due_s=due_s, excerpt=excerpt)
                await self._insist(lease, again)
            case Done(status):
                await self._finish(lease, State.DONE, status, attempt, answer)
            case Dead(_, status, with_answer):
                kept = answer if with_answer else Answer(answer.outcome, duration_s=answer.duration_s)
                if not with_answer and answer.body is not None:
                    await self._drop(answer.body)
                await self._finish(lease, State.DEAD, status, attempt, kept)

    async def _insist(self, lease: Lease, record: Callable[[], Awaitable[object]]) -> None:
        """Record what has happened, if need be again and again: what is not recorded would happen once more."""
        complaint = ""
        while True:
            try:
                await record()
                return
            except (QueueUnavailable, QueueFull) as error:
                if str(error) != complaint:
                    log.error(f"the outcome cannot be recorded yet: {error}", call_id=lease.call.id)
                complaint = str(error)
                self._hold(self._running[lease.fence])  # what cannot be recorded keeps its slot, or all would pile up
                await asyncio.sleep(PAUSE_S)

    async def _finish(self, lease: Lease, state: State, status: int, attempt: Attempt, answer: Answer) -> None:
        end = RunEnd(state, attempt, status, answer.duration_s, answer.body, answer.headers)
        try:
            await self._insist(lease, partial(self.queue.finish, lease, end))
        except QueueDamaged as error:  # the result was taken away from under us: no reason to run the function again
            attempt = dataclasses.replace(attempt, error=str(error))
            end = RunEnd(State.DEAD, attempt, status, answer.duration_s)
            await self._insist(lease, partial(self.queue.finish, lease, end))

    async def _excerpt(self, answer: Answer) -> bytes | None:
        """Return the beginning of a failed response, and drop the rest."""
        if answer.body is None:
            return None
        try:
            async for chunk in self.queue.open_body(answer.body, EXCERPT_BYTES):
                return chunk
            return b""
        except FaashoundError as error:  # the outcome is worth more than how the answer began
            log.warning(f"the beginning of an answer is lost: {error}")
            return None
        finally:
            await self._drop(answer.body)

    async def _drop(self, body: StoredBody) -> None:
        with suppress(FaashoundError):  # then the housekeeping finds it
            await self.queue.drop_body(body)

    async def _attempt(self, call: Call) -> Answer:
        """Send a call to its function and store what it answers; whatever goes wrong is an outcome too."""
        started, timeout_s = time.monotonic(), self._settings.call_timeout_s

        def failed(outcome: Outcome) -> Answer:
            return Answer(outcome, duration_s=time.monotonic() - started)

        try:
            response = await self._client.request(
                call.method,
                function_url(self._gateway, call),
                build_call_headers(call, self.queue.token),
                await self._sendable(call.body),
                call.body.bytes_count,
                started + timeout_s if timeout_s else None,
            )
            async with response:
                try:
                    stored = await self.queue.store_result(
                        response.body, self._settings.max_result_bytes, response.body.length
                    )
                except BodyTooLarge:
                    text = f"the answer is longer than max_result, which is {self._settings.max_result_bytes} bytes"
                    return failed(Outcome(End.UNSTORED, error=text))
                except ResultLost as error:
                    return failed(Outcome(End.UNSTORED, error=str(error)))
                except (QueueUnavailable, QueueFull) as error:  # the function has run: this was an attempt
                    return failed(Outcome(End.UNREACHABLE, error=f"the answer could not be stored: {error}"))
        except Exception as error:  # noqa: BLE001 - an attempt's boundary: what it raises is recorded, whatever it is
            return failed(outcome_of_error(error, call.id))
        return Answer(outcome_of(response), stored, kept_headers(response), time.monotonic() - started)

    async def _sendable(self, body: StoredBody) -> SentBody:
        """Return what can be sent of a stored body; raises what opening it raises, before anything is sent."""
        if body.file is None:
            return body.inline or b""
        async with aclosing(self.queue.open_body(body, 1)) as pieces:
            await anext(pieces, None)
        return partial(self.queue.open_body, body)

    def _learn(self, function: FunctionName, outcome: Outcome, started: float) -> None:
        """Adapt how many calls of a function run at once to how it answers."""
        before = self._limits.get(function) or Concurrency.start(self._settings.max_inflight)
        after = before.after(outcome, started, time.monotonic())
        self._limits.pop(function, None)
        if after.limit < after.ceiling:
            self._limits[function] = after
            if len(self._limits) > MAX_KNOWN_COUNT:
                self._limits.popitem(last=False)
        if after.limit < before.limit:
            log.info(f"{function} refuses calls: at most {int(after.limit)} at once")

    def show_limits(self) -> None:
        """Bring the metrics of the functions' limits, and of destinations in trouble, up to date."""
        self.metrics.show_limits(self._limits)
        self.metrics.held_back.set(self._breakers.open_count)

    def _log_step(self, call: Call, step: object, answer: Answer) -> None:
        text = {Done: "done", RetryAt: "to be tried again", Dead: "dead letter", HandBack: "handed back"}[type(step)]
        fields: dict[str, object] = {"call_id": call.id, "function": call.function, "attempt": call.attempts}
        if isinstance(step, RetryAt):
            fields["in"] = f"{max(step.due_s - time.time(), 0.0):.3f}s"
        log.info(f"{text} - Duration: {answer.duration_s:f}s", **fields, outcome=answer.outcome)

    # A callback.

    async def _make_callback(self, running: Running) -> None:
        lease = running.lease
        call, callback, started_s = lease.call, lease.call.callback, time.time()
        if callback is None or call.callback_url is None:
            raise AssertionError("a lease on a callback is of a call that has one")
        if is_poison(callback.attempts, self._callback_policy):
            outcome, step = Outcome(End.FAILED), cast(Step, poison_step(callback.attempts))
        else:
            outcome = await self._post_or_not(call, running.flow)
            step = next_callback_step(callback.attempts, self._callback_policy, outcome, time.time(), random.random)
        self.metrics.callback(outcome)
        await self._record_callback(lease, step, attempt_of(started_s, time.time(), outcome, step))
        text = {Done: "delivered", RetryAt: "to be tried again", Dead: "given up", HandBack: "handed back"}[type(step)]
        log.info(
            f"callback {text}", call_id=call.id, function=call.function, attempt=callback.attempts, outcome=outcome
        )

    async def _record_callback(self, lease: Lease, step: Step, attempt: Attempt) -> None:
        match step:
            case Done():
                await self._insist(lease, partial(self.queue.callback_done, lease, attempt))
            case RetryAt(due_s):
                await self._insist(lease, partial(self.queue.callback_retry, lease, attempt, due_s))
            case Dead():
                await self._insist(lease, partial(self.queue.callback_dead, lease, attempt))
            case HandBack():
                await self._hand_back(lease)

    async def _post_or_not(self, call: Call, destination: str) -> Outcome:
        """Post a result unless its destination has been given up for now, and learn how that one is."""
        started_s = time.monotonic()
        objection = self._breakers.objection(destination, started_s)
        if objection is not None:
            return Outcome(End.HELD_BACK, error=objection)
        outcome = await self._post(call)
        if outcome.end is End.ANSWERED and self._breakers.on_answer(destination):
            log.info(f"callbacks to {destination} are sent again")
        is_failure = outcome.end in (End.UNREACHABLE, End.TIMED_OUT)
        if is_failure and self._breakers.on_failure(destination, str(outcome), started_s, time.monotonic()):
            log.warning(f"callbacks to {destination} are held back, and tried one at a time: {outcome}")
        return outcome

    async def _post(self, call: Call) -> Outcome:
        """Post a result to its callback; whatever goes wrong is an outcome too."""
        try:
            async with asyncio.timeout(self._settings.callback_timeout_s):
                return await self._post_and_follow(call)
        except TimeoutError:
            return Outcome(End.TIMED_OUT, error="no answer before the deadline (callback_timeout)")
        except Exception as error:  # noqa: BLE001 - an attempt's boundary: what it raises is recorded, whatever it is
            return outcome_of_error(error, call.id)

    async def _post_and_follow(self, call: Call) -> Outcome:
        """Post a result, following the redirects that keep method and body."""
        url: Url | None = self._policy.check_url(call.callback_url or "")
        status, retry_after = 0, None
        for _ in range(MAX_REDIRECTS_COUNT + 1):
            if url is None:
                break
            here = url
            async with await self._send_callback(call, here) as response:
                status, retry_after = response.status, _text(response.header(b"retry-after"))
                with suppress(FaashoundError):  # a receiver that is cut off might think that it was not heard
                    await response.body.read(ANSWER_READ_BYTES)
                url = self._policy.check_redirect(here, status, _text(response.header(b"location")))
        return Outcome(End.ANSWERED, status, retry_after)

    async def _send_callback(self, call: Call, url: Url) -> ClientResponse:
        policy = await self._annotations.policy(call.function)
        headers = build_callback_headers(callback_facts(call, policy), call.result_headers)
        if self._signer is not None:
            headers += await self._sign(self._signer, url, call)
        fields = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        fields.append((CALLBACK_PROOF, build_proof(self.queue.token, call.id).encode()))
        body = b"" if call.result is None else await self._sendable(call.result)
        length = 0 if call.result is None else call.result.bytes_count
        return await self._callback_client.request("POST", url, fields, body, length)

    async def _sign(self, signer: Signer, url: Url, call: Call) -> tuple[tuple[str, str], ...]:
        signature = signer.start(url, call.id, time.time())
        if signature is None:
            return ()
        if call.result is not None:
            async for chunk in self.queue.open_body(call.result):
                signature.update(chunk)
        return signature.finish()


def outcome_of(response: ClientResponse) -> Outcome:
    """Return what the rules need to know of an answer."""
    return Outcome(
        End.ANSWERED,
        response.status,
        _text(response.header(b"retry-after")),
        response.header(b"x-openfaas-internal") is not None,
    )


def outcome_of_error(error: Exception, call_id: str) -> Outcome:
    """Return what the rules need to know of an attempt that raised `error`; what strangers may not read is logged."""
    match error:
        case CallbackRefused():
            log.warning(str(error), call_id=call_id)
            return Outcome(End.REFUSED, error=REFUSED_TEXT)
        case UpstreamTimeout():
            return Outcome(End.TIMED_OUT, error=str(error))
        case QueueDamaged():
            return Outcome(End.UNREADABLE, error=str(error))
        case QueueUnavailable() | QueueFull() | OutOfResources():
            return Outcome(End.PREVENTED, error=str(error))
        case PeerGone() | Unreachable():
            return Outcome(End.UNREACHABLE, error=str(error))
        case _:
            log.exception(f"a fault of the worker in an attempt at call {call_id}")
            return Outcome(End.FAILED, error="a fault of the worker: see its log")


def attempt_of(started_s: float, finished_s: float, outcome: Outcome, step: Step) -> Attempt:
    """Return the record of an attempt (times are seconds since the epoch), of which `step` is to follow."""
    error = None if isinstance(step, Done) else str(getattr(step, "reason", outcome))
    return Attempt(started_s, finished_s, outcome.status or None, error)


def kept_headers(response: ClientResponse) -> tuple[tuple[str, str], ...]:
    """Return the fields of an answer that are stored with it."""
    return tuple((name.decode(), value.decode("latin-1")) for name, value in end_to_end(response.headers))


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle.
# ---------------------------------------------------------------------------------------------------------------


def load_signer(settings: Settings) -> Signer | None:
    """Return what signs callbacks, None if nothing does.  Raises CannotStart, without a word of the secret."""
    if settings.callback_secret_file is None:
        return None
    text = read_file(settings.callback_secret_file, "callback_secret_file")
    try:
        return Signer(parse_secrets(text))
    except ValueError as error:
        raise CannotStart(f"callback_secret_file {settings.callback_secret_file}: {error}") from None


async def serve_status(worker: Worker, request: Request) -> Response:
    """Answer GET /metrics and GET /healthz."""
    if request.path != b"/healthz":
        worker.show_limits()
        return await serve_metrics(worker.metrics.registry, request)
    if request.method != "GET":
        raise MethodNotAllowed(("GET",))
    trouble = trouble_of(worker.queue)
    if trouble is not None:
        raise NotReady(trouble)
    return Response(200, (TEXT_PLAIN,), b"OK")


async def serve(settings: Settings, environ: Mapping[str, str], sockets: ListenSockets) -> int:
    """Work until told to stop; return the exit status."""
    loop = asyncio.get_running_loop()
    signals = Signals(loop)
    watch_parent_death(loop, parent_death_fd(environ), signals.stop_now)
    signer = load_signer(settings)
    policy = build_policy([settings.gateway_url], settings.callback_allow)
    async with AsyncExitStack() as stack:
        limits = QueueLimits(settings.queue_reserve_bytes)
        queue = await open_queue(settings.queue_url, settings, limits=limits)
        stack.push_async_callback(queue.close)
        worker = Worker(settings, queue, await queue.enlist(), policy, signer)
        status_server = start_metrics(sockets.metrics, partial(serve_status, worker))
        stack.callback(status_server.abort)
        sockets.announce()
        log.info(f"Draining {','.join(settings.queues)} of {settings.queue_url} through {settings.gateway_url}")
        work = asyncio.create_task(worker.run())
        await finished_first(signals.first.wait(), asyncio.shield(work))
        worker.stop()
        await finished_first(signals.second.wait(), asyncio.shield(work))
        worker.abandon()
        await work
        log.info("Exiting")
    return 0


PURPOSE = "Makes the calls that wait in the queue, retries them, and posts results to their callbacks."


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Run the worker and return its exit status: 0 stopped, 1 failed, 2 bad settings."""
    argv = list(sys.argv[1:] if argv is None else argv)
    environ = os.environ if environ is None else environ
    settle_descriptors()
    if argv[:1] == ["dead"]:
        return dead_letters(argv[1:], environ)
    if argv[:1] == ["cancel"]:
        return cancel_calls(argv[1:], environ)
    if argv[:1] == ["migrate"]:
        return migrate_queue(argv[1:], environ)
    answer = flag_answer(argv, help_text("fworker [dead ... | cancel ... | migrate ...]", PURPOSE, Settings))
    if answer is not None:
        return answer
    settings = load_settings(Settings, environ)
    if settings is None:
        return 2
    try:
        sockets = ListenSockets((), bind_metrics_sockets(settings.host, settings.metrics_port))
        return uvloop.run(serve(settings, environ, sockets))
    except FaashoundError as error:
        log.error(str(error))
        return 1
    finally:
        log.flush()


if __name__ == "__main__":
    sys.exit(main())
