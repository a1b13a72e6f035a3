"""Which way a worker's call takes to its function, and what a gateway that is away or restarts does to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from faashound.calls.names import parse_function_name
from faashound.calls.retries import RetryPolicy
from faashound.draining.gateway_access import GatewayAccess
from faashound.draining.known_functions import KnownAddress, KnownFunctions, parse_told_upstream
from faashound.network.machine import network_identity
from faashound.serving.operations import MAX_DOCUMENT_BYTES
from faashound.watchdog import Client, Url, parse_url
from testkit.harness import free_port, http_request, wait_until
from testkit.system import Received, Receiver, Reply, System, Worker, always, functions_at, rows


def invocations(port: int) -> dict[str, float]:
    """Return what a program's /metrics counts of the invocations of `cat`: by code, and those begun."""
    counts = {}
    for line in http_request(port, "GET", "/metrics").text.splitlines():
        name, _, count = line.rpartition(" ")
        if name.startswith(("gateway_function_invocation_total{", "gateway_function_invocation_started{")):
            labels = dict(re.findall(r'(\w+)="(.*?)"', name))
            assert labels.pop("function_name") == "cat.openfaas-fn"
            counts[labels.get("code", "begun")] = float(count)
    return counts


@pytest.mark.parametrize("invoke", ["direct", "gateway"])
def test_invocation_is_counted_once_whichever_way_it_takes(invoke: str) -> None:
    ports = {"metrics_port": str(free_port()), "worker_metrics_port": str(free_port())}
    with System(settings=ports | {"invoke": invoke}) as system:
        call_id = system.submit("cat/a?b=c", b"hello")
        assert system.ended(call_id)["state"] == "done"
        result = system.request("GET", f"/async-function/{call_id}/result")
        assert (result.text, result.headers["x-call-id"]) == ("hello", call_id)
        assert re.fullmatch("[0-9]{19}", result.headers["x-start-time"])
        counts = {
            name: invocations(int(port))
            for name, port in (("gateway", ports["metrics_port"]), ("direct", ports["worker_metrics_port"]))
        }
    assert counts.pop(invoke) == {"200": 1.0, "begun": 1.0}
    assert [*counts.values()] == [{}]


def test_function_gets_the_same_request_whichever_way_it_takes() -> None:
    with Receiver() as receiver, System(functions_at(receiver), {"worker": "none"}) as system:
        headers = {"X-Mine": "ä", "X-Forwarded-For": "192.0.2.1", "Content-Type": "image/png"}
        for invoke in ("direct", "gateway"):
            with Worker(system, {"invoke": invoke}):
                system.ended(system.submit("up/a%20b/c?d=e%26f", b"body", headers))
        direct, forwarded = receiver.received()
    varying = ("x-call-id", "x-start-time")
    assert (direct.method, direct.path, direct.body) == (forwarded.method, forwarded.path, forwarded.body)
    assert {name: value for name, value in direct.headers.items() if name not in varying} == {
        name: value for name, value in forwarded.headers.items() if name not in varying
    }


def test_gateway_counts_the_calls_of_a_function_that_did_not_come_through_it() -> None:
    def count() -> int:
        return int(json.loads(system.request("GET", "/system/function/cat").body)["invocationCount"])

    with System(settings={"worker": "none"}) as system:
        with Worker(system):
            for _ in range(3):
                system.ended(system.submit("cat"))
        assert count() == 3, "a worker tells of the last ones when it ends"
        system.request("GET", "/system/function/cat", None, {"X-Direct-Calls": "7"})
        assert count() == 3, "only a worker is believed"


def test_gateway_tells_workers_only_where_a_function_answers() -> None:
    with System(settings={"worker": "none"}) as system:
        token = (system.spool / "token").read_text().strip()
        shown = [
            json.loads(system.request("GET", "/system/function/cat", None, headers).body)
            for headers in ({}, {"X-Worker-Token": "x"}, {"X-Worker-Token": token})
        ]
    assert ["upstream" in each for each in shown] == [False, False, True]
    assert shown[2]["upstream"]["network"] == network_identity()


