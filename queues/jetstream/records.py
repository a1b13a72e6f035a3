"""What a call is on the wire (pure): the message that waits, and the record that is kept of it.

A call that waits is one message that holds all of it.  From when it is first taken there is a record besides; the
record decides, whatever the message says.  While the call is queued or running its record is short, since the message
still has the rest; when it has ended the message goes, and the record is whole.

Either is a JSON text behind its length in four bytes, then the bytes that it counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...calls.model import (
    EXCERPT_BYTES,
    FINAL,
    Attempt,
    Call,
    Callback,
    CallbackState,
    NewCall,
    QueueDamaged,
    State,
    StoredBody,
)
from ...calls.names import FunctionName
from ...jetstream import Hold, Record
from .connection import Stored
from .subjects import PLACES, UNDELIVERED, Place, parse_token

Json = dict[str, Any]

REVIVES_HEADER = "Faashound-Revives"  # the revision of a dead record that this message queues again
HELD_S = 1e12  # the due time of a call that is held back: no clock will show it

_NEW_FIELDS = tuple(each.name for each in fields(NewCall))
_NEW_PLAIN = tuple(name for name in _NEW_FIELDS if name not in ("headers", "body"))
_STANDING_FIELDS = (
    *("due_s", "expires_s", "attempts", "started_s", "finished_s", "status", "error", "duration_s"),
    *("cancel_requested", "result_headers"),
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A record as it is kept: without the call's request (`whole` is False) it needs the message that waits."""

    record: Record
    whole: bool
    place: Place


def place_of(call: Call) -> Place:
    """Return where the record of a call belongs."""
    if call.callback is not None and call.callback.state is CallbackState.DEAD:
        return UNDELIVERED[call.state]
    return PLACES[call.state]


def is_settled(call: Call) -> bool:
    """Tell whether nothing is left to be done: what is settled may be forgotten in time."""
    delivered = call.callback is None or call.callback.state is CallbackState.DELIVERED
    return call.state in FINAL and call.state is not State.DEAD and delivered


def build_waiting(call: NewCall) -> bytes:
    """Return the message of a call that waits."""
    facts: Json = {name: getattr(call, name) for name in _NEW_PLAIN}
    facts["headers"] = call.headers
    facts["body"] = _build_body(call.body)
    return _pack(facts, call.body.inline or b"")


def parse_waiting(message_data: bytes) -> Call:
    """Return the call as it was put; QueueDamaged if it cannot be read."""
    try:
        facts, rest = _unpack(message_data)
        body, _ = _parse_body(facts.pop("body"), rest)
        facts["headers"] = _parse_headers(facts["headers"])
        facts["function"] = FunctionName(facts["function"])
        return Call(body=body, **facts)
    except (KeyError, ValueError, TypeError) as error:
        raise QueueDamaged(f"a message of the queue cannot be read: {error!r}") from error


def build_record(record: Record) -> bytes:
    """Return the record of a call, as short as its state lets it be."""
    call, hold, callback = record.call, record.hold, record.call.callback
    whole = call.state in FINAL or call.due_s == HELD_S
    facts: Json = {name: getattr(call, name) for name in _STANDING_FIELDS}
    facts["state"] = call.state.value
    facts["function"] = call.function
    facts["hold"] = hold and [hold.kind, hold.owner, hold.fence, hold.lease_s]
    facts["stored_s"] = record.stored_s
    facts["callback"] = callback and [
        callback.state.value,
        callback.attempts,
        callback.due_s,
        callback.status,
        callback.error,
    ]
    facts["history"] = [dataclasses.astuple(attempt) for attempt in call.history]
    facts["result"] = call.result and _build_body(call.result)
    excerpt = None if call.excerpt == _own_excerpt(call.result) else call.excerpt
    facts["excerpt"] = None if excerpt is None else len(excerpt)
    request = build_waiting(call) if whole else b""
    facts["request"] = len(request)
    return _pack(facts, request, (call.result and call.result.inline) or b"", excerpt or b"")


