"""What is counted of the last hour: sums, windows and percentiles, by themselves and through a whole system."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from faashound.calls.names import parse_function_name
from faashound.draining.metrics import InvocationCounters
from faashound.queues.spool.queue import Spool
from faashound.serving import history, invocation_counts
from faashound.serving.figures import (
    BUCKETS_COUNT,
    Counted,
    Hour,
    deltas,
    parse_worker_metrics,
    quantile_s,
    read_counters,
)
from faashound.serving.history import History, Sources, load_history
from faashound.serving.invocation_counts import InvocationCounts
from faashound.serving.metrics import GatewayMetrics
from faashound.watchdog import BUCKETS_S, Scoreboard, Slot
from testkit.harness import command_line_of, connect, free_port, http_request, wait_until
from tests.ui.kit import Shown

CAT = parse_function_name("cat")
BUCKETS = st.lists(st.integers(0, 50), min_size=BUCKETS_COUNT, max_size=BUCKETS_COUNT)
DURATIONS = st.lists(st.sampled_from([0.001, 0.005, 0.03, 0.3, 2.0, 9.0, 60.0]), max_size=30)


@given(BUCKETS, st.floats(0.01, 0.99))
def test_percentile_lies_in_the_bucket_that_holds_it(buckets: list[int], share: float) -> None:
    found, total = quantile_s(share, buckets), sum(buckets)
    if not total:
        assert found is None
        return
    assert found is not None
    below = sum(count for count, bound in zip(buckets, BUCKETS_S, strict=True) if bound < found)
    up_to = sum(
        count
        for count, bound in zip(buckets, BUCKETS_S, strict=True)
        if bound <= next(b for b in BUCKETS_S if b >= found)
    )
    assert below <= share * total + 1e-6
    assert up_to >= share * total - 1e-6 or found == BUCKETS_S[-2]


@given(DURATIONS)
def test_gateway_and_worker_count_the_same_of_the_same_calls(durations_s: list[float]) -> None:
    slot, registry = Slot(Scoreboard()), CollectorRegistry()
    gateway, worker = GatewayMetrics(slot), InvocationCounters(registry)
    for index, duration_s in enumerate(durations_s):
        status = (200, 404, 408, 500)[index % 4]
        slot.values(f"started {CAT}", 1)[0] += 1
        gateway.end(CAT, status, duration_s)
        worker.end(worker.begin(CAT), status, duration_s)
    ours = read_counters(slot.scoreboard.counters.totals())
    assert ours == parse_worker_metrics(generate_latest(registry).decode())
    if durations_s:
        assert ours[CAT].ended == ours[CAT].started == len(durations_s)
        assert ours[CAT].failed == sum(index % 4 >= 2 for index in range(len(durations_s)))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20))
def test_counters_that_begin_anew_are_counted_on(steps: list[tuple[int, bool]]) -> None:
    def counted(number: int) -> dict[str, Counted]:
        return {"f": Counted(number, 0, (number, *[0] * (BUCKETS_COUNT - 1)))}

    total = now = 0
    before: dict[str, Counted] = {}
    expected = 0
    for count, begins_anew in steps:
        now = count if begins_anew else now + count
        after = counted(now)
        told = sum(sum(buckets) for _, _, buckets in deltas(before, after))
        expected += count if not begins_anew or now < before.get("f", Counted(0, 0, ())).ended else told
        total += told
        before = after
    assert total == expected


def test_hour_tells_what_was_not_known_from_what_did_not_come() -> None:
    hour = Hour(since_s=6_000.0)
    hour.add(6_030.0, "f", 1, [2, *[0] * (BUCKETS_COUNT - 1)])
    hour.touch(6_090.0)
    hour.touch(6_210.0)  # nothing was counted in between
    minutes = hour.by_minute(6_210.0, None)
    assert (len(minutes), minutes[-5:]) == (60, [None, (6_000, 2, 1), (6_060, 0, 0), None, (6_180, 0, 0)])
    hour.touch(6_030.0 + 3_600)
    assert hour.by_minute(6_030.0 + 3_600, None)[0] == (6_060, 0, 0)


def test_window_is_no_longer_than_what_is_known() -> None:
    hour = Hour(since_s=600.0)
    hour.add(690.0, "f", 0, [30, *[0] * (BUCKETS_COUNT - 1)])
    figures = hour.window(690.0, 5)["f"]
    assert (figures.window_s, figures.describe()["per_minute"]) == (90.0, 20.0)


def prometheus_counts(*texts: str) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for text in texts:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "gateway_function_invocation_total":
                    found[sample.labels["function_name"], sample.labels["code"]] += int(sample.value)
    return found


def of_prometheus(system: Shown) -> Counter[tuple[str, str]]:
    worker_port = int(system.environment["worker_metrics_port"])
    return prometheus_counts(system.metrics(), http_request(worker_port, "GET", "/metrics").text)


def calls_of(figures: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (each["calls"], each["errors"]) for name, each in figures["functions"].items() if each["calls"]}


@pytest.mark.parametrize("workers", ["1", "3"])
def test_metrics_say_what_prometheus_is_told_of_all_processes(workers: str) -> None:
    with Shown(settings={"metrics_port": str(free_port()), "workers": workers}) as system:
        for index in range(9):
            system.request("POST", "/function/cat", b"x")
            system.ended(system.submit("broken" if index % 3 == 0 else "cat", b"x"))
        figures = wait_until(lambda: _counted(system, 18), 15.0, "all calls are counted")
        expected: dict[str, tuple[int, int]] = {}
        for (name, code), count in of_prometheus(system).items():
            calls, errors = expected.get(name, (0, 0))
            expected[name] = calls + count, errors + count * (code == "500")
        assert calls_of(figures) == expected
        assert (figures["totals"]["calls"], figures["totals"]["errors"]) == (18, 3)
        assert figures["workers"] == "counted"
        queue, metrics = figures["queue"], system.metrics()
        assert f'gateway_queue_calls{{state="dead"}} {float(queue["dead"])}' in metrics
        assert (queue["kind"], queue["dead"], queue["queued"], queue["running"]) == ("spool", 3, 0, 0)


def _counted(system: Shown, count: int) -> dict[str, Any] | None:
    figures: dict[str, Any] = system.ask("/system/metrics?minutes=60")
    return figures if figures["totals"]["calls"] >= count else None


def test_hour_goes_on_over_a_restart_of_the_gateway(tmp_path: Path) -> None:
    settings = {"state": str(tmp_path / "state")}
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        for _ in range(5):
            system.request("POST", "/function/cat", b"x")
        system.ended(system.submit("broken"))
        before = wait_until(lambda: _counted(system, 6), 15.0, "all calls are counted")
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        after = system.ask("/system/metrics?minutes=60")
        assert calls_of(after) == calls_of(before)
        assert after["known_since"] == before["known_since"]
        assert after["depth"][: len(before["depth"])] == before["depth"]
        system.request("POST", "/function/cat", b"x")
        wait_until(lambda: _counted(system, 7), 15.0, "the call after the restart is counted too")


def test_calls_just_before_a_stop_are_counted(tmp_path: Path) -> None:
    settings = {"state": str(tmp_path / "state")}
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        system.request("POST", "/function/cat", b"x")
        system.ended(system.submit("broken"))
        system.process.terminate()  # once: it drains
        wait_until(lambda: system.process.poll() is not None, 15.0, "it has stopped")
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        assert sorted(calls_of(system.ask("/system/metrics?minutes=60")).values()) == [(1, 0), (1, 1)]


def test_gateway_counts_on_when_its_first_process_dies() -> None:
    with Shown(settings={"workers": "2", "worker": "none"}) as system:
        for _ in range(6):
            system.request("POST", "/function/cat", b"x")
        wait_until(lambda: _counted(system, 6), 15.0, "all calls are counted")
        first = gateway_pids(system)[0]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: first not in system.children(), 15.0, "the first process is gone")

        def figures() -> dict[str, Any] | None:
            answer = system.request("GET", "/system/metrics?minutes=60")
            return json.loads(answer.body) if answer.status == 200 else None

        assert calls_of(wait_until(figures, 15.0, "another process has taken its place")) == {CAT: (6, 0)}


def test_calls_of_processes_that_die_are_in_flight_no_longer() -> None:
    settings = {"workers": "2", "worker": "none", "metrics_port": str(free_port())}
    with Shown(settings=settings) as system, connect(system.port) as client:
        system.request("POST", "/function/cat", b"x")
        client.sendall(b"POST /function/slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        wait_until(lambda: _in_flight(system) == 1, 15.0, "the call is in flight")
        for pid in reversed(gateway_pids(system)):  # one has it; last the one whose functions would answer as they end

            def has_successor(pid: int = pid) -> bool:
                return len(set(gateway_pids(system)) - {pid}) == 2

            os.kill(pid, signal.SIGKILL)
            wait_until(has_successor, 15.0, "another process has taken its place")
        wait_until(lambda: _in_flight(system) == 0, 15.0, "the call is not in flight")
        text = system.metrics()
        assert prometheus_counts(text) == {(CAT, "200"): 1, (parse_function_name("slow"), "499"): 1}
        assert text.count('gateway_function_invocation_started{function_name="slow.openfaas-fn"} 1.0') == 1


def gateway_pids(system: Shown) -> list[int]:
    return sorted(pid for pid in system.children() if b"faashound.gateway" in command_line_of(pid))


def _in_flight(system: Shown) -> int | None:
    """Return how many calls are in flight; None while the process that knows is being replaced."""
    answer = system.request("GET", "/system/metrics")
    return None if answer.status == 503 else json.loads(answer.body)["totals"]["in_flight"]


def test_calls_of_a_queue_that_came_after_the_start_are_not_known_and_counted_from_the_next_one(tmp_path: Path) -> None:
    settings = {"state": str(tmp_path / "state"), "deploy": "process"}
    function = {"service": "later", "image": "process", "envProcess": "cat"}
    queue = {"annotations": {"com.openfaas.queue": "later"}}
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        wait_until(lambda: system.ask("/system/metrics")["workers"] == "counted", 15.0, "the worker is there")
        fields = {"Content-Type": "application/json"}
        answer = system.request("POST", "/system/functions", json.dumps(function | queue).encode(), fields)
        assert answer.status == 202, answer
        assert system.ask("/system/metrics")["workers"] == "unknown"
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        system.ended(system.submit("later"))
        wait_until(lambda: _counted(system, 1), 15.0, "the call is counted")
        assert system.ask("/system/metrics")["workers"] == "counted"
        assert "another worker drains" not in system.log()


def kept(**changes: object) -> str:
    whole = {"since_s": 1.0, "life": "", "minutes": {}, "depths": [], "gateway": {}, "worker": {}}
    return json.dumps({**whole, **changes})


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "content",
    [
        *(kept(depths=[[float("inf"), 0, 0, None]]), kept(depths=[[1e20, 0, 0, None]]), kept(depths=[[1, 0, 0, "x"]])),
        *(kept(since_s=float("nan")), kept(since_s=1e20), kept(since_s=None), "[" * 9000, kept(depths=[[1, 2]])),
        *(kept(minutes={"1": {"f": [int(HUGE)] * 20}}), kept(worker={"f": [float("inf"), 1, [1] * 20]}), "{}"),
    ],
    ids=lambda content: content[:60],
)
def test_history_that_is_damaged_is_not_taken(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "history.json"
    path.write_text(content)
    assert load_history(path) is None
    (warning,) = capfd.readouterr().err.splitlines()
    assert f"warning: the figures of the last hour begin anew: {path}: " in warning
    assert "Error" not in warning


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", "{}", "null", kept(minutes=3), kept(minutes={"x": {}}), kept(minutes={"1": {"f": [1, 2]}})),
        *(kept(depths=[[1, 2]]), kept(gateway={"f": [1, 2, [3]]}), kept(since_s="yesterday")),
    ],
)
def test_gateway_starts_with_a_history_that_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "history.json").write_text(content)
    with Shown(settings={"state": str(tmp_path / "state"), "worker": "none"}) as system:
        assert system.ask("/system/metrics")["totals"]["calls"] == 0
        assert "the figures of the last hour begin anew" in system.log()


def test_metrics_of_one_function_by_the_minute_and_nonsense_is_refused() -> None:
    with Shown(settings={"worker": "none"}) as system:
        now_s = time.time()
        system.request("POST", "/function/cat", b"x")
        system.request("POST", "/function/broken", b"x")
        wait_until(lambda: _counted(system, 2), 15.0, "both are counted")
        known = [row for row in system.ask("/system/metrics?function=broken")["minutes"] if row]
        assert known[-1][0] >= now_s // 60 * 60
        assert [sum(column) for column in list(zip(*known, strict=True))[1:]] == [1, 1]
        for query in ("minutes=0", "minutes=61", "minutes=x", "function=a/b"):
            answer = system.request("GET", f"/system/metrics?{query}")
            assert answer.status == 400
            assert re.match("minutes=.*: allowed: a whole number from 1 to 60|function: 'a/b' is no", answer.text)
        assert json.loads(system.request("GET", "/system/metrics").body)["workers"] == "unknown"


@pytest.mark.parametrize("what", ["figures", "counts"])
def test_write_that_has_begun_is_waited_for_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The last write, at the stop, is of the same file."""
    begun, may_end = threading.Event(), threading.Event()

    class SlowHistory(History):
        def _write(self, kept: dict[str, object]) -> None:
            begun.set()
            assert may_end.wait(60)
            super()._write(kept)

    class SlowCounts(InvocationCounts):
        def save(self, listed: Collection[str]) -> None:
            begun.set()
            assert may_end.wait(60)
            super().save(listed)

    async def scenario() -> None:
        slot, queue = Slot(Scoreboard()), await Spool.open(tmp_path / "spool")
        sources = Sources(slot, queue, "spool", None)
        if what == "figures":
            work = SlowHistory(sources, tmp_path / "kept", "life").run()
        else:
            work = SlowCounts(tmp_path / "kept", {}, GatewayMetrics(slot)).keep(lambda: ["f.openfaas-fn"])
        writing = asyncio.create_task(work)
        assert await asyncio.to_thread(begun.wait, 60)
        writing.cancel()
        ended, _ = await asyncio.wait((writing,), timeout=0.2)
        may_end.set()
        assert not ended
        await asyncio.wait((writing,))
        await sources.client.close()
        await queue.close()

    monkeypatch.setattr(history, "SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(invocation_counts, "SAVED_EVERY_S", 0.0)
    asyncio.run(scenario())
