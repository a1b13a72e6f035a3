"""What strangers may send, row by row, and that nothing of it stops our programs or opens what is closed.

Each table is of one kind: bytes to a server, a crowd, names of functions, targets of callbacks, answers to our own
requests, requests that a browser makes for a page.  A row is an input that was once found to do harm, here or in a
program like ours, and what must become of it.  After every row all programs live, answer others, and have been nowhere
they may not go (`unharmed`).  To add an input, add a row.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest

from testkit.harness import InBackground, connect, crowding, http_request, read_all
from testkit.inspection import cpu_s
from testkit.system import Receiver
from tests.strangers.conftest import FLOOD_S, World

CPU_S = 1.0  # of processor time that one input may cost its server; the worst ones of old took 26 s
WATCHED_S = 1.5  # how long others are looked after while something has no end
OTHERS_S = 0.5  # within which another client is answered meanwhile, on an idle machine


HEALTH = {"gateway": "/healthz", "watchdog": "/_/health"}
SERVERS = tuple(HEALTH)


def others_are_served(world: World) -> None:
    """Fail unless both servers answer another client soon: most of the time, as each may stand still for a moment."""
    for name, path in HEALTH.items():
        answers = [http_request(world.program(name).port, "GET", path) for _ in range(5)]
        assert {answer.status for answer in answers} == {200}, f"{name}: {answers}"
        assert sorted(answer.elapsed_s for answer in answers)[2] < OTHERS_S * crowding(), name


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    """See to it that a row leaves everything as it was."""
    worker = world.gateway.worker_pid()
    yield
    assert world.gateway.process.poll() is None
    assert world.watchdog.process.poll() is None
    assert world.gateway.worker_pid() == worker
    others_are_served(world)
    assert world.gateway.request("POST", "/function/cat", b"still here").text == "still here"
    assert world.forbidden.reached == []


# Bytes to a server.

POST = b"POST /function/cat HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
REFUSED = {400}
TOO_LARGE = {400, 414, 431}

WIRE = {
    "field-of-tabs": (POST + b"X:" + b"\t" * 60_000 + b"\x01\r\n\r\n", TOO_LARGE),
    "field-of-spaces-and-tabs": (POST + b"X:" + b" \t" * 30_000 + b"\x01\r\n\r\n", TOO_LARGE),
    "field-name-without-end": (POST + b"X" * 100_000 + b" :", TOO_LARGE),
    "extension-of-spaces": (CHUNKED + b"1;" + b" " * 64_000 + b"\x01\r\nx\r\n0\r\n\r\n", TOO_LARGE),
    "extension-of-semicolons": (CHUNKED + b"1" + b";a" * 32_000 + b"\x01\r\nx\r\n0\r\n\r\n", TOO_LARGE),
    "bare-cr-in-extension": (CHUNKED + b"1;a\rb\r\nx\r\n0\r\n\r\n", REFUSED),
    "bare-cr-in-field": (POST + b"X: a\rY: b\r\n\r\n", REFUSED),
    "nul-in-field": (POST + b"X: a\0b\r\n\r\n", REFUSED),
    "space-before-colon": (POST + b"Content-Length : 1\r\n\r\nx", REFUSED),
    "length-and-chunks": (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", REFUSED),
    "two-lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxy", REFUSED),
    "length-with-sign": (POST + b"Content-Length: +1\r\n\r\nx", REFUSED),
    "coding-twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", {400, 501}),
    "chunk-size-beyond-all": (CHUNKED + b"f" * 40 + b"\r\n", TOO_LARGE),
    "chunk-size-with-sign": (CHUNKED + b"-1\r\nx\r\n0\r\n\r\n", REFUSED),
    "another-version": (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", {400, 505}),
    "ten-thousand-fields": (POST + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)) + b"\r\n", TOO_LARGE),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", REFUSED),
    "two-hosts": (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", REFUSED),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), REFUSED),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("row", WIRE)
def test_server_refuses_at_once_when_sent(world: World, server: str, row: str) -> None:
    sent, statuses = WIRE[row]
    program = world.program(server)
    before_s = cpu_s(program.pid)
    with connect(program.port) as client:
        with suppress(BrokenPipeError, ConnectionResetError):  # it had seen enough, and its answer is still to be read
            client.sendall(sent)
        answer = read_all(client)
    assert answer[:9] == b"HTTP/1.1 ", answer[:100]
    assert int(answer[9:12]) in statuses
    assert cpu_s(program.pid) - before_s < CPU_S


# A crowd, and those who never come to an end.

FLOODS = {
    "one-byte-chunks": (CHUNKED, b"1\r\nx\r\n"),
    "empty-requests": (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "fields": (POST, b"X: y\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "empty-lines": (b"", b"\r\n"),
    "extensions": (CHUNKED, b"1;a=b;c=d\r\nx\r\n"),
}


def flood(port: int, start: bytes, unit: bytes, enough: threading.Event) -> None:
    """Send `unit` again and again until it is `enough`, reading nothing."""
    end_s, piece = time.monotonic() + FLOOD_S, unit * (65536 // len(unit))
    with connect(port, timeout_s=0.2) as client, suppress(OSError):
        client.sendall(start)
        while not enough.is_set() and time.monotonic() < end_s:
            with suppress(TimeoutError):
                client.send(piece)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("row", FLOODS)
def test_others_are_served_when_one_client_sends_without_end(world: World, server: str, row: str) -> None:
    enough, start_s = threading.Event(), time.monotonic()
    flooding = InBackground(lambda: flood(world.program(server).port, *FLOODS[row], enough))
    try:
        while time.monotonic() - start_s < WATCHED_S:
            others_are_served(world)
    finally:
        enough.set()
    flooding.result()


@pytest.mark.parametrize("server", SERVERS)
def test_others_are_served_when_a_crowd_says_nothing(world: World, server: str) -> None:
    with ExitStack() as crowd:
        for _ in range(300):
            crowd.enter_context(connect(world.program(server).port))
        others_are_served(world)


# Names that a caller gives to functions.  The gateway has function_url=http://{name}:80, as ours was in all examples.

ADDRESSES_IN_DISGUISE = [
    *("2852039166", "169.254.169.254", "0xa9fea9fe", "0251.0376.0251.0376", "10.0.0.1", "167772161", "192.168.1.1"),
    *("127.0.0.1", "2130706433", "127.1", "0x7f.1", "0", "localhost", "a.localhost", "localhost.localdomain"),
    *("[::1]", "%31%30.0.0.1", "rebound", "rebound.openfaas-fn", "rebound@inner", "inner.prod"),
]


@pytest.mark.parametrize("area", ["function", "async-function"])
@pytest.mark.parametrize("name", ADDRESSES_IN_DISGUISE)
def test_gateway_reaches_no_address_when_a_name_is_one(world: World, area: str, name: str) -> None:
    answer = world.gateway.request("POST", f"/{area}/{name}/latest/meta-data/")
    assert b"secret" not in answer.body
    if answer.status == 202:  # the name as such may be a function's: it is the call that must not arrive
        ended = world.gateway.ended(answer.headers["x-call-id"])
        assert ended["state"] == "dead", ended
    else:
        assert answer.status in (400, 403, 404, 502), answer


# Where callbacks are to go.

REFUSED_TARGETS = [
    *("http://169.254.169.254/", "http://2852039166/", "http://0xa9fea9fe/", "http://0251.0376.0251.0376/"),
    *("http://[::ffff:169.254.169.254]/", "http://[::ffff:a9fe:a9fe]/", "http://[64:ff9b::a9fe:a9fe]/"),
    *("http://10.0.0.1/", "http://192.168.1.1/", "http://100.100.100.200/", "http://0/", "http://[::]/"),
    *("http://224.0.0.1/", "http://255.255.255.255/", "file:///etc/passwd", "gopher://127.0.0.1/", "//10.0.0.1/"),
    *("http://user:s3cret@169.254.169.254/", "http://169.254.169.254%2f@127.0.0.1/", "http:///x", "http://10.1/"),
]


@pytest.mark.parametrize("url", REFUSED_TARGETS)
def test_submission_is_refused_when_its_callback_may_not_go_there(world: World, url: str) -> None:
    answer = world.gateway.request("POST", "/async-function/cat", b"x", {"X-Callback-Url": url})
    assert answer.status == 400, answer
    assert "s3cret" not in answer.text


@pytest.mark.parametrize("host", ["rebound", "inner"])
def test_callback_is_not_delivered_when_its_name_leads_inside(world: World, host: str) -> None:
    answer = world.gateway.request("POST", "/async-function/cat", b"x", {"X-Callback-Url": f"http://{host}/"})
    if answer.status != 400:
        call_id = answer.headers["x-call-id"]
        world.gateway.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead")


@pytest.mark.parametrize(
    "path", ["/system/calls", "/system/calls/{}/retry", "/healthz", "/", "/function/../system/calls"]
)
def test_callback_reaches_nothing_of_the_gateway_but_functions(world: World, path: str) -> None:
    dead = world.gateway.submit("shell", b"exit 1")
    assert world.gateway.ended(dead)["state"] == "dead"
    url = f"http://127.0.0.1:{world.gateway.port}{path.format(dead)}"
    answer = world.gateway.request("POST", "/async-function/cat", b"x", {"X-Callback-Url": url})
    if answer.status != 400:
        status = world.gateway.until(
            answer.headers["x-call-id"], lambda status: status.get("callback", {}).get("state") in ("dead", "delivered")
        )
        assert status["callback"]["state"] == "dead"
    assert world.gateway.status(dead)["state"] == "dead"


def test_callback_of_others_is_delivered_when_names_do_not_resolve(world: World) -> None:
    for number in range(8):
        world.gateway.submit("cat", b"x", {"X-Callback-Url": f"http://nowhere-{number}.example/"})
    with Receiver() as receiver:
        world.gateway.submit("cat", b"x", {"X-Callback-Url": receiver.url()})
        receiver.wait_for(1, 5.0)  # a name that nobody answers for is given up after ten


# What a function elsewhere, or a receiver of callbacks, answers to us.

HEAD = b"HTTP/1.1 200 OK\r\n"
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Reply:
    """Bytes that a peer says, and what it then says again and again."""

    script: bytes
    repeat: bytes = b""


REPLIES = {
    "field-of-tabs": Reply(HEAD + b"X:" + b"\t" * 60_000 + b"\x01\r\n\r\n"),
    "extension-of-spaces": Reply(IN_CHUNKS + b"1;" + b" " * 64_000 + b"\x01\r\nx\r\n0\r\n\r\n"),
    "length-and-chunks": Reply(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "head-without-end": Reply(HEAD, b"X-Y: z\r\n" * 1000),
    "continue-without-end": Reply(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "one-byte-chunks-without-end": Reply(IN_CHUNKS, b"1\r\nx\r\n" * 1000),
    "trailers-without-end": Reply(IN_CHUNKS + b"0\r\n", b"X-Y: z\r\n" * 1000),
    "switch-nobody-asked-for": Reply(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    "noise": Reply(bytes(range(256)) * 100),
    "nothing": Reply(b""),
    "half-a-body": Reply(HEAD + b"Content-Length: 100\r\n\r\nhalf"),
}


@pytest.mark.parametrize("row", REPLIES)
def test_caller_gets_no_whole_answer_and_others_theirs_when_a_function_answers(world: World, row: str) -> None:
    world.peer.say(REPLIES[row].script, REPLIES[row].repeat)
    before_s, start_s = cpu_s(world.gateway.pid), time.monotonic()
    calling = InBackground(lambda: world.gateway.request("POST", "/function/far", b"x"))
    try:
        while not calling.done() and time.monotonic() - start_s < WATCHED_S:
            others_are_served(world)
    finally:
        world.peer.enough.set()
    with suppress(http.client.HTTPException, OSError):  # its beginning was passed on, its end was not
        assert calling.result().status in (502, 504)
    if not REPLIES[row].repeat:
        assert cpu_s(world.gateway.pid) - before_s < CPU_S


@pytest.mark.parametrize("row", REPLIES)
def test_calls_of_others_are_made_when_a_receiver_answers(world: World, row: str) -> None:
    world.peer.say(REPLIES[row].script, REPLIES[row].repeat)
    with Receiver() as receiver:
        bad = world.gateway.submit("cat", b"x", {"X-Callback-Url": f"http://127.0.0.1:{world.peer.port}/"})
        good = world.gateway.submit("cat", b"y", {"X-Callback-Url": receiver.url()})
        receiver.wait_for(1)
        world.peer.enough.set()
        assert (world.gateway.ended(good)["attempts"], world.gateway.ended(bad)["attempts"]) == (1, 1)
        world.gateway.until(bad, lambda status: status["callback"]["state"] != "pending")


# Pages in the operator's browser.  The gateway listens on loopback and asks for no password.

PAGES: Mapping[str, tuple[str, str, Mapping[str, str], int]] = {
    "rebound-name": ("GET", "/system/calls", {"Host": "rebind.example"}, 421),
    "rebound-name-deletes": ("DELETE", "/system/calls?state=dead", {"Host": "rebind.example:8080"}, 421),
    "rebound-name-invokes": ("POST", "/function/cat", {"Host": "rebind.example"}, 421),
    "foreign-origin-reads": ("GET", "/system/calls", {"Origin": "http://evil.example"}, 403),
    "foreign-origin-deletes": ("DELETE", "/system/calls?state=dead", {"Origin": "http://evil.example"}, 403),
    "foreign-origin-invokes": ("POST", "/function/cat", {"Origin": "null", "Content-Type": "text/plain"}, 403),
    "foreign-origin-submits": ("POST", "/async-function/cat", {"Origin": "http://evil.example"}, 403),
    "another-site": ("DELETE", "/system/calls?state=dead", {"Sec-Fetch-Site": "cross-site"}, 403),
}


@pytest.mark.parametrize("row", PAGES)
def test_page_of_another_site_is_refused(world: World, row: str) -> None:
    method, path, headers, status = PAGES[row]
    assert world.gateway.request(method, path, None, headers).status == status


# What a submission asks for.

SUBMISSIONS: Mapping[str, tuple[Mapping[str, str], set[int]]] = {
    "delay-of-centuries": ({"X-Delay": "2562000h"}, {400}),
    "delay-that-is-none": ({"X-Delay": "NaN"}, {400}),
    "key-too-long": ({"Idempotency-Key": "k" * 10_000}, {400}),
    "key-of-ours": ({"Idempotency-Key": " callback of 0"}, {202, 400}),
    "id-that-is-a-path": ({"X-Call-Id": "../../etc/passwd"}, {202, 400}),
}


@pytest.mark.parametrize("row", SUBMISSIONS)
def test_submission_gets_no_more_than_it_may_ask_for(world: World, row: str) -> None:
    headers, statuses = SUBMISSIONS[row]
    answer = world.gateway.request("POST", "/async-function/cat", b"x", headers)
    assert answer.status in statuses, answer
    assert "passwd" not in json.dumps(dict(answer.headers))


def test_namespace_has_no_way_out(world: World) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, pytest.raises(OSError, match="unreachable"):
        probe.connect(("192.0.2.1", 9))


def test_key_of_another_payload_shows_no_call_of_its_owner(world: World) -> None:
    key = {"Idempotency-Key": "order-1"}
    first = world.gateway.request("POST", "/async-function/cat", b"mine", key)
    assert first.status == 202
    guess = world.gateway.request("POST", "/async-function/cat", b"a guess", key)
    assert guess.status == 422
    assert first.headers["x-call-id"] not in f"{guess.headers} {guess.text}"


FORGED = {"Query": "forged", "Path": "forged", "Method": "forged", "Host-": "forged", "X_Under": "forged"}


def test_function_sees_no_variable_that_a_caller_has_forged(world: World) -> None:
    seen = world.gateway.request("POST", "/function/env", b"", FORGED | {"Proxy": "http://forged.example"}).text
    assert "Http_Method=POST" in seen
    assert [line for line in seen.splitlines() if "forged" in line and not line.startswith("Http_Host_=")] == []
