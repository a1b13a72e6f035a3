"""The system that a chaos run breaks: gateway, workers and functions as real processes on one spool, and its disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from bench.chaos.ledger import Books
from bench.chaos.station import Station
from faashound.calls.names import DEFAULT_NAMESPACE
from faashound.functions.forkserver import process_name
from testkit.harness import Program, free_port, wait_until
from testkit.inspection import children_of, has_loop
from testkit.system import System, Worker, rows

LEASE_S = 3.0
DRAIN_TIMEOUT_S = 8.0
UPSTREAM_TIMEOUT_S = 8.0
GONE_WITHIN_S = 10.0
MAX_ATTEMPTS_COUNT = 60
POISON_ATTEMPTS_COUNT = 12
DISK_BYTES = 1 << 30

# Of the functions behind watchdogs.  Each run notes its beginning and its end, and does the step of its number.
SCRIPT = """
say() { read -r now rest </proc/uptime; echo "$now $Http_X_Call_Id $$ $1" >>"$LEDGER"; }
say start
steps=${Http_Path#/}
case $steps in *.*)
    run=$(grep -c "$Http_X_Call_Id.* start" "$LEDGER")
    while [ "$run" -gt 1 ] && [ "$steps" != "${steps#*.}" ]; do steps=${steps#*.} run=$((run - 1)); done ;;
esac
case ${steps%%.*} in
    200) ;;
    slow) sleep 0.3 ;;
    long) sleep 4 ;;
    500) exit 1 ;;
    crash) kill -9 $$ ;;
    hang) exec sleep 60 ;;
esac
cat
say end
"""
FUNCTION = """
[{name}]
fprocess = "sh {script}"
healthcheck_interval = "100ms"
environment = {{ LEDGER = "{ledger}" }}
{more}
"""
LOCAL_FUNCTIONS = {
    "work": "",
    "more": "",
    "narrow": "max_inflight = 2",
    "long": "",
    "stuck": 'exec_timeout = "4s"',
    "poison": f'annotations."com.openfaas.retry.attempts" = {POISON_ATTEMPTS_COUNT}',
}
WATCHDOGS = {process_name(name): name for name in LOCAL_FUNCTIONS}
SETTINGS = {
    "ack_wait": f"{LEASE_S:g}s",
    "drain_timeout": f"{DRAIN_TIMEOUT_S:g}s",
    "upstream_timeout": f"{UPSTREAM_TIMEOUT_S:g}s",
    "callback_timeout": "3s",
    "callback_retry_attempts": "20",
    "max_retry_attempts": str(MAX_ATTEMPTS_COUNT),
    "initial_retry_wait": "100ms",
    "max_retry_wait": "1s",
}


class Disk:
    """A small file system that can be full at once: a tmpfs whose size is set to what is used."""

    def __init__(self, place: Path, size_bytes: int = DISK_BYTES) -> None:
        self.place = place
        self._size_bytes = size_bytes
        place.mkdir()
        options = f"size={size_bytes},mode=0700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, check=False
        )
        self.mounted = mounted.returncode == 0

    def fill(self) -> None:
        """Leave no room."""

        def shrink() -> bool:
            facts = os.statvfs(self.place)
            return self.resize((facts.f_blocks - facts.f_bfree) * facts.f_bsize)

        wait_until(shrink, 5.0, "the disk is full")  # refused if something was written in between

    def empty(self) -> None:
        """Give room again."""
        self.resize(self._size_bytes)

    def resize(self, bytes_count: int) -> bool:
        """Make it smaller or larger; False if more is used than that."""
        options = f"remount,size={bytes_count}"
        return not subprocess.run(["mount", "-o", options, self.place], capture_output=True, check=False).returncode

    def unmount(self) -> None:
        """Take it away with all that is on it."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.place], check=True)


@dataclass(frozen=True, slots=True)
class Target:
    """A process to be hurt.  `program` is what has to be started again by us; None if a supervisor does that."""

    victim: str
    pid: int
    program: Program | None = None
    function: str | None = None


class InFlight(NamedTuple):
    """The ids of calls that are run, and of calls whose result is delivered, at one moment."""

    calls: frozenset[str] = frozenset()
    callbacks: frozenset[str] = frozenset()


