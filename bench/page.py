"""What the page costs: python -m bench.page [--minutes 5] [--calls 1000000] [--functions 1000]

Fills a spool with calls that have ended, starts a gateway with so many functions, and tells how long the gateway takes
for what each view asks, how many bytes come, and what the browser holds before and after so many minutes of fifty calls
a second.  Nothing is sent but on the loopback; the functions are one server of this process.
"""

from __future__ import annotations

import argparse
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from testkit.browser import Browser
from testkit.harness import free_port, http_request
from testkit.system import Receiver, System

ROUNDS_COUNT = 15
RATE = 50.0
SHOWN = {
    "overview": ("/system/metrics", "/system/calls?state=dead&limit=5", "/healthz"),
    "functions": ("/system/functions?namespace=*", "/system/metrics"),
    "calls": ("/system/calls?limit=50",),
    "calls, state": ("/system/calls?state=done&limit=50",),
    "calls, function": ("/system/calls?function=fn-7&limit=50",),
    "calls, older": ("/system/calls?limit=50&before={middle}",),
    "calls, id": ("/system/calls?id={start}&limit=50",),
    "dead letters": ("/system/calls?state=dead&limit=50", "/system/calls?callback=dead&limit=50"),
    "all queues' counts, as /metrics has them": ("{metrics}",),
}
FILL = """
    WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < :count - 1)
    INSERT INTO calls
        (id, function, queue, state, due_s, accepted_s, started_s, finished_s, attempts, status, duration_s)
    SELECT printf('%08x-%04x-7000-8000-%012x', (:now_s - i / 100.0) * 1000 / 65536, i % 65536, i),
        'fn-' || (i % :functions) || '.openfaas-fn', 'faas-request',
        CASE WHEN i % 5000 = 7 THEN 'dead' ELSE 'done' END,
        :now_s - i / 100.0, :now_s - i / 100.0, :now_s - i / 100.0, :now_s - i / 100.0, 1, 200, 0.01
    FROM n ORDER BY i DESC
"""


def fill(system: System, calls_count: int, functions_count: int) -> None:
    """Put calls that have ended into the spool of a system that does not run."""
    db = sqlite3.connect(system.spool / "spool.sqlite3", isolation_level=None)
    db.execute("PRAGMA synchronous = OFF")
    db.execute("BEGIN")
    db.execute(FILL, {"count": calls_count, "functions": functions_count, "now_s": time.time()})
    db.execute(
        "INSERT INTO requests (seq, method, path, query, headers, bytes_count, inline)"
        " SELECT seq, 'POST', '/', '', '[]', 0, x'' FROM calls"
    )
    db.execute("COMMIT")
    db.close()


def measure_ms(ask: Callable[[], int]) -> tuple[float, float, int]:
    """Return the median and the longest time of some rounds, in milliseconds, and the bytes of an answer."""
    took, size = [], 0
    for _ in range(ROUNDS_COUNT):
        start_s = time.perf_counter()
        size = ask()
        took.append((time.perf_counter() - start_s) * 1000)
    return statistics.median(took), max(took), size


def measure_views(system: System) -> None:
    """Print what each view takes of the gateway."""
    listed = system.request("GET", "/system/calls?limit=1000").text
    middle = listed.rpartition('"before": "')[2].partition('"')[0]
    print(f"{'view':42} {'median ms':>10} {'longest':>9} {'bytes':>9}")
    for view, paths in SHOWN.items():

        def ask(paths: tuple[str, ...] = paths) -> int:
            size = 0
            for path in paths:
                if path == "{metrics}":
                    size += len(system.metrics())
                else:
                    answer = system.request("GET", path.format(middle=middle, start=middle[:13]))
                    assert answer.status == 200, answer
                    size += len(answer.body)
            return size

        median, longest, size = measure_ms(ask)
        print(f"{view:42} {median:10.1f} {longest:9.1f} {size:9}")


def renderer_bytes(browser: Browser) -> int:
    """Return what the process that holds the page has for itself."""
    found = [0]
    for each in psutil.Process(browser.driver.service.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # Chromium ends some of its own accord
            if "--type=renderer" in each.cmdline():
                found.append(int(each.memory_full_info().uss))
    return max(found)


def tell_memory(browser: Browser, when: str, empty_bytes: int) -> None:
    """Print what the browser holds once it has collected its garbage."""
    browser.tell("HeapProfiler.collectGarbage", {})
    found = {each["name"]: each["value"] for each in browser.tell("Performance.getMetrics", {})["metrics"]}
    uss = renderer_bytes(browser) - empty_bytes
    print(
        f"{when:42} heap {found['JSHeapUsedSize'] / 1e6:6.1f} MB, {found['Nodes']:.0f} nodes,"
        f" {found['JSEventListeners']:.0f} listeners, process {uss / 1e6:+.1f} MB"
    )


def measure_browser(system: System, minutes: float) -> None:
    """Print what the page holds, before and after minutes of calls."""
    stop = threading.Event()

    def load() -> None:
        begun_s, number = time.monotonic(), 0
        while not stop.is_set():
            number += 1
            http_request(system.port, "POST", f"/async-function/fn-{number % 40}", body=b"x")
            stop.wait(max(begun_s + number / RATE - time.monotonic(), 0))

    with Browser() as browser:
        browser.tell("Performance.enable", {})
        browser.open("about:blank")
        empty_bytes = renderer_bytes(browser)
        browser.open(f"http://127.0.0.1:{system.port}/ui/#/functions")
        browser.find("td a")
        shown_ms = browser.run("return performance.now()")
        sizes = browser.run("return performance.getEntriesByType('resource').map(e => [e.name, e.encodedBodySize])")
        files = sum(size for name, size in sizes if "/ui/" in name)
        print(f"{'functions view in the browser':42} {shown_ms:.0f} ms after navigation; files {files} bytes packed")
        browser.open(f"http://127.0.0.1:{system.port}/ui/#/calls")
        browser.find("tbody tr")
        browser.tell("Network.disable", {})  # or DevTools would keep all that comes
        tell_memory(browser, "calls view, at rest", empty_bytes)
        thread = threading.Thread(target=load)
        thread.start()
        end_s = time.monotonic() + minutes * 60
        while time.monotonic() < end_s:
            time.sleep(min(60.0, max(end_s - time.monotonic(), 0)))
            left = (end_s - time.monotonic()) / 60
            tell_memory(browser, f"calls view, {minutes - left:.0f} min of {RATE:.0f} calls a second", empty_bytes)
        stop.set()
        thread.join()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--functions", type=int, default=1000)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Receiver() as receiver:
        tables = [f'[fn-{number}]\nurl = "{receiver.url()}"' for number in range(wanted.functions)]
        settings = {"metrics_port": str(free_port()), "worker_metrics_port": str(free_port()), "retention": "100h"}
        spool = Path(directory) / "spool"
        with System("", {"worker": "none"}, spool):
            pass  # it has made the spool
        system = System("\n".join(tables), settings, spool)
        fill(system, wanted.calls, wanted.functions)
        with system:
            print(f"{wanted.functions} functions, {wanted.calls} calls")
            measure_views(system)
            measure_browser(system, wanted.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
