"""The programs as an operator runs them, on NATS: two gateways and two workers, of which some are killed."""

from __future__ import annotations

import json
import signal
import uuid
from collections import Counter
from collections.abc import Iterator

import pytest

from testkit.harness import Program, wait_until
from testkit.nats_servers import Cluster
from testkit.system import FUNCTIONS, WORKER_READY, System

LEASE = "6s"
CALLS = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def nats(server: Cluster) -> dict[str, str]:
    """Settings of a queue of its own."""
    return {
        "queue_url": server.servers[0].url,
        "nats_prefix": f"t{uuid.uuid4().hex[:12]}",
        "nats_max_bytes": "64MiB",
        "ack_wait": LEASE,
        "worker": "local",
    }


def test_any_gateway_answers_for_a_call_when_another_took_it(nats: dict[str, str]) -> None:
    with System(settings=nats) as one, System(settings={**nats, "worker": "none"}) as other:
        call_id = one.submit("cat", b"x" * 100_000)
        assert other.ended(call_id)["state"] == "done"
        result = other.request("GET", f"/async-function/{call_id}/result")
        assert (result.status, result.body) == (200, b"x" * 100_000)
        later = other.submit("cat", headers={"X-Delay": "1h"})
        assert one.request("DELETE", f"/async-function/{later}").status == 202
        assert one.ended(later)["state"] == "cancelled"


def worker_of(settings: dict[str, str]) -> Program:
    return Program("worker", settings, ready_line=WORKER_READY)


def test_every_call_runs_when_a_worker_is_killed(nats: dict[str, str]) -> None:
    with System(settings={**nats, "worker": "none"}) as system:
        ledger = system.temporary / "ledger"
        script = f"echo $Http_X_Call_Id >> {ledger}; sleep 0.1".encode()
        worker = {**nats, "gateway_url": f"http://127.0.0.1:{system.port}", "max_inflight": "4"}
        with worker_of(worker), worker_of(worker) as doomed:
            ids = [system.submit("shell", script) for _ in range(CALLS)]
            wait_until(lambda: ledger.exists() and len(ledger.read_text().split()) > CALLS // 4, 15, "some calls run")
            doomed.process.kill()
            assert {system.ended(call_id, 30)["state"] for call_id in ids} == {"done"}
        runs = Counter(ledger.read_text().split())
        assert set(runs) == set(ids)
        assert sum(runs.values()) - CALLS <= 4  # what the dead one had begun


def test_gateway_and_worker_are_unhealthy_while_the_servers_are_away() -> None:
    with Cluster() as cluster:
        settings = {"queue_url": cluster.servers[0].url, "nats_max_bytes": "64MiB", "worker": "local"}
        with System(settings=settings) as system:
            assert system.request("GET", "/healthz").status == 200
            cluster.servers[0].kill()
            wait_until(lambda: system.request("GET", "/healthz").status == 503, 10, "unhealthy")
            refused = system.request("POST", "/async-function/cat", b"x")
            assert refused.status == 503
            cluster.servers[0].start()
            wait_until(lambda: system.request("GET", "/healthz").status == 200, 30, "healthy again")
            assert system.ended(system.submit("cat", b"x"))["state"] == "done"


def test_calls_of_a_function_that_has_gone_say_so_and_run_when_it_is_back(nats: dict[str, str]) -> None:
    with System(FUNCTIONS + GONE, settings={**nats, "worker": "none"}) as system:
        path = system.temporary / "functions.toml"

        def declare(functions: str, status: int) -> None:
            path.write_text(functions)
            system.process.send_signal(signal.SIGHUP)
            wait_until(lambda: system.request("POST", "/function/gone").status == status, 10, f"{status} for gone")

        ids = [system.submit("gone", b"x") for _ in range(3)]
        declare(FUNCTIONS, 404)
        assert waiting(system) == ["gone.openfaas-fn"] * 3
        quick = {"initial_retry_wait": "1s", "max_retry_wait": "1s", "max_retry_attempts": "1000"}
        with worker_of({**nats, **quick, "gateway_url": f"http://127.0.0.1:{system.port}"}):
            for call_id in ids:
                system.until(call_id, lambda status: status.get("error") == "status 404")
            declare(FUNCTIONS + GONE, 200)
            assert {system.ended(call_id)["state"] for call_id in ids} == {"done"}
        assert waiting(system) == []


GONE = '\n[gone]\nfprocess = "cat"\n'


def waiting(system: System) -> list[str]:
    """The functions of the calls that the gateway says are queued, one of each call."""
    calls = json.loads(system.request("GET", "/system/calls?state=queued").body)["calls"]
    return [call["function"] for call in calls]
