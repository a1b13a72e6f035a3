"""Measurements of gateways and workers: calls passed on, calls queued, the queue drained, and what idling costs."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from statistics import median

from faashound.calls.ids import new_call_id
from faashound.calls.model import NewCall, State, StoredBody
from faashound.calls.names import parse_function_name
from faashound.queues.spool.queue import Spool
from testkit.harness import free_port

from .load import BODY, Load, run_wrk
from .programs import OURS, Running, cpu_s, proportional_bytes, resident_bytes
from .report import Report, at_least, at_most, ratios
from .watchdogs import CONNECTIONS, MIB, Plan

FUNCTION = "cat"
QUEUE = "faas-request"
LATER_S = 86400.0
IDLE_FUNCTIONS_COUNT = 10
DELAYED_CALLS_COUNT = 10_000
PUTS_AT_ONCE_COUNT = 256
CLAIMS_COUNT = 20
CLAIM_COUNT = 16
DRAIN_CONNECTIONS_COUNT = 8
DRAIN_DEADLINE_S = 300.0
RATIO_TO_PEER = {1: 1.5, 8: 1.0, 64: 0.7}  # OpenFaaS CE's broker does not sync
SYNCED = "ours on NATS, sync_interval: always"


def gateway(plan: Plan, functions: str, queue: Path, **settings: str) -> Running:
    """Return our gateway, to be entered, with a functions file of this text and no worker unless told otherwise."""
    port = free_port()
    directory = plan.directory / f"gateway-{port}"
    directory.mkdir()
    table = directory / "functions.toml"
    table.write_text(functions, encoding="utf-8")
    fixed = {
        "port": str(port),
        "metrics_port": "0",
        "worker": "none",
        "functions": str(table),
        "TMPDIR": str(directory),
    }
    argv = [sys.executable, "-m", "faashound.gateway"]
    if "queue_url" not in settings:  # a full one has its limit in it already
        fixed |= {"queue_url": f"spool:{queue}", "max_queued": str(10 * plan.queued_count)}
    return Running(argv, fixed | settings, port, plan.directory)


def elsewhere(url: str) -> str:
    """Return a functions file with one function, at `url`."""
    return f'[{FUNCTION}]\nurl = "{url}"\n'


def trivial(plan: Plan) -> Running:
    """Return the function that costs next to nothing, to be entered."""
    port = free_port()
    return Running([sys.executable, "-m", "bench.trivial", str(port)], {}, port, plan.directory)


# Now.


def measure_sync(plan: Plan, report: Report) -> None:
    """What the gateway adds to a call of a trivial function, and how many such calls one core passes on."""
    direct, added, rates = [], [], []
    queue = plan.directory / "queue-sync"
    with trivial(plan) as function, gateway(plan, elsewhere(function.url), queue) as program:
        url = f"{program.url}/function/{FUNCTION}"
        for _ in range(plan.rounds_count):
            direct.append(run_wrk(plan.script, function.url, 1, plan.seconds).p50_s * 1e6)
            added.append(run_wrk(plan.script, url, 1, plan.seconds).p50_s * 1e6 - direct[-1])
        program.process.cpu_affinity([min(os.sched_getaffinity(0))])
        for _ in range(plan.rounds_count):
            rates.append(run_wrk(plan.script, url, 8, plan.seconds).requests_per_s)
    report.add("4 sync", "trivial function (asyncio protocol on uvloop), p50", "us", direct)
    report.add("4 sync", "p50 that the gateway adds, 1 connection", "us", added, at_most(400))
    report.add("4 sync", "through the gateway on one core, 8 connections", "/s", rates, at_least(2500))


# Later.


def measure_enqueue(plan: Plan, report: Report) -> None:
    """Durable 202s: beside other gateways, a broker that syncs, and with an empty spool beside one with many calls."""
    full = full_queue(plan, report)
    loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
    with trivial(plan) as function, ExitStack() as stack:
        urls = dict.fromkeys(plan.peer_gateways, "")
        for name, queue, workers in (
            ("ours", plan.directory / "queue-empty", "1"),
            ("ours, full", full, "1"),
            ("ours, a worker per core", plan.directory / "queue-shared", "auto"),
        ):
            program = stack.enter_context(gateway(plan, elsewhere(function.url), queue, workers=workers))
            urls[name] = program.url
        broker = start_synced_broker(stack, report)
        if broker is not None:
            on_nats = gateway(plan, elsewhere(function.url), full, queue_url=broker)
            urls[SYNCED] = stack.enter_context(on_nats).url
        urls |= {peer: peer for peer in plan.peer_gateways}
        for _ in range(plan.rounds_count):
            for connections_count in CONNECTIONS:
                for name, url in urls.items():
                    target = f"{url}/async-function/{FUNCTION}"
                    load = run_wrk(plan.script, target, connections_count, plan.seconds)
                    loads[name, connections_count].append(load)
    for connections_count in CONNECTIONS:
        _report_enqueue(plan, report, {name: loads[name, connections_count] for name in urls}, connections_count)


def start_synced_broker(stack: ExitStack, report: Report) -> str | None:
    """Return the address of a NATS server that syncs each write; None, with a remark, where none is installed."""
    try:
        from testkit.nats_servers import Cluster  # here, as the rest needs no NATS

        return stack.enter_context(Cluster(1, sync_interval="always")).servers[0].url
    except (ImportError, FileNotFoundError) as error:
        report.remark(f"no figures beside NATS: {error}")
        return None


def _report_enqueue(plan: Plan, report: Report, loads: Mapping[str, list[Load]], connections_count: int) -> None:
    at = f"{connections_count} connection{'s' * (connections_count > 1)}"
    rates = {name: [load.requests_per_s for load in mine] for name, mine in loads.items()}
    for name, mine in loads.items():
        bound = at_most(25) if connections_count == max(CONNECTIONS) and name == "ours" else None
        report.add("5 enqueue", f"{name}, {at}", "/s", rates[name])
        report.add("5 enqueue", f"{name}, {at}, p99", "ms", [load.p99_s * 1e3 for load in mine], bound)
    flat = ratios(rates["ours, full"], rates["ours"])
    report.add("5 enqueue", f"full spool to empty, {at}", "x", flat, at_least(0.85))
    if SYNCED in rates:
        synced = ratios(rates["ours"], rates[SYNCED])
        report.add("5 enqueue", f"ours, to {SYNCED.removeprefix('ours on ')}, {at}", "x", synced)
    for peer in plan.peer_gateways:
        bound = at_least(RATIO_TO_PEER[connections_count])
        for name in ("ours", "ours, a worker per core"):
            report.add("5 enqueue", f"{name}, to {peer}, {at}", "x", ratios(rates[name], rates[peer]), bound)


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Spool]:
    """Open a spool as our programs do, and close it."""
    spool = await Spool.open(directory)
    try:
        yield spool
    finally:
        await spool.close()


def new_call(delay_s: float) -> NewCall:
    """Return a call of the function, due after `delay_s`."""
    now_s = time.time()
    call_id = new_call_id()
    return NewCall(
        id=call_id,
        function=parse_function_name(FUNCTION),
        queue=QUEUE,
        method="POST",
        path="",
        query="",
        headers=(("Content-Type", "text/plain"), ("X-Call-Id", call_id)),
        body=StoredBody(len(BODY), BODY, None),
        callback_url=None,
        due_s=now_s + delay_s,
        expires_s=None,
        idempotency_key=None,
        accepted_s=now_s,
    )


def full_queue(plan: Plan, report: Report) -> Path:
    """Return the spool that many calls wait in, filled when first asked for."""
    queue = plan.directory / "queue-full"
    if not queue.exists():
        took_s = asyncio.run(fill(queue, plan.queued_count, 0.0))
        report.remark(f"the full spool holds {plan.queued_count} queued calls; putting them took {took_s:.0f} s")
    return queue


async def fill(directory: Path, count: int, delay_s: float) -> float:
    """Queue `count` calls as fast as the spool takes them, all due after `delay_s`; return the seconds it took."""
    began_s = time.monotonic()
    async with opened(directory) as spool:
        for start in range(0, count, PUTS_AT_ONCE_COUNT):
            size = min(PUTS_AT_ONCE_COUNT, count - start)
            await asyncio.gather(*(spool.put(new_call(delay_s)) for _ in range(size)))
    return time.monotonic() - began_s


# The queue, drained.


def measure_drain(plan: Plan, report: Report) -> None:
    """Queued calls of cat through worker, gateway and watchdog to their durable end, beside the watchdog alone.

    The watchdog is the same on both sides: that of a local function has one worker.
    """
    alone, drained = [], []
    for number in range(plan.rounds_count):
        with OURS.started(plan.directory, workers="1") as program:
            load = run_wrk(plan.script, program.url, DRAIN_CONNECTIONS_COUNT, plan.seconds)
        alone.append(load.requests_per_s)
        queue = plan.directory / f"queue-drain-{number}"
        asyncio.run(fill(queue, plan.calls_count, 0.0))
        settings = {"worker": "local", "max_inflight": str(DRAIN_CONNECTIONS_COUNT)}
        with gateway(plan, f'[{FUNCTION}]\nfprocess = "cat"\n', queue, **settings):
            drained.append(asyncio.run(watch_drain(queue, plan.calls_count)))
    at = f"{DRAIN_CONNECTIONS_COUNT} at once"
    report.add("6 worker", f"the watchdog alone, {at}", "/s", alone)
    report.add("6 worker", f"worker, gateway, watchdog: {plan.calls_count} calls, {at}", "/s", drained)
    report.add("6 worker", "drained to the watchdog alone", "x", ratios(drained, alone), at_least(0.8))


async def watch_drain(queue: Path, count: int) -> float:
    """Return the calls per second from the first that is seen done to the last."""
    async with opened(queue) as spool:
        seen_s, seen_count = 0.0, 0
        deadline_s = time.monotonic() + DRAIN_DEADLINE_S
        while time.monotonic() < deadline_s:
            done_count = (await spool.stats()).by_state.get(State.DONE, 0)
            if done_count and not seen_count:
                seen_s, seen_count = time.monotonic(), done_count
            if done_count == count:
                return (done_count - seen_count) / (time.monotonic() - seen_s)
            await asyncio.sleep(0.05)
    raise AssertionError(f"{done_count} of {count} calls were done within {DRAIN_DEADLINE_S} s")


def measure_claim(plan: Plan, report: Report) -> None:
    """The cost of claiming sixteen calls, with few and with many in the queue, in turns."""
    few_count = CLAIMS_COUNT * CLAIM_COUNT * plan.rounds_count
    queues = {few_count: plan.directory / "queue-few", plan.queued_count: full_queue(plan, report)}
    asyncio.run(fill(queues[few_count], few_count, 0.0))
    costs_ms: dict[int, list[float]] = defaultdict(list)
    for _ in range(plan.rounds_count):
        for count, queue in queues.items():
            costs_ms[count].append(asyncio.run(claim_often(queue)) * 1e3)
    for count, rounds in costs_ms.items():
        report.add("6 claim", f"{CLAIM_COUNT} calls of {count} queued", "ms", rounds)
    many_to_few = ratios(costs_ms[plan.queued_count], costs_ms[few_count])
    report.add("6 claim", "many to few", "x", many_to_few, at_most(1.15))


async def claim_often(queue: Path) -> float:
    """Return the median seconds of a claim."""
    costs_s = []
    async with opened(queue) as spool:
        owner = await spool.enlist()
        for _ in range(CLAIMS_COUNT):
            began_s = time.perf_counter()
            leases = await spool.claim((QUEUE,), owner, LATER_S, CLAIM_COUNT)
            costs_s.append(time.perf_counter() - began_s)
            assert len(leases) == CLAIM_COUNT, "the queue ran out of calls"
    return median(costs_s)


# Idle.


def measure_idle(plan: Plan, report: Report) -> None:
    """Gateway, worker and ten functions with nothing to do but ten thousand delayed calls that are not due."""
    queue = plan.directory / "queue-idle"
    asyncio.run(fill(queue, DELAYED_CALLS_COUNT, LATER_S))
    table = "".join(f'[idle-{number}]\nfprocess = "cat"\n' for number in range(IDLE_FUNCTIONS_COUNT))
    with gateway(plan, table, queue, worker="local") as program:
        settle(program)
        shares = []
        for _ in range(plan.rounds_count):
            before_s = cpu_s(program.tree())
            time.sleep(plan.seconds)
            shares.append((cpu_s(program.tree()) - before_s) / plan.seconds * 100)
        tree = program.tree()
        functions = [each for each in tree if "watchdog" in " ".join(each.cmdline())]
        resident, proportional = resident_bytes(functions) / MIB, proportional_bytes(functions) / MIB
        whole = proportional_bytes(tree) / MIB
    count = IDLE_FUNCTIONS_COUNT
    report.add("6 idle", f"processor time, gateway, worker, {count} functions", "%", shares, at_most(1))
    report.add("6 idle", "resident per idle function, with its helpers", "MiB", [resident / count])
    report.add("6 idle", "proportional set per idle function", "MiB", [proportional / count], at_most(30))
    report.add("6 idle", f"proportional set of all {len(tree)} processes", "MiB", [whole])


def settle(program: Running, limit_s: float = 20.0) -> None:
    """Wait until a second passes in which the program and all below it did next to nothing."""
    end_s, before_s = time.monotonic() + limit_s, cpu_s(program.tree())
    while time.monotonic() < end_s:
        time.sleep(1.0)
        now_s = cpu_s(program.tree())
        if now_s - before_s < 0.03:
            return
        before_s = now_s
    raise AssertionError(f"{program.url} is still busy after {limit_s} s")


def measure_gateway_workers(plan: Plan, report: Report) -> None:
    """What a second loop brings to the gateway."""
    rates: dict[int, list[float]] = defaultdict(list)
    with trivial(plan) as function, ExitStack() as stack:
        for count in (1, 2):
            queue = plan.directory / f"queue-workers-{count}"
            program = stack.enter_context(gateway(plan, elsewhere(function.url), queue, workers=str(count)))
            for _ in range(plan.rounds_count):
                load = run_wrk(plan.script, f"{program.url}/function/{FUNCTION}", 64, plan.seconds)
                rates[count].append(load.requests_per_s)
    for count, rounds in rates.items():
        report.add("7 workers", f"gateway, workers={count}, 64 connections", "/s", rounds)
    report.add("7 workers", "gateway, two to one", "x", ratios(rates[2], rates[1]))
