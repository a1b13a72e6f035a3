"""The durable queue of one machine: a directory that gateways and workers share, with no broker between them.

Use:

    spool = await Spool.open(Path("spool"))
    call = await spool.put(NewCall(...))                  # on disk when this returns
    owner = await spool.enlist()                          # a worker's name, good for as long as it lives
    for lease in await spool.claim(["faas-request"], owner, lease_s=60, limit=16):
        await spool.finish(lease, RunEnd(...))            # or retry, release, finish_cancelled
    await spool.close()

Contract:
- What `put`, `finish` and the other writes have returned for is on disk (WAL, `synchronous=FULL`), and so is every
  body file they name.
- Delivery is at least once. A lease is an owner and a fence; whoever holds an older fence gets `LeaseLost` and must
  drop its result. A lease ends with its owner's life (at once, by a file lock) or with its deadline.
- Within a function calls run in the order (due_s, id); between functions they take turns.
- A write either happens whole or raises: `QueueFull` (no room), `QueueUnavailable` (any other trouble with the disk),
  `QueueDamaged`. After the first two the queue goes on by itself as soon as the disk lets it.
- On a full disk only new calls are refused. What ends calls (claim, finish, cancel, purge, sweep) uses the reserve, and
  a result that finds no room waits for it: a queue that has filled its own disk drains.

It refuses to: start on a file that is damaged, foreign or newer than this program (`set_aside` is the operator's
remedy, never ours); empty or overwrite such a file; drop a dead letter or an undelivered callback unasked.

In the directory (0700): `spool.sqlite3` and its `-wal` and `-shm`; `bodies/`, what is longer than `INLINE_BYTES`;
`owners/`, one locked file per live worker; `bells/`, one datagram socket per open Spool; `writer.lock`; `token`;
`reserve`, which has no content but its size.

A Spool belongs to the event loop it was opened on, and does not survive a fork: locks and connections would be shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import json
import operator
import os
import pwd
import queue
import re
import secrets
import shlex
import socket
import sqlite3
import stat
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, fields, replace
from enum import Enum, IntFlag
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeVar, cast

from .addresses import parse_address, parse_numeric_host
from .names import FunctionName
from .watchdog import BodyTooLarge, FaashoundError, log

T = TypeVar("T")

# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------

INLINE_BYTES = 64 * 1024  # up to here a row is cheaper than a file (sqlite.org/intern-v-extern-blob.html)
EXCERPT_BYTES = 4 * 1024  # of the last response, kept as long as the call for whoever asks why it failed
HISTORY_COUNT = 50  # attempts remembered per call
GROUP_COUNT = 512  # writes in one commit; bounds how long one process keeps the others waiting
ROWS_COUNT = 64  # calls that one statement queues; longer ones take longer to prepare, and save nothing more
STEP_COUNT = 500  # rows or pages that housekeeping touches in one commit, for the same reason
SPARE_PAGE_COUNT = 256  # free pages left in the file for the next calls (1 MiB)
TURN_S = 8.0  # for the lock that processes take turns by
TURN_PAUSE_S = 0.0002  # between two tries
BUSY_S = 5.0  # only strangers (a backup, a shell) can hold SQLite's lock: ours take turns by `writer.lock`
IDLE_S = 30.0  # longest sleep without a look at the queue: bounds the harm of a wall clock that is set
SET_BACK_S = 60.0  # a wall clock that is set back by less only delays what is due
LOST_WAIT_S = 60.0  # longest wait of a callback whose workers die
RECLAIM_S = 1.0  # shortest time between two looks for dead owners
LETTER_BYTES = 1024  # what a dead letter without bodies is reckoned to take
ORPHAN_S = 3600.0  # a stored body that no row names after this time is a crash's leftover
SETTLED_NS = 1_000_000_000  # a directory not changed for so long shows its next change by another time stamp
FILE_CHUNK_BYTES = 256 * 1024  # bodies go to and from files in pieces of this size, one thread hop each
RESERVE_BYTES = 8 << 20  # kept free for ending calls: a hundred of the largest results that a row holds
RESERVE_PART = 8  # of a small disk, the part that the reserve takes at most
SLACK_PART = 4  # of the reserve, the part that is to be free besides: for the rows that are written beside bodies
PAGE_BYTES = 4096  # of SQLite's file
TOLD_S = 60.0  # between two lines about the same disk
ROOM_PAUSE_S = 1.0  # before a result that has found no room is tried again
SHORT_STEP_COUNT = 32  # the same while the reserve is in use, which has to hold all that a commit changes

# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


class QueueUnavailable(FaashoundError):
    """The queue cannot be used now: no access, read-only, an I/O error, closed. Nothing was accepted."""

    status = 503


class QueueFull(FaashoundError):
    """The disk is full. Nothing was accepted; room is noticed without a restart."""

    status = 507


class TooManyQueued(FaashoundError):
    """The function has as many calls waiting as it may have. Nothing was accepted."""

    status = 429


class TooManyBytesQueued(TooManyQueued):
    """The bodies of the function's calls that wait are as long as they may be. Nothing was accepted."""

    status = 507


class ResultLost(FaashoundError):
    """The answer of a function broke off while it waited for room: the function has run, and must not run again."""

    status = 507


class QueueDamaged(FaashoundError):
    """The queue's file is damaged, foreign, or newer than this program. It has been left as it is."""

    status = 503


class CallExists(FaashoundError):
    """The call id is in use."""

    status = 409


class KeyReused(FaashoundError):
    """The idempotency key stands for a call of this function with another request."""

    status = 422


class CallUnknown(FaashoundError):
    """No call has this id (any more)."""

    status = 404


class CallFinished(FaashoundError):
    """The call has ended: there is nothing left to cancel."""

    status = 409


class CallNotDead(FaashoundError):
    """Only a dead letter, or a dead callback, can be queued again."""

    status = 409


class LeaseLost(FaashoundError):
    """Someone else has the call by now: drop the result, write nothing more."""

    status = 409


# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------

Headers = tuple[tuple[str, str], ...]
Kind = Literal["call", "callback"]


class State(Enum):
    """Where a call stands. The last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


FINAL = frozenset({State.DONE, State.DEAD, State.CANCELLED, State.EXPIRED})
CALLS_BACK = FINAL - {State.CANCELLED}  # the ends that a callback URL is told of: the caller who cancelled knows


class CallbackState(Enum):
    """Where the delivery of a call's outcome stands."""

    PENDING = "pending"
    RUNNING = "running"
    DELIVERED = "delivered"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class StoredBody:
    """A body that is already safe: `inline` bytes, or the name of a `file` below `bodies/`; never both."""

    bytes_count: int
    inline: bytes | None
    file: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One run of a function, or one delivery: wall-clock seconds, HTTP status or None, what went wrong or None."""

    started_s: float
    finished_s: float
    status: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Callback:
    """The delivery of a call's outcome to its `callback_url`; `attempts` counts those begun."""

    state: CallbackState
    attempts: int
    due_s: float
    status: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class NewCall:
    """A call as it was accepted. Times are seconds since the epoch; `headers` are latin-1 text, as received.

    `body_digest` is what `idempotency_key` stands for besides the function: a SHA-256 in hexadecimal, over all that
    makes it the same request (method, path, query, content type, body). None without a key.
    """

    id: str
    function: FunctionName
    queue: str
    method: str
    path: str
    query: str
    headers: Headers
    body: StoredBody
    callback_url: str | None
    due_s: float
    expires_s: float | None
    idempotency_key: str | None
    accepted_s: float
    body_digest: str | None = None


@dataclass(frozen=True, slots=True)
class Call(NewCall):
    """Everything known of a call.

    `attempts` counts runs begun, also those whose worker died. `status`, `error` and `excerpt` (the beginning of the
    response) are of the last attempt; `result` is None again once `sweep` has dropped it; `history` holds the last
    `HISTORY_COUNT` attempts, oldest first.
    """

    state: State = State.QUEUED
    attempts: int = 0
    started_s: float | None = None
    finished_s: float | None = None
    status: int | None = None
    error: str | None = None
    duration_s: float | None = None
    cancel_requested: bool = False
    result: StoredBody | None = None
    result_headers: Headers = ()
    excerpt: bytes | None = None
    callback: Callback | None = None
    history: tuple[Attempt, ...] = ()


def check_same_request(earlier: Call, call: NewCall) -> None:
    """Raise KeyReused unless `call`, which has the key of `earlier`, is the same request.

    What has no digest, as calls of earlier versions, is the same as any.
    """
    if None not in (earlier.body_digest, call.body_digest) and earlier.body_digest != call.body_digest:
        raise KeyReused(
            f"this idempotency key came with another request to {call.function.short} before; allowed: the same"
            " method, path, query, content type and body, or a new key"
        )


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a call, or to deliver its callback, until it is renewed no more. `fence` only ever grows."""

    call: Call
    kind: Kind
    owner: str
    fence: int


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended by itself, DONE or DEAD: the answer's `status`, and what is kept of the answer.

    If the call has a callback URL, its callback is due from `callback_due_s` on; None means at once.
    """

    state: State
    attempt: Attempt
    status: int | None
    duration_s: float
    result: StoredBody | None = None
    result_headers: Headers = ()
    callback_due_s: float | None = None

    @property
    def event(self) -> Event:
        """What has happened to the call; AssertionError for a state that no run ends in by itself."""
        if self.state not in _ENDS:
            raise AssertionError(f"a run ends done or dead, not {self.state.value}")
        return _ENDS[self.state]


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a worker learns by renewing: ids whose lease is gone, and ids that someone wants cancelled."""

    lost: frozenset[str]
    cancelled: frozenset[str]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What a queue takes at most.

    `reserve_bytes` of its disk are kept free for ending calls, an eighth of a small disk; 0: none; None: what other
    processes keep is used, and nothing is added to it. `calls_count` and `bytes_count` are what one function may have
    queued and running; None: no limit.
    """

    reserve_bytes: int | None = RESERVE_BYTES
    calls_count: int | None = None
    bytes_count: int | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """What `sweep` leaves at most of what would wait for ever.

    `queue_age_s`: how long a call may have been due without being run; then it expires. `dead_s` and `dead_bytes`: how
    long dead letters and calls with a dead callback are kept, and how much of them, the newest first.
    """

    queue_age_s: float = float("inf")
    dead_s: float = float("inf")
    dead_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """What one `sweep` removed."""

    expired_count: int
    result_count: int
    call_count: int
    file_count: int
    freed_bytes: int
    dead_count: int = 0  # of dead letters, and of calls whose callback is dead


@dataclass(frozen=True, slots=True)
class Stats:
    """The queue in figures. Pending callbacks include those on their way; `commit_count` is of this Spool alone.

    `waiting` are the calls that are queued and the callbacks that are pending, by the name of their queue.
    `free_bytes` of the queue's disk, and `reserve_bytes` of the room that is kept for ending calls; None: not known.
    """

    by_state: Mapping[State, int]
    by_function: Mapping[tuple[FunctionName, State], int]
    waiting: Mapping[str, int]
    oldest_due_age_s: float | None
    callback_pending_count: int
    callback_dead_count: int
    commit_count: int
    free_bytes: int | None = None
    reserve_bytes: int | None = None


# --------------------------------------------------------------------------------------------------------------------
# States
#
# A call and its callback are two small machines; this is their law, and nothing below changes a state except through
# it. The callback's machine starts when the call ends in one of `CALLS_BACK`, in the same commit. Who holds a lease is
# not a state: a RUNNING row has exactly one row in `leases`, and losing that row is the event HAND_BACK.
# --------------------------------------------------------------------------------------------------------------------


class Event(Enum):
    """What can happen to a call or to a callback."""

    CLAIM = "claim"
    SUCCEED = "succeed"
    RETRY = "retry"
    HAND_BACK = "hand back"
    GIVE_UP = "give up"
    CANCEL = "cancel"
    STOP = "stop"
    EXPIRE = "expire"
    REQUEUE = "requeue"


TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (State.QUEUED, Event.CLAIM): State.RUNNING,
    (State.QUEUED, Event.CANCEL): State.CANCELLED,
    (State.QUEUED, Event.EXPIRE): State.EXPIRED,
    (State.RUNNING, Event.CANCEL): State.RUNNING,  # a request: the worker ends it with STOP, or the function ends first
    (State.RUNNING, Event.SUCCEED): State.DONE,
    (State.RUNNING, Event.GIVE_UP): State.DEAD,
    (State.RUNNING, Event.STOP): State.CANCELLED,
    (State.RUNNING, Event.RETRY): State.QUEUED,
    (State.RUNNING, Event.HAND_BACK): State.QUEUED,
    (State.DEAD, Event.REQUEUE): State.QUEUED,
}

CALLBACK_TRANSITIONS: Mapping[tuple[CallbackState, Event], CallbackState] = {
    (CallbackState.PENDING, Event.CLAIM): CallbackState.RUNNING,
    (CallbackState.RUNNING, Event.SUCCEED): CallbackState.DELIVERED,
    (CallbackState.RUNNING, Event.RETRY): CallbackState.PENDING,
    (CallbackState.RUNNING, Event.HAND_BACK): CallbackState.PENDING,
    (CallbackState.RUNNING, Event.GIVE_UP): CallbackState.DEAD,
    (CallbackState.DEAD, Event.REQUEUE): CallbackState.PENDING,
}


EXPIRED_STATUS = 504  # of a call that no attempt has given a status: its time was up before there was an answer
EXPIRED_ERROR = "expired before it was run"

_ENDS: Mapping[State, Event] = {State.DONE: Event.SUCCEED, State.DEAD: Event.GIVE_UP}  # how a run ends by itself


