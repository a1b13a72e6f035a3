"""Which queue a program is to use: the spool of one machine, or NATS JetStream for many.

Use:

    queue = await open_queue(parse_queue_url("nats://n1:4222,n2:4222"), parse_settings(NatsSettings, environ))

Contract: both keep the interface `Queue`, with the types, the errors and the promises that spool.py states, and one
test suite runs against both (tests/test_queue_contract.py).  Whoever holds a Queue does not know which it is.

What it refuses to do: take credentials from a URL, which is logged; they come from settings and from files.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .names import FunctionName
from .spool import (
    Attempt,
    Bounds,
    Call,
    Lease,
    NewCall,
    QueueLimits,
    Renewal,
    RunEnd,
    Spool,
    State,
    Stats,
    StoredBody,
    Swept,
)
from .watchdog import CannotStart, parse_positive_count, parse_size, parse_text, read_file, setting


class Queue(Protocol):
    """What gateways, workers and people need of a queue; every method is described at `spool.Spool`."""

    token: str

    async def close(self) -> None: ...

    async def store_body(self, chunks: AsyncIterator[bytes] | bytes, limit_bytes: int | None = None) -> StoredBody: ...
    async def store_result(
        self, chunks: AsyncIterator[bytes], limit_bytes: int | None = None, length: int | None = None
    ) -> StoredBody: ...
    def open_body(self, body: StoredBody, chunk_bytes: int = ...) -> AsyncGenerator[bytes, None]: ...
    async def drop_body(self, body: StoredBody) -> None: ...

    async def put(self, call: NewCall) -> Call: ...
    async def get(self, call_id: str) -> Call | None: ...
    async def wait(self, call_id: str, timeout_s: float) -> Call: ...
    async def cancel(self, call_id: str) -> State: ...
    async def cancel_queued(self, *, function: FunctionName | None = None) -> int: ...

    async def enlist(self, owner: str | None = None) -> str: ...
    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]: ...
    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, room: Mapping[str, int] | None = None
    ) -> list[Lease]: ...
    async def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewal: ...
    async def cancelled_ids(self, owner: str) -> frozenset[str]: ...
    async def reclaim(self) -> int: ...

    async def finish(self, lease: Lease, end: RunEnd) -> None: ...
    async def retry(self, lease: Lease, *, attempt: Attempt, due_s: float, excerpt: bytes | None = None) -> State: ...
    async def release(self, lease: Lease) -> None: ...
    async def finish_cancelled(self, lease: Lease, attempt: Attempt) -> None: ...

    async def callback_done(self, lease: Lease, attempt: Attempt) -> None: ...
    async def callback_retry(self, lease: Lease, attempt: Attempt, due_s: float) -> None: ...
    async def callback_dead(self, lease: Lease, attempt: Attempt) -> None: ...

    async def wait_for_work(self, timeout_s: float) -> bool: ...
    async def wait_for_cancel(self, timeout_s: float) -> bool: ...

    async def calls(
        self,
        *,
        state: State | None = None,
        function: FunctionName | None = None,
        limit: int = 100,
        before: str | None = None,
    ) -> list[Call]: ...
    async def requeue_dead(self, call_id: str) -> Call: ...
    async def requeue_callback(self, call_id: str) -> Call: ...
    async def purge(self, *, state: State, function: FunctionName | None = None, call_id: str | None = None) -> int: ...
    async def stats(self) -> Stats: ...
    async def sweep(self, keep_results_s: float, retention_s: float, bounds: Bounds | None = None) -> Swept: ...


# ---------------------------------------------------------------------------------------------------------------
# Addresses.
# ---------------------------------------------------------------------------------------------------------------

QUEUE_URL_HELP = "spool:DIRECTORY (~/ is the home directory), or nats://HOST[:PORT][,HOST2[:PORT]...], or tls://..."
QUEUE_RESERVE_HELP = "room on a spool's disk that is kept for ending calls; an eighth of a small disk"
NATS_PORT = 4222

_SERVER = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class NatsUrl:
    """The servers of a NATS cluster, any of which will do; without credentials, so it may be logged."""

    scheme: str
    servers: tuple[str, ...]

    @property
    def urls(self) -> list[str]:
        """One URL a server, as clients of NATS want them."""
        return [f"{self.scheme}://{server}" for server in self.servers]

    def __str__(self) -> str:
        return f"{self.scheme}://{','.join(self.servers)}"


QueueUrl = Path | NatsUrl


def parse_queue_url(text: str) -> QueueUrl:
    """Return the queue that `text` names: a spool's directory, or servers; ValueError says what is allowed."""
    scheme, _, rest = text.partition(":")
    if scheme == "spool" and rest and "\0" not in rest:
        return _parse_directory(rest)
    if scheme not in ("nats", "tls") or not rest.startswith("//"):
        raise ValueError(f"allowed: {QUEUE_URL_HELP}")
    if "@" in rest:
        raise ValueError(f"credentials are told by nats_user and its like, not here; allowed: {QUEUE_URL_HELP}")
    return NatsUrl(scheme, tuple(_parse_server(server) for server in rest[2:].rstrip("/").split(",")))


