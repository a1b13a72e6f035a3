"""What people may see of calls and do with them: by HTTP (`/system/calls`, `/async-function/ID`), or in a shell.

    fworker dead list [--function NAME] [--json]          dead letters, and results that could not be delivered
    fworker dead show ID                                  one of them: payload, headers, attempts, the last response
    fworker dead retry ID... | --all [--function NAME]    again, as if new; of an undelivered result only the delivery
    fworker dead purge ID... | --all [--function NAME]    deletes
    fworker cancel --all | --function NAME                cancels what waits in the queue, and drops the payloads

A letter is a call that was given up (its state is `dead`), or one whose callback was (`callback.state` is `dead`, while
the call itself may be done).  Both stay until somebody retries or purges them.  The commands open the queue that
`queue_url` names; they need no gateway and no worker, and disturb none.

What it refuses to do: show credentials that a caller sent along, or touch a call that has not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import contextlib
import json
import sys
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .names import BadFunctionName, FunctionName, parse_function_name
from .queues import NatsSettings, Queue, QueueUrl, open_queue, parse_queue_url
from .spool import (
    FINAL,
    Attempt,
    Call,
    CallbackState,
    CallUnknown,
    Headers,
    State,
    StoredBody,
)
from .watchdog import (
    BadSettings,
    FaashoundError,
    OutputFailed,
    is_secret_field,
    parse_positive_count,
    parse_settings,
    report_failure,
    setting,
    write_out,
)

SHOWN_BODY_BYTES = 65536  # of a payload or a result, in what `show` prints
LISTED_COUNT = 100  # calls in one answer, unless asked otherwise
MAX_LISTED_COUNT = 1000

Json = dict[str, Any]


class BadQuery(FaashoundError):
    """A query parameter makes no sense."""

    status = 400


# ---------------------------------------------------------------------------------------------------------------
# As JSON (pure).
# ---------------------------------------------------------------------------------------------------------------


def format_time(epoch_s: float | None) -> str | None:
    """Return RFC 3339 in UTC, to the millisecond."""
    if epoch_s is None:
        return None
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def describe_call(call: Call) -> Json:
    """Return what whoever knows a call's id may know of it; members without a value are left out."""
    callback = call.callback
    return _without_none(
        {
            "id": call.id,
            "function": call.function,
            "state": call.state.value,
            "attempts": call.attempts,
            "accepted": format_time(call.accepted_s),
            "due": format_time(call.due_s) if call.state is State.QUEUED else None,
            "expires": format_time(call.expires_s),
            "started": format_time(call.started_s),
            "finished": format_time(call.finished_s),
            "status": call.status,
            "duration_seconds": call.duration_s,
            "error": call.error,
            "cancel_requested": call.cancel_requested or None,
            "result_bytes": None if call.result is None else call.result.bytes_count,
            "callback": callback
            and _without_none(
                {
                    "state": callback.state.value,
                    "attempts": callback.attempts,
                    "due": format_time(callback.due_s) if callback.state is CallbackState.PENDING else None,
                    "status": callback.status,
                    "error": callback.error,
                }
            ),
        }
    )


async def describe_call_whole(queue: Queue, call: Call) -> Json:
    """Return all that an operator may know of a call: the above, and payload, headers, attempts and response."""
    more = {
        "queue": call.queue,
        "method": call.method,
        "path": call.path,
        "query": call.query,
        "headers": _shown_headers(call.headers),
        "body": describe_body(await _read_start(queue, call.body), call.body.bytes_count),
        "callback_url": call.callback_url,
        "idempotency_key": call.idempotency_key,
        "history": [_describe_attempt(attempt) for attempt in call.history],
    }
    if call.result is not None:
        start = await _read_start(queue, call.result)
        more["result_headers"] = _shown_headers(call.result_headers)
        more["result"] = describe_body(start, call.result.bytes_count)
    elif call.excerpt is not None:
        more["excerpt"] = describe_body(call.excerpt, len(call.excerpt))
    return describe_call(call) | _without_none(more)


