"""What follows from one attempt: again, given up, or over.  The heart of the worker, and pure.

Facts, the time and a source of chance go in, a decision comes out; nothing here reads a clock or touches a queue.

    step = next_step(Progress(attempts), policy, outcome, now_s, random.random)     # of a call; next_callback_step
    policy = policy_for(base, parse_annotations("resize", annotations))            # what the function asks for itself
    limit = limit.after(outcome, started_s, now_s)                                 # Concurrency: calls of it at once

An attempt is one try.  `max_retry_attempts` counts tries, the first included ("the amount of times to try sending
a message to a function before discarding it", OpenFaaS's documentation), so 0 and 1 both mean: no retry.

    answered, a code to be retried     retry, or dead after the last attempt, with that answer as the result
    answered, an error of the system   (X-OpenFaaS-Internal, and 400 or more) likewise, whatever its code
    answered otherwise                 done, be it 200 or 404: the function has spoken
    unreachable                        retry; in the end dead, reported as 503 with an empty body
    broken off                         after an answer had begun: retry; in the end dead, reported as 502 with what came
    over call_timeout                  retry if 504 is such a code; in the end dead, reported as 504 with what came
    unreadable                         dead at once, reported as 500: no further attempt would find the body again
    unstored                           dead at once, reported as 500: it has run, and its answer cannot be kept
    failed                             by a fault of the worker's own: retry; in the end dead, reported as 500
    prevented                          handed back, and not counted: this machine has no descriptors, or no disk, and
                                       nothing has been sent
    refused, held back                 callbacks only: dead at once, as only the operator can permit the address; and
                                       one more failed attempt at a destination that has been out of reach for long

A cancelled call has no outcome to judge: the queue ends it.

Expiry: a call whose next attempt could only come after `X-Expires` is dead at once, with what there is, instead of
waiting for nothing.  The attempt is never pulled forward: the wait protects the function.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple

from ..watchdog import FaashoundError, parse_count, parse_duration
from .model import Headers, StoredBody
from .steps import LOST_ERROR


class OutcomeKind(Enum):
    """How one attempt ended."""

    ANSWERED = "answered"
    UNREACHABLE = "unreachable"  # no connection, or none that lasted until an answer
    BROKEN_OFF = "broken off"  # the answer had begun, and its end has not come
    TIMED_OUT = "timed out"  # by the worker's own limit
    UNREADABLE = "unreadable"  # the queue has lost the body that was to be sent
    UNSTORED = "unstored"  # the function has answered, but its answer cannot be kept: it must not run again
    FAILED = "failed"  # the worker has a fault: something was raised that nothing foresees
    PREVENTED = "prevented"  # this machine lacks something that it will have again; nothing was sent
    REFUSED = "refused"  # only callbacks: the address is not permitted
    HELD_BACK = "held back"  # only callbacks: the destination has not been reached for long, and is not tried now


class AttemptOutcome(NamedTuple):
    """What one attempt gave.  `status`, `retry_after` and `internal` belong to ANSWERED, `error` to the others.

    `retry_after` is the field as received, `internal` tells whether X-OpenFaaS-Internal stands in the answer.  The rest
    is no matter of the rules: `body` and `headers` are what has been stored of a function's answer, which of one that
    broke off, or was too slow, is a part.
    """

    kind: OutcomeKind
    status: int = 0
    retry_after: str | None = None
    internal: bool = False
    error: str = ""
    body: StoredBody | None = None
    headers: Headers = ()
    duration_s: float = 0.0

    @property
    def reported_status(self) -> int:
        """The status that stands for this outcome towards the caller (X-Function-Status)."""
        if self.kind is OutcomeKind.TIMED_OUT:
            return 504
        if self.kind is OutcomeKind.BROKEN_OFF:
            return 502
        if self.kind in (OutcomeKind.UNREADABLE, OutcomeKind.UNSTORED, OutcomeKind.FAILED):
            return 500
        if self.kind is OutcomeKind.UNREACHABLE or (self.internal and self.status in (502, 503)):
            return 503
        return self.status

    @property
    def is_refusal(self) -> bool:
        """Whether the function has more calls than it takes."""
        return self.status in (429, 503)

    @property
    def has_answer(self) -> bool:
        """Whether there is a body of the function's to report; not when the gateway says it is unreachable."""
        if self.kind in (OutcomeKind.BROKEN_OFF, OutcomeKind.TIMED_OUT):
            return self.body is not None
        return self.kind is OutcomeKind.ANSWERED and not (self.internal and self.status in (502, 503))

    def __str__(self) -> str:
        return f"status {self.status}" if self.kind is OutcomeKind.ANSWERED else self.error or self.kind.value


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed attempt is followed by another.  `growth` is the factor from one wait to the next."""

    max_attempts: int = 10
    first_wait_s: float = 10.0
    max_wait_s: float = 120.0
    codes: frozenset[int] = frozenset({408, 429, 500, 502, 504})
    backoff: str = "exponential"
    growth: int = 2

    @property
    def max_retries_count(self) -> int:
        """Attempts after the first (X-Retry-Max)."""
        return max(self.max_attempts - 1, 0)


# Callbacks: eight attempts are spread over two and a half hours, so that a receiver's outage or a bad deployment
# passes in between, with jitter; Standard Webhooks recommends both.
CALLBACK_POLICY = RetryPolicy(8, first_wait_s=5.0, max_wait_s=3600.0, codes=frozenset(), backoff="equal", growth=4)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call has come: attempts made, the one just ended included, and what bounds further ones."""

    attempts_made: int
    expires_s: float | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """It is over: the function has answered, well or not (a callback is due), or the callback is delivered."""

    status: int


