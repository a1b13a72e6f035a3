"""The door before what only operators may see and do: one user, one password (RFC 7617), and little use in guessing.

    door = PasswordDoor(Credentials("admin", "..."))
    await door.check(request)                  # Unauthorized, or TooManyGuesses

What it promises: a right password opens at once.  A wrong one is logged with the address it came from, and from the
fourth on answered late, each time later; while as many wrong answers to one address are under way as may be, nothing
more from there is looked at.  So an address has two guesses a second at most, however many connections it makes, and
never learns from the pace of an answer what the answer will be.  Who shares an address with one who guesses (a proxy
before us, a network behind NAT) may be asked to come again.

What it refuses: to remember more than MAX_ADDRESSES_COUNT addresses, or any of them for long; and to count what is no
attempt: no credentials, or the empty `Bearer` of a client that is not logged in.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from ..watchdog import FaashoundError, Request, log

FREE_FAILURES_COUNT = 3  # that cost nothing: people mistype


FIRST_DELAY_S = 0.25


LONGEST_DELAY_S = 4.0


MAX_LATE_COUNT = 8  # wrong answers to one address under way at once


FORGOTTEN_AFTER_S = 900.0  # without another failure


MAX_ADDRESSES_COUNT = 4096  # a hundred bytes each


class Unauthorized(FaashoundError):
    """No credentials, or the wrong ones (RFC 7617)."""

    status = 401
    headers = ((b"WWW-Authenticate", b'Basic realm="faashound", charset="UTF-8"'),)

    def __init__(self) -> None:
        super().__init__("credentials are needed: basic-auth-user and basic-auth-password")


class TooManyGuesses(FaashoundError):
    """Too many wrong passwords came from this address; this one was not looked at."""

    status = 429
    headers = ((b"Retry-After", b"%d" % LONGEST_DELAY_S),)

    def __init__(self) -> None:
        super().__init__("too many wrong passwords from this address")


class Credentials:
    """The user and the password that open."""

    def __init__(self, user: str, password: str) -> None:
        self._digest = hashlib.sha256(base64.b64encode(f"{user}:{password}".encode())).digest()

    def match(self, encoded: bytes) -> bool:
        """Tell whether what stands behind `Basic` is right, in a time that tells nothing of it."""
        return hmac.compare_digest(hashlib.sha256(encoded).digest(), self._digest)


@dataclass(slots=True)
class _Failures:
    count: int = 0
    last_s: float = 0.0
    late_count: int = 0


class FailureLog:
    """The wrong passwords of each address, for a while (pure: the time is told)."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failures] = OrderedDict()  # the latest last

    def is_busy(self, address: str) -> bool:
        """Tell whether as many answers to `address` are late as may be."""
        failures = self._failures.get(address)
        return failures is not None and failures.late_count >= MAX_LATE_COUNT

    def add(self, address: str, now_s: float) -> tuple[int, float]:
        """Count a failure; return how many there are and how late to tell so, in seconds.  `told` must follow."""
        failures = self._failures.pop(address, None) or _Failures()
        if now_s - failures.last_s > FORGOTTEN_AFTER_S:
            failures.count = 0
        failures.count, failures.last_s, failures.late_count = failures.count + 1, now_s, failures.late_count + 1
        self._failures[address] = failures
        if len(self._failures) > MAX_ADDRESSES_COUNT:
            self._failures.popitem(last=False)
        return failures.count, _delay_s(failures.count)

    def told(self, address: str) -> None:
        """A late answer has been given, or its client has gone."""
        if address in self._failures:
            self._failures[address].late_count -= 1


def _delay_s(failures_count: int) -> float:
    doublings = failures_count - FREE_FAILURES_COUNT - 1
    return 0.0 if doublings < 0 else min(FIRST_DELAY_S * 2.0 ** min(doublings, 30), LONGEST_DELAY_S)


def network_of(peer: str) -> str:
    """Return what counts as one address: of IPv6 the /64 that one host has for itself (RFC 6177)."""
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:  # a Unix socket has none
        return peer
    return str(address) if address.version == 4 else str(ip_network((address, 64), strict=False))


class PasswordDoor:
    """Lets in who knows the password; see the head of this module."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._failures = FailureLog()

    async def check(self, request: Request) -> None:
        """Return if a request carries the right credentials; raises Unauthorized, TooManyGuesses."""
        scheme, _, given = (request.header(b"authorization") or b"").partition(b" ")
        given = given.strip()
        if not given:
            raise Unauthorized
        address = network_of(request.peer)
        if self._failures.is_busy(address):
            raise TooManyGuesses
        if scheme.lower() == b"basic" and self._credentials.match(given):
            return
        await self._refuse(request, address)

    async def _refuse(self, request: Request, address: str) -> None:
        count, delay_s = self._failures.add(address, asyncio.get_running_loop().time())
        log.warning(
            f"wrong password for [{request.method[:20]}] {request.path[:100].decode('latin-1')}",
            peer=request.peer or "a Unix socket",
            failures=count,
        )
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._failures.told(address)
        raise Unauthorized