def describe_body(start: bytes, bytes_count: int) -> Json:
    """Return a body of `bytes_count` bytes that begins with `start`, as text if it is UTF-8, else as base64."""
    cut = len(start) < bytes_count
    shown: Json = {"bytes": bytes_count} | ({"shown_bytes": len(start)} if cut else {})
    try:  # an incremental decoder takes a character that the cut went through for one still to come
        return shown | {"text": codecs.getincrementaldecoder("utf-8")().decode(start, not cut)}
    except UnicodeDecodeError:
        return shown | {"base64": base64.b64encode(start).decode()}


def _describe_attempt(attempt: Attempt) -> Json:
    return _without_none(
        {
            "started": format_time(attempt.started_s),
            "finished": format_time(attempt.finished_s),
            "status": attempt.status,
            "error": attempt.error,
        }
    )


def _shown_headers(headers: Headers) -> list[list[str]]:
    return [[name, "(hidden)" if is_secret_field(name.lower().encode()) else value] for name, value in headers]


def _without_none(facts: Mapping[str, Any]) -> Json:
    return {name: value for name, value in facts.items() if value is not None}


async def _read_start(queue: Queue, body: StoredBody) -> bytes:
    async for piece in queue.open_body(body, SHOWN_BODY_BYTES):
        return piece
    return b""


# ---------------------------------------------------------------------------------------------------------------
# Choosing and acting.
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    """Which calls are meant: every condition that is not None holds.  `callback` is the state of the callback."""

    state: State | None = None
    function: FunctionName | None = None
    callback: CallbackState | None = None
    limit_count: int = LISTED_COUNT
    before: str | None = None


def parse_choice_query(query: bytes) -> Choice:
    """Return the calls that ?state=…&function=…&callback=…&limit=…&before=… means; BadQuery says what is allowed."""
    readers: dict[str, tuple[str, Callable[[str], object]]] = {
        "state": ("state", _parse_state),
        "function": ("function", _parse_function),
        "callback": ("callback", _parse_callback_state),
        "limit": ("limit_count", _parse_limit),
        "before": ("before", str),
    }
    found: Json = {}
    for name, value in urllib.parse.parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in readers:
            raise BadQuery(f"unknown query parameter {name[:100]!r}; allowed: {', '.join(readers)}")
        field, read = readers[name]
        try:
            found[field] = read(value)
        except ValueError as error:
            raise BadQuery(f"{name}={value[:100]!r}: {error}") from None
    return Choice(**found)


def _parse_state(text: str) -> State:
    try:
        return State(text)
    except ValueError:
        raise ValueError(f"allowed: {', '.join(state.value for state in State)}") from None


def _parse_function(text: str) -> FunctionName:
    try:
        return parse_function_name(text)
    except BadFunctionName as error:
        raise ValueError(str(error)) from None


def _parse_callback_state(text: str) -> CallbackState:
    try:
        return CallbackState(text)
    except ValueError:
        raise ValueError(f"allowed: {', '.join(state.value for state in CallbackState)}") from None


def _parse_limit(text: str) -> int:
    count = parse_positive_count(text)
    if count > MAX_LISTED_COUNT:
        raise ValueError(f"allowed: up to {MAX_LISTED_COUNT}")
    return count


async def walk_calls(queue: Queue, choice: Choice) -> AsyncIterator[Call]:
    """Yield the calls of `choice`, newest first, whatever its limit; CallUnknown if there is none called `before`."""
    before = choice.before
    while True:
        page = await queue.calls(state=choice.state, function=choice.function, limit=MAX_LISTED_COUNT, before=before)
        for call in page:
            if choice.callback is None or (call.callback is not None and call.callback.state is choice.callback):
                yield call
        if len(page) < MAX_LISTED_COUNT:
            return
        before = page[-1].id


async def list_calls(queue: Queue, choice: Choice) -> list[Call]:
    """Return the calls of `choice`, newest first, at most as many as its limit."""
    if choice.callback is None:
        return await queue.calls(
            state=choice.state, function=choice.function, limit=choice.limit_count, before=choice.before
        )
    found = []
    async for call in walk_calls(queue, choice):
        found.append(call)
        if len(found) == choice.limit_count:
            break
    return found


async def find_call(queue: Queue, call_id: str) -> Call:
    """Return the call with this id; raises CallUnknown."""
    call = await queue.get(call_id)
    if call is None:
        raise CallUnknown(f"no call has the id {call_id[:100]}")
    return call