def next_state(state: State, event: Event) -> State:
    """Where `event` takes a call; AssertionError for a pair that is not in `TRANSITIONS`."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise AssertionError(f"a call that is {state.value} cannot {event.value}") from None


def next_callback_state(state: CallbackState, event: Event) -> CallbackState:
    """Where `event` takes a callback; AssertionError for a pair that is not in `CALLBACK_TRANSITIONS`."""
    try:
        return CALLBACK_TRANSITIONS[state, event]
    except KeyError:
        raise AssertionError(f"a callback that is {state.value} cannot {event.value}") from None


def lost_wait_s(attempts: int) -> float:
    """How long a callback waits whose worker has died with it, at its attempt number `attempts`.

    Not at all after the first, since workers are restarted; then longer each time, as it may be what kills them. It is
    the worker that gives it up in the end, by the attempts that were begun.
    """
    return min(2.0 ** (min(attempts, 60) - 2), LOST_WAIT_S) if attempts > 1 else 0.0


# --------------------------------------------------------------------------------------------------------------------
# Names: of queues, and of the queue that a program is to use
# --------------------------------------------------------------------------------------------------------------------

_QUEUE_NAME = re.compile(r"[a-zA-Z0-9](?:[-_.a-zA-Z0-9]{0,61}[a-zA-Z0-9])?", re.ASCII)
QUEUE_NAME_HELP = "1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', with a letter or digit at both ends"


def parse_queue_name(text: str) -> str:
    """The name of a queue, such as `faas-request`; ValueError, saying what is allowed, for anything else."""
    if not _QUEUE_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a queue's name; allowed: {QUEUE_NAME_HELP}")
    return text


def parse_queue_names(text: str) -> tuple[str, ...]:
    """The names in `text`, separated by commas, each once; ValueError for a bad one."""
    return tuple(dict.fromkeys(parse_queue_name(word.strip()) for word in text.split(",")))


# The authority of a URL that has been checked when it was accepted (RFC 3986 3.2): a whole parser takes seven times
# as long, for each call that asks for a callback.
_AUTHORITY = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[^][:/?#@\\]+?)\.?(?::(?P<port>[0-9]+))?(?:[/?#]|$)", re.ASCII
)
_PORTS = {"http": "80", "https": "443"}


def destination_of(url: str) -> str:
    """The flow of a callback: its receiver as `host:port`, in lower case; "" for text that is no http(s) URL.

    All callbacks to one receiver take turns as one. A receiver with many names is as many destinations: which of them
    lead to one machine only a resolver could tell.
    """
    found = _AUTHORITY.match(url.lower())
    return f"{_one_spelling(found['host'])}:{found['port'] or _PORTS[found['scheme']]}" if found else ""


def _one_spelling(host: str) -> str:
    """The host as it is, or the address that it spells: of many spellings, each would else have its own turn."""
    try:
        address = parse_address(host[1:-1]) if host.startswith("[") else parse_numeric_host(host)
    except ValueError:
        return host
    if address is None:
        return host
    return f"[{address}]" if address.version == 6 else str(address)


# --------------------------------------------------------------------------------------------------------------------
# Call ids
#
# UUIDv7, RFC 9562 section 5.7, kept monotonic by section 6.2 method 2: within one millisecond the 74 random bits grow
# by a random step, and when they overflow, or the clock is set back, the time stamp runs ahead of the clock instead.
# --------------------------------------------------------------------------------------------------------------------

_RANDOM_BITS = 74
_id_lock = threading.Lock()
_last_id: tuple[int, int] = (0, 0)


class _Randomness:
    """Random bits of the kernel, fetched for some hundred ids at once; never given out twice, also not after a fork."""

    FETCHED_BYTES = 4096

    def __init__(self) -> None:
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self._bytes = b""
        self._used = 0

    def bits(self, count: int) -> int:
        end = self._used + (count + 7) // 8
        if end > len(self._bytes):
            self._bytes, self._used, end = os.urandom(self.FETCHED_BYTES), 0, (count + 7) // 8
        taken = int.from_bytes(self._bytes[self._used : end], "big")
        self._used = end
        return taken >> -count % 8


_randomness = _Randomness()


def new_call_id() -> str:
    """A UUIDv7 greater than every one this process has made before; safe to call from any thread."""
    global _last_id
    with _id_lock:
        _last_id = stamp_ms, tail = _next_id(_last_id, time.time_ns() // 1_000_000)
    text = f"{stamp_ms:012x}{0x7000 | tail >> 62:04x}{0b10 << 62 | tail & (1 << 62) - 1:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def _next_id(last: tuple[int, int], now_ms: int) -> tuple[int, int]:
    stamp_ms, tail = last
    if now_ms <= stamp_ms:
        tail += 1 + _randomness.bits(32)
        if tail < 1 << _RANDOM_BITS:
            return stamp_ms, tail
        now_ms = stamp_ms + 1
    return now_ms, _randomness.bits(_RANDOM_BITS - 1)  # the top bit stays free: room to grow within the millisecond


# --------------------------------------------------------------------------------------------------------------------
# Schema
#
# `calls` holds what changes and what is searched for, in rows short enough that changing a state does not copy a body;
# `requests`, `results` and `attempts` hang on its integer key. Every partial index exists for one question:
#
#   calls_queued      which functions have work due, and which call is the first of each? Delayed calls sort behind the
#                     due ones of their function, so they cost nothing; a million rows cost as much as ten.
#   calls_expiring    which queued calls are past their `expires_s`?
#   calls_idempotent  has this key been seen for this function?
#   calls_state       lists and counts by state and function
#   calls_finished    which rows may retention drop? (never dead letters: they are not in it)
#   calls_dead        which dead letters are past their `keep_dead`?
#   callbacks_ready   which destinations have a delivery due, and which is the first of each? As `calls_queued`, but
#                     only what has been found due is in it (`ready`): receivers that are down for hours, thousands of
#                     them, are not passed over by each claim.
#   callbacks_due     which deliveries fall due next?
#
# A lease's primary key is its fence: AUTOINCREMENT never gives a number twice, so an old fence matches nothing.
# --------------------------------------------------------------------------------------------------------------------

APPLICATION_ID = 0x66616173  # "faas", in the file's header
SQLITE_VERSION = (3, 38, 0)  # STRICT tables, and json_each always there

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE calls (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        function TEXT NOT NULL,
        queue TEXT NOT NULL,
        state TEXT NOT NULL,
        due_s REAL NOT NULL,
        expires_s REAL,
        idempotency_key TEXT,
        accepted_s REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        started_s REAL,
        finished_s REAL,
        status INTEGER,
        error TEXT,
        duration_s REAL,
        cancel_requested INTEGER NOT NULL DEFAULT 0
    ) STRICT;
    CREATE INDEX calls_queued ON calls (queue, function, due_s, id) WHERE state = 'queued';
    CREATE INDEX calls_expiring ON calls (expires_s) WHERE state = 'queued' AND expires_s IS NOT NULL;
    CREATE UNIQUE INDEX calls_idempotent ON calls (function, idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE INDEX calls_state ON calls (state, function);
    CREATE INDEX calls_finished ON calls (finished_s) WHERE state IN ('done', 'cancelled', 'expired');

    CREATE TABLE requests (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        method TEXT NOT NULL,
        path TEXT NOT NULL,
        query TEXT NOT NULL,
        callback_url TEXT,
        headers TEXT NOT NULL,
        bytes_count INTEGER NOT NULL,
        file TEXT,
        inline BLOB
    ) STRICT;
    CREATE INDEX requests_file ON requests (file) WHERE file IS NOT NULL;

    CREATE TABLE results (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        stored_s REAL NOT NULL,
        headers TEXT NOT NULL,
        excerpt BLOB,
        bytes_count INTEGER,
        file TEXT,
        inline BLOB
    ) STRICT;
    CREATE INDEX results_file ON results (file) WHERE file IS NOT NULL;
    CREATE INDEX results_stored ON results (stored_s) WHERE bytes_count IS NOT NULL;

    CREATE TABLE attempts (
        seq INTEGER NOT NULL REFERENCES calls ON DELETE CASCADE,
        number INTEGER NOT NULL,
        started_s REAL NOT NULL,
        finished_s REAL NOT NULL,
        status INTEGER,
        error TEXT,
        PRIMARY KEY (seq, number)
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE callbacks (
        seq INTEGER PRIMARY KEY REFERENCES calls ON DELETE CASCADE,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        due_s REAL NOT NULL,
        status INTEGER,
        error TEXT
    ) STRICT;
    CREATE INDEX callbacks_pending ON callbacks (due_s) WHERE state = 'pending';
    CREATE INDEX callbacks_state ON callbacks (state);

    CREATE TABLE leases (
        fence INTEGER PRIMARY KEY AUTOINCREMENT,
        seq INTEGER NOT NULL UNIQUE REFERENCES calls ON DELETE CASCADE,
        kind TEXT NOT NULL,
        owner TEXT NOT NULL,
        boot TEXT NOT NULL,
        until_s REAL NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE clock (boot TEXT NOT NULL, offset_s REAL NOT NULL) STRICT;
    """,
    """
    ALTER TABLE callbacks ADD COLUMN queue TEXT NOT NULL DEFAULT '';
    ALTER TABLE callbacks ADD COLUMN destination TEXT NOT NULL DEFAULT '';
    ALTER TABLE callbacks ADD COLUMN ready INTEGER NOT NULL DEFAULT 0;
    UPDATE callbacks SET
        queue = (SELECT queue FROM calls WHERE calls.seq = callbacks.seq),
        destination = (SELECT destination_of(callback_url) FROM requests WHERE requests.seq = callbacks.seq);
    DROP INDEX callbacks_pending;
    CREATE INDEX callbacks_ready ON callbacks (queue, destination, due_s) WHERE state = 'pending' AND ready = 1;
    CREATE INDEX callbacks_due ON callbacks (ready, due_s) WHERE state = 'pending';
    """,
    """
    UPDATE calls SET function = function || '.openfaas-fn' WHERE instr(function, '.') = 0;
    """,
    """
    ALTER TABLE requests ADD COLUMN body_digest TEXT;
    """,
    # What each function has waiting, that is queued or running, so that a put need not count.
    """
    CREATE TABLE waiting (function TEXT PRIMARY KEY, calls INTEGER NOT NULL, bytes INTEGER NOT NULL)
    STRICT, WITHOUT ROWID;
    INSERT INTO waiting SELECT function, count(*), sum(bytes_count) FROM calls JOIN requests USING (seq)
        WHERE state IN ('queued', 'running') GROUP BY function;
    CREATE INDEX calls_dead ON calls (finished_s) WHERE state = 'dead';
    """,
)

# --------------------------------------------------------------------------------------------------------------------
# Statements
#
# The loose index scans: `min(function)` beyond the last one is one descent of the b-tree, where DISTINCT would read
# every row. INDEXED BY, since without statistics the planner takes `calls_state` for as good; if an index is ever
# missing, it is an error rather than a slow queue.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """What waits in flows, calls by function or callbacks by destination: the statements that find what is due.

    `flows`, of one queue behind `:after`: those with something due at `:now_s`. `due`, of a queue and a flow (?1, ?2):
    the first ?4 rows that are due at ?3.
    """

    flows: str
    due: str


def _build_line(index: str, waits: str, flow: str, order: str, unless: str = "") -> Line:
    """The statements for the table that `index` is on: an index over queue, `flow` and `order`, of what `waits`."""
    rows = f"{index.partition('_')[0]} INDEXED BY {index} WHERE {waits} AND queue"
    first = f"SELECT min({flow}) FROM {rows} = :queue AND {flow}"
    flows = f"""
    WITH RECURSIVE found (flow) AS (
        {first} > :after
        UNION ALL
        SELECT ({first} > found.flow) FROM found WHERE found.flow IS NOT NULL
    )
    SELECT flow FROM found WHERE flow IS NOT NULL AND EXISTS (
        SELECT 1 FROM {rows} = :queue AND {flow} = found.flow AND due_s <= :now_s)
"""
    due = f"SELECT seq FROM {rows} = ?1 AND {flow} = ?2 AND due_s <= ?3 {unless} ORDER BY {order} LIMIT ?4"
    return Line(flows, due)


CALLS_LINE = _build_line(
    "calls_queued", "state = 'queued'", "function", "due_s, id", "AND (expires_s IS NULL OR expires_s > ?3)"
)
CALLBACKS_LINE = _build_line("callbacks_ready", "state = 'pending' AND ready = 1", "destination", "due_s, seq")

SQL_NEXT_DUE = """
    WITH RECURSIVE line (queue) AS (
        SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued'
        UNION ALL
        SELECT (SELECT min(queue) FROM calls INDEXED BY calls_queued WHERE state = 'queued' AND queue > line.queue)
        FROM line WHERE line.queue IS NOT NULL
    ), lane (queue, function) AS (
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = line.queue)
        FROM line WHERE line.queue IS NOT NULL
        UNION ALL
        SELECT queue, (SELECT min(function) FROM calls INDEXED BY calls_queued
            WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function > lane.function)
        FROM lane WHERE lane.function IS NOT NULL
    )
    SELECT min((SELECT min(due_s) FROM calls INDEXED BY calls_queued
        WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function = lane.function AND due_s > :after_s))
    FROM lane WHERE lane.function IS NOT NULL
"""

SQL_ADD_WAITING = """
    INSERT INTO waiting (function, calls, bytes) VALUES (?, ?, ?)
    ON CONFLICT (function) DO UPDATE SET calls = calls + excluded.calls, bytes = bytes + excluded.bytes
"""

SQL_STALE = f"""
    {SQL_NEXT_DUE[: SQL_NEXT_DUE.rindex("SELECT min((")]}
    SELECT seq FROM lane CROSS JOIN calls INDEXED BY calls_queued
    WHERE state = 'queued' AND calls.queue = lane.queue AND calls.function = lane.function AND due_s < :before_s
    LIMIT :limit
"""

SQL_OLD_LETTERS = """
    SELECT seq, id, function FROM calls INDEXED BY calls_dead WHERE state = 'dead' AND finished_s <= :before_s
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = calls.seq AND state IN ('pending', 'running'))
    LIMIT :limit
"""

SQL_OLD_DEAD_CALLBACKS = """
    SELECT seq, id, function FROM callbacks INDEXED BY callbacks_state CROSS JOIN calls USING (seq)
    WHERE callbacks.state = 'dead' AND calls.state <> 'dead' AND finished_s <= :before_s LIMIT :limit
"""

SQL_LETTER_SIZES = """
    SELECT finished_s, requests.bytes_count + coalesce(results.bytes_count, 0)
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq)
    WHERE seq IN (SELECT seq FROM calls INDEXED BY calls_dead WHERE state = 'dead')
    OR seq IN (SELECT seq FROM callbacks INDEXED BY callbacks_state WHERE state = 'dead')
    ORDER BY finished_s DESC
"""

SQL_EXPIRING = """
    SELECT seq FROM calls INDEXED BY calls_expiring
    WHERE state = 'queued' AND expires_s IS NOT NULL AND expires_s <= :now_s ORDER BY expires_s LIMIT :limit
"""

SQL_OPEN_CALLBACK = """
    INSERT INTO callbacks (seq, state, due_s, queue, destination, ready)
    SELECT seq, 'pending', ?2, queue, destination_of(callback_url), ?3 FROM calls JOIN requests USING (seq)
    WHERE seq = ?1 AND callback_url IS NOT NULL
"""

SQL_READY_CALLBACKS = """
    UPDATE callbacks SET ready = 1 WHERE seq IN (
        SELECT seq FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 0 AND due_s <= :now_s ORDER BY due_s LIMIT :limit)
"""

SQL_NEXT_CALLBACK = """
    SELECT min(due_s) FROM (
        SELECT min(due_s) AS due_s FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 0 AND due_s > :after_s
        UNION ALL
        SELECT min(due_s) FROM callbacks INDEXED BY callbacks_due
        WHERE state = 'pending' AND ready = 1 AND due_s > :after_s)
"""

_SQL_CALL = """
    SELECT calls.*, requests.method, {long}, requests.body_digest, requests.bytes_count, requests.file,
        results.bytes_count AS result_bytes_count, results.file AS result_file,
        callbacks.state AS callback_state, callbacks.attempts AS callback_attempts, callbacks.due_s AS callback_due_s,
        callbacks.status AS callback_status, callbacks.error AS callback_error
    FROM calls JOIN requests USING (seq) LEFT JOIN results USING (seq) LEFT JOIN callbacks USING (seq)
"""
SQL_CALL = _SQL_CALL.format(
    long="requests.path, requests.query, requests.callback_url, requests.headers, requests.inline,"
    " results.headers AS result_headers, results.inline AS result_inline,"
    f" coalesce(results.excerpt, substr(results.inline, 1, {EXCERPT_BYTES})) AS excerpt"
)
# A list leaves out what callers may make long: a thousand calls with 40 KB of header fields each would be 40 MB.
SQL_CALL_LISTED = _SQL_CALL.format(
    long="'' AS path, '' AS query, NULL AS callback_url, NULL AS headers, NULL AS inline,"
    " NULL AS result_headers, NULL AS result_inline, NULL AS excerpt"
)

SQL_ENDED = """
    SELECT value FROM json_each(?)
    WHERE NOT EXISTS (SELECT 1 FROM calls WHERE id = value AND state IN ('queued', 'running'))
"""

SQL_FILES = """
    SELECT file FROM requests WHERE seq = :seq AND file IS NOT NULL
    UNION ALL SELECT file FROM results WHERE seq = :seq AND file IS NOT NULL
"""

SQL_OLD_RESULTS = """
    SELECT seq, stored_s, file FROM results WHERE bytes_count IS NOT NULL AND stored_s < :before_s
    AND (stored_s, seq) > (:after_s, :after_seq)
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = results.seq AND callbacks.state <> 'delivered')
    ORDER BY stored_s, seq LIMIT :limit
"""

SQL_OLD_CALLS = """
    SELECT seq, finished_s FROM calls INDEXED BY calls_finished
    WHERE state IN ('done', 'cancelled', 'expired') AND finished_s < :before_s
    AND (finished_s, seq) > (:after_s, :after_seq)
    AND NOT EXISTS (SELECT 1 FROM callbacks WHERE callbacks.seq = calls.seq AND callbacks.state <> 'delivered')
    ORDER BY finished_s, seq LIMIT :limit
