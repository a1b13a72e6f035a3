"""Long bodies: cut into messages of a stream of their own, written and read a few at a time.

A body is safe before the call that names it is put.  `name` tells, beside the pieces, which call that is: a body that
is old and that no call names is what a crash has left.  Old is one that has got nothing new for ORPHAN_S.  A body may
come slowly, or wait for room, for longer than that, so its writer gives signs: a message beside the records, where
there is room when none is left for bodies, and that the servers forget by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from ...calls.model import CallDamaged, QueueFull, QueueUnavailable, ResultLost, StoredBody
from ...watchdog import BodyTooLarge, FaashoundError, log
from .connection import TTL_HEADER, Connection, Stored, Write, end_tasks

INLINE_BYTES = 16 * 1024  # up to here a body is part of its message, and written again with the call's end
CHUNK_BYTES = 128 * 1024  # longer bodies are cut into messages of this size (max_payload is 1 MiB, seldom less)
LAND_S = 1.0  # for pieces of a body that is given up, and on their way
CHUNKS_IN_FLIGHT_COUNT = 4  # of one body: bounds its memory
ROOM_PAUSE_S = 1.0  # before a result that has no room is tried again
ORPHAN_S = 3600.0  # a stored body that no call names after this time is a crash's leftover
SIGN_S = 900.0  # between two signs that a body is being written
SIGNS_COUNT = 4  # as many may be missed, while the servers are away

_REFERENCE = "ref"
Writer = Callable[[Write], Awaitable[object]]


class Bodies:
    """The bodies that are stored apart."""

    def __init__(self, connection: Connection) -> None:
        self.closed = False
        self._connection = connection
        self._names = connection.names
        self._turns = asyncio.Lock()  # of results that wait for room: side by side, none would ever have all of its own

    async def store(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None, write: Writer | None = None
    ) -> StoredBody:
        """Make a body safe; up to INLINE_BYTES it stays in memory and becomes part of its message."""
        source = _once(chunks) if isinstance(chunks, bytes) else chunks
        most_bytes: int = self._connection.client.max_payload
        pieces = _cut(source, min(CHUNK_BYTES, most_bytes // 2), limit_bytes)
        first = await anext(pieces, b"")
        if len(first) <= min(INLINE_BYTES, most_bytes // 8):  # less than a piece, so it is all
            return StoredBody(len(first), first, None)
        name, total, numbers, tasks = uuid.uuid4().hex, 0, itertools.count(), set[asyncio.Future[object]]()
        at_once, write = (1, write) if write is not None else (CHUNKS_IN_FLIGHT_COUNT, self._connection.publish)
        async with self._signs(name), contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._discard, name)
            stack.push_async_callback(_end_writes, tasks)
            async for piece in _chain(first, pieces):
                total += len(piece)
                subject = self._names.subject("body", name, next(numbers))
                tasks.add(asyncio.ensure_future(write(Write(subject, piece))))
                if len(tasks) == at_once:
                    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                    tasks -= done
                    await asyncio.gather(*done)
            await asyncio.gather(*tasks)
            stack.pop_all()
        return StoredBody(total, None, name)

    async def store_result(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None, length: int | None
    ) -> StoredBody:
        """As `store`, but what finds no room waits for it, however long; one result after another.

        Raises ResultLost if `chunks` breaks off after that: the function has run.
        """
        if length is not None and limit_bytes is not None and length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        waits = contextlib.AsyncExitStack()  # holds the lock from the first wait to the end
        waited = False

        async def write(piece: Write) -> None:
            nonlocal waited
            while True:
                try:
                    await self._connection.publish(piece)
                    return
                except (QueueFull, QueueUnavailable) as error:
                    if self.closed:
                        raise
                    if not waited:
                        waited = True
                        log.warning(f"a result waits to be stored: {error}")
                        await waits.enter_async_context(self._turns)
                await asyncio.sleep(ROOM_PAUSE_S)

        async with waits:
            try:
                stored = await self.store(chunks, limit_bytes, write)
            except FaashoundError as error:
                if isinstance(error, BodyTooLarge) or not waited or self.closed:
                    raise
                raise ResultLost(f"the answer broke off while it waited for room in the queue: {error}") from error
        if waited:
            log.info("a result that waited to be stored is stored")
        return stored

    @contextlib.asynccontextmanager
    async def _signs(self, name: str) -> AsyncIterator[None]:
        """Tell those who sweep that this body is being written, from when it takes long."""
        signing = asyncio.ensure_future(self._keep_signing(name))
        try:
            yield
        finally:
            await end_tasks([signing])

    async def _keep_signing(self, name: str) -> None:
        while True:
            await asyncio.sleep(SIGN_S)
            await self._sign(name)

    async def _sign(self, name: str) -> None:
        headers = {TTL_HEADER: f"{math.ceil(SIGNS_COUNT * SIGN_S)}s"}
        with contextlib.suppress(QueueUnavailable, QueueFull):
            await self._connection.publish(Write(self._sign_of(name), b"", headers))

    def _sign_of(self, name: str) -> str:
        return self._names.subject("meta", f"writing-{name}")

    async def _discard(self, name: str) -> None:
        """Remove what was written; what cannot be removed now is an orphan that `sweep` finds."""
        with contextlib.suppress(QueueUnavailable, QueueFull):
            await self._purge(name)

    async def open(self, body: StoredBody, chunk_bytes: int) -> AsyncGenerator[bytes, None]:
        """The bytes of a stored body, in pieces of at most `chunk_bytes`; QueueDamaged if not all are there."""
        if body.file is None:
            for start in range(0, len(body.inline or b""), chunk_bytes):
                yield (body.inline or b"")[start : start + chunk_bytes]
            return
        left = body.bytes_count
        for number in itertools.count():
            if left <= 0:
                return
            chunk = await self._read(self._names.subject("body", body.file, number))
            if chunk is None:
                raise CallDamaged(f"a stored body is {left} bytes too short")
            left -= len(chunk)
            for start in range(0, len(chunk), chunk_bytes):
                yield chunk[start : start + chunk_bytes]

    async def _read(self, subject: str) -> bytes | None:
        stored = await self._connection.load_near(subject)
        if stored is None:  # that server may not have heard of it yet
            stored = await self._connection.load(subject)
        return None if stored is None else stored.data

    async def name(self, body: StoredBody | None, call_id: str) -> None:
        """Say which call is going to name this body."""
        if body is None or body.file is None:
            return
        try:
            await self._connection.publish(Write(self._names.subject("body", body.file, _REFERENCE), call_id.encode()))
        except QueueFull:  # a result is kept until there is room: its worker tries again
            await self._sign(body.file)
            raise

    async def drop(self, body: StoredBody | None) -> None:
        """Remove a body that no call names."""
        if body is not None and body.file is not None:
            await self._purge(body.file)

    async def _purge(self, name: str) -> None:
        await self._connection.purge(self._names.bodies, self._names.subject("body", name, "*"))

    async def walk_old(self) -> AsyncIterator[tuple[StoredBody, str | None]]:
        """Yield the bodies that have got nothing new for ORPHAN_S, and the call that was to name each, oldest first."""
        async for head in self._connection.walk(self._names.subject("body", "*", 0)):
            if _is_young(head):
                return
            name = head.subject.split(".")[2]
            last = await self._connection.load(self._names.subject("body", name, "*"))
            if last is None or _is_young(last):
                continue
            if last.subject.endswith(f".{_REFERENCE}"):  # it is whole
                yield StoredBody(0, None, name), last.data.decode()
            elif await self._connection.load(self._sign_of(name)) is None:
                yield StoredBody(0, None, name), await self._find_reference(name)

    async def _find_reference(self, name: str) -> str | None:
        """The call that was to name a body; a piece that was sent twice may have come behind that."""
        reference = await self._connection.load(self._names.subject("body", name, _REFERENCE))
        return None if reference is None else reference.data.decode()


def _is_young(stored: Stored) -> bool:
    return time.time() - stored.stored_s < ORPHAN_S


async def _end_writes(tasks: set[asyncio.Future[object]]) -> None:
    """End what writes pieces; one that is on its way already would arrive behind the purge of its body."""
    if tasks:
        await asyncio.wait(tasks, timeout=LAND_S)
    await end_tasks(tasks)
    await asyncio.gather(*tasks, return_exceptions=True)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for each in rest:
        yield each


async def _cut(source: AsyncIterator[bytes], size_bytes: int, limit_bytes: int | None) -> AsyncIterator[bytes]:
    """Yield the same bytes in pieces of one size, the last one shorter; BodyTooLarge beyond the limit."""
    held, total = bytearray(), 0
    async for chunk in source:
        held += chunk
        total += len(chunk)
        if limit_bytes is not None and total > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        while len(held) >= size_bytes:
            yield bytes(held[:size_bytes])
            del held[:size_bytes]
    if held:
        yield bytes(held)
