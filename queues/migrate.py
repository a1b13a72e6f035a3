"""Moves the calls that wait in a spool to a queue on NATS, none lost and none doubled, however often it is killed.

Use: `await migrate(Path("spool"), target, print)`, with what used the spool stopped; again if it was killed.

A call is in both queues for a moment, and may run in neither then: it is put into the new one *held*, due in a future
that does not come; it is cancelled in the old one; and then the new one gets its own due time.  Whatever dies in
between leaves a pair that tells how far it came: held there and queued here is the first step, held there and
cancelled here the second.

It refuses to work on a spool that a worker still drains, and to make one where there is none.  What has ended stays
where it is: dead letters, and callbacks that are still to be delivered, which only a worker on the spool does; both are
told.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import fcntl
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from ..calls.model import Call, CallExists, CallFinished, CallUnknown, KeyReused, NewCall, QueueUnavailable, State
from ..watchdog import (
    BadSettings,
    FaashoundError,
    OutputFailed,
    parse_settings,
    report_failure,
    without_credentials,
    write_out,
)
from . import Queue, open_queue
from .commands import CommandParser
from .inspection import walk_dead_letters
from .nats_settings import NatsSettings
from .spool.errors import open_error, want_queue
from .spool.queue import Spool
from .urls import NatsUrl, QueueUrl, parse_queue_url

PAGE_COUNT = 500


REPORT_COUNT = 100  # calls between two words about how far it is


@runtime_checkable
class HoldingQueue(Queue, Protocol):
    """A queue that can keep a call without letting it run; see `jetstream.queue.JetStream`."""

    async def put_held(self, call: NewCall) -> NewCall: ...
    async def held_ids(self) -> list[str]: ...
    async def is_held(self, call_id: str) -> bool: ...
    async def let_go(self, call_id: str, due_s: float, expires_s: float | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Migrated:
    """What was moved; what the target knew already by its idempotency key; what stays in the spool.

    That is dead letters, and callbacks that a worker on the spool has still to deliver; and calls that were refused,
    as their idempotency key stands for another request at the target.
    """

    moved_count: int
    known_count: int
    left_count: int
    pending_count: int
    refused_count: int = 0


async def migrate(source: Path, target: HoldingQueue, report: Callable[[str], None]) -> Migrated:
    """Move every queued call, and finish what an earlier run has begun; `report` is told how far it is.

    Raises QueueUnavailable while a worker is at work on the spool, and the errors of both queues; run it again then.
    """
    _check_idle(source)
    spool = await Spool.open(source)
    try:
        stats = await spool.stats()
        if stats.by_state[State.RUNNING]:
            raise QueueUnavailable(f"calls of {source} are running: stop its gateway and workers first")
        return await _Move(source, spool, target, report).run()
    finally:
        await spool.close()


def _check_idle(source: Path) -> None:
    """Raise QueueUnavailable if a worker lives on the spool: each locks a file in `owners/` (spool/owners.py)."""
    owners = source / "owners"
    try:
        for path in owners.iterdir() if owners.is_dir() else ():
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(fd)
    except BlockingIOError:
        raise QueueUnavailable(f"a worker is at work on {source}: stop its gateway and workers first") from None
    except OSError as error:
        raise open_error(source, error) from error


class _Move:
    """One run of a migration."""

    def __init__(self, source: Path, spool: Spool, target: HoldingQueue, report: Callable[[str], None]) -> None:
        self._source = source
        self._spool = spool
        self._target = target
        self._report = report
        self._moved_count = self._known_count = 0
        self._refused_ids: list[str] = []

    async def run(self) -> Migrated:
        for call_id in await self._target.held_ids():
            call = await self._spool.get(call_id)
            if call is not None:
                await self._go_on(call)
        async for call in self._queued():
            await self._move(call)
        left = len([call.id async for call in walk_dead_letters(self._spool, None)])
        self._report(f"moved {self._moved_count} calls, {self._known_count} were known, {left} dead letters stay")
        pending = (await self._spool.stats()).callback_pending_count
        if pending:
            self._report(
                f"{pending} callbacks are still to be delivered, and stay: until they are, run a worker on the spool"
                f" (queue_url=spool:{self._source} fworker, with its former settings)"
            )
        return Migrated(self._moved_count, self._known_count, left, pending, len(self._refused_ids))

    async def _queued(self) -> AsyncIterator[Call]:
        """Every queued call, newest first; a page begins behind the last that was refused, as the others are gone."""
        last = None
        while page := await self._spool.calls(state=State.QUEUED, limit=PAGE_COUNT, before=last):
            for listed in page:
                call = await self._spool.get(listed.id)
                if call is not None and call.state is State.QUEUED:
                    yield call
            last = self._refused_ids[-1] if self._refused_ids else None

    async def _move(self, call: Call) -> None:
        """First step: the call is in the target, held."""
        body = await self._target.store_body(self._spool.open_body(call.body))
        new = NewCall(**{each.name: getattr(call, each.name) for each in fields(NewCall)})
        try:
            held = await self._target.put_held(dataclasses.replace(new, body=body, expires_s=None))
        except CallExists:
            if not await self._target.is_held(call.id):
                raise QueueUnavailable(f"the call id {call.id} is in use at the target by another call") from None
        except KeyReused as error:
            self._refused_ids.append(call.id)
            self._report(f"the call {call.id} stays: {error}")
            return
        else:
            if held.id != call.id:  # the same idempotency key: the target's call is this one
                await self._drop(call)
                self._known_count += 1
                return
        await self._go_on(call)

    async def _go_on(self, call: Call) -> None:
        """Second and third step: the call is gone from the spool, and may run at the target."""
        if call.state is State.QUEUED:
            try:
                state = await self._spool.cancel(call.id)
            except (CallFinished, CallUnknown):
                state = State.DONE
            if state is not State.CANCELLED:
                raise QueueUnavailable(f"the call {call.id} has just been run from the spool: stop its workers first")
        await self._target.let_go(call.id, call.due_s, call.expires_s)
        await self._spool.purge(state=State.CANCELLED, call_id=call.id)
        self._moved_count += 1
        if self._moved_count % REPORT_COUNT == 0:
            self._report(f"moved {self._moved_count} calls")

    async def _drop(self, call: Call) -> None:
        if await self._spool.cancel(call.id) is State.CANCELLED:
            await self._spool.purge(state=State.CANCELLED, call_id=call.id)


# ---------------------------------------------------------------------------------------------------------------
# The command.
# ---------------------------------------------------------------------------------------------------------------


def _url_argument(text: str) -> QueueUrl:
    try:
        return parse_queue_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{without_credentials(text)!r}: {error}") from None


def migrate_queue(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out `fworker migrate --from spool:DIR --to nats://HOST`; return its exit status.

    0 done, 1 failed (to be run again) or a call was refused, 2 not understood.

    The settings for NATS are those of gateway and worker.
    """
    parser = CommandParser("fworker migrate", description="Moves queued calls from a spool to NATS.")
    parser.add_argument("--from", dest="source", required=True, metavar="spool:DIRECTORY", type=_url_argument)
    parser.add_argument("--to", dest="target", required=True, metavar="nats://HOST[:PORT]", type=_url_argument)
    try:
        options = parser.parse_args(argv)
        source, target = options.source, options.target
        settings = parse_settings(NatsSettings, environ)
    except SystemExit as end:  # argparse has printed what there is to say
        return int(end.code or 0)
    except OutputFailed as error:
        return report_failure(error)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    if not isinstance(source, Path) or not isinstance(target, NatsUrl):
        print("allowed: --from spool:DIRECTORY --to nats://HOST[:PORT]", file=sys.stderr)
        return 2
    try:
        want_queue(source)
        _check_idle(source)  # rather than when a server has been found
    except FaashoundError as error:
        print(f"--from spool:{source}: {error}", file=sys.stderr)
        return 1
    return asyncio.run(_carry_out(source, target, settings))


async def _carry_out(source: Path, url: NatsUrl, settings: NatsSettings) -> int:
    try:
        target = await open_queue(url, settings)
        try:
            migrated = await migrate(source, cast(HoldingQueue, target), write_out)
        finally:
            await target.close()
    except FaashoundError as error:
        return report_failure(error)
    return 1 if migrated.refused_count else 0
