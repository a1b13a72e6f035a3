"""GET /system/logs: the lines of a function, one JSON object a line, as OpenFaaS' log providers send them.

    logs = FunctionLogs(store, functions, followers)
    response = await logs.answer(request)                    # ?name=&namespace=&since=&tail=&follow=&call=&instance=
    logs.drain()

Contract: each line is sent as soon as it is known; a client that reads slowly, or not at all, holds up no function.
Those who follow are let go when the gateway begins to drain.

What it refuses: more clients that follow than followers.py has places for (503); a function that is not there and has
left no lines (404), parameters that make no sense (422).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..calls.names import DEFAULT_NAMESPACE, BadFunctionName, FunctionName, parse_function_name
from ..functions.logs import BadLogQuery, LogLine, LogQuery, LogStore, parse_log_query
from ..functions.table import Functions
from ..watchdog import Request, Response, Stream
from .answers import NotFound, allow, parse_parameters
from .followers import Followers
from .operations import NotOffered

LOGS_OFF = "logs_keep=0, or state cannot be written to: the lines of functions are in the gateway's own log alone"


def parse_question(query: bytes) -> tuple[FunctionName, LogQuery]:
    """Return whose lines a request is for, and which of them; raises BadLogQuery with every problem."""
    parameters, problems = parse_parameters(query), list[str]()
    try:
        name = parse_function_name(parameters.get("name", ""), parameters.get("namespace", DEFAULT_NAMESPACE))
    except BadFunctionName as error:
        problems.append(f"name: {error}")
    try:
        wanted = parse_log_query(parameters)
    except BadLogQuery as error:
        problems.append(str(error))
    if problems:
        raise BadLogQuery("\n".join(problems))
    return name, wanted


class FunctionLogs:
    """Shows the lines of functions; `store` is None where none are kept."""

    def __init__(self, store: LogStore | None, functions: Functions, followers: Followers) -> None:
        self._followers = followers
        self._store = store
        self._functions = functions
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Let go of clients that follow."""
        self._draining.set()

    async def answer(self, request: Request) -> Response:
        """Answer with the lines that a query wants."""
        allow(request, "GET")
        if self._store is None:
            raise NotOffered(LOGS_OFF)
        name, query = parse_question(request.query)
        if self._functions.lookup(name) is None and not self._store.knows(name):
            raise NotFound(f"there is no function {name.short}")
        fields = ((b"Content-Type", b"application/x-ndjson"), (b"X-Content-Type-Options", b"nosniff"))
        if request.method == "HEAD":
            return Response(200, fields)
        body: Stream = self._sent(await self._store.read(name, query), name)
        if query.follow:
            body = self._followers.join(request, body)
        return Response(200, fields, body, None, math.inf, is_live=query.follow)

    async def _sent(self, found: AsyncGenerator[LogLine, None], name: FunctionName) -> AsyncGenerator[bytes, None]:
        stop = asyncio.create_task(self._draining.wait())
        try:
            async with aclosing(found) as lines:
                while True:
                    step = asyncio.ensure_future(anext(lines, None))
                    try:
                        await asyncio.wait((step, stop), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        if not step.done():  # nothing is closed that still runs
                            step.cancel()
                            await asyncio.wait((step,))
                    if step.cancelled():
                        return
                    line = step.result()
                    if line is None:
                        return
                    yield json.dumps(line.describe(name)).encode() + b"\n"
        finally:
            stop.cancel()
