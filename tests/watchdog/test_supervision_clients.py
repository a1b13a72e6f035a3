"""A call ends with its client, and no client, however slow or rude, harms another."""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testkit.harness import (
    TICK_S,
    Program,
    connect,
    crowding,
    free_port,
    http_request,
    parse,
    raw,
    read_all,
    read_until,
    server_side,
    wait_closed,
    wait_read,
    wait_until,
)
from testkit.inspection import in_flight, is_free, serves

GONE_S = 10.0  # after a hang-up: the tree is gone and the slot is free, which would take a minute
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"
TREE = "sh -c 'setsid -f sleep 60; sleep 60 & sleep 60; echo never'"
Leave = Callable[[socket.socket], None]
LARGE_BYTES = 5_000_000  # more than all buffers between a client and a function hold


@pytest.fixture(scope="module")
def stuck() -> Iterator[Program]:
    """A watchdog with room for one call; its function never reads, starts a daemon and hangs."""
    with Program("watchdog", {"fprocess": TREE, "max_inflight": "1", "metrics_port": str(free_port())}) as program:
        yield program


def send_what_fits(client: socket.socket, data: bytes) -> bytes:
    """Send as much of `data` as the other side takes within a while of its last byte taken; return the rest."""
    client.settimeout(0.3)
    with suppress(TimeoutError):
        while data:
            data = data[client.send(data) :]
    return data


def close(client: socket.socket) -> None:
    """Close as a client does that loses its patience; with unread input the kernel sends RST all the same."""
    client.close()


