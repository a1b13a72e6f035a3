"""What becomes of calls when workers share them, end, are killed, or cannot reach gateway, queue or disk."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from faashound.calls.callbacks import CallbackRefused, build_policy
from faashound.calls.model import INLINE_BYTES, Attempt, QueueDamaged, QueueFull, QueueUnavailable, State
from faashound.calls.retries import AttemptOutcome, Dead, Done, OutcomeKind, Progress, RetryPolicy, next_step
from faashound.draining.caller import Caller, CallLimits
from faashound.draining.connections import Connections
from faashound.draining.gateway_access import GatewayAccess
from faashound.draining.in_flight import EarlyEnd, InFlightTable
from faashound.draining.known_functions import KnownAddress, KnownFunctions
from faashound.draining.metrics import InvocationCounters
from faashound.draining.outcomes import REFUSED_TEXT, log_call_step, log_callback_step, outcome_of_error
from faashound.draining.shares import Slots
from faashound.queues.spool.queue import Spool
from faashound.watchdog import OutOfResources, PeerGone, Unreachable, UpstreamTimeout, log, parse_url
from testkit.harness import SOON_S, Program, eventually, free_port, run, wait_until
from testkit.queue_kit import QUEUE, accepted, finish, inline, new_call
from testkit.system import (
    NOTES_RUN,
    Received,
    Receiver,
    System,
    Worker,
    rows,
    runs,
)
from tests.functions.kit import few_descriptors

# Several workers, and faults


def test_several_workers_run_each_call_once() -> None:
    with System(settings={"worker": "none"}) as system:
        calls = [system.submit("shell", NOTES_RUN) for _ in range(60)]
        with Worker(system, {"max_inflight": "3"}), Worker(system, {"max_inflight": "3"}):
            assert {system.ended(call_id)["state"] for call_id in calls} == {"done"}
        owners = rows(system.spool, "SELECT count(*) AS n FROM attempts")
        assert sorted(runs(system)) == sorted(calls)
        assert owners[0]["n"] == len(calls)


def test_sigterm_lets_what_runs_finish_and_claims_nothing_more() -> None:
    with System(settings={"worker": "none"}) as system:
        running = system.submit("shell", b'until [ -e "$TMPDIR/go" ]; do sleep 0.02; done')
        with Worker(system, {"max_inflight": "1"}) as worker:
            system.until(running, lambda status: status["state"] == "running")
            waiting = system.submit("cat")
            worker.terminate()
            worker.wait_log("draining: 1 at work")
            (system.temporary / "go").touch()
            assert worker.wait_exit() == 0
        assert system.status(running)["state"] == "done"
        assert system.status(waiting)["state"] == "queued"


def test_worker_hands_back_what_does_not_finish_in_time_and_another_runs_it() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("shell", b'[ -e "$TMPDIR/go" ] || sleep 60; echo done')
        with Worker(system, {"drain_timeout": "200ms"}) as worker:
            system.wait_started(2)
            worker.terminate()
            assert worker.wait_exit() == 0
            assert "drain_timeout is over: 1 at work are cut, and go back into the queue" in worker.log()
        status = system.status(call_id)
        assert (status["state"], status["attempts"]) == ("queued", 0)
        system.wait_idle()
        (system.temporary / "go").touch()
        with Worker(system):
            assert system.ended(call_id)["state"] == "done"


def test_idle_worker_stops_at_once() -> None:
    with System(settings={"worker": "none"}) as system, Worker(system) as worker:
        started_s = time.monotonic()
        worker.terminate()
        assert worker.wait_exit() == 0
        assert time.monotonic() - started_s < 25, "neither for drain_timeout nor for the next look"


def test_call_that_kills_each_worker_ends_as_a_dead_letter_and_blocks_no_other() -> None:
    with System(settings={"max_retry_attempts": "1"}) as system:
        poison = system.submit("shell", b"exec sleep 60")
        for begun in range(1, 5):
            system.until(poison, partial(has_begun, begun), 30)
            os.kill(system.worker_pid(), signal.SIGKILL)
        assert system.ended(system.submit("cat", b"hello"))["state"] == "done"
        ended = system.ended(poison)
        assert (ended["state"], ended["attempts"]) == ("dead", 5)
        assert "the workers that ran it died" in ended["error"]


def test_what_has_failed_more_often_than_is_allowed_by_now_is_tried_once_more(tmp_path: Path) -> None:
    failed = Attempt(1.0, 2.0, 500, "status 500")

    async def fail_often(callback_url: str) -> tuple[str, str]:
        """A call that has failed six times, and one whose callback has."""
        queue = await Spool.open(tmp_path / "spool")
        owner = await queue.enlist()
        owed = await queue.put(new_call("cat", callback_url=callback_url))
        (lease,) = await queue.claim([QUEUE], owner, 60, 1)
        await finish(queue, lease, State.DONE, None)
        call = await queue.put(new_call("cat", body=inline(b"hello")))
        for _ in range(6):
            (lease,) = await queue.claim([QUEUE], owner, 60, 1)
            await queue.retry(lease, attempt=failed, due_s=3.0)
            (lease,) = await queue.claim_callbacks([QUEUE], owner, 60, 1)
            await queue.callback_retry(lease, failed, due_s=3.0)
        await queue.close()
        return call.id, owed.id

    with Receiver() as receiver:
        call_id, owed_id = asyncio.run(fail_often(receiver.url()))
        settings = {"max_retry_attempts": "1", "callback_retry_attempts": "1"}
        with System(settings=settings, spool=tmp_path / "spool") as system:
            status = system.ended(call_id)
            assert (status["state"], status["attempts"]) == ("done", 7)
            assert [got.headers["x-call-id"] for got in receiver.wait_for(1)] == [owed_id]


def test_put_that_the_queue_does_not_take_is_503_in_bounded_time() -> None:
    with System(settings={"worker": "none"}) as system:  # whose writes would wait for the same lock, before the put
        system.submit("cat", b"x")  # what the gateway writes at its start comes before this
        with (system.spool / "writer.lock").open("rb") as held:  # as by a process that was stopped in mid-write
            fcntl.flock(held, fcntl.LOCK_EX)
            stuck = system.request("POST", "/async-function/cat", b"x")
        assert stuck.status == 503
        assert f"held for 8 s by process {os.getpid()}" in stuck.text
        call_id = system.submit("cat", b"y")
        with Worker(system, {}):
            assert system.ended(call_id)["state"] == "done"


def test_call_of_a_killed_worker_is_taken_over_and_told_of() -> None:
    with System() as system:
        call_id = system.submit("shell", NOTES_RUN + b'[ -e "$TMPDIR/go" ] || sleep 60')
        system.wait_started(2)
        (system.temporary / "go").touch()
        os.kill(system.worker_pid(), signal.SIGKILL)
        system.wait_log("the worker was ended by SIGKILL")
        status = system.ended(call_id)
        assert (status["state"], status["attempts"]) == ("done", 2)
        whole = json.loads(system.request("GET", f"/system/calls/{call_id}").body)
        assert [attempt.get("error") for attempt in whole["history"]] == ["the worker that ran it is gone", None]


def has_begun(count: int, status: dict[str, Any]) -> bool:
    """Tell whether a call's run number `count` is under way."""
    return (status["state"], status["attempts"]) == ("running", count)


