"""What the tests of every queue share: a desk with a queue on it, a clock to set, and calls to put.  Holds no tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from nats.js.errors import NotFoundError

from faashound.calls.ids import new_call_id
from faashound.calls.model import INLINE_BYTES, Attempt, Call, Lease, NewCall, QueueFull, RunEnd, State, StoredBody
from faashound.calls.names import FunctionName, parse_function_name
from faashound.calls.steps import accept, build_call
from faashound.queues import Queue
from faashound.queues.jetstream import bodies as jetstream_bodies
from faashound.queues.jetstream.connection import Connection, Options, Write, connect
from faashound.queues.jetstream.queue import JetStream
from faashound.queues.spool.queue import Spool

from .harness import SOON_S, eventually

T = TypeVar("T")
QUEUE = "faas-request"
LEASE_S = 60.0
START_S = 1_700_000_000.0


class Clock:
    """A wall clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = START_S

    def __call__(self) -> float:
        return self.now_s


def accepted(call: NewCall) -> Call:
    """A new call as the queue is to have it."""
    return build_call(call, accept(call))


class Desk(ABC):
    """An event loop and a queue on it, for tests that go step by step: `desk.do(desk.queue.put(call))`."""

    inline_bytes: int  # longest body that is not stored apart

    def __init__(self, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self.clock = self.make_clock()
        self.runner = asyncio.Runner(loop_factory=loop_factory)
        self.queues: list[Queue] = []
        self.queue = self.open()
        self.owner = self.do(self.queue.enlist())

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def open(self) -> Queue:
        """The same queue once more, as another process would have it."""
        self.queues.append(self.do(self.open_queue()))
        return self.queues[-1]

    def make_clock(self) -> Clock:
        return Clock()

    @abstractmethod
    async def open_queue(self) -> Queue: ...

    @abstractmethod
    async def stored_bodies(self) -> set[str]:
        """The names of the bodies that are stored apart, whether or not a call names them."""

    def bodies(self) -> set[str]:
        return self.do(self.stored_bodies())

    def close(self) -> None:
        for queue in self.queues[::-1]:
            self.do(queue.close())
        self.runner.close()

    def big(self) -> bytes:
        """A body that is stored apart."""
        return bytes(range(256)) * (self.inline_bytes // 256 + 1)

    def put(self, function: str = "f", **changes: Any) -> Call:
        """Put a call and return it as it is in the queue."""
        put = self.do(self.queue.put(self.new_call(function, **changes)))
        found = self.do(self.queue.get(put.id))
        assert found is not None
        return found

    def new_call(self, function: str = "f", **changes: Any) -> NewCall:
        return new_call(function, **{"due_s": self.clock.now_s, "accepted_s": self.clock.now_s, **changes})

    def claim(self, limit: int = 100, **options: Any) -> list[Lease]:
        return self.do(self.queue.claim([QUEUE], self.owner, options.pop("lease_s", LEASE_S), limit, **options))

    def claim_one(self, lease_s: float = LEASE_S) -> Lease:
        (lease,) = self.claim(1, lease_s=lease_s)
        return lease

    def claim_callbacks(self, limit: int = 100, **options: Any) -> list[Lease]:
        lease_s = options.pop("lease_s", LEASE_S)
        return self.do(self.queue.claim_callbacks([QUEUE], self.owner, lease_s, limit, **options))

    def claim_callback(self, lease_s: float = LEASE_S) -> Lease:
        (lease,) = self.claim_callbacks(1, lease_s=lease_s)
        return lease

    def owe(self, callback_url: str, queue: str = QUEUE) -> Call:
        """A call that has ended, and whose outcome is to be delivered."""
        call = self.put(callback_url=callback_url, queue=queue)
        (lease,) = self.do(self.queue.claim([queue], self.owner, LEASE_S, 1))
        self.finish(lease)
        return call

    def finish(self, lease: Lease, state: State = State.DONE, result: bytes | None = b"out", **changes: Any) -> None:
        self.do(finish(self.queue, lease, state, None if result is None else inline(result), **changes))

    def get(self, call_id: str) -> Call:
        call = self.do(self.queue.get(call_id))
        if call is None:
            raise AssertionError(f"the call {call_id} is gone")
        return call

    def attempt(self, status: int | None = 200, error: str | None = None) -> Attempt:
        return Attempt(self.clock.now_s, self.clock.now_s + 0.5, status, error)


class SpoolDesk(Desk):
    """A desk with a spool."""

    inline_bytes = INLINE_BYTES

    def __init__(self, directory: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self.directory = directory
        super().__init__(loop_factory)

    async def open_queue(self) -> Spool:
        return await Spool.open(self.directory, now=self.clock)

    async def stored_bodies(self) -> set[str]:
        return {path.name for path in (self.directory / "bodies").iterdir()}


class JetDesk(Desk):
    """A desk with a queue on NATS."""

    inline_bytes = jetstream_bodies.INLINE_BYTES

    def __init__(self, options: Options, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> None:
        self.options = options
        super().__init__(loop_factory)

    def make_clock(self) -> Clock:
        return JetClock(self)

    async def open_queue(self) -> JetStream:
        return await JetStream.open(self.options, now=self.clock)

    async def stored_bodies(self) -> set[str]:
        connection = await connect(self.options)
        stream = connection.names.bodies
        info = await connection.insist(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        await connection.close()
        return {subject.split(".")[2] for subject in info["state"].get("subjects") or {}}

    async def pass_time(self) -> None:
        """The servers keep the delays, by their own clock: without a consumer they deliver everything."""
        connection = await connect(self.options)
        stream = connection.names.queue
        names = await connection.insist(f"CONSUMER.NAMES.{stream}")
        for name in names["consumers"] or ():
            with contextlib.suppress(NotFoundError):  # an earlier try was heard
                await connection.insist(f"CONSUMER.DELETE.{stream}.{name}")
        await connection.close()


class JetClock(Clock):
    """A wall clock whose jumps the servers feel as well, which keep the delays."""

    def __init__(self, desk: JetDesk) -> None:
        self._now_s = START_S
        self._desk = desk

    @property
    def now_s(self) -> float:
        return self._now_s

    @now_s.setter
    def now_s(self, value: float) -> None:
        self._now_s = value
        self._desk.do(self._desk.pass_time())


async def finish(queue: Queue, lease: Lease, state: State, result: StoredBody | None, **changes: Any) -> None:
    """End a run as a worker does, with `changes` of its outcome."""
    end = RunEnd(state, Attempt(START_S, START_S + 0.5, 200, None), status=200, duration_s=0.5, result=result)
    await queue.finish(lease, dataclasses.replace(end, **changes))


def inline(body: bytes) -> StoredBody:
    """Return a body that is stored with its call."""
    return StoredBody(len(body), body, None)


def new_call(function: str = "f", **changes: Any) -> NewCall:
    """A call of a function, NAME or NAME.NAMESPACE."""
    values: dict[str, Any] = {
        "id": new_call_id(),
        "function": function if isinstance(function, FunctionName) else parse_function_name(function),
        "queue": QUEUE,
        "method": "POST",
        "path": "/",
        "query": "",
        "headers": (),
        "body": inline(b"in"),
        "callback_url": None,
        "due_s": START_S,
        "expires_s": None,
        "idempotency_key": None,
        "accepted_s": START_S,
    }
    return NewCall(**{**values, **changes})


async def read_all(queue: Queue, body: StoredBody, chunk_bytes: int = 65536) -> bytes:
    """Return a stored body whole."""
    return b"".join([piece async for piece in queue.open_body(body, chunk_bytes)])


async def fill(connection: Connection, kind: str, *tokens: str) -> None:
    """Leave no room in the stream of these subjects."""
    numbers, start = itertools.count(1), connection.names.subject(kind, *tokens)
    for size in (10_000, 1000, 1):
        with contextlib.suppress(QueueFull):
            while True:
                await connection.publish(Write(f"{start}{next(numbers)}", bytes(size)))


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    """Yield `parts`, as a body comes."""
    for part in parts:
        yield part


async def results_wait(capfd: pytest.CaptureFixture[str], count: int) -> None:
    """Return when the log has said of as many results that they wait for room."""
    told = 0

    async def has_told() -> bool:
        nonlocal told
        told += capfd.readouterr().err.count("a result waits to be stored")
        return told == count

    await eventually(has_told, SOON_S, f"{count} results wait for room")
