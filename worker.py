"""fworker: makes the calls that wait in the queue, retries them, and posts results to their callbacks.

    fworker                                   # or: python -m faashound.worker
    queue_url=spool:/var/lib/faashound/spool gateway_url=http://gateway:8080 max_inflight=32 fworker
    fworker dead list|show|retry|purge        # what was given up; see queues/commands.py
    fworker cancel --all | --function NAME    # what waits in the queue

For each call that is due: lease it, send it to where its function answers (draining/caller.py), and record what follows
from the outcome (`retries.next_step`, draining/recording.py): done, again at some time, or a dead letter.  A result
with a callback is delivered (draining/delivery.py) as a step of its own: that it fails never runs the function again.

What it promises: delivery is at least once, and once without faults; a lease is renewed while the function runs, so
calls may take as long as they like; what a worker held when it died is taken over.  On SIGTERM it claims nothing
more, finishes what runs within drain_timeout, and hands back the rest; on SIGHUP it reads callback_secret_file again.
What it refuses to do: decide (the rules are in calls/retries.py), judge addresses (calls/callbacks.py), know how the
queue is kept (queues/), or forget an outcome because the queue's disk is full for a while.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import uvloop

from .calls.callbacks import CallbackRefused, build_policy, parse_callback_url
from .calls.model import (
    Attempt,
    Kind,
    Lease,
    LeaseLost,
    QueueLimits,
    QueueUnavailable,
)
from .calls.queue_names import parse_queue_names
from .calls.retries import (
    CALLBACK_POLICY,
    AttemptOutcome,
    Dead,
    HandBack,
    OutcomeKind,
    Progress,
    RetryPolicy,
    Step,
    is_poison,
    next_callback_step,
    next_step,
    parse_retry_codes,
    poison_step,
)
from .draining.breakers import Breakers
from .draining.caller import Caller, CallLimits
from .draining.connections import Connections
from .draining.delivery import CallbackRules, Deliverer, read_signer
from .draining.function_limits import FunctionLimits
from .draining.gateway_access import GatewayAccess
from .draining.in_flight import EarlyEnd, InFlight, InFlightTable
from .draining.known_functions import KnownFunctions
from .draining.metrics import InvocationCounters, WorkerMetrics
from .draining.outcomes import attempt_record, log_call_step, log_callback_step
from .draining.recording import PAUSE_S, Recorder
from .draining.shares import Allotment, Slots
from .draining.status import StatusPage, own_names
from .network.hosts import parse_hosts
from .queues import Queue, open_queue
from .queues.commands import cancel_calls, dead_letters
from .queues.migrate import migrate_queue
from .queues.settings import SharedSettings, parse_positive_size
from .watchdog import (
    Alarm,
    FaashoundError,
    ListenSockets,
    Signals,
    bind_metrics_sockets,
    finished_first,
    flag_answer,
    format_duration,
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
    parse_text,
    parse_url,
    setting,
    settle_descriptors,
    start_metrics,
    watch_parent_death,
)

T = TypeVar("T")

KINDS: tuple[Kind, ...] = ("call", "callback")

PREVENTED_S = 2.0  # before a lease is handed back for want of something that this machine will have again
LAST_WORD_S = 5.0  # to tell the gateway at the end how many calls were made
PROBES_PART = 4  # one slot for so many is for trying destinations again that could not be reached
ALLOWED_HOSTS_HELP = "host names that /metrics and /healthz answer to, by commas, besides localhost and addresses"


def parse_gateway_url(text: str) -> str:
    """Return the gateway's base URL without a trailing slash; ValueError for what is none."""
    url = parse_url(text)
    try:
        parse_callback_url(text)  # callbacks may go there
    except CallbackRefused:
        raise ValueError("allowed: http://host[:port][/path], with a port from 1 to 65535") from None
    if "?" in url.target:
        raise ValueError("allowed: http://host[:port][/path]")
    return text.rstrip("/")


