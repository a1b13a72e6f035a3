"""The client when its peer ends a connection early: what it was sent, what it has answered, what may be sent again."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from faashound import watchdog
from faashound.watchdog import (
    Body,
    Client,
    PeerGone,
    Request,
    Response,
    Server,
    ServerTimeouts,
    Unreachable,
    Url,
    parse_url,
)
from testkit.harness import crowding, eventually, read_all
from testkit.scripted import body_of

MakeLoop = Callable[[], asyncio.AbstractEventLoop]
Serve = Callable[[socket.socket], object]
MAKE_LOOPS = pytest.mark.parametrize(
    "make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


def run_on(make_loop: MakeLoop, work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20 * crowding()):
            await work

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(bounded())


def listening(family: socket.AddressFamily, path: Path) -> tuple[socket.socket, Url]:
    if family is socket.AF_INET:
        listener = socket.create_server(("127.0.0.1", 0))
        return listener, parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path / "s"))
    listener.listen()
    return listener, Url("http", str(path / "s"), 80, "/")


class Peer:
    """A server in a thread that hands each connection to `serve`, closes it then, and counts them."""

    def __init__(self, listener: socket.socket, serve: Serve) -> None:
        self.count = 0
        self.has_read, self.closed = threading.Event(), threading.Event()
        self._listener = listener
        self._serve = serve

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.count += 1
                with connection:
                    self._serve(connection)
                self.closed.set()


@contextmanager
def peer(listener: socket.socket, serve: Callable[[Peer, socket.socket], object]) -> Iterator[Peer]:
    server = Peer(listener, lambda connection: serve(server, connection))
    with ExitStack() as stack:
        stack.callback(listener.close)
        stack.callback(listener.shutdown, socket.SHUT_RDWR)
        threading.Thread(target=server.accept, daemon=True).start()
        yield server


def reads(*parts: bytes, answer: bytes = b"") -> Callable[[Peer, socket.socket], object]:
    """Return a server that reads until each of `parts` has come, answers, and closes."""

    def serve(server: Peer, connection: socket.socket) -> None:
        received = b""
        connection.settimeout(10)
        for part in parts:
            while part not in received:
                received += connection.recv(65536)
            server.has_read.set()
        connection.sendall(answer)

    return serve


async def pieces_across_the_end(server: Peer) -> AsyncGenerator[bytes, None]:
    """Yield a piece when the head was read, and the others when the connection is closed, unseen by the loop."""
    assert await asyncio.to_thread(server.has_read.wait, 10)
    yield b"first"
    assert server.closed.wait(10)
    for _ in range(5):
        yield b"other"


@MAKE_LOOPS
def test_body_of_which_a_part_is_gone_is_not_said_to_be_unsent_when_a_new_connection_is_closed_unread(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    async def test() -> None:
        async def is_taken() -> bool:
            return not body.buffered_bytes

        listener, url = listening(socket.AF_UNIX, tmp_path)
        client, body = Client(), Body(None, lambda: None)
        with listener:  # which never accepts
            body.feed(b"first")
            asking = asyncio.create_task(client.request("POST", url, (), body))
            await eventually(is_taken, 10, "the first piece sent")
        with pytest.raises(PeerGone):
            await asking
        await client.close()

    run_on(make_loop, test())


@MAKE_LOOPS
def test_streamed_post_over_a_unix_socket_is_not_said_to_be_unsent_when_its_reader_closes_without_an_answer(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    listener, url = listening(socket.AF_UNIX, tmp_path)

    async def test(server: Peer) -> None:
        client = Client()
        with pytest.raises(PeerGone):
            await client.request("POST", url, (), lambda: pieces_across_the_end(server), 30)
        await client.close()

    with peer(listener, reads(b"\r\n\r\n", b"first")) as server:
        run_on(make_loop, test(server))
    assert server.count == 1


@pytest.mark.parametrize("is_streamed", [False, True], ids=["bytes", "streamed"])
@MAKE_LOOPS
def test_post_was_not_sent_when_a_new_connection_had_ended_before_the_loop_saw_it(
    make_loop: MakeLoop, is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(watchdog.ClientConnection):
        async def exchange(self, *args: object) -> watchdog.ClientResponse:
            assert select.select([self._socket.fileno()], [], [], 10)[0]
            return await super().exchange(*args)  # type: ignore[arg-type]

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield b"whole"

    async def test() -> None:
        client = Client()
        with pytest.raises(Unreachable):
            await client.request("POST", url, (), pieces if is_streamed else b"whole", 5)
        await client.close()

    monkeypatch.setattr(watchdog, "ClientConnection", Slow)
    listener, url = listening(socket.AF_INET, tmp_path)
    with peer(listener, reads()):
        run_on(make_loop, test())


TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
UNTIL_CLOSE = b"HTTP/1.0 413 Too Large\r\n\r\nno"


@pytest.mark.parametrize("answer", [TOO_LARGE, UNTIL_CLOSE], ids=["length", "until-close"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
@MAKE_LOOPS
def test_early_answer_is_read_when_its_sender_has_closed_before_the_next_piece_is_written(
    make_loop: MakeLoop, family: socket.AddressFamily, answer: bytes, tmp_path: Path
) -> None:
    listener, url = listening(family, tmp_path)

    async def test(server: Peer) -> None:
        client = Client()
        response = await client.request("POST", url, (), lambda: pieces_across_the_end(server), 30)
        assert (response.status, await body_of(response)) == (413, b"no")
        await client.close()

    with peer(listener, reads(b"\r\n\r\n", b"first", answer=answer)) as server:
        run_on(make_loop, test(server))
    assert server.count == 1


@MAKE_LOOPS
def test_early_answer_is_read_when_its_sender_has_left_a_part_of_the_request_unread(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    """Closed so, the connection is reset behind the answer; over loopback some find it out by their own write."""

    async def large() -> AsyncGenerator[bytes, None]:
        for _ in range(200):
            yield bytes(16384)

    async def test() -> None:
        client = Client()
        for _ in range(200):
            response = await client.request("POST", url, (), large, 200 * 16384)
            assert (response.status, await body_of(response)) == (413, b"no")
        await client.close()

    listener, url = listening(socket.AF_UNIX, tmp_path)
    with peer(listener, reads(b"\r\n\r\n", answer=TOO_LARGE)):
        run_on(make_loop, test())


@MAKE_LOOPS
def test_connection_ends_with_an_early_answer_when_its_sender_takes_no_more_and_does_not_close(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    """What is left of the request would keep it open for as long as that sender likes."""

    async def large() -> AsyncGenerator[bytes, None]:
        for _ in range(1000):
            yield bytes(65536)

    def answers_and_waits(server: Peer, connection: socket.socket) -> None:
        while b"\r\n\r\n" not in connection.recv(4096):
            pass
        connection.sendall(TOO_LARGE.replace(b"Connection: close\r\n", b""))
        ended = select.poll()
        ended.register(connection, select.POLLRDHUP)
        assert ended.poll()

    async def test(server: Peer) -> None:
        client = Client()
        response = await client.request("POST", url, (), large)
        assert (response.status, await body_of(response)) == (413, b"no")
        assert await asyncio.to_thread(server.closed.wait, 10)
        await client.close()

    listener, url = listening(socket.AF_UNIX, tmp_path)
    with peer(listener, answers_and_waits) as server:
        run_on(make_loop, test(server))


@MAKE_LOOPS
def test_early_answer_without_a_length_is_not_said_to_be_whole_when_its_connection_was_reset(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    def serve(server: Peer, connection: socket.socket) -> None:
        reads(b"\r\n\r\n", b"first", answer=UNTIL_CLOSE)(server, connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def test(server: Peer) -> None:
        client = Client()
        with pytest.raises(PeerGone):
            await body_of(await client.request("POST", url, (), lambda: pieces_across_the_end(server), 30))
        await client.close()

    listener, url = listening(socket.AF_INET, tmp_path)
    with peer(listener, serve) as server:
        run_on(make_loop, test(server))


@MAKE_LOOPS
def test_request_is_answered_when_a_drain_began_before_a_byte_of_it_was_read(make_loop: MakeLoop) -> None:
    """The caller has just connected, and cannot know: to it, an end without an answer would be a failed call."""

    async def handle(request: Request) -> Response:
        return Response(200, (), b"whole")

    async def test() -> None:
        server = Server(handle, ServerTimeouts(60.0, 60.0, 60.0))
        listener = socket.create_server(("127.0.0.1", 0))
        server.listen(listener)
        with socket.create_connection(listener.getsockname()) as caller:
            while not server.connections:  # noqa: ASYNC110 - nothing announces it
                await asyncio.sleep(0)
            caller.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            server.stop_accepting()
            assert await server.drained(asyncio.get_running_loop().time() + 60)
            assert read_all(caller).endswith(b"\r\n\r\nwhole")

    run_on(make_loop, test())
