"""The client's connections: which address it reaches, when a request is sent again, and peers that are gone."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trustme
import uvloop

from faashound import watchdog
from faashound.network.addresses import AddressRefused, guard_functions
from faashound.watchdog import (
    ATTEMPT_DELAY_S,
    ATTEMPT_TIMEOUT_S,
    SILENT_S,
    WATCH_IDLE_S,
    Address,
    Client,
    OutOfResources,
    PeerGone,
    SentBody,
    Unreachable,
    Url,
    parse_url,
    take_turns,
)
from testkit.apart import lo_up, run_apart
from testkit.harness import free_port, probe_due_s
from testkit.scripted import HELLO, answering, body_of, read_head, run, serving

MakeLoop = Callable[[], asyncio.AbstractEventLoop]
V4, V6 = socket.AF_INET, socket.AF_INET6
MAKE_LOOPS = pytest.mark.parametrize(
    "make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


# --- Addresses -------------------------------------------------------------------------------------------------


@contextmanager
def silent(host: str, port: int) -> Iterator[None]:
    """Have `port` of `host` answer no connection, as if that machine were down: its queue of new ones is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        yield


@asynccontextmanager
async def client_of(*addresses: str) -> AsyncIterator[Client]:
    """Yield a client for which every name leads to `addresses`."""

    async def resolve(_: Url) -> Sequence[Address]:
        return [(V6 if ":" in address else V4, address) for address in addresses]

    client = Client(resolve)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Return what a server on localhost needs for a certificate that we trust."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("dead_count", [1, 3])
def test_client_reaches_the_last_address_when_those_before_it_are_silent(
    dead_count: int, scheme: str, tls: ssl.SSLContext
) -> None:
    dead = [f"127.0.0.{number}" for number in range(2, 2 + dead_count)]

    async def test() -> None:
        async with serving(answering(HELLO), tls if scheme == "https" else None) as url:
            with ExitStack() as stack:
                for host in dead:
                    stack.enter_context(silent(host, url.port))
                async with client_of(*dead, "127.0.0.1") as client:
                    started_s = time.monotonic()
                    assert await body_of(await client.request("GET", url)) == b"hello"
                    took_s = time.monotonic() - started_s
        assert dead_count * ATTEMPT_DELAY_S <= took_s < ATTEMPT_TIMEOUT_S  # which the first alone would take

    run(test())


def test_client_goes_on_at_once_when_an_address_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    delay_s = 4.0  # longer than a busy machine takes
    monkeypatch.setattr(watchdog, "ATTEMPT_DELAY_S", delay_s)

    async def test() -> None:
        async with serving(answering(HELLO)) as url, client_of("127.0.0.2", "::1", "127.0.0.1") as client:
            started_s = time.monotonic()
            assert await body_of(await client.request("GET", url)) == b"hello"
            assert time.monotonic() - started_s < 2 * delay_s  # which two silent ones would take

    run(test())


def test_client_goes_on_when_the_first_address_speaks_no_tls(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "ATTEMPT_TIMEOUT_S", 0.5)

    async def test() -> None:
        async with serving(answering(HELLO), tls) as url, client_of("127.0.0.2", "127.0.0.1") as client:
            with socket.create_server(("127.0.0.2", url.port)):  # connected by the kernel, and no more than that
                assert await body_of(await client.request("GET", url)) == b"hello"

    run(test())


def test_client_names_each_address_and_its_reason_when_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ATTEMPT_TIMEOUT_S", 0.5)

    async def test() -> None:
        port = free_port()
        with silent("127.0.0.2", port):
            async with client_of("127.0.0.2", "127.0.0.3") as client:
                with pytest.raises(Unreachable) as caught:
                    await client.request("GET", parse_url(f"http://two.test:{port}/"))
        text = str(caught.value)
        assert text.startswith(f"cannot connect to two.test:{port}: ")
        assert "127.0.0.2: no answer within 500ms" in text
        assert "127.0.0.3: Connection refused" in text

    run(test())


@MAKE_LOOPS
def test_client_leaves_no_connection_behind_when_one_has_won(
    make_loop: MakeLoop,
) -> None:
    async def test() -> None:
        async with serving(answering(HELLO)) as url, client_of("127.0.0.2", "127.0.0.1") as client:
            with silent("127.0.0.2", url.port):
                before = len(os.listdir("/proc/self/fd"))
                assert await body_of(await client.request("GET", url)) == b"hello"
                await client.close()
                async with asyncio.timeout(20):
                    while len(os.listdir("/proc/self/fd")) > before:  # noqa: ASYNC110 - the kernel's list
                        await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(test())


