"""What a call is on the wire: the message that waits, and the record that is kept of it.

A call that waits is one message that holds all of it.  From when it is first taken there is a record besides; the
record decides, whatever the message says.  While the call is queued or running its record is short, since the message
still has the rest; when it has ended the message goes, and the record is whole.

Either is a JSON text behind its length in four bytes, then the bytes that it counts.  Programs of different versions
read them while they are replaced one by one: a member that is not known is passed over, and one that is not there has
its default.  So what a later version adds is a member of its own, which an earlier one may do without; the lists
inside a member are as long as they are.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar, cast

from ...calls.model import (
    EXCERPT_BYTES,
    FINAL,
    Attempt,
    Call,
    Callback,
    CallbackState,
    CallDamaged,
    NewCall,
    QueueDamaged,
    State,
    StoredBody,
)
from ...calls.names import FunctionName
from ...calls.steps import Hold, Record, StoredAnswer, accept, build_call, may_forget_result
from ...watchdog import log
from .connection import Stored
from .subjects import PLACES, UNDELIVERED, Place, parse_token

Json = dict[str, Any]
S = TypeVar("S")

REVIVES_HEADER = "Faashound-Revives"  # the revision of a dead record that this message queues again
DAMAGED_COUNT = 1000  # of what cannot be read, that is remembered to have been told of
HELD_S = 1e12  # the due time of a call that is held back: no clock will show it

_NEW_PLAIN = tuple(each.name for each in fields(NewCall) if each.name not in ("headers", "body"))
_PLAIN_FIELDS = (
    *("due_s", "expires_s", "wants_callback", "attempts", "started_s", "finished_s", "status", "error", "duration_s"),
    *("cancel_requested", "hold"),
)
_DEFAULTS = Record._field_defaults
_OF_CALL = frozenset(each.name for each in fields(NewCall))
_OF_RECORD = frozenset(Record._fields)
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode  # `dumps` makes an encoder each time


class Standing(NamedTuple):
    """A call as it stands; `revision` is that of its record, 0 while it has none, and `place` where that is."""

    accepted: NewCall
    record: Record
    revision: int = 0
    place: Place | None = None

    @property
    def id(self) -> str:
        """The call's id."""
        return self.accepted.id

    @property
    def call(self) -> Call:
        """The whole call."""
        return build_call(self.accepted, self.record)


class Kept(NamedTuple):
    """A record as it is kept: if it is short, `accepted` is None and the message that waits has the request."""

    call_id: str
    function: FunctionName
    accepted: NewCall | None
    record: Record
    revision: int
    place: Place


def place_of(record: Record) -> Place:
    """Return where the record of a call belongs."""
    if record.callback is not None and record.callback.state is CallbackState.DEAD:
        return UNDELIVERED[record.state]
    return PLACES[record.state]


def is_settled(record: Record) -> bool:
    """Tell whether nothing is left to be done: what is settled may be forgotten in time."""
    delivered = record.callback is None or record.callback.state is CallbackState.DELIVERED
    return record.state in FINAL and record.state is not State.DEAD and delivered


def rename(accepted: NewCall, call_id: str) -> NewCall:
    """Return the same call under another id; the header field that carries the id follows."""
    headers = tuple(
        (name, call_id if name.lower() == "x-call-id" and value == accepted.id else value)
        for name, value in accepted.headers
    )
    return replace(accepted, id=call_id, headers=headers)


def build_waiting(call: NewCall) -> bytes:
    """Return the message of a call that waits."""
    facts: Json = {name: getattr(call, name) for name in _NEW_PLAIN}
    facts["headers"] = call.headers
    facts["body"] = [call.body.bytes_count, call.body.file]
    return _pack(facts, call.body.inline or b"")


def parse_waiting(data: bytes | memoryview) -> NewCall:
    """Return the call as it was put; QueueDamaged if it cannot be read."""
    try:
        facts, rest = _unpack(data)
        bytes_count, file = facts["body"]
        facts["body"], _ = _parse_body(bytes_count, file, rest)
        facts["headers"] = _parse_headers(facts["headers"])
        facts["function"] = FunctionName(facts["function"])
        return NewCall(**_known(facts, _OF_CALL))
    except (KeyError, ValueError, TypeError) as error:
        raise CallDamaged(f"a message of the queue cannot be read: {_flaw(error)}") from error


def read_waiting(stored: Stored) -> NewCall | None:
    """Return the call of a message, None of one that is damaged: lists and sweeps pass over it."""
    return _readable(lambda each: parse_waiting(each.data), stored)


def read_record(stored: Stored) -> Kept | None:
    """Return the record of a message, as `read_waiting` the call."""
    return _readable(parse_record, stored)


def _readable(parse: Callable[[Stored], S], stored: Stored) -> S | None:
    try:
        return parse(stored)
    except QueueDamaged as error:
        tell_damaged(f"{error}: {stored.subject}, number {stored.revision} of its stream")
        return None