async def retry_letter(queue: Queue, call_id: str) -> Call:
    """Queue a dead letter again, or if only its callback is dead that one; return the call as it is now.

    Raises CallUnknown, CallNotDead.
    """
    call = await find_call(queue, call_id)
    if call.state is not State.DEAD and call.callback is not None:
        return await queue.requeue_callback(call_id)
    return await queue.requeue_dead(call_id)


class NotEnded(FaashoundError):
    """What is not over, or not delivered, cannot be deleted."""

    status = 409


async def purge_call(queue: Queue, call_id: str) -> None:
    """Delete one call that has ended.  Raises CallUnknown, NotEnded."""
    call = await find_call(queue, call_id)
    if call.state not in FINAL:
        raise NotEnded(f"the call is {call.state.value}; DELETE /async-function/{call_id} cancels it")
    if not await queue.purge(state=call.state, call_id=call_id):
        raise NotEnded("the call's callback is still to be delivered")


# ---------------------------------------------------------------------------------------------------------------
# In a shell: fworker dead ...
# ---------------------------------------------------------------------------------------------------------------


async def walk_letters(queue: Queue, function: FunctionName | None) -> AsyncIterator[Call]:
    """Yield every dead letter and every call whose callback is dead, newest first within each kind."""
    async for call in walk_calls(queue, Choice(State.DEAD, function)):
        yield call
    left = (await queue.stats()).callback_dead_count  # so that a queue without any is not read to its end
    for state in (State.DONE, State.EXPIRED) if left else ():
        async for call in walk_calls(queue, Choice(state, function, CallbackState.DEAD)):
            yield call
            left -= 1
            if not left:
                return


def letter_row(call: Call) -> tuple[str, ...]:
    """Return what `list` shows of a letter, a column each."""
    if call.state is State.DEAD:
        return call.id, call.function, "call", str(call.attempts), format_time(call.finished_s) or "", call.error or ""
    callback = call.callback
    if callback is None:
        raise AssertionError("a call that is not dead is a letter because of its callback")
    return call.id, call.function, "callback", str(callback.attempts), "", callback.error or ""


