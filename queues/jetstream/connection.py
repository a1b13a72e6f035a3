"""One connection to the servers, and what is asked of JetStream through it.

Everything that can be answered comes back on one inbox: acknowledgements, direct reads and pulled messages.  So a
request is a future and a timer, not a subscription.

Contract: no write and no read waits longer than WRITE_S; then it raises QueueUnavailable.  Of a write that was on its
way when its time was up it is not known whether it happened, as with any network.  `publish` is tried again by itself,
and knows its own earlier try by what it wrote, so it writes once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from ...calls.model import QueueFull, QueueUnavailable
from ...watchdog import CannotStart, log, reason_of
from .subjects import Names

S = TypeVar("S")
T = TypeVar("T")
Json = dict[str, Any]

MIN_VERSION = (2, 11)  # of the servers: time-to-live of single messages, reads in batches
CONNECT_S = 10.0
WRITE_S = 10.0  # longest wait for an acknowledgement; a leader that dies is replaced within 4 to 9 s
TRY_S = 2.0  # of one try within it
RETRY_PAUSE_S = 0.1
REASONS_COUNT = 32  # why there is no connection, each told once
PAGE_COUNT = 200  # messages that are read together
STEP_COUNT = 64  # things that are asked for at the same time

EXPECTED_HEADER = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_SUBJECT_HEADER = "Nats-Expected-Last-Subject-Sequence-Subject"
TTL_HEADER = "Nats-TTL"

_FULL_CODES = frozenset({10002, 10023, 10028, 10047})  # resources of account, server, memory, storage
_STORE_FAILED = 10077  # "maximum bytes exceeded" among other reasons
_LAST_SEQUENCE, _SEQUENCE_UNDER_WAY = 10071, 10164  # the second: a write is still on its way through the cluster
_NO_PEERS = 10005  # for a stream or a consumer: a server of the cluster is not up yet
_NOTHING_THERE = (10037, 10043, 10057)  # no message found; message delete failed: it is not there


class RevisionChanged(Exception):
    """Another process has written the subject since it was read."""


@dataclass(frozen=True, slots=True)
class Options:
    """Where the servers are, how to log in (arguments of `Client.connect`), and what the streams are to be."""

    servers: tuple[str, ...]
    login: Mapping[str, Any] = field(default_factory=dict, repr=False)
    prefix: str = "faashound"
    replicas: int = 1
    max_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of a stream; `more_count` messages that match stand behind it, where that was asked for."""

    subject: str
    revision: int
    headers: Mapping[str, str]
    data: bytes
    stored_s: float
    more_count: int = 0


@dataclass(frozen=True, slots=True)
class Write:
    """A message to be stored; with `expected`, only behind that revision of its subject, or of `among`."""

    subject: str
    payload: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: int | None = None
    among: str | None = None

    def fields(self) -> dict[str, str]:
        """Return all header fields."""
        fields = dict(self.headers)
        if self.expected is not None:
            fields[EXPECTED_HEADER] = str(self.expected)
            if self.among is not None:
                fields[EXPECTED_SUBJECT_HEADER] = self.among
        return fields


def queue_error(error: Exception) -> QueueFull | QueueUnavailable:
    """Return what an error of NATS means to the user of the queue."""
    if isinstance(error, APIError):
        full = error.err_code in _FULL_CODES or (
            error.err_code == _STORE_FAILED and "maximum" in (error.description or "")
        )
        if full:
            return QueueFull(f"NATS has no room for the queue: {error.description}")
        return QueueUnavailable(f"NATS refuses: {error.description} ({error.err_code})")
    return QueueUnavailable(f"NATS cannot be used: {_reason_of(error)}")