@dataclass(frozen=True, slots=True)
class RetryAt:
    """Try again at `due_s` (epoch seconds).  The caller is not told yet."""

    due_s: float


@dataclass(frozen=True, slots=True)
class Dead:
    """It is given up.  For a call a callback is due: with `status`, and an empty body unless `with_answer`."""

    reason: str
    status: int
    with_answer: bool


@dataclass(frozen=True, slots=True)
class HandBack:
    """The attempt could not be made here and now: it does not count, and the worker that claims it next makes it."""


Step = Done | RetryAt | Dead | HandBack


def next_step(
    progress: Progress, policy: RetryPolicy, outcome: AttemptOutcome, now_s: float, random: Callable[[], float]
) -> Step:
    """Return what to do with a call after an attempt that ended at `now_s` (epoch seconds) with `outcome`.

    `random` gives numbers from 0 to 1, as `random.random`.
    """
    if outcome.kind is OutcomeKind.PREVENTED:
        return HandBack()
    if not _calls_for_retry(policy, outcome):
        return (
            Done(outcome.status)
            if outcome.kind is OutcomeKind.ANSWERED
            else _dead(f"not to be retried: {outcome}", outcome)
        )
    if progress.attempts_made >= policy.max_attempts:
        return _dead(f"gave up after {_count(progress.attempts_made)}: {outcome}", outcome)
    due_s = now_s + retry_wait_s(policy, progress.attempts_made, outcome, now_s, random)
    if progress.expires_s is not None and due_s >= progress.expires_s:
        return _dead(f"expires before its next attempt, after {_count(progress.attempts_made)}: {outcome}", outcome)
    return RetryAt(due_s)


LOST_RUNS_COUNT = 3  # a worker may die for reasons of its own, but not each time that it has the same lease


def is_poison(attempts_made: int, policy: RetryPolicy, errors: Sequence[str | None]) -> bool:
    """Tell whether what is about to be tried (that attempt included) has been begun too often without an outcome.

    Attempts whose worker died were not followed by a step; a call, or the delivery of a result, that kills its
    workers would go on for ever.  `errors` are those of the attempts before, or of the last of them: after one that
    had an outcome there is another, also where fewer are allowed by now than have been made.
    """
    if attempts_made <= max(policy.max_attempts, 1) + LOST_RUNS_COUNT:
        return False
    return all(error == LOST_ERROR for error in errors[-LOST_RUNS_COUNT - 1 :])


def poison_step(attempts_made: int) -> Dead:
    """Return what becomes of such a call, or such a callback."""
    reason = f"gave up after {_count(attempts_made - 1)}: the last had no outcome, as the workers that ran it died"
    return Dead(reason, 503, False)


def _calls_for_retry(policy: RetryPolicy, outcome: AttemptOutcome) -> bool:
    match outcome.kind:
        case OutcomeKind.ANSWERED:
            return outcome.status in policy.codes or (outcome.internal and outcome.status >= 400)
        case OutcomeKind.TIMED_OUT:
            return outcome.reported_status in policy.codes
        case OutcomeKind.UNREACHABLE | OutcomeKind.BROKEN_OFF | OutcomeKind.FAILED:
            return True
        case OutcomeKind.UNREADABLE | OutcomeKind.UNSTORED:
            return False
        case _:
            raise AssertionError(f"the call of a function cannot end as {outcome.kind}")


