"""How long callers wait: for the callback of an asynchronous call at rest; for a quick function beside busy ones."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from faashound.calls.model import State
from faashound.queues.spool.queue import Spool

from .gateways import FUNCTION, fill, gateway, opened, trivial
from .load import BODY, Unanswered, run_wrk
from .report import Report, at_most, ratios
from .watchdogs import Plan

OURS = "ours"
CALLS_COUNT = 50  # of each kind, in a round
REST_S = 0.02  # between two calls: nothing of the one before is left to do
CALLBACK_WITHIN_S = 10.0
SLOW_CALLERS_COUNT = 64
SETTLE_S = 1.0  # until all of them wait for an answer
DRAINED_PER_S = 2000  # more than a worker makes: the queue is drained all the while
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CALL_ID = re.compile(rb"\r\nx-call-id: *(\S+)", re.IGNORECASE)


@dataclass(frozen=True)
class Stamps:
    """When a call was posted and had its 202, when its run began and ended, and when its callback had arrived."""

    posted_s: float
    accepted_s: float
    began_s: float
    ended_s: float
    delivered_s: float

    @property
    def parts_ms(self) -> dict[str, float]:
        """The whole, and what it is made of."""
        return {
            "from POST to the delivered callback": (self.delivered_s - self.posted_s) * 1e3,
            "of that: POST to 202": (self.accepted_s - self.posted_s) * 1e3,
            "202 to the claimed call": (self.began_s - self.accepted_s) * 1e3,
            "the function's run": (self.ended_s - self.began_s) * 1e3,
            "its end to the delivered callback": (self.delivered_s - self.ended_s) * 1e3,
        }


def measure_callbacks(plan: Plan, report: Report) -> None:
    """An asynchronous call of cat at rest, from POST to its delivered callback, beside synchronous calls of it."""
    synchronous: list[float] = []
    parts: dict[str, list[float]] = {}
    queue = plan.directory / "queue-callbacks"
    settings = {"worker": "local", "worker_metrics_port": "0", "callback_allow": "127.0.0.1"}
    with gateway(plan, f'[{FUNCTION}]\nfprocess = "cat"\n', queue, **settings) as program:
        for _ in range(plan.rounds_count):
            synchronous.append(median(asyncio.run(call_now(program.port))) * 1e3)
            stamps = asyncio.run(call_later(program.port, queue))
            for name in stamps[0].parts_ms:
                parts.setdefault(name, []).append(median(each.parts_ms[name] for each in stamps))
    whole = next(iter(parts.values()))
    report.add("9 latency", "a synchronous call of cat, p50", "ms", synchronous)
    for name, rounds in parts.items():
        report.add("9 latency", f"asynchronous, {name}, p50", "ms", rounds)
    twice = [2 * each for each in synchronous]
    report.add("9 latency", "asynchronous, to two synchronous calls", "x", ratios(whole, twice), at_most(2.5))


async def call_now(port: int) -> list[float]:
    """Return the seconds that each of CALLS_COUNT calls took, one after the other over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took_s = []
    for _ in range(CALLS_COUNT):
        began_s = time.time()
        writer.write(post(f"/function/{FUNCTION}"))
        await read_message(reader)
        took_s.append(time.time() - began_s)
        await asyncio.sleep(REST_S)
    writer.close()
    return took_s