def _parse_directory(text: str) -> Path:
    """Return the path; a `~` in front is a home directory, as shells have it that expand it only after a space."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"no home directory is known for {text.partition('/')[0]!r}; allowed: {QUEUE_URL_HELP}"
        ) from None


def _parse_server(text: str) -> str:
    found = _SERVER.fullmatch(text)
    port = int((found and found["port"]) or NATS_PORT)
    if not found or not 0 < port < 65536:
        raise ValueError(f"{text!r} is no HOST[:PORT]; allowed: {QUEUE_URL_HELP}")
    return f"{found['host']}:{port}"


# ---------------------------------------------------------------------------------------------------------------
# What JetStream needs besides.
# ---------------------------------------------------------------------------------------------------------------


def parse_prefix(text: str) -> str:
    """Return a prefix for the names of streams and subjects; ValueError for what may not be in both."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", text, re.ASCII):
        raise ValueError("allowed: 1 to 32 of a-z, A-Z, 0-9, '-' and '_'")
    return text


def parse_replicas(text: str) -> int:
    """Return how many servers keep each message."""
    count = parse_positive_count(text)
    if count not in (1, 3, 5):
        raise ValueError("allowed: 1, 3 or 5")
    return count


@dataclass(frozen=True, slots=True)
class NatsSettings:
    """What gateway and worker need to know of NATS besides `queue_url`; see `watchdog.settings_table`."""

    nats_prefix: str = setting(
        "nats_prefix", "faashound", parse_prefix, "begins the names of the queue's streams and subjects"
    )
    nats_replicas: int = setting("nats_replicas", "1", parse_replicas, "servers that keep each call; 3 for a cluster")
    nats_max_bytes: int = setting(
        "nats_max_bytes", "4GiB", parse_size, "room that is set aside for calls, and as much for long bodies"
    )
    nats_user: str | None = setting("nats_user", "", parse_text, "user name, with nats_password_file")
    nats_password_file: str | None = setting("nats_password_file", "", parse_text, "file of the user's password")
    nats_token_file: str | None = setting("nats_token_file", "", parse_text, "file of an authentication token")
    nats_nkey_file: str | None = setting("nats_nkey_file", "", parse_text, "file of an NKey's seed")
    nats_creds_file: str | None = setting("nats_creds_file", "", parse_text, "credentials file: user JWT and seed")
    nats_ca_file: str | None = setting(
        "nats_ca_file", "", parse_text, "certificates that sign the servers' ones", default_note="the system's"
    )
    nats_cert_file: str | None = setting("nats_cert_file", "", parse_text, "our own certificate, with nats_key_file")
    nats_key_file: str | None = setting("nats_key_file", "", parse_text, "private key of our certificate")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        ways = {
            "nats_user": self.nats_user,
            "nats_token_file": self.nats_token_file,
            "nats_nkey_file": self.nats_nkey_file,
            "nats_creds_file": self.nats_creds_file,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} are different ways to log in; allowed: one of them"
        for one, other in (("nats_user", "nats_password_file"), ("nats_cert_file", "nats_key_file")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                yield f"{one} and {other} go together; allowed: both or neither"


def default_nats_settings() -> NatsSettings:
    """Return what an empty environment means."""
    return NatsSettings("faashound", 1, 4 << 30, None, None, None, None, None, None, None, None)


def build_tls(settings: NatsSettings) -> ssl.SSLContext:
    """Return how servers are trusted and we are known.  Raises CannotStart, naming the file."""
    try:
        context = ssl.create_default_context(cafile=settings.nats_ca_file)
    except (OSError, ssl.SSLError) as error:
        raise CannotStart(f"nats_ca_file {settings.nats_ca_file}: {error}") from None
    if settings.nats_cert_file is not None:
        try:
            context.load_cert_chain(settings.nats_cert_file, settings.nats_key_file)
        except (OSError, ssl.SSLError) as error:
            raise CannotStart(f"nats_cert_file {settings.nats_cert_file}: {error}") from None
    return context


def read_login(settings: NatsSettings) -> dict[str, Any]:
    """Return what to log in with, as arguments of `nats.connect`.  Raises CannotStart without a word of a secret."""

    def secret(path: str, meaning: str) -> str:
        text = read_file(path, meaning).strip()
        if not text:
            raise CannotStart(f"{path} is empty ({meaning})")
        return text

    login: dict[str, Any] = {}
    if settings.nats_user is not None and settings.nats_password_file is not None:
        login |= {"user": settings.nats_user, "password": secret(settings.nats_password_file, "nats_password_file")}
    if settings.nats_token_file is not None:
        login["token"] = secret(settings.nats_token_file, "nats_token_file")
    if settings.nats_nkey_file is not None:
        login["nkeys_seed_str"] = secret(settings.nats_nkey_file, "nats_nkey_file")
    if settings.nats_creds_file is not None:
        secret(settings.nats_creds_file, "nats_creds_file")
        login["user_credentials"] = settings.nats_creds_file
    return login


async def open_queue(
    url: QueueUrl,
    nats: NatsSettings | None = None,
    *,
    limits: QueueLimits | None = None,
    now: Callable[[], float] = time.time,
) -> Queue:
    """Open the queue that `url` names, or create it; `now` is the wall clock, in seconds since the epoch.

    A spool keeps to `limits`; without, it takes what comes, and leaves the reserve to the programs that set its size.
    Raises the queue's errors, and CannotStart when a secret file cannot be read or nats-py is not installed.
    """
    if isinstance(url, Path):
        return await Spool.open(url, limits=limits or QueueLimits(reserve_bytes=None), now=now)
    try:
        from .jetstream import JetStream, Options
    except ImportError as error:
        raise CannotStart(f"queue_url={url} needs nats-py: pip install 'faashound[nats]' ({error})") from error
    settings = nats or default_nats_settings()
    login = read_login(settings)
    if url.scheme == "tls" or settings.nats_ca_file or settings.nats_cert_file:
        login["tls"] = build_tls(settings)
    options = Options(tuple(url.urls), login, settings.nats_prefix, settings.nats_replicas, settings.nats_max_bytes)
    return await JetStream.open(options, now=now)


def trouble_of(queue: Queue) -> str | None:
    """Return what keeps a queue from its work as far as is known, for /healthz; None if nothing does."""
    if not getattr(queue, "healthy", True):
        return "the queue cannot be reached"
    trouble: str | None = getattr(queue, "trouble", None)
    return trouble
