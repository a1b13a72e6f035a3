"""Measurements of watchdogs: calls, start, memory, large bodies, prewarmed processes, workers.

Each takes the plan and the report.  What is compared runs side by side: in every round each subject has its turn, and
ratios are taken round by round, so that a machine that others use disturbs both sides alike.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from testkit.harness import free_port

from .limit import SpawnLimit
from .load import Load, run_arrivals, run_wrk
from .programs import OURS, Running, Watchdog, peak_bytes, proportional_bytes, resident_bytes
from .report import Report, at_least, at_most, ratios

MIB = 1 << 20
CONNECTIONS = (1, 8, 64)
LARGE_PIECE_BYTES = MIB
RATIO_TO_PEER = {1: 1.1, 8: 1.25, 64: 1.25}
# Python functions that need about 20 ms until they read: an interpreter and what many of them import.  What the process
# does after its answer costs the caller time too, started or not: to tear an interpreter down takes some milliseconds.
_IMPORTS = "import argparse, json, os, sys"
_ECHO = "sys.stdout.buffer.write(sys.stdin.buffer.read())"
SLOW_STARTS = {
    "ends as Python does": f'{sys.executable} -I -c "{_IMPORTS}; {_ECHO}"',
    "ends at once": f'{sys.executable} -I -c "{_IMPORTS}; {_ECHO}; sys.stdout.flush(); os._exit(0)"',
}


@dataclass(frozen=True)
class Plan:
    """How long and against whom: what every measurement is told."""

    rounds_count: int
    seconds: int
    queued_count: int
    large_bytes: int
    calls_count: int
    peers: tuple[Watchdog, ...]
    peer_gateways: tuple[str, ...]
    directory: Path
    script: Path
    limit: SpawnLimit

    @property
    def subjects(self) -> tuple[Watchdog, ...]:
        """The watchdogs to compare, ours first."""
        return (OURS, *self.peers)


def measure_calls(plan: Plan, report: Report) -> None:
    """Calls of cat with 11 bytes, at 1, 8 and 64 connections, and the limit of one process per request."""
    loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
    limits: dict[int, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        running = [(each.name, stack.enter_context(each.started(plan.directory))) for each in plan.subjects]
        for _ in range(plan.rounds_count):
            for copies_count in (1, os.cpu_count() or 1):
                limits[copies_count].append(plan.limit.measure(plan.seconds, copies_count))
            for connections_count in CONNECTIONS:
                for name, program in running:
                    load = run_wrk(plan.script, program.url, connections_count, plan.seconds)
                    loads[name, connections_count].append(load)
    for copies_count, rates in limits.items():
        report.add("1 limit", f"posix_spawn loop in {plan.limit.language}, {copies_count} at once", "/s", rates)
    for connections_count in CONNECTIONS:
        _report_calls(plan, report, loads, limits[max(limits)], connections_count)


def _report_calls(
    plan: Plan, report: Report, loads: dict[tuple[str, int], list[Load]], limits: list[float], connections_count: int
) -> None:
    at = f"{connections_count} connection{'s' * (connections_count > 1)}"
    for subject in plan.subjects:
        mine = loads[subject.name, connections_count]
        report.add("1 calls", f"{subject.name}, {at}", "/s", [load.requests_per_s for load in mine])
        report.add("1 calls", f"{subject.name}, {at}, p50", "ms", [load.p50_s * 1e3 for load in mine])
        report.add("1 calls", f"{subject.name}, {at}, p99", "ms", [load.p99_s * 1e3 for load in mine])
    ours = loads[OURS.name, connections_count]
    rates = [load.requests_per_s for load in ours]
    bound = None if connections_count == 1 else at_least(0.80)
    report.add("1 calls", f"ours to the limit, {at}", "x", ratios(rates, limits), bound)
    for peer in plan.peers:
        theirs = loads[peer.name, connections_count]
        faster = ratios(rates, [load.requests_per_s for load in theirs])
        later = ratios([load.p99_s for load in ours], [load.p99_s for load in theirs])
        report.add("1 calls", f"ours to {peer.name}, {at}", "x", faster, at_least(RATIO_TO_PEER[connections_count]))
        report.add("1 calls", f"p99 of ours to {peer.name}, {at}", "x", later, at_most(1.0))


def measure_start(plan: Plan, report: Report) -> None:
    """From the start of the program until it accepts, and what it holds in memory then."""
    for subject in plan.subjects:
        starts, resident, tree, proportional = [], [], [], []
        for _ in range(plan.rounds_count):
            with subject.started(plan.directory) as program:
                starts.append(program.start_s * 1e3)
                resident.append(max(resident_bytes([process]) for process in program.tree()) / MIB)
                tree.append(resident_bytes(program.tree()) / MIB)
                proportional.append(proportional_bytes(program.tree()) / MIB)
        ours = subject is OURS
        report.add("1 start", f"{subject.name}, start to listening", "ms", starts, at_most(150) if ours else None)
        report.add(
            "1 memory",
            f"{subject.name}, resident at rest, its largest process",
            "MiB",
            resident,
            at_most(32) if ours else None,
        )
        report.add("1 memory", f"{subject.name}, resident at rest, with its helpers", "MiB", tree)
        report.add("1 memory", f"{subject.name}, proportional set, with its helpers", "MiB", proportional)


# Large bodies.


def measure_large(plan: Plan, report: Report) -> None:
    """A large body through cat and back, beside the same bytes through a bare cat, and the most memory it took."""
    times: dict[str, list[float]] = defaultdict(list)
    port = free_port()
    copier = Running([sys.executable, "-m", "bench.copier", str(port)], {}, port, plan.directory)
    with copier, ExitStack() as stack:
        running = [(each.name, stack.enter_context(each.started(plan.directory))) for each in plan.subjects]
        for _ in range(plan.rounds_count):
            times["copy"].append(echo(copier.port, plan.large_bytes, http=False))
            for name, program in running:
                times[name].append(echo(program.port, plan.large_bytes, http=True))
        peaks = {name: max(map(peak_bytes, program.tree())) / MIB for name, program in running}
    size = f"{plan.large_bytes // MIB} MiB"
    for name, seconds in times.items():
        rates = [plan.large_bytes / MIB / each for each in seconds]
        report.add("3 large", f"{name}, {size} through cat", "MiB/s", rates)
        if name in peaks:
            memory = at_most(64) if name == OURS.name else None
            report.add(
                "3 large",
                f"ours to the copy, {size}" if memory else f"{name} to the copy, {size}",
                "x",
                ratios(times["copy"], seconds),
                at_least(0.8) if memory else None,
            )
            report.add("3 large", f"{name}, peak resident of its largest process", "MiB", [peaks[name]], memory)


def echo(port: int, size_bytes: int, *, http: bool) -> float:
    """Send so many bytes and read them back, by HTTP or bare; return the seconds until the last has come."""
    began_s = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        sender = threading.Thread(target=_send, args=(connection, size_bytes, http))
        sender.start()
        received_bytes = _receive(connection)
        sender.join()
    if received_bytes < size_bytes:
        raise AssertionError(f"{received_bytes} of {size_bytes} bytes came back")
    return time.perf_counter() - began_s


def _send(connection: socket.socket, size_bytes: int, http: bool) -> None:
    if http:
        head = f"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {size_bytes}\r\n\r\n"
        connection.sendall(head.encode())
    piece = bytes(LARGE_PIECE_BYTES)
    for _ in range(size_bytes // LARGE_PIECE_BYTES):
        connection.sendall(piece)
    if not http:
        connection.shutdown(socket.SHUT_WR)


def _receive(connection: socket.socket) -> int:
    buffer, total = bytearray(LARGE_PIECE_BYTES), 0
    while count := connection.recv_into(buffer):
        total += count
    return total


# Processes that wait started, and more than one loop.


def measure_prewarm(plan: Plan, report: Report) -> None:
    """The median latency of functions that are slow to start, at half of their capacity, processes waiting or not."""
    for name, fprocess in SLOW_STARTS.items():
        _measure_prewarm(plan, report, name, fprocess)


def _measure_prewarm(plan: Plan, report: Report, ends: str, fprocess: str) -> None:
    settings = {"cgi_headers": "false"}
    latencies: dict[str, list[float]] = defaultdict(list)
    with (
        OURS.started(plan.directory, fprocess, **settings) as cold,
        OURS.started(plan.directory, fprocess, prewarm="8", **settings) as warm,
    ):
        capacity = run_wrk(plan.script, cold.url, 8, plan.seconds).requests_per_s
        for _ in range(plan.rounds_count):
            for name, program in (("without", cold), ("with", warm)):
                latencies[name].append(run_arrivals(program.url, capacity / 2, plan.seconds) * 1e3)
    for name, rounds in latencies.items():
        report.add("2 prewarm", f"p50 {name} prewarm, {ends}, {capacity / 2:.0f} calls/s", "ms", rounds)
    ratio = ratios(latencies["with"], latencies["without"])
    report.add("2 prewarm", f"p50 with to without, {ends}", "x", ratio, at_most(0.25))


def measure_workers(plan: Plan, report: Report) -> None:
    """What a second loop brings, at 64 connections."""
    rates: dict[int, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        running = {n: stack.enter_context(OURS.started(plan.directory, workers=str(n))) for n in (1, 2)}
        for _ in range(plan.rounds_count):
            for count, program in running.items():
                rates[count].append(run_wrk(plan.script, program.url, 64, plan.seconds).requests_per_s)
    for count, rounds in rates.items():
        report.add("7 workers", f"watchdog, workers={count}, 64 connections", "/s", rounds)
    report.add("7 workers", "watchdog, two to one", "x", ratios(rates[2], rates[1]))
