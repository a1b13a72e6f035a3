"""What NATS keeps, read by a program of an earlier version than the one that has written it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from faashound.calls.model import StoredBody
from faashound.calls.steps import accept
from faashound.queues.jetstream.connection import Stored
from faashound.queues.jetstream.records import Standing, build_record, build_waiting, parse_record, parse_waiting
from testkit.queue_kit import new_call


def with_members(message: bytes, **members: Any) -> bytes:
    """Return the message as a later version would write it: its JSON text has `members` besides."""
    end = 4 + int.from_bytes(message[:4], "big")
    head = json.dumps(json.loads(message[4:end]) | members).encode()
    return len(head).to_bytes(4, "big") + head + message[end:]


def test_call_is_read_whole_from_a_message_that_says_more() -> None:
    call = new_call(body=StoredBody(5, b"hello", None), idempotency_key="k")
    assert parse_waiting(with_members(build_waiting(call), priority=9, tags=["a"])) == call


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "short"])
def test_record_is_read_whole_from_a_message_that_says_more(whole: bool) -> None:
    call = new_call(body=StoredBody(5, b"hello", None))
    record = accept(call)
    message = with_members(build_record(Standing(call, record), whole=whole), paused_s=1.5)
    kept = parse_record(Stored(f"p.rec.wait.{call.id}.f=cat", 7, {}, message, 0.0))
    assert kept.record == record
    assert kept.accepted == (call if whole else None)
