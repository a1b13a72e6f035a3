"""Call ids: UUIDs of version 7 that grow, within a millisecond, with a clock that is set back, and after a fork."""

from __future__ import annotations

import itertools
import os
import time
import uuid

import pytest

from faashound.calls.ids import new_call_id, next_id


def test_new_call_id_is_a_version_7_uuid_with_the_time_in_front() -> None:
    before_ms = time.time_ns() // 1_000_000
    made = uuid.UUID(new_call_id())
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before_ms <= made.int >> 80 <= time.time_ns() // 1_000_000 + 1


def test_new_call_id_grows_within_a_millisecond() -> None:
    made = [new_call_id() for _ in range(5000)]
    assert made == sorted(set(made))


def random_part(call_id: str) -> int:
    return uuid.UUID(call_id).int & (1 << 62) - 1


def new_id_of_a_new_millisecond() -> str:
    """An id whose random bits are all new: within a millisecond they only grow."""
    made = new_call_id()
    while new_call_id()[:13] == made[:13]:
        pass
    return new_call_id()


def test_new_call_id_uses_other_random_bits_in_a_forked_child() -> None:
    new_call_id()  # some of what was fetched is left now
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writes, ",".join(itertools.starmap(new_id_of_a_new_millisecond, [()] * 3)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    ours = {random_part(new_id_of_a_new_millisecond()) for _ in range(3)}
    theirs = {random_part(text) for text in os.read(reads, 1000).decode().split(",")}
    os.close(reads)
    os.close(writes)
    assert ours.isdisjoint(theirs)


@pytest.mark.parametrize(
    ("last", "now_ms", "stamp_ms"),
    [
        pytest.param((100, 5), 101, 101, id="clock-goes-on"),
        pytest.param((100, 5), 100, 100, id="same-millisecond"),
        pytest.param((100, 5), 50, 100, id="clock-set-back"),
        pytest.param((100, (1 << 74) - 1), 100, 101, id="random-bits-used-up"),
    ],
)
def test_next_id_is_greater_when(last: tuple[int, int], now_ms: int, stamp_ms: int) -> None:
    made = next_id(last, now_ms)
    assert made > last
    assert made[0] == stamp_ms
    assert made[1] < 1 << 74
