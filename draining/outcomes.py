"""What an attempt came to, of an answer or of an error: in the words of the rules (calls/retries.py), and of the log.

An error's text may name addresses and paths of this system.  What a caller may not read goes to the log instead.
"""

from __future__ import annotations

import time

from ..calls.callbacks import CallbackRefused
from ..calls.model import Attempt, Call, Headers, QueueDamaged, QueueFull, QueueUnavailable, StoredBody
from ..calls.retries import AttemptOutcome, Dead, Done, HandBack, OutcomeKind, RetryAt, Step
from ..watchdog import (
    ClientResponse,
    FaashoundError,
    OutOfResources,
    PeerGone,
    Unreachable,
    UpstreamTimeout,
    end_to_end,
    log,
)
from ..watchdog import Headers as RawHeaders

_ID_FIELDS = ("x-call-id", "x-start-time")  # the gateway's word on a call, whatever its function answers
_ID_NAMES = tuple(name.encode() for name in _ID_FIELDS)
REFUSED_TEXT = "refused: not allowed by callback_allow"  # which names lead to inner addresses is not for strangers


class GatewayAway(FaashoundError):
    """The gateway cannot be reached, and the call cannot be made without it; nothing was sent."""

    status = 503


def decoded(value: bytes | None) -> str | None:
    """Return a header field's value as text."""
    return None if value is None else value.decode("latin-1")


def outcome_of_response(response: ClientResponse, body: StoredBody, headers: Headers) -> AttemptOutcome:
    """Return what the rules need to know of an answer, and what was stored of it."""
    return AttemptOutcome(
        OutcomeKind.ANSWERED,
        response.status,
        decoded(response.header(b"retry-after")),
        response.header(b"x-openfaas-internal") is not None,
        body=body,
        headers=headers,
    )


def outcome_of_part(error: FaashoundError, bytes_count: int) -> AttemptOutcome:
    """Return what the rules need to know of an answer of which so many bytes came, and then `error`."""
    kind = OutcomeKind.TIMED_OUT if isinstance(error, UpstreamTimeout) else OutcomeKind.BROKEN_OFF
    return AttemptOutcome(kind, error=f"the answer broke off after {bytes_count} bytes: {error}")


def outcome_of_error(error: Exception, call_id: str) -> AttemptOutcome:
    """Return what the rules need to know of an attempt that raised `error`."""
    match error:
        case CallbackRefused():
            log.warning(str(error), call_id=call_id)
            return AttemptOutcome(OutcomeKind.REFUSED, error=REFUSED_TEXT)
        case UpstreamTimeout():
            return AttemptOutcome(OutcomeKind.TIMED_OUT, error=str(error))
        case QueueDamaged():
            return AttemptOutcome(OutcomeKind.UNREADABLE, error=str(error))
        case QueueUnavailable() | QueueFull() | OutOfResources() | GatewayAway():
            return AttemptOutcome(OutcomeKind.PREVENTED, error=str(error))
        case PeerGone() | Unreachable():
            return AttemptOutcome(OutcomeKind.UNREACHABLE, error=str(error))
        case _:
            log.exception(f"a fault of the worker in an attempt at call {call_id}")
            return AttemptOutcome(OutcomeKind.FAILED, error="a fault of the worker: see its log")


def kept_headers(answered: RawHeaders, submitted: Headers) -> Headers:
    """Return the fields of an answer that are stored with it: the function's, and the ids that the call came with."""
    fields = end_to_end(answered, *_ID_NAMES)
    ids = [field for field in submitted if field[0].lower() in _ID_FIELDS]
    return (*[(name.decode(), value.decode("latin-1")) for name, value in fields], *ids)


def attempt_record(started_s: float, finished_s: float, outcome: AttemptOutcome, step: Step) -> Attempt:
    """Return what is remembered of an attempt (times are seconds since the epoch) which `step` follows."""
    error = None if isinstance(step, Done) else str(getattr(step, "reason", outcome))
    return Attempt(started_s, finished_s, outcome.status or None, error)


CALL_STEPS = {Done: "done", RetryAt: "to be tried again", Dead: "dead letter", HandBack: "handed back"}
CALLBACK_STEPS = {Done: "delivered", RetryAt: "to be tried again", Dead: "given up", HandBack: "handed back"}


def log_call_step(call: Call, step: Step, outcome: AttemptOutcome) -> None:
    """Log what follows from an attempt at a call."""
    wait = {"in": f"{max(step.due_s - time.time(), 0.0):.3f}s"} if isinstance(step, RetryAt) else {}
    log.info(
        f"{CALL_STEPS[type(step)]} - Duration: {outcome.duration_s:f}s",
        call_id=call.id,
        function=call.function,
        attempt=call.attempts,
        **wait,
        outcome=str(outcome),  # a NamedTuple would be a list in JSON, answer and all
    )


def log_callback_step(call: Call, step: Step, outcome: AttemptOutcome) -> None:
    """Log what follows from an attempt at a callback."""
    attempts = call.callback.attempts if call.callback is not None else 0
    log.info(
        f"callback {CALLBACK_STEPS[type(step)]}",
        call_id=call.id,
        function=call.function,
        attempt=attempts,
        outcome=str(outcome),
    )
