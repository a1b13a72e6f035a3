"""Break everything, again and again, under load, and see whether a call that was accepted is lost.

    python -m bench.chaos --minutes 10
    python -m bench.chaos --minutes 1 --seed 7 --rate 20 --workers 2

A gateway with a worker of its own, a second worker beside it, functions (programs behind watchdogs, and one elsewhere)
and a receiver of callbacks run as real processes on one spool.  Asynchronous calls come at `--rate` a second: with and
without callbacks, delays, expiries, idempotency keys, large bodies, ids of their own; some are cancelled.  Functions
and receiver answer by a script that travels in the path.  Meanwhile, at random instants, one after the other: kill -9,
SIGTERM and SIGSTOP (a worker: past its lease) of gateway, worker and watchdog; the receiver down; the disk full.  With
`--workers` the gateway is several worker processes, and each of them is killed and stopped as well.

At the end everything is up again and must drain.  What is audited, and what a broken promise is, stands in
bench/ledger.py, whose table is printed.  The exit status is 1 after a broken promise.  The same seed gives the same
calls and the same faults, at instants that the machine decides.  Full disks need the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self

from bench.ledger import Answer, Books, Fault, Found, Order, Post, Run, audit, parse_runs, table
from faashound.calls.model import State
from faashound.calls.names import DEFAULT_NAMESPACE
from faashound.functions.forkserver import process_name
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.queue import Spool
from testkit.harness import Program, crowding, free_port, http_over, http_request, processes_marked, wait_until
from testkit.inspection import children_of, has_loop
from testkit.system import System, Worker, rows

LEASE_S = 3.0
DRAIN_TIMEOUT_S = 8.0
UPSTREAM_TIMEOUT_S = 8.0
TERM_LIMIT_S = {"gateway": DRAIN_TIMEOUT_S + UPSTREAM_TIMEOUT_S, "worker": DRAIN_TIMEOUT_S, "watchdog": 6.0}
STOP_S = {"gateway": 1.0, "gateway process": 1.0, "worker": 1.5 * LEASE_S, "watchdog": 1.0}
SLOW_S = 0.3
HELD_S = 1.0  # for others than those that end: one may have stopped with the queue's lock, which these want to end
OUTAGE_S = 1.5  # of receiver and disk
MEAN_PAUSE_S = 1.0  # between two faults
DRAINED_WITHIN_S = 180.0  # a callback that failed twice waits 20 s, one that failed three times 80 s
GONE_WITHIN_S = 10.0
KEPT_WITHIN_S = 40.0  # what dies often is started again after up to 30 s
PATIENCE_S = 10.0  # of a caller
AGAIN_S = 0.1  # before a caller tries again
MAX_ATTEMPTS_COUNT = 60
POISON_ATTEMPTS_COUNT = 12
CALLERS_COUNT = 8
CANCEL_EVERY_COUNT = 30  # one call in so many
LARGE_BYTES = 200_000  # more than what the spool keeps in a row
DISK_BYTES = 1 << 30

# What a function does at its first run, its second, ...; the last step stands for all further ones.
LOCAL_STEPS = (
    *[("200",)] * 12,
    *[("slow",)] * 6,
    ("500", "500", "200"),
    ("crash", "200"),
)
REMOTE_STEPS = (*[("200",)] * 3, ("slow",), ("429", "200"), ("drop", "200"), ("500", "500", "200"))
CALLBACK_STEPS = (*[("200",)] * 12, *[("slow",)] * 3, ("307",), ("410",), ("500", "200"))
STEPS = {
    "work": LOCAL_STEPS,
    "more": LOCAL_STEPS,
    "narrow": (("slow",),),  # its watchdog answers 429 to the third at once
    "long": (("long",),),  # longer than the lease
    "stuck": (("hang", "200"),),  # until exec_timeout
    "remote": REMOTE_STEPS,
    "poison": (("500",),),
}
SHARES = {"work": 50, "more": 20, "narrow": 6, "long": 3, "stuck": 1, "remote": 20, "poison": 2}

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

Strike = tuple[str, str]  # kind, victim
VICTIMS = ("gateway", "worker", "watchdog")
DECK: Counter[Strike] = Counter(
    {("kill", victim): 10 for victim in VICTIMS}
    | {("term", victim): 1 for victim in VICTIMS}
    | {("stop", victim): 1 for victim in VICTIMS}
    | {("down", "receiver"): 1, ("full", "disk"): 1}
)
PROCESSES_DECK: Counter[Strike] = Counter({("kill", "gateway process"): 10, ("stop", "gateway process"): 1})


def now_s() -> float:
    """Return the seconds since boot, the clock that functions in shell can read too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# The world outside: a function elsewhere, and the receiver of callbacks
