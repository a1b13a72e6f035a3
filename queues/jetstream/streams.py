"""The three streams of a queue: what they are to be, and that they are it.

A stream that is there already is never changed; what differs is told.  The streams of a version that kept its queue in
another way are told too, and never mixed with these.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from typing import Any

from nats.js.errors import NotFoundError

from ...calls.model import QueueFull, QueueUnavailable
from ...watchdog import log
from .connection import Connection, Json, Options, RevisionChanged, Write

QUEUE_PART, RECORDS_PART = 0.4, 0.6  # of nats_max_bytes; the record of a call that has ended is longer than its message

_ESSENTIAL = ("subjects", "retention", "discard", "max_msgs_per_subject", "allow_msg_ttl", "max_age")
_ODD = ("storage", "num_replicas", "max_bytes", "allow_direct", "max_msgs")


def build_streams(options: Options, connection: Connection) -> list[Json]:
    """Return the configurations of the streams as they are to be."""
    names = connection.names
    base: Json = {
        "storage": "file",
        "discard": "new",  # full means full: a call that was accepted is never pushed out
        "num_replicas": options.replicas,
        "allow_direct": True,
        "allow_msg_ttl": True,
    }
    waiting = [names.subject(kind, "*", "*", "*") for kind in ("call", "callback", "timer")]
    known = [names.subject(kind, "*", "*", "*") for kind in ("rec", "flow")]
    return [
        base
        | {
            "name": names.queue,
            "subjects": waiting,
            "retention": "workqueue",
            "max_bytes": int(options.max_bytes * QUEUE_PART),
        },
        base
        | {
            "name": names.records,
            "subjects": [*known, names.subject("key", "*"), names.subject("meta", "*")],
            "retention": "limits",
            "max_msgs_per_subject": 1,
            "max_bytes": int(options.max_bytes * RECORDS_PART),
        },
        base
        | {
            "name": names.bodies,
            "subjects": [names.subject("body", "*", "*")],
            "retention": "limits",
            "max_msgs_per_subject": 1,
            "max_bytes": options.max_bytes,
        },
    ]


def compare_streams(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what differs, a line each: what the queue cannot work with, and what it can."""
    bad: list[str] = []
    odd: list[str] = []
    for name in (*_ESSENTIAL, *_ODD):
        ours, theirs = wanted.get(name) or None, found.get(name) or None
        if ours is None and theirs in (None, -1):
            continue
        if ours != theirs:
            line = f"the stream {wanted['name']} has {name} {theirs}, wanted is {ours}"
            (bad if name in _ESSENTIAL else odd).append(line)
    return bad, odd


async def ensure_streams(connection: Connection, options: Options) -> dict[str, int]:
    """Create the streams that are not there; return the room of each, -1 for no limit.  Raises QueueUnavailable."""
    await _refuse_old(connection)
    rooms = {}
    for wanted in build_streams(options, connection):
        found = await _ensure(connection, wanted)
        bad, odd = compare_streams(wanted, found)
        if bad:
            raise QueueUnavailable(
                "; ".join([*bad, "it has been left as it is: mend or remove it, or set nats_prefix"])
            )
        for line in odd:
            log.warning(f"{line}; it has been left as it is")
        rooms[wanted["name"]] = int(found.get("max_bytes") or -1)
    return rooms


async def _refuse_old(connection: Connection) -> None:
    """Raise QueueUnavailable if the account holds the queue of an earlier version: two would share its names."""
    names = connection.names
    try:
        info = await connection.insist(f"STREAM.INFO.{names.old_calls}")
    except NotFoundError:
        return
    raise QueueUnavailable(
        f"the stream {names.old_calls} is the queue of an earlier version ({info['state']['messages']} messages): let"
        f" that version's workers drain it and remove the stream (nats stream rm {names.old_calls}), or set another"
        " nats_prefix; it has been left as it is"
    )


async def _ensure(connection: Connection, wanted: Json) -> Json:
    name = wanted["name"]

    async def find(timeout_s: float) -> Json:
        try:
            info = await connection.call_api(f"STREAM.INFO.{name}", None, timeout_s)
        except NotFoundError:
            info = await connection.call_api(f"STREAM.CREATE.{name}", wanted, timeout_s)
        config: Json = info["config"]
        return config

    try:
        return await connection.with_retries(find)
    except (QueueUnavailable, QueueFull) as error:
        if getattr(error.__cause__, "err_code", None) == 10058:  # another process has just made it, and not like this
            with contextlib.suppress(QueueUnavailable):
                return dict((await connection.info(name))["config"])
        room = f"nats_max_bytes={wanted['max_bytes']} on nats_replicas={wanted['num_replicas']}"
        raise type(error)(f"{error}; the stream {name} wants {room}") from error


async def read_token(connection: Connection) -> str:
    """Return the queue's secret, made by the process that opens the queue first."""
    subject = connection.names.subject("meta", "token")
    while True:
        stored = await connection.load(subject)
        if stored is not None:
            return stored.data.decode("ascii")
        with contextlib.suppress(RevisionChanged):
            await connection.publish(Write(subject, secrets.token_urlsafe(32).encode(), {}, 0))