@dataclass(frozen=True, slots=True)
class Settings(SharedSettings):
    """What the operator asked of this worker; see `watchdog.settings_table`."""

    gateway_url: str = setting("gateway_url", "http://127.0.0.1:8080", parse_gateway_url, "where functions are called")
    invoke: str = setting(
        "invoke",
        "direct",
        parse_choice("direct", "gateway"),
        "direct: call functions where they answer, if that can be reached; gateway: all through the gateway",
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
    max_result_bytes: int = setting(
        "max_result",
        "512MiB",
        parse_positive_size,
        "longest answer that is kept; the call of a longer one is a dead letter",
    )
    allowed_hosts: frozenset[str] | None = setting(
        "allowed_hosts", "", parse_hosts, ALLOWED_HOSTS_HELP, default_note="none on loopback, else any"
    )
    host: str | None = setting("host", "127.0.0.1", parse_text, "address of /metrics and /healthz")
    metrics_port: int = setting("metrics_port", "8083", parse_port, "port of /metrics and /healthz; 0 disables it")
    drain_timeout_s: float = setting("drain_timeout", "30s", parse_duration, "after SIGTERM: time for what runs")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        if self.initial_retry_wait_s > self.max_retry_wait_s:
            wait, longest = (format_duration(each) for each in (self.initial_retry_wait_s, self.max_retry_wait_s))
            yield f"initial_retry_wait={wait} contradicts max_retry_wait={longest}; allowed: up to max_retry_wait"
        yield from SharedSettings.conflicts(self)

    def retry_policy(self) -> RetryPolicy:
        """Return the policy for functions that ask for nothing else."""
        return RetryPolicy(
            self.max_retry_attempts,
            self.initial_retry_wait_s,
            self.max_retry_wait_s,
            self.http_retry_codes,
            self.backoff,
        )


class Worker:
    """Claims what is due and sees each lease to its end.

    Obligation: `run` until it returns, which it does some time after `stop`.
    """

    def __init__(self, settings: Settings, queue: Queue, owner: str, rules: CallbackRules) -> None:
        self.metrics = WorkerMetrics()
        self._settings = settings
        self._queue = queue
        self._owner = owner
        self._connections = Connections(rules.policy)
        gateway = GatewayAccess(parse_url(settings.gateway_url), queue.token)
        self._functions = KnownFunctions(
            self._connections.to_functions, gateway, settings.retry_policy(), direct=settings.invoke == "direct"
        )
        self._functions.on_enabled = self._look_again
        limits = CallLimits(settings.call_timeout_s, settings.max_result_bytes)
        counters = InvocationCounters(self.metrics.registry)
        self._caller = Caller(queue, self._connections, self._functions, limits, counters)
        self._breakers = Breakers(max(settings.max_inflight // PROBES_PART, 1))
        self._deliverer = Deliverer(queue, self._connections.to_callbacks, rules, self._breakers)
        self._callback_policy = dataclasses.replace(CALLBACK_POLICY, max_attempts=settings.callback_retry_attempts)
        self._limits = FunctionLimits(settings.max_inflight)
        self._slots: Mapping[Kind, Slots] = {kind: Slots(settings.max_inflight) for kind in KINDS}
        self._in_flight = InFlightTable(queue, owner, self._slots)
        self._recorder = Recorder(queue, self._in_flight)
        self._wake_up = asyncio.Event()  # there is a free slot, or maybe work: look again
        self._alarm = Alarm(asyncio.get_running_loop(), self._wake_up.set)  # it will be time to look again
        self._has_claimed = asyncio.Event()  # what the queue has told of: it may be asked what else there is
        self._stopping = False
        self._last_error = ""

    # The story.  What a claim has found nothing of is not asked for again before the queue has told of work; what it
    # has found something of is claimed again as soon as a function has answered: the claim then shares the commit of
    # the outcome, and a busy worker makes one round through the queue's writer for each call.

    async def run(self) -> None:
        """Work until `stop`, then drain."""
        lease_s = self._settings.ack_wait_s
        helpers = [
            asyncio.create_task(self._wait_for_work()),
            asyncio.create_task(self._in_flight.keep_renewing(lease_s)),
            asyncio.create_task(self._in_flight.watch_cancels(lease_s)),
            asyncio.create_task(self._functions.keep_telling()),
        ]
        for helper in helpers:
            helper.add_done_callback(lambda _: self.stop())
        try:
            while not self._stopping:
                self._wake_up.clear()  # before the claim: what ends during it frees a slot that it did not see
                if not await self._claim():
                    self._has_claimed.set()
                    await self._wait_for_change()
            await self._drain()
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await self._functions.tell()
            for helper in helpers:
                if helper.done():
                    helper.result()  # none of them ends but by a fault of ours
        finally:
            self._alarm.stop_handle()
            for helper in helpers:
                helper.cancel()
            await self._connections.close()

    def stop(self) -> None:
        """Claim nothing more and drain."""
        self._stopping = True
        self._wake_up.set()

    def abandon(self) -> None:
        """Hand back at once what still runs."""
        self._in_flight.end_all()

    def show_metrics(self) -> None:
        """Bring up to date what is not counted as it happens."""
        self.metrics.show(self._limits, self._breakers.open_count, self._in_flight.counts())

    async def _drain(self) -> None:
        """Let what runs finish within drain_timeout, and hand back the rest."""
        tasks = self._in_flight.tasks
        if tasks:
            log.info(f"draining: {len(tasks)} at work")
            _, left = await asyncio.wait(tasks, timeout=self._settings.drain_timeout_s)
            if left:
                log.warning(f"drain_timeout is over: {len(left)} at work are cut, and go back into the queue")
            self.abandon()
            await asyncio.wait(tasks)

    # Work: claimed when there is a slot for it, waited for when there is none.

    async def _claim(self) -> bool:
        """Start as much as there is and as there are slots for; tell whether to look again at once."""
        wishes = [(kind, wanted) for kind in KINDS if (wanted := self._wanted(kind)) is not None]
        if not wishes:
            return False
        lease_s = self._settings.ack_wait_s
        try:
            if not await self._in_flight.renew_if_due(lease_s, lease_s / 2):  # a claim would take back what has run out
                raise QueueUnavailable("what is at work cannot be renewed")
            if len(wishes) == 1:  # without a task, so that the claim goes before the outcome that made room for it
                again = [await self._claim_kind(*wishes[0])]
            else:  # at once, which is one turn of the queue's writer
                again = await all_of(self._claim_kind(*wish) for wish in wishes)
        except FaashoundError as error:
            self._tell_slots()
            self._note_error(error)
            return False
        if self._last_error:
            log.info(f"the queue cannot be asked for work: {self._last_error}: over")
        self._last_error = ""
        return any(again)

    def _wanted(self, kind: Kind) -> Allotment | None:
        """Return what a claim may take now, None if none is to be made."""
        allotment = self._slots[kind].next_claim(time.monotonic())
        return None if allotment is None else allotment.narrowed(self._capacities(kind))

    async def _claim_kind(self, kind: Kind, wanted: Allotment) -> bool:
        claim = self._queue.claim if kind == "call" else self._queue.claim_callbacks
        leases = await claim(
            self._settings.queues, self._owner, self._settings.ack_wait_s, wanted.limit, wanted.capacities
        )
        for lease in leases:
            self._start(lease)
        return self._slots[kind].found(wanted, len(leases))

    def _capacities(self, kind: Kind) -> dict[str, int]:
        """Return how many more a function may get that refuses calls or is disabled; or a destination in trouble."""
        held = self._slots[kind].held
        if kind == "callback":
            return self._breakers.capacities(held, time.monotonic())
        return self._limits.capacities(held) | self._functions.capacities()

    def _look_again(self) -> None:
        self._tell_slots()
        self._wake_up.set()

    def _tell_slots(self) -> None:
        for slots in self._slots.values():
            slots.wake_up()

    async def _wait_for_change(self) -> None:
        """Wait until there may be something to claim, or if the queue is in trouble for a moment."""
        now_s = time.monotonic()
        changes_s = [slots.lends_at_s for slots in self._slots.values()]
        changes_s += [self._breakers.next_probe_s(now_s), now_s + PAUSE_S if self._last_error else None]
        self._alarm.set(min((at_s for at_s in changes_s if at_s is not None), default=None))
        await self._wake_up.wait()

    async def _wait_for_work(self) -> None:
        """Pass on, for ever, that the queue has work; if it is in trouble, ask again after a moment.

        It is not asked before what it told of last has been claimed: it would tell of the same once more.
        """
        while True:
            try:
                if self._last_error:
                    await asyncio.sleep(PAUSE_S)
                else:
                    await self._queue.wait_for_work(self._settings.ack_wait_s)
            except FaashoundError as error:
                self._note_error(error)
                continue
            self._has_claimed.clear()
            self._look_again()
            await self._has_claimed.wait()

    def _note_error(self, error: FaashoundError) -> None:
        """Log that the queue is in trouble, once for each kind of it."""
        if str(error) != self._last_error:
            log.error(f"the queue cannot be asked for work: {error}")
        self._last_error = str(error)

    # One lease, from its claim to its end.

    def _start(self, lease: Lease) -> None:
        entry = self._in_flight.add(lease)
        entry.task = asyncio.create_task(self._see_to_end(entry))
        entry.task.add_done_callback(partial(self._on_end, entry))

    def _on_end(self, entry: InFlight, task: asyncio.Task[None]) -> None:
        if self._in_flight.remove(entry):
            self._wake_up.set()
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            reason = str(error) if isinstance(error, FaashoundError) else repr(error)  # a fault of ours
            log.error(f"{reason}; the lease runs out and it is tried again", call_id=entry.lease.call.id)

    async def _see_to_end(self, entry: InFlight) -> None:
        """Run one lease's work; what cannot be recorded is logged, and tried again when the lease has run out."""
        lease, started_s = entry.lease, time.time()
        entry.begun = True
        try:
            if entry.ended_by is not None:
                raise asyncio.CancelledError
            await (self._make_call(entry) if lease.kind == "call" else self._make_callback(entry))
        except asyncio.CancelledError:
            await self._end_early(entry, started_s)
        except LeaseLost:
            log.warning("the lease was lost: it ran out, and the call was taken back", call_id=lease.call.id)

    async def _end_early(self, entry: InFlight, started_s: float) -> None:
        lease = entry.lease
        with suppress(LeaseLost):  # it was recorded already, or another worker has it
            if entry.ended_by is EarlyEnd.CANCELLED:
                await self._queue.finish_cancelled(lease, Attempt(started_s, time.time(), None, "cancelled"))
                log.info("cancelled", call_id=lease.call.id, function=lease.call.function)
            elif entry.ended_by is EarlyEnd.DRAINED:
                await self._queue.release(lease)

    async def _make_call(self, entry: InFlight) -> None:
        lease = entry.lease
        call, started_s, started = lease.call, time.time(), time.monotonic()
        known = await self._functions.get(call.function)
        if known.is_disabled:  # no more of its calls are claimed until it is enabled
            await self._recorder.release(lease)
            return
        if is_poison(call.attempts, known.policy, [attempt.error for attempt in call.history]):
            await self._dead_letter(lease, poison_step(call.attempts))
            return
        outcome = await self._caller.attempt(call, known.upstream)
        self._limits.learn(call.function, outcome, started, time.monotonic())
        now_s = time.time()
        step = next_step(Progress(call.attempts, call.expires_s), known.policy, outcome, now_s, random.random)
        self.metrics.attempt(call.function, outcome)
        log_call_step(call, step, outcome)
        if isinstance(step, HandBack):
            await self._hand_back(lease)
            return
        self._make_room(entry)
        await self._recorder.end_run(lease, step, attempt_record(started_s, now_s, outcome, step), outcome)

    def _make_room(self, entry: InFlight) -> None:
        """Let another call take the place of one that was answered.

        It is claimed in this turn of the loop, and so in the commit that records the outcome.
        """
        self._in_flight.free(entry)
        self._wake_up.set()

    async def _dead_letter(self, lease: Lease, step: Dead) -> None:
        """End a call that is not made any more."""
        log.error(f"dead letter: {step.reason}", call_id=lease.call.id, function=lease.call.function)
        now_s = time.time()
        never_made = AttemptOutcome(OutcomeKind.UNREACHABLE)
        await self._recorder.end_run(lease, step, Attempt(now_s, now_s, None, step.reason), never_made)

    async def _make_callback(self, entry: InFlight) -> None:
        lease, started_s = entry.lease, time.time()
        call, callback = lease.call, lease.call.callback
        if callback is None or call.callback_url is None:
            raise AssertionError("a lease on a callback is of a call that has one")
        step: Step
        if is_poison(callback.attempts, self._callback_policy, [callback.error]):
            outcome, step = AttemptOutcome(OutcomeKind.FAILED), poison_step(callback.attempts)
        else:
            policy = (await self._functions.get(call.function)).policy
            outcome = await self._deliverer.attempt(call, entry.flow, policy.max_retries_count)
            step = next_callback_step(callback.attempts, self._callback_policy, outcome, time.time(), random.random)
        self.metrics.callback(outcome)
        if isinstance(step, HandBack):
            await self._hand_back(lease)
        else:
            await self._recorder.end_delivery(lease, step, attempt_record(started_s, time.time(), outcome, step))
        log_callback_step(call, step, outcome)

    async def _hand_back(self, lease: Lease) -> None:
        """Give up a lease on what this machine cannot do now, after a moment in which it is not asked to do more.

        The moments differ, or all would come back together.  Idle connections go first: those in use need their room.
        """
        await self._connections.close_idle()
        await asyncio.sleep(PREVENTED_S * random.uniform(0.5, 1.5))  # noqa: S311 - a wait, and no secret
        await self._recorder.release(lease)


# ---------------------------------------------------------------------------------------------------------------
# Lifecycle.
# ---------------------------------------------------------------------------------------------------------------


async def all_of(works: Iterable[Awaitable[T]]) -> list[T]:
    """Return what `works` bring, done at once; raises the first error when all of them have ended."""
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def serve(settings: Settings, environ: Mapping[str, str], sockets: ListenSockets) -> int:
    """Work until told to stop; return the exit status."""
    loop = asyncio.get_running_loop()
    signals = Signals(loop)
    watch_parent_death(loop, parent_death_fd(environ), signals.stop_now)
    policy = build_policy([settings.gateway_url], settings.callback_allow)
    rules = CallbackRules(policy, read_signer(settings.callback_secret_file), settings.callback_timeout_s)
    loop.add_signal_handler(signal.SIGHUP, rules.read_secrets, settings.callback_secret_file)
    async with AsyncExitStack() as stack:
        limits = QueueLimits(settings.queue_reserve_bytes)
        queue = await open_queue(settings.queue_url, settings, limits=limits)
        stack.push_async_callback(queue.close)
        worker = Worker(settings, queue, await queue.enlist(), rules)
        page = StatusPage(
            queue,
            worker.metrics,
            worker.show_metrics,
            own_names(sockets.metrics, settings.host, settings.allowed_hosts),
        )
        stack.callback(start_metrics(sockets.metrics, page).abort)
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
