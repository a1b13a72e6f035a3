"""The worker's own small server: GET /metrics and GET /healthz.

It listens on loopback unless told otherwise, and then a browser's page reaches it by a name of its own (DNS rebinding);
so there it answers to this machine's names only, as the gateway's does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from socket import socket

from ..network.hosts import are_on_loopback, check_own_name
from ..queues import Queue, trouble_of
from ..watchdog import (
    TEXT_PLAIN,
    MethodNotAllowed,
    NotReady,
    Request,
    Response,
    serve_metrics,
)
from .metrics import WorkerMetrics


class StatusPage:
    """Handler of the status server.

    `refresh` brings `metrics` up to date; `names` are host names to answer to besides localhost, None: to any.
    """

    def __init__(
        self, queue: Queue, metrics: WorkerMetrics, refresh: Callable[[], None], names: Collection[str] | None
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._refresh = refresh
        self._names = names

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        if self._names is not None:
            check_own_name(request.host, self._names, "worker")
        if request.path == b"/healthz":
            return self._answer_health(request)
        if request.path != b"/metrics":
            return Response(404, (TEXT_PLAIN,), b"only /metrics and /healthz are here\n")
        self._refresh()
        return await serve_metrics(self._metrics.registry, request)

    def _answer_health(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(("GET", "HEAD"))
        trouble = trouble_of(self._queue)
        if trouble is not None:
            raise NotReady(trouble)
        return Response(200, (TEXT_PLAIN,), b"OK")


def own_names(sockets: Sequence[socket], host: str | None, allowed: Collection[str] | None) -> Collection[str] | None:
    """Return the names that a status server on `sockets` answers to besides localhost; None: to any.

    `host` is what the operator has it listen on, `allowed` what the operator lists besides.
    """
    names = frozenset(allowed or ())
    if not are_on_loopback(sockets):
        return names or None
    return names | {host.lower()} if host else names
