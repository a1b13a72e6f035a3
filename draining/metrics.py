"""What a worker counts, for its /metrics.  Functions beyond MAX_KNOWN_COUNT are counted together, as "other"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import prometheus_client

from ..calls.model import Kind
from ..calls.names import FunctionName
from ..calls.retries import AttemptOutcome
from .functions import MAX_KNOWN_COUNT


class WorkerMetrics:
    """The worker's own metrics; `registry` is what shows them."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._known: set[str] = set()
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
        self.in_flight: Mapping[Kind, prometheus_client.Gauge] = {
            "call": in_flight.labels("call"),
            "callback": in_flight.labels("callback"),
        }
        self._attempts_of = lru_cache(MAX_KNOWN_COUNT)(self._attempts.labels)

    def attempt(self, function: FunctionName, outcome: AttemptOutcome) -> None:
        """Count an attempt at a call."""
        self._attempts_of(self._label(function), str(outcome.status or outcome.kind.value)).inc()

    def callback(self, outcome: AttemptOutcome) -> None:
        """Count an attempt at a callback."""
        self._callbacks.labels(str(outcome.status or outcome.kind.value)).inc()

    def show(self, limits: Iterable[tuple[FunctionName, int]], held_back_count: int) -> None:
        """Set the limits of the functions that are held below the worker's own, and count destinations in trouble."""
        self._limits.clear()
        for function, limit in limits:
            self._limits.labels(self._label(function)).set(limit)
        self._held_back.set(held_back_count)

    def _label(self, function: str) -> str:
        if len(self._known) < MAX_KNOWN_COUNT:
            self._known.add(function)
        return function if function in self._known else "other"
