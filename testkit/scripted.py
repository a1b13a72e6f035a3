"""HTTP servers that follow a script byte by byte, for tests of our client."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, cast

from faashound.watchdog import ClientResponse, Url, parse_url
from testkit.harness import crowding

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test, which must end soon."""

    async def bounded() -> None:
        async with asyncio.timeout(20 * crowding()):
            await work

    asyncio.run(bounded())


@contextlib.asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[Url]:
    """Yield the URL of a server that hands each connection to `serve` and then closes it."""

    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.add(task := cast(asyncio.Task[None], asyncio.current_task()))
        task.add_done_callback(handlers.discard)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await serve(reader, writer)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield parse_url(f"{'https' if tls else 'http'}://localhost:{port}/")
    for task in handlers:
        task.cancel()
    await asyncio.gather(*handlers, return_exceptions=True)


async def read_head(reader: asyncio.StreamReader) -> bytes:
    """Return the head of a request."""
    return await reader.readuntil(b"\r\n\r\n")


def answering(*pieces: bytes) -> Serve:
    """Return a server that sends `pieces` one after the other in answer to each request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if b"".join(pieces).startswith(b"HTTP/1.0"):
                return

    return serve


async def body_of(response: ClientResponse) -> bytes:
    """Return the body of a response, whole."""
    async with response:
        return await response.body.read(1 << 20)
