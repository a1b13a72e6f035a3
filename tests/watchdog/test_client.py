"""The client driver of the HTTP core, against servers that follow a script byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import (
    Client,
    FaashoundError,
    PeerGone,
    Unreachable,
    UpstreamTimeout,
    Url,
    parse_url,
)
from testkit.harness import free_port
from testkit.scripted import HELLO, answering, body_of, read_head, run, serving

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nT: v\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.0 200 OK\r\n\r\nhello"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HELLO


@contextlib.asynccontextmanager
async def new_client() -> AsyncIterator[Client]:
    client = Client()
    try:
        yield client
    finally:
        await client.close()


@pytest.mark.parametrize("answer", [HELLO, CHUNKED, UNTIL_CLOSE, INTERIM], ids=["length", "chunks", "close", "interim"])
def test_client_reads_the_same_when_the_answer_is_cut_at_any_byte(answer: bytes) -> None:
    async def test() -> None:
        for cut in range(1, len(answer)):
            async with serving(answering(answer[:cut], answer[cut:])) as url, new_client() as client:
                response = await client.request("GET", url)
                assert (response.status, await body_of(response)) == (200, b"hello")

    run(test())


@given(st.binary(max_size=2000), st.sampled_from([True, False]))
def test_client_sends_any_body_whole_when_its_length_is_known_or_not(body: bytes, known: bool) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"chunked" in head:
            received = b""
            while size := int(await reader.readline(), 16):
                received += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            received = await reader.readexactly(len(body))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(received), received))

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 700):
            yield body[start : start + 700]

    async def test() -> None:
        async with serving(echo) as url, new_client() as client:
            response = await client.request("POST", url, (), pieces(), len(body) if known else None)
            assert await body_of(response) == body

    run(test())


def test_connection_is_used_again_when_the_answer_was_whole() -> None:
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await answering(HELLO)(reader, writer)

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            for _ in range(5):
                assert await body_of(await client.request("POST", url, body=b"")) == b"hello"
            assert len(connections) == 1

    run(test())


def test_each_caller_gets_its_own_body_when_many_share_connections() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            path = (await read_head(reader)).split(b" ")[1]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))

    async def caller(client: Client, url: Url, number: int) -> None:
        for _ in range(30):
            target = Url(url.scheme, url.host, url.port, f"/{number}")
            assert await body_of(await client.request("GET", target)) == f"/{number}".encode()

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            await asyncio.gather(*(caller(client, url, number) for number in range(20)))

    run(test())


def test_idempotent_request_is_made_again_when_a_kept_connection_turns_out_closed() -> None:
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await read_head(reader))
        writer.write(HELLO)
        heads.append(await read_head(reader))  # and close without an answer, as a server does whose patience ended

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            for _ in range(2):
                assert await body_of(await client.request("GET", url)) == b"hello"
            assert len(heads) == 3
            with pytest.raises(PeerGone):
                await client.request("POST", url, body=b"not twice")

    run(test())


def test_answer_is_read_when_it_comes_before_the_body_was_sent() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await writer.drain()
        await reader.read(1000)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(65536)

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            response = await client.request("POST", url, (), endless())
            assert (response.status, await body_of(response)) == (413, b"no")

    run(test())


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", HELLO[:-1]], ids=["nothing", "half-a-head", "half-a-body"])
def test_caller_waits_no_longer_than_its_deadline_when_the_answer_stops(sent: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(sent)
        await reader.read()

    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with serving(serve) as url, new_client() as client:
            started_s = loop.time()
            with pytest.raises(UpstreamTimeout):
                await body_of(await client.request("GET", url, deadline_s=started_s + 0.2))
            assert 0.19 <= loop.time() - started_s < 10  # of the 20 in which it must end

    run(test())


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nBad Name: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        HELLO[:-1],
        b"",
    ],
    ids=["nonsense", "length", "two-lengths", "name", "chunk", "head-too-large", "cut-short", "nothing"],
)
def test_peer_is_given_up_when_its_answer_is_none(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_head(reader)
        writer.write(answer)

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            with pytest.raises(PeerGone):
                await body_of(await client.request("POST", url, body=b""))

    run(test())


@pytest.mark.parametrize("host", ["localhost", "name.invalid"])
def test_upstream_is_unreachable_when_nobody_listens_or_the_name_is_unknown(host: str) -> None:
    async def test() -> None:
        async with new_client() as client:
            with pytest.raises(Unreachable) as raised:
                await client.request("GET", parse_url(f"http://{host}:{free_port()}/"))
            assert host in str(raised.value)
            assert raised.value.status == 502

    run(test())


def test_server_sees_the_end_when_the_caller_is_cancelled_or_leaves_the_body() -> None:
    ends: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await read_head(reader)
        if b"/begun" in head:
            writer.write(HELLO[:-1])
        with contextlib.suppress(ConnectionError):
            await reader.read()
        ends.put_nowait(head)

    async def test() -> None:
        async with serving(serve) as url, new_client() as client:
            waiting = asyncio.create_task(client.request("GET", url))
            await asyncio.sleep(0)
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done
            waiting.cancel()
            await ends.get()
            async with await client.request("GET", Url(url.scheme, url.host, url.port, "/begun")) as response:
                assert response.status == 200
            await ends.get()

    run(test())


def test_failure_of_a_body_is_the_callers_to_see_when_it_is_being_sent() -> None:
    class Broken(FaashoundError):
        status = 418

    async def broken() -> AsyncIterator[bytes]:
        yield b"begun"
        raise Broken("the body cannot be had")

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def test_silent() -> None:
        async with serving(silent) as url, new_client() as client:
            with pytest.raises(Broken):
                await client.request("POST", url, (), broken(), 10)

    run(test_silent())


def test_https_is_spoken_when_the_certificate_is_trusted_and_refused_when_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def test() -> None:
        async with serving(answering(HELLO), context) as url:
            async with new_client() as client:
                with pytest.raises(Unreachable, match=r"certificate [a-z :-]+$"):
                    await client.request("GET", url)
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
            async with new_client() as client:
                for _ in range(2):
                    assert await body_of(await client.request("GET", url)) == b"hello"

    run(test())