def next_callback_step(
    attempts_made: int, policy: RetryPolicy, outcome: AttemptOutcome, now_s: float, random: Callable[[], float]
) -> Step:
    """Return what to do with a callback after an attempt that ended at `now_s` with `outcome`.

    As Standard Webhooks has it: 2xx is delivered; 410 means "no more of these"; everything else, also 3xx
    and 404, is a failure to retry, because a receiver's bad deployment looks like that and a person repairs it.  An
    address that is not permitted ends it too: only the operator can change that, and may then send it again.  A result
    that the queue has lost is tried again as well (a disk may be mounted late, a backup brought back), and given up in
    the end: an empty body under the function's status would be taken for the function's word.
    """
    if outcome.kind is OutcomeKind.PREVENTED:
        return HandBack()
    if outcome.kind is OutcomeKind.ANSWERED and 200 <= outcome.status < 300:
        return Done(outcome.status)
    if outcome.kind is OutcomeKind.REFUSED or outcome.status == 410:
        return _dead(str(outcome), outcome)
    if attempts_made >= policy.max_attempts:
        return _dead(f"gave up after {_count(attempts_made)}: {outcome}", outcome)
    return RetryAt(now_s + retry_wait_s(policy, attempts_made, outcome, now_s, random))


def _dead(reason: str, outcome: AttemptOutcome) -> Dead:
    return Dead(reason, outcome.reported_status, outcome.has_answer)


def _count(attempts_made: int) -> str:
    return f"{attempts_made} attempt{'' if attempts_made == 1 else 's'}"


# ---------------------------------------------------------------------------------------------------------------
# Waits.
# ---------------------------------------------------------------------------------------------------------------

MAX_RETRY_AFTER_S = 86400.0  # a day: beyond it the field says "never", and a slip of a digit should not


_GROWTH_STEPS_MAX = 64  # enough to pass every max_wait_s, few enough for a float


def retry_wait_s(
    policy: RetryPolicy, attempts_made: int, outcome: AttemptOutcome, now_s: float, random: Callable[[], float]
) -> float:
    """Return the seconds to wait before the next attempt.

    `Retry-After` on 429 and 503 wins, also over `max_wait_s`, but is not below the first wait.  Otherwise the waits
    grow from the first to `max_wait_s`; `full` jitter draws from 0 to that, `equal` from its upper half.
    """
    if outcome.kind is OutcomeKind.ANSWERED and outcome.status in (429, 503) and outcome.retry_after is not None:
        asked_s = parse_retry_after(outcome.retry_after, now_s)
        if asked_s is not None:
            return max(asked_s, policy.first_wait_s)
    steps = min(attempts_made - 1, _GROWTH_STEPS_MAX)
    wait_s = min(policy.first_wait_s * float(policy.growth) ** steps, policy.max_wait_s)
    match policy.backoff:
        case "exponential":
            return wait_s
        case "full":
            return wait_s * random()
        case "equal":
            return wait_s / 2 + wait_s / 2 * random()
        case _:
            raise AssertionError(f"backoff {policy.backoff!r} is not among those that its parser lets through")


# RFC 9110 5.6.7.  strptime reads names of days and months in the C locale unless a program sets LC_TIME; ours do not.
_HTTP_DATE_FORMS = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%Y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


_TWO_DIGIT_YEAR = re.compile(r"(?<=-)[0-9]{2}(?= )", re.ASCII)


def parse_retry_after(text: str, now_s: float) -> float | None:
    """Return the seconds from `now_s` (epoch seconds) that a Retry-After field asks for, None if it makes no sense.

    Takes whole seconds and the three forms of HTTP-date (RFC 9110 10.2.3); a date that has passed is 0 seconds, and
    nothing is more than a day.
    """
    if re.fullmatch(r"[0-9]+", text, re.ASCII):
        return min(float(text), MAX_RETRY_AFTER_S)
    if not text.isascii():
        return None
    this_year = datetime.fromtimestamp(now_s, UTC).year
    # Two digits are the year that is at most 50 years ahead, else one in the past (RFC 9110 5.6.7).
    text = _TWO_DIGIT_YEAR.sub(lambda match: str(this_year - 49 + (int(match[0]) - this_year + 49) % 100), text)
    for form in _HTTP_DATE_FORMS:
        try:
            date = datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        return min(max(date.timestamp() - now_s, 0.0), MAX_RETRY_AFTER_S)
    return None


# ---------------------------------------------------------------------------------------------------------------
# Annotations: what a function asks for itself.
# ---------------------------------------------------------------------------------------------------------------


