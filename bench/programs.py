"""The programs that are measured: ours and peers, started alike, and what they use."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from testkit.harness import free_port, wait_until

START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 3.0


class Running:
    """A program that serves a port, with its log in a file.  Use as a context manager; `start_s` is known then."""

    def __init__(self, argv: Sequence[str], settings: Mapping[str, str], port: int, directory: Path) -> None:
        self.port = port
        self.start_s = 0.0
        self._argv = list(argv)
        self._environ = {**os.environ, **settings}
        self._log = directory / f"{port}.log"

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            began_s = time.perf_counter()
            popen = subprocess.Popen(self._argv, env=self._environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._popen = popen
        self.process = psutil.Process(popen.pid)
        try:
            wait_until(self._listens, START_DEADLINE_S, f"{self._argv} to listen")
        except BaseException:
            self._stop()
            raise
        self.start_s = time.perf_counter() - began_s
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def _listens(self) -> bool:
        if self._popen.poll() is not None:
            raise AssertionError(f"{self._argv} ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
            return True
        return False

    def _stop(self) -> None:
        """Send SIGTERM again and again, as ours stops at once at the second; then SIGKILL."""
        end_s = time.monotonic() + STOP_DEADLINE_S
        while self._popen.poll() is None and time.monotonic() < end_s:
            self._popen.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(0.1)
        self._popen.kill()
        self._popen.wait()

    def tree(self) -> list[psutil.Process]:
        """Return it and all its descendants."""
        return [self.process, *self.process.children(recursive=True)]


def resident_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return the sum of what is resident; pages shared by several of them count for each."""
    return sum(process.memory_info().rss for process in processes)


def proportional_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return the sum of the proportional sets: a shared page counts by the part of each sharer."""
    return sum(process.memory_full_info().pss for process in processes)


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Return the processor time that they have used, in seconds."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def peak_bytes(process: psutil.Process) -> int:
    """Return the most that was ever resident of one process (VmHWM of proc(5))."""
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@dataclass(frozen=True)
class Watchdog:
    """A watchdog that can be started: ours, or a peer that honours `port` and `fprocess`."""

    name: str
    argv: tuple[str, ...]

    def started(self, directory: Path, fprocess: str = "cat", **settings: str) -> Running:
        """Return it, to be entered, in front of `fprocess`."""
        port = free_port()
        fixed = {"port": str(port), "fprocess": fprocess, "metrics_port": str(free_port()), "suppress_lock": "true"}
        return Running(self.argv, fixed | {"TMPDIR": str(directory)} | settings, port, directory)


OURS = Watchdog("ours", (sys.executable, "-m", "faashound.watchdog"))


def parse_peer(command: str) -> Watchdog:
    """Return the peer that a command line starts."""
    argv = tuple(shlex.split(command))
    return Watchdog(Path(argv[0]).name, argv)