def parse_record(stored: Stored) -> Kept:
    """Return a record from its message; what is not in a short one is empty.  QueueDamaged if it is none."""
    _, _, place, token, _ = stored.subject.split(".")
    call_id = parse_token(token)
    try:
        facts, rest = _unpack(stored.data)
        size = facts["request"]
        call = parse_waiting(bytes(rest[:size])) if size else _blank(call_id, facts)
        result, rest = _parse_body(facts["result"], rest[size:]) if facts["result"] else (None, rest[size:])
        excerpt = _own_excerpt(result) if facts["excerpt"] is None else bytes(rest[: facts["excerpt"]])
        changes = {name: facts[name] for name in _STANDING_FIELDS}
        changes["result_headers"] = _parse_headers(facts["result_headers"])
        call = dataclasses.replace(
            call,
            **changes,
            state=State(facts["state"]),
            result=result,
            excerpt=excerpt,
            callback=_parse_callback(facts["callback"]),
            history=tuple(itertools.starmap(Attempt, facts["history"])),
        )
        hold = Hold(*facts["hold"]) if facts["hold"] else None
        record = Record(call, hold, facts["stored_s"], stored.revision)
    except (KeyError, ValueError, TypeError) as error:
        raise QueueDamaged(
            f"the record of call {call_id} (revision {stored.revision}) cannot be read: {error!r}"
        ) from error
    return Kept(record, bool(size), place)  # type: ignore[arg-type]


def join(kept: Kept, waiting: Call) -> Record:
    """Return a short record with the request that its message has."""
    if kept.whole:
        return kept.record
    request = {name: getattr(waiting, name) for name in _NEW_FIELDS if name not in ("due_s", "expires_s")}
    return dataclasses.replace(kept.record, call=dataclasses.replace(kept.record.call, **request))


def forget_result(record: Record, before_s: float) -> Record:
    """Return the record without the result that has been kept long enough."""
    call = record.call
    if call.result is None or record.stored_s is None or record.stored_s >= before_s:
        return record
    if call.callback is not None and call.callback.state is not CallbackState.DELIVERED:
        return record
    return dataclasses.replace(record, call=dataclasses.replace(call, result=None, result_headers=()))


def _blank(call_id: str, facts: Mapping[str, Any]) -> Call:
    return Call(
        id=call_id,
        function=FunctionName(facts["function"]),
        queue="",
        method="",
        path="",
        query="",
        headers=(),
        body=StoredBody(0, b"", None),
        callback_url=None,
        due_s=0.0,
        expires_s=None,
        idempotency_key=None,
        accepted_s=0.0,
    )


def _pack(facts: Json, *parts: bytes) -> bytes:
    head = json.dumps(facts, separators=(",", ":")).encode()
    return b"".join((len(head).to_bytes(4, "big"), head, *parts))


def _unpack(data: bytes) -> tuple[Json, memoryview]:
    end = 4 + int.from_bytes(data[:4], "big")
    facts: Json = json.loads(data[4:end])
    return facts, memoryview(data)[end:]


def _build_body(body: StoredBody) -> list[object]:
    return [body.bytes_count, body.file]


def _parse_body(facts: Sequence[Any], rest: memoryview) -> tuple[StoredBody, memoryview]:
    bytes_count, file = facts
    if file is not None:
        return StoredBody(bytes_count, None, file), rest
    if len(rest) < bytes_count:
        raise ValueError(f"{bytes_count - len(rest)} bytes are missing")
    return StoredBody(bytes_count, bytes(rest[:bytes_count]), None), rest[bytes_count:]


def _parse_headers(pairs: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in pairs)


def _own_excerpt(result: StoredBody | None) -> bytes | None:
    """An inline result is its own excerpt."""
    return result.inline[:EXCERPT_BYTES] if result is not None and result.inline is not None else None


def _parse_callback(facts: Sequence[Any] | None) -> Callback | None:
    if facts is None:
        return None
    state, attempts, due_s, status, error = facts
    return Callback(CallbackState(state), attempts, due_s, status, error)
