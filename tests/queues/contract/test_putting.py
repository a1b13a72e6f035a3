"""Putting: what is in the queue when `put` returns, and which call a key stands for."""

from __future__ import annotations

import pytest

from faashound.calls.model import Call, CallExists, KeyReused, QueueUnavailable, State
from testkit.queue_kit import START_S, Desk, inline, read_all


def test_put_returns_what_get_finds_after_a_restart(desk: Desk) -> None:
    call = desk.put(
        path="/a/ü%20b",
        query="x=1&y",
        method="PUT",
        headers=(("Content-Type", "text/plain"), ("X-Odd", "caf\xe9 \x80"), ("X-Odd", "")),
        body=inline(bytes(range(256))),
        callback_url="http://caller/done",
        due_s=START_S + 5,
        expires_s=START_S + 50,
        idempotency_key="k",
    )
    desk.do(desk.queue.close())
    assert desk.do(desk.open().get(call.id)) == call
    assert (call.state, call.attempts, call.history) == (State.QUEUED, 0, ())


def test_put_returns_the_first_call_when_function_and_key_are_known(desk: Desk) -> None:
    first = desk.put(idempotency_key="k")
    second = desk.put(idempotency_key="k", body=desk.do(desk.queue.store_body(desk.big())))
    assert second == first
    assert desk.bodies() == set()  # the new body was dropped


def test_put_keeps_the_first_body_when_the_same_call_is_put_again(desk: Desk) -> None:
    body = desk.do(desk.queue.store_body(desk.big()))
    desk.put(idempotency_key="k", body=body)
    again = desk.put(idempotency_key="k", body=body)
    assert desk.do(read_all(desk.queue, again.body)) == desk.big()


def test_put_returns_the_call_as_it_is_now_when_the_key_is_known(desk: Desk) -> None:
    desk.put(idempotency_key="k")
    desk.finish(desk.claim_one())
    known = desk.do(desk.queue.put(desk.new_call(idempotency_key="k")))
    assert isinstance(known, Call)
    assert known.state is State.DONE


def test_put_makes_a_new_call_when_the_key_belongs_to_another_function(desk: Desk) -> None:
    assert desk.put("f", idempotency_key="k").id != desk.put("g", idempotency_key="k").id


def test_put_returns_the_first_call_when_the_key_comes_with_the_same_request(desk: Desk) -> None:
    first = desk.put(idempotency_key="k", body_digest="a" * 64)
    desk.finish(desk.claim_one())
    again = desk.put(idempotency_key="k", body_digest="a" * 64)
    assert (again.id, again.body_digest) == (first.id, "a" * 64)


def test_put_is_refused_and_drops_the_body_when_the_key_comes_with_another_request(desk: Desk) -> None:
    first = desk.put(idempotency_key="k", body_digest="a" * 64)
    body = desk.do(desk.queue.store_body(desk.big()))
    with pytest.raises(KeyReused, match="another request to f before") as refusal:
        desk.put(idempotency_key="k", body_digest="b" * 64, body=body)
    assert refusal.value.status == 422
    assert first.id not in str(refusal.value)  # it may be another caller's
    assert desk.bodies() == set()
    assert desk.put("f.prod", idempotency_key="k", body_digest="b" * 64).id != first.id


@pytest.mark.parametrize("digests", [(None, "b" * 64), ("a" * 64, None)], ids=["of-an-earlier-version", "unknown"])
def test_put_takes_a_request_without_a_digest_for_the_same(desk: Desk, digests: tuple[str | None, str | None]) -> None:
    first, second = (desk.put(idempotency_key="k", body_digest=digest) for digest in digests)
    assert second.id == first.id


def test_put_makes_a_new_call_when_the_key_belongs_to_another_namespace(desk: Desk) -> None:
    assert desk.put("f.prod", idempotency_key="k").id != desk.put("f.dev", idempotency_key="k").id


def test_put_raises_and_drops_the_body_when_the_id_is_in_use(desk: Desk) -> None:
    first = desk.put()
    with pytest.raises(CallExists, match=first.id):
        desk.put("g", id=first.id, body=desk.do(desk.queue.store_body(desk.big())))
    assert desk.get(first.id) == first
    assert desk.bodies() == set()


def test_put_is_refused_when_the_queue_is_closed(desk: Desk) -> None:
    desk.do(desk.queue.close())
    with pytest.raises(QueueUnavailable, match="closed"):
        desk.put()