"""


class Ring(IntFlag):
    """What a bell says: why someone may want to look at the queue."""

    NOTHING = 0
    WORK = 1
    FINISHED = 2
    CANCEL = 4
    ALL = 7


@dataclass(slots=True)
class _Transaction:
    """What an operation works with: the connection, inside a transaction, and whom to ring once that is on disk."""

    db: sqlite3.Connection
    ring: Ring = Ring.NOTHING
    short: bool = False  # the reserve is in use: give room back where it costs nobody a result
    waiting: dict[str, list[int]] = field(default_factory=dict)  # how calls and bytes of a function change by this

    def count_waiting(self, function: str, calls_count: int, bytes_count: int) -> None:
        """So many calls, with so many bytes, wait more, or less if negative; written once for a group."""
        change = self.waiting.setdefault(function, [0, 0])
        change[0] += calls_count
        change[1] += bytes_count

    def write_waiting(self) -> None:
        """To be called before the commit."""
        self.db.executemany(SQL_ADD_WAITING, [(str(name), *change) for name, change in self.waiting.items()])

    @property
    def step_count(self) -> int:
        return SHORT_STEP_COUNT if self.short else STEP_COUNT


_encode_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each call


def _headers_text(headers: Headers) -> str:
    return _encode_json(headers) if headers else "[]"


def _parse_headers(text: str | None) -> Headers:
    return tuple((name, value) for name, value in json.loads(text)) if text and text != "[]" else ()


def _parse_call(row: sqlite3.Row, history: tuple[Attempt, ...]) -> Call:
    return Call(
        id=row["id"],
        function=FunctionName(row["function"]),
        queue=row["queue"],
        method=row["method"],
        path=row["path"],
        query=row["query"],
        headers=_parse_headers(row["headers"]),
        body=StoredBody(row["bytes_count"], row["inline"], row["file"]),
        callback_url=row["callback_url"],
        due_s=row["due_s"],
        expires_s=row["expires_s"],
        idempotency_key=row["idempotency_key"],
        accepted_s=row["accepted_s"],
        body_digest=row["body_digest"],
        state=State(row["state"]),
        attempts=row["attempts"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        status=row["status"],
        error=row["error"],
        duration_s=row["duration_s"],
        cancel_requested=bool(row["cancel_requested"]),
        result=_parse_result(row),
        result_headers=_parse_headers(row["result_headers"]),
        excerpt=row["excerpt"],
        callback=_parse_callback(row),
        history=history,
    )


def _parse_result(row: sqlite3.Row) -> StoredBody | None:
    if row["result_bytes_count"] is None:
        return None
    return StoredBody(row["result_bytes_count"], row["result_inline"], row["result_file"])


def _parse_callback(row: sqlite3.Row) -> Callback | None:
    if row["callback_state"] is None:
        return None
    return Callback(
        CallbackState(row["callback_state"]),
        row["callback_attempts"],
        row["callback_due_s"],
        row["callback_status"],
        row["callback_error"],
    )


_accepted_values = operator.attrgetter(*(field.name for field in fields(NewCall)))  # Call begins with the same fields


def _accepted(call: NewCall) -> Call:
    """The Call that a NewCall has just become."""
    return Call(*_accepted_values(call))


# --------------------------------------------------------------------------------------------------------------------
# Operations
#
# Plain functions on a transaction (`tx`) or, for reads, on a connection. They look before they write: a FaashoundError
# leaves nothing half done. They touch no file and keep nothing in memory, so that the writer may run one again.
# --------------------------------------------------------------------------------------------------------------------


def _rows(db: sqlite3.Connection, sql: str, values: Sequence[object]) -> list[sqlite3.Row]:
    cursor = db.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, values).fetchall()


def _load(db: sqlite3.Connection, seq: int) -> Call:
    (row,) = _rows(db, SQL_CALL + "WHERE calls.seq = ?", (seq,))
    return _parse_call(row, _history(db, seq))


def _history(db: sqlite3.Connection, seq: int) -> tuple[Attempt, ...]:
    rows = db.execute("SELECT started_s, finished_s, status, error FROM attempts WHERE seq = ? ORDER BY number", (seq,))
    return tuple(itertools.starmap(Attempt, rows))


def _find(db: sqlite3.Connection, call_id: str) -> tuple[int, State]:
    row = db.execute("SELECT seq, state FROM calls WHERE id = ?", (call_id,)).fetchone()
    if row is None:
        raise CallUnknown(f"no call has the id {call_id}")
    return row[0], State(row[1])


def _get(db: sqlite3.Connection, call_id: str) -> Call | None:
    for row in _rows(db, SQL_CALL + "WHERE calls.id = ?", (call_id,)):
        return _parse_call(row, _history(db, row["seq"]))
    return None


@lru_cache
def _sql_put_calls(count: int) -> str:
    columns = "id, function, queue, state, due_s, expires_s, idempotency_key, accepted_s"
    return f"INSERT INTO calls ({columns}) VALUES " + ", ".join(["(?, ?, ?, 'queued', ?, ?, ?, ?)"] * count)


def _calls_values(call: NewCall) -> tuple[object, ...]:
    times = call.due_s, call.expires_s, call.idempotency_key, call.accepted_s
    return call.id, str(call.function), call.queue, *times  # an exact str spares sqlite3 a search for adapters


@lru_cache
def _sql_put_requests(count: int) -> str:
    columns = "seq, method, path, query, callback_url, headers, bytes_count, file, inline, body_digest"
    return f"INSERT INTO requests ({columns}) VALUES " + ", ".join(["(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"] * count)


def _requests_values(seq: int, put: _Put) -> tuple[object, ...]:
    call, body = put.call, put.call.body
    address = call.method, call.path, call.query, call.callback_url
    return seq, *address, put.headers, body.bytes_count, body.file, body.inline, call.body_digest


@dataclass(frozen=True, slots=True)
class _Put:
    """A call on its way into the queue; run by itself, or with others by `_put_all`."""

    call: NewCall
    headers: str
    limits: QueueLimits

    def __call__(self, tx: _Transaction) -> Call | None:
        """None: the call is in the queue. A Call: this is the one that its idempotency key stands for."""
        call = self.call
        if call.idempotency_key is not None:
            key = call.function, call.idempotency_key
            row = tx.db.execute("SELECT seq FROM calls WHERE function = ? AND idempotency_key = ?", key).fetchone()
            if row is not None:
                earlier = _load(tx.db, row[0])
                check_same_request(earlier, call)
                return earlier
        waiting = _check_limits(tx.db, call.function, 1, call.body.bytes_count, self.limits)
        cursor = tx.db.execute(_sql_put_calls(1) + " ON CONFLICT (id) DO NOTHING", _calls_values(call))
        if cursor.rowcount == 0:
            raise CallExists(f"the call id {call.id} is in use")
        tx.db.execute(_sql_put_requests(1), _requests_values(cast(int, cursor.lastrowid), self))
        tx.db.execute(SQL_ADD_WAITING, waiting)
        tx.ring |= Ring.WORK
        return None


def _check_limits(
    db: sqlite3.Connection, function: FunctionName, calls_count: int, bytes_count: int, limits: QueueLimits
) -> tuple[FunctionName, int, int]:
    """What `SQL_ADD_WAITING` adds for so many new calls of a function; TooManyQueued if it may not have them."""
    row = db.execute("SELECT calls, bytes FROM waiting WHERE function = ?", (function,)).fetchone()
    calls, total_bytes = row or (0, 0)
    if limits.calls_count is not None and calls + calls_count > limits.calls_count:
        raise TooManyQueued(f"{function} has {calls} calls waiting; max_queued allows {limits.calls_count}")
    if limits.bytes_count is not None and total_bytes + bytes_count > limits.bytes_count:
        raise TooManyBytesQueued(
            f"the calls of {function} that wait have {total_bytes} bytes, this one {bytes_count};"
            f" max_queued_bytes allows {limits.bytes_count}"
        )
    return function, calls_count, bytes_count


def _put_all(tx: _Transaction, puts: Sequence[_Put]) -> None:
    """Queues calls without an idempotency key, all or none; TooManyQueued, sqlite3.IntegrityError if an id is in use.

    Python gives its lock away for each row that a statement yields or is run for, and a busy event loop takes its time
    to hand it back: so there is a statement for many rows, of few different lengths, as each has to be prepared.
    """
    bodies: defaultdict[FunctionName, list[int]] = defaultdict(list)
    for put in puts:
        bodies[put.call.function].append(put.call.body.bytes_count)
    for function, counts in bodies.items():
        tx.db.execute(SQL_ADD_WAITING, _check_limits(tx.db, function, len(counts), sum(counts), puts[0].limits))
    done_count = 0
    while done_count < len(puts):
        count = min(1 << (len(puts) - done_count).bit_length() - 1, ROWS_COUNT)
        chunk = puts[done_count : done_count + count]
        calls = itertools.chain.from_iterable(_calls_values(put.call) for put in chunk)
        last = tx.db.execute(_sql_put_calls(count), tuple(calls)).lastrowid
        # Each row got a number one above the greatest (sqlite.org/autoinc.html), and nobody else is writing.
        seqs = itertools.count(cast(int, last) - count + 1)
        requests = itertools.chain.from_iterable(map(_requests_values, seqs, chunk))
        tx.db.execute(_sql_put_requests(count), tuple(requests))
        done_count += count
    tx.ring |= Ring.WORK


@dataclass(frozen=True, slots=True)
class _Claimant:
    """Who claims, when, and until when: the wall clock decides what is due, the boot clock when the lease ends."""

    owner: str
    now_s: float
    boot: str
    until_s: float


def _lease(tx: _Transaction, seq: int, kind: Kind, claimant: _Claimant) -> Lease:
    cursor = tx.db.execute(
        "INSERT INTO leases (seq, kind, owner, boot, until_s) VALUES (?, ?, ?, ?, ?)",
        (seq, kind, claimant.owner, claimant.boot, claimant.until_s),
    )
    if cursor.lastrowid is None:
        raise AssertionError("an INSERT that succeeded has a row id")
    return Lease(_load(tx.db, seq), kind, claimant.owner, cursor.lastrowid)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How much a claim may take: from which queues, how many in all, and how many of each flow named in `room`."""

    queues: tuple[str, ...]
    limit: int
    room: Mapping[str, int]


_Flow = tuple[str, str]  # queue; function or destination
_Claimed = tuple[list[Lease], _Flow]  # and the flow that was served last


def _claim(tx: _Transaction, wanted: _Wanted, last: _Flow, claimant: _Claimant) -> _Claimed:
    """Takes calls in turns, beginning behind the flow that was served `last`."""
    if _expire(tx, claimant.now_s) == tx.step_count:
        tx.ring |= Ring.WORK  # more are waiting to be expired, and may hide live ones: come again
    picked = _pick(tx.db, CALLS_LINE, wanted, last, claimant.now_s)
    state = next_state(State.QUEUED, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE calls SET state = ?, attempts = attempts + 1, started_s = ? WHERE seq = ?",
        [(state, claimant.now_s, seq) for seq, _ in picked],
    )
    leases = [_lease(tx, seq, "call", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def _claim_callbacks(tx: _Transaction, wanted: _Wanted, last: _Flow, claimant: _Claimant) -> _Claimed:
    """Takes callbacks in turns, as `_claim` takes calls."""
    ready = {"now_s": claimant.now_s, "limit": tx.step_count}
    if tx.db.execute(SQL_READY_CALLBACKS, ready).rowcount == tx.step_count:
        tx.ring |= Ring.WORK  # more are due than one step may touch: come again
    picked = _pick(tx.db, CALLBACKS_LINE, wanted, last, claimant.now_s)
    state = next_callback_state(CallbackState.PENDING, Event.CLAIM).value
    tx.db.executemany(
        "UPDATE callbacks SET state = ?, attempts = attempts + 1 WHERE seq = ?", [(state, seq) for seq, _ in picked]
    )
    leases = [_lease(tx, seq, "callback", claimant) for seq, _ in picked]
    return leases, picked[-1][1] if picked else last


def _pick(db: sqlite3.Connection, line: Line, wanted: _Wanted, last: _Flow, now_s: float) -> list[tuple[int, _Flow]]:
    """The rows to claim, one from each flow in turn, round after round, until the limit or the work is reached."""
    flows = list(itertools.islice(_walk_flows(db, line, wanted, last, now_s), wanted.limit))
    if not flows:
        return []

    def due(flow: _Flow, count: int) -> list[tuple[int, _Flow]]:
        count = min(count, wanted.room.get(flow[1], count))
        return [(seq, flow) for (seq,) in db.execute(line.due, (*flow, now_s, count))]

    share = -(-wanted.limit // len(flows))
    heads = {flow: due(flow, share) for flow in flows}
    if sum(map(len, heads.values())) < wanted.limit:  # some flows are short: the others get their part
        heads = {flow: due(flow, wanted.limit) if len(head) == share else head for flow, head in heads.items()}
    left = dict(wanted.room)
    picked: list[tuple[int, _Flow]] = []
    for entry in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*heads.values()))):
        name = entry[1][1]
        if left.setdefault(name, wanted.limit) > 0 and len(picked) < wanted.limit:
            left[name] -= 1  # one function, or destination, in two queues shares one room
            picked.append(entry)
    return picked


def _walk_flows(db: sqlite3.Connection, line: Line, wanted: _Wanted, last: _Flow, now_s: float) -> Iterator[_Flow]:
    """Flows with work due, in a ring that begins behind `last` and ends with it."""
    queues = sorted(set(wanted.queues))
    later = [(name, "", None) for name in queues if name > last[0]]
    earlier = [(name, "", None) for name in queues if name < last[0]]
    own = last[0] in queues
    segments = [(last[0], last[1], None)] * own + later + earlier + [(last[0], "", last[1])] * own
    for queue_name, after, upto in segments:
        rows = db.execute(line.flows, {"queue": queue_name, "after": after, "now_s": now_s})
        for (flow,) in rows:
            if upto is not None and flow > upto:
                break
            if wanted.room.get(flow, 1) > 0:
                yield queue_name, flow


def _expire(tx: _Transaction, now_s: float) -> int:
    rows = tx.db.execute(SQL_EXPIRING, {"now_s": now_s, "limit": tx.step_count}).fetchall()
    return _end_expired(tx, rows, now_s, EXPIRED_ERROR)


def _end_expired(tx: _Transaction, rows: Sequence[tuple[int]], now_s: float, error: str) -> int:
    state = next_state(State.QUEUED, Event.EXPIRE).value
    tx.db.executemany(
        "UPDATE calls SET state = ?, finished_s = ?, status = coalesce(status, ?), error = coalesce(error, ?)"
        " WHERE seq = ?",
        [(state, now_s, EXPIRED_STATUS, error, seq) for (seq,) in rows],
    )
    _count_rows(tx, [seq for (seq,) in rows], -1)
    for (seq,) in rows:
        _open_callback(tx, seq, now_s)
        tx.ring |= Ring.FINISHED
    return len(rows)


def _open_callback(tx: _Transaction, seq: int, due_s: float, ready: bool = True) -> None:
    """A call has ended: its outcome is to be delivered, if that was asked for."""
    if tx.db.execute(SQL_OPEN_CALLBACK, (seq, due_s, ready)).rowcount:
        tx.ring |= Ring.WORK


STALE_ERROR = "it was not run within max_queue_age"


def _expire_stale(tx: _Transaction, now_s: float, before_s: float) -> int:
    """Ends calls that have been due since `before_s`: their queue has no worker, or none that keeps up."""
    rows = tx.db.execute(SQL_STALE, {"before_s": before_s, "limit": tx.step_count}).fetchall()
    return _end_expired(tx, rows, now_s, STALE_ERROR)


def _end_lease(tx: _Transaction, lease: Lease, kind: Kind) -> int:
    """Ends a lease and returns the row that it was for; LeaseLost unless owner and fence still match."""
    if lease.kind != kind:
        raise AssertionError(f"this step is for a {kind}, the lease is for a {lease.kind}")
    sql = "DELETE FROM leases WHERE fence = ? AND owner = ? RETURNING seq"
    row = tx.db.execute(sql, (lease.fence, lease.owner)).fetchone()
    if row is None:
        raise LeaseLost(f"the lease on call {lease.call.id} has passed to someone else")
    seq: int = row[0]
    return seq


def _unlease(tx: _Transaction, fence: int) -> None:
    tx.db.execute("DELETE FROM leases WHERE fence = ?", (fence,))


def _add_attempt(tx: _Transaction, seq: int, attempt: Attempt) -> None:
    (number,) = tx.db.execute(
        "INSERT INTO attempts (seq, number, started_s, finished_s, status, error)"
        " SELECT ?1, coalesce(max(number), 0) + 1, ?2, ?3, ?4, ?5 FROM attempts WHERE seq = ?1 RETURNING number",
        (seq, attempt.started_s, attempt.finished_s, attempt.status, attempt.error),
    ).fetchone()
    if number > HISTORY_COUNT:
        tx.db.execute("DELETE FROM attempts WHERE seq = ? AND number <= ?", (seq, number - HISTORY_COUNT))


@dataclass(frozen=True, slots=True)
class _Ending:
    """A run's end, ready to be written: with the beginning of a result that is in a file, and its callback's time."""

    run: RunEnd
    excerpt: bytes | None
    callback_due_s: float


def _finish(tx: _Transaction, lease: Lease, ending: _Ending) -> tuple[str, ...]:
    """Ends a call, with its result; returns files that nothing names now.

    On a disk that is short of room a call that is done gives its payload, which will not be sent again, for its result.
    """
    seq = _end_lease(tx, lease, "call")
    run, attempt = ending.run, ending.run.attempt
    files = _drop_payloads(tx, [seq]) if tx.short and run.state is State.DONE else ()
    tx.count_waiting(lease.call.function, -1, -lease.call.body.bytes_count)
    _add_attempt(tx, seq, attempt)
    tx.db.execute(
        "UPDATE calls SET state = ?, finished_s = ?, status = ?, error = ?, duration_s = ? WHERE seq = ?",
        (
            next_state(State.RUNNING, run.event).value,
            attempt.finished_s,
            run.status,
            attempt.error,
            run.duration_s,
            seq,
        ),
    )
    _store_result(tx, seq, ending)
    tx.ring |= Ring.FINISHED
    if lease.call.callback_url is not None:
        _open_callback(tx, seq, ending.callback_due_s, ready=run.callback_due_s is None)
    return files


