"""What a call is: its states, the types that cross between gateways, queues and workers, and the errors of a queue.

No I/O, and no rules: how a call comes from one state to the next stands in steps.py.
"""

from __future__ import annotations

from collections.abc import (
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Literal

from ..watchdog import FaashoundError, IdentityEnum
from .names import FunctionName

# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------

INLINE_BYTES = 64 * 1024  # up to here a row is cheaper than a file (sqlite.org/intern-v-extern-blob.html)


EXCERPT_BYTES = 4 * 1024  # of the last response, kept as long as the call, to tell why it failed


HISTORY_COUNT = 50  # attempts remembered per call


RESERVE_BYTES = 8 << 20  # kept free for ending calls: a hundred of the largest results that a row holds


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


class CallDamaged(QueueDamaged):
    """What is kept of one call cannot be read; all others are as they were."""


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
    """The lease has ended, or another worker has the call: drop the result, write nothing more."""

    status = 409


# --------------------------------------------------------------------------------------------------------------------
# Records
# --------------------------------------------------------------------------------------------------------------------

Headers = tuple[tuple[str, str], ...]


Kind = Literal["call", "callback"]


class State(IdentityEnum):
    """Where a call stands. The last four are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


FINAL = frozenset({State.DONE, State.DEAD, State.CANCELLED, State.EXPIRED})


class CallbackState(IdentityEnum):
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


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a worker learns by renewing: the fences of leases that are gone, and ids of calls that are to be cancelled.

    Not by ids: a worker may hold a call's run and, from before it was queued again, its callback.
    """

    lost: frozenset[int]
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
    """The queue in figures. Pending callbacks include those on their way; `commit_count` is of this open queue alone.

    `waiting` are the calls that are queued and the callbacks that are pending, by the name of their queue.
    `oldest_due_ages_s` tells how long the oldest due call of a queue has waited, where there is one.
    `free_bytes` of the queue's disk, and `reserve_bytes` that are to be kept there for ending calls; None: not known.
    """

    by_state: Mapping[State, int]
    by_function: Mapping[tuple[FunctionName, State], int]
    waiting: Mapping[str, int]
    oldest_due_ages_s: Mapping[str, float]
    callback_pending_count: int
    callback_dead_count: int
    commit_count: int
    free_bytes: int | None = None
    reserve_bytes: int | None = None

    @property
    def oldest_due_age_s(self) -> float | None:
        """How long the oldest due call of all has waited; None if none is due."""
        return max(self.oldest_due_ages_s.values(), default=None)


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is still to be done, and what was given up: found without a look at the calls that have ended well.

    `by_function` are the calls of each function that are queued and that run.
    """

    queued_count: int
    running_count: int
    dead_count: int
    callback_pending_count: int
    callback_dead_count: int
    oldest_due_age_s: float | None
    by_function: Mapping[FunctionName, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Changes:
    """What has become of the queue since a mark: `calls` as lists have them, as they are by now; `mark` is the next.

    `is_whole` is False where there was more than could be told: then what was read before is to be read again.
    """

    calls: Sequence[Call]
    mark: str
    is_whole: bool
