"""The metrics of the gateway, under the names of OpenFaaS', and what its queue looks like.

    metrics = GatewayMetrics(slot)
    label = metrics.begin(function, listed=True)
    metrics.end(label, 200, duration_s)
    await QueueFigures(queue, metrics).refresh()
    await serve_metrics(metrics, request)                    # all processes of the gateway together

Contract: counting is an addition in memory that the processes share; nothing is looked up or waited for.  A duration
is the time until the head of an answer has come; a streamed body, or a switched connection, is no longer in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from ..calls.model import State, Stats
from ..functions.table import Function
from ..queues import Queue
from ..watchdog import CLIENT_GONE_STATUS, FaashoundError, Histogram, Slot, Trouble, cumulated, log
from .figures import read_counters
from .health import TROUBLE_KEY

DIRECT = "direct"  # the key of calls that workers make past the gateway
ASKED = "asked"  # and of those that were passed on to a function that is run here
OTHER = "other"  # no function's whole name, which has a namespace
FIGURES_S = 2.0  # for the queue's figures: who scrapes waits ten seconds, and takes a gateway that is later for dead
MAX_LABELS_COUNT = 1000  # functions that function_url finds and that have metrics of their own


class GatewayMetrics:
    """The metrics of the OpenFaaS gateway, under the same names, and the queue's depth.

    Where `function_url` finds functions, strangers can make up names: such a name is counted as its own only once a
    function has answered to it, and as "other" until then.
    """

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._answered: set[str] = set()
        self._stats: Stats | None = None
        self.worker_restarted(0)  # or the first one would be no increase to who reads it
        self._end_cut()

    def _end_cut(self) -> None:
        """End what a process that has died had begun in our slot, as what has no reader: how long it took is not known.

        That it was begun stays counted, since a counter that goes back has begun anew for who reads it.
        """
        for label, counted in read_counters(self._slot.scoreboard.counters.adopt(self._slot.index)).items():
            for _ in range(counted.started - counted.ended):
                self.end(label, CLIENT_GONE_STATUS, 0.0)

    def begin(self, function: Function | None, *, listed: bool) -> str:
        """Count the start of an invocation; return the label that `end` is to be given."""
        label = function.name if function and (listed or function.name in self._answered) else OTHER
        self._slot.values(f"started {label}", 1)[0] += 1
        return label

    def end(self, label: str, status: int, duration_s: float) -> None:
        """Count the end of an invocation."""
        Histogram.at(self._slot, f"seconds {label} {status}").observe(duration_s)

    def asked(self, name: str) -> None:
        """Count a call that is passed on, to a function that is run here: callers that are refused are not for it."""
        self._slot.values(f"{ASKED} {name}", 1)[0] += 1

    def asked_count(self, name: str) -> int:
        """Return how many calls a function that is run here has got, in all processes and past them."""
        totals = self._slot.scoreboard.counters.totals()
        return int(sum(sum(totals.get(f"{kind} {name}", ())) for kind in (ASKED, DIRECT)))

    def answered(self, name: str) -> None:
        """There is a function of this name."""
        if len(self._answered) < MAX_LABELS_COUNT:
            self._answered.add(name)

    def submitted(self, status: int) -> None:
        """Count a submission."""
        self._slot.values(f"submitted {status}", 1)[0] += 1

    def dropped(self, count: int) -> None:
        """Count dead letters that `keep_dead` has ended."""
        self._slot.values("dropped", 1)[0] += count

    def worker_restarted(self, count: int = 1) -> None:
        """Count that a worker beside us, which has ended, was started again."""
        self._slot.values("restarts", 1)[0] += count

    def called_directly(self, name: str, count: int) -> None:
        """Count calls that a worker has made where the function answers; its own metrics tell more of them."""
        self._slot.values(f"{DIRECT} {name}", 1)[0] += count

    def invocation_counts(self) -> dict[str, int]:
        """Return how many invocations of each function have ended, in all processes, by its whole name."""
        counts: dict[str, int] = {}
        for key, numbers in self._slot.scoreboard.counters.totals().items():
            kind, name, *_ = (*key.split(), "")
            if kind in ("seconds", DIRECT) and name != OTHER:
                ended = numbers[1:] if kind == "seconds" else numbers
                counts[name] = counts.get(name, 0) + int(sum(ended))
        return counts

    def show_queue(self, stats: Stats) -> None:
        """Have the figures of the queue shown, from now on."""
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all processes; prometheus_client asks for them."""
        labels = ("function_name", "code")
        total = CounterMetricFamily("gateway_function_invocation", "Function invocations, by outcome", labels=labels)
        seconds = HistogramMetricFamily("gateway_functions_seconds", "Function time taken", labels=labels)
        # A gauge: OpenFaaS's counter has no _total, which a counter's name would end with.
        started = GaugeMetricFamily(
            "gateway_function_invocation_started", "Function invocations begun", labels=("function_name",)
        )
        submitted = CounterMetricFamily(
            "gateway_async_submissions", "Asynchronous calls submitted, by outcome", labels=("code",)
        )
        trouble = GaugeMetricFamily(
            "gateway_trouble", "Processes of the gateway that find a part not working, or soon not", labels=("part",)
        )
        dropped = CounterMetricFamily(
            "gateway_queue_dropped_letters", "Dead letters and undelivered results that keep_dead has ended"
        )
        restarts = CounterMetricFamily(
            "gateway_local_worker_restarts", "Workers beside the gateway that have ended and were started again"
        )
        counters: Mapping[str, CounterMetricFamily | GaugeMetricFamily] = {
            "started": started,
            "submitted": submitted,
            "dropped": dropped,
            "restarts": restarts,
            TROUBLE_KEY: trouble,
        }
        for key, numbers in self._slot.scoreboard.counters.totals().items():
            kind, *label = key.split()
            if kind == "seconds":
                buckets, sum_s = cumulated(numbers)
                total.add_metric(label, buckets[-1][1])
                seconds.add_metric(label, buckets, sum_s)
            elif kind not in (DIRECT, ASKED):  # one is in the workers' own metrics, the other no figure of OpenFaaS'
                counters[kind].add_metric(label, numbers[0])
        yield from (total, started, seconds, submitted, dropped, restarts, trouble)
        if self._stats is not None:
            yield from queue_metrics(self._stats)