def test_client_connects_only_where_its_guard_allows() -> None:
    async def lookup(_: Url) -> Sequence[Address]:
        return [(V4, "127.0.0.1"), (V4, "169.254.169.254")]

    async def test() -> None:
        accepted = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.append(writer)
            await answering(HELLO)(reader, writer)

        async with serving(serve) as url:
            client = Client(guard_functions(lookup))
            with pytest.raises(AddressRefused, match=r"127\.0\.0\.1 is loopback"):
                await client.request("GET", url)
            assert accepted == []

    run(test())


A, B, C, D = (V6, "2001:db8::1"), (V6, "2001:db8::2"), (V4, "192.0.2.1"), (V4, "192.0.2.2")


@pytest.mark.parametrize(
    ("found", "order"),
    [
        ([], []),
        ([A], [A]),
        ([A, B, C, D], [A, C, B, D]),
        ([C, D, A], [C, A, D]),
        ([A, A, C], [A, C]),
        ([C, D], [C, D]),
    ],
    ids=["none", "one", "even", "uneven", "repeated", "one-family"],
)
def test_families_take_turns(found: list[Address], order: list[Address]) -> None:
    assert take_turns(found) == order


def test_client_follows_no_redirect() -> None:
    moved = b"HTTP/1.1 307 Moved\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"

    async def test() -> None:
        async with serving(answering(moved)) as url, client_of("127.0.0.1") as client:
            response = await client.request("GET", url)
            assert (response.status, response.header(b"location")) == (307, b"/elsewhere")
            await body_of(response)

    run(test())


# --- Kept connections ------------------------------------------------------------------------------------------


End = Callable[[socket.socket], object]


class OnceServer:
    """A server in a thread that answers one request of each connection; the second, if it comes, meets `end`."""

    def __init__(self, end: End, tls: ssl.SSLContext | None = None, path: Path | None = None) -> None:
        self.bodies: list[bytes] = []
        self._end = end
        self._tls = tls
        if path is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.url = parse_url(f"{'https' if tls else 'http'}://localhost:{self._listener.getsockname()[1]}/")
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.url = Url("http", str(path), 80, "/")

    def __enter__(self) -> OnceServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self._listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_side=True)
        with connection, suppress(ConnectionError):
            received = b""
            while not received.endswith((b"0\r\n\r\n" if b"chunked" in received else b"\r\n\r\n", b"whole")):
                received += connection.recv(65536)
            self.bodies.append(received.partition(b"\r\n\r\n")[2])
            connection.sendall(HELLO)
            self._end(connection)


def reads_and_closes(connection: socket.socket) -> None:
    connection.recv(65536)


def reads_a_part_and_closes(connection: socket.socket) -> None:
    connection.recv(1)


