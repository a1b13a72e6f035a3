"""How often each function has been called, over all lives of the gateway.

    before = load_counts(path)                               # once, before the first call
    counts = InvocationCounts(path, before, metrics)
    counts.totals()["cat.openfaas-fn"]
    await counts.keep(listed_names)                          # for ever: saves from time to time
    counts.save(listed_names)                                # at the end

Contract: what was saved last, and what the metrics of this life count.  A gateway that is killed loses the calls since
the last `save`; the file is written whole (temporary file, fsync, rename), so it is never half a file.

What it refuses to do: stop the gateway.  A file that cannot be read or written is a warning, once; without a path
nothing is kept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ..functions.documents import parse_document, write_whole
from ..watchdog import in_thread, log, reason_of
from .metrics import GatewayMetrics

SAVED_EVERY_S = 60.0


class InvocationCounts:
    """The counts that are kept at `path`, and those of `metrics` besides."""

    def __init__(self, path: Path | None, before: Mapping[str, int], metrics: GatewayMetrics) -> None:
        self._path = path
        self._metrics = metrics
        self._before = self._saved = before
        self._has_failed = False

    def totals(self) -> dict[str, int]:
        """Return how often each function has been called; one that is not in it, never."""
        now = self._metrics.invocation_counts()
        return {name: self._before.get(name, 0) + now.get(name, 0) for name in self._before.keys() | now.keys()}

    def add(self, name: str, count: int) -> None:
        """Count calls that did not come through the gateway."""
        self._metrics.called_directly(name, count)

    async def keep(self, listed: Callable[[], Collection[str]]) -> None:
        """Save from time to time, not in the loop, until cancelled, which waits for a write that has begun."""
        while True:
            await asyncio.sleep(SAVED_EVERY_S)
            await in_thread(self.save, listed())

    def save(self, listed: Collection[str]) -> None:
        """Keep the counts of the functions in `listed`, and of others that were called in this life."""
        known = self._metrics.invocation_counts().keys() | set(listed)
        counts = {name: count for name, count in sorted(self.totals().items()) if name in known}
        if counts == self._saved or self._path is None:
            return
        try:
            write_whole(self._path, json.dumps(counts).encode())
        except OSError as error:
            if not self._has_failed:
                log.warning(f"counts of invocations will not survive a restart: {self._path}: {error.strerror}")
            self._has_failed = True
        else:
            self._saved = counts


def load_counts(path: Path | None) -> Mapping[str, int]:
    """Return the counts of the gateways before us, with a warning if they cannot be read."""
    if path is None:
        return {}
    try:
        return parse_counts(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"invocations are counted from zero: {path}: {reason_of(error, path)}")
        return {}


def parse_counts(text: bytes) -> dict[str, int]:
    """Return the counts in a file; ValueError if it is none of ours."""
    found = parse_document(text)
    if not isinstance(found, dict) or not all(isinstance(count, int) for count in found.values()):
        raise ValueError("not an object of whole numbers")
    return found