class QueueFigures:
    """Asks the queue for its figures when the metrics are read; those that come late are shown to the next reader."""

    def __init__(self, queue: Queue, metrics: GatewayMetrics) -> None:
        self._queue = queue
        self._metrics = metrics
        self._asking: asyncio.Task[None] | None = None
        self._trouble = Trouble(log.warning)

    async def refresh(self) -> None:
        """Have the queue's figures shown, those of before where it has not told them within FIGURES_S."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        done, _ = await asyncio.wait((self._asking,), timeout=FIGURES_S)
        for task in done:
            task.result()

    async def _ask(self) -> None:
        try:
            self._metrics.show_queue(await self._queue.stats())
        except FaashoundError as error:  # the other figures matter most when the queue is in trouble
            self._trouble.tell(f"no figures of the queue: {error}")
        else:
            self._trouble.over()

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait((self._asking,))


def queue_metrics(stats: Stats) -> Iterator[Metric]:
    """Yield the figures of the queue as metrics."""
    calls = GaugeMetricFamily("gateway_queue_calls", "Asynchronous calls, by state", labels=("state",))
    for state in State:
        calls.add_metric((state.value,), stats.by_state.get(state, 0))
    yield calls
    waiting = GaugeMetricFamily("gateway_queue_waiting", "Calls and callbacks that wait, by queue", labels=("queue",))
    for name, count in stats.waiting.items():
        waiting.add_metric((name,), count)
    yield waiting
    yield GaugeMetricFamily(
        "gateway_queue_dead_callbacks", "Results that could not be delivered", value=stats.callback_dead_count
    )
    ages = GaugeMetricFamily(
        "gateway_queue_oldest_due_seconds", "How long the oldest due call has waited, by queue", labels=("queue",)
    )
    for name in stats.waiting:
        ages.add_metric((name,), stats.oldest_due_ages_s.get(name, 0.0))
    yield ages
    if stats.free_bytes is not None:
        yield GaugeMetricFamily("gateway_queue_free_bytes", "Room on the queue's disk", value=stats.free_bytes)
    if stats.reserve_bytes is not None:
        yield GaugeMetricFamily(
            "gateway_queue_reserve_bytes", "Room that is to be kept for ending calls", value=stats.reserve_bytes
        )