def reset(client: socket.socket) -> None:
    """Close with RST instead of FIN, as a crashed client's kernel or an impatient proxy does."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


REQUESTS = {
    "no-body": HEAD + b"\r\n",
    "whole-body": HEAD + b"Content-Length: 4\r\n\r\nbody",
    "half-body": HEAD + b"Content-Length: 8\r\n\r\nhalf",
    "half-chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "waits-for-100": HEAD + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n",
    "pipelined": HEAD + b"\r\n" + HEAD + b"\r\n",
    "body-that-nobody-reads": HEAD + b"Content-Length: 800000\r\n\r\n" + bytes(800_000),
    "half-a-body-that-nobody-reads": HEAD + b"Content-Length: 1600000\r\n\r\n" + bytes(800_000),
    "pipelined-until-reading-stops": (HEAD + b"\r\n") * 3_500,  # what is not read fits into the kernel, with the FIN
}
# What the kernels do not hold keeps a FIN behind it, so only a reset can tell of this client's end.
LARGE_REQUESTS = {
    "large-body-that-nobody-reads": HEAD + b"Content-Length: %d\r\n\r\n" % LARGE_BYTES + bytes(LARGE_BYTES),
    "pipelined-for-ever": (HEAD + b"\r\n") * 200_000,
}
DEPARTURES = {
    **{f"{name}-{leave.__name__}": (request, leave) for name, request in REQUESTS.items() for leave in (close, reset)},
    **{f"{name}-reset": (request, reset) for name, request in LARGE_REQUESTS.items()},
}


@pytest.mark.parametrize(("request_bytes", "leave"), DEPARTURES.values(), ids=DEPARTURES)
def test_tree_is_gone_and_slot_is_free_when_client_leaves(stuck: Program, request_bytes: bytes, leave: Leave) -> None:
    client = connect(stuck.port)
    rest = send_what_fits(client, request_bytes)
    stuck.wait_started(3)
    assert not is_free(stuck)

    def reads_no_more() -> bool:
        nonlocal rest
        rest = send_what_fits(client, rest)  # it may have stood still before, and not be full yet
        return (server_side(client) or (0, 0))[1] > 0

    if len(request_bytes) > 100_000:
        wait_until(reads_no_more, 10.0, "it reads no more")
    leave(client)
    try:
        wait_until(lambda: is_free(stuck) and not stuck.functions(), GONE_S, "tree gone, slot free")
        assert in_flight(stuck) == 0
    finally:
        for pid in stuck.functions():
            os.kill(pid, signal.SIGKILL)


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(sorted(REQUESTS)[:6]), st.booleans()), min_size=1, max_size=8
    )
)
def test_nothing_is_left_when_clients_leave_at_any_moment(shell: Program, clients: list[tuple[int, str, bool]]) -> None:
    """Each client is (milliseconds until it leaves, what it sends, whether it resets): often before a process runs."""

    def visit(visitor: tuple[int, str, bool]) -> None:
        delay_ms, name, resets = visitor
        with connect(shell.port) as client:
            client.sendall(REQUESTS[name].replace(b"body", b"cat\n"))
            client.settimeout(delay_ms / 1000 + 0.001)
            with suppress(TimeoutError):
                client.recv(65536)
            if resets:
                reset(client)

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(visit, clients))
    shell.wait_idle(GONE_S)


def test_nothing_is_left_when_twenty_clients_leave_after_50_ms(stuck: Program) -> None:
    with Program("watchdog", {"fprocess": "sh -c 'sleep 60 & sleep 60'"}) as program:
        clients = [connect(program.port) for _ in range(20)]
        for client in clients:
            client.sendall(HEAD + b"\r\n")
        program.wait_started(40)
        for client in clients:
            client.close()
        program.wait_idle(GONE_S)


def test_next_call_runs_when_the_client_of_the_only_slot_left() -> None:
    with Program("watchdog", {"fprocess": "sh", "max_inflight": "1"}) as program:
        for _ in range(5):
            with connect(program.port) as client:
                client.sendall(HEAD + b"Content-Length: 9\r\n\r\nsleep 60\n")
                program.wait_started()
            answer = wait_until(lambda: taken(program), GONE_S, "the next call is taken")
            assert answer == "next\n"


def taken(program: Program) -> str | None:
    answer = http_request(program.port, "POST", body=b"echo next")
    return answer.text if answer.status == 200 else None


def test_pipelined_request_does_not_run_when_its_client_has_left(shell: Program) -> None:
    trace = shell.temporary / "ran"
    bodies = [b"exec sleep 60", b"touch %b" % bytes(trace)]
    with connect(shell.port) as client:
        client.sendall(b"".join(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body) for body in bodies))
        shell.wait_started()
    shell.wait_idle(GONE_S)
    assert http_request(shell.port, "POST", body=b"echo after").text == "after\n"
    assert not trace.exists()


# What a function does with its input.


@pytest.mark.parametrize("length_known", [True, False], ids=["length", "chunked"])
@pytest.mark.parametrize(
    ("script", "status", "text"),
    [
        ("echo done", 200, "done\n"),
        ("head -c 10 | wc -c", 200, "10\n"),
        ("exec <&-; sleep 0.2; echo done", 200, "done\n"),
        ("head -c 500000 >/dev/null; sleep 0.3; wc -c", 200, f"{LARGE_BYTES - 500_000}\n"),
        ("exit 4", 500, "exit status 4\n"),
        ("exec kill -9 $$", 500, "signal: killed\n"),
    ],
    ids=["never-reads", "reads-a-little", "closes-it", "reads-slowly", "fails", "is-killed"],
)
def test_answer_counts_when_function_reads_as_it_likes(script: str, status: int, text: str, length_known: bool) -> None:
    body = bytes(LARGE_BYTES) if length_known else (bytes(100_000) for _ in range(LARGE_BYTES // 100_000))
    with Program("watchdog", {"fprocess": f"sh -c '{script}'"}) as program:
        with suppress(BrokenPipeError):  # it answers early, lingers 2 s, and then a client that only sends is cut
            answer = http_request(program.port, "POST", body=body)
            assert (answer.status, answer.text) == (status, text)
        program.wait_idle(GONE_S)
        assert http_request(program.port, "POST", body=b"").status == status


# max_body


@pytest.mark.parametrize(("size_bytes", "status"), [(0, 200), (1000, 200), (1001, 413), (LARGE_BYTES, 413)])
@pytest.mark.parametrize("length_known", [True, False], ids=["length", "chunked"])
def test_answer_is_413_and_nothing_is_left_when_body_is_above_max_body(
    small: Program, size_bytes: int, status: int, length_known: bool
) -> None:
    body = bytes(size_bytes)
    framing, framed = (
        (b"Content-Length: %d" % size_bytes, body) if length_known else (b"Transfer-Encoding: chunked", chunked(body))
    )
    received = raw(small.port, [HEAD + b"Connection: close\r\n" + framing + b"\r\n\r\n", framed])
    (answer,) = parse(received)
    assert answer.status == status
    small.wait_idle(GONE_S)
    if status == 413:
        assert "1000" in answer.text
        assert answer.headers["connection"] == "close"


@pytest.fixture(scope="module")
def small() -> Iterator[Program]:
    """A watchdog that takes bodies of 1000 bytes, with a function that hangs on larger ones."""
    with Program("watchdog", {"fprocess": "sh -c 'test $(wc -c) -le 1000 || sleep 60'", "max_body": "1000"}) as program:
        yield program


def chunked(body: bytes) -> bytes:
    chunks = [body[start : start + 50_000] for start in range(0, len(body), 50_000)]
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


def test_client_that_asks_first_sends_nothing_when_body_is_above_max_body(small: Program) -> None:
    received = raw(small.port, HEAD + b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n")
    assert [answer.status for answer in parse(received)] == [413]
    assert b"100 Continue" not in received


# Slow and many.


READ_S = 3 * crowding()  # a client of a busy machine is not always as quick as it could be


@pytest.fixture(scope="module")
def large() -> Iterator[Program]:
    """A watchdog whose answers are larger than all buffers, and which gives a client READ_S to read one."""
    limits = {"write_timeout": f"{READ_S:.1f}s", "read_timeout": f"{READ_S:.1f}s", "max_inflight": "2"}
    with Program("watchdog", {"fprocess": "head -c 20000000 /dev/zero"} | limits) as program:
        yield program


@pytest.mark.parametrize("leave", [None, close, reset])
def test_nothing_of_an_answer_is_held_when_nobody_reads_it(large: Program, leave: Leave | None) -> None:
    assert serves(large.port)  # the first connection opens what all others share
    descriptors = large.descriptors()
    clients = [connect(large.port) for _ in range(2)]
    for client in clients:
        client.sendall(HEAD + b"\r\n")
        assert client.recv(1) == b"H"
    for client in clients:
        if leave is None:
            wait_closed(client, READ_S + GONE_S)
        (leave or close)(client)
    wait_until(lambda: large.descriptors() <= descriptors and is_free(large), GONE_S, "all given back")
    assert len(http_request(large.port, "POST").body) == 20_000_000


def test_call_is_killed_when_its_large_body_is_cut_short(cat: Program) -> None:
    assert len(http_request(cat.port, "POST", body=bytes(LARGE_BYTES)).body) == LARGE_BYTES
    descriptors = cat.descriptors()
    with connect(cat.port) as client:
        client.sendall(HEAD + b"Content-Length: 6000000\r\n\r\n" + bytes(LARGE_BYTES))
        cat.wait_started()
    cat.wait_idle(GONE_S)
    wait_until(lambda: cat.descriptors() <= descriptors, GONE_S, "all given back")


def test_answers_do_not_mix_when_readers_leave_in_the_middle_and_others_come() -> None:
    scripts = [b"yes %d | head -c 6000000" % number for number in range(6)]

    def read(number: int) -> bytes:
        if number % 2:
            return http_request(program.port, "POST", body=scripts[number]).body
        with connect(program.port) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(scripts[number]), scripts[number]))
            return client.recv(1)

    with Program("watchdog", {"fprocess": "sh"}) as program, ThreadPoolExecutor(6) as crowd:
        for _ in range(5):
            for number, body in enumerate(crowd.map(read, range(6))):
                assert body == (b"%d\n" % number * 3_000_000 if number % 2 else b"H")


def test_good_request_is_quick_when_a_thousand_connections_idle(cat: Program) -> None:
    with ExitStack() as crowd:
        allow_files(4096)
        for index in range(1000):
            client = crowd.enter_context(connect(cat.port))
            if index % 2:
                client.sendall(HEAD + b"X-Half: ")
        answers = [http_request(cat.port, "POST", body=b"good") for _ in range(20)]
        assert {answer.text for answer in answers} == {"good"}
        assert sorted(answer.elapsed_s for answer in answers)[10] < 0.1 * crowding()
    wait_until(lambda: cat.descriptors() < 100, GONE_S, "the connections given up")


def allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count, hard)), hard))


def test_tree_is_gone_when_the_rest_of_a_body_does_not_come() -> None:
    limit_s = round(2 * crowding(), 1)  # the tree is to have grown by then
    settings = {"fprocess": TREE, "read_timeout": f"{limit_s}s"}
    with Program("watchdog", settings) as program, connect(program.port) as client:
        start_s = time.monotonic()
        client.sendall(HEAD + b"Content-Length: 8\r\n\r\nhalf")
        program.wait_started(3)
        assert parse(read_all(client))[0].status == 408
        assert limit_s - TICK_S <= time.monotonic() - start_s <= limit_s + GONE_S * crowding()
        program.wait_idle(GONE_S)


def test_tree_is_gone_when_the_rest_of_a_body_is_broken(stuck: Program) -> None:
    with connect(stuck.port) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        stuck.wait_started(3)
        client.sendall(b"nonsense\r\n")
        assert parse(read_all(client))[0].status == 400
        wait_until(lambda: is_free(stuck) and not stuck.functions(), GONE_S, "tree gone, slot free")


def test_answers_come_in_order_and_whole_when_pipelined_requests_end_in_any_way(shell: Program) -> None:
    scripts = [b"sleep 0.2; echo one", b"exit 2", b"setsid -f sleep 60; echo three", b"kill $$", b"echo five"]
    limited = HEAD + b"X-Timeout: 100ms\r\nContent-Length: 8\r\n\r\nsleep 60"
    requests = [HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(script), script) for script in scripts]
    with connect(shell.port) as client:
        client.sendall(requests[0] + limited + b"".join(requests[1:]))
        answers = parse(read_until(client, b"five\n"))
    assert [answer.status for answer in answers] == [200, 408, 500, 200, 500, 200]
    assert [answer.text.split("\n")[0] for answer in answers] == [
        "one",
        "Killed process.",
        "exit status 2",
        "three",
        "signal: terminated",
        "five",
    ]
    shell.wait_idle(GONE_S)


def test_others_are_answered_when_a_client_sends_a_byte_at_a_time(shell: Program) -> None:
    with connect(shell.port) as client:
        for byte in HEAD + b"Content-Length: 9\r\n\r\necho slow":
            client.sendall(bytes([byte]))
            wait_read(client)
            assert http_request(shell.port, "GET", "/_/health").status == 200
        assert parse(read_until(client, b"slow\n"))[0].status == 200