def _drop_payloads(tx: _Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Forgets the bodies of calls that will not run again, but not how long they were; returns the files they named."""
    files: list[str] = []
    for seq in rows:
        files.extend(
            file for (file,) in tx.db.execute("SELECT file FROM requests WHERE seq = ? AND file IS NOT NULL", (seq,))
        )
        tx.db.execute("UPDATE requests SET file = NULL, inline = NULL WHERE seq = ?", (seq,))
    return tuple(files)


def _store_result(tx: _Transaction, seq: int, ending: _Ending) -> None:
    run, body = ending.run, ending.run.result
    if body is None and ending.excerpt is None and not run.result_headers:
        tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))  # an earlier attempt's excerpt
        return
    tx.db.execute(
        "INSERT OR REPLACE INTO results (seq, stored_s, headers, excerpt, bytes_count, file, inline)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            seq,
            run.attempt.finished_s,
            _headers_text(run.result_headers),
            ending.excerpt,
            None if body is None else body.bytes_count,
            None if body is None else body.file,
            None if body is None else body.inline,
        ),
    )


def _retry(tx: _Transaction, lease: Lease, attempt: Attempt, due_s: float, excerpt: bytes | None) -> State:
    seq = _end_lease(tx, lease, "call")
    _add_attempt(tx, seq, attempt)
    tx.db.execute("UPDATE calls SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))
    if excerpt is not None:
        tx.db.execute(
            "INSERT INTO results (seq, stored_s, headers, excerpt) VALUES (?, ?, '[]', ?)",
            (seq, attempt.finished_s, excerpt),
        )
    return _queue_again(tx, seq, Event.RETRY, due_s, attempt.finished_s)


def _queue_again(tx: _Transaction, seq: int, event: Event, due_s: float, now_s: float) -> State:
    """Back into the queue, unless someone has asked meanwhile for an end: then this is it."""
    (cancel,) = tx.db.execute("SELECT cancel_requested FROM calls WHERE seq = ?", (seq,)).fetchone()
    if cancel:
        _end_cancelled(tx, seq, State.RUNNING, Event.STOP, now_s)
        return State.CANCELLED
    state = next_state(State.RUNNING, event)
    tx.db.execute("UPDATE calls SET state = ?, due_s = ? WHERE seq = ?", (state.value, due_s, seq))
    tx.ring |= Ring.WORK
    return state


def _count_rows(tx: _Transaction, rows: Sequence[int], calls_count: int) -> None:
    """Calls are about to begin to wait (1), or no longer will (-1)."""
    for seq in rows:
        sql = "SELECT function, bytes_count FROM calls JOIN requests USING (seq) WHERE seq = ?"
        function, bytes_count = tx.db.execute(sql, (seq,)).fetchone()
        tx.count_waiting(function, calls_count, calls_count * bytes_count)


def _end_cancelled(tx: _Transaction, seq: int, state: State, event: Event, now_s: float) -> None:
    _count_rows(tx, [seq], -1)
    tx.db.execute(
        "UPDATE calls SET state = ?, finished_s = ?, cancel_requested = 1 WHERE seq = ?",
        (next_state(state, event).value, now_s, seq),
    )
    tx.ring |= Ring.FINISHED


def _finish_cancelled(tx: _Transaction, lease: Lease, attempt: Attempt) -> None:
    seq = _end_lease(tx, lease, "call")
    _add_attempt(tx, seq, attempt)
    tx.db.execute("UPDATE calls SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    _end_cancelled(tx, seq, State.RUNNING, Event.STOP, attempt.finished_s)


def _release(tx: _Transaction, lease: Lease, now_s: float) -> None:
    """Hands back what was not tried: the attempt is not counted and the place in the order is kept."""
    seq = _end_lease(tx, lease, lease.kind)
    if lease.kind == "callback":
        tx.db.execute("UPDATE callbacks SET attempts = attempts - 1 WHERE seq = ?", (seq,))
        _callback_again(tx, seq, Event.HAND_BACK, lease.call.callback.due_s if lease.call.callback else now_s)
        return
    tx.db.execute("UPDATE calls SET attempts = attempts - 1 WHERE seq = ?", (seq,))
    _queue_again(tx, seq, Event.HAND_BACK, lease.call.due_s, now_s)


def _callback_again(tx: _Transaction, seq: int, event: Event, due_s: float) -> None:
    state = next_callback_state(CallbackState.RUNNING, event).value
    tx.db.execute("UPDATE callbacks SET state = ?, due_s = ?, ready = 0 WHERE seq = ?", (state, due_s, seq))
    tx.ring |= Ring.WORK


def _end_callback(tx: _Transaction, lease: Lease, attempt: Attempt, event: Event, due_s: float | None = None) -> None:
    seq = _end_lease(tx, lease, "callback")
    tx.db.execute("UPDATE callbacks SET status = ?, error = ? WHERE seq = ?", (attempt.status, attempt.error, seq))
    if due_s is not None:
        _callback_again(tx, seq, event, due_s)
    else:
        state = next_callback_state(CallbackState.RUNNING, event).value
        tx.db.execute("UPDATE callbacks SET state = ? WHERE seq = ?", (state, seq))


LOST_ERROR = "the worker that ran it is gone"


def _take_back(tx: _Transaction, dead: Collection[str], boot: str, boot_s: float, now_s: float) -> int:
    """Ends every lease whose owner is in `dead`, whose deadline has passed, or which is of an earlier boot."""
    rows = tx.db.execute(
        "SELECT leases.fence, leases.seq, leases.kind, leases.owner, leases.boot, leases.until_s,"
        " calls.started_s, calls.due_s, callbacks.attempts"
        " FROM leases JOIN calls USING (seq) LEFT JOIN callbacks USING (seq)"
    ).fetchall()
    lapsed = [row for row in rows if row[3] in dead or row[4] != boot or row[5] <= boot_s]
    for fence, seq, kind, _, _, _, started_s, due_s, attempts in lapsed:
        _unlease(tx, fence)
        if kind == "callback":
            tx.db.execute("UPDATE callbacks SET status = NULL, error = ? WHERE seq = ?", (LOST_ERROR, seq))
            _callback_again(tx, seq, Event.HAND_BACK, now_s + lost_wait_s(attempts))
        else:
            _add_attempt(tx, seq, Attempt(started_s, now_s, None, LOST_ERROR))
            tx.db.execute("UPDATE calls SET status = NULL, error = ? WHERE seq = ?", (LOST_ERROR, seq))
            _queue_again(tx, seq, Event.HAND_BACK, due_s, now_s)
    return len(lapsed)


def _follow_clock(tx: _Transaction, boot: str, offset_s: float) -> None:
    """Has a wall clock that was set back take with it what was due by then, which would wait for it to catch up.

    `offset_s` is the wall clock less the clock of this boot, which nobody sets; the greatest seen is remembered.
    A clock set forward only lets things come early, and nothing is shifted for it.
    """
    row = tx.db.execute("SELECT boot, offset_s FROM clock").fetchone()
    back_s = row[1] - offset_s if row is not None and row[0] == boot else 0.0
    if back_s > SET_BACK_S:
        log.warning(f"the wall clock was set back by {back_s:.0f} s: due times of what waits are set back as well")
        tx.db.execute(
            "UPDATE calls SET due_s = due_s - :back_s, expires_s = expires_s - :back_s WHERE state = 'queued'",
            {"back_s": back_s},
        )
        tx.db.execute("UPDATE callbacks SET due_s = due_s - ? WHERE state = 'pending'", (back_s,))
        tx.ring |= Ring.WORK
    if row is None:
        tx.db.execute("INSERT INTO clock VALUES (?, ?)", (boot, offset_s))
    elif row[0] != boot or back_s > SET_BACK_S or offset_s > row[1] + SET_BACK_S:
        tx.db.execute("UPDATE clock SET boot = ?, offset_s = ?", (boot, offset_s))


def _renew(tx: _Transaction, leases: Sequence[Lease], boot: str, until_s: float) -> Renewal:
    lost, cancelled = set(), set()
    for lease in leases:
        cursor = tx.db.execute(
            "UPDATE leases SET boot = ?, until_s = ? WHERE fence = ? AND owner = ?",
            (boot, until_s, lease.fence, lease.owner),
        )
        if cursor.rowcount == 0:
            lost.add(lease.call.id)
        elif lease.kind == "call":
            row = tx.db.execute("SELECT cancel_requested FROM calls WHERE id = ?", (lease.call.id,)).fetchone()
            cancelled |= {lease.call.id} if row[0] else set()
    return Renewal(frozenset(lost), frozenset(cancelled))


def _cancel(tx: _Transaction, call_id: str, now_s: float) -> State:
    seq, state = _find(tx.db, call_id)
    if (state, Event.CANCEL) not in TRANSITIONS:
        raise CallFinished(f"the call is {state.value}: there is nothing left to cancel")
    if state is State.QUEUED:
        _end_cancelled(tx, seq, state, Event.CANCEL, now_s)
    else:
        tx.db.execute("UPDATE calls SET cancel_requested = 1 WHERE seq = ?", (seq,))
        tx.ring |= Ring.CANCEL
    return next_state(state, Event.CANCEL)


def _cancel_queued(tx: _Transaction, function: FunctionName | None, now_s: float, after_seq: int) -> _Dropped:
    """One step of cancelling what is queued. Payloads go at once: on a full disk it is them that someone wants gone."""
    rows = tx.db.execute(
        "SELECT seq FROM calls WHERE state = 'queued' AND seq > :after AND (:function IS NULL OR function = :function)"
        " ORDER BY seq LIMIT :limit",
        {"after": after_seq, "function": function, "limit": tx.step_count},
    ).fetchall()
    for (seq,) in rows:
        _end_cancelled(tx, seq, State.QUEUED, Event.CANCEL, now_s)
    files = _drop_payloads(tx, [seq for (seq,) in rows])
    return _Dropped(len(rows), files, (0.0, rows[-1][0]) if len(rows) == tx.step_count else None)


def _cancelled_ids(db: sqlite3.Connection, owner: str) -> frozenset[str]:
    rows = db.execute(
        "SELECT calls.id FROM leases JOIN calls USING (seq)"
        " WHERE leases.owner = ? AND leases.kind = 'call' AND calls.cancel_requested",
        (owner,),
    )
    return frozenset(row[0] for row in rows)


def _requeue_dead(tx: _Transaction, call_id: str, now_s: float) -> tuple[Call, list[str]]:
    """The dead letter starts afresh: no expiry, no attempts, no result, no callback. Also returns files to drop."""
    seq, state = _find(tx.db, call_id)
    if (state, Event.REQUEUE) not in TRANSITIONS:
        raise CallNotDead(f"only a dead letter can be queued again; the call is {state.value}")
    _count_rows(tx, [seq], 1)
    files = [row[0] for row in tx.db.execute("SELECT file FROM results WHERE seq = ? AND file IS NOT NULL", (seq,))]
    tx.db.execute(
        "UPDATE calls SET state = ?, due_s = ?, expires_s = NULL, attempts = 0, started_s = NULL, finished_s = NULL,"
        " duration_s = NULL, cancel_requested = 0 WHERE seq = ?",
        (next_state(state, Event.REQUEUE).value, now_s, seq),
    )
    tx.db.execute("DELETE FROM leases WHERE seq = ?", (seq,))  # a delivery under way loses it
    tx.db.execute("DELETE FROM callbacks WHERE seq = ?", (seq,))
    tx.db.execute("DELETE FROM results WHERE seq = ?", (seq,))
    tx.ring |= Ring.WORK
    return _load(tx.db, seq), files


def _requeue_callback(tx: _Transaction, call_id: str, now_s: float) -> Call:
    seq, _ = _find(tx.db, call_id)
    row = tx.db.execute("SELECT state FROM callbacks WHERE seq = ?", (seq,)).fetchone()
    if row is None or (CallbackState(row[0]), Event.REQUEUE) not in CALLBACK_TRANSITIONS:
        raise CallNotDead(f"only a dead callback can be queued again; this one is {row[0] if row else 'not there'}")
    state = next_callback_state(CallbackState(row[0]), Event.REQUEUE).value
    sql = "UPDATE callbacks SET state = ?, attempts = 0, due_s = ?, ready = 0 WHERE seq = ?"
    tx.db.execute(sql, (state, now_s, seq))
    tx.ring |= Ring.WORK
    return _load(tx.db, seq)


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which calls to list: all conditions that are not None hold; newest first."""

    state: State | None
    function: FunctionName | None
    limit: int
    before: str | None


def _list(db: sqlite3.Connection, wanted: _Filter) -> list[Call]:
    states = State if wanted.state is None else [wanted.state]
    terms: list[tuple[str, object]] = []
    if wanted.function is not None:
        terms.append(("function = ?", wanted.function))
    if wanted.before is not None:
        terms.append(("seq < ?", _find(db, wanted.before)[0]))
    if terms or wanted.state is not None:  # with the states, an index has all that the search needs
        terms = [(f"state IN ({', '.join(repr(state.value) for state in states)})", None), *terms]
    where = "WHERE " + " AND ".join(term for term, _ in terms) if terms else ""
    values = [value for _, value in terms if value is not None]
    page = f"SELECT seq FROM calls {where} ORDER BY seq DESC LIMIT ?"
    rows = _rows(db, f"{SQL_CALL_LISTED} WHERE calls.seq IN ({page}) ORDER BY calls.seq DESC", (*values, wanted.limit))
    return [_parse_call(row, ()) for row in rows]


def _ended(db: sqlite3.Connection, call_ids: Sequence[str]) -> frozenset[str]:
    """Those of `call_ids` that have reached a final state, or are gone."""
    rows = db.execute(SQL_ENDED, (json.dumps(call_ids),))
    return frozenset(call_id for (call_id,) in rows)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """When work falls due next, and whether other owners hold leases that may need taking back."""

    call_due_s: float | None
    callback_due_s: float | None
    others_lease: bool


def _look_ahead(db: sqlite3.Connection, call_after_s: float, callback_after_s: float, mine: Sequence[str]) -> _Outlook:
    (call_due_s,) = db.execute(SQL_NEXT_DUE, {"after_s": call_after_s}).fetchone()
    (callback_due_s,) = db.execute(SQL_NEXT_CALLBACK, {"after_s": callback_after_s}).fetchone()
    owners = db.execute("SELECT owner FROM leases")
    return _Outlook(call_due_s, callback_due_s, any(owner not in mine for (owner,) in owners))


def _count(db: sqlite3.Connection, now_s: float, commit_count: int) -> Stats:
    by_function: dict[tuple[FunctionName, State], int] = {}
    by_state = dict.fromkeys(State, 0)
    for state, function, count in db.execute("SELECT state, function, count(*) FROM calls GROUP BY state, function"):
        by_function[FunctionName(function), State(state)] = count
        by_state[State(state)] += count
    callbacks = dict(db.execute("SELECT state, count(*) FROM callbacks GROUP BY state").fetchall())
    waiting = Counter(dict(db.execute("SELECT queue, count(*) FROM calls WHERE state = 'queued' GROUP BY queue")))
    waiting.update(dict(db.execute("SELECT queue, count(*) FROM callbacks WHERE state = 'pending' GROUP BY queue")))
    (oldest_s,) = db.execute(SQL_NEXT_DUE, {"after_s": -1e300}).fetchone()
    return Stats(
        by_state=by_state,
        by_function=by_function,
        waiting=waiting,
        oldest_due_age_s=None if oldest_s is None or oldest_s > now_s else now_s - oldest_s,
        callback_pending_count=callbacks.get("pending", 0) + callbacks.get("running", 0),
        callback_dead_count=callbacks.get("dead", 0),
        commit_count=commit_count,
    )


# Housekeeping goes through old rows in steps, each a commit of its own, so that no writer waits long. A step begins
# where the one before it ended: rows that must stay (callbacks not delivered) are passed once, not once per step.

_Position = tuple[float, int]
_START: _Position = (-1e300, -1)


@dataclass(frozen=True, slots=True)
class _Dropped:
    """What one step removed: rows, files that nothing names now, and where to go on (None: the end is reached)."""

    count: int
    files: tuple[str, ...]
    next: _Position | None


class _Step(Protocol):
    """One step of dropping what is older than `before_s`."""

    def __call__(self, tx: _Transaction, before_s: float, after: _Position) -> _Dropped: ...


def _step(tx: _Transaction, sql: str, before_s: float, after: _Position) -> list[tuple[Any, ...]]:
    values = {"before_s": before_s, "after_s": after[0], "after_seq": after[1], "limit": tx.step_count}
    return tx.db.execute(sql, values).fetchall()


def _drop_results(tx: _Transaction, before_s: float, after: _Position) -> _Dropped:
    rows = _step(tx, SQL_OLD_RESULTS, before_s, after)
    tx.db.executemany(
        "UPDATE results SET excerpt = coalesce(excerpt, substr(inline, 1, ?)), headers = '[]',"
        " bytes_count = NULL, file = NULL, inline = NULL WHERE seq = ?",
        [(EXCERPT_BYTES, seq) for seq, _, _ in rows],
    )
    files = tuple(file for _, _, file in rows if file is not None)
    return _Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def _drop_calls(tx: _Transaction, before_s: float, after: _Position) -> _Dropped:
    rows = _step(tx, SQL_OLD_CALLS, before_s, after)
    files = _delete(tx, [seq for seq, _ in rows])
    return _Dropped(len(rows), files, (rows[-1][1], rows[-1][0]) if len(rows) == tx.step_count else None)


def _letters_before(db: sqlite3.Connection, now_s: float, bounds: Bounds) -> float:
    """The time up to which letters are too old, or too many with those that are newer."""
    before_s = now_s - bounds.dead_s
    left_bytes = float("inf") if bounds.dead_bytes is None else bounds.dead_bytes
    if left_bytes != float("inf"):
        for finished_s, bytes_count in db.execute(SQL_LETTER_SIZES):
            left_bytes -= bytes_count + LETTER_BYTES
            if left_bytes < 0 or finished_s <= before_s:
                return max(before_s, float(finished_s))
    return before_s


def _drop_letters(tx: _Transaction, before_s: float) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """One step of dropping letters; returns id and function of each, and files that nothing names now."""
    values = {"before_s": before_s, "limit": tx.step_count}
    rows = tx.db.execute(SQL_OLD_LETTERS, values).fetchall() or tx.db.execute(SQL_OLD_DEAD_CALLBACKS, values).fetchall()
    files = _delete(tx, [seq for seq, _, _ in rows])
    return [(call_id, function) for _, call_id, function in rows], files


def _delete(tx: _Transaction, rows: Sequence[int]) -> tuple[str, ...]:
    """Deletes calls and all that hangs on them; returns the body files they named."""
    files: list[str] = []
    for seq in rows:
        files.extend(file for (file,) in tx.db.execute(SQL_FILES, {"seq": seq}))
        tx.db.execute("DELETE FROM calls WHERE seq = ?", (seq,))
    return tuple(files)


def _purge(
    tx: _Transaction, state: State, function: FunctionName | None, call_id: str | None, after_seq: int
) -> _Dropped:
    rows = tx.db.execute(
        "SELECT seq FROM calls WHERE state = :state AND seq > :after AND (:function IS NULL OR function = :function)"
        " AND (:id IS NULL OR id = :id) AND NOT EXISTS (SELECT 1 FROM callbacks"
        " WHERE callbacks.seq = calls.seq AND callbacks.state IN ('pending', 'running')) ORDER BY seq LIMIT :limit",
        {"state": state.value, "after": after_seq, "function": function, "id": call_id, "limit": tx.step_count},
    ).fetchall()
    files = _delete(tx, [seq for (seq,) in rows])
    return _Dropped(len(rows), files, (0.0, rows[-1][0]) if len(rows) == tx.step_count else None)


def _truncate_journal(db: sqlite3.Connection) -> None:
    """Writes the journal back and cuts it to nothing, unless someone reads from it just now: then the next time."""
    db.execute("PRAGMA busy_timeout = 0")  # else it would wait for readers, and all writers with it
    try:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        db.execute(f"PRAGMA busy_timeout = {int(BUSY_S * 1000)}")


def _forget_idle(tx: _Transaction) -> None:
    """Functions that have nothing waiting need no row: strangers can make up names."""
    tx.db.execute("DELETE FROM waiting WHERE calls <= 0")


def _unnamed(db: sqlite3.Connection, files: Sequence[str]) -> list[str]:
    sql = (
        "SELECT EXISTS (SELECT 1 FROM requests WHERE file = :file) OR EXISTS (SELECT 1 FROM results WHERE file = :file)"
    )
    return [file for file in files if not db.execute(sql, {"file": file}).fetchone()[0]]


def _vacuum(tx: _Transaction) -> int:
    """Gives some free pages back to the disk; returns how many, 0 when only the spare ones are left."""
    (free,) = tx.db.execute("PRAGMA freelist_count").fetchone()
    count: int = max(0, min(free - SPARE_PAGE_COUNT, tx.step_count))
    if count:
        tx.db.execute(f"PRAGMA incremental_vacuum({count})").fetchall()
    return count


# --------------------------------------------------------------------------------------------------------------------
# The directory
#
# Descriptors of its sub-directories are kept open: names below them stay short (a socket's address has 108 bytes, a
# directory's path may have more) and stay right if the path above is renamed.
#
# `writer.lock` is what makes many processes share one SQLite file well. SQLite waits for its lock by sleeping and
# asking again, so some waiters starve (p99 760 ms with two writers); flock wakes them (113 ms). It also means that no
# two processes ever checkpoint at once. SQLite's own locking stays on: the flock is for turns, not for safety.
#
# What is in the directory is trusted: the token opens `/system`, a row is a call that is run. So directory and files
# must be ours, and nobody else may write them. Wider modes are refused and not mended, as there is no telling what was
# written meanwhile; modes that only let others read are the operator's business. The directory is looked at first:
# where only we can make names, nothing can be exchanged between a look and its use. All that we open below it is opened
# without following a link.
# --------------------------------------------------------------------------------------------------------------------

DATABASE = "spool.sqlite3"
TOKEN_CHARS = 32  # at least; ours have 43, which are 256 bits


@dataclass(frozen=True, slots=True)
class _Tree:
    """The open directory of a queue."""

    path: Path
    root_fd: int
    lock_fd: int
    bodies_fd: int
    owners_fd: int
    bells_fd: int

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    @property
    def has_bodies(self) -> bool:
        """Whether the directory of bodies is still the one that was opened."""
        try:
            return os.path.samestat((self.path / "bodies").stat(), os.fstat(self.bodies_fd))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Holds `writer.lock`: every write, checkpoint and owner look-up happens inside.

        QueueUnavailable if it cannot be had: whoever holds it may be suspended, or stuck on a disk.
        """
        _take_turn(self.lock_fd)
        try:
            yield
        finally:
            fcntl.flock(self.lock_fd, fcntl.LOCK_UN)

    def close(self) -> None:
        for fd in (self.root_fd, self.lock_fd, self.bodies_fd, self.owners_fd, self.bells_fd):
            os.close(fd)


def _take_turn(lock_fd: int) -> None:
    """Lock `writer.lock`, within TURN_S.

    flock(2) has no time limit, so it is asked again and again; a commit holds it for a millisecond or so, and its next
    group needs longer to gather than we sleep, so that processes really take turns.
    """
    started_s = time.monotonic()
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited_s = time.monotonic() - started_s
        if waited_s > TURN_S:
            raise QueueUnavailable(f"the queue's lock has been held for {TURN_S:g} s by {_lock_holder(lock_fd)}")
        time.sleep(max(TURN_PAUSE_S, min(waited_s / 50, 0.02)))


def _lock_holder(lock_fd: int) -> str:
    """Who holds a flock, as /proc/locks has it (proc(5))."""
    inode = str(os.fstat(lock_fd).st_ino)
    with open("/proc/locks", encoding="ascii") as file:
        for fields in map(str.split, file):
            if fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode:
                return f"process {fields[4]}"
    return "somebody"


def _open_tree(path: Path) -> _Tree:
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in missing:  # else a power cut may take the directory, and every call in it
        _sync_directory(place.parent)
    with contextlib.ExitStack() as stack:

        def hold(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        root_fd = hold(_open_root(path))
        lock_fd = hold(_open_ours(root_fd, path / "writer.lock", os.O_RDWR | os.O_CREAT))
        fds = []
        for name in ("bodies", "owners", "bells"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=root_fd)
            fds.append(hold(_open_ours(root_fd, path / name, os.O_RDONLY | os.O_DIRECTORY)))
        for tail in ("", "-wal", "-shm"):  # SQLite opens them itself, and by name
            _check_name(root_fd, path / f"{DATABASE}{tail}")
        stack.pop_all()
    return _Tree(path, root_fd, lock_fd, *fds)


def _open_root(path: Path) -> int:
    """The directory itself; a link to it is followed only if we or root have made it."""
    link = path.lstat()
    if stat.S_ISLNK(link.st_mode) and link.st_uid not in (os.geteuid(), 0):
        raise _not_ours(path, link)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        _check_ours(path, os.fstat(fd))
        stack.pop_all()
    return fd


def _open_ours(root_fd: int, path: Path, flags: int) -> int:
    """A file of the directory by its name, checked; without waiting, as for a FIFO that was put in its place."""
    try:
        fd = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=root_fd)
    except OSError as error:
        _check_name(root_fd, path)  # says more than "too many levels of symbolic links"
        raise OSError(error.errno, error.strerror, str(path)) from error
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, fd)
        _check_ours(path, os.fstat(fd))
        stack.pop_all()
    return fd


def _check_name(root_fd: int, path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        _check_ours(path, os.stat(path.name, dir_fd=root_fd, follow_symlinks=False))


def _check_ours(path: Path, info: os.stat_result) -> None:
    """QueueUnavailable unless it is a file or directory of ours that nobody else may write."""
    if info.st_uid != os.geteuid() or not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise _not_ours(path, info)
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise QueueUnavailable(
            f"{path} may be written by others (mode {stat.S_IMODE(info.st_mode):04o}), and what is in it is trusted."
            f" If nobody has tampered with it: chmod go-w {shlex.quote(str(path))}"
        )


def _not_ours(path: Path, info: os.stat_result) -> QueueUnavailable:
    kind = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}
    what = kind.get(stat.S_IFMT(info.st_mode), "special file")
    return QueueUnavailable(
        f"{path} is a {what} that belongs to {_user_name(info.st_uid)} (mode {stat.S_IMODE(info.st_mode):04o}); this"
        f" process runs as {_user_name(os.geteuid())} and uses only what is its own. Name another directory, run as"
        f" the user that the queue belongs to, or remove it"
    )


# --------------------------------------------------------------------------------------------------------------------
# The reserve
#
# On a full disk nothing can be written, and so nothing can end: a claim, a cancel, even a deletion goes to SQLite's
# journal first. So a file takes up room that is let go of when a step that ends calls fails for want of it. The step is
# done again, the journal is written back and cut, and the file takes up its room again, if there is any. Until it has
# all of it, the queue takes no calls: what ends gives room back, what comes would take the last of it.
#
# Everything is written twice, to the journal and from there to its place. Pages that found room in the one and have
# none in the other would be stuck, and the reserve with them. So a group is let in only if there is room for both, what
# stands in the journal already included, and the journal is written back before it holds more than half the reserve.
#
# A long result may take the other half, no more, as it needs a commit to be of use. Only the writer fills the file,
# inside a turn: between letting go and using, no other process can take the room back.
# --------------------------------------------------------------------------------------------------------------------


class _Reserve:
    """The file `reserve`. Its size is all there is to it: whole, or let go of in part; every process sees it."""

    def __init__(self, tree: _Tree, wanted_bytes: int | None) -> None:
        """`wanted_bytes` is taken from disks that are large enough for it; None: take what is there for the whole."""
        self._tree = tree
        self._journal = tree.path / f"{DATABASE}-wal"
        self._fd = -1
        self._full_since_s: float | None = None
        self.whole_bytes = 0
        with contextlib.suppress(FileNotFoundError):
            flags = os.O_RDWR | (os.O_CREAT if wanted_bytes else 0)
            self._fd = _open_ours(tree.root_fd, tree.path / "reserve", flags)
        if self._fd >= 0 and wanted_bytes:
            disk = os.fstatvfs(tree.root_fd)
            self.whole_bytes = min(wanted_bytes, disk.f_blocks * disk.f_frsize // RESERVE_PART)

    def open(self) -> None:
        """Takes up the room, also where a copy of the directory has left a hole instead; inside a turn."""
        try:
            if self.held_bytes > self.whole_bytes > 0:  # the operator wants less of it now
                os.ftruncate(self._fd, self.whole_bytes)
            self._fill(1)
            self.tell()
        except OSError as error:
            log.warning(f"no room can be kept for ending calls in {self._tree.path}: {error.strerror}")
            self.whole_bytes = 0

    @property
    def held_bytes(self) -> int:
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    @property
    def free_bytes(self) -> int:
        disk = os.fstatvfs(self._tree.root_fd)
        return disk.f_bavail * disk.f_frsize

    @property
    def journal_pages(self) -> int:
        """After how many the journal is to be written back; SQLite's own 1000 where the reserve has room for them."""
        return min(1000, self.whole_bytes // 2 // PAGE_BYTES) if self.whole_bytes else 1000

    def has_room(self, bytes_count: int) -> bool:
        """Whether so much may be written: to the journal, and from there to its place. No promise, but a good guess."""
        if self._full_since_s is not None:
            self.tell()
        return self._fits(bytes_count)

    def _fits(self, bytes_count: int) -> bool:
        if not self.whole_bytes:
            return True
        needed_bytes = self.whole_bytes // SLACK_PART + 2 * bytes_count + (_size_bytes(self._journal) or 0)
        return self._is_whole and self.free_bytes >= needed_bytes

    @property
    def _is_whole(self) -> bool:
        return self.held_bytes >= self.whole_bytes

    @property
    def has_half(self) -> bool:
        return self.held_bytes >= self.whole_bytes // 2

    def refill(self) -> None:
        """Takes the room up again, all of it, or if there is less the half that results may not have. Inside a turn."""
        if not self._is_whole and not self._fill(1) and not self.has_half:
            self._fill(2)

    def _fill(self, divisor: int) -> bool:
        if not self.whole_bytes:
            return True
        held_bytes = self.held_bytes
        try:
            os.posix_fallocate(self._fd, 0, self.whole_bytes // divisor)
        except OSError as error:
            os.ftruncate(self._fd, held_bytes)  # some file systems keep what they could get
            if not isinstance(_disk_error(error), QueueFull):
                raise
            return False
        return True

    def release(self, part: float = 1.0) -> None:
        """Lets go of a part of the whole; of nothing if that is gone already."""
        left_bytes = int(self.whole_bytes * (1 - part))
        if self.held_bytes > left_bytes:
            os.ftruncate(self._fd, left_bytes)

    def trouble(self) -> str | None:
        """What keeps calls from being taken, for people; None if nothing does."""
        if self._fits(PAGE_BYTES):  # what a small call takes
            return None
        return f"{DISK_FULL}: {self.free_bytes} bytes are free, and new calls are refused until there are more"

    def tell(self) -> None:
        """A line in the log when that changes, not one for each call that is refused, nor at every turn of the tide."""
        trouble, now_s = self.trouble(), time.monotonic()
        if trouble is not None and self._full_since_s is None:
            self._full_since_s = now_s
            log.error(trouble)
        elif trouble is None and self._full_since_s is not None and now_s - self._full_since_s > TOLD_S:
            log.info(f"the queue has room again: calls were refused in the last {now_s - self._full_since_s:.0f} s")
            self._full_since_s = None

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_token(tree: _Tree) -> str:
    """The queue's secret, made by the process that opens the queue first; renamed into place, so never half written.

    QueueUnavailable for a short one: an empty token would be equal to the one of a request that has none.
    """
    path = tree.path / "token"
    try:
        fd = _open_ours(tree.root_fd, path, os.O_RDONLY)
    except FileNotFoundError:
        _create_token(tree)
        fd = _open_ours(tree.root_fd, path, os.O_RDONLY)
    with os.fdopen(fd, encoding="ascii", errors="replace") as file:
        token = file.read().strip()
    if len(token) < TOKEN_CHARS:
        raise QueueUnavailable(
            f"{path} has {len(token)} characters; allowed: {TOKEN_CHARS} or more. Remove it while nothing uses the"
            f" queue: a new one is made at the next start"
        )
    return token


def _create_token(tree: _Tree) -> None:
    draft = "token.new"
    with contextlib.suppress(FileNotFoundError):  # of a process that died over it
        os.unlink(draft, dir_fd=tree.root_fd)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=tree.root_fd)
    with os.fdopen(fd, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32))
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, "token", src_dir_fd=tree.root_fd, dst_dir_fd=tree.root_fd)
    os.fsync(tree.root_fd)


