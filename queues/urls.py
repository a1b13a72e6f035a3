"""The addresses of queues: `spool:DIRECTORY` and `nats://HOST`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..watchdog import settings_table

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


# Fields of settings that bound a spool: NATS has bounds of its own.
SPOOL_FIELDS = (
    "max_queued",
    "max_queued_bytes",
    "max_queue_age_s",
    "queue_reserve_bytes",
    "keep_dead_s",
    "keep_dead_bytes",
)


def spool_conflicts(settings: object, url: QueueUrl) -> Iterator[str]:
    """Yield a line for each setting of a spool that was changed beside another queue, where it would mean nothing."""
    rows = {} if isinstance(url, Path) else settings_table(type(settings))
    for field in SPOOL_FIELDS:
        row = rows.get(field)
        if row is not None and getattr(settings, field) != row.parse(row.default or ""):
            yield f"{row.name} bounds a spool, and queue_url={url} is none; allowed there: nats_max_bytes, retention"
