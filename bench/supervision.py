"""Show what a watchdog leaves behind: the table of the README, for ours or any other.

    python -m bench.supervision
    python -m bench.supervision --cmd ./another-watchdog

The command is started with the environment that classic watchdogs share (`fprocess`, `port`, `exec_timeout`, ...) and
`fprocess=sh`: each request's body is the script to run.  For each row: what the caller was answered, after how many
seconds, how many processes of the function live (or are zombies) a second later, and the most memory the watchdog had.
No answer is waited for longer than 15 s.  Everything stays on this machine; needs root, or user namespaces, for PID 1.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from testkit import tree
from testkit.apart import UNSHARE_PIDS
from testkit.harness import clean_environment, command_of, connect, free_port, processes_marked, wait_until
from testkit.inspection import state_of

PATIENCE_S = 15.0  # no answer by then is "none"
AFTERMATH_S = 1.0  # after the answer: how long the watchdog has to clean up


@dataclass(frozen=True)
class Row:
    """What one scenario showed."""

    answer: str
    seconds: float
    survivors: int
    peak_bytes: int
    remark: str = ""


class Running:
    """A watchdog that runs: its processes are known by a mark that everything it starts inherits."""

    def __init__(self, pid: int, port: int, mark: str, process: subprocess.Popen[bytes]) -> None:
        self.pid = pid
        self.port = port
        self.process = process
        self._mark = mark
        self._own: set[int] = set()

    def warm_up(self) -> None:
        """Have one call answered, so that whatever the watchdog starts for itself has been started, and note that."""
        ask(self, b"exit 0")
        self._own = processes_marked(self._mark)

    def survivors(self) -> set[int]:
        """Return the living processes that were not there when no function had run."""
        return processes_marked(self._mark) - self._own

    def zombies(self) -> int:
        """Return how many children of the watchdog's processes wait to be reaped."""
        return sum(state_of(child) == "Z" for pid in self._own for child in children_of(pid))

    def peak_bytes(self) -> int:
        """Return the most memory that one of its own processes ever had resident; 0 if all have ended."""
        return max(map(peak_of, self._own), default=0)


def peak_of(pid: int) -> int:
    """Return the most memory that a process ever had resident; 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    return 0


def children_of(pid: int) -> list[int]:
    """Return the children of all threads of `pid`."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text(encoding="ascii").split()]


@contextmanager
def running(command: Sequence[str], settings: Mapping[str, str] = {}, *, as_first: bool = False) -> Iterator[Running]:
    """Run `command` with `settings`, `as_first` as PID 1 of a namespace; at the end nothing of it is left."""
    port, mark, temporary = free_port(), f"BENCH_MARK={uuid.uuid4()}", tempfile.mkdtemp(prefix="bench-")
    fixed = {"fprocess": "sh", "port": str(port), "metrics_port": str(free_port()), "TMPDIR": temporary}
    name, _, value = mark.partition("=")
    environment = clean_environment(fixed | {name: value} | dict(settings))
    argv = [*(UNSHARE_PIDS if as_first else ()), *command]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: process.poll() is not None or accepts(port), PATIENCE_S, f"{argv} listens")
        pid = children_of(process.pid)[0] if as_first else process.pid
        watchdog = Running(pid, port, mark, process)
        watchdog.warm_up()
        yield watchdog
    finally:
        process.kill()
        process.wait()
        for pid in processes_marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def accepts(port: int) -> bool:
    try:
        connect(port).close()
    except OSError:
        return False
    return True


def ask(watchdog: Running, script: bytes) -> tuple[str, float]:
    """Run `script` as a caller that waits; return what was answered and after how many seconds."""
    start_s = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", watchdog.port, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/", script)
        response = connection.getresponse()
        while response.read(1 << 20):
            pass
        answer = str(response.status)
    except TimeoutError:
        answer = "none"
    except (ConnectionError, http.client.HTTPException):
        answer = "empty reply"
    finally:
        connection.close()
    return answer, time.monotonic() - start_s


def after(watchdog: Running, count: Callable[[], int]) -> int:
    """Return what `count` says once it is 0, or after AFTERMATH_S."""
    with suppress(AssertionError):
        wait_until(lambda: count() == 0, AFTERMATH_S, "nothing left")
    return count()


def call(command: Sequence[str], script: bytes, **settings: str) -> Row:
    """One call that is waited for."""
    with running(command, settings) as watchdog:
        answer, elapsed_s = ask(watchdog, script)
        left = after(watchdog, lambda: len(watchdog.survivors()))
        return Row(answer, elapsed_s, left, watchdog.peak_bytes())


