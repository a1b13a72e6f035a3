"""Nothing accepted is lost, whatever is killed, stopped, full or down: `bench.chaos` for a minute, and smaller ones.

The small ones say what the big ones found if both fail.  The audit itself is tried first: it must see what it is for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import random
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.faults import DECK, VICTIMS, deck
from bench.chaos.ledger import Answer, Books, Fault, Found, Order, Post, Run, audit, cuts, parse_runs, table
from bench.chaos.rig import Disk
from bench.chaos.run import Verdict, run_chaos
from bench.chaos.station import digest_of
from faashound.calls.model import Call, State
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.queue import Spool
from testkit.harness import http_request, wait_until
from testkit.spool_kit import LEASE_S, Desk
from testkit.system import Receiver, System, Worker

DAY_S = 86400.0
LARGE_BYTES = 100_000  # more than what the spool keeps in a row

# --------------------------------------------------------------------------------------------------------------------
# The audit
# --------------------------------------------------------------------------------------------------------------------

ORDER = Order(1, "work", ("500", "200"), callback=("200",), digest="d", call_id="a")
POISON = Order(2, "poison", ("500",), ("200",), "d", call_id="a", attempts_limit=2)
DONE = Found("done", 2, 200, None, "delivered", "d")
RUNS = (Run("a", 1.0, None), Run("a", 2.0, 2.5))
POST = Post("a", 3.0, 200, "200", "d")


@dataclasses.dataclass
class World:
    """Books in which everything is as it should be, to be spoilt."""

    order: Order = ORDER
    call: Found | None = DONE
    runs: tuple[Run, ...] = RUNS
    posts: tuple[Post, ...] = (POST,)
    faults: tuple[Fault, ...] = ()
    total_count: int = 1
    status: int | None = 202

    def problems(self) -> list[str]:
        answer = Answer(self.order, 0.0, 0.1, self.status, "a" if self.status else None)
        books = Books(answers=[answer], posts=list(self.posts), faults=list(self.faults))
        found = {"a": self.call} if self.call else {}
        runs = {"a": self.runs} if self.runs else {}
        assert table(books, runs, found)
        return audit(books, runs, found, self.total_count)


def changed(**changes: object) -> Found:
    return dataclasses.replace(DONE, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("world", "problem"),
    [
        pytest.param(World(call=None, total_count=0), "lost", id="lost"),
        pytest.param(World(total_count=2), "2 calls in the spool, 1 known", id="there-twice"),
        pytest.param(World(call=changed(state="running")), "ended as running", id="not-ended"),
        pytest.param(World(call=changed(state="cancelled", callback=None), posts=()), "cancelled", id="unasked-end"),
        pytest.param(World(call=changed(result="x")), "not what its function answered", id="wrong-result"),
        pytest.param(World(runs=()), "no run of it came to its end", id="never-ran"),
        pytest.param(
            World(order=POISON, call=changed(state="dead", attempts=2), runs=()), "never ran", id="dead-without-a-run"
        ),
        pytest.param(World(order=POISON, call=changed(state="dead", attempts=1)), "ended as dead", id="dead-too-early"),
        pytest.param(World(runs=(Run("a", 1.0, None),)), "no run of it came to its end", id="never-ended"),
        pytest.param(World(runs=(*RUNS, Run("a", 4.0, 4.1))), "ran 3 times", id="ran-again"),
        pytest.param(World(posts=()), "delivered 0 times", id="not-delivered"),
        pytest.param(World(posts=(POST, POST)), "delivered 2 times", id="delivered-again"),
        pytest.param(World(call=changed(callback="pending")), "its callback is pending", id="not-yet-delivered"),
        pytest.param(
            World(posts=(dataclasses.replace(POST, digest="x"),)), "what was delivered", id="delivered-something-else"
        ),
        pytest.param(World(status=None, call=None, total_count=0), "not in the spool", id="ran-from-nowhere"),
    ],
)
def test_audit_sees_a_broken_promise(world: World, problem: str) -> None:
    assert problem in "\n".join(world.problems())


KILL = Fault("kill", "worker", 2.2, 2.6, frozenset("a"), frozenset("a"))
FULL = Fault("full", "disk", 2.4, 3.4, spreads=True, begins_until_s=3.4)


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(World(), id="no-fault"),
        pytest.param(World(faults=(KILL,), runs=(*RUNS, Run("a", 4.0, 4.1)), posts=(POST, POST)), id="cut-by-a-kill"),
        pytest.param(
            World(faults=(FULL,), runs=(*RUNS, Run("a", 4.0, 4.1)), posts=(POST, POST)), id="outcome-on-a-full-disk"
        ),
        pytest.param(World(status=None), id="there-without-a-202"),
        pytest.param(
            World(order=POISON, call=changed(state="dead", status=503, result=None), runs=()), id="never-in-reach"
        ),
        pytest.param(World(status=None, call=None, runs=(), posts=(), total_count=0), id="not-there-without-a-202"),
    ],
)
def test_audit_accepts_what_was_promised(world: World) -> None:
    assert world.problems() == []


def test_runs_of_one_call_are_told_apart_by_process() -> None:
    runs = parse_runs("1.00 a 7 start\n1.50 a 8 start\n2.00 a 7 end\n")
    assert runs == {"a": [Run("a", 1.0, 2.0), Run("a", 1.5, None)]}
    assert cuts([FULL], "a", runs["a"]) == 1, "the one that had ended was kept in time"


def test_run_that_began_before_all_that_a_fault_ends_had_ended_is_cut_beside_the_one_that_was_in_flight() -> None:
    runs = [Run("a", 2.0, None), Run("a", 2.5, None), Run("a", 3.5, 3.6)]
    fault = Fault("kill", "gateway", 2.2, 2.6, frozenset("a"), begins_until_s=2.7)
    assert cuts([fault], "a", runs) == 2
    assert cuts([dataclasses.replace(fault, calls=frozenset())], "a", runs) == 1
    assert cuts([dataclasses.replace(fault, begins_until_s=0.0)], "a", runs) == 1


# --------------------------------------------------------------------------------------------------------------------
# Chaos
# --------------------------------------------------------------------------------------------------------------------


def check(verdict: Verdict, seed: int) -> None:
    """Fail, naming the seed, if a promise was broken."""
    print(f"seed {seed}\n{verdict.ledger}")
    assert not verdict.problems, f"seed {seed}:\n" + "\n".join([*verdict.problems, verdict.ledger, verdict.log])


@pytest.mark.parametrize("seed", [pytest.param(4, id="fixed"), pytest.param(None, id="random")])
def test_nothing_is_lost_when_everything_is_killed_stopped_down_or_full(tmp_path: Path, seed: int | None) -> None:
    seed = random.randrange(1 << 32) if seed is None else seed
    verdict = run_chaos(tmp_path, seed, deck(random.Random(seed)), rate=15, mean_pause_s=0.3)
    check(verdict, seed)
    assert verdict.kills == {victim: DECK["kill", victim] for victim in VICTIMS}


@pytest.mark.parametrize("victim", VICTIMS)
def test_sigterm_ends_in_time_loses_nothing_and_repeats_nothing(tmp_path: Path, victim: str) -> None:
    """The audit takes no SIGTERM for an excuse."""
    check(run_chaos(tmp_path, 5, [("term", victim)] * 2, rate=15), 5)


def test_worker_that_wakes_up_past_its_lease_overwrites_nothing_and_delivers_nothing() -> None:
    script = (
        b'echo run >>"$TMPDIR/$Http_X_Call_Id"\n'
        b'until [ -e "$TMPDIR/go" ]; do sleep 0.05; done\n'
        b'wc -l <"$TMPDIR/$Http_X_Call_Id"'
    )
    lease = {"ack_wait": "3s"}  # of the sleeper alone: the other's lasts, whatever time it gets
    with Receiver() as receiver, System(settings={"worker": "none"}) as system, Worker(system, lease) as sleeper:
        calls = [system.submit("shell", script, {"X-Callback-Url": receiver.url()}) for _ in range(6)]
        wait_until(lambda: all((system.temporary / call_id).exists() for call_id in calls), 15.0, "all run")
        sleeper.suspend()
        (system.temporary / "go").touch()
        with Worker(system):
            assert {system.ended(call_id)["attempts"] for call_id in calls} == {2}
            receiver.wait_for(len(calls))
            delivered = [system.until(call_id, is_delivered) for call_id in calls]
            sleeper.process.send_signal(signal.SIGCONT)
            for call_id in calls:
                wait_until(lambda: has_given_up(sleeper, call_id), 15.0, f"{call_id} is given up")  # noqa: B023
            assert [system.status(call_id) for call_id in calls] == delivered
            results = [system.request("GET", f"/async-function/{call_id}/result").text.strip() for call_id in calls]
        assert results == ["2"] * len(calls)
        assert [got.body.strip() for got in receiver.received()] == [b"2"] * len(calls)


def is_delivered(status: dict[str, Any]) -> bool:
    return bool(status.get("callback", {}).get("state") == "delivered")


def has_given_up(worker: Worker, call_id: str) -> bool:
    return any("the lease was lost" in line and call_id in line for line in worker.log_lines())


# --------------------------------------------------------------------------------------------------------------------
# kill -9 of the gateway
# --------------------------------------------------------------------------------------------------------------------


class Callers:
    """Several callers who submit as fast as they can until the gateway is gone.  `accepted`: id to digest."""

    COUNT = 8

    def __init__(self, port: int) -> None:
        self.accepted: dict[str, str] = {}
        self.unanswered_count = 0
        self._port = port
        self._pool = ThreadPoolExecutor(self.COUNT)
        self._calls = [self._pool.submit(self._submit) for _ in range(self.COUNT)]

    def _submit(self) -> None:
        while True:
            body = random.randbytes(random.choice((10, 1000, LARGE_BYTES)))
            try:
                answer = http_request(self._port, "POST", "/async-function/cat", {}, body)
            except (OSError, http.client.HTTPException):
                self.unanswered_count += 1
                return
            assert answer.status == 202, answer
            self.accepted[answer.headers["x-call-id"]] = digest_of(body)

    def wait(self) -> None:
        """Wait until all have noticed."""
        self._pool.shutdown()
        for call in self._calls:
            call.result()


async def read_spool(path: Path) -> dict[str, str]:
    """Return the digest of the body of every call in a spool, by id."""
    spool = await Spool.open(path)
    try:
        calls: list[Call] = []
        while page := await spool.calls(limit=1000, before=calls[-1].id if calls else None):
            calls += page
        return {call.id: digest_of(await body_of(spool, call.id)) for call in calls}
    finally:
        await spool.close()


async def body_of(spool: Spool, call_id: str) -> bytes:
    call = await spool.get(call_id)
    assert call is not None
    return b"".join([chunk async for chunk in spool.open_body(call.body)])


def test_every_call_that_got_a_202_is_there_whole_and_once_when_the_gateway_is_killed(tmp_path: Path) -> None:
    accepted: dict[str, str] = {}
    unanswered_count = 0
    for _ in range(5):
        with System(settings={"worker": "none"}, spool=tmp_path / "spool") as system:
            callers = Callers(system.port)
            enough = random.randrange(100)
            wait_until(lambda: len(callers.accepted) >= enough, 30.0, f"{enough} calls accepted")  # noqa: B023
            system.kill()
            callers.wait()
            wait_until(lambda: not system.survivors(), 10.0, "its functions are gone too")
        accepted |= callers.accepted
        unanswered_count += callers.unanswered_count
    found = asyncio.run(read_spool(tmp_path / "spool"))
    assert {call_id: found.get(call_id) for call_id in accepted} == accepted
    assert len(found) <= len(accepted) + unanswered_count
    db = sqlite3.connect(tmp_path / "spool" / DATABASE)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


# --------------------------------------------------------------------------------------------------------------------
# A full disk
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A file system of 4 MiB."""
    disk = Disk(tmp_path / "disk", size_bytes=4 << 20)
    if not disk.mounted:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    disk.unmount()