@functools.lru_cache(maxsize=DAMAGED_COUNT)
def tell_damaged(text: str, **fields: str) -> None:
    """Log what cannot be read, once: every look comes by it, until an operator removes it."""
    log.error(text, **fields)


def build_record(standing: Standing, *, whole: bool) -> bytes:
    """Return the record of a call; it is `whole` when there is no message besides."""
    accepted, record = standing.accepted, standing.record
    facts: Json = {
        name: value for name in _PLAIN_FIELDS if (value := getattr(record, name)) != _DEFAULTS.get(name, "none")
    }
    facts["state"] = record.state.value
    parts: list[bytes] = []
    if whole:
        parts.append(build_waiting(accepted))
        facts["request"] = len(parts[0])
    if record.callback is not None:
        callback = record.callback
        facts["callback"] = [callback.state.value, callback.attempts, callback.due_s, callback.status, callback.error]
    if record.history:
        facts["history"] = [(each.started_s, each.finished_s, each.status, each.error) for each in record.history]
    if record.answer is not None:
        facts["answer"] = _build_answer(record.answer, parts)
    return _pack(facts, *parts)


def _build_answer(answer: StoredAnswer, parts: list[bytes]) -> list[object]:
    result = answer.result
    excerpt = None if answer.excerpt == _own_excerpt(result) else answer.excerpt
    parts += [(result and result.inline) or b"", excerpt or b""]
    stored = result and [result.bytes_count, result.file]
    return [stored, answer.headers, None if excerpt is None else len(excerpt), answer.stored_s]


def parse_record(stored: Stored) -> Kept:
    """Return a record from its message.  QueueDamaged if it is none."""
    _, _, place, token, function = stored.subject.split(".")
    call_id = parse_token(token)
    try:
        facts, rest = _unpack(stored.data)
        size = facts.pop("request", 0)
        accepted = parse_waiting(rest[:size]) if size else None
        record = Record(**(_known(facts, _OF_RECORD) | _parse_parts(facts, rest[size:])))
    except (KeyError, ValueError, TypeError) as error:
        raise CallDamaged(
            f"the record of call {call_id} (revision {stored.revision}) cannot be read: {_flaw(error)}"
        ) from error
    return Kept(call_id, FunctionName(parse_token(function)), accepted, record, stored.revision, cast(Place, place))


def _parse_parts(facts: Json, rest: memoryview) -> Json:
    """The fields of a record that JSON does not have as they are."""
    parts: Json = {"state": State(facts["state"])}
    if "callback" in facts:
        state, attempts, due_s, status, error = facts["callback"]
        parts["callback"] = Callback(CallbackState(state), attempts, due_s, status, error)
    if "hold" in facts:
        parts["hold"] = Hold(*facts["hold"])
    if "history" in facts:
        parts["history"] = tuple(itertools.starmap(Attempt, facts["history"]))
    if "answer" in facts:
        body, headers, size, stored_s = facts["answer"]
        result, rest = _parse_body(body[0], body[1], rest) if body else (None, rest)
        excerpt = _own_excerpt(result) if size is None else bytes(rest[:size])
        parts["answer"] = StoredAnswer(result, _parse_headers(headers), excerpt, stored_s)
    return parts


def join(kept: Kept | None, accepted: NewCall) -> Standing:
    """Return a call from its message and its record, if it has one that counts."""
    if kept is None:
        return Standing(accepted, accept(accepted))
    if kept.place == "held":  # it has just been let go
        return Standing(accepted, accept(accepted), kept.revision, kept.place)
    return Standing(kept.accepted or accepted, kept.record, kept.revision, kept.place)


def forget_result(record: Record, before_s: float) -> Record:
    """Return the record without the result that has been kept long enough."""
    if record.answer is None or not may_forget_result(record, before_s):
        return record
    return record._replace(answer=record.answer._replace(result=None, headers=()))


def _pack(facts: Mapping[str, Any], *parts: bytes) -> bytes:
    head = _encode(facts).encode()
    return b"".join((len(head).to_bytes(4, "big"), head, *parts))


def _unpack(data: bytes | memoryview) -> tuple[Json, memoryview]:
    end = 4 + int.from_bytes(data[:4], "big")
    try:
        facts: Json = json.loads(bytes(data[4:end]))
    except (ValueError, RecursionError):
        raise ValueError("its head is no JSON") from None
    if not isinstance(facts, dict):
        raise ValueError("its head is no JSON object")
    return facts, memoryview(data)[end:]


def _flaw(error: Exception) -> str:
    """Return what is wrong with a message that raised this when it was read."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return str(error) if isinstance(error, ValueError) else "its parts do not fit together"


def _known(facts: Json, names: frozenset[str]) -> Json:
    return facts if facts.keys() <= names else {name: value for name, value in facts.items() if name in names}


def _parse_body(bytes_count: int, file: str | None, rest: memoryview) -> tuple[StoredBody, memoryview]:
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