_COLUMNS = ("ID", "FUNCTION", "DEAD", "ATTEMPTS", "SINCE", "ERROR")


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as a table under `_COLUMNS`; every cell but the last is padded, and no cell breaks its line."""
    cells = [_COLUMNS, *(tuple(repr(cell)[1:-1] for cell in row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in cells
    )


class BadArguments(FaashoundError):
    """The command line cannot be carried out."""


class SomeFailed(FaashoundError):
    """Not everything that was asked for could be done."""


async def show_list(queue: Queue, options: argparse.Namespace) -> None:
    """Print every letter: a table, or a JSON object a line."""
    letters = [call async for call in walk_letters(queue, options.function)]
    if options.json:
        for call in letters:
            write_out(json.dumps(describe_call(call)))
    elif letters:
        write_out(format_table([letter_row(call) for call in letters]))
    else:
        print("no dead letters", file=sys.stderr)


async def show_letters(queue: Queue, options: argparse.Namespace) -> None:
    """Print all that is known of the calls named."""
    for call_id in options.ids:
        write_out(json.dumps(await describe_call_whole(queue, await find_call(queue, call_id)), indent=2))


async def retry_letters(queue: Queue, options: argparse.Namespace) -> None:
    """Queue the chosen letters again."""

    async def retry(call_id: str) -> str:
        call = await retry_letter(queue, call_id)
        return "queued" if call.state is State.QUEUED else "its callback is queued"

    await _for_each(await _chosen(queue, options), retry)


async def purge_letters(queue: Queue, options: argparse.Namespace) -> None:
    """Delete the chosen letters."""

    async def purge(call_id: str) -> str:
        await purge_call(queue, call_id)
        return "deleted"

    await _for_each(await _chosen(queue, options), purge)


async def _for_each(call_ids: Sequence[str], act: Callable[[str], Awaitable[str]]) -> None:
    """Do it to each, whatever becomes of the others, and of our output.

    Raises at the end SomeFailed if it could not be done to all, or OutputFailed.
    """
    failed_count, unsaid = 0, None
    for call_id in call_ids:
        try:
            done = await act(call_id)
        except FaashoundError as error:
            print(f"{call_id}: {error}", file=sys.stderr)
            failed_count += 1
            continue
        try:
            write_out(f"{call_id} {done}")
        except OutputFailed as error:
            unsaid = error
    if unsaid is not None:
        raise unsaid
    if failed_count:
        raise SomeFailed(f"{failed_count} of {len(call_ids)} failed")


async def _chosen(queue: Queue, options: argparse.Namespace) -> list[str]:
    if bool(options.ids) == options.all:
        raise BadArguments("name the calls, or give --all (for one function: --all --function NAME)")
    if options.ids:
        return list(options.ids)
    return [call.id async for call in walk_letters(queue, options.function)]


class CommandParser(argparse.ArgumentParser):
    """A parser of arguments whose help goes out by `write_out`."""

    def print_help(self, file: Any = None) -> None:
        """Write the help to standard output; raises OutputFailed."""
        write_out(self.format_help().rstrip("\n"))


def _function_argument(text: str) -> FunctionName:
    try:
        return parse_function_name(text)
    except BadFunctionName as error:
        raise argparse.ArgumentTypeError(str(error)) from None  # the one error whose text argparse passes on


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("fworker dead", description="Dead letters of the queue that queue_url names.")
    commands = parser.add_subparsers(required=True, metavar="list|show|retry|purge")

    def add(name: str, work: Any, purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(work=work)
        return command

    listing = add("list", show_list, "lists calls that were given up, and results that could not be delivered")
    listing.add_argument("--json", action="store_true", help="a JSON object a line")
    show = add("show", show_letters, "shows payload, headers, attempts and the last response, as JSON")
    show.add_argument("ids", metavar="ID", nargs="+")
    retry = add("retry", retry_letters, "queues letters again; of an undelivered result only the delivery")
    purge = add("purge", purge_letters, "deletes letters")
    for command in (retry, purge):
        command.add_argument("ids", metavar="ID", nargs="*")
        command.add_argument("--all", action="store_true", help="every letter")
    for command in (listing, retry, purge):
        command.add_argument("--function", metavar="NAME", type=_function_argument, help="only those of this function")
    return parser


@dataclass(frozen=True, slots=True)
class Target(NatsSettings):
    """The queue that a command is to work on, told as to a worker."""

    queue_url: QueueUrl = setting("queue_url", "spool:./spool", parse_queue_url, "the queue")


def dead_letters(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out `fworker dead ...`; return its exit status: 0 done, 1 failed, 2 not understood."""
    return _run(_build_parser(), argv, environ)


def cancel_calls(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Carry out `fworker cancel ...`; return its exit status: 0 done, 1 failed, 2 not understood."""
    parser = CommandParser("fworker cancel", description="Cancels every call that waits in the queue of queue_url.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="of every function")
    which.add_argument("--function", metavar="NAME", type=_function_argument, help="only those of this function")
    parser.set_defaults(work=cancel_queued)
    return _run(parser, argv, environ)


async def cancel_queued(queue: Queue, options: argparse.Namespace) -> None:
    """Cancel what waits, and print how many calls that were."""
    count = await queue.cancel_queued(function=options.function)
    write_out(f"{count} cancelled")


def _run(parser: argparse.ArgumentParser, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed what there is to say
        return int(end.code or 0)
    except OutputFailed as error:
        return report_failure(error)
    try:
        target = parse_settings(Target, environ)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    if isinstance(target.queue_url, Path) and not target.queue_url.is_dir():  # opening would create it
        print(f"queue_url=spool:{target.queue_url}: there is no such directory", file=sys.stderr)
        return 1
    return asyncio.run(_carry_out(target, options))


async def _carry_out(target: Target, options: argparse.Namespace) -> int:
    try:
        async with contextlib.AsyncExitStack() as stack:
            queue = await open_queue(target.queue_url, target)
            stack.push_async_callback(queue.close)
            await options.work(queue, options)
    except BadArguments as error:
        print(error, file=sys.stderr)
        return 2
    except FaashoundError as error:
        return report_failure(error)
    return 0
