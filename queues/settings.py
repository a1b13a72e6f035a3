"""The settings of what works on a queue: which queue that is, and what gateway and worker must be told alike.

    class Settings(SharedSettings): ...       # a program's own rows, with those of its queue behind them
    settings.queue_url                        # a spool's directory, or the servers of NATS

Contract: a row stands once, so that gateway and worker, which are told of one queue, cannot read it differently.
What it refuses (`conflicts`): a bound of spools that was set beside a queue that is none, where it would do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..calls.callbacks import CallbackAllow, parse_callback_allow
from ..watchdog import parse_choice, parse_size, setting, settings_table
from .nats_settings import NatsSettings
from .urls import QueueUrl, parse_queue_url


def parse_positive_size(text: str) -> int:
    """Return bytes, at least one: a bound of 0, which is no limit elsewhere, would refuse or drop everything."""
    size = parse_size(text)
    if not size:
        raise ValueError("allowed: bytes, at least 1")
    return size


@dataclass(frozen=True, slots=True)
class QueueSettings(NatsSettings):
    """Which queue a program or a command is to work on; see `watchdog.settings_table`."""

    queue_url: QueueUrl = setting(
        "queue_url", "spool:./spool", parse_queue_url, "the queue: spool:DIRECTORY, or nats://HOST[:PORT][,HOST...]"
    )


@dataclass(frozen=True, slots=True)
class SharedSettings(QueueSettings):
    """What gateway and worker both have."""

    queue_reserve_bytes: int = setting(
        "queue_reserve",
        "8MiB",
        parse_size,
        "room on a spool's disk that is kept for ending calls; an eighth of a small disk",
    )
    callback_allow: CallbackAllow | None = setting(
        "callback_allow",
        "",
        parse_callback_allow,
        "hosts and networks that callbacks may go to besides public ones; with the word only, instead of them",
    )
    log_format: str = setting("log_format", "text", parse_choice("text", "json"), "how log lines look: text or json")

    def conflicts(self) -> Iterable[str]:
        """Yield a line for each pair of settings that cannot both be meant."""
        yield from NatsSettings.conflicts(self)
        yield from _spool_conflicts(self)


# Fields of settings that bound a spool: NATS has bounds of its own.
SPOOL_FIELDS = (
    "max_queued",
    "max_queued_bytes",
    "max_queue_age_s",
    "queue_reserve_bytes",
    "keep_dead_s",
    "keep_dead_bytes",
)


def _spool_conflicts(settings: SharedSettings) -> Iterator[str]:
    """Yield a line for each setting of a spool that was changed beside another queue, where it would mean nothing."""
    url = settings.queue_url
    rows = {} if isinstance(url, Path) else settings_table(type(settings))
    for field in SPOOL_FIELDS:
        row = rows.get(field)
        if row is not None and getattr(settings, field) != row.parse(row.default or ""):
            yield f"{row.name} bounds a spool, and queue_url={url} is none; allowed there: nats_max_bytes, retention"