def test_suspended_worker_does_not_overwrite_what_its_successor_recorded() -> None:
    script = NOTES_RUN + b'until [ -e "$TMPDIR/go" ]; do sleep 0.02; done; wc -l <"$TMPDIR/runs"'
    with System(settings={"worker": "none"}) as system, Worker(system, {"ack_wait": "3s"}) as first:
        call_id = system.submit("shell", script)
        wait_until(lambda: runs(system), 15, "it runs")
        first.suspend()
        (system.temporary / "go").touch()
        with Worker(system):
            status = system.ended(call_id)
            assert (status["state"], status["attempts"]) == ("done", 2)
            first.process.send_signal(signal.SIGCONT)
            first.wait_log("the lease was lost")
            assert system.request("GET", f"/async-function/{call_id}/result").text.strip() == "2"
            assert system.status(call_id) == status


def test_worker_that_slept_past_its_own_lease_ends_the_earlier_run() -> None:
    script = NOTES_RUN + b'[ "$(wc -l <"$TMPDIR/runs")" -gt 1 ] || sleep 60; echo second'
    with System(settings={"worker": "none"}) as system, Worker(system, {"ack_wait": "3s"}) as worker:
        call_id = system.submit("shell", script)
        system.wait_started(2)
        worker.suspend()
        until_s = rows(system.spool, "SELECT until_s FROM leases")[0]["until_s"]
        wait_until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > until_s, 15, "the lease has run out")
        run("worker", ["dead", "list"], {"queue_url": f"spool:{system.spool}"})  # opening takes back
        assert rows(system.spool, "SELECT * FROM leases") == []
        worker.process.send_signal(signal.SIGCONT)
        assert system.ended(call_id)["state"] == "done"
        assert system.request("GET", f"/async-function/{call_id}/result").text == "second\n"
        system.wait_idle()