def hang_ups(command: Sequence[str]) -> Row:
    """Twenty clients leave after 50 ms; then one more asks, where only one call at a time is allowed."""
    with running(command) as watchdog:
        script = b"sleep 60 & sleep 60"
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda _: leave(watchdog, script), range(20)))
        left = after(watchdog, lambda: len(watchdog.survivors()))
        peak_bytes = watchdog.peak_bytes()
    with running(command, {"max_inflight": "1"}) as watchdog:
        leave(watchdog, script)
        answer = after_hang_up(watchdog)
        return Row("hung up", 0.05, left, peak_bytes, f"the next caller, with `max_inflight=1`: {answer}")


def leave(watchdog: Running, script: bytes) -> None:
    with connect(watchdog.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(script), script))
        client.settimeout(0.05)
        with suppress(TimeoutError):
            client.recv(1)


def after_hang_up(watchdog: Running) -> str:
    """Return what a new caller is answered, trying again for AFTERMATH_S."""
    end_s = time.monotonic() + AFTERMATH_S
    while (answer := ask(watchdog, b"echo on")[0]) != "200" and time.monotonic() < end_s:
        pass
    return answer


def first_process(command: Sequence[str]) -> Row:
    """A function that double-forks, in front of a watchdog that is PID 1."""
    with running(command, as_first=True) as watchdog:
        script = f"{shlex.quote(sys.executable)} -SEIc '{tree.double_forks(200)}'".encode()
        answer, elapsed_s = ask(watchdog, script)
        left = after(watchdog, watchdog.zombies)
        return Row(answer, elapsed_s, left, watchdog.peak_bytes(), "zombies")


def signalled(command: Sequence[str], *numbers: signal.Signals) -> Row:
    """The watchdog gets signals while a function runs that would not end by itself."""
    limits = {"write_timeout": "1s", "exec_timeout": "0", "healthcheck_interval": "1s"}
    with running(command, limits) as watchdog, connect(watchdog.port) as client:
        script = b"setsid -f sleep 60; sleep 60 & sleep 60"
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (len(script), script))
        wait_until(lambda: len(watchdog.survivors()) >= 4, PATIENCE_S, "the function is up")
        peak_bytes, start_s = watchdog.peak_bytes(), time.monotonic()
        for number in numbers:
            watchdog.process.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            watchdog.process.wait(PATIENCE_S)
        ended = "ended" if watchdog.process.poll() is not None else "still runs"
        elapsed_s = time.monotonic() - start_s
        left = after(watchdog, lambda: len(watchdog.survivors()))
        return Row(ended, elapsed_s, left, peak_bytes)


def rows(command: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield each scenario's name and what it showed, as they come."""
    yield "`sleep 60 & echo started; wait`", call(command, b"sleep 60 & echo started; wait", exec_timeout="1s")
    yield "`sleep 12 & echo hi` (3s)", call(command, b"sleep 12 & echo hi", exec_timeout="3s")
    yield "starts a `setsid` daemon, then hangs", call(command, b"setsid sleep 60 & sleep 60", exec_timeout="1s")
    hundred = b"for i in $(seq 100); do sleep 60 & done; wait"
    yield "starts 100 children, waits", call(command, hundred, exec_timeout="1s")
    stubborn = b"trap '' TERM INT HUP; (sleep 60 &); env -i sleep 60"
    yield "ignores signals, clears its environment, double-forks", call(command, stubborn, exec_timeout="1s")
    yield "20 clients hang up after 50 ms", hang_ups(command)
    yield "double-forks 200 times, watchdog is PID 1", first_process(command)
    for numbers in ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGKILL,)):
        names = ", ".join(number.name for number in numbers)
        yield f"{names} to the watchdog while a function runs", signalled(command, *numbers)
    yield "200 MB on stdout", call(command, b"head -c 200000000 /dev/zero")
    yield "100 MB body", call(command, b"exec wc -c\n" + bytes(100_000_000))
    yield "`sleep 8` with `write_timeout=3s`", call(command, b"sleep 8; echo done", write_timeout="3s")


def main() -> int:
    parser = argparse.ArgumentParser(description="Show what a watchdog leaves behind; see the module's docstring.")
    parser.add_argument(
        "--cmd", default=shlex.join(command_of("watchdog")), help="the watchdog's command; default: ours"
    )
    command = shlex.split(parser.parse_args().cmd)
    print("`exec_timeout=1s` unless said.\n")
    print("| function | answer | seconds | processes left | peak memory, MiB |\n|---|---|---|---|---|")
    for name, row in rows(command):
        peak = f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else ""
        left = f"{row.survivors} {row.remark}".strip() if row.remark == "zombies" else str(row.survivors)
        answer = f"{row.answer}; {row.remark}" if row.remark not in ("", "zombies") else row.answer
        print(f"| {name} | {answer} | {row.seconds:.1f} | {left} | {peak} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
