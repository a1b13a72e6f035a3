"""The commands of people at a queue.

    fworker dead list [--function NAME] [--json]          dead letters, and results that could not be delivered
    fworker dead show ID                                  one of them: payload, headers, attempts, the last response
    fworker dead retry ID... | --all [--function NAME]    again, as if new; of an undelivered result only the delivery
    fworker dead purge ID... | --all [--function NAME]    deletes
    fworker cancel --all | --function NAME                cancels what waits in the queue, and drops the payloads

Contract: they open the queue that `queue_url` names; they need no gateway and no worker, and disturb none.
Exit status: 0 done, 1 failed, 2 not understood.

What they refuse to do: touch a call that has not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..calls.model import Call, State
from ..calls.names import BadFunctionName, FunctionName, parse_function_name
from ..calls.views import describe_call, format_time
from ..watchdog import BadSettings, FaashoundError, OutputFailed, parse_settings, report_failure, write_out
from . import Queue, open_queue
from .inspection import find_call, purge_call, retry_dead_letter, show_call, walk_dead_letters
from .settings import QueueSettings
from .spool.errors import want_queue


def dead_letter_row(call: Call) -> tuple[str, ...]:
    """Return what `list` shows of a dead letter, a column each."""
    if call.state is State.DEAD:
        return call.id, call.function, "call", str(call.attempts), format_time(call.finished_s) or "", call.error or ""
    callback = call.callback
    if callback is None:
        raise AssertionError("a call that is not dead is a dead letter because of its callback")
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
    """Print every dead letter: a table, or a JSON object a line."""
    found = [call async for call in walk_dead_letters(queue, options.function)]
    if options.json:
        for call in found:
            write_out(json.dumps(describe_call(call)))
    elif found:
        write_out(format_table([dead_letter_row(call) for call in found]))
    else:
        print("no dead letters", file=sys.stderr)


async def show_calls(queue: Queue, options: argparse.Namespace) -> None:
    """Print all that is known of the calls named."""
    for call_id in options.ids:
        write_out(json.dumps(await show_call(queue, await find_call(queue, call_id)), indent=2))


async def retry_dead_letters(queue: Queue, options: argparse.Namespace) -> None:
    """Queue the chosen dead letters again."""

    async def retry(call_id: str) -> str:
        call = await retry_dead_letter(queue, call_id)
        return "queued" if call.state is State.QUEUED else "its callback is queued"

    await _for_each(await _chosen(queue, options), retry)


async def purge_dead_letters(queue: Queue, options: argparse.Namespace) -> None:
    """Delete the chosen dead letters."""

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
    return [call.id async for call in walk_dead_letters(queue, options.function)]


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


def _id_argument(text: str) -> str:
    if not text.isascii():  # be it what Python makes of bytes that are no UTF-8
        raise argparse.ArgumentTypeError("allowed: an id of a call, which is ASCII")
    return text


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser("fworker dead", description="Dead letters of the queue that queue_url names.")
    commands = parser.add_subparsers(required=True, metavar="list|show|retry|purge")

    def add(name: str, work: Any, purpose: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(work=work)
        return command

    listing = add("list", show_list, "lists calls that were given up, and results that could not be delivered")
    listing.add_argument("--json", action="store_true", help="a JSON object a line")
    show = add("show", show_calls, "shows payload, headers, attempts and the last response, as JSON")
    show.add_argument("ids", metavar="ID", nargs="+", type=_id_argument)
    retry = add("retry", retry_dead_letters, "queues dead letters again; of an undelivered result only the delivery")
    purge = add("purge", purge_dead_letters, "deletes dead letters")
    for command in (retry, purge):
        command.add_argument("ids", metavar="ID", nargs="*", type=_id_argument)
        command.add_argument("--all", action="store_true", help="every dead letter")
    for command in (listing, retry, purge):
        command.add_argument("--function", metavar="NAME", type=_function_argument, help="only those of this function")
    return parser


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
        settings = parse_settings(QueueSettings, environ)
    except BadSettings as error:
        print(error, file=sys.stderr)
        return 2
    if isinstance(settings.queue_url, Path):
        try:
            want_queue(settings.queue_url)
        except FaashoundError as error:
            print(f"queue_url=spool:{settings.queue_url}: {error}", file=sys.stderr)
            return 1
    return asyncio.run(_carry_out(settings, options))


async def _carry_out(settings: QueueSettings, options: argparse.Namespace) -> int:
    try:
        async with contextlib.AsyncExitStack() as stack:
            queue = await open_queue(settings.queue_url, settings)
            stack.push_async_callback(queue.close)
            await options.work(queue, options)
    except BadArguments as error:
        print(error, file=sys.stderr)
        return 2
    except FaashoundError as error:
        return report_failure(error)
    return 0