def answers_in_part(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200")


async def pieces() -> AsyncGenerator[bytes, None]:
    yield b"wh"
    yield b"ole"


SENT_AGAIN: dict[str, tuple[End, str, SentBody | None]] = {
    "GET": (reads_and_closes, "GET", b""),
    "HEAD": (reads_and_closes, "HEAD", b""),
    "DELETE": (reads_and_closes, "DELETE", b""),
    "PUT of bytes": (reads_and_closes, "PUT", b"whole"),
    "PUT that can be opened": (reads_and_closes, "PUT", pieces),
    "PUT of which a part was read": (reads_a_part_and_closes, "PUT", b"whole"),
}
NOT_SENT_AGAIN: dict[str, tuple[End, str, SentBody | None]] = {
    "POST": (reads_and_closes, "POST", b"whole"),
    "PATCH": (reads_and_closes, "PATCH", b"whole"),
    "POST of which a part was read": (reads_a_part_and_closes, "POST", b"whole"),
    "PUT that is gone": (reads_and_closes, "PUT", None),
    "GET that is answered in part": (answers_in_part, "GET", b""),
}


class Events:
    """When a connection is to be closed, and that it is."""

    def __init__(self) -> None:
        self.close_now, self.closed = threading.Event(), threading.Event()

    def close(self) -> None:
        """Have it closed.  The loop stands still meanwhile, and does not see that."""
        self.close_now.set()
        assert self.closed.wait(20)


def closes_when_told(events: Events) -> End:
    def end(connection: socket.socket) -> None:
        events.close_now.wait(20)
        connection.close()
        events.closed.set()

    return end


async def send_twice(
    server: OnceServer, method: str, body: SentBody | None, between: Callable[[], None] = lambda: None
) -> bytes:
    """Send two requests, the second on the connection of the first; return the second's answer."""
    client = Client()
    try:
        await body_of(await client.request("GET", server.url))
        between()
        response = await client.request(method, server.url, (), pieces() if body is None else body)
        return b"hello" if method == "HEAD" else await body_of(response)
    finally:
        await client.close()


@pytest.mark.parametrize(("end", "method", "body"), SENT_AGAIN.values(), ids=SENT_AGAIN)
def test_client_sends_again_what_a_closed_connection_left_unanswered(end: End, method: str, body: SentBody) -> None:
    with OnceServer(end) as server:
        assert asyncio.run(send_twice(server, method, body)) == b"hello"
    assert len(server.bodies) == 2


@pytest.mark.parametrize(("end", "method", "body"), NOT_SENT_AGAIN.values(), ids=NOT_SENT_AGAIN)
def test_client_does_not_send_again_what_may_have_been_done(end: End, method: str, body: SentBody | None) -> None:
    with OnceServer(end) as server, pytest.raises(PeerGone):
        asyncio.run(send_twice(server, method, body))
    assert len(server.bodies) == 1


def test_client_sends_once_when_a_new_connection_is_closed_without_an_answer() -> None:
    heads = []

    async def serve(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        heads.append(await read_head(reader))

    async def test() -> None:
        async with serving(serve) as url, client_of("127.0.0.1") as client:
            with pytest.raises(PeerGone):
                await client.request("GET", url)

    run(test())
    assert len(heads) == 1


@pytest.mark.parametrize("body", [b"whole", pieces, None], ids=["bytes", "opened", "once"])
@pytest.mark.parametrize("scheme", ["http", "https"])
@MAKE_LOOPS
def test_post_is_not_lost_when_its_kept_connection_was_closed_before(
    make_loop: MakeLoop, scheme: str, body: SentBody | None, tls: ssl.SSLContext
) -> None:
    events = Events()
    server = OnceServer(closes_when_told(events), tls if scheme == "https" else None)
    with server, asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(send_twice(server, "POST", body, events.close)) == b"hello"
    assert [b"ole" in body for body in server.bodies] == [False, True]


def waits_and_closes_unread(connection: socket.socket) -> None:
    select.select([connection], [], [])


@pytest.mark.parametrize("is_closed_before", [True, False])
@MAKE_LOOPS
def test_post_over_a_unix_socket_is_sent_again_when_its_kept_connection_was_closed_unread(
    make_loop: MakeLoop, is_closed_before: bool, tmp_path: Path
) -> None:
    events = Events()
    end, between = (closes_when_told(events), events.close) if is_closed_before else (waits_and_closes_unread, None)
    with OnceServer(end, path=tmp_path / "s") as server, asyncio.Runner(loop_factory=make_loop) as runner:
        assert runner.run(send_twice(server, "POST", b"whole", between or (lambda: None))) == b"hello"
    assert server.bodies == [b"", b"whole"]


@pytest.mark.parametrize(
    ("end", "error"),
    [(waits_and_closes_unread, Unreachable), (reads_and_closes, PeerGone)],
)
@MAKE_LOOPS
def test_post_over_a_unix_socket_was_not_sent_when_a_new_connection_is_closed_unread(
    make_loop: MakeLoop, end: End, error: type[Exception], tmp_path: Path
) -> None:
    async def post() -> None:
        client = Client()
        with pytest.raises(error):
            await client.request("POST", Url("http", str(tmp_path / "s"), 80, "/"), (), b"whole")
        await client.close()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            end(connection)

    with socket.socket(socket.AF_UNIX) as listener, asyncio.Runner(loop_factory=make_loop) as runner:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        runner.run(post())


@MAKE_LOOPS
def test_post_over_a_unix_socket_was_not_sent_when_its_connection_is_closed_as_soon_as_it_is_there(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    """Before or after the client has begun to write: of many, some meet each."""

    async def post_often() -> list[watchdog.ClientResponse | BaseException]:
        client, url = Client(), Url("http", str(tmp_path / "s"), 80, "/")
        posts = (client.request("POST", url, (), b"whole", deadline_s=time.monotonic() + 20) for _ in range(500))
        found = await asyncio.gather(*posts, return_exceptions=True)
        await client.close()
        return found

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.socket(socket.AF_UNIX) as listener, asyncio.Runner(loop_factory=make_loop) as runner:
        listener.bind(str(tmp_path / "s"))
        listener.listen(500)
        threading.Thread(target=serve, args=[listener], daemon=True).start()
        found = runner.run(post_often())
        listener.shutdown(socket.SHUT_RDWR)
    assert [type(each) for each in found] == [Unreachable] * 500


def test_body_is_closed_each_time_that_it_was_opened() -> None:
    opened, closed = [], []

    async def body() -> AsyncGenerator[bytes, None]:
        opened.append(1)
        try:
            yield b"whole"
        finally:
            closed.append(1)

    with OnceServer(reads_and_closes) as server:
        assert asyncio.run(send_twice(server, "PUT", body)) == b"hello"
    assert (len(opened), len(closed)) == (2, 2)


@pytest.mark.parametrize("scheme", ["http", "https"])
@MAKE_LOOPS
def test_streamed_bodies_arrive_one_after_the_other(make_loop: MakeLoop, scheme: str, tls: ssl.SSLContext) -> None:
    async def large() -> AsyncGenerator[bytes, None]:
        yield b"a"
        yield bytes(1 << 20)

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_head(reader)
            await reader.readexactly(1 + (1 << 20))
            writer.write(HELLO)

    async def test() -> None:
        async with serving(count, tls if scheme == "https" else None) as url, asyncio.timeout(15):
            client = Client()
            for _ in range(4):
                assert await body_of(await client.request("POST", url, (), large, 1 + (1 << 20))) == b"hello"
            await client.close()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(test())


# --- Peers that are gone without a word ------------------------------------------------------------------------


def test_client_asks_whether_its_peer_lives_when_that_is_silent() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            client = Client()
            url = parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
            waiting = asyncio.create_task(client.request("GET", url))
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            with accepted:
                await asyncio.get_running_loop().sock_recv(accepted, 65536)
                due_s = probe_due_s(accepted)
                waiting.cancel()
                await asyncio.wait([waiting])
            assert due_s is not None
            assert 0 < due_s <= WATCH_IDLE_S

    run(test())


def inside_vanished_peer() -> None:
    """A request that was taken, and one that cannot be delivered on a kept connection: both ends know nothing of it."""

    async def test() -> None:
        async with serving(answer_first) as url:
            for method in ("GET", "POST"):
                client = Client()
                await body_of(await client.request("GET", url))
                if method == "GET":
                    waiting = asyncio.create_task(client.request("POST", url, (), b"taken"))
                    await taken.wait()
                    lo_up(False)
                else:
                    lo_up(False)
                    waiting = asyncio.create_task(client.request("POST", url, (), b"lost"))
                started_s = time.monotonic()
                with pytest.raises((PeerGone, Unreachable)):
                    await waiting
                assert time.monotonic() - started_s < 15
                lo_up()
                await client.close()

    taken = asyncio.Event()

    async def answer_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(HELLO)
        await read_head(reader)
        taken.set()
        await asyncio.Event().wait()

    watchdog.WATCH_IDLE_S = watchdog.WATCH_EVERY_S = watchdog.WATCH_COUNT = 1
    watchdog.SILENT_S = 2
    uvloop.run(test())


def test_client_learns_that_its_peer_is_gone_when_the_network_loses_everything() -> None:
    run_apart(inside_vanished_peer)


@pytest.mark.parametrize(
    ("body", "expected_s"), [(b"x", SILENT_S), (bytes(1 << 17), 0), (pieces, 0)], ids=["small", "large", "unknown"]
)
def test_client_lets_a_peer_stall_when_its_body_may_fill_the_window(body: SentBody, expected_s: int) -> None:
    found = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"chunked" in head:
            await reader.readuntil(b"0\r\n\r\n")
        else:
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0))
        writer.write(HELLO)
        await serve(reader, writer)

    class Watching(watchdog.ClientConnection):
        async def exchange(self, *args: object) -> watchdog.ClientResponse:
            response = await super().exchange(*args)  # type: ignore[arg-type]
            found.append(self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) // 1000)
            return response

    async def test() -> None:
        async with serving(serve) as url, client_of("127.0.0.1") as client:
            for sent in (body, b""):
                await body_of(await client.request("POST", url, (), sent))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "ClientConnection", Watching)
        run(test())
    assert found == [expected_s, SILENT_S]


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Leave this process so many descriptors for as long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    with ExitStack() as stack:
        while (filler := os.dup(0)) < highest:
            stack.callback(os.close, filler)
        stack.callback(os.close, filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (filler + 1 + count, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        yield


def answer_one(listener: socket.socket) -> None:
    """Answer the first request of a connection that waits, and close it."""
    listener.settimeout(20)  # or a failure would last for ever
    client, _ = listener.accept()
    with client:
        client.settimeout(20)
        client.recv(65536)
        client.sendall(HELLO)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@MAKE_LOOPS
def test_client_uses_its_connection_or_says_why_it_has_none_when_few_descriptors_are_left(
    make_loop: MakeLoop, count: int
) -> None:
    async def test(listener: socket.socket) -> None:
        url = parse_url(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        async with client_of("127.0.0.1") as client, asyncio.timeout(20):
            with descriptors_left(count):
                asking = asyncio.create_task(client.request("GET", url))
                while not asking.done() and not select.select([listener], [], [], 0)[0]:  # noqa: ASYNC110 - the kernel
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)  # connected: the transport says so in this turn
            if asking.done():
                assert isinstance(asking.exception(), OutOfResources)
                return
            answered = asyncio.create_task(asyncio.to_thread(answer_one, listener))
            assert await body_of(await asking) == b"hello"
            await answered

    with socket.create_server(("127.0.0.1", 0)) as listener, asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(test(listener))
