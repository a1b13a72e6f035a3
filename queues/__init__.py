"""Which queue a program is to use: the spool of one machine, or NATS JetStream for many.

Use:

    queue = await open_queue(parse_queue_url("nats://n1:4222,n2:4222"), parse_settings(NatsSettings, environ))

Contract: both keep the interface `Queue`, with the types, the errors and the promises that queues/spool/queue.py
states, and one test suite runs against both (tests/queues/contract/).  Code that holds a Queue does not know which it
is.

What it refuses to do: take credentials from a URL, which is logged; they come from settings and from files.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..calls.model import (
    Attempt,
    Backlog,
    Bounds,
    Call,
    CallbackState,
    Changes,
    Lease,
    NewCall,
    QueueLimits,
    Renewal,
    RunEnd,
    State,
    Stats,
    StoredBody,
    Swept,
)
from ..calls.names import FunctionName
from ..watchdog import CannotStart
from .nats_settings import NatsSettings, build_tls, default_nats_settings, read_login
from .spool.queue import Spool
from .urls import NatsUrl, QueueUrl

if TYPE_CHECKING:  # which wants nats-py, an extra
    from .jetstream.bucket import Bucket
    from .jetstream.connection import Options


class Queue(Protocol):
    """What gateways, workers and people need of a queue; every method is described at `spool.queue.Spool`."""

    token: str

    async def close(self) -> None: ...

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody: ...
    async def store_result(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody: ...
    def open_body(self, body: StoredBody, chunk_bytes: int = ...) -> AsyncGenerator[bytes, None]: ...
    async def drop_body(self, body: StoredBody) -> None: ...

    async def put(self, call: NewCall) -> NewCall: ...
    async def get(self, call_id: str) -> Call | None: ...
    async def wait(self, call_id: str, timeout_s: float) -> Call: ...
    async def cancel(self, call_id: str) -> State: ...
    async def cancel_queued(self, *, function: FunctionName | None = None) -> int: ...

    async def enlist(self, owner: str | None = None) -> str: ...
    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]: ...
    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]: ...
    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal: ...
    async def cancelled_ids(self, owner: str) -> frozenset[str]: ...
    async def reclaim(self) -> int: ...

    async def finish(self, lease: Lease, end: RunEnd) -> None: ...
    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State: ...
    async def release(self, lease: Lease) -> None: ...
    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None: ...

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None: ...
    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None: ...
    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None: ...

    async def wait_for_work(self, timeout_s: float) -> bool: ...
    async def wait_for_cancel(self, timeout_s: float) -> bool: ...

    async def calls(
        self,
        *,
        state: State | None = None,
        function: FunctionName | None = None,
        limit: int = 100,
        before: str | None = None,
        callback: CallbackState | None = None,
        id_start: str | None = None,
    ) -> list[Call]: ...
    async def changes(self, mark: str | None, leased_ids: Collection[str], limit: int) -> Changes: ...
    async def requeue_dead(self, call_id: str) -> Call: ...
    async def requeue_callback(self, call_id: str) -> Call: ...
    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int: ...
    async def stats(self) -> Stats: ...
    async def backlog(self) -> Backlog: ...
    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept: ...


async def open_queue(
    url: QueueUrl,
    nats: NatsSettings | None = None,
    *,
    limits: QueueLimits | None = None,
    now: Callable[[], float] = time.time,
) -> Queue:
    """Open the queue that `url` names, or create it; `now` is the wall clock, in seconds since the epoch.

    A spool keeps to `limits`; without, it takes what comes, and leaves the reserve to the programs that set its size.
    Raises the queue's errors, and CannotStart when a secret file cannot be read or nats-py is not installed.
    """
    if isinstance(url, Path):
        return await Spool.open(url, limits=limits or QueueLimits(reserve_bytes=None), now=now)
    options = _nats_options(url, nats or default_nats_settings())
    from .jetstream.queue import JetStream

    return await JetStream.open(options, now=now)


async def open_bucket(url: NatsUrl, nats: NatsSettings) -> Bucket:
    """Return the bucket beside the queue of `url`, made if it is not there.  Raises as `open_queue`."""
    options = _nats_options(url, nats)
    from .jetstream.bucket import Bucket

    return await Bucket.open(options)


def _nats_options(url: NatsUrl, settings: NatsSettings) -> Options:
    """Return how the servers of `url` are reached.

    Raises CannotStart when a secret file cannot be read or nats-py is not installed.
    """
    try:
        from .jetstream.connection import Options
    except ImportError as error:
        raise CannotStart(f"queue_url={url} needs nats-py: pip install 'faashound[nats]' ({error})") from error
    login = read_login(settings)
    if url.scheme == "tls" or settings.nats_ca_file or settings.nats_cert_file:
        login["tls"] = build_tls(settings)
    return Options(tuple(url.urls), login, settings.nats_prefix, settings.nats_replicas, settings.nats_max_bytes)


def trouble_of(queue: Queue) -> str | None:
    """Return what keeps a queue from its work as far as is known, for /healthz; None if nothing does."""
    if not getattr(queue, "healthy", True):
        return "the queue cannot be reached"
    trouble: str | None = getattr(queue, "trouble", None)
    return trouble
