"""Call a watchdog many times, well and badly, and see whether anything of it has grown.

    python -m bench.soak --calls 10000

One call in ten reaches its deadline, one in ten is abandoned by its client, one in fifty writes more than is kept in
memory; the bad ones leave children and daemons behind.  Memory, descriptors, zombies, processes and
http_requests_in_flight are read when 500 calls have ended and again at the end, each time with nothing running.
The exit status is 0 if memory is within 5 MiB and everything else is what it was, or nought.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from testkit.harness import Program, connect, free_port, http_request, wait_until
from testkit.inspection import children_of, in_flight, state_of

WARM_UP_CALLS = 500
CALLERS_COUNT = 8
GROWTH_BYTES = 5 << 20
LARGE_BYTES = 1_000_000  # more than the watchdog keeps in memory
TREE = b"sleep 60 & setsid -f sleep 60; exec sleep 60"


@dataclass(frozen=True)
class Reading:
    """What a watchdog uses while nothing runs."""

    calls: int
    resident_bytes: int
    descriptors: int
    zombies: int
    processes: int
    in_flight: int


def read(program: Program, calls: int) -> Reading:
    """Wait until nothing runs any more, then read."""
    wait_until(lambda: not program.functions() and in_flight(program) == 0, 5.0, "nothing runs")
    status = Path(f"/proc/{program.pid}/status").read_text(encoding="ascii")
    children = children_of(program.pid)
    return Reading(
        calls,
        int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024,
        settled_descriptors(program),
        sum(state_of(pid) == "Z" for pid in children),
        len(children),
        in_flight(program),
    )


def settled_descriptors(program: Program) -> int:
    """Return the lowest count within 100 ms: the connection that has just been answered takes a moment to close."""
    end_s = time.monotonic() + 0.1
    lowest = program.descriptors()
    while time.monotonic() < end_s:
        lowest = min(lowest, program.descriptors())
    return lowest


def call(program: Program, index: int) -> str:
    """Make call number `index`, whose kind its number tells; return what became of it."""
    if index % 10 == 3:
        answer = http_request(program.port, "POST", "/", {"X-Timeout": "60ms"}, TREE)
        assert answer.status == 408, answer
        return "408"
    if index % 10 == 7:
        abandon(program)
        return "abandoned"
    size_bytes = LARGE_BYTES if index % 50 == 0 else index % 1000
    answer = http_request(program.port, "POST", body=b"head -c %d /dev/zero" % size_bytes)
    assert (answer.status, len(answer.body)) == (200, size_bytes), answer
    return "200"


def abandon(program: Program) -> None:
    """Send a request and leave within 40 ms, often before its process has started."""
    with connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(TREE), TREE))
        client.settimeout(random.uniform(0.001, 0.04))
        with suppress(TimeoutError):
            client.recv(1)


def soak(program: Program, calls: int) -> tuple[Reading, Reading, Counter[str]]:
    """Make `calls` calls; return the readings after the warm-up and at the end, and how many ended how."""
    with ThreadPoolExecutor(CALLERS_COUNT) as pool:
        outcomes = Counter(pool.map(lambda index: call(program, index), range(WARM_UP_CALLS)))
        before = read(program, WARM_UP_CALLS)
        outcomes.update(pool.map(lambda index: call(program, index), range(WARM_UP_CALLS, calls)))
    return before, read(program, calls), outcomes


def grown(before: Reading, after: Reading) -> list[str]:
    """Return what is not as it should be, a line each."""
    growth_bytes = after.resident_bytes - before.resident_bytes
    conditions = {
        f"memory grew by {growth_bytes / 2**20:.1f} MiB": growth_bytes > GROWTH_BYTES,
        "descriptors are left": after.descriptors > before.descriptors,
        "zombies are left": after.zombies > 0,
        "processes are left": after.processes > before.processes,
        "requests are in flight": after.in_flight != 0,
    }
    return [text for text, holds in conditions.items() if holds]


def report(readings: tuple[Reading, ...], outcomes: Counter[str], elapsed_s: float) -> str:
    """Return the readings as a Markdown table."""
    lines = [
        "| calls | memory, MiB | descriptors | zombies | children (the guard) | in flight |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.calls} | {each.resident_bytes / 2**20:.1f} | {each.descriptors} | {each.zombies} | {each.processes} "
        f"| {each.in_flight} |"
        for each in readings
    ]
    ends = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return "\n".join([*lines, "", f"{ends}; {elapsed_s:.0f} s"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Soak a watchdog; see the module's docstring.")
    parser.add_argument("--calls", type=int, default=10_000, help=f"more than {WARM_UP_CALLS}; default 10000")
    calls = parser.parse_args().calls
    if calls <= WARM_UP_CALLS:
        parser.error(f"--calls must be more than {WARM_UP_CALLS}")
    start_s = time.monotonic()
    with Program("watchdog", {"fprocess": "sh", "metrics_port": str(free_port())}) as program:
        before, after, outcomes = soak(program, calls)
    print(report((before, after), outcomes, time.monotonic() - start_s))
    problems = grown(before, after)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
