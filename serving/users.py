"""Who may ask what of a gateway that asks for passwords: its users, their roles, and the file of their hashes.

    users = UserFile(Path("/run/secrets/basic-auth-users"))  # CannotStart names every bad line
    account = users.find("alice")                            # as the file is by now; None: there is no such user
    account.password.verify("sesame")                        # blocks, and costs a good part of a second

The file has a line for each user, as one of htpasswd, and `fgateway password NAME [ROLE]` writes them:

    NAME:HASH[:ROLE]     # and what follows is a comment

HASH is scrypt's in the PHC string format, which passlib and others write as well (RFC 7914; the costs are those that
OWASP recommends).  ROLE is `read`, who sees all that operators see, or `deploy`, who may change it too; the former
unless told.

What it refuses: hashes that cost less or more than is sensible, since each wrong password costs as much; a file that
others may write.  A file that was right and has become wrong is told in the log, and the users are those of before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..watchdog import CannotStart, log

NAME_RULE = "1 to 64 of letters, digits and . _ @ -"
HASH_RULE = "$scrypt$ln=LN,r=R,p=P$SALT$KEY with LN 14 to 17, R 8, P 1 to 5, at least 16 bytes each of SALT and KEY"
ROLE_RULE = "read or deploy"

SALT_BYTES = KEY_BYTES = 16
COST_LOG2, BLOCK_SIZE, PARALLELISM = 15, 8, 3  # 32 MiB
MAX_FILE_BYTES = 1 << 20
SETTLED_NS = 100_000_000  # longer than any tick of a file system's clock

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}", re.ASCII)
_HASH = re.compile(
    r"\$scrypt\$ln=(?P<ln>1[4-7]),r=8,p=(?P<p>[1-5])\$(?P<salt>[A-Za-z0-9+/]{22,86})\$(?P<key>[A-Za-z0-9+/]{22,86})",
    re.ASCII,
)


class Role(Enum):
    """What a user may do."""

    READ = "read"
    DEPLOY = "deploy"


@dataclass(frozen=True, slots=True)
class User:
    """A user whose password was right."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """What is kept of a password."""

    cost_log2: int
    parallelism: int
    salt: bytes
    key: bytes

    def verify(self, password: str) -> bool:
        """Tell whether `password` is the one; blocks."""
        found = _scrypt(password, self.salt, self.cost_log2, self.parallelism, len(self.key))
        return hmac.compare_digest(found, self.key)

    def __str__(self) -> str:
        costs = f"ln={self.cost_log2},r={BLOCK_SIZE},p={self.parallelism}"
        return f"$scrypt${costs}${_encode(self.salt)}${_encode(self.key)}"


@dataclass(frozen=True, slots=True)
class Account:
    """A line of the file."""

    user: User
    password: PasswordHash


def _scrypt(password: str, salt: bytes, cost_log2: int, parallelism: int, length: int) -> bytes:
    # OpenSSL needs a little more than 128 * r * (N + p) bytes (RFC 7914 2).
    max_bytes = 128 * BLOCK_SIZE * ((1 << cost_log2) + parallelism) + (1 << 20)
    return hashlib.scrypt(
        password.encode(), salt=salt, n=1 << cost_log2, r=BLOCK_SIZE, p=parallelism, maxmem=max_bytes, dklen=length
    )


def hash_password(password: str) -> PasswordHash:
    """Return what to keep of a password; blocks."""
    salt = os.urandom(SALT_BYTES)
    key = _scrypt(password, salt, COST_LOG2, PARALLELISM, KEY_BYTES)
    return PasswordHash(COST_LOG2, PARALLELISM, salt, key)


def parse_hash(text: str) -> PasswordHash:
    """Return what a PHC string says; ValueError tells what is allowed, and nothing of the hash."""
    match = _HASH.fullmatch(text)
    if match is None:
        raise ValueError(f"the hash: allowed: {HASH_RULE}")
    try:
        return PasswordHash(int(match["ln"]), int(match["p"]), _decode(match["salt"]), _decode(match["key"]))
    except binascii.Error:
        raise ValueError(f"the hash: allowed: {HASH_RULE}") from None


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def is_user_name(text: str) -> bool:
    """Tell whether a user may be called `text`, which is shown in the log."""
    return _NAME.fullmatch(text) is not None


def parse_account(line: str) -> Account:
    """Return the user of a line; ValueError tells what is wrong with it, and nothing of the hash."""
    name, _, rest = line.partition(":")
    text, _, role = rest.partition(":")
    if not is_user_name(name):
        raise ValueError(f"the name: allowed: {NAME_RULE}")
    if role not in ("", *(each.value for each in Role)):
        raise ValueError(f"the role of {name}: allowed: {ROLE_RULE}")
    return Account(User(name, Role(role or Role.READ.value)), parse_hash(text))


class BadUsers(ValueError):
    """A file of users cannot be used; `problems` has a line for each fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def parse_users(text: str, source: str) -> dict[str, Account]:
    """Return the users of a file by name; `source` is what errors call it.  Raises BadUsers with every bad line."""
    found: dict[str, Account] = {}
    problems: list[str] = []
    for number, line in _lines(text):
        try:
            account = parse_account(line)
            if account.user.name in found:
                raise ValueError(f"{account.user.name} has a line already")
            found[account.user.name] = account
        except ValueError as error:
            problems.append(f"{source}:{number}: {error}")
    if problems:
        raise BadUsers(problems)
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.partition("#")[0].strip()
        if bare:
            yield number, bare


