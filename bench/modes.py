"""Measurements of mode=http: a server that costs next to nothing behind each watchdog, and by itself.

The calls are those of `bench.watchdogs`, side by side as there; what a watchdog adds is its p50 less the server's own.
"""

from __future__ import annotations

import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from testkit.harness import free_port, wait_until

from .load import Load, run_wrk
from .programs import OURS, Running, Watchdog
from .report import Report, at_least, at_most, ratios
from .watchdogs import CONNECTIONS, MIB, Plan

RATIO_TO_PEER = {1: 1.1, 8: 1.3, 64: 1.0}
FIRST_BYTE_MS = 20.0
STREAMED_BYTES = 1 << 30
PRINTS_LATE = "sh -c 'while :; do date +%s%N; sleep 0.01; done'"
LINES_COUNT = 50


def measure_modes(plan: Plan, report: Report) -> None:
    """Calls of a trivial server at 1, 8 and 64 connections; then how soon, and how much, is streamed."""
    loads: dict[tuple[str, int], list[Load]] = defaultdict(list)
    with ExitStack() as stack:
        urls = {"the server alone": stack.enter_context(_server_alone(plan))}
        for each in plan.subjects:
            try:
                urls[each.name] = stack.enter_context(_in_front_of_server(plan, each))
            except AssertionError as error:  # a peer may know no mode=http
                if each is OURS:
                    raise
                report.remark(f"http, {each.name}: not measured: {error}")
        for _ in range(plan.rounds_count):
            for connections_count in CONNECTIONS:
                for name, url in urls.items():
                    loads[name, connections_count].append(run_wrk(plan.script, url, connections_count, plan.seconds))
    for connections_count in CONNECTIONS:
        _report_calls(plan, report, loads, connections_count)
    _measure_streams(plan, report)


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


@contextmanager
def _server_alone(plan: Plan) -> Iterator[str]:
    port = free_port()
    with Running([sys.executable, "-m", "bench.trivial", str(port)], {}, port, plan.directory) as server:
        yield server.url


@contextmanager
def _in_front_of_server(plan: Plan, watchdog: Watchdog) -> Iterator[str]:
    port = free_port()
    settings = {"mode": "http", "upstream_url": f"http://127.0.0.1:{port}"}
    with watchdog.started(plan.directory, f"{sys.executable} -m bench.trivial {port}", **settings) as running:
        wait_until(lambda: _listens(port), 20.0, "the server listens")
        yield running.url


def _report_calls(plan: Plan, report: Report, loads: dict[tuple[str, int], list[Load]], connections_count: int) -> None:
    at = f"{connections_count} connection{'s' * (connections_count > 1)}"
    alone = [load.p50_s for load in loads["the server alone", connections_count]]
    for name, count in loads:
        if count == connections_count:
            mine = loads[name, count]
            report.add("8 modes", f"http, {name}, {at}", "/s", [load.requests_per_s for load in mine])
            report.add("8 modes", f"http, {name}, {at}, p99", "ms", [load.p99_s * 1e3 for load in mine])
            if connections_count == 1 and name != "the server alone":
                added = [(load.p50_s - base) * 1e6 for load, base in zip(mine, alone, strict=True)]
                report.add("8 modes", f"http, {name} adds to p50, {at}", "us", added)
    ours = loads[OURS.name, connections_count]
    for peer in plan.peers:
        theirs = loads.get((peer.name, connections_count))
        if theirs is None:
            continue
        faster = ratios([load.requests_per_s for load in ours], [load.requests_per_s for load in theirs])
        later = ratios([load.p99_s for load in ours], [load.p99_s for load in theirs])
        bound = at_least(RATIO_TO_PEER[connections_count])
        report.add("8 modes", f"http, ours to {peer.name}, {at}", "x", faster, bound)
        report.add("8 modes", f"http, p99 of ours to {peer.name}, {at}", "x", later, at_most(1.0))


def _measure_streams(plan: Plan, report: Report) -> None:
    """How late a line is with its reader, and what 1 GiB takes that a slow reader is sent."""
    with OURS.started(plan.directory, PRINTS_LATE, mode="streaming") as running:
        report.add("8 modes", "streaming, printed to read", "ms", _lateness_ms(running.port), at_most(FIRST_BYTE_MS))
    with OURS.started(plan.directory, f"head -c {STREAMED_BYTES} /dev/zero", mode="streaming", workers="1") as running:
        began_s = time.perf_counter()
        total = sum(map(len, _read_slowly(running.port)))
        rate = total / MIB / (time.perf_counter() - began_s)
        if total < STREAMED_BYTES:
            raise AssertionError(f"{total} bytes of the stream came")
        peak = max(process.memory_info().rss for process in running.tree()) / MIB
    report.add("8 modes", f"streaming, {STREAMED_BYTES // MIB} MiB to a slow reader", "MiB/s", [rate])
    report.add("8 modes", "streaming, resident after it", "MiB", [peak], at_most(64))


def _pieces(port: int, size: int) -> Iterator[bytes]:
    with socket.create_connection(("127.0.0.1", port), 60.0) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while piece := client.recv(size):
            yield piece


def _lateness_ms(port: int) -> list[float]:
    late_ms: list[float] = []
    for piece in _pieces(port, 65536):
        now_ns = time.time_ns()
        late_ms += [(now_ns - int(line)) / 1e6 for line in piece.split() if len(line) == 19 and line.isdigit()]
        if len(late_ms) >= LINES_COUNT:
            break
    return late_ms


def _read_slowly(port: int) -> Iterator[bytes]:
    """Yield a stream, with a pause after each hundredth of it."""
    taken, pause_at = 0, STREAMED_BYTES // 100
    for piece in _pieces(port, MIB):
        yield piece
        taken += len(piece)
        if taken >= pause_at:
            pause_at += STREAMED_BYTES // 100
            time.sleep(0.02)