NO_MEMORY = "the queue cannot be used: no memory"
DISK_FULL = "the queue's disk is full"


def _disk_error(error: OSError) -> FaashoundError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return QueueFull(DISK_FULL)
    return QueueUnavailable(f"the queue cannot use its disk: {error.strerror or type(error).__name__}")


def _sqlite_error(error: sqlite3.Error) -> FaashoundError:
    # Python hands on extended codes; the primary code is the low byte. Errors of Python's own have none.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE:
        return QueueFull(DISK_FULL)
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return QueueDamaged(f"the queue's file {DATABASE} is damaged ({error}): stop what uses it, then set it aside")
    return QueueUnavailable(f"the queue cannot be used: {error}")


def _open_error(path: Path, error: OSError) -> FaashoundError:
    """Says what an operator needs: which path, whose it is, and who we are."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return type(_disk_error(error))(f"cannot use the queue in {path}: {error.strerror}")
    place = Path(error.filename) if isinstance(error.filename, str) else path
    while True:  # the nearest that can be looked at; the root directory always can
        try:
            info = place.stat()
            break
        except (PermissionError, FileNotFoundError):
            place = place.parent
    return QueueUnavailable(
        f"cannot use the queue in {path}: {error.strerror}: {place} belongs to {_user_name(info.st_uid)}"
        f" (mode {stat.S_IMODE(info.st_mode):04o}), this process runs as {_user_name(os.geteuid())}"
    )


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _damaged(path: Path, why: str) -> QueueDamaged:
    return QueueDamaged(
        f"{path} {why}. It has been left as it is. Restore a backup, or start with an empty queue after"
        f" python -c 'from faashound.spool import set_aside; set_aside({str(path.parent)!r})'"
    )


def set_aside(directory: Path | str) -> Path:
    """Moves a queue's file, its journal and its bodies out of the way, whole, under names ending in `.damaged-<time>`.

    For a person to call once everything that uses the queue is stopped. The next `Spool.open` begins an empty queue.
    Returns the new path of the file. Raises QueueUnavailable when there is nothing to set aside, or no access.
    """
    path = Path(directory) / DATABASE
    suffix = time.strftime(".damaged-%Y%m%dT%H%M%SZ", time.gmtime())
    try:
        tree = _open_tree(Path(directory))
        with contextlib.closing(tree), tree.turn():
            target = path.with_name(path.name + suffix)
            if target.exists():
                raise QueueUnavailable(f"{target} exists already")
            if not any(path.with_name(path.name + tail).exists() for tail in ("", "-wal")):
                raise QueueUnavailable(f"there is no {path} to set aside")
            moves = {f"{path.name}{tail}": f"{target.name}{tail}" for tail in ("-wal", "-shm", "")}
            for name, new_name in {"bodies": f"bodies{suffix}", **moves}.items():
                with contextlib.suppress(FileNotFoundError):
                    (path.parent / name).rename(path.parent / new_name)
            _sync_directory(path.parent)
    except OSError as error:
        raise _open_error(Path(directory), error) from error
    return target


# --------------------------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------------------------


def _connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode (we say BEGIN ourselves), to be used by one thread at a time."""
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=256)
    with contextlib.ExitStack() as stack:
        stack.callback(db.close)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = FAST")  # zeros over what is deleted would go to the journal first
        db.execute("PRAGMA foreign_keys = ON")
        stack.pop_all()
    return db


