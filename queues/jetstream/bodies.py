"""Long bodies: cut into messages of a stream of their own, written and read a few at a time.

A body is safe before the call that names it is put.  `name` tells, beside the pieces, which call that is: a body that
is old and that no call names is what a crash has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator

from ...calls.model import QueueDamaged, QueueFull, QueueUnavailable, StoredBody
from ...watchdog import BodyTooLarge
from .connection import Connection, Write, end_tasks

INLINE_BYTES = 16 * 1024  # up to here a body is part of its message, and written again with the call's end
CHUNK_BYTES = 128 * 1024  # longer bodies are cut into messages of this size (max_payload is 1 MiB, seldom less)
CHUNKS_IN_FLIGHT_COUNT = 4  # of one body: bounds its memory
ORPHAN_S = 3600.0  # a stored body that no call names after this time is a crash's leftover
PAGE_COUNT = 200  # heads of bodies that are looked at together

_REFERENCE = "ref"


class Bodies:
    """The bodies that are stored apart."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._names = connection.names

    async def store(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None) -> StoredBody:
        """Make a body safe; up to INLINE_BYTES it stays in memory and becomes part of its message."""
        source = _once(chunks) if isinstance(chunks, bytes) else chunks
        inline_bytes = min(INLINE_BYTES, self._connection.client.max_payload // 8)
        writer: _Writer | None = None
        held, total = bytearray(), 0
        async with contextlib.AsyncExitStack() as stack:
            async for piece in source:
                total += len(piece)
                if limit_bytes is not None and total > limit_bytes:
                    raise BodyTooLarge(limit_bytes)
                if writer is None and len(held) + len(piece) > inline_bytes:
                    writer = _Writer(self._connection)
                    stack.push_async_callback(writer.discard)
                    await writer.write(held)
                    held = bytearray()
                if writer is None:
                    held += piece
                else:
                    await writer.write(piece)
            if writer is None:
                return StoredBody(total, bytes(held), None)
            await writer.finish()
            stack.pop_all()
        return StoredBody(total, None, writer.name)

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
                raise QueueDamaged(f"a stored body is {left} bytes too short")
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
        if body is not None and body.file is not None:
            await self._connection.publish(Write(self._names.subject("body", body.file, _REFERENCE), call_id.encode()))

    async def drop(self, body: StoredBody | None) -> None:
        """Remove a body that no call names."""
        if body is not None and body.file is not None:
            await self._connection.purge(self._names.bodies, self._names.subject("body", body.file, "*"))

    async def walk_old(self) -> AsyncIterator[tuple[StoredBody, str | None]]:
        """Yield the bodies that have been there for ORPHAN_S, and the call that was to name each, oldest first."""
        revision = 1
        while True:
            heads = await self._connection.read_batch(self._names.subject("body", "*", 0), revision, PAGE_COUNT)
            for head in heads:
                if time.time() - head.stored_s < ORPHAN_S:
                    return
                name = head.subject.split(".")[2]
                reference = await self._connection.load(self._names.subject("body", name, _REFERENCE))
                yield StoredBody(0, None, name), None if reference is None else reference.data.decode()
            if len(heads) < PAGE_COUNT:
                return
            revision = heads[-1].revision + 1


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


class _Writer:
    """A long body on its way into its stream, a few messages at a time; `finish` or `discard` ends it."""

    def __init__(self, connection: Connection) -> None:
        self.name = uuid.uuid4().hex
        self._connection = connection
        self._chunk_bytes = min(CHUNK_BYTES, connection.client.max_payload // 2)
        self._held = bytearray()
        self._number = itertools.count()
        self._tasks: set[asyncio.Task[int]] = set()

    async def write(self, piece: bytes | bytearray) -> None:
        """Take a piece; returns when there is room for more.  Raises the queue's errors."""
        view = memoryview(piece)
        while view:
            part = view[: self._chunk_bytes - len(self._held)]
            self._held += part
            view = view[len(part) :]
            if len(self._held) == self._chunk_bytes:
                await self._send()

    async def _send(self) -> None:
        subject = self._connection.names.subject("body", self.name, next(self._number))
        chunk, self._held = bytes(self._held), bytearray()
        self._tasks.add(asyncio.create_task(self._connection.publish(Write(subject, chunk))))
        while len(self._tasks) >= CHUNKS_IN_FLIGHT_COUNT:
            await self._settle(asyncio.FIRST_COMPLETED)

    async def _settle(self, when: str) -> None:
        done, self._tasks = await asyncio.wait(self._tasks, return_when=when)
        for task in done:
            task.result()

    async def finish(self) -> None:
        """Return when all of the body is acknowledged."""
        if self._held:
            await self._send()
        if self._tasks:
            await self._settle(asyncio.ALL_COMPLETED)

    async def discard(self) -> None:
        """Remove what was written; what cannot be removed now is an orphan that `sweep` finds."""
        await end_tasks(self._tasks)
        with contextlib.suppress(QueueUnavailable, QueueFull):
            names = self._connection.names
            await self._connection.purge(names.bodies, names.subject("body", self.name, "*"))