def test_calls_that_fill_the_disk_are_refused_with_507_and_taken_again_when_there_is_room(disk: Disk) -> None:
    accepted: dict[str, bytes] = {}
    with System(settings={"worker": "none"}, spool=disk.place / "spool") as system:

        def submit() -> int:
            body = random.randbytes(random.choice((1000, 30_000, LARGE_BYTES)))
            answer = system.request("POST", "/async-function/cat", body)
            if answer.status == 202:
                accepted[answer.headers["x-call-id"]] = body
            else:
                assert answer.text.strip(), "a refusal says why"
            return answer.status

        statuses = [submit() for _ in range(200)]
        assert set(statuses) == {202, 507}
        count = len(accepted)
        disk.resize(64 << 20)
        assert submit() == 202
        with Worker(system):
            for call_id, body in accepted.items():
                assert system.ended(call_id)["state"] == "done"
                assert system.request("GET", f"/async-function/{call_id}/result").body == body
        assert len(accepted) == count + 1
    stats = asyncio.run(count_states(disk.place / "spool"))
    assert stats == {State.DONE: len(accepted)}, "and what was refused is not there"


async def count_states(path: Path) -> dict[State, int]:
    spool = await Spool.open(path)
    try:
        return {state: count for state, count in (await spool.stats()).by_state.items() if count}
    finally:
        await spool.close()


# --------------------------------------------------------------------------------------------------------------------
# A wall clock that jumps
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "spool")
    yield desk
    desk.close()


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["forward", "back"])
def test_lease_lasts_and_ends_as_before_when_the_wall_clock_jumps(desk: Desk, jump_s: float) -> None:
    desk.put(callback_url="http://caller/")
    lease = desk.claim_one()
    desk.clock.now_s += jump_s
    assert desk.do(desk.spool.reclaim()) == 0
    assert desk.do(desk.spool.renew([lease], LEASE_S)).lost == frozenset()
    desk.finish(lease)
    assert desk.claim() == []
    delivery = desk.claim_callback()
    desk.clock.now_s -= 2 * jump_s
    assert desk.do(desk.spool.reclaim()) == 0
    desk.do(desk.spool.callback_done(delivery, desk.attempt()))
    assert desk.get(lease.call.id).state is State.DONE


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S], ids=["forward", "back"])
def test_call_that_is_due_runs_when_the_wall_clock_jumps(desk: Desk, jump_s: float) -> None:
    call = desk.put()
    desk.clock.now_s += jump_s
    assert [lease.call.id for lease in desk.claim()] == [call.id]