def _reason_of(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else reason_of(error)


def _may_pass(error: Exception) -> bool:
    """Tell whether an error may be over in a moment: no leader yet, no answer, a server that starts."""
    if isinstance(error, APIError):
        return error.err_code == _NO_PEERS or (error.code == 503 and isinstance(queue_error(error), QueueUnavailable))
    return isinstance(error, TimeoutError | NoRespondersError | NatsError)


def parse_status(message: Msg) -> str | None:
    """Return the status of a message that is none, such as 404 for a pull from an empty stream."""
    return message.headers.get("Status") if message.headers and not message.data else None


def parse_stored(message: Msg) -> Stored:
    """Return the message that a direct read has brought."""
    headers = message.headers or {}
    return Stored(
        headers["Nats-Subject"],
        int(headers["Nats-Sequence"]),
        headers,
        message.data,
        _parse_time(headers["Nats-Time-Stamp"]),
        int(headers.get("Nats-Num-Pending", 0)),
    )


def _parse_time(text: str) -> float:
    return datetime.fromisoformat(f"{text[:19]}+00:00").timestamp()


async def gather_in_steps(work: Callable[[S], Awaitable[T]], items: Iterable[S]) -> list[T]:
    """Return what `work` makes of each item, STEP_COUNT of them at the same time."""
    left, found = list(items), list[T]()
    for start in range(0, len(left), STEP_COUNT):
        found += await asyncio.gather(*map(work, left[start : start + STEP_COUNT]))
    return found


async def end_tasks(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks until they have ended: asyncio.wait_for, which nats-py uses, can lose a cancellation (bpo-37658)."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=RETRY_PAUSE_S)


class Reporter:
    """Tells the log how the connection fares, and those in `on_return` that it is back."""

    def __init__(self) -> None:
        self.last = "no answer"
        self._told: deque[str] = deque(maxlen=REASONS_COUNT)  # several servers fail for reasons of their own, in turns
        self.closing = False
        self.on_return: list[Callable[[], None]] = []

    async def on_error(self, error: Exception) -> None:
        """An error of the client that no call of ours gets."""
        self.last = _reason_of(error)
        if self.last not in self._told:
            log.warning(f"NATS: {self.last}")
            self._told.append(self.last)

    async def on_disconnect(self) -> None:
        """The connection is gone."""
        if not self.closing:
            log.warning("the connection to NATS is lost; trying again until there is one")

    async def on_reconnect(self) -> None:
        """There is one again."""
        self.last = "no answer"
        self._told.clear()
        log.info("connected to NATS again")
        for told in self.on_return:
            told()


async def connect(options: Options) -> Connection:
    """Return a connection that comes back by itself whenever it is lost.  Raises QueueUnavailable, CannotStart."""
    client, reporter = NatsClient(), Reporter()
    try:
        async with asyncio.timeout(CONNECT_S):
            await client.connect(
                list(options.servers),
                error_cb=reporter.on_error,
                disconnected_cb=reporter.on_disconnect,
                reconnected_cb=reporter.on_reconnect,
                name="faashound",
                connect_timeout=2,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]  # it goes to asyncio.sleep
                max_reconnect_attempts=-1,
                ping_interval=5,
                max_outstanding_pings=2,
                **options.login,
            )
    except ImportError as error:
        raise CannotStart("NKeys and creds files need the package nkeys: pip install 'faashound[nats]'") from error
    except (NatsError, OSError, TimeoutError, ValueError) as error:
        with contextlib.suppress(NatsError, OSError):
            await client.close()
        reason = reporter.last if isinstance(error, TimeoutError) else reason_of(error)
        raise QueueUnavailable(f"cannot connect to NATS at {','.join(options.servers)}: {reason}") from error
    version = client.connected_server_version
    if (version.major, version.minor) < MIN_VERSION:
        await client.close()
        raise QueueUnavailable(f"NATS {version.major}.{version.minor} is too old; needed: 2.11 or newer")
    connection = Connection(client, Names(options.prefix), reporter)
    await connection.start()
    return connection


class Connection:
    """A connection to the servers, and the names on them."""

    def __init__(self, client: NatsClient, names: Names, reporter: Reporter) -> None:
        """Not for callers: use `connect`."""
        self.client = client
        self.names = names
        self.reporter = reporter
        self.on_pulled: Callable[[Msg], None] = lambda _: None
        self.commit_count = 0
        self._numbers = itertools.count()  # of inboxes
        self._loop = asyncio.get_running_loop()
        self.troubled_s = float("-inf")  # when something could last not be done, by the loop's clock
        self._inbox = client.new_inbox()
        self._handlers: dict[str, Callable[[Msg], None]] = {}

    async def start(self) -> None:
        """Listen to what is answered."""
        await self.client.subscribe(f"{self._inbox}.*", cb=self._on_answer, pending_bytes_limit=1 << 30)

    @property
    def healthy(self) -> bool:
        """Whether we are connected, and nothing has failed just now."""
        return bool(self.client.is_connected) and self._loop.time() - self.troubled_s > WRITE_S

    async def close(self) -> None:
        """Hang up."""
        self.reporter.closing = True
        with contextlib.suppress(NatsError):
            await self.client.close()

    # -- questions and answers

    async def _on_answer(self, message: Msg) -> None:
        if not message.subject.startswith(self._inbox):  # a pulled message keeps the subject that it was stored with
            self.on_pulled(message)
            return
        handler = self._handlers.get(message.subject.rpartition(".")[2])
        if handler is not None:
            handler(message)

    def listen(self, handler: Callable[[Msg], None]) -> str:
        """Return a subject whose messages go to `handler`, until `unlisten`."""
        token = str(next(self._numbers))
        self._handlers[token] = handler
        return f"{self._inbox}.{token}"

    def unlisten(self, inbox: str) -> None:
        """What still comes is dropped."""
        self._handlers.pop(inbox.rpartition(".")[2], None)

    async def request(
        self, subject: str, payload: bytes, timeout_s: float = TRY_S, headers: Mapping[str, str] | None = None
    ) -> Msg:
        """Return the answer.  Raises TimeoutError, NoRespondersError, NatsError."""
        future: asyncio.Future[Msg] = self._loop.create_future()
        token = str(next(self._numbers))

        def on_answer(message: Msg) -> None:
            if not future.done():
                future.set_result(message)

        def on_silence() -> None:
            if not future.done():
                future.set_exception(TimeoutError())

        self._handlers[token] = on_answer
        timer = self._loop.call_later(timeout_s, on_silence)
        try:
            await self.client.publish(subject, payload, f"{self._inbox}.{token}", dict(headers) if headers else None)
            answer = await future
        finally:
            timer.cancel()
            del self._handlers[token]
        if answer.headers and answer.headers.get("Status") == "503":
            raise NoRespondersError
        return answer

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """Hear what is said on a subject.  Raises QueueUnavailable."""
        try:
            return await self.client.subscribe(subject, cb=callback)
        except NatsError as error:
            raise queue_error(error) from error

    async def tell(self, subject: str, payload: bytes = b"", reply: str = "") -> None:
        """Say something that is not sure to be heard, and not worth to be tried again."""
        with contextlib.suppress(NatsError):
            await self.client.publish(subject, payload, reply)

    async def call_api(
        self, operation: str, payload: Mapping[str, Any] | None = None, timeout_s: float = TRY_S
    ) -> Json:
        """Return what JetStream answers; raises APIError besides what `request` raises."""
        data = b"" if payload is None else json.dumps(payload).encode()
        return _parse_answer(await self.request(f"$JS.API.{operation}", data, timeout_s))

    async def insist(self, operation: str, payload: Mapping[str, Any] | None = None) -> Json:
        """As `call_api`, tried again while that may help."""
        return await self.with_retries(lambda timeout_s: self.call_api(operation, payload, timeout_s))

    async def with_retries(self, work: Callable[[float], Awaitable[T]]) -> T:
        """Return what `work(timeout_s)` returns, tried again while that may help, up to WRITE_S.

        Raises QueueUnavailable and QueueFull; NotFoundError and other errors of ours pass.
        """
        deadline_s = self._loop.time() + WRITE_S
        while True:
            left_s = deadline_s - self._loop.time()
            try:
                if not self.client.is_connected:
                    raise QueueUnavailable("no NATS server can be reached")
                return await work(min(TRY_S, left_s))
            except NotFoundError:
                raise
            except QueueUnavailable as error:
                problem: Exception = error
            except (NatsError, TimeoutError) as error:
                problem = queue_error(error)
                if not _may_pass(error):
                    self.troubled_s = self._loop.time()
                    raise problem from error
            if self.client.is_closed or deadline_s - self._loop.time() <= RETRY_PAUSE_S:
                self.troubled_s = self._loop.time()
                raise problem
            await asyncio.sleep(RETRY_PAUSE_S)

    # -- streams

    async def publish(self, write: Write) -> int:
        """Store a message; return its revision.  Raises RevisionChanged, QueueUnavailable, QueueFull."""
        fields, tries = write.fields(), 0

        async def send(timeout_s: float) -> int:
            nonlocal tries
            tries += 1
            try:
                answer = _parse_ack(await self.request(write.subject, write.payload, timeout_s, fields))
            except APIError as error:
                if error.err_code not in (_LAST_SEQUENCE, _SEQUENCE_UNDER_WAY):
                    raise
                if tries == 1 and error.err_code == _LAST_SEQUENCE:
                    raise RevisionChanged from error
                return await self._find_own(write)
            return answer

        revision = await self.with_retries(send)
        self.commit_count += 1
        return revision

    async def _find_own(self, write: Write) -> int:
        """Return the revision of an earlier try that was heard after all.

        Raises RevisionChanged if another process was faster.

        No two processes write the same bytes in the same place, unless they want the same: clocks and owners are in
        them.  QueueUnavailable while a write is on its way through the cluster, and it is not known whose it will be.
        """
        stored = await self.load(write.among or write.subject)
        if stored is not None and (stored.subject, stored.data) == (write.subject, write.payload):
            return stored.revision
        if (0 if stored is None else stored.revision) == write.expected:
            raise QueueUnavailable("a write to this subject is still on its way through the cluster")
        raise RevisionChanged

    def _stream_of(self, subject: str) -> str:
        kind = subject.split(".", 2)[1]
        if kind in ("call", "callback", "timer"):
            return self.names.queue
        return self.names.bodies if kind == "body" else self.names.records

    async def load(self, subject: str) -> Stored | None:
        """Return the last message of a subject, or of a filter, as the stream's leader has it; or None."""
        stream = self._stream_of(subject)

        async def read(timeout_s: float) -> Stored | None:
            async with asyncio.timeout(timeout_s):
                found = await self.client.jetstream().get_last_msg(stream, subject)
            time_s = found.time.timestamp() if found.time is not None else 0.0
            return Stored(found.subject or "", found.seq or 0, found.headers or {}, found.data or b"", time_s)

        return await self._find(stream, read)

    async def load_near(self, subject: str) -> Stored | None:
        """Return the last message of a subject as some server has it, which may be a little behind; or None."""
        stream = self._stream_of(subject)
        question = json.dumps({"last_by_subj": subject}).encode()

        async def read(timeout_s: float) -> Stored | None:
            answer = await self.request(f"$JS.API.DIRECT.GET.{stream}", question, timeout_s)
            if parse_status(answer) == "404":
                return None
            return parse_stored(answer)

        return await self._find(stream, read)

    async def _find(self, stream: str, read: Callable[[float], Awaitable[Stored | None]]) -> Stored | None:
        try:
            return await self.with_retries(read)
        except NotFoundError as error:
            if error.err_code == 10059:  # the stream, not the message
                raise QueueUnavailable(f"the stream {stream} is gone") from error
            return None

    async def walk(self, subject: str, revision: int = 1) -> AsyncIterator[Stored]:
        """Yield the messages that match a filter, from `revision` on, in their order, without holding them all."""
        while page := await self.read_batch(subject, revision, PAGE_COUNT):
            for stored in page:
                yield stored
            revision = page[-1].revision + 1

    async def read_batch(self, subject: str, revision: int, count: int = PAGE_COUNT) -> list[Stored]:
        """Return up to `count` messages that match a filter, from `revision` on, in their order."""
        question = json.dumps({"seq": max(1, revision), "batch": count, "next_by_subj": subject}).encode()
        stream = self._stream_of(subject)

        async def read(timeout_s: float) -> list[Stored]:
            found: list[Stored] = []
            ended: asyncio.Future[str | None] = self._loop.create_future()

            def on_message(message: Msg) -> None:
                status = parse_status(message)
                if status is None:
                    found.append(parse_stored(message))
                elif not ended.done():
                    ended.set_result(status)

            inbox = self.listen(on_message)
            try:
                await self.client.publish(f"$JS.API.DIRECT.GET.{stream}", question, inbox)
                async with asyncio.timeout(timeout_s):
                    status = await ended
            finally:
                self.unlisten(inbox)
            if status == "503":
                raise NoRespondersError
            return found

        return await self.with_retries(read)

    async def count(self, subject: str) -> int:
        """Return how many messages match a filter, without reading them."""
        first = await self.read_batch(subject, 1, 1)
        return first[0].more_count + 1 if first else 0

    async def erase(self, stream: str, revision: int) -> None:
        """Remove one message, unless it is gone already."""
        try:
            await self.insist(f"STREAM.MSG.DELETE.{stream}", {"seq": revision, "no_erase": True})
        except NotFoundError:
            pass
        except QueueUnavailable as error:
            cause = error.__cause__
            if not isinstance(cause, APIError) or cause.err_code not in _NOTHING_THERE:
                raise

    async def purge(self, stream: str, subject: str, keep: int = 0) -> None:
        """Remove all messages of a subject, which may have wildcards, but the last `keep`."""
        await self._of_stream(stream, f"STREAM.PURGE.{stream}", {"filter": subject} | ({"keep": keep} if keep else {}))

    async def info(self, stream: str) -> Json:
        """Return what the servers know of a stream."""
        return await self._of_stream(stream, f"STREAM.INFO.{stream}")

    async def _of_stream(self, stream: str, operation: str, payload: Mapping[str, Any] | None = None) -> Json:
        """As `insist`; the stream is there, or there is no queue."""
        try:
            return await self.insist(operation, payload)
        except NotFoundError as error:
            raise QueueUnavailable(f"the stream {stream} is gone") from error


_ACK = re.compile(rb'\{"stream":"[^"]*",\s*"seq":(\d+)')  # a quarter of the time that JSON takes


def _parse_ack(message: Msg) -> int:
    """Return the revision that a write has got; raises APIError."""
    found = _ACK.match(message.data)
    return int(found[1]) if found else int(_parse_answer(message)["seq"])


def _parse_answer(message: Msg) -> Json:
    answer: Json = json.loads(message.data)
    error = answer.get("error")
    if error is not None:
        if error.get("code") == 503:
            raise ServiceUnavailableError(**error)
        APIError.from_error(error)
    return answer
