"""The bodies of an open queue: stored before a row names them, read back in pieces, always off the event loop.

What is short stays in memory and goes into a row; what is long goes into a file (body_files.py).  A payload finds room
or is refused.  A result waits for room, as its function has run and must not run again: one with a known length takes
all its room at once; the others, once they have found none, are written one after another, lest none has all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from ...calls.model import INLINE_BYTES, QueueDamaged, QueueFull, QueueUnavailable, ResultLost, StoredBody
from ...watchdog import BodyTooLarge, FaashoundError, log
from .body_files import BodyFile, list_old_bodies, open_body_file, read_excerpt, unlink_bodies, unlink_orphans
from .directory import SpoolDirectory
from .errors import DISK_FULL, NO_MEMORY, disk_error
from .limits import FILE_CHUNK_BYTES, ROOM_PAUSE_S
from .reserve import Reserve

T = TypeVar("T")


class Bodies:
    """Stored bodies; `tidy` is to give room back that the journal has."""

    def __init__(
        self,
        directory: SpoolDirectory,
        reserve: Reserve,
        threads: ThreadPoolExecutor,
        tidy: Callable[[], Awaitable[None]],
    ) -> None:
        self._directory = directory
        self._reserve = reserve
        self._tidy = tidy
        self._threads = threads
        self._result_lock = asyncio.Lock()  # of results that have found no room
        self._closed = False

    def refuse(self) -> None:
        """Begin nothing more."""
        self._closed = True

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Disk work that is not SQLite's, off the event loop; a cancelled caller still waits for its end."""
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except OSError as error:
            raise disk_error(error) from error
        except MemoryError as error:
            raise QueueUnavailable(NO_MEMORY) from error
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    async def store(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody:
        """See `Spool.store_body`."""
        if isinstance(chunks, bytes) and len(chunks) <= INLINE_BYTES:
            return _inline(chunks, limit_bytes)
        return await self._store(_pieces(chunks), limit_bytes, BodyFile(self._directory.bodies_fd), self._write_body)

    async def store_result(
        self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody:
        """See `Spool.store_result`."""
        if isinstance(chunks, bytes) and len(chunks) <= INLINE_BYTES:
            return _inline(chunks, limit_bytes)
        if length is not None and limit_bytes is not None and length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        turn = contextlib.AsyncExitStack()  # from a wait until there is ample room; not if all of it is taken at once
        waited = has_turn = False

        async def write(work: Callable[[], None]) -> None:
            nonlocal waited, has_turn
            try:
                await self._write_result(work)
            except (QueueFull, QueueUnavailable) as error:
                if not waited:
                    waited = True
                    log.warning(f"a result waits to be stored: {error}")
                has_turn = has_turn or (not length and await self._take_turn(turn))
                await self._wait_and_write(work, length or 0)
            if has_turn and self._reserve.is_ample:  # the function may take hours over its rest
                await turn.aclose()
                has_turn = False

        async with turn:
            try:
                file = BodyFile(self._directory.bodies_fd, length or 0)
                stored = await self._store(_pieces(chunks), limit_bytes, file, write)
            except FaashoundError as error:
                if isinstance(error, BodyTooLarge) or not waited or self._closed:
                    raise
                raise ResultLost(f"the answer broke off while it waited for room in the queue: {error}") from error
        if waited:
            log.info("a result that waited to be stored is stored")
        return stored

    async def _take_turn(self, turn: contextlib.AsyncExitStack) -> bool:
        """Wait for the turn of results; False if none is needed, since there is ample room by now."""
        while not self._closed and not self._reserve.is_ample:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_PAUSE_S):
                    await turn.enter_async_context(self._result_lock)
                return True
        return False

    async def _write_body(self, work: Callable[[], None]) -> None:
        """A body that is on its way when the disk gets full is refused as well: its call could not be put."""
        if not self._reserve.has_room(FILE_CHUNK_BYTES):
            await self._tidy()
            if not self._reserve.has_room(FILE_CHUNK_BYTES):
                raise QueueFull(DISK_FULL)
        await self._in_thread(work)

    async def _write_result(self, work: Callable[[], None], needed_bytes: int | None = None) -> None:
        """Do `work`; for `needed_bytes`, which found no room, with the results' half of the reserve if that helps."""

        def write() -> None:
            if needed_bytes is not None and self._reserve.free_bytes + self._reserve.whole_bytes // 2 >= needed_bytes:
                self._reserve.release(0.5)
            if not self._reserve.has_half:  # the journal's half is let go of just now: it is not for us
                raise QueueFull(DISK_FULL)
            work()

        await self._in_thread(write)

    async def _wait_and_write(self, work: Callable[[], None], length: int) -> None:
        """Do `work`, which goes on where it stopped, until it succeeds."""
        while True:
            try:
                return await self._write_result(work, length)
            except (QueueFull, QueueUnavailable):
                if self._closed:
                    raise
            await asyncio.sleep(ROOM_PAUSE_S)

    async def _store(
        self,
        source: AsyncIterator[bytes],
        limit_bytes: int | None,
        file: BodyFile,
        write: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> StoredBody:
        """Collect a body, by `write` in `file` if it is long; `write` has the file's methods run in a thread."""
        pieces: list[bytes] = []
        total = held = 0
        begun = False
        async with contextlib.AsyncExitStack() as stack:
            async for piece in source:
                pieces.append(piece)
                total += len(piece)
                held += len(piece)
                if limit_bytes is not None and total > limit_bytes:
                    raise BodyTooLarge(limit_bytes)
                if held > (FILE_CHUNK_BYTES if begun else INLINE_BYTES):
                    if not begun:
                        stack.push_async_callback(self._in_thread, file.discard)
                        await write(file.create)
                        begun = True
                    file.add(pieces)
                    await write(file.write)
                    pieces, held = [], 0
            if not begun:
                return StoredBody(total, b"".join(pieces), None)
            file.add(pieces)
            await write(file.write)
            await write(file.keep)
            stack.pop_all()
        return StoredBody(total, None, file.name)

    async def open(self, body: StoredBody, chunk_bytes: int = FILE_CHUNK_BYTES) -> AsyncGenerator[bytes, None]:
        """See `Spool.open_body`."""
        if body.file is None:
            inline = body.inline or b""
            for start in range(0, len(inline), chunk_bytes):
                yield inline[start : start + chunk_bytes]
            return
        left = body.bytes_count
        file = await self._in_thread(partial(open_body_file, self._directory, body.file, body.bytes_count))
        with contextlib.closing(file):
            while piece := await self._in_thread(partial(file.read, chunk_bytes)):
                left -= len(piece)
                yield piece
        if left:
            raise QueueDamaged(f"the file of a stored body is {left} bytes too short")

    async def drop(self, files: Collection[str]) -> int:
        """Remove files that nothing names; return how many there were.

        What cannot be removed is told and left: the commit behind which they go stands, and its caller is to know.
        """
        try:
            return await self._in_thread(partial(unlink_bodies, self._directory.bodies_fd, files)) if files else 0
        except (QueueFull, QueueUnavailable) as error:  # then `sweep` finds them
            log.warning(f"the file of a body that nothing names cannot be removed: {error}")
            return 0

    async def read_excerpt(self, body: StoredBody) -> bytes:
        """Return how a result in a file begins."""
        if body.file is None:
            raise AssertionError("a body that is in memory is its own excerpt")
        return await self._in_thread(partial(read_excerpt, self._directory, body.file, body.bytes_count))

    async def list_old(self, before_s: float) -> list[str]:
        """Return the files not written to since `before_s`."""
        return await self._in_thread(partial(list_old_bodies, self._directory.bodies_fd, before_s))

    async def drop_orphans(self, files: Collection[str]) -> int:
        """Remove files that no row names, except those that are being written; return how many."""
        return await self._in_thread(partial(unlink_orphans, self._directory.bodies_fd, files))


def _inline(body: bytes, limit_bytes: int | None) -> StoredBody:
    """A body that is short enough for a row."""
    if limit_bytes is not None and len(body) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    return StoredBody(len(body), body, None)


def _pieces(chunks: AsyncIterator[bytes] | bytes) -> AsyncIterator[bytes]:
    return _once(chunks) if isinstance(chunks, bytes) else chunks


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
