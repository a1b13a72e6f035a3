"""What can be seen of a running watchdog from outside: its children, its guard, its metrics."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from testkit.harness import Program, http_request


def children_of(pid: int) -> set[int]:
    """Return the children of `pid`, those it has adopted and those it has not reaped among them (proc(5))."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))


def has_loop(pid: int) -> bool:
    """Tell whether `pid` runs an event loop, as what serves does, and what guards or keeps it does not."""
    with suppress(OSError):  # it has ended
        return any(map(is_epoll, Path(f"/proc/{pid}/fd").iterdir()))
    return False


def is_epoll(fd: Path) -> bool:
    """Tell whether a descriptor, by its place below /proc, is one that event loops wait with."""
    with suppress(OSError):  # closed since it was listed
        return "eventpoll" in str(fd.readlink())
    return False


def state_of(pid: int) -> str:
    """Return the state letter of `pid`, "X" once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def guard_of(program: Program) -> int:
    """Return the number of the watchdog's other process, the child that runs our program as well."""
    (guard,) = children_of(program.pid) & (program.survivors() - program.functions())
    return guard


def serves(port: int) -> bool:
    """Tell whether a healthy watchdog listens on `port`."""
    try:
        return http_request(port, "GET", "/_/health").status == 200
    except ConnectionError:
        return False


def is_free(program: Program) -> bool:
    """Tell whether the watchdog has room for another call (max_inflight)."""
    return http_request(program.port, "GET", "/_/ready").status == 200


def in_flight(program: Program) -> int:
    """Return http_requests_in_flight."""
    text = http_request(program.metrics_port, "GET", "/metrics").text
    return int(float(re.findall(r"^http_requests_in_flight (\S+)$", text, re.MULTILINE)[0]))