def parse_retry_codes(text: str) -> frozenset[int]:
    """Return the status codes in `text`, separated by commas; ValueError for what cannot be a failure."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[345][0-9]{2}", word, re.ASCII) for word in words):
        raise ValueError('allowed: status codes from 300 to 599, separated by commas ("429,502,504")')
    return frozenset(map(int, words))


class BadAnnotations(FaashoundError, ValueError):
    """A function's annotations make no sense; `problems` says of each bad one its value and what is allowed."""

    def __init__(self, function: str, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        lines = [f"function {function}: annotation {name}: {problem}" for name, problem in problems.items()]
        super().__init__("\n".join(lines))


@dataclass(frozen=True, slots=True)
class RetryAnnotations:
    """What the annotations of one function say of retries; None where they say nothing."""

    max_attempts: int | None = None
    codes: frozenset[int] | None = None
    first_wait_s: float | None = None
    max_wait_s: float | None = None


_RETRY_PREFIX = "com.openfaas.retry."


_RETRY_ANNOTATIONS: Mapping[str, tuple[str, Callable[[str], object]]] = {
    f"{_RETRY_PREFIX}attempts": ("max_attempts", parse_count),
    f"{_RETRY_PREFIX}codes": ("codes", parse_retry_codes),
    f"{_RETRY_PREFIX}min_wait": ("first_wait_s", parse_duration),
    f"{_RETRY_PREFIX}max_wait": ("max_wait_s", parse_duration),
}


def parse_annotations(function: str, annotations: Mapping[str, str]) -> RetryAnnotations:
    """Return what `annotations` say of retries.  To be called when functions are loaded, not at the first retry.

    Raises BadAnnotations, a ValueError, with each bad one, unknown names below our prefix included.
    """
    values: dict[str, Any] = {}
    problems = {}
    for name in sorted(name for name in annotations if name.startswith(_RETRY_PREFIX)):
        try:
            if name not in _RETRY_ANNOTATIONS:
                raise ValueError(f"no such annotation; allowed: {', '.join(_RETRY_ANNOTATIONS)}")
            attribute, parse = _RETRY_ANNOTATIONS[name]
            values[attribute] = parse(annotations[name])
        except ValueError as error:
            problems[name] = f"{annotations[name]!r}: {error}"
    if values.get("first_wait_s", 0) > values.get("max_wait_s", float("inf")):
        problems[f"{_RETRY_PREFIX}min_wait"] = f"is longer than {_RETRY_PREFIX}max_wait"
    if problems:
        raise BadAnnotations(function, problems)
    return RetryAnnotations(**values)


def policy_for(base: RetryPolicy, annotations: RetryAnnotations) -> RetryPolicy:
    """Return the worker's policy with a function's own word over it.

    Where the function gives one wait only and it crosses the worker's other one, that other gives way.
    """
    own = {name: value for name, value in dataclasses.asdict(annotations).items() if value is not None}
    policy = dataclasses.replace(base, **own)
    if policy.first_wait_s <= policy.max_wait_s:
        return policy
    if annotations.first_wait_s is not None:
        return dataclasses.replace(policy, max_wait_s=policy.first_wait_s)
    return dataclasses.replace(policy, first_wait_s=policy.max_wait_s)


# ---------------------------------------------------------------------------------------------------------------
# Concurrency: how many calls of one function may run at once.  Additive increase, multiplicative decrease, as TCP's
# congestion avoidance (RFC 5681): a full round of answers adds one, a refusal halves.  A function that answers has
# taken the call, and 404 or 500 is its business; that it was not reached says nothing of how much it bears.  Refusals
# come in bursts, all from calls started under the old limit, and mean one thing: so only a call started since the
# last cut can cut again.  It starts at the ceiling: most functions refuse nothing, and the first answer of a slow one
# may be an hour away.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Concurrency:
    """The limit for one function, from 1 to `ceiling`; a new one is made by every answer."""

    ceiling: int
    limit: float
    cut_s: float = float("-inf")

    @classmethod
    def start(cls, ceiling: int) -> Concurrency:
        """Return the limit of a function of which nothing is known."""
        return cls(ceiling, float(ceiling))

    def after(self, outcome: AttemptOutcome, started_s: float, now_s: float) -> Concurrency:
        """Return the limit after an attempt from `started_s` to `now_s` (one monotonic clock)."""
        if outcome.is_refusal:
            is_new = started_s >= self.cut_s
            return dataclasses.replace(self, limit=max(self.limit / 2, 1.0), cut_s=now_s) if is_new else self
        if outcome.has_answer:
            return dataclasses.replace(self, limit=min(self.limit + 1 / self.limit, float(self.ceiling)))
        return self

    def capacity(self, running_count: int) -> int:
        """Return how many more calls may be started beside `running_count` running ones."""
        return max(int(self.limit) - running_count, 0)
