"""A key-value bucket of NATS beside the queue: what all gateways of a cluster are to know alike.

    bucket = await Bucket.open(options)                # raises QueueUnavailable, CannotStart
    bucket.kept["functions.cat.openfaas-fn"].value     # the copy in memory
    await bucket.put("functions.cat.openfaas-fn", b"...")
    if await bucket.look(): ...                        # another process has changed something
    await bucket.close()

What is read is a copy in memory, which `look` brings up to date; so reading never waits for the servers, and goes on
when they are away.  What is written is acknowledged by them before a method returns, and only if the copy was up to
date for this key: of two processes that change the same at once, the later one is told so.

The bucket is `PREFIX-control`; `nats kv` shows it.  Values are not encrypted by us: a client that may read the
account's streams reads them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from nats.errors import Error as NatsError
from nats.js.api import KeyValueConfig, StorageType
from nats.js.errors import BadRequestError, BucketNotFoundError, KeyWrongLastSequenceError
from nats.js.kv import KeyValue

from ...watchdog import FaashoundError
from .connection import Connection, Options, connect, queue_error

T = TypeVar("T")

ANSWER_S = 10.0  # a leader that dies is replaced within 4 to 9 s


WRONG_SEQUENCE = 10071  # JSStreamWrongLastSequenceErr, which nats-py names in some cases only


class ChangedMeanwhile(FaashoundError):
    """Another gateway has changed the same thing."""

    status = 409


@dataclass(frozen=True, slots=True)
class Kept:
    """A value, and the revision of its key."""

    value: bytes
    revision: int


class Bucket:
    """The bucket, and the copy of it in memory.  Made by `open`; obligation: `close`."""

    def __init__(self, connection: Connection, bucket: KeyValue, stream: str) -> None:
        self._connection = connection
        self._bucket = bucket
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._sequence = 0
        self._read_seqs = 0, 0  # at the last look that read: of the stream, and the greatest that was read
        self.kept: dict[str, Kept] = {}  # what was deleted is not in it

    @classmethod
    async def open(cls, options: Options) -> Bucket:
        """Return the bucket, made if it is not there, with what is in it."""
        connection = await connect(options)
        try:
            context, name = connection.client.jetstream(timeout=ANSWER_S), f"{options.prefix}-control"
            config = KeyValueConfig(name, storage=StorageType.FILE, replicas=options.replicas, direct=True)
            try:
                bucket = await context.key_value(name)
            except BucketNotFoundError:
                with suppress(BadRequestError):  # another gateway has just made it
                    await context.create_key_value(config)
                bucket = await context.key_value(name)
            found = cls(connection, bucket, f"KV_{name}")
            await found.look()
        except (NatsError, TimeoutError) as error:
            await connection.close()
            raise queue_error(error) from error
        except BaseException:
            await connection.close()
            raise
        return found

    async def close(self) -> None:
        """Hang up."""
        with suppress(OSError):  # the connection is gone
            await self._connection.close()

    async def look(self) -> bool:
        """Bring the copy up to date; tell whether it was not.  Raises QueueUnavailable."""
        info = await self._ask(lambda: self._connection.client.jetstream().stream_info(self._stream))
        if info.state.last_seq == self._sequence:
            return False
        last_seq = info.state.last_seq
        found, read_seq = await self._ask(lambda: self._read(is_empty=not info.state.messages))
        changed = found != self.kept
        # A server that is behind the leader may have told us all that it has: not so if it tells the same again.
        is_all = not info.state.messages or (last_seq, read_seq) == self._read_seqs
        self.kept, self._sequence = found, last_seq if is_all else min(read_seq, last_seq)
        self._read_seqs = last_seq, read_seq
        return changed

    async def _read(self, *, is_empty: bool) -> tuple[dict[str, Kept], int]:
        """Return all that is kept, and the greatest revision there is.

        The watcher says None when that is all for now, but also where the first of it is still on its way behind the
        servers' answer that nothing waits to be sent.  So of a bucket that is not empty the last entry tells.
        """
        found, read_seq = dict[str, Kept](), 0
        watcher = await self._bucket.watchall()
        try:
            async with asyncio.timeout(ANSWER_S):
                async for entry in watcher:
                    if entry is not None:
                        read_seq = max(read_seq, entry.revision or 0)
                        if entry.operation is None:  # else it was deleted
                            found[entry.key] = Kept(entry.value or b"", entry.revision or 0)
                    is_last = is_empty if entry is None else not entry.delta
                    if is_last:
                        break
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call]
        return found, read_seq

    async def put(self, key: str, value: bytes) -> None:
        """Have a value under a key.  Raises ChangedMeanwhile, QueueUnavailable, QueueFull."""
        before = self.kept.get(key)
        if before is None:
            revision = await self._ask(lambda: self._bucket.create(key, value))
        else:
            revision = await self._ask(lambda: self._bucket.update(key, value, last=before.revision))
        self.kept = {**self.kept, key: Kept(value, revision)}

    async def delete(self, key: str) -> None:
        """Have nothing under a key.  Raises as `put`."""
        before = self.kept.get(key)
        if before is not None:
            await self._ask(lambda: self._bucket.delete(key, last=before.revision))
            self.kept = {each: kept for each, kept in self.kept.items() if each != key}

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await work()
        except (NatsError, TimeoutError) as error:
            if isinstance(error, KeyWrongLastSequenceError) or getattr(error, "err_code", None) == WRONG_SEQUENCE:
                raise ChangedMeanwhile("another gateway has changed this meanwhile; look again") from None
            raise queue_error(error) from error

    def wait_for(self, work: Awaitable[None]) -> None:
        """In a thread: return when the loop has done `work`; raises what it raises."""

        async def do() -> None:
            await work

        asyncio.run_coroutine_threadsafe(do(), self._loop).result()