def _open_database(tree: _Tree) -> sqlite3.Connection:
    """The writer's connection to a file that has been looked at; call inside `tree.turn()`."""
    path = tree.database
    if _size_bytes(path) is None:
        if _size_bytes(path.with_name(f"{DATABASE}-wal")):
            raise _damaged(path, "is missing, though its journal is there")
        _create_database(path)
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise _damaged(path, "is empty or not a queue's file")
    with contextlib.ExitStack() as stack:
        try:
            db = stack.enter_context(contextlib.closing(_connect(path)))
            _check(db, path)
            _migrate(db)
        except sqlite3.Error as error:
            problem = _sqlite_error(error)
            raise _damaged(path, f"is damaged ({error})") if isinstance(problem, QueueDamaged) else problem from error
        stack.pop_all()
    return db


def _size_bytes(path: Path) -> int | None:
    """None only for a file that is proved not to be there: `Path.exists` may take any error for that."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return None


def _open_in_room(tree: _Tree, reserve: _Reserve) -> sqlite3.Connection:
    """Opens the file with the reserve's room if need be: its journal and the index of that are made by the first."""
    try:
        return _open_database(tree)
    except QueueFull:
        reserve.release()
        return _open_database(tree)


def _create_database(path: Path) -> None:
    """Makes the file under another name first: a `spool.sqlite3` that is empty is always a damaged one."""
    draft = path.with_name(f"{DATABASE}.new")
    for tail in ("", "-wal", "-shm"):
        draft.with_name(draft.name + tail).unlink(missing_ok=True)
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # -wal and -shm take their mode from it
    try:
        with contextlib.closing(_connect(draft)) as db:
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # only possible before the first page
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute("PRAGMA journal_mode = WAL")
            _migrate(db)
    except sqlite3.Error as error:
        raise _sqlite_error(error) from error
    draft.rename(path)
    _sync_directory(path.parent)


def _check(db: sqlite3.Connection, path: Path) -> None:
    """Refuses what is not ours or not whole, as far as can be told without reading all of it."""
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise _damaged(path, "is some other program's file")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if not 1 <= version <= len(MIGRATIONS):
        raise _damaged(path, f"is of version {version}, this program knows 1 to {len(MIGRATIONS)}")
    (pages,), (page_bytes,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    if _missing_pages(path, pages, page_bytes):
        raise _damaged(path, "is cut short")


def _missing_pages(path: Path, page_count: int, page_bytes: int) -> set[int]:
    """Pages that neither the file nor its journal holds; SQLite would take them for zeros when there is a journal.

    A file shorter than its count is no damage in itself: it grows when the journal is written back. The journal is a
    header of 32 bytes and frames of 24 + `page_bytes`, each beginning with the page's number (sqlite.org/fileformat2
    section 4.1). The page at 1 GiB is never written: SQLite's locks live there (section 1.3).
    """
    held = path.stat().st_size // page_bytes
    missing = set(range(held + 1, page_count + 1)) - {(1 << 30) // page_bytes + 1}
    journal = path.with_name(f"{DATABASE}-wal")
    if missing and _size_bytes(journal):
        with journal.open("rb") as file:
            file.seek(32)
            while len(header := file.read(24)) == 24:
                missing.discard(int.from_bytes(header[:4], "big"))
                file.seek(page_bytes, os.SEEK_CUR)
    return missing


def _migrate(db: sqlite3.Connection) -> None:
    """Brings an older file to the newest version, one version per transaction; lends SQL what the law needs of us."""
    db.create_function("destination_of", 1, destination_of, deterministic=True)
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


# --------------------------------------------------------------------------------------------------------------------
# Bells
#
# A bell is a datagram socket with a file; ringing it sends one byte, a Ring. Each sender keeps one connected socket per
# bell, as the kernel charges unread datagrams to their sender: through a shared socket, one process that has stopped
# reading would silence the rest. A bell whose buffer is full loses the byte; it has at least two unread then, and who
# reads two or more at once takes it that anything may have happened.
# --------------------------------------------------------------------------------------------------------------------


class _Bells:
    """Our own bell and the way to all others. `ring` belongs to the writer thread, `hear` to the event loop."""

    def __init__(self, bells_fd: int) -> None:
        self._bells_fd = bells_fd
        self._others: dict[str, socket.socket] = {}
        self._names: set[str] = set()
        self._changed_ns = -1
        self.name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
        with contextlib.ExitStack() as stack:
            self._own = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
            self._own.bind(self._address(self.name))
            stack.pop_all()

    def _address(self, name: str) -> str:
        return f"/proc/self/fd/{self._bells_fd}/{name}"

    def fileno(self) -> int:
        return self._own.fileno()

    def hear(self) -> Ring:
        """All that was rung since the last time; never blocks."""
        heard: list[int] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.extend(self._own.recv(1))
        return Ring.ALL if len(heard) > 1 else Ring(sum(heard) & Ring.ALL)

    def ring(self, ring: Ring) -> None:
        """Rings every bell but ours. One that cannot be rung is logged: it must not keep the queue from its work."""
        try:
            self._look_around()
        except OSError as error:
            log.warning(f"cannot ring any bell: {error}")
            return
        for name in self._names:
            try:
                self._reach(name).send(bytes([ring]))
            except BlockingIOError:
                pass  # full: it is ringing already
            except (ConnectionRefusedError, FileNotFoundError):  # nobody holds it any more
                self._drop(name)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._bells_fd)
            except OSError as error:
                log.warning(f"cannot ring the bell {name}: {error}")
                self._drop(name)

    def _look_around(self) -> None:
        """Bring the names up to date: listing the directory for every commit would cost more than ringing."""
        changed_ns = os.fstat(self._bells_fd).st_mtime_ns
        if changed_ns == self._changed_ns:
            return
        # A change that is this young may be followed by another within the same tick of the file system's clock.
        self._changed_ns = changed_ns if changed_ns < time.time_ns() - SETTLED_NS else -1
        self._names = set(os.listdir(self._bells_fd)) - {self.name}
        for name in self._others.keys() - self._names:
            self._drop(name)

    def _reach(self, name: str) -> socket.socket:
        if name not in self._others:
            self._others[name] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self._others[name].connect(self._address(name))
        return self._others[name]

    def _drop(self, name: str) -> None:
        if name in self._others:
            self._others.pop(name).close()

    def close(self) -> None:
        self._own.close()
        for other in self._others.values():
            other.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._bells_fd)


# --------------------------------------------------------------------------------------------------------------------
# Owners
#
# A worker's life is an flock on `owners/<owner>`: the kernel lets go of it however the worker dies, so whoever can lock
# the file knows that the worker is dead. All of this happens inside `tree.turn()`: a look-up takes the lock
# for a moment, and would otherwise be taken for a living owner by another look-up.
# --------------------------------------------------------------------------------------------------------------------


def _lock_owner(tree: _Tree, owner: str) -> int:
    fd = os.open(owner, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=tree.owners_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise QueueUnavailable(f"the owner {owner} is at work already") from None
    return fd


def _is_dead(tree: _Tree, owner: str) -> bool:
    try:
        fd = os.open(owner, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tree.owners_fd)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _remove_dead_owners(tree: _Tree) -> None:
    for owner in os.listdir(tree.owners_fd):
        if _is_dead(tree, owner):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(owner, dir_fd=tree.owners_fd)


def _read_boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def _boot_s() -> float:
    """Seconds since boot, time asleep included: a lease must run out in a machine that was suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# --------------------------------------------------------------------------------------------------------------------
# Bodies
#
# A body's file is written under its final name, which is random and means nothing until a row names it; the row is
# submitted after file and directory are on disk. Whatever dies in between leaves a file that no row names. While a file
# grows it is locked, so that `sweep` tells a slow body from an orphan.
# --------------------------------------------------------------------------------------------------------------------


class _BodyFile:
    """A body on its way to disk. Its methods block, so run in a thread, one at a time; `keep` or `discard` ends it.

    One that has failed for want of room may be called again: it goes on where it stopped.
    """

    def __init__(self, bodies_fd: int, length: int = 0) -> None:
        """If its `length` is known, `create` takes all the room at once, or fails."""
        self._bodies_fd = bodies_fd
        self._fd = -1
        self._length = length
        self._written = 0
        self._left = memoryview(b"")
        self.name = uuid.uuid4().hex

    def create(self) -> None:
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self.name, flags, 0o600, dir_fd=self._bodies_fd)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._length:
            _allocate(self._fd, self._length)

    def add(self, pieces: Sequence[bytes]) -> None:
        """What is to be written next; only once all before it is."""
        self._left = memoryview(b"".join(pieces))

    def write(self) -> None:
        while self._left:
            count = os.write(self._fd, self._left)
            self._left = self._left[count:]
            self._written += count

    def keep(self) -> None:
        if self._length:
            os.ftruncate(self._fd, self._written)  # it may have had less to say than it announced
        os.utime(self._fd)  # the last bytes may be hours old; the time to name the file begins now
        os.fsync(self._fd)
        os.fsync(self._bodies_fd)
        self._close()

    def discard(self) -> None:
        self._close()
        _unlink_bodies(self._bodies_fd, [self.name])

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _allocate(fd: int, bytes_count: int) -> None:
    """Takes up room for a file, all of it or none; OSError if there is not as much."""
    before_bytes = os.fstat(fd).st_size
    try:
        os.posix_fallocate(fd, 0, bytes_count)
    except OSError as error:
        os.ftruncate(fd, before_bytes)  # some file systems keep what they could get
        if isinstance(_disk_error(error), QueueFull):
            raise
        log.warning(f"no room can be taken up beforehand: {error.strerror}")


def _unlink_bodies(bodies_fd: int, files: Iterable[str]) -> int:
    count = 0
    for name in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=bodies_fd)
            count += 1
    return count


def _list_old_bodies(bodies_fd: int, before_s: float) -> list[str]:
    """Body files not written to since `before_s`, of the file system's own clock."""
    old = []
    for entry in os.scandir(bodies_fd):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_mtime < before_s:
                old.append(entry.name)
    return old


def _unlink_orphans(bodies_fd: int, files: Iterable[str]) -> int:
    count = 0
    for name in files:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=bodies_fd)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            count += _unlink_bodies(bodies_fd, [name])
        except BlockingIOError:
            pass  # someone is still writing it
        finally:
            os.close(fd)
    return count


def _open_body(tree: _Tree, name: str, bytes_count: int) -> BinaryIO:
    """The file of a body, checked as far as can be without reading it; QueueDamaged only for what no retry mends."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=tree.bodies_fd)
    except FileNotFoundError as error:
        if not tree.has_bodies:  # a directory that was moved, or whose disk is not mounted, tells nothing of its files
            raise QueueUnavailable("the directory of stored bodies was moved or removed") from error
        raise QueueDamaged("the file of a stored body is gone") from error
    file = os.fdopen(fd, "rb")
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        size_bytes = os.fstat(fd).st_size
        if size_bytes != bytes_count:
            raise QueueDamaged(f"the file of a stored body has {size_bytes} bytes instead of {bytes_count}")
        stack.pop_all()
    return file


def _read_excerpt(tree: _Tree, name: str, bytes_count: int) -> bytes:
    """How a result begins; its time to be named begins anew, since a full disk may keep it waiting for hours."""
    with _open_body(tree, name, bytes_count) as file:
        os.utime(file.fileno())
        return file.read(EXCERPT_BYTES)


# --------------------------------------------------------------------------------------------------------------------
# The writer
#
# One thread commits for everyone in this process. It takes all operations that wait, runs them in one transaction and
# answers them together; while that commit is on its way to the disk, the next group gathers. Puts that stand next to
# each other, which is what a busy gateway's groups are made of, go in by one statement for many. An operation that
# fails without having written anything fails alone. One that fails half-way is left out and the others are run again
# from the start, so a savepoint for each is not needed. When the disk fails, the whole group fails with the same error.
# --------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Operation:
    """Something to write. `alone`: inside the turn but outside any transaction. `joins`: together with its like."""

    run: Callable[[_Transaction], Any]
    future: asyncio.Future[Any]
    alone: bool
    joins: bool = False
    bytes_count: int = 0  # of a body that goes into a row
    answer: Any = None
    error: BaseException | None = None

    @property
    def refused_file(self) -> str | None:
        """The body's file of a call that did not get into the queue: no row names it, or ever will."""
        if not isinstance(self.run, _Put):
            return None
        file = self.run.call.body.file
        return None if isinstance(self.answer, Call) and self.answer.body.file == file else file

    def settle(self) -> None:
        """Answers the one who waits; on the event loop, as it is a future of asyncio."""
        if self.future.done():
            return  # cancelled meanwhile
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


