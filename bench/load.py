"""Load on a server: wrk for throughput and latency, and arrivals at times of their own where the rate must hold."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

BODY = b"hello world"
SEED = 20240229

# wrk prints rounded figures; this asks it for exact ones (microseconds) in a line of their own.
SCRIPT = f"""
wrk.method = "POST"
wrk.body = "{BODY.decode()}"
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.status + errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format("exact: %d %d %d %d %d\\n", summary.requests, summary.duration,
           latency:percentile(50), latency:percentile(99), failed))
end
"""


class NoLoadGenerator(Exception):
    """wrk is not installed."""

    def __init__(self) -> None:
        super().__init__("wrk is needed to make load, and is not in PATH; install it with: apt-get install wrk")


class Unanswered(Exception):
    """Requests failed: figures about something else than good answers would mean nothing."""


@dataclass(frozen=True)
class Load:
    """What one run of load has measured."""

    requests_per_s: float
    p50_s: float
    p99_s: float


def check_load_generator() -> None:
    """Raise NoLoadGenerator without wrk."""
    if shutil.which("wrk") is None:
        raise NoLoadGenerator


def write_script(directory: Path) -> Path:
    """Write the lua script for wrk into `directory` and return its path."""
    path = directory / "post.lua"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def run_wrk(script: Path, url: str, connections_count: int, seconds: int) -> Load:
    """POST an 11-byte body to `url` for `seconds` over so many connections; raises Unanswered if any request failed."""
    command = ["wrk", "-t1", f"-c{connections_count}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    exact = next(line for line in done.stdout.splitlines() if line.startswith("exact:"))
    requests_count, duration_us, p50_us, p99_us, failed_count = map(int, exact.split()[1:])
    if failed_count or not requests_count:
        raise Unanswered(f"{failed_count} of {requests_count} requests to {url} failed:\n{done.stdout}")
    return Load(requests_count / duration_us * 1e6, p50_us / 1e6, p99_us / 1e6)


def run_arrivals(url: str, rate_per_s: float, seconds: float) -> float:
    """POST at random times (Poisson, fixed seed), whatever the answers do; return the median latency in seconds."""
    return asyncio.run(_arrive(url, rate_per_s, seconds))


async def _arrive(url: str, rate_per_s: float, seconds: float) -> float:
    chance, started_s, calls = random.Random(SEED), time.perf_counter(), []
    due_s = started_s
    while due_s < started_s + seconds:
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        calls.append(asyncio.create_task(_post(url, due_s)))
        due_s += chance.expovariate(rate_per_s)
    return median(await asyncio.gather(*calls))


async def _post(url: str, due_s: float) -> float:
    """Return the seconds from when a request was due until its answer was there."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST / HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n"
    writer.write(head.encode() + BODY)
    answer = await reader.read()
    writer.close()
    if not answer.startswith(b"HTTP/1.1 200"):
        raise Unanswered(f"{url} answered {answer[:100]!r}")
    return time.perf_counter() - due_s
