"""Call ids: UUIDs of version 7, so that they sort by age, and grow within a process whatever its clock does.

    call_id = new_call_id()                    # "0190a1b2-..."
    made_s(call_id)                            # seconds since the epoch

The one module of calls/ that reads a clock and the kernel's random bits; `next_id`, which decides, is told the time.
"""

from __future__ import annotations

import os
import threading
import time

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
        _last_id = stamp_ms, tail = next_id(_last_id, time.time_ns() // 1_000_000)
    text = f"{stamp_ms:012x}{0x7000 | tail >> 62:04x}{0b10 << 62 | tail & (1 << 62) - 1:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def next_id(last: tuple[int, int], now_ms: int) -> tuple[int, int]:
    """Return time stamp (ms) and random tail of the id that follows `last`, by a clock that reads `now_ms`."""
    stamp_ms, tail = last
    if now_ms <= stamp_ms:
        tail += 1 + _randomness.bits(32)
        if tail < 1 << _RANDOM_BITS:
            return stamp_ms, tail
        now_ms = stamp_ms + 1
    return now_ms, _randomness.bits(_RANDOM_BITS - 1)  # the top bit stays free: room to grow within the millisecond


def made_s(call_id: str) -> float:
    """When an id was made by its own stamp, in seconds since the epoch; far in the past for text that is no UUIDv7."""
    if len(call_id) != 36 or call_id[14] != "7":
        return float("-inf")
    try:
        return int(call_id[:8] + call_id[9:13], 16) / 1000
    except ValueError:
        return float("-inf")
