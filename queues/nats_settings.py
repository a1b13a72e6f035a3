"""The settings of a NATS queue: names, replicas, room, and how to log in.

Contract: a secret is read from its file when the queue is opened, and is in no setting, log line or error.  What it
refuses: two ways to log in, and half of a pair (a user without a password, a certificate without its key).
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..watchdog import CannotStart, parse_positive_count, parse_size, parse_text, read_file, reason_of, setting


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
    for name in ("nats_ca_file", "nats_cert_file", "nats_key_file"):
        path = getattr(settings, name)
        if path is not None:
            try:
                Path(path).read_bytes()  # ssl does not tell which of two it could not read
            except OSError as error:
                raise CannotStart(f"cannot read {path} ({name}): {reason_of(error, path)}") from None
    try:
        context = ssl.create_default_context(cafile=settings.nats_ca_file)
    except ssl.SSLError:
        raise CannotStart(f"{settings.nats_ca_file} (nats_ca_file) holds no certificate; allowed: PEM") from None
    if settings.nats_cert_file is not None:
        try:
            context.load_cert_chain(settings.nats_cert_file, settings.nats_key_file)
        except ssl.SSLError:
            raise CannotStart(
                f"{settings.nats_cert_file} (nats_cert_file) and {settings.nats_key_file} (nats_key_file) hold no"
                " certificate and its key; allowed: PEM"
            ) from None
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
        seed = login["nkeys_seed_str"] = secret(settings.nats_nkey_file, "nats_nkey_file")
        if not _is_seed(seed.encode()):
            raise CannotStart(f"{settings.nats_nkey_file} is no seed (nats_nkey_file); allowed: an NKey's seed alone")
    if settings.nats_creds_file is not None:
        secret(settings.nats_creds_file, "nats_creds_file")
        if not _is_credentials(Path(settings.nats_creds_file).read_bytes()):
            allowed = "a user JWT and an NKey's seed, each behind its BEGIN, with LF alone at the ends of lines"
            raise CannotStart(f"{settings.nats_creds_file} is no login (nats_creds_file); allowed: {allowed}")
        login["user_credentials"] = settings.nats_creds_file
    return login


def _is_seed(text: bytes) -> bool:
    """Tell whether a text is an NKey's seed, as far as can be told here: `connect` says where nkeys is missing."""
    try:
        import nkeys  # type: ignore[import-untyped]
    except ImportError:
        return True
    try:
        nkeys.from_seed(bytearray(text))
    except (nkeys.NkeysError, ValueError):
        return False
    return True


def _is_credentials(text: bytes) -> bool:
    """Tell whether nats-py finds a JWT and a seed: without the former's line it looks for it for ever."""
    jwt = re.search(rb"BEGIN NATS USER JWT.*\n[!-~]+\n", text)
    seed = re.search(rb"BEGIN USER NKEY SEED.*\n([!-~]+)\n", text)
    return jwt is not None and seed is not None and _is_seed(seed[1])