async def call_later(port: int, queue: Path) -> list[Stamps]:
    """Make CALLS_COUNT asynchronous calls, each when the callback of the one before has come; return their stamps."""
    arrivals: asyncio.Queue[float] = asyncio.Queue()
    receiving: list[tuple[asyncio.Task[Any] | None, asyncio.StreamWriter]] = []

    async def on_callback(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        receiving.append((asyncio.current_task(), writer))
        while await read_message(reader):
            arrivals.put_nowait(time.time())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    server = await asyncio.start_server(on_callback, "127.0.0.1")
    callback = f"X-Callback-Url: http://127.0.0.1:{server.sockets[0].getsockname()[1]}/\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen: list[tuple[str, float, float, float]] = []
    for _ in range(CALLS_COUNT):
        posted_s = time.time()
        writer.write(post(f"/async-function/{FUNCTION}", callback))
        found = _CALL_ID.search(await read_message(reader))
        assert found is not None, "it was not accepted"
        accepted_s = time.time()
        delivered_s = await asyncio.wait_for(arrivals.get(), CALLBACK_WITHIN_S)
        seen.append((found[1].decode(), posted_s, accepted_s, delivered_s))
        await asyncio.sleep(REST_S)
    server.close()
    for each in (writer, *(to_worker for _, to_worker in receiving)):
        each.close()
    await asyncio.gather(*(task for task, _ in receiving if task is not None))
    async with opened(queue) as spool:
        return [await stamped(spool, *each) for each in seen]


async def stamped(spool: Spool, call_id: str, posted_s: float, accepted_s: float, delivered_s: float) -> Stamps:
    """Return the stamps of a call, with what its worker has noted."""
    call = await spool.get(call_id)
    assert call is not None, "it is still kept"
    (attempt,) = call.history
    return Stamps(posted_s, accepted_s, attempt.started_s, attempt.finished_s, delivered_s)


def post(path: str, fields: str = "") -> bytes:
    """Return a request with the body that all get."""
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}Content-Length: {len(BODY)}\r\n\r\n".encode() + BODY


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Return the head of the next message, which has a counted body; b"" at the end."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = _LENGTH.search(head)
    await reader.readexactly(int(length[1]) if length else 0)
    return head


def measure_mixed(plan: Plan, report: Report) -> None:
    """A function that answers at once, while another has many callers of 1 s and the queue is drained at full speed."""
    rounds: dict[str, list[float]] = {name: [] for name in (OURS, *plan.peer_gateways)}
    left: list[float] = []
    with trivial(plan) as function:
        text = f'[quick]\nurl = "{function.url}"\n[slow]\nfprocess = "sleep 1"\n[{FUNCTION}]\nfprocess = "cat"\n'
        for turn in range(plan.rounds_count):
            queue = plan.directory / f"queue-mixed-{turn}"
            asyncio.run(fill(queue, round(DRAINED_PER_S * (plan.seconds + SETTLE_S)), 0.0))
            with gateway(plan, text, queue, worker="local", worker_metrics_port="0") as program:
                rounds[OURS].append(quick_p99_ms(plan, program.url))
                left.append(asyncio.run(count_queued(queue)))
        for url in plan.peer_gateways:  # behind ours, which its worker would be in the way of until its queue is empty
            with suppress(Unanswered):  # it may know no such functions
                for _ in range(plan.rounds_count):
                    run_wrk(plan.script, f"{url}/async-function/{FUNCTION}", SLOW_CALLERS_COUNT, 1)  # for it to drain
                    rounds[url].append(quick_p99_ms(plan, url))
    what = f"quick function, 1 caller, beside {SLOW_CALLERS_COUNT} of 1 s and a queue that is drained"
    report.add("9 latency", f"{what}, p99", "ms", rounds[OURS], at_most(15))
    for url in plan.peer_gateways:
        if len(rounds[url]) < plan.rounds_count:
            report.remark(f"{url}: no figures beside a busy function: quick, slow or cat did not answer")
            continue
        report.add("9 latency", f"{url}, the same, p99", "ms", rounds[url])
        report.add("9 latency", f"ours to {url}, p99", "x", ratios(rounds[OURS], rounds[url]), at_most(1.5))
    if not min(left):
        report.remark(f"{what}: the queue was empty before the end")


def quick_p99_ms(plan: Plan, url: str) -> float:
    """Return the p99 of the quick function, while the slow one has its callers."""
    arguments = plan.script, f"{url}/function/slow", SLOW_CALLERS_COUNT, plan.seconds + 2
    callers = threading.Thread(target=run_wrk, args=arguments)
    callers.start()
    try:
        time.sleep(SETTLE_S)
        return run_wrk(plan.script, f"{url}/function/quick", 1, plan.seconds).p99_s * 1e3
    finally:
        callers.join()


async def count_queued(queue: Path) -> int:
    """Return how many calls still wait."""
    async with opened(queue) as spool:
        return (await spool.stats()).by_state.get(State.QUEUED, 0)