# --------------------------------------------------------------------------------------------------------------------


class StationServer(ThreadingHTTPServer):
    """A server that is used to clients being killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Station:
    """A server in this process that answers by the script in the path.

    `/function/STEPS` is a function, and keeps the functions' ledger; `/callback/STEPS` receives results, and notes
    them in the books.
    """

    def __init__(self, books: Books, ledger: Path) -> None:
        self.port = free_port()
        self._books = books
        self._ledger = ledger
        self._visits: Counter[tuple[str, str]] = Counter()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """The address of the station."""
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Be there."""
        station = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                station._on_post(self)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
                pass

        self._server = StationServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Be gone: connections are refused, and those that are open end without an answer."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    def _on_post(self, request: BaseHTTPRequestHandler) -> None:
        length_bytes = int(request.headers["Content-Length"])
        body = request.rfile.read(length_bytes)
        if self._server is None or len(body) < length_bytes:  # we are down, or the sender has died
            request.close_connection = True
            return
        _, place, steps = request.path.split("/", 2)
        call_id = request.headers["X-Call-Id"]
        visit = call_id, place
        step = steps.split(".")[min(self._visits[visit], steps.count("."))]
        self._visits[visit] += 1
        if place == "function":
            self._run(request, call_id, step, body)
        else:
            self._receive(request, call_id, step, body)

    def _run(self, request: BaseHTTPRequestHandler, call_id: str, step: str, body: bytes) -> None:
        run = f"{call_id} {uuid.uuid4()}"
        self._say(f"{run} start")
        if step == "drop":
            request.close_connection = True
            return
        status = perform(step)
        if status == 200:
            self._say(f"{run} end")
        reply(request, status, body, {"Retry-After": "1"} if status == 429 else {})

    def _say(self, text: str) -> None:
        with self._ledger.open("a", encoding="ascii") as ledger:
            ledger.write(f"{now_s():.2f} {text}\n")

    def _receive(self, request: BaseHTTPRequestHandler, call_id: str, step: str, body: bytes) -> None:
        at_s, function_status = now_s(), request.headers["X-Function-Status"]
        status = perform(step)
        self._books.posts.append(Post(call_id, at_s, status, function_status, digest_of(body)))
        reply(request, status, b"", {"Location": "/moved/200"} if status == 307 else {})


def perform(step: str) -> int:
    """Return the status that a step answers with, after the time that it takes."""
    if step == "slow":
        time.sleep(SLOW_S)
        return 200
    return int(step)