def standing(spool: Path, call_id: str) -> tuple[str, int]:
    """Return state and attempts of a call by the spool itself, whether a gateway is there or not."""
    (row,) = rows(spool, "SELECT state, attempts FROM calls WHERE id = ?", call_id)
    return row["state"], row["attempts"]


def test_call_outlives_its_gateway_when_its_function_runs_elsewhere(tmp_path: Path) -> None:
    answers = threading.Event()

    def waits(_: Received) -> Reply:
        answers.wait(20)
        return 200, {}, b"answer"

    with Receiver(waits) as receiver, contextlib.ExitStack() as stack:
        system = stack.enter_context(System(functions_at(receiver), {"worker": "none"}, tmp_path / "spool"))
        stack.enter_context(Worker(system, {"max_retry_attempts": "1"}))
        running = system.submit("up", b"first")
        receiver.wait_for(1)
        later = system.submit("up", b"second", {"X-Delay": "1s"})
        system.kill()
        answers.set()

        def are_done() -> bool:
            return all(standing(system.spool, call_id) == ("done", 1) for call_id in (running, later))

        wait_until(are_done, 15, "both end without a gateway")
        assert [got.body for got in receiver.received()] == [b"first", b"second"]


@pytest.mark.parametrize("invoke", ["direct", "gateway"])
def test_call_uses_up_no_attempt_while_the_gateway_that_runs_its_function_is_away(tmp_path: Path, invoke: str) -> None:
    settings = {"worker": "none", "port": str(free_port())}
    with contextlib.ExitStack() as stack:
        with System(settings=settings, spool=tmp_path / "spool") as system:
            worker = stack.enter_context(Worker(system, {"max_retry_attempts": "1", "invoke": invoke}))
            assert system.ended(system.submit("cat"))["state"] == "done"
            call_id = system.submit("cat", b"hello", {"X-Delay": "4s"})  # when all that the gateway kept has ended
            system.kill()
            worker.wait_log("handed back", 20)
        with System(settings=settings, spool=tmp_path / "spool") as system:
            status = system.ended(call_id)
        assert (status["state"], status["status"], status["attempts"]) == ("done", 200, 1)


def test_address_is_avoided_at_which_nothing_answers_though_the_gateway_tells_of_it_meanwhile() -> None:
    is_asked, is_told = threading.Event(), threading.Event()
    told = {"upstream": {"url": "http://127.0.0.1:9", "guarded": False, "network": network_identity()}}

    def tell(_: Received) -> Reply:
        is_asked.set()
        assert is_told.wait(60)
        return 200, {}, json.dumps(told).encode()

    async def scenario(receiver: Receiver) -> None:
        client, function = Client(), parse_function_name("cat")
        gateway = GatewayAccess(parse_url(receiver.url()), "token")
        functions = KnownFunctions(client, gateway, RetryPolicy(), direct=True)
        is_told.set()
        assert (await functions.get(function)).upstream is not None
        is_asked.clear()
        is_told.clear()
        functions.on_direct_call(function)
        telling = asyncio.create_task(functions.tell())
        assert await asyncio.to_thread(is_asked.wait, 60)
        functions.on_unreachable(function)
        is_told.set()
        await telling
        assert (await functions.get(function)).upstream is None
        await client.close()

    with Receiver(tell) as receiver:
        asyncio.run(scenario(receiver))


