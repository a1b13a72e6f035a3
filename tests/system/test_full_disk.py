"""A whole system whose queue fills its disk, or the part of it that a function may have: as its callers see it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.disks import fill
from testkit.harness import free_port, wait_until
from testkit.system import System

FUNCTIONS = """
[cat]
fprocess = "cat"

[counted]  # a line in a file for each run, and an answer that is longer than what is left of the disk
fprocess = "sh -c 'echo run >> $TMPDIR/runs; head -c 700000 /dev/zero'"
"""
QUEUED_BYTES = 100_000


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    limits = {"max_delay": "1h", "max_queued": "3", "max_queued_bytes": str(QUEUED_BYTES), "max_result": "1000"}
    with System(FUNCTIONS, limits) as system:
        yield system


def test_gateway_refuses_a_delay_that_is_longer_than_max_delay(system: System) -> None:
    answer = system.request("POST", "/async-function/cat", b"", {"X-Delay": "61m"})
    assert answer.status == 400
    assert "X-Delay" in answer.text
    assert "1h" in answer.text
    assert "max_delay" in answer.text


def test_gateway_refuses_calls_and_bytes_beyond_what_a_function_may_have_waiting(system: System) -> None:
    for _ in range(3):
        system.submit("cat", b"", {"X-Delay": "1h"})
    answer = system.request("POST", "/async-function/cat", b"", {"X-Delay": "1h"})
    assert (answer.status, "max_queued allows 3" in answer.text) == (429, True)
    answer = system.request("POST", "/async-function/counted", bytes(QUEUED_BYTES + 1), {"X-Delay": "1h"})
    assert (answer.status, "max_queued_bytes allows 100000" in answer.text) == (507, True)
    assert json.loads(system.request("POST", "/system/calls/cancel").body) == {"cancelled": 3}
    assert list((system.spool / "bodies").iterdir()) == []
    system.submit("cat")


def test_call_is_a_dead_letter_after_one_run_when_its_answer_is_longer_than_max_result(system: System) -> None:
    (system.temporary / "runs").unlink(missing_ok=True)
    ended = system.ended(system.submit("counted"))
    assert (ended["state"], ended["attempts"]) == ("dead", 1)
    assert "max_result" in ended["error"]
    assert (system.temporary / "runs").read_text() == "run\n"


def test_dead_letter_goes_with_a_line_and_a_count_when_keep_dead_is_over() -> None:
    settings = {"keep_dead": "4s", "keep_results": "1s", "retention": "5s", "metrics_port": str(free_port())}
    with System(settings=settings | {"max_retry_attempts": "1"}) as system:
        dead = system.submit("shell", b"exit 1")
        assert system.ended(dead)["state"] == "dead"
        wait_until(lambda: system.request("GET", f"/async-function/{dead}").status == 404, 20, "the letter is gone")
        assert dead in system.wait_log("a dead letter was dropped: keep_dead is over")
        wait_until(lambda: "gateway_queue_dropped_letters_total 1.0" in system.metrics(), 5, "it is counted")


def test_system_drains_a_full_disk_and_runs_no_function_twice(small_disk: Path) -> None:
    with System(
        FUNCTIONS, {"keep_results": "10s", "retention": "10s", "metrics_port": str(free_port())}, small_disk / "spool"
    ) as system:
        wait_until(lambda: system.request("GET", "/healthz").status == 200, 10, "the gateway is well")
        ballast = fill(small_disk)
        os.truncate(ballast, ballast.stat().st_size - (400 << 10))
        call_id = system.submit("counted")
        system.wait_log("a result waits")
        body = os.urandom(50_000)

        def health_when_full() -> bool:
            """Tell whether it says so: a sweep in between gives back some room, and then the disk is not full."""
            for shorter in (body, body[:100]):
                while system.request("POST", "/async-function/cat", shorter, {"X-Delay": "1h"}).status != 507:
                    pass
            health = system.request("GET", "/healthz")
            return (health.status, "disk is full" in health.text) == (503, True)

        wait_until(health_when_full, 15, "health tells of the full disk")
        assert "gateway_queue_free_bytes" in system.metrics()
        assert system.status(call_id)["state"] == "running"
        assert system.request("POST", "/system/calls/cancel").status == 200
        ballast.unlink()
        ended = system.ended(call_id)
        assert (ended["state"], ended["attempts"], ended["result_bytes"]) == ("done", 1, 700_000)
        assert (system.temporary / "runs").read_text() == "run\n"
        wait_until(lambda: system.request("GET", "/healthz").status == 200, 20, "the gateway is well again")
        system.submit("cat", body)