class Rig:
    """Gateway, two workers, functions and station on one spool.  Use as a context manager."""

    def __init__(self, directory: Path, books: Books, workers_count: int = 1) -> None:
        self.books = books
        self._settings = {**SETTINGS, "workers": str(workers_count)}
        self.ledger = directory / "runs"
        self.ledger.touch()
        self.disk = Disk(directory / "disk")
        self.spool = self.disk.place / "spool"
        self.station = Station(books, self.ledger)
        self.mark = f"CHAOS_MARK={uuid.uuid4()}"
        self.programs: list[Program] = []
        self._live: list[Program] = []
        self._cleanup = contextlib.ExitStack()
        self.port = free_port()
        script = directory / "function.sh"
        script.write_text(SCRIPT)
        self._functions = f'[remote]\nurl = "{self.station.url}/function"\n' + "".join(
            FUNCTION.format(name=name, script=script, ledger=self.ledger, more=more)
            for name, more in LOCAL_FUNCTIONS.items()
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.callback(self.disk.unmount)
            stack.callback(self.station.close)
            stack.callback(self._kill_all)
            self.station.open()
            self.start_gateway()
            self.start_worker()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def _kill_all(self) -> None:
        for program in self._live:
            program.__exit__(KeyboardInterrupt)  # as after a failure: no further questions

    def start_gateway(self) -> None:
        """Start the gateway, with its functions and a worker beside it."""
        self.gateway = System(self._functions, {**self._settings, "port": str(self.port)}, self.spool)
        self._start(self.gateway)

    def start_worker(self) -> None:
        """Start the other worker."""
        self.worker = Worker(self.gateway, SETTINGS)
        self._start(self.worker)

    def _start(self, program: Program) -> None:
        name, _, value = self.mark.partition("=")
        program.environment[name] = value
        self.programs.append(program)
        program.__enter__()
        self._live.append(program)

    def retire(self, program: Program) -> None:
        """See that nothing is left of a program that has ended."""
        wait_until(lambda: not program.survivors(), GONE_WITHIN_S, "everything that the program had started is gone")
        program.__exit__(None)
        self._live.remove(program)

    def kept(self, parent: int | None = None) -> Iterator[Target]:
        """Yield what the gateway keeps running: worker, watchdogs of local functions, its own worker processes."""
        for pid in sorted(children_of(self.gateway.pid if parent is None else parent)):
            with contextlib.suppress(OSError):  # it has just ended
                environment = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")
                name = next((word.partition("=")[2] for word in environment if word.startswith("OPENFAAS_NAME=")), "")
                shown = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").rstrip("\n")
                if name == "worker":
                    yield Target("worker", pid)
                elif shown in WATCHDOGS:
                    yield Target("watchdog", pid, function=WATCHDOGS[shown])
                elif b"faashound.functions.forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield from self.kept(pid)
                elif has_loop(pid):
                    yield Target("gateway process", pid)
                    yield from self.kept(pid)

    def targets(self, victim: str) -> list[Target]:
        """Return the processes of one kind that live now."""
        if victim == "gateway":
            return [Target(victim, self.gateway.pid, self.gateway)]
        found = [target for target in self.kept() if target.victim == victim]
        return [*found, Target(victim, self.worker.pid, self.worker)] if victim == "worker" else found

    def senders(self) -> list[Target]:
        """Return what sends calls to functions: workers, and the worker processes of a gateway that has several."""
        return [*self.targets("worker"), *self.targets("gateway process")]

    def in_flight(self, target: Target) -> InFlight:
        """Return what is in the hands of those workers that a fault of the target concerns."""
        leases = rows(self.spool, "SELECT id, function, kind, owner FROM leases JOIN calls USING (seq)")

        def concerned(lease: dict[str, str]) -> bool:
            if target.victim == "watchdog":
                return lease["kind"] == "call" and lease["function"] == f"{target.function}.{DEFAULT_NAMESPACE}"
            pid = lease["owner"].partition("-")[0]
            return pid == str(target.pid) if target.victim == "worker" else Path(f"/proc/{pid}").exists()

        held = [lease for lease in leases if concerned(lease)]
        return InFlight(
            frozenset(lease["id"] for lease in held if lease["kind"] == "call"),
            frozenset(lease["id"] for lease in held if lease["kind"] == "callback"),
        )