def test_worker_knows_a_function_whose_deployment_is_as_long_as_one_may_be() -> None:
    annotations = {"com.faashound.disabled": "true", "note": "ж" * (MAX_DOCUMENT_BYTES // 2 - 200)}
    document = {"service": "f", "image": "process", "envProcess": "cat", "annotations": annotations}
    sent = json.dumps(document, ensure_ascii=False).encode()

    async def is_disabled(port: int) -> bool:
        client, gateway = Client(), GatewayAccess(parse_url(f"http://127.0.0.1:{port}"), "token")
        functions = KnownFunctions(client, gateway, RetryPolicy(), direct=True)
        known = await functions.get(parse_function_name("f"))
        await client.close()
        return known.is_disabled

    with System("", {"deploy": "process", "worker": "none"}) as system:
        assert system.request("POST", "/system/functions", sent, {"Content-Type": "application/json"}).status == 202
        assert asyncio.run(is_disabled(system.port))


def test_call_takes_the_gateways_way_when_its_function_is_no_longer_where_it_was(tmp_path: Path) -> None:
    """The worker keeps an address for some seconds, in which the function moves."""
    line = "up.openfaas-fn is called through the gateway: cannot connect"
    moves = (take_the_gateways_way_after_a_move(tmp_path / str(number), line) for number in range(3))
    assert any(moves), "it has asked anew before it called, each time"


def take_the_gateways_way_after_a_move(directory: Path, line: str) -> bool:
    """Have a function move, and called in both places; tell whether the worker has looked where it was."""
    with contextlib.ExitStack() as stack:
        with Receiver(always(200, {"Connection": "close"})) as old:
            system = stack.enter_context(System(functions_at(old), {"worker": "none"}, directory))
            worker = stack.enter_context(Worker(system, {"max_retry_attempts": "1"}))
            assert system.ended(system.submit("up"))["state"] == "done"
        with Receiver() as new:
            Path(system.environment["functions"]).write_text(functions_at(new))
            system.process.send_signal(signal.SIGHUP)
            wait_until(lambda: system.request("POST", "/function/up").status == 200, 15, "it is there")
            count = len(new.received())
            calls = [system.submit("up") for _ in range(2)]
            assert [system.ended(call_id)["attempts"] for call_id in calls] == [1, 1]
            assert len(new.received()) == count + 2
            return line in worker.log()


HERE = network_identity()
TOLD: dict[str, tuple[dict[str, Any], KnownAddress | None]] = {
    "elsewhere": (
        {"local": False, "upstream": {"url": "http://10.0.0.7:8080/x", "guarded": False, "network": "a"}},
        KnownAddress(Url("http", "10.0.0.7", 8080, "/x")),
    ),
    "found by a pattern": (
        {"local": False, "upstream": {"url": "http://cat:8080", "guarded": True, "network": "a"}},
        KnownAddress(Url("http", "cat", 8080, "/"), is_guarded=True),
    ),
    "of which nothing is said is judged": (
        {"upstream": {"url": "http://cat:8080"}},
        KnownAddress(Url("http", "cat", 8080, "/"), is_guarded=True),
    ),
    "run by a gateway of this network": (
        {"local": True, "upstream": {"url": "http://127.0.0.1:4000", "guarded": False, "network": HERE}},
        KnownAddress(Url("http", "127.0.0.1", 4000, "/"), ends_with_gateway=True),
    ),
    "run by a gateway of this network, on a socket of its file system": (
        {"local": True, "upstream": {"url": "unix:/run/x/cat", "guarded": False, "network": HERE}},
        KnownAddress(Url("http", "/run/x/cat", 80, "/"), ends_with_gateway=True),
    ),
    "run by a gateway of another machine": (
        {"local": True, "upstream": {"url": "http://127.0.0.1:4000", "guarded": False, "network": "a"}},
        None,
    ),
    "elsewhere, on the gateway's own loopback": (
        {"local": False, "upstream": {"url": "http://localhost:4000", "guarded": False, "network": "a"}},
        None,
    ),
    "an address of a kind that is not known": ({"local": True, "upstream": {"url": "pipe:/x", "network": HERE}}, None),
    "no address": ({"local": True, "upstream": {"url": None, "network": HERE}}, None),
    "an earlier gateway": ({"local": True}, None),
}


@pytest.mark.parametrize(("told", "upstream"), TOLD.values(), ids=TOLD)
def test_worker_takes_an_address_that_means_the_same_to_it(told: dict[str, Any], upstream: KnownAddress | None) -> None:
    assert parse_told_upstream(told) == upstream