class _Writer:
    """The thread that writes. `on_ring` is called on the event loop with what each commit has to tell."""

    def __init__(self, parts: _Parts, on_ring: Callable[[Ring], None]) -> None:
        tree = parts.tree
        self._tree = tree
        self._db = parts.db
        self._reserve = parts.reserve
        self._bells = parts.bells
        self._on_ring = on_ring
        self._loop = asyncio.get_running_loop()
        self._path = tree.database
        self._file = self._path.stat()
        self._gathered: list[_Operation] = []
        self._waiting: queue.SimpleQueue[Sequence[_Operation] | None] = queue.SimpleQueue()
        self.commit_count = 0
        self._thread = threading.Thread(target=self._work, name="spool-writer", daemon=True)
        self._thread.start()

    def submit(
        self, run: Callable[[_Transaction], T], *, alone: bool = False, body: StoredBody | None = None
    ) -> asyncio.Future[T]:
        """The future of what `run` returns, done once that is on disk; `body`: what it writes that may be large."""
        future: asyncio.Future[T] = self._loop.create_future()
        joins = False
        if isinstance(run, _Put):
            joins, body = run.call.idempotency_key is None, run.call.body
        bytes_count = 0 if body is None or body.inline is None else body.bytes_count
        if not self._gathered:
            self._loop.call_soon(self.hand_over)
        self._gathered.append(_Operation(run, future, alone, joins, bytes_count))
        return future

    def hand_over(self) -> None:
        """Give the thread what this turn of the loop has brought: one by one, the first would go to the disk alone."""
        gathered, self._gathered = self._gathered, []
        if gathered:
            self._waiting.put(gathered)

    def stop(self) -> None:
        """Ends the thread after all that was handed over, and closes the connection; blocks until then."""
        self._waiting.put(None)
        self._thread.join()
        with contextlib.suppress(QueueUnavailable), self._tree.turn():  # the last one to close writes the journal back
            self._db.close()
        self._db.close()

    def _work(self) -> None:
        going = True
        while going:
            group: list[_Operation] = []
            for operations in self._next_group():
                if operations is None:
                    going = False
                else:
                    group.extend(operations)
            ring = self._serve(group)
            self._drop_refused(group)
            self._answer(group, ring)

    def _next_group(self) -> list[Sequence[_Operation] | None]:
        """What waits: up to GROUP_COUNT operations, and what came in the same turn as the last of them."""
        groups = [self._waiting.get()]
        with contextlib.suppress(queue.Empty):
            while sum(len(group or ()) for group in groups) < GROUP_COUNT:
                groups.append(self._waiting.get_nowait())
        return groups

    def _drop_refused(self, group: Sequence[_Operation]) -> None:
        """The bodies of refused calls go before their callers know: on a full disk each would keep it full."""
        told = [operation for operation in group if operation.error is not None or operation.answer is not None]
        try:
            _unlink_bodies(self._tree.bodies_fd, filter(None, (operation.refused_file for operation in told)))
        except OSError as error:  # then `sweep` finds them
            log.warning(f"the body of a refused call cannot be removed: {error}")

    def _answer(self, group: Sequence[_Operation], ring: Ring) -> None:
        def settle() -> None:
            for operation in group:
                operation.settle()
            if ring:
                self._on_ring(ring)

        with contextlib.suppress(RuntimeError):  # the loop was closed without closing the Spool: nobody waits
            self._loop.call_soon_threadsafe(settle)
        if ring:
            self._bells.ring(ring)

    def _serve(self, group: Sequence[_Operation]) -> Ring:
        """Runs the group; afterwards each operation has its answer or its error. Returns whom to ring."""
        rings: list[Ring | None] = []
        together: list[_Operation] = []
        bytes_count = 0
        for operation in group:
            if operation.future.cancelled():
                operation.error = QueueUnavailable("its caller has gone")
            elif operation.alone:
                rings.append(self._guard([operation], partial(self._run_alone, operation)))
            else:
                together.append(operation)
                bytes_count += operation.bytes_count
        if together and self._reserve.has_room(bytes_count):
            rings.append(self._guard(together, partial(self._commit, together)))
        else:
            _refuse(together)
        failed = [operation for operation in group if operation.error is not None]
        refused = [operation for operation in failed if isinstance(operation.error, QueueFull)]
        if refused:
            rings += self._serve_without_room(refused)
        return reduce(operator.or_, filter(None, rings), Ring.NOTHING)

    def _serve_without_room(self, group: Sequence[_Operation]) -> list[Ring | None]:
        """Steps that end calls go first and one by one: a group may need more than the reserve has, a step does not."""
        puts = [operation for operation in group if isinstance(operation.run, _Put)]
        others = [operation for operation in group if not isinstance(operation.run, _Put)]
        rings = [self._guard([operation], partial(self._work_without_room, operation)) for operation in others]
        self._guard((), self.tidy)
        if puts and self._reserve.has_room(sum(operation.bytes_count for operation in puts)):
            for operation in puts:
                operation.error = None
            rings.append(self._guard(puts, partial(self._commit, puts)))
        self._reserve.tell()
        return rings

    def _work_without_room(self, operation: _Operation) -> Ring:
        """Does a step, if need be with the reserve. First the journal's pages go to their places, which takes room."""
        operation.error = None
        work = (
            partial(self._run_alone, operation) if operation.alone else partial(self._commit, [operation], short=True)
        )
        try:
            ring = work()
        except sqlite3.Error as error:
            if not isinstance(_sqlite_error(error), QueueFull):
                raise
        else:
            if not isinstance(operation.error, QueueFull):
                return ring
        operation.error = None
        self._reserve.release()
        self.tidy(refill=False)
        try:
            return work()
        finally:
            self.tidy()

    def tidy(self, *, refill: bool = True) -> None:
        """Gives the journal's room back, to the reserve; what cannot be done now is done behind a later step."""
        with contextlib.suppress(sqlite3.Error, OSError):
            _truncate_journal(self._db)
            if refill:
                self._reserve.refill()

    def _run_alone(self, operation: _Operation) -> Ring:
        self._run(operation, _Transaction(self._db))
        return Ring.NOTHING

    def _guard(self, operations: Sequence[_Operation], work: Callable[[], T]) -> T | None:
        """What `work` returns from inside a turn; None if the disk fails, which fails all of `operations`."""
        try:
            with self._tree.turn():
                self._check_place()
                return work()
        except sqlite3.Error as error:
            problem: Exception = _sqlite_error(error)
            if not isinstance(problem, QueueFull):  # of which the reserve tells, once
                log.error(f"the queue in {self._tree.path} cannot be written: {error}")
        except OSError as error:
            problem = _disk_error(error)
        except QueueUnavailable as error:
            problem = error
        except MemoryError:
            problem = QueueUnavailable(NO_MEMORY)
        except Exception:  # noqa: BLE001 - a thread's boundary: a writer that died here would keep everyone waiting for ever
            log.exception(f"the queue in {self._tree.path} cannot be written")
            problem = QueueUnavailable("the queue cannot be used: see the log")
        for operation in operations:
            operation.error = problem
        return None

    def _check_place(self) -> None:
        """A file that was moved or removed under us would take every write, and lose it."""
        try:
            if os.path.samestat(self._path.stat(), self._file):
                return
        except FileNotFoundError:
            pass
        raise QueueUnavailable("the queue's file was moved or removed: restart what uses it")

    def _commit(self, group: Sequence[_Operation], *, short: bool = False) -> Ring:
        while True:
            tx = _Transaction(self._db, short=short)
            before = self._db.total_changes
            try:
                self._db.execute("BEGIN IMMEDIATE")
                if self._run_all(group, tx):
                    if tx.waiting:
                        tx.write_waiting()
                    self._db.execute("COMMIT")
                    self.commit_count += self._db.total_changes != before
                    return tx.ring
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _run_all(self, group: Sequence[_Operation], tx: _Transaction) -> bool:
        """False when an operation has failed half-way, and the transaction must not be committed."""
        for joins, run in itertools.groupby(group, operator.attrgetter("joins")):
            operations = list(run)
            if joins and len(operations) > 1:
                if not self._run_together(operations, tx):
                    return False
            elif not all(self._run_apart(operation, tx) for operation in operations):
                return False
        return True

    def _run_together(self, operations: Sequence[_Operation], tx: _Transaction) -> bool:
        """False when one of them cannot be done: which one, and why, is found out by running each by itself."""
        try:
            _put_all(tx, [cast(_Put, operation.run) for operation in operations])
        except Exception as error:
            if _is_disk_trouble(error):
                raise
            for operation in operations:
                operation.joins = False
            return False
        return True

    def _run_apart(self, operation: _Operation, tx: _Transaction) -> bool:
        if operation.error is not None:
            return True
        before = self._db.total_changes
        self._run(operation, tx)
        return operation.error is None or self._db.total_changes == before

    def _run(self, operation: _Operation, tx: _Transaction) -> None:
        try:
            operation.answer = operation.run(tx)
        except sqlite3.Error as error:
            if _is_disk_trouble(error):
                raise
            operation.error = error
        except OSError as error:
            operation.error = _disk_error(error)
        except Exception as error:  # noqa: BLE001 - a task's boundary: its caller gets it
            operation.error = error


def _refuse(operations: Iterable[_Operation]) -> None:
    for operation in operations:
        operation.error = QueueFull(DISK_FULL)


def _is_disk_trouble(error: Exception) -> bool:
    """Tell whether the disk or the file is in trouble, not the operation."""
    return type(error) in (sqlite3.OperationalError, sqlite3.InternalError, sqlite3.DatabaseError)


