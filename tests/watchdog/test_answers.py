"""What a client gets when its handler fails, whatever way: an answer, or the end of its connection, and no waiting."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable

import pytest
import uvloop

from faashound.watchdog import FaashoundError, Handler, MethodNotAllowed, Request, Response, Server, ServerTimeouts
from testkit.harness import REPLY_DEADLINE_S, crowding

GET = b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
UNFINISHED_GET = GET[:-2]
NO_CHARACTER = "half of a pair: \ud800"  # as JSON can spell it, and UTF-8 cannot


def raises(error: BaseException) -> Handler:
    async def handle(request: Request) -> Response:
        raise error

    return handle


def answers(response: Response) -> Handler:
    async def handle(request: Request) -> Response:
        return response

    return handle


async def breaks_off() -> AsyncGenerator[bytes, None]:
    yield b"some"
    raise asyncio.CancelledError


def asked(server_of: Callable[[], Server], request: bytes) -> bytes:
    """Return all that comes until the server closes, after which nothing of the exchange is left to drain."""

    async def ask() -> bytes:
        server, listener = server_of(), socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        server.listen(listener)
        try:
            async with asyncio.timeout(REPLY_DEADLINE_S * crowding()):
                reader, writer = await asyncio.open_connection(*address)
                writer.write(request)
                received = b""
                try:
                    while piece := await reader.read(65536):
                        received += piece
                except ConnectionResetError:  # the end as well
                    pass
                writer.close()
                server.stop_accepting()
                assert await server.drained(asyncio.get_running_loop().time() + REPLY_DEADLINE_S * crowding())
                return received
        finally:
            server.abort()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(ask())


def got(handler: Handler, request: bytes = GET) -> bytes:
    return asked(lambda: Server(handler, ServerTimeouts(30.0, 30.0, 30.0)), request)


@pytest.mark.parametrize(
    ("handler", "status", "text"),
    [
        (raises(FaashoundError(NO_CHARACTER)), b"500", b"half of a pair: \\ud800\n"),
        (raises(MethodNotAllowed(("GET",))), b"405", b""),
        (raises(ValueError(NO_CHARACTER)), b"500", b"internal error; see the log\n"),
    ],
    ids=["text that is no UTF-8", "an error of ours", "an error of no kind"],
)
def test_client_gets_an_answer_when_its_handler_fails(handler: Handler, status: bytes, text: bytes) -> None:
    received = got(handler)
    assert received.startswith(b"HTTP/1.1 " + status)
    assert received.endswith(text)


@pytest.mark.parametrize(
    ("handler", "head"),
    [
        (raises(asyncio.CancelledError()), b""),
        (answers(Response(200, ((b"X-A", b"a\r\nb"),), b"")), b""),
        (answers(Response(200, (), breaks_off())), b"HTTP/1.1 200"),
        (answers(Response(200, (), breaks_off(), write_timeout_s=float("inf"))), b"HTTP/1.1 200"),
    ],
    ids=["cancelled by itself", "no head", "a body that is cancelled by itself", "one without a deadline"],
)
def test_connection_is_cut_when_its_answer_cannot_be_sent(handler: Handler, head: bytes) -> None:
    received = got(handler)
    assert received.startswith(head)
    assert bool(received) == bool(head)
    assert not received.endswith(b"0\r\n\r\n"), "no client may take it for whole"


def test_client_whose_request_is_refused_is_told_when_the_account_of_it_fails() -> None:
    def fail(request: Request | None, error: FaashoundError) -> None:
        raise ValueError("no account")

    received = asked(
        lambda: Server(answers(Response(200)), ServerTimeouts(0.1, 30.0, 30.0), on_refused=fail), UNFINISHED_GET
    )
    assert received.startswith(b"HTTP/1.1 408")
