"""The addresses of queues, as the setting `queue_url` and `fworker migrate` have them: parsed, and written again.

    parse_queue_url("spool:./spool")                # a Path
    parse_queue_url("nats://a,b:4223").urls         # ["nats://a:4222", "nats://b:4223"]

What it refuses: credentials, which are told by files (queues/nats_settings.py), so that an address may be logged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

QUEUE_URL_HELP = "spool:DIRECTORY (~/ is the home directory), or nats://HOST[:PORT][,HOST2[:PORT]...], or tls://..."


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