class _Readers:
    """A few threads with a connection each: in WAL mode reading waits for no commit."""

    THREAD_COUNT = 2

    def __init__(self, path: Path) -> None:
        self._idle: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        for _ in range(self.THREAD_COUNT):
            db = _connect(path)
            db.execute("PRAGMA query_only = ON")
            self._idle.put(db)
        self._threads = ThreadPoolExecutor(self.THREAD_COUNT, thread_name_prefix="spool-reader")

    async def run(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """What `read` returns, from one consistent view of the queue."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, read)

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        db = self._idle.get()
        try:
            db.execute("BEGIN")
            try:
                return read(db)
            finally:
                db.execute("ROLLBACK")
        except sqlite3.Error as error:
            raise _sqlite_error(error) from error
        except MemoryError as error:  # how Python hands on SQLITE_NOMEM
            raise QueueUnavailable(NO_MEMORY) from error
        finally:
            self._idle.put(db)

    def close(self) -> None:
        self._threads.shutdown()
        for _ in range(self.THREAD_COUNT):
            self._idle.get().close()


# --------------------------------------------------------------------------------------------------------------------
# The Spool
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Parts:
    """What opening a queue yields, before there is a thread or a socket."""

    limits: QueueLimits
    tree: _Tree
    token: str
    db: sqlite3.Connection
    reserve: _Reserve
    readers: _Readers
    bells: _Bells


def _open_parts(path: Path, limits: QueueLimits) -> _Parts:
    path = path.absolute()
    if sqlite3.sqlite_version_info < SQLITE_VERSION:
        raise QueueUnavailable(
            f"the queue needs SQLite {'.'.join(map(str, SQLITE_VERSION))}, this Python has {sqlite3.sqlite_version}"
        )
    try:
        with contextlib.ExitStack() as stack:
            tree = stack.enter_context(contextlib.closing(_open_tree(path)))
            with tree.turn():
                reserve = stack.enter_context(contextlib.closing(_Reserve(tree, limits.reserve_bytes)))
                db = stack.enter_context(contextlib.closing(_open_in_room(tree, reserve)))
                token = _read_token(tree)
                reserve.open()
                db.execute(f"PRAGMA wal_autocheckpoint = {reserve.journal_pages}")
            readers = stack.enter_context(contextlib.closing(_Readers(tree.database)))
            bells = _Bells(tree.bells_fd)
            stack.pop_all()
    except OSError as error:
        raise _open_error(path, error) from error
    except sqlite3.Error as error:
        raise _sqlite_error(error) from error
    return _Parts(limits, tree, token, db, reserve, readers, bells)


class Spool:
    """A queue, open in this process. Every method may raise QueueUnavailable, QueueFull or QueueDamaged.

    Writes are durable when they return. A write whose caller is cancelled may still happen.
    """

    def __init__(self, parts: _Parts, now: Callable[[], float]) -> None:
        """Not for callers: use `Spool.open`."""
        self.token = parts.token  # known only to those who can open the queue: how gateway and worker trust each other
        self._tree = parts.tree
        self._limits = parts.limits
        self._reserve = parts.reserve
        self._readers = parts.readers
        self._now = now
        self._boot = _read_boot_id()
        self._loop = asyncio.get_running_loop()
        self._bells = parts.bells
        self._writer = _Writer(parts, self._on_ring)
        self._files = ThreadPoolExecutor(4, thread_name_prefix="spool-files")
        self._result_turn = asyncio.Lock()  # of results that have found no room
        self._owners: dict[str, int] = {}
        self._last_flow: dict[Kind, _Flow] = {"call": ("", ""), "callback": ("", "")}
        self._reclaimed_s = -RECLAIM_S
        self._greatest_offset_s = self._offset_s()
        self._call_seen_s = self._callback_seen_s = -1e300  # what was due by then has been claimed or reported
        self._work = asyncio.Event()
        self._cancel = asyncio.Event()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._waiters_changed = False
        self._waiters_task: asyncio.Task[None] | None = None
        self._closed = False
        self._loop.add_reader(self._bells.fileno(), self._on_bell)

    # -- opening and closing

    @classmethod
    async def open(
        cls, directory: Path, *, limits: QueueLimits | None = None, now: Callable[[], float] = time.time
    ) -> Spool:
        """Opens the queue in `directory`, or creates it (0700); `now` is the wall clock, in seconds since the epoch.

        Brings an older file to the newest version. Raises QueueDamaged, naming file and remedy, for a file that is
        damaged, foreign or newer; QueueUnavailable, naming path and owner, when it may not be used.
        """
        spool = cls(await asyncio.to_thread(_open_parts, Path(directory), limits or QueueLimits()), now)
        try:
            await spool.reclaim()
        except QueueFull:
            log.warning(f"the disk of the queue in {directory} is full")  # it can be read, and room may come
        except BaseException:
            await spool.close()
            raise
        return spool

    async def close(self) -> None:
        """Finishes the writes under way and lets go of everything; leases still held become void. May be repeated."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._bells.fileno())
        if self._waiters_task is not None:
            self._waiters_task.cancel()
        self._writer.hand_over()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._files.shutdown()
        self._readers.close()
        self._writer.stop()
        self._bells.close()
        with contextlib.suppress(QueueUnavailable), self._tree.turn():
            for owner in self._owners:
                os.unlink(owner, dir_fd=self._tree.owners_fd)  # an owner without a file is dead
        for fd in self._owners.values():
            os.close(fd)
        self._reserve.close()
        self._tree.close()

    def _write(
        self, run: Callable[[_Transaction], T], *, alone: bool = False, body: StoredBody | None = None
    ) -> asyncio.Future[T]:
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        return self._writer.submit(run, alone=alone, body=body)

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        return await self._readers.run(read)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Disk work that is not SQLite's, off the event loop; a cancelled caller still waits for its end."""
        if self._closed:
            raise QueueUnavailable("the queue is closed")
        future = self._loop.run_in_executor(self._files, work)
        try:
            return await asyncio.shield(future)
        except OSError as error:
            raise _disk_error(error) from error
        except MemoryError as error:
            raise QueueUnavailable(NO_MEMORY) from error
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            raise

    # -- bodies

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody:
        """Makes a body safe before the call that names it is put, or the result finished.

        Up to INLINE_BYTES it stays in memory and goes into the row; beyond that into a file, on disk when this returns.
        The body must be named within ORPHAN_S, else `sweep` takes it for a crash's leftover. Raises BodyTooLarge above
        `limit_bytes`. On any error, also when cancelled, nothing is left of the body.
        """
        if isinstance(chunks, bytes) and len(chunks) <= INLINE_BYTES:
            if limit_bytes is not None and len(chunks) > limit_bytes:
                raise BodyTooLarge(limit_bytes)
            return StoredBody(len(chunks), chunks, None)
        source = _once(chunks) if isinstance(chunks, bytes) else chunks
        return await self._store(source, limit_bytes, _BodyFile(self._tree.bodies_fd), self._write_body)

    async def store_result(
        self, chunks: AsyncIterator[bytes], limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody:
        """As `store_body`, for what a function has answered: it waits for room, however long.

        It may use half of the reserve. If its `length` is known it takes all its room at once or none: results that
        hold a part each, and wait for the rest, would wait for one another. The others are written one after another.
        Raises ResultLost if `chunks` breaks off after it has been kept waiting.
        """
        if length is not None and limit_bytes is not None and length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        waited = False

        async def write(work: Callable[[], None]) -> None:
            nonlocal waited
            waited |= await self._write_result(work, length or 0)

        try:
            return await self._store(chunks, limit_bytes, _BodyFile(self._tree.bodies_fd, length or 0), write)
        except BodyTooLarge:
            raise
        except FaashoundError as error:
            if not waited or self._closed:
                raise
            raise ResultLost(f"the answer broke off while it waited for room in the queue: {error}") from error

    async def _write_body(self, work: Callable[[], None]) -> None:
        """A body that is on its way when the disk gets full is refused as well: its call could not be put."""
        if not self._reserve.has_room(FILE_CHUNK_BYTES):
            await self._write(lambda _: self._writer.tidy(), alone=True)
            if not self._reserve.has_room(FILE_CHUNK_BYTES):
                raise QueueFull(DISK_FULL)
        await self._in_thread(work)

    async def _write_result(self, work: Callable[[], None], length: int) -> bool:
        """Does `work`, which goes on where it stopped, until it succeeds; whether it had to wait."""
        turn: AbstractAsyncContextManager[None] = contextlib.nullcontext() if length else self._result_turn

        def write() -> None:
            if not self._reserve.has_half:  # the journal's half is let go of just now: it is not for us
                raise QueueFull(DISK_FULL)
            work()

        try:
            await self._in_thread(write)
            return False
        except (QueueFull, QueueUnavailable) as error:
            log.warning(f"a result waits to be stored: {error}")
        async with turn:
            while True:
                if self._reserve.free_bytes + self._reserve.whole_bytes // 2 >= length:
                    self._reserve.release(0.5)
                try:
                    await self._in_thread(write)
                    return True
                except (QueueFull, QueueUnavailable):
                    if self._closed:
                        raise
                await asyncio.sleep(ROOM_PAUSE_S)

    async def _store(
        self,
        source: AsyncIterator[bytes],
        limit_bytes: int | None,
        file: _BodyFile,
        write: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> StoredBody:
        """Collects a body, by `write` in `file` if it is long; `write` has the file's methods run in a thread."""
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

    async def open_body(self, body: StoredBody, chunk_bytes: int = FILE_CHUNK_BYTES) -> AsyncGenerator[bytes, None]:
        """The bytes of a stored body, in pieces of at most `chunk_bytes`; `aclose` it if you stop early.

        Raises QueueDamaged if the file is proved to be gone or of another length than it was; QueueUnavailable for
        whatever else keeps it from being read (no descriptors or memory, an I/O error), which may pass.
        """
        if body.file is None:
            inline = body.inline or b""
            for start in range(0, len(inline), chunk_bytes):
                yield inline[start : start + chunk_bytes]
            return
        left = body.bytes_count
        file = await self._in_thread(partial(_open_body, self._tree, body.file, body.bytes_count))
        with contextlib.closing(file):
            while piece := await self._in_thread(partial(file.read, chunk_bytes)):
                left -= len(piece)
                yield piece
        if left:
            raise QueueDamaged(f"the file of a stored body is {left} bytes too short")

    async def drop_body(self, body: StoredBody) -> None:
        """Removes the file of a body that no call names."""
        if body.file is not None:
            await self._drop_files([body.file])

    async def _drop_files(self, files: Collection[str]) -> int:
        return await self._in_thread(partial(_unlink_bodies, self._tree.bodies_fd, files)) if files else 0

    # -- submitting and following calls

    async def put(self, call: NewCall) -> Call:
        """Queues a call; it is on disk when this returns.

        The same idempotency key for the same function, while that call is remembered: the earlier Call is returned
        and the new body dropped. Raises KeyReused when that was another request, CallExists when the id is in use,
        TooManyQueued when the function has as many calls or bytes waiting as it may. Whatever this raises, the body is
        gone, also when the caller is cancelled, unless the call got into the queue all the same.
        """
        earlier = await self._write(_Put(call, _headers_text(call.headers), self._limits))
        return _accepted(call) if earlier is None else earlier

    async def get(self, call_id: str) -> Call | None:
        """The call, or None."""
        return await self._read(partial(_get, call_id=call_id))

    async def wait(self, call_id: str, timeout_s: float) -> Call:
        """The call once it is final, or as it is after `timeout_s`; CallUnknown if there is none (any more)."""
        ended = self._loop.create_future()
        self._waiters.setdefault(call_id, set()).add(ended)
        try:
            call = await self.get(call_id)
            if call is not None and call.state not in FINAL:
                await asyncio.wait([ended], timeout=timeout_s)
                call = await self.get(call_id)
        finally:
            waiting = self._waiters.get(call_id, set())
            waiting.discard(ended)
            if not waiting:
                self._waiters.pop(call_id, None)
        if call is None:
            raise CallUnknown(f"no call has the id {call_id}")
        return call

    async def cancel(self, call_id: str) -> State:
        """CANCELLED: it was queued and will not run. RUNNING: its worker is told. Raises CallFinished, CallUnknown."""
        return await self._write(partial(_cancel, call_id=call_id, now_s=self._now()))

    async def cancel_queued(self, *, function: FunctionName | None = None) -> int:
        """Cancels every queued call, of one function or of all, and drops their payloads; returns how many.

        In steps, so calls that come meanwhile may be among them. What runs goes on.
        """
        total, position = 0, -1
        while True:
            step = partial(_cancel_queued, function=function, now_s=self._now(), after_seq=position)
            dropped = await self._write(step)
            await self._drop_files(dropped.files)
            total += dropped.count
            if dropped.next is None:
                return total
            position = dropped.next[1]

    # -- owners and leases

    async def enlist(self, owner: str | None = None) -> str:
        """Makes this process an owner of leases, for as long as it lives, and returns the owner's name.

        What an earlier life of the same name still held is taken back. QueueUnavailable if the name is at work.
        """
        name = owner or f"{os.getpid()}-{secrets.token_hex(4)}"
        if "/" in name or "\0" in name or name.startswith("."):
            raise AssertionError(f"an owner's name is the name of a file: {name!r}")

        def lock(_: _Transaction) -> None:
            self._owners[name] = _lock_owner(self._tree, name)

        await self.reclaim()  # before the lock: afterwards what an earlier life left would seem alive
        await self._write(lock, alone=True)
        return name

    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Leases up to `limit` due calls from `queues`, and no more of a function than `room` says where it names it.

        A function with no room is passed over. `owner` must be enlisted here. Taking leases costs one commit; finding
        nothing costs none. If the caller is cancelled, what was claimed for it is released.
        """
        claimant, wanted = self._claimant(owner, lease_s), _Wanted(tuple(queues), limit, dict(room or {}))
        if limit <= 0:
            return []
        leases = await self._claimed("call", _claim, wanted, claimant)
        self._call_seen_s = claimant.now_s
        return leases

    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]:
        """Leases up to `limit` due callbacks of calls of `queues`; otherwise as `claim`.

        Destinations take turns as functions do, and `room` is theirs: see `destination_of`. Within one, the longest
        due comes first.
        """
        claimant, wanted = self._claimant(owner, lease_s), _Wanted(tuple(queues), limit, dict(room or {}))
        if limit <= 0:
            return []
        leases = await self._claimed("callback", _claim_callbacks, wanted, claimant)
        self._callback_seen_s = claimant.now_s
        return leases

    def _claimant(self, owner: str, lease_s: float) -> _Claimant:
        if owner not in self._owners:
            raise AssertionError(f"{owner} has not been enlisted: its leases would be void at once")
        return _Claimant(owner, self._now(), self._boot, _boot_s() + lease_s)

    async def _claimed(
        self,
        kind: Kind,
        claim: Callable[[_Transaction, _Wanted, _Flow, _Claimant], _Claimed],
        wanted: _Wanted,
        claimant: _Claimant,
    ) -> list[Lease]:
        def work(tx: _Transaction) -> list[Lease]:
            self._reclaim_sometimes(tx)
            leases, self._last_flow[kind] = claim(tx, wanted, self._last_flow[kind], claimant)
            return leases

        future = self._write(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._on_unwanted)
            raise

    def _on_unwanted(self, future: asyncio.Future[list[Lease]]) -> None:
        if future.cancelled() or future.exception() is not None or self._closed:
            return
        for lease in future.result():
            self._write(partial(_release, lease=lease, now_s=self._now()))

    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal:
        """Lets the leases last `lease_s` seconds from now; tells which are lost and which calls to cancel."""
        until_s = _boot_s() + lease_s
        return await self._write(partial(_renew, leases=tuple(leases), boot=self._boot, until_s=until_s))

    async def cancelled_ids(self, owner: str) -> frozenset[str]:
        """The calls that `owner` runs and someone wants cancelled; ask when `wait_for_cancel` returns."""
        return await self._read(partial(_cancelled_ids, owner=owner))

    async def reclaim(self) -> int:
        """Takes back what dead owners hold and what was not renewed in time; returns how many. `claim` does it too."""
        return await self._write(self._take_back)

    def _reclaim_sometimes(self, tx: _Transaction) -> None:
        if _boot_s() - self._reclaimed_s >= RECLAIM_S or self._offset_s() < self._greatest_offset_s - SET_BACK_S:
            self._take_back(tx)

    def _offset_s(self) -> float:
        return self._now() - _boot_s()

    def _take_back(self, tx: _Transaction) -> int:
        self._reclaimed_s = _boot_s()
        self._greatest_offset_s = self._offset_s()
        _follow_clock(tx, self._boot, self._greatest_offset_s)
        owners = tx.db.execute("SELECT DISTINCT owner FROM leases").fetchall()
        dead = {owner for (owner,) in owners if _is_dead(self._tree, owner)}
        return _take_back(tx, dead, self._boot, self._reclaimed_s, self._now())

    # -- ending a lease on a call: LeaseLost if someone else has it by now

    async def finish(self, lease: Lease, end: RunEnd) -> None:
        """The call has ended, also when a cancel came too late. On LeaseLost the result's file is dropped."""
        result, excerpt = end.result, None  # an inline body is its own excerpt, as long as it is kept
        if result is not None and result.file is not None:
            excerpt = await self._in_thread(partial(_read_excerpt, self._tree, result.file, result.bytes_count))
        due_s = self._now() if end.callback_due_s is None else end.callback_due_s
        try:
            files = await self._write(partial(_finish, lease=lease, ending=_Ending(end, excerpt, due_s)), body=result)
        except LeaseLost:
            if result is not None:
                await self.drop_body(result)
            raise
        await self._drop_files(files)

    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State:
        """Back into the queue until `due_s`; or CANCELLED, if asked for. `excerpt`: how the failed response begins."""
        kept = None if excerpt is None else excerpt[:EXCERPT_BYTES]
        return await self._write(partial(_retry, lease=lease, attempt=attempt, due_s=due_s, excerpt=kept))

    async def release(self, lease: Lease) -> None:
        """Hands back a call or a callback that was not tried: at once, in its old place, the attempt not counted."""
        await self._write(partial(_release, lease=lease, now_s=self._now()))

    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None:
        """The run was stopped because someone cancelled the call."""
        await self._write(partial(_finish_cancelled, lease=lease, attempt=attempt))

    # -- ending a lease on a callback

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None:
        """The outcome was delivered."""
        await self._write(partial(_end_callback, lease=lease, attempt=attempt, event=Event.SUCCEED))

    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None:
        """The delivery failed and is to be tried again at `due_s`."""
        await self._write(partial(_end_callback, lease=lease, attempt=attempt, event=Event.RETRY, due_s=due_s))

    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None:
        """The delivery has failed for good; kept until someone requeues or purges it."""
        await self._write(partial(_end_callback, lease=lease, attempt=attempt, event=Event.GIVE_UP))

    # -- waiting

    async def wait_for_work(self, timeout_s: float) -> bool:
        """True when there may be something to claim: a bell was rung, or a time has come. False after `timeout_s`.

        Each reason is given once: claim until nothing comes, or until there is no room, before waiting again. Sleeps
        at most IDLE_S; while idle it looks for dead owners once a second if others hold leases, else not at all.
        """
        deadline_s = self._loop.time() + min(timeout_s, IDLE_S)
        while not self._work.is_set():
            outlook = await self._read(
                partial(
                    _look_ahead,
                    call_after_s=self._call_seen_s,
                    callback_after_s=self._callback_seen_s,
                    mine=tuple(self._owners),
                )
            )
            left_s = max(0.0, deadline_s - self._loop.time())
            due_in_s = self._due_in_s(outlook)
            pause_s = min(left_s, due_in_s, RECLAIM_S if outlook.others_lease else IDLE_S)
            if await self._heard(self._work, pause_s):
                return True
            if due_in_s <= pause_s:
                self._mark_seen(outlook)
                return True
            if left_s <= pause_s:
                return False
            await self.reclaim()
        self._work.clear()
        return True

    def _due_in_s(self, outlook: _Outlook) -> float:
        due = [due_s for due_s in (outlook.call_due_s, outlook.callback_due_s) if due_s is not None]
        return max(0.0, min(due) - self._now()) if due else float("inf")

    def _mark_seen(self, outlook: _Outlook) -> None:
        """What has just been reported is not reported again, even if there is no room to claim it."""
        now_s = self._now()
        if outlook.call_due_s is not None and outlook.call_due_s <= now_s:
            self._call_seen_s = max(self._call_seen_s, outlook.call_due_s)
        if outlook.callback_due_s is not None and outlook.callback_due_s <= now_s:
            self._callback_seen_s = max(self._callback_seen_s, outlook.callback_due_s)

    async def wait_for_cancel(self, timeout_s: float) -> bool:
        """True when someone has asked for the end of a running call, here or elsewhere; see `cancelled_ids`."""
        return await self._heard(self._cancel, timeout_s)

    async def _heard(self, event: asyncio.Event, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        event.clear()
        return True

    def _on_bell(self) -> None:
        self._on_ring(self._bells.hear())

    def _on_ring(self, ring: Ring) -> None:
        if ring & Ring.WORK:
            self._work.set()
        if ring & Ring.CANCEL:
            self._cancel.set()
        if ring & Ring.FINISHED and self._waiters:
            self._waiters_changed = True
            if self._waiters_task is None or self._waiters_task.done():
                self._waiters_task = self._loop.create_task(self._settle_waiters())

    async def _settle_waiters(self) -> None:
        """One look for all who wait, however many bells rang meanwhile."""
        while self._waiters_changed and self._waiters and not self._closed:
            self._waiters_changed = False
            try:
                ended = await self._read(partial(_ended, call_ids=tuple(self._waiters)))
            except FaashoundError as error:
                log.error(f"cannot look for finished calls: {error}")
                return
            for call_id in ended:
                for future in self._waiters.pop(call_id, ()):
                    if not future.done():
                        future.set_result(None)

    # -- for people

    async def calls(
        self,
        *,
        state: State | None = None,
        function: FunctionName | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Call]:
        """Calls, newest first, without what may be long: path, query, callback URL, header fields, bodies, history.

        (`get` has them; they are empty or None here, and so one page takes little memory whatever callers send.)
        A page begins behind the call `before`, the last one of the page in front; CallUnknown if it is gone by now.
        """
        return await self._read(partial(_list, wanted=_Filter(state, function, limit, before)))

    async def requeue_dead(self, call_id: str) -> Call:
        """A dead letter is queued as if new: due now, no expiry, attempts from 0. Or CallNotDead, CallUnknown."""
        call, files = await self._write(partial(_requeue_dead, call_id=call_id, now_s=self._now()))
        await self._drop_files(files)
        return call

    async def requeue_callback(self, call_id: str) -> Call:
        """A dead callback is due now, attempts from 0. Raises CallNotDead, CallUnknown."""
        return await self._write(partial(_requeue_callback, call_id=call_id, now_s=self._now()))

    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int:
        """Deletes calls in a final state, except those with a callback under way; returns how many."""
        if state not in FINAL:
            raise AssertionError(f"calls that are {state.value} are not for purging: cancel them")
        total, position = 0, (0.0, -1)
        while True:
            step = partial(_purge, state=state, function=function, call_id=call_id, after_seq=position[1])
            dropped = await self._write(step)
            await self._drop_files(dropped.files)
            total += dropped.count
            if dropped.next is None:
                return total
            position = dropped.next

    async def stats(self) -> Stats:
        """The queue in figures; reads an index from end to end, so not for every request."""
        stats = await self._read(partial(_count, now_s=self._now(), commit_count=self._writer.commit_count))
        disk = await self._in_thread(partial(os.fstatvfs, self._tree.root_fd))
        free_bytes = disk.f_bavail * disk.f_frsize
        return replace(stats, free_bytes=free_bytes, reserve_bytes=self._reserve.held_bytes)

    @property
    def trouble(self) -> str | None:
        """What keeps the queue from taking calls, for /healthz; None if nothing is known to."""
        return None if self._closed else self._reserve.trouble()

    # -- housekeeping

    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept:
        """Drops results and calls that have been final for longer, leftovers of crashes, and gives their room back.

        Never touches dead letters or calls whose callback is not delivered, except for a dead letter's result, unless
        `bounds` says so; each of those that goes is logged. Works in small steps: writers are never kept waiting for
        more than one.
        """
        now_s, bounds = self._now(), bounds or Bounds()
        expired = 0
        while count := await self._write(partial(_expire, now_s=now_s)):
            expired += count
        while count := await self._write(partial(_expire_stale, now_s=now_s, before_s=now_s - bounds.queue_age_s)):
            expired += count
        results, files = await self._drop_old(_drop_results, now_s - keep_results_s)
        calls, more_files = await self._drop_old(_drop_calls, now_s - retention_s)
        letters, letter_files = await self._drop_letters(now_s, bounds)
        files += more_files + letter_files + await self._drop_orphans()
        await self._write(_forget_idle)
        await self._write(lambda _: _remove_dead_owners(self._tree), alone=True)
        return Swept(expired, results, calls, files, await self._shrink(), letters)

    async def _drop_letters(self, now_s: float, bounds: Bounds) -> tuple[int, int]:
        if bounds.dead_s == float("inf") and bounds.dead_bytes is None:
            return 0, 0
        before_s = await self._read(partial(_letters_before, now_s=now_s, bounds=bounds))
        count = files_count = 0
        while True:
            letters, files = await self._write(partial(_drop_letters, before_s=before_s))
            if not letters:
                return count, files_count
            for call_id, function in letters:
                log.warning("a dead letter was dropped: keep_dead is over", call_id=call_id, function=function)
            files_count += await self._drop_files(files)
            count += len(letters)

    async def _drop_old(self, step: _Step, before_s: float) -> tuple[int, int]:
        """Repeats a step to its end; returns how many rows and files it has dropped."""
        position: _Position | None = _START
        rows = files = 0
        while position is not None:
            dropped = await self._write(partial(step, before_s=before_s, after=position))
            files += await self._drop_files(dropped.files)
            rows += dropped.count
            position = dropped.next
        return rows, files

    async def _drop_orphans(self) -> int:
        old = await self._in_thread(partial(_list_old_bodies, self._tree.bodies_fd, time.time() - ORPHAN_S))
        unnamed = await self._read(partial(_unnamed, files=old)) if old else []
        return await self._in_thread(partial(_unlink_orphans, self._tree.bodies_fd, unnamed)) if unnamed else 0

    async def _shrink(self) -> int:
        """Returns bytes given back: free pages at the end of the file, and the journal."""
        before = self._size_bytes()
        with contextlib.suppress(QueueFull):  # moving pages takes room; the rest is moved when there is some
            while await self._write(_vacuum):
                pass
        await self._write(lambda tx: _truncate_journal(tx.db), alone=True)
        return max(0, before - self._size_bytes())

    def _size_bytes(self) -> int:
        journal = self._tree.path / f"{DATABASE}-wal"
        return sum(path.stat().st_size for path in (self._tree.database, journal) if path.exists())


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