def reply(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """Answer a request; its sender may be dead by now."""
    with contextlib.suppress(ConnectionError):
        request.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


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


# --------------------------------------------------------------------------------------------------------------------
# The system
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------------------------


def deck(rng: random.Random, *, several: bool = False) -> list[Strike]:
    """Return all faults in random order, with those of a gateway's worker processes if it has several."""
    strikes = list((DECK + PROCESSES_DECK if several else DECK).elements())
    rng.shuffle(strikes)
    return strikes


def strikes_until(deadline_s: float, rng: random.Random, *, several: bool = False) -> Iterator[Strike]:
    """Yield faults, deck after deck, until the deadline (monotonic)."""
    while True:
        for strike in deck(rng, several=several):
            if time.monotonic() > deadline_s:
                return
            yield strike


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T"


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


class Saboteur:
    """Does one bad thing after the other, and notes what was in flight.  `problems` are promises broken meanwhile."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.problems: list[str] = []
        self._rig = rig
        self._rng = rng
        self._deeds: dict[str, Callable[[Target], Fault]] = {"kill": self._kill, "term": self._term, "stop": self._stop}

    def strike(self, kind: str, victim: str) -> None:
        """Do it, and wait until what was hurt is back, unless its supervisor brings it back."""
        if victim == "receiver":
            fault = self._down()
        elif victim == "disk":
            if not self._rig.disk.mounted:
                print("no right to mount a file system: the disk is never full", file=sys.stderr)
                return
            fault = self._fill()
        else:
            choice = wait_until(lambda: self._rig.targets(victim), KEPT_WITHIN_S, f"there is a {victim} again")
            fault = self._deeds[kind](self._rng.choice(choice))
        self._rig.books.faults.append(fault)

    def pause(self, mean_s: float) -> None:
        """Let the system alone for a random while."""
        time.sleep(self._rng.uniform(0, 2 * mean_s))

    def _freeze(self, target: Target) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid, signal.SIGSTOP)
        wait_until(lambda: is_gone(target.pid) or is_stopped(target.pid), 5.0, "the process is stopped")

    def _kill(self, target: Target) -> Fault:
        """kill -9.  It is stopped first, so that what is in flight when it dies can be read.

        So is all that ends with it, and each process that could send that a call, until it has ended.
        """
        self._freeze(target)
        dependents = self._dependents(target)
        others = [each for each in self._rig.senders() if each not in (target, *dependents)] if dependents else []
        for each in (*dependents, *others):
            self._freeze(each)
        hit, at_s = self._rig.in_flight(target), now_s()
        os.kill(target.pid, signal.SIGKILL)
        self._thaw(dependents)

        def dependents_gone() -> bool:
            return all(is_gone(each.pid) for each in dependents)

        wait_until(lambda: dependents_gone() or now_s() > at_s + HELD_S, GONE_WITHIN_S, "no more calls can begin there")
        self._thaw(others)
        wait_until(dependents_gone, GONE_WITHIN_S, "what a killed one kept has ended")
        # A worker that ends with it may still begin a delivery, and a call of a function that it reaches by itself.
        begins_until_s = now_s() if any(each.victim == "worker" for each in dependents) else 0.0
        up_s = self._revive(target, at_s)
        return Fault("kill", target.victim, at_s, up_s, *hit, begins_until_s=begins_until_s)

    def _thaw(self, targets: Sequence[Target]) -> None:
        for each in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGCONT)

    def _dependents(self, target: Target) -> list[Target]:
        """Return what ends with a gateway, or with the one of its worker processes that keeps worker and functions."""
        if target.victim == "gateway":
            return list(self._rig.kept())
        return list(self._rig.kept(target.pid)) if target.victim == "gateway process" else []

    def _term(self, target: Target) -> Fault:
        """SIGTERM: it takes no longer than its drain limit, and justifies nothing."""
        at_s, limit_s = now_s(), TERM_LIMIT_S[target.victim] * crowding()
        os.kill(target.pid, signal.SIGTERM)
        wait_until(lambda: is_gone(target.pid), limit_s + GONE_WITHIN_S, f"the {target.victim} ended after SIGTERM")
        took_s = now_s() - at_s
        if took_s > limit_s:
            self.problems.append(f"SIGTERM of the {target.victim} took {took_s:.1f} s; its limit is {limit_s:g} s")
        if target.program is not None and (status := target.program.wait_exit()) != 0:
            self.problems.append(f"SIGTERM of the {target.victim}: exit status {status}")
        return Fault("term", target.victim, at_s, self._revive(target, at_s))

    def _stop(self, target: Target) -> Fault:
        """SIGSTOP, and SIGCONT later: a worker past its lease."""
        self._freeze(target)
        at_s, hit = now_s(), InFlight()
        if target.victim == "worker":  # it may have stopped with the queue's lock in its hands: all leases run out
            hit = self._rig.in_flight(replace(target, victim="gateway"))
        time.sleep(STOP_S[target.victim])
        os.kill(target.pid, signal.SIGCONT)
        return Fault("stop", target.victim, at_s, now_s(), *hit)

    def _revive(self, target: Target, at_s: float) -> float:
        """Return when the target was up again; `at_s` if a supervisor sees to that."""
        if target.program is None:
            wait_until(lambda: is_gone(target.pid), GONE_WITHIN_S, "the process has ended")
            return at_s
        target.program.wait_exit()
        start = self._rig.start_gateway if target.victim == "gateway" else self._rig.start_worker
        start()
        up_s = now_s()
        self._rig.retire(target.program)
        return up_s

    def _down(self) -> Fault:
        at_s = now_s()
        self._rig.station.close()
        time.sleep(OUTAGE_S)
        self._rig.station.open()
        return Fault("down", "receiver", at_s, now_s())

    def _fill(self) -> Fault:
        """No room for OUTAGE_S; what ran meanwhile may have to run again, as its outcome could not be kept."""
        gateway, at_s = Target("gateway", self._rig.gateway.pid), now_s()
        hit = self._rig.in_flight(gateway)
        self._rig.disk.fill()
        time.sleep(OUTAGE_S)
        self._rig.disk.empty()
        until_s = now_s()
        return Fault("full", "disk", at_s, until_s, *hit, spreads=True, begins_until_s=until_s)


# --------------------------------------------------------------------------------------------------------------------
# Load
# --------------------------------------------------------------------------------------------------------------------


def make_order(number: int, rng: random.Random) -> tuple[Order, bytes]:
    """Return a random order and the body that goes with it."""
    (function,) = rng.choices(list(SHARES), list(SHARES.values()))
    size_bytes = LARGE_BYTES if rng.random() < 0.03 else rng.randrange(2000)
    body = rng.randbytes(size_bytes)
    naming = rng.random()  # one in two brings an id, one in four a key, one in four nothing
    order = Order(
        number,
        function,
        rng.choice(STEPS[function]),
        rng.choice(CALLBACK_STEPS) if rng.random() < 0.4 else (),
        digest_of(body),
        call_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)) if naming < 0.5 else None,
        key=f"order {number}" if naming > 0.75 else None,
        delay_s=round(rng.uniform(0, 3), 3) if rng.random() < 0.1 else None,
        expires_s=round(rng.uniform(4, 6), 3) if rng.random() < 0.04 else None,
        attempts_limit=POISON_ATTEMPTS_COUNT if function == "poison" else MAX_ATTEMPTS_COUNT,
    )
    return order, body


def headers_of(order: Order, station: Station) -> dict[str, str]:
    """Return the header fields of a submission."""
    fields = {
        "X-Call-Id": order.call_id,
        "Idempotency-Key": order.key,
        "X-Delay": None if order.delay_s is None else f"{order.delay_s:.3f}s",
        "X-Expires": None if order.expires_s is None else f"{order.expires_s:.3f}s",
        "X-Callback-Url": f"{station.url}/callback/{'.'.join(order.callback)}" if order.callback else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def pause_s(rate: float) -> float:
    """Return a random time between two of `rate` events a second; not of the seed, as the machine decides how many."""
    return random.expovariate(rate)


class Load:
    """Callers who submit calls and note every answer, and one who cancels.  Use as a context manager."""

    def __init__(self, rig: Rig, rng: random.Random, rate: float) -> None:
        self._rig = rig
        self._rng = rng
        self._rate = rate
        self._number = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        callers = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS_COUNT)]
        self._threads = [*callers, threading.Thread(target=self._cancel, daemon=True)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            if thread.is_alive():
                raise AssertionError("a caller has had no answer, and not even an end of its patience")

    def _call(self) -> None:
        while not self._over.wait(pause_s(self._rate / CALLERS_COUNT)):
            with self._lock:
                self._number += 1
                order, body = make_order(self._number, self._rng)
            self._submit(order, body)

    def _submit(self, order: Order, body: bytes) -> None:
        """Send an order: again while no gateway answers, and one with a key until it is certain."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            answer = self._send(order, body)
            self._rig.books.answers.append(answer)
            certain = answer.status == 202 or not (answer.refused or order.key)
            if certain or time.monotonic() > end_s:
                return
            time.sleep(AGAIN_S)

    def _send(self, order: Order, body: bytes) -> Answer:
        path = f"/async-function/{order.function}/{'.'.join(order.steps)}"
        headers, sent_s = headers_of(order, self._rig.station), now_s()
        try:
            answer = http_request(self._rig.port, "POST", path, headers, body, timeout_s=PATIENCE_S)
        except ConnectionRefusedError:
            return Answer(order, sent_s, now_s(), refused=True)
        except (OSError, http.client.HTTPException):
            return Answer(order, sent_s, now_s())
        return Answer(order, sent_s, now_s(), answer.status, answer.headers.get("x-call-id"))

    def _cancel(self) -> None:
        while not self._over.wait(pause_s(self._rate / CANCEL_EVERY_COUNT)):
            recent = [answer.call_id for answer in self._rig.books.answers[-20:] if answer.status == 202]
            if recent and (call_id := random.choice(recent)):
                self._rig.books.cancels.append((call_id, self._delete(call_id)))

    def _delete(self, call_id: str) -> int | None:
        try:
            return http_request(self._rig.port, "DELETE", f"/async-function/{call_id}", timeout_s=PATIENCE_S).status
        except (OSError, http.client.HTTPException):
            return None


# --------------------------------------------------------------------------------------------------------------------
# The end
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it: broken promises, the ledger in Markdown, and what the programs logged of the calls concerned."""

    problems: Sequence[str]
    ledger: str
    kills: Counter[str]
    log: str


async def wait_drained(spool_path: Path) -> int:
    """Wait until every call and callback has ended; return how many calls there are.  AssertionError if they do not."""
    spool = await Spool.open(spool_path)
    try:
        end_s = time.monotonic() + DRAINED_WITHIN_S
        while True:
            stats = await spool.stats()
            left_count = stats.by_state.get(State.QUEUED, 0) + stats.by_state.get(State.RUNNING, 0)
            if not left_count and not stats.callback_pending_count:
                return sum(stats.by_state.values())
            if time.monotonic() > end_s:
                raise AssertionError(f"not drained within {DRAINED_WITHIN_S:g} s: {stats}")
            await asyncio.sleep(0.1)
    finally:
        await spool.close()


def find_calls(port: int, call_ids: Iterable[str]) -> dict[str, Found]:
    """Return what the gateway says of each call that it knows."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    found = {}
    for call_id in call_ids:
        answer = http_over(connection, "GET", f"/async-function/{call_id}")
        if answer.status == 404:
            continue
        status = json.loads(answer.body)
        result = http_over(connection, "GET", f"/async-function/{call_id}/result")
        found[call_id] = Found(
            status["state"],
            status["attempts"],
            status.get("status"),
            status.get("error"),
            status.get("callback", {}).get("state"),
            digest_of(result.body) if result.status == 200 else None,
        )
    connection.close()
    return found


def stop_all(rig: Rig) -> Iterator[str]:
    """End everything in order; yield what is wrong with how it ends, or with what is left."""
    for name, program in (("worker", rig.worker), ("gateway", rig.gateway)):
        program.terminate()
        if (status := program.wait_exit(TERM_LIMIT_S[name] + GONE_WITHIN_S)) != 0:
            yield f"the {name} ended with status {status}"
    try:
        wait_until(lambda: not processes_marked(rig.mark), GONE_WITHIN_S, "every process is gone")
    except AssertionError as error:
        yield str(error)
    with contextlib.closing(sqlite3.connect(rig.spool / DATABASE)) as db:
        (answer,) = db.execute("PRAGMA integrity_check").fetchone()
        if answer != "ok":
            yield f"PRAGMA integrity_check: {answer}"


def lines_about(programs: Iterable[Program], words: Sequence[str]) -> str:
    """Return what the programs logged with one of `words` in it."""
    lines = (line for program in programs for line in program.log_lines())
    return "\n".join(line for line in lines if any(word in line for word in words))


def settle(rig: Rig, saboteur: Saboteur) -> Verdict:
    """Wait until all is done, stop everything, and audit the books."""
    books = rig.books
    total_count = asyncio.run(wait_drained(rig.spool))
    found = find_calls(rig.port, [*books.accepted(), *books.doubtful()])
    problems = [*saboteur.problems, *stop_all(rig)]
    runs: dict[str, list[Run]] = parse_runs(rig.ledger.read_text(encoding="ascii"))
    problems += audit(books, runs, found, total_count)
    words = [problem.split()[0] for problem in problems[:5]]
    kills = Counter(fault.victim for fault in books.faults if fault.kind == "kill")
    return Verdict(problems, table(books, runs, found), kills, lines_about(rig.programs, words))


def run_chaos(
    directory: Path,
    seed: int,
    strikes: Iterable[Strike],
    rate: float,
    mean_pause_s: float = MEAN_PAUSE_S,
    workers_count: int = 1,
) -> Verdict:
    """Break things as `strikes` say, under a load of `rate` calls a second, and return what came of it."""
    with Rig(directory, Books(), workers_count) as rig:
        saboteur = Saboteur(rig, random.Random(seed))
        with Load(rig, random.Random(seed), rate):
            for kind, victim in strikes:
                saboteur.pause(mean_pause_s)
                saboteur.strike(kind, victim)
        return settle(rig, saboteur)


def main() -> int:
    parser = argparse.ArgumentParser(description="Break everything under load; see the module's docstring.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults are injected; default 10")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="default: a random one")
    parser.add_argument("--rate", type=float, default=30.0, help="calls a second; default 30")
    parser.add_argument("--workers", type=int, default=1, help="processes of the gateway; default 1")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background of a shell: nothing is to be left running
        signal.signal(number, signal.default_int_handler)
    plan = f"{options.minutes:g} minutes, {options.rate:g} calls a second, {options.workers} workers of the gateway"
    print(f"seed {options.seed}, {plan}", flush=True)
    deadline_s = time.monotonic() + 60 * options.minutes
    strikes = strikes_until(deadline_s, random.Random(options.seed), several=options.workers > 1)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as directory:
        verdict = run_chaos(Path(directory), options.seed, strikes, options.rate, workers_count=options.workers)
    print(f"\n{verdict.ledger}\n")
    for problem in verdict.problems:
        print(problem, file=sys.stderr)
    if verdict.problems:
        print(f"seed {options.seed}: {len(verdict.problems)} broken promises\n{verdict.log}", file=sys.stderr)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
