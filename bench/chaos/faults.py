"""What is done to the system in a chaos run, in which order, and what was in flight when it was done."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.chaos.ledger import Fault
from bench.chaos.rig import DRAIN_TIMEOUT_S, GONE_WITHIN_S, LEASE_S, UPSTREAM_TIMEOUT_S, InFlight, Rig, Target
from bench.chaos.station import now_s
from testkit.harness import crowding, wait_until
from testkit.inspection import state_of

TERM_LIMIT_S = {"gateway": DRAIN_TIMEOUT_S + UPSTREAM_TIMEOUT_S, "worker": DRAIN_TIMEOUT_S, "watchdog": 6.0}
STOP_S = {"gateway": 1.0, "gateway process": 1.0, "worker": 1.5 * LEASE_S, "watchdog": 1.0}
NO_TIME_S = 5.0  # that the machine may not give to a process
HELD_S = 1.0  # for others than those that end: one may have stopped with the queue's lock, which these want to end
OUTAGE_S = 1.5  # of receiver and disk
KEPT_WITHIN_S = 40.0  # what dies often is started again after up to 30 s

Strike = tuple[str, str]  # kind, victim
VICTIMS = ("gateway", "worker", "watchdog")
DECK: Counter[Strike] = Counter(
    {("kill", victim): 10 for victim in VICTIMS}
    | {("term", victim): 1 for victim in VICTIMS}
    | {("stop", victim): 1 for victim in VICTIMS}
    | {("down", "receiver"): 1, ("full", "disk"): 1}
)
PROCESSES_DECK: Counter[Strike] = Counter({("kill", "gateway process"): 10, ("stop", "gateway process"): 1})


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
        wait_until(lambda: is_gone(target.pid) or state_of(target.pid) == "T", 15.0, "the process is stopped")

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
        at_s, limit_s = now_s(), (TERM_LIMIT_S[target.victim] + NO_TIME_S) * crowding()
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
