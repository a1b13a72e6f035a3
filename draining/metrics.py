"""What a worker counts, for its /metrics.

    metrics.attempt(call.function, outcome)                # WorkerMetrics: of each attempt, by its outcome
    label = counters.begin(call.function)                  # InvocationCounters: of a call that the gateway does not see
    counters.end(label, status, duration_s)

What it refuses: more than MAX_KNOWN_COUNT functions with a label of their own, since callers can make up names; all
beyond are counted together, as "other".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import prometheus_client

from ..calls.model import Kind
from ..calls.names import FunctionName
from ..calls.retries import AttemptOutcome
from ..watchdog import BUCKETS_S
from .known_functions import MAX_KNOWN_COUNT


class WorkerMetrics:
    """The worker's own metrics; `registry` is what shows them."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._labels = Labels()
        self._attempts = prometheus_client.Counter(
            "worker_attempts", "Attempts at calls, by outcome", ("function_name", "outcome"), registry=self.registry
        )
        self._limits = prometheus_client.Gauge(
            "worker_function_limit",
            "Calls of a function that may run at once, where it has refused some",
            ("function_name",),
            registry=self.registry,
        )
        self._callbacks = prometheus_client.Counter(
            "worker_callbacks", "Attempts at callbacks, by outcome", ("outcome",), registry=self.registry
        )
        self._held_back = prometheus_client.Gauge(
            "worker_callback_destinations_held_back",
            "Destinations of callbacks that are tried less often, since they could not be reached",
            registry=self.registry,
        )
        in_flight = prometheus_client.Gauge(
            "worker_in_flight", "Calls and callbacks at work", ("kind",), registry=self.registry
        )
        self._in_flight: Mapping[Kind, prometheus_client.Gauge] = {
            "call": in_flight.labels("call"),
            "callback": in_flight.labels("callback"),
        }
        self._attempts_of = lru_cache(MAX_KNOWN_COUNT)(self._attempts.labels)

    def attempt(self, function: FunctionName, outcome: AttemptOutcome) -> None:
        """Count an attempt at a call."""
        self._attempts_of(self._labels.of(function), str(outcome.status or outcome.kind.value)).inc()

    def callback(self, outcome: AttemptOutcome) -> None:
        """Count an attempt at a callback."""
        self._callbacks.labels(str(outcome.status or outcome.kind.value)).inc()

    def show(
        self, limits: Iterable[tuple[FunctionName, int]], held_back_count: int, in_flight: Mapping[Kind, int]
    ) -> None:
        """Set the limits of the functions that are held below the worker's own, and what else is counted only here."""
        for kind, gauge in self._in_flight.items():
            gauge.set(in_flight.get(kind, 0))
        self._limits.clear()
        for function, limit in limits:
            self._limits.labels(self._labels.of(function)).set(limit)
        self._held_back.set(held_back_count)


class InvocationCounters:
    """The gateway's counters of invocations, for calls that do not go through it: under the same names, so that sums
    over gateway and worker are right."""

    def __init__(self, registry: prometheus_client.CollectorRegistry) -> None:
        self._labels = Labels()
        name_and_code = ("function_name", "code")
        self._total = prometheus_client.Counter(
            "gateway_function_invocation", "Function invocations, by outcome", name_and_code, registry=registry
        )
        self._seconds = prometheus_client.Histogram(
            "gateway_functions_seconds",
            "Function time taken",
            name_and_code,
            buckets=BUCKETS_S,
            registry=registry,
        )
        # A gauge, as the gateway's: OpenFaaS's counter has no _total, which a counter's name would end with.
        self._started = prometheus_client.Gauge(
            "gateway_function_invocation_started",
            "Function invocations begun",
            ("function_name",),
            registry=registry,
        )
        self._started_of = lru_cache(MAX_KNOWN_COUNT)(self._started.labels)
        self._ended_of = lru_cache(MAX_KNOWN_COUNT)(self._find_ended)

    def _find_ended(self, label: str, status: int) -> tuple[prometheus_client.Counter, prometheus_client.Histogram]:
        return self._total.labels(label, str(status)), self._seconds.labels(label, str(status))

    def begin(self, function: FunctionName) -> str:
        """Count the start of an invocation; return the label that `end` is to be given."""
        label = self._labels.of(function)
        self._started_of(label).inc()
        return label

    def end(self, label: str, status: int, duration_s: float) -> None:
        """Count the end of an invocation; status 0: it was not made after all."""
        if not status:
            self._started_of(label).dec()
            return
        total, seconds = self._ended_of(label, status)
        total.inc()
        seconds.observe(duration_s)


class Labels:
    """The names of functions as labels: those beyond MAX_KNOWN_COUNT are one, since callers can make up names."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def of(self, function: str) -> str:
        """Return the label of a function."""
        if len(self._known) < MAX_KNOWN_COUNT:
            self._known.add(function)
        return function if function in self._known else "other"
