"""A thousand local functions in one file: what they cost while none is called, and what a first call costs."""

from __future__ import annotations

import random
import time
import urllib.request
from statistics import median

from .gateways import gateway
from .programs import cpu_s, proportional_bytes
from .report import Report, at_most
from .watchdogs import MIB, Plan

FUNCTIONS_COUNT = 1000
CALLED_COUNT = 50  # of them, each for the first time
IDLE_S = 10.0
SETTLE_S = 2.0  # after the start: the worker and the fork server have imported what they need
CALL_DEADLINE_S = 10.0


def measure_functions(plan: Plan, report: Report) -> None:
    """Start, memory, first call and idle processor time of a gateway with FUNCTIONS_COUNT local functions."""
    starts, memories, firsts, idles = [], [], [], []
    text = "".join(f'[f{number}]\nfprocess = "cat"\n' for number in range(FUNCTIONS_COUNT))
    for turn in range(plan.rounds_count):
        settings = {"worker": "local", "worker_metrics_port": "0"}
        with gateway(plan, text, plan.directory / f"queue-functions-{turn}", **settings) as program:
            starts.append(program.start_s)
            time.sleep(SETTLE_S)
            memories.append(proportional_bytes(program.tree()) / MIB)
            called = random.sample(range(FUNCTIONS_COUNT), CALLED_COUNT)
            firsts.append(median(first_call_ms(f"{program.url}/function/f{number}") for number in called))
            tree = program.tree()
            before_s = cpu_s(tree)
            time.sleep(IDLE_S)
            idles.append((cpu_s(tree) - before_s) * 1e3)
    report.add("8 functions", f"start with {FUNCTIONS_COUNT} local functions", "s", starts, at_most(2))
    report.add("8 functions", "memory of all processes, none called yet", "MiB", memories, at_most(100))
    report.add("8 functions", "first call of a function, p50", "ms", firsts, at_most(60))
    what = f"processor time in {IDLE_S:g} s without a call, {CALLED_COUNT} of them awake"
    report.add("8 functions", what, "ms", idles, at_most(100))


def first_call_ms(url: str) -> float:
    """Return how long the answer of `cat` takes, over a connection of its own."""
    began_s = time.perf_counter()
    with urllib.request.urlopen(url, b"x", CALL_DEADLINE_S) as answer:
        assert answer.read() == b"x"
    return (time.perf_counter() - began_s) * 1e3
