"""The door before what only operators may see and do: users, their passwords (RFC 7617), and little use in guessing.

    door = PasswordDoor(Credentials("admin", "..."), UserFile(path))
    user = await door.check(request)           # Unauthorized, or TooManyGuesses
    is_still = door.watch(request)             # is_still() is False once the file has that user otherwise

What it promises: a right password opens at once.  A wrong one is logged with the address it came from, and from the
fourth on answered late, each time later; while as many wrong answers to one address are under way as may be, nothing
more from there is looked at.  So an address has two guesses a second at most, however many connections it makes, and
never learns from the pace of an answer what the answer will be.  Who shares an address with one who guesses (a proxy
before us, a network behind NAT) may be asked to come again, unless what he knows is so long that no pace of guessing
finds it (LONG_SECRET_BYTES): a long one that is right is let in before anything is counted.

A hash is made to be slow, so it is computed once for each right password: it is known by a digest from then on, until
the file has another line for its user, and waits for no other hash.  One hash is computed at a time, in a thread, and
few wait for their turn; what is not the name of a user costs the same.

What it refuses: to remember more than MAX_ADDRESSES_COUNT addresses, or any of them for long; and to count what is no
attempt: no credentials, or the empty `Bearer` of a client that is not logged in.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address, ip_network

from ..watchdog import FaashoundError, Request, in_thread, log
from .users import Account, Role, User, UserFile, hash_password

FREE_FAILURES_COUNT = 3  # that cost nothing: people mistype


FIRST_DELAY_S = 0.25


LONGEST_DELAY_S = 4.0


MAX_LATE_COUNT = 8  # wrong answers to one address under way at once


FORGOTTEN_AFTER_S = 900.0  # without another failure


MAX_ADDRESSES_COUNT = 4096  # a hundred bytes each


MAX_HASHES_COUNT = 16  # passwords that wait for their hash, or have it computed


MAX_HASHES_OF_ADDRESS_COUNT = 2


LONG_SECRET_BYTES = 20  # 120 bits where they are random base64, and more than people choose


MAX_VERIFIED_COUNT = 1024  # right passwords that are known by their digest


class Unauthorized(FaashoundError):
    """No credentials, or the wrong ones (RFC 7617)."""

    status = 401
    headers = ((b"WWW-Authenticate", b'Basic realm="faashound", charset="UTF-8"'),)

    def __init__(self) -> None:
        super().__init__("credentials are needed: a user and a password")


class TooManyGuesses(FaashoundError):
    """Too many wrong passwords came from this address, or too many wait; this one was not looked at."""

    status = 429
    headers = ((b"Retry-After", b"%d" % LONGEST_DELAY_S),)

    def __init__(self) -> None:
        super().__init__("too many wrong passwords from this address")


class Credentials:
    """The one user and password that need no hash; they may do everything."""

    def __init__(self, user: str, password: str) -> None:
        self.user = User(user, Role.DEPLOY)
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


def _counted(request: Request, about: str) -> str:
    return f"{network_of(request.peer)} {about}"


def is_long(secret: bytes) -> bool:
    """Tell whether a secret is too long to be guessed, at whatever pace."""
    return len(secret) >= LONG_SECRET_BYTES


class Guesses:
    """Makes guessing slow; see the head of this module."""

    def __init__(self) -> None:
        self._failures = FailureLog()

    def check(self, request: Request, about: str = "") -> None:
        """Raise TooManyGuesses where nothing more from an address is to be looked at, of what `about` names."""
        if self._failures.is_busy(_counted(request, about)):
            raise TooManyGuesses

    async def note(self, request: Request, what: str, about: str = "") -> None:
        """Take note of a wrong `what`, and return when its sender may be told."""
        address = _counted(request, about)
        count, delay_s = self._failures.add(address, asyncio.get_running_loop().time())
        log.warning(
            f"wrong {what} for [{request.method[:20]}] {request.path[:100].decode('latin-1')}",
            peer=request.peer or "a Unix socket",
            failures=count,
        )
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._failures.told(address)


def parse_credentials(encoded: bytes) -> tuple[str, str]:
    """Return the user and the password behind `Basic`; ValueError if there are none (RFC 7617 2)."""
    user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    if not colon:
        raise ValueError("no colon")
    return user, password


class Hashes:
    """Checks passwords of the users of a file, at a bounded cost."""

    def __init__(self, file: UserFile) -> None:
        self._file = file
        self._key = secrets.token_bytes(32)  # digests of passwords mean nothing without it
        self._verified: OrderedDict[bytes, Account] = OrderedDict()
        self._checking: dict[bytes, asyncio.Task[User | None]] = {}
        self._addresses: Counter[str] = Counter()
        self._turn = asyncio.Lock()
        self._nobody: Account | None = None

    @property
    def has_users(self) -> bool:
        """Whether the file has any: where it has none, no password is worth a hash."""
        return not self._file.is_empty

    def known(self, encoded: bytes) -> Account | None:
        """Return whose name and password these are, if they were right lately, and the file says the same of them."""
        self._file.look()
        account = self._verified.get(self._digest(encoded))
        return account if account is not None and self._file.find(account.user.name) == account else None

    def is_still(self, account: Account) -> bool:
        """Tell whether the file has a user as it was: with that password, and that role."""
        self._file.look()
        return self._file.find(account.user.name) == account

    def _digest(self, encoded: bytes) -> bytes:
        return hashlib.blake2b(encoded, key=self._key).digest()

    async def check(self, encoded: bytes, address: str) -> User | None:
        """Return the user whose name and password these are, None if they are wrong; raises TooManyGuesses."""
        known = self.known(encoded)
        if known is not None:
            return known.user
        digest = self._digest(encoded)
        task = self._checking.get(digest)
        if task is None:
            if len(self._checking) >= MAX_HASHES_COUNT or self._addresses[address] >= MAX_HASHES_OF_ADDRESS_COUNT:
                raise TooManyGuesses
            self._addresses[address] += 1
            task = self._checking[digest] = asyncio.create_task(self._verify(encoded, digest, address))
        return await asyncio.shield(task)

    async def _verify(self, encoded: bytes, digest: bytes, address: str) -> User | None:
        try:
            async with self._turn:
                account, is_right = await in_thread(self._hash, encoded)
        finally:
            self._checking.pop(digest, None)
            self._addresses[address] -= 1
            self._addresses += Counter()  # without those that have none
        if not is_right:
            return None
        self._verified[digest] = account
        if len(self._verified) > MAX_VERIFIED_COUNT:
            self._verified.popitem(last=False)
        return account.user

    def _hash(self, encoded: bytes) -> tuple[Account, bool]:
        """In a thread: return whose password it is to be, and whether it is."""
        if self._nobody is None:
            self._nobody = Account(User("", Role.READ), hash_password(secrets.token_hex()))
        try:
            name, password = parse_credentials(encoded)
        except ValueError:
            return self._nobody, False
        account = self._file.find(name) or self._nobody
        is_right = account.password.verify(password)
        return account, is_right and account is not self._nobody


class PasswordDoor:
    """Lets in who knows a password: that of `credentials`, or one of a user in `file`; see the head of this module."""

    def __init__(self, credentials: Credentials | None, file: UserFile) -> None:
        self._credentials = credentials
        self._hashes = Hashes(file)
        self._guesses = Guesses()

    async def check(self, request: Request) -> User:
        """Return the user whose credentials a request carries; raises Unauthorized, TooManyGuesses."""
        is_basic, given = _given(request)
        if not given:
            raise Unauthorized
        user = self._known(given) if is_basic else None
        if user is None or not _has_long_password(given):
            self._guesses.check(request)
        if user is None and is_basic and self._hashes.has_users:
            user = await self._hashes.check(given, network_of(request.peer))
        if user is None:
            await self._guesses.note(request, "password")
            raise Unauthorized
        return user

    def _known(self, given: bytes) -> User | None:
        """Return the user whose credentials these are, if that is to be had without a hash."""
        if self._credentials is not None and self._credentials.match(given):
            return self._credentials.user
        account = self._hashes.known(given)
        return None if account is None else account.user

    def watch(self, request: Request) -> Callable[[], bool]:
        """Return what tells whether the user of a request that was checked just now is still as then."""
        _, given = _given(request)
        account = self._hashes.known(given)
        if account is None:
            return lambda: self._known(given) is not None
        return partial(self._hashes.is_still, account)


def _given(request: Request) -> tuple[bool, bytes]:
    """Return whether the credentials of a request are a user and a password, and the credentials; b"" for none."""
    scheme, _, given = (request.header(b"authorization") or b"").partition(b" ")
    return scheme.lower() == b"basic", given.strip()


def _has_long_password(encoded: bytes) -> bool:
    return is_long(parse_credentials(encoded)[1].encode())