def test_worker_that_stood_still_past_its_lease_keeps_what_no_other_has_taken() -> None:
    script = NOTES_RUN + b'until [ -e "$TMPDIR/go" ]; do sleep 0.02; done'
    lease = {"ack_wait": "6s"}
    with System(settings={"worker": "none"}) as system, Worker(system, lease | {"max_inflight": "1"}) as other:
        theirs = system.submit("shell", script)
        system.wait_started(2)
        with Worker(system, lease | {"max_inflight": "2"}) as worker:
            ours = system.submit("shell", script)
            wait_until(lambda: runs(system) == [theirs, ours], 15, "both run")
            other.suspend()
            worker.suspend()
            until_s = max(row["until_s"] for row in rows(system.spool, "SELECT until_s FROM leases"))
            wait_until(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > until_s, 15, "the leases have run out")
            worker.process.send_signal(signal.SIGCONT)
            wait_until(lambda: runs(system)[2:], 15, "it takes the call of the one that still stands")
            (system.temporary / "go").touch()
            assert [system.ended(call_id)["attempts"] for call_id in (theirs, ours)] == [2, 1]
        other.process.send_signal(signal.SIGCONT)


def test_worker_waits_for_a_gateway_that_is_not_there_yet() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("cat")
        port = free_port()
        settings = {"gateway_url": f"http://127.0.0.1:{port}", "max_retry_attempts": "1"}
        with Worker(system, settings) as worker:
            worker.wait_log("handed back")
            successor = System(settings={"worker": "none", "port": str(port)}, spool=system.spool)
            with successor:
                status = successor.ended(call_id)
                assert (status["state"], status["attempts"]) == ("done", 1)


def test_outcome_is_recorded_when_the_queue_comes_back_and_the_call_does_not_run_again() -> None:
    with System() as system:
        call_id = system.submit("shell", NOTES_RUN + b'until [ -e "$TMPDIR/go" ]; do sleep 0.05; done; echo done')
        system.until(call_id, lambda status: status["state"] == "running")
        wait_until(lambda: runs(system), 15, "it runs")
        path = system.spool / "spool.sqlite3"
        path.rename(system.spool / "away")
        (system.temporary / "go").touch()
        system.wait_log("the outcome cannot be recorded yet")
        (system.spool / "away").rename(path)
        wait_for_end_of(system, "the outcome cannot be recorded yet")
        status = system.ended(call_id)
        assert (status["state"], status["attempts"], runs(system)) == ("done", 1, [call_id])


def test_worker_tells_that_the_queue_can_be_asked_for_work_again() -> None:
    with System(settings={"worker": "none"}) as system, Worker(system, {"ack_wait": "1s"}) as worker:
        path = system.spool / "spool.sqlite3"
        path.rename(system.spool / "away")
        worker.wait_log("the queue cannot be asked for work")
        (system.spool / "away").rename(path)
        wait_for_end_of(worker, "the queue cannot be asked for work")