class UserFile:
    """The users of the file at `path`, looked at again when it has changed.  Raises CannotStart.

    With `missing_ok` there are none until there is a file.
    """

    def __init__(self, path: Path, *, missing_ok: bool = False) -> None:
        self._path = path
        self._seen: tuple[int, ...] = (-1,)
        self._trouble = ""  # that has been told
        self._data = b""
        self._users: Mapping[str, Account] = {}
        try:
            self._take()
        except (OSError, BadUsers) as error:
            if not (missing_ok and isinstance(error, FileNotFoundError)):
                raise CannotStart(f"the users cannot be read: {_reason(path, error)}") from None

    @property
    def is_empty(self) -> bool:
        """Whether there are no users."""
        return not self._users

    def find(self, name: str) -> Account | None:
        """Return a user as the file has it; None if it has none of this name."""
        return self._users.get(name)

    def look(self) -> None:
        """See whether the file has changed; two microseconds if not."""
        try:
            if self._take():
                log.info(f"{len(self._users)} users are in {self._path}")
            self._trouble = ""
        except FileNotFoundError:
            self._data, self._users = b"", {}
            log.warning(f"{self._path} is gone, and its users with it")
        except OSError as error:  # it may pass, and leaves no trace in the file
            self._seen = (-1,)
            self._tell(_reason(self._path, error))
        except BadUsers as error:
            self._tell(_reason(self._path, error))

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.error(f"the users are those of before: {trouble}")
        self._trouble = trouble

    def _take(self) -> bool:
        """Take what the file says if that may have changed; tell whether it has."""
        found = self._stat()
        if found == self._seen:
            return False
        # A change that is this young may be followed by another that looks the same.
        self._seen = (-1,) if found and found[-1] > time.time_ns() - SETTLED_NS else found
        data = self._read()
        if data == self._data:
            return False
        self._data = data
        try:
            self._users = parse_users(data.decode(), str(self._path))
        except UnicodeDecodeError:
            raise BadUsers([f"{self._path}: not UTF-8"]) from None
        return True

    def _stat(self) -> tuple[int, ...]:
        """Return what tells one state of the file from another: its mode changes st_ctime alone (inode(7))."""
        try:
            found = os.stat(self._path)  # noqa: PTH116 - half of what Path takes
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o022:
                raise BadUsers([f"{self._path}: others may write it; allowed: a mode such as 0600"])
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise BadUsers([f"{self._path}: longer than {MAX_FILE_BYTES} bytes"])
        return data


def _reason(path: Path, error: OSError | BadUsers) -> str:
    return f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
