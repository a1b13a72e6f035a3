"""What people see of a call, as JSON, and which calls a query means.

    describe_call(call)                                          what the caller who knows its id may know
    describe_call_whole(call, body_start, result_start)          what an operator may know
    parse_call_filter(b"state=dead&function=cat&limit=10")       BadQuery says what is allowed

Contract: pure; a member without a value is left out, times are RFC 3339 in UTC.

What it refuses to do: show credentials that a caller sent along.
"""

from __future__ import annotations

import base64
import codecs
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from ..watchdog import FaashoundError, is_secret_field, parse_number
from .model import Attempt, Call, CallbackState, Headers, State
from .names import BadFunctionName, FunctionName, parse_function_name

SHOWN_BODY_BYTES = 65536  # of a payload or a result
LISTED_COUNT = 100  # calls in one answer, unless asked otherwise
MAX_LISTED_COUNT = 1000
MIN_ID_CHARS = 8  # by which calls are found: those ids that share them are of the same minute

_ID_START = re.compile(rf"[0-9a-f-]{{{MIN_ID_CHARS},36}}", re.ASCII)

Json = dict[str, Any]


class BadQuery(FaashoundError):
    """A query parameter makes no sense."""

    status = 400


# ---------------------------------------------------------------------------------------------------------------
# As JSON (pure).
# ---------------------------------------------------------------------------------------------------------------


def format_time(epoch_s: float | None) -> str | None:
    """Return RFC 3339 in UTC, to the millisecond."""
    if epoch_s is None:
        return None
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_call(call: Call) -> Json:
    """Return what a caller who knows a call's id may know of it."""
    callback = call.callback
    return _without_none(
        {
            "id": call.id,
            "function": call.function,
            "state": call.state.value,
            "attempts": call.attempts,
            "accepted": format_time(call.accepted_s),
            "due": format_time(call.due_s) if call.state is State.QUEUED else None,
            "expires": format_time(call.expires_s),
            "started": format_time(call.started_s),
            "finished": format_time(call.finished_s),
            "status": call.status,
            "duration_seconds": call.duration_s,
            "error": call.error,
            "cancel_requested": call.cancel_requested or None,
            "result_bytes": None if call.result is None else call.result.bytes_count,
            "callback": callback
            and _without_none(
                {
                    "state": callback.state.value,
                    "attempts": callback.attempts,
                    "due": format_time(callback.due_s) if callback.state is CallbackState.PENDING else None,
                    "status": callback.status,
                    "error": callback.error,
                }
            ),
        }
    )


def describe_call_whole(call: Call, body_start: bytes, result_start: bytes) -> Json:
    """Return all that an operator may know of a call, given how its payload and its result begin."""
    more = {
        "queue": call.queue,
        "method": call.method,
        "path": call.path,
        "query": call.query,
        "headers": _shown_headers(call.headers),
        "body": describe_body(body_start, call.body.bytes_count),
        "callback_url": call.callback_url,
        "idempotency_key": call.idempotency_key,
        "history": [_describe_attempt(attempt) for attempt in call.history],
    }
    if call.result is not None:
        more["result_headers"] = _shown_headers(call.result_headers)
        more["result"] = describe_body(result_start, call.result.bytes_count)
    elif call.excerpt is not None:
        more["excerpt"] = describe_body(call.excerpt, len(call.excerpt))
    return describe_call(call) | _without_none(more)


def describe_body(start: bytes, bytes_count: int) -> Json:
    """Return a body of `bytes_count` bytes that begins with `start`, as text if it is UTF-8, else as base64."""
    cut = len(start) < bytes_count
    shown: Json = {"bytes": bytes_count} | ({"shown_bytes": len(start)} if cut else {})
    try:  # an incremental decoder takes a character that the cut went through for one still to come
        return shown | {"text": codecs.getincrementaldecoder("utf-8")().decode(start, not cut)}
    except UnicodeDecodeError:
        return shown | {"base64": base64.b64encode(start).decode()}


def _describe_attempt(attempt: Attempt) -> Json:
    return _without_none(
        {
            "started": format_time(attempt.started_s),
            "finished": format_time(attempt.finished_s),
            "status": attempt.status,
            "error": attempt.error,
        }
    )


def _shown_headers(headers: Headers) -> list[list[str]]:
    return [[name, "(hidden)" if is_secret_field(name.lower().encode()) else value] for name, value in headers]


def _without_none(facts: Mapping[str, Any]) -> Json:
    return {name: value for name, value in facts.items() if value is not None}


# ---------------------------------------------------------------------------------------------------------------
# Which calls are meant (pure).
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CallFilter:
    """Which calls are meant: every condition that is not None holds.

    `callback` is the state of the callback, `id_start` how the id begins.
    """

    state: State | None = None
    function: FunctionName | None = None
    callback: CallbackState | None = None
    limit_count: int = LISTED_COUNT
    before: str | None = None
    id_start: str | None = None


def parse_call_filter(query: bytes) -> CallFilter:
    """Return what ?state=…&function=…&callback=…&id=…&limit=…&before=… means; BadQuery says what is allowed."""
    readers: dict[str, tuple[str, Callable[[str], object]]] = {
        "state": ("state", _parse_state),
        "function": ("function", _parse_function),
        "callback": ("callback", _parse_callback_state),
        "id": ("id_start", _parse_id_start),
        "limit": ("limit_count", partial(parse_number, low=1, high=MAX_LISTED_COUNT)),
        "before": ("before", str),
    }
    found: Json = {}
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in readers:
            raise BadQuery(f"unknown query parameter {name[:100]!r}; allowed: {', '.join(readers)}")
        field, read = readers[name]
        try:
            found[field] = read(value)
        except ValueError as error:
            raise BadQuery(f"{name}={value[:100]!r}: {error}") from None
    return CallFilter(**found)


def _parse_state(text: str) -> State:
    try:
        return State(text)
    except ValueError:
        raise ValueError(f"allowed: {', '.join(state.value for state in State)}") from None


def _parse_function(text: str) -> FunctionName:
    try:
        return parse_function_name(text)
    except BadFunctionName as error:
        raise ValueError(str(error)) from None


def _parse_callback_state(text: str) -> CallbackState:
    try:
        return CallbackState(text)
    except ValueError:
        raise ValueError(f"allowed: {', '.join(state.value for state in CallbackState)}") from None


def _parse_id_start(text: str) -> str:
    if not _ID_START.fullmatch(text.lower()):
        raise ValueError(f"allowed: an id, or the {MIN_ID_CHARS} characters and more that it begins with")
    return text.lower()
