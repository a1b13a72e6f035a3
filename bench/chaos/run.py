"""A chaos run from its first call to its verdict.

    verdict = run_chaos(directory, seed, strikes_until(deadline_s, random.Random(seed)), rate=30)
    verdict.problems        # a line for each broken promise

What comes of it is judged by ledger.py; the same seed breaks the same things in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chaos.callers import PATIENCE_S, Load
from bench.chaos.faults import TERM_LIMIT_S, Saboteur, Strike
from bench.chaos.ledger import Books, Found, Run, audit, parse_runs, table
from bench.chaos.rig import GONE_WITHIN_S, Rig
from bench.chaos.station import digest_of
from faashound.calls.model import State
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.queue import Spool
from testkit.harness import Program, http_over, processes_marked, wait_until

MEAN_PAUSE_S = 1.0  # between two faults
DRAINED_WITHIN_S = 180.0  # a callback that failed twice waits 20 s, one that failed three times 80 s


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