def wait_for_end_of(program: Program, text: str) -> None:
    """Wait until the log tells that a trouble is over."""
    wait_until(
        lambda: any(text in line and ": over" in line for line in program.log_lines()), SOON_S, f"the end of {text!r}"
    )


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_full_disk_is_507_and_is_noticed_when_there_is_room_again(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)  # needs root, as in CI
    try:
        with System(spool=tmp_path / "spool") as system:
            fill(tmp_path / "filler")
            answers = [system.request("POST", "/async-function/cat", b"x" * 70_000) for _ in range(3)]
            assert {answer.status for answer in answers} == {507}
            (tmp_path / "filler").unlink()
            assert system.ended(system.submit("cat", b"x" * 70_000))["state"] == "done"
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("size", [10, 200_000], ids=["no connection can be opened", "no body can be read"])
def test_call_uses_up_no_attempt_when_its_worker_has_no_descriptors(size: int) -> None:
    with System(settings={"worker": "none"}) as system, Worker(system, {"max_retry_attempts": "1"}) as worker:
        pid = worker.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        if size > 10:  # a kept connection: only the body is in want of a descriptor
            system.ended(system.submit("cat"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
        call_id = system.submit("cat", b"x" * size)
        assert "Too many open files" in worker.wait_log("handed back")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        status = system.ended(call_id)
        assert (status["state"], status["status"], status["attempts"]) == ("done", 200, 1)


def test_results_and_calls_are_kept_as_long_as_asked_and_dead_letters_longer() -> None:
    with System(settings={"keep_results": "4s", "retention": "9s", "max_retry_attempts": "1"}) as system:
        done, dead = system.submit("cat", b"x"), system.submit("shell", b"exit 1")
        system.ended(done)
        assert system.ended(dead)["state"] == "dead"

        def result_status(call_id: str) -> int:
            return system.request("GET", f"/async-function/{call_id}/result").status

        assert result_status(done) == 200
        wait_until(lambda: result_status(done) == 410, 20, "the result is gone")
        assert system.status(done)["state"] == "done"
        wait_until(lambda: result_status(done) == 404, 25, "the call is forgotten")
        assert (system.status(dead)["state"], result_status(dead)) == ("dead", 410)


def test_answer_that_cannot_be_stored_does_not_have_its_function_run_again(tmp_path: Path) -> None:
    has_come, is_closed = threading.Event(), threading.Event()

    def answer_when_the_queue_is_closed(_: Received) -> tuple[int, dict[str, str], bytes]:
        has_come.set()
        assert is_closed.wait(60)
        return 200, {}, bytes(2 * INLINE_BYTES)

    async def attempt(url: str) -> AttemptOutcome:
        queue, connections = await Spool.open(tmp_path / "spool"), Connections(build_policy([]))
        await queue.put(new_call())
        (lease,) = await queue.claim([QUEUE], await queue.enlist(), 60.0, 1)
        gateway = GatewayAccess(parse_url("http://127.0.0.1:9"), queue.token)
        functions = KnownFunctions(connections.to_functions, gateway, RetryPolicy(), direct=True)
        counters = InvocationCounters(CollectorRegistry())
        caller = Caller(queue, connections, functions, CallLimits(0.0, 1 << 20), counters)
        attempted = asyncio.create_task(caller.attempt(lease.call, KnownAddress(parse_url(url))))
        assert await asyncio.to_thread(has_come.wait, 60)
        await queue.close()
        is_closed.set()
        outcome = await attempted
        await connections.close()
        return outcome

    with Receiver(answer_when_the_queue_is_closed) as receiver:
        outcome = asyncio.run(attempt(receiver.url()))
    assert (outcome.kind, outcome.error) == (
        OutcomeKind.UNSTORED,
        "the answer could not be stored: the queue is closed",
    )
    assert isinstance(next_step(Progress(1), RetryPolicy(), outcome, time.time(), lambda: 0.5), Dead)


def test_attempt_is_no_invocation_when_its_body_could_not_be_opened(tmp_path: Path) -> None:
    registry = CollectorRegistry()

    async def attempt() -> AttemptOutcome:
        queue, connections = await Spool.open(tmp_path / "spool"), Connections(build_policy([]))
        call = await queue.put(new_call(body=await queue.store_body(bytes(2 * INLINE_BYTES))))
        gateway = GatewayAccess(parse_url("http://127.0.0.1:9"), queue.token)
        functions = KnownFunctions(connections.to_functions, gateway, RetryPolicy(), direct=True)
        caller = Caller(queue, connections, functions, CallLimits(0.0, 1 << 20), InvocationCounters(registry))
        with few_descriptors(0):
            outcome = await caller.attempt(accepted(call), KnownAddress(parse_url("http://127.0.0.1:9")))
        await connections.close()
        await queue.close()
        return outcome

    assert asyncio.run(attempt()).kind is OutcomeKind.PREVENTED
    assert [sample for metric in registry.collect() for sample in metric.samples] == []


def test_lease_that_was_given_up_is_not_told_to_be_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> EarlyEnd | None:
        queue = await Spool.open(tmp_path / "spool")
        await queue.put(new_call())
        owner = await queue.enlist()
        (lease,) = await queue.claim([QUEUE], owner, 60.0, 1)
        table = InFlightTable(queue, owner, {"call": Slots(1), "callback": Slots(1)})
        entry = table.add(lease)
        table.end_all()
        await queue.release(lease)
        assert await table.renew_if_due(60.0, 0.0)
        await queue.close()
        return entry.ended_by

    assert asyncio.run(scenario()) is EarlyEnd.DRAINED
    log.flush()
    assert "the lease was lost" not in capfd.readouterr().err


def test_renewal_that_fails_is_told_once_while_it_lasts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> list[bool]:
        queue = await Spool.open(tmp_path / "spool")
        await queue.put(new_call())
        owner = await queue.enlist()
        (lease,) = await queue.claim([QUEUE], owner, 60.0, 1)
        table = InFlightTable(queue, owner, {"call": Slots(1), "callback": Slots(1)})
        table.add(lease)
        renewed = [await table.renew_if_due(60.0, 0.0)]
        await queue.close()
        return renewed + [await table.renew_if_due(60.0, 0.0) for _ in range(3)]

    assert asyncio.run(scenario()) == [True, False, False, False]
    log.flush()
    assert capfd.readouterr().err.count("leases could not be renewed: the queue is closed") == 1


def test_cancellations_that_cannot_be_read_are_told_once_while_it_lasts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class CountingSpool(Spool):
        """A spool that counts how often it was asked which calls are cancelled."""

        looks_count = 0

        async def cancelled_ids(self, owner: str) -> frozenset[str]:
            self.looks_count += 1
            return await super().cancelled_ids(owner)

    async def scenario() -> None:
        queue = await CountingSpool.open(tmp_path / "spool")
        assert isinstance(queue, CountingSpool)
        table = InFlightTable(queue, await queue.enlist(), {"call": Slots(1), "callback": Slots(1)})
        await queue.close()
        watching = asyncio.create_task(table.watch_cancels(0.001))

        async def has_looked() -> bool:
            return queue.looks_count > 4

        await eventually(has_looked, SOON_S, "it looks again and again")
        watching.cancel()

    asyncio.run(scenario())
    log.flush()
    assert capfd.readouterr().err.count("cancellations could not be read: the queue is closed") == 1


def test_line_of_a_call_has_no_part_of_its_answer_in_json(capfd: pytest.CaptureFixture[str]) -> None:
    call = new_call()
    answer = AttemptOutcome(OutcomeKind.ANSWERED, 200, body=inline(b"secret"), headers=(("Set-Cookie", "secret"),))
    log.configure("json", None)
    try:
        log_call_step(accepted(call), Done(200), answer)
        log_callback_step(accepted(call), Done(200), answer)
        log.flush()
    finally:
        log.configure("text", None)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["outcome"] for line in lines] == ["status 200", "status 200"]
    assert "secret" not in str(lines)


OUTCOMES = {
    "timed out": (UpstreamTimeout("late"), OutcomeKind.TIMED_OUT, "late"),
    "cannot connect": (Unreachable("refused"), OutcomeKind.UNREACHABLE, "refused"),
    "cut short": (PeerGone("cut"), OutcomeKind.UNREACHABLE, "cut"),
    "no descriptors for a connection": (OutOfResources("too many"), OutcomeKind.PREVENTED, "too many"),
    "no descriptors for a body": (QueueUnavailable("too many"), OutcomeKind.PREVENTED, "too many"),
    "no room": (QueueFull("full"), OutcomeKind.PREVENTED, "full"),
    "lost": (QueueDamaged("gone"), OutcomeKind.UNREADABLE, "gone"),
    "an inner address": (CallbackRefused("10.0.0.1 is private"), OutcomeKind.REFUSED, REFUSED_TEXT),
    "a fault": (ValueError("secret"), OutcomeKind.FAILED, "a fault of the worker: see its log"),
}


@pytest.mark.parametrize(("error", "kind", "text"), OUTCOMES.values(), ids=OUTCOMES)
def test_attempt_that_raises_has_an_outcome(error: Exception, kind: OutcomeKind, text: str) -> None:
    assert outcome_of_error(error, "id") == AttemptOutcome(kind, error=text)
