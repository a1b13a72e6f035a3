"""A server that measures how long one turn of its loop takes, for tests of what one client can do to the others.

Run as a process: `python -m testkit.turns [SETTING=VALUE ...]`.  It serves our `Server` on a port that it prints.

    /healthz    200 at once
    /body       reads the body and answers with its length
    /large      a large answer
    /wait       answers never
    /fetch?N    asks a server on port N, reads its answer and passes on how it went
    /turns      the longest turn since the last such question, in milliseconds of processor time, and the memory

A turn is what happens between two calls of a function that asks to be called again in the next one, in processor time
of the loop's thread: what other processes do to this machine does not count.  Garbage is collected before the question
is answered, so that what is held is what is told.
"""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import uvloop

from faashound.watchdog import Client, PeerGone, Request, Response, Server, ServerTimeouts, Stream, parse_url

PIECE = b"x" * 65536
PIECES_COUNT = 256  # more than the kernel takes for a reader that does not read


async def large() -> AsyncIterator[bytes]:
    """Yield a large answer, as a function's output comes."""
    for _ in range(PIECES_COUNT):
        yield PIECE


class Turns:
    """Measures each turn of the running loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last_s = time.thread_time()
        self._longest_s = 0.0
        self._on_turn()

    def _on_turn(self) -> None:
        now_s = time.thread_time()
        self._longest_s = max(self._longest_s, now_s - self._last_s)
        self._last_s = now_s
        self._loop.call_soon(self._on_turn)

    def take_longest_ms(self) -> float:
        """Return the longest turn so far, and begin anew."""
        longest_s, self._longest_s = self._longest_s, 0.0
        gc.collect()
        self._last_s = time.thread_time()  # that turn was ours
        return longest_s * 1000


def resident_kb() -> int:
    """Return what this process has in memory now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4


async def fetch(client: Client, port: int) -> bytes:
    """Return the length of an answer of another server, or what was wrong with it."""
    count = 0
    try:
        async with await client.request("GET", parse_url(f"http://127.0.0.1:{port}/")) as answer:
            async for chunk in answer.body:
                count += len(chunk)
    except PeerGone as error:
        return str(error).encode()
    return b"%d" % count


async def serve() -> None:
    """Serve for ever."""
    turns, client = Turns(), Client()

    async def handle(request: Request) -> Response:
        if request.path == b"/body":
            count = 0
            async for chunk in request.body:
                count += len(chunk)
            return Response(200, (), b"%d" % count)
        if request.path == b"/large":
            return Response(200, (), cast(Stream, large()), PIECES_COUNT * len(PIECE))
        if request.path == b"/wait":
            await asyncio.Event().wait()
        if request.path == b"/fetch":
            return Response(200, (), await fetch(client, int(request.query)))
        if request.path == b"/turns":
            told = {"longest_ms": turns.take_longest_ms(), "resident_kb": resident_kb()}
            return Response(200, (), json.dumps(told).encode())
        return Response(200, (), b"OK")

    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(handle, ServerTimeouts(30.0, 30.0, 30.0))
    server.listen(listener)
    print(f"Listening on port: {listener.getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(serve())
