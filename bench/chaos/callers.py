"""The callers of a chaos run: random orders of a seed, submitted by many at once, each answer noted in the books."""

from __future__ import annotations

import http.client
import random
import threading
import time
import uuid
from typing import Self

from bench.chaos.ledger import Answer, Order
from bench.chaos.rig import MAX_ATTEMPTS_COUNT, POISON_ATTEMPTS_COUNT, Rig
from bench.chaos.station import Station, digest_of, now_s
from testkit.harness import http_request

PATIENCE_S = 10.0  # of a caller
AGAIN_S = 0.1  # before a caller tries again
CALLERS_COUNT = 8
CANCEL_EVERY_COUNT = 30  # one call in so many
LARGE_BYTES = 200_000  # more than what the spool keeps in a row

# What a function does at its first run, its second, ...; the last step stands for all further ones.
LOCAL_STEPS = (
    *[("200",)] * 12,
    *[("slow",)] * 6,
    ("500", "500", "200"),
    ("crash", "200"),
)
REMOTE_STEPS = (*[("200",)] * 3, ("slow",), ("429", "200"), ("drop", "200"), ("500", "500", "200"))
CALLBACK_STEPS = (*[("200",)] * 12, *[("slow",)] * 3, ("307",), ("410",), ("500", "200"))
STEPS = {
    "work": LOCAL_STEPS,
    "more": LOCAL_STEPS,
    "narrow": (("slow",),),  # its watchdog answers 429 to the third at once
    "long": (("long",),),  # longer than the lease
    "stuck": (("hang", "200"),),  # until exec_timeout
    "remote": REMOTE_STEPS,
    "poison": (("500",),),
}
SHARES = {"work": 50, "more": 20, "narrow": 6, "long": 3, "stuck": 1, "remote": 20, "poison": 2}


def make_order(number: int, rng: random.Random) -> tuple[Order, bytes]:
    """Return a random order and the body that goes with it."""
    (function,) = rng.choices(list(SHARES), list(SHARES.values()))
    size_bytes = LARGE_BYTES if rng.random() < 0.03 else rng.randrange(2000)
    body = rng.randbytes(size_bytes)
    naming = rng.random()  # one in two brings an id, one in four a key, one in four nothing
    order = Order(
        number,
        function,
        rng.choice(STEPS[function]),
        rng.choice(CALLBACK_STEPS) if rng.random() < 0.4 else (),
        digest_of(body),
        call_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)) if naming < 0.5 else None,
        key=f"order {number}" if naming > 0.75 else None,
        delay_s=round(rng.uniform(0, 3), 3) if rng.random() < 0.1 else None,
        expires_s=round(rng.uniform(4, 6), 3) if rng.random() < 0.04 else None,
        attempts_limit=POISON_ATTEMPTS_COUNT if function == "poison" else MAX_ATTEMPTS_COUNT,
    )
    return order, body


def headers_of(order: Order, station: Station) -> dict[str, str]:
    """Return the header fields of a submission."""
    fields = {
        "X-Call-Id": order.call_id,
        "Idempotency-Key": order.key,
        "X-Delay": None if order.delay_s is None else f"{order.delay_s:.3f}s",
        "X-Expires": None if order.expires_s is None else f"{order.expires_s:.3f}s",
        "X-Callback-Url": f"{station.url}/callback/{'.'.join(order.callback)}" if order.callback else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def pause_s(rate: float) -> float:
    """Return a random time between two of `rate` events a second; not of the seed, as the machine decides how many."""
    return random.expovariate(rate)


class Load:
    """Callers who submit calls and note every answer, and one who cancels.  Use as a context manager."""

    def __init__(self, rig: Rig, rng: random.Random, rate: float) -> None:
        self._rig = rig
        self._rng = rng
        self._rate = rate
        self._number = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        callers = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS_COUNT)]
        self._threads = [*callers, threading.Thread(target=self._cancel, daemon=True)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            if thread.is_alive():
                raise AssertionError("a caller has had no answer, and not even an end of its patience")

    def _call(self) -> None:
        while not self._over.wait(pause_s(self._rate / CALLERS_COUNT)):
            with self._lock:
                self._number += 1
                order, body = make_order(self._number, self._rng)
            self._submit(order, body)

    def _submit(self, order: Order, body: bytes) -> None:
        """Send an order: again while no gateway answers, and one with a key until it is certain."""
        end_s = time.monotonic() + PATIENCE_S
        while True:
            answer = self._send(order, body)
            self._rig.books.answers.append(answer)
            certain = answer.status == 202 or not (answer.refused or order.key)
            if certain or time.monotonic() > end_s:
                return
            time.sleep(AGAIN_S)

    def _send(self, order: Order, body: bytes) -> Answer:
        path = f"/async-function/{order.function}/{'.'.join(order.steps)}"
        headers, sent_s = headers_of(order, self._rig.station), now_s()
        try:
            answer = http_request(self._rig.port, "POST", path, headers, body, timeout_s=PATIENCE_S)
        except ConnectionRefusedError:
            return Answer(order, sent_s, now_s(), refused=True)
        except (OSError, http.client.HTTPException):
            return Answer(order, sent_s, now_s())
        return Answer(order, sent_s, now_s(), answer.status, answer.headers.get("x-call-id"))

    def _cancel(self) -> None:
        while not self._over.wait(pause_s(self._rate / CANCEL_EVERY_COUNT)):
            recent = [answer.call_id for answer in self._rig.books.answers[-20:] if answer.status == 202]
            if recent and (call_id := random.choice(recent)):
                self._rig.books.cancels.append((call_id, self._delete(call_id)))

    def _delete(self, call_id: str) -> int | None:
        try:
            return http_request(self._rig.port, "DELETE", f"/async-function/{call_id}", timeout_s=PATIENCE_S).status
        except (OSError, http.client.HTTPException):
            return None
