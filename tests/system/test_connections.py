"""Connections themselves: peers that vanish, connections without end, addresses, and what is left for others."""

from __future__ import annotations

import resource
import select
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from faashound.watchdog import (
    MAX_CONNECTIONS_COUNT,
    MAX_WORKERS_COUNT,
    REFUSED_AT_ONCE_COUNT,
    SILENT_S,
    WATCH_IDLE_S,
    Scoreboard,
    Slot,
    connection_limits,
    expect_stalls,
    keep_watch,
    network_of,
)
from testkit.harness import (
    REPLY_DEADLINE_S,
    TCP_ESTABLISHED,
    Program,
    connect,
    free_port,
    http_request,
    probe_due_s,
    read_all,
    read_until,
    server_side,
    wait_closed,
    wait_read,
    wait_until,
)
from testkit.system import System


@pytest.fixture(scope="module")
def cat() -> Iterator[Program]:
    with Program("watchdog", {"fprocess": "cat"}) as program:
        yield program


# Peers that are gone without a word


def test_server_asks_whether_a_client_lives_when_it_is_silent(cat: Program) -> None:
    with connect(cat.port) as client:
        due_s = probe_due_s(client)
    assert due_s is not None
    assert 0 < due_s <= WATCH_IDLE_S


def test_accepted_connection_is_watched_when_its_listening_socket_was() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        keep_watch(listener)
        with connect(listener.getsockname()[1]), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENT_S * 1000


def test_connection_outlives_a_reader_that_stalls_when_stalls_are_expected() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sender = stack.enter_context(connect(listener.getsockname()[1]))
        stack.enter_context(listener.accept()[0])  # which never reads
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
        expect_stalls(sender, True)
        sender.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sender.send(b"x" * 65536)
        poller = select.poll()
        poller.register(sender, select.POLLERR)
        assert not poller.poll(1000)  # after the second probe of the window it would be ETIMEDOUT


def test_unix_socket_is_left_alone_when_watched() -> None:
    one, other = socket.socketpair()
    with one, other:
        keep_watch(one)
        expect_stalls(one, True)


# Where we listen


@pytest.fixture
def twice_in_hosts(tmp_path: Path) -> Sequence[str]:
    """A prefix that runs a command where /etc/hosts has one address twice for the name twice.test."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.0.1 twice.test\n127.0.0.1 twice.test\n")
    prefix = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount --bind {hosts} /etc/hosts && exec "$@"',
        "sh",
    ]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs mount namespaces")
    return prefix


def test_program_listens_once_when_the_name_of_its_host_has_an_address_twice(twice_in_hosts: Sequence[str]) -> None:
    port = free_port()
    settings = {"fprocess": "cat", "host": "twice.test", "port": str(port)}
    with Program("watchdog", settings, prefix=twice_in_hosts) as program:
        assert http_request(program.port, "POST", body=b"hello").body == b"hello"


# More connections than there is room for


FEW_DESCRIPTORS = ("sh", "-c", 'ulimit -n 256 && exec "$@"', "sh")
SOFT, HARD = 300, 3000
SOFT_LIMIT = ("sh", "-c", f'ulimit -Sn {SOFT} && ulimit -Hn {HARD} && exec "$@"', "sh")
GET = b"GET /_/health HTTP/1.1\r\nHost: h\r\n\r\n"


def connect_from(host: str, port: int) -> socket.socket:
    """Return a connection from another address of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=REPLY_DEADLINE_S, source_address=(host, 0))


def is_open(client: socket.socket) -> bool:
    side = server_side(client)
    return side is not None and side[0] == TCP_ESTABLISHED


def is_readable(client: socket.socket) -> bool:
    return bool(select.select([client], (), (), 0)[0])


def descriptor_limit(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_NOFILE)


@pytest.fixture
def crowded() -> Iterator[Program]:
    """A watchdog for four connections, three of one address."""
    limits = {"max_connections": "4", "max_connections_per_address": "3"}
    with Program("watchdog", {"fprocess": "sleep 600"} | limits) as program:
        yield program


@pytest.mark.parametrize("sent", [b"", GET, GET[:-4]], ids=["silent", "answered", "half-a-head"])
def test_connection_that_waited_longest_is_closed_when_there_are_too_many(crowded: Program, sent: bytes) -> None:
    with ExitStack() as stack:
        clients = []
        for _ in range(3):
            clients.append(stack.enter_context(connect(crowded.port)))
            clients[-1].sendall(sent)
            wait_read(clients[-1])
            if sent == GET:
                read_until(clients[-1], b"OK")
        with connect(crowded.port) as fourth:
            fourth.sendall(GET)
            assert read_until(fourth, b"OK").startswith(b"HTTP/1.1 200 ")
        wait_closed(clients[0], 15.0)
        assert [is_open(client) for client in clients] == [False, True, True]


def test_connection_that_was_used_lately_stays_when_an_older_one_is_closed(crowded: Program) -> None:
    with connect(crowded.port) as first, connect(crowded.port) as second, connect(crowded.port) as third:
        for client in (first, second, third, first):
            client.sendall(GET)
            read_until(client, b"OK")
        with connect(crowded.port):
            wait_closed(second, 15.0)
        assert [is_open(client) for client in (first, third)] == [True, True]


def test_others_are_served_when_one_address_has_all_its_connections(crowded: Program) -> None:
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(crowded.port)).sendall(GET.replace(b"/_/health", b"/"))
        crowded.wait_started(3)
        answer = http_request(crowded.port, "GET", "/_/health")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "max_connections_per_address" in answer.text
        with connect_from("127.0.0.2", crowded.port) as other:
            other.sendall(GET)
            assert read_until(other, b"OK").startswith(b"HTTP/1.1 200 ")


def test_client_gets_a_503_and_the_next_is_served_when_every_connection_was_busy(crowded: Program) -> None:
    with ExitStack() as stack:
        busy = [stack.enter_context(connect_from(f"127.0.0.{2 + index}", crowded.port)) for index in range(4)]
        for client in busy:
            client.sendall(GET.replace(b"/_/health", b"/"))
        crowded.wait_started(4)
        answer = http_request(crowded.port, "GET", "/_/health")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "max_connections" in answer.text
        crowded.wait_log("connections are refused")
        busy[0].close()
        wait_until(lambda: http_request(crowded.port, "GET", "/_/health").status == 200, 15.0, "there is room again")


def test_program_serves_on_when_many_refused_clients_do_not_go(crowded: Program) -> None:
    with ExitStack() as stack:
        for index in range(4):
            client = stack.enter_context(connect_from(f"127.0.0.{2 + index}", crowded.port))
            client.sendall(GET.replace(b"/_/health", b"/"))
        crowded.wait_started(4)
        before = crowded.descriptors()
        refused = [stack.enter_context(connect(crowded.port)) for _ in range(100)]
        for client in refused:
            wait_closed(client, 15.0)
        assert crowded.descriptors() <= before + REFUSED_AT_ONCE_COUNT


@pytest.mark.parametrize("name", ["max_connections", "max_connections_per_address"])
def test_refusal_names_what_was_set_and_that_it_is_divided_when_there_are_several_workers(name: str) -> None:
    limits = {"max_connections": "100", "max_connections_per_address": "100", name: "2", "workers": "2"}
    with Program("watchdog", {"fprocess": "sleep 600"} | limits) as program, ExitStack() as stack:
        for busy_count in range(3):
            client = stack.enter_context(connect(program.port))
            client.sendall(GET.replace(b"/_/health", b"/"))
            wait_until(lambda: is_readable(client) or len(program.functions()) > busy_count, 15.0, "run or refused")  # noqa: B023
            if is_readable(client):
                break
        assert b"; allowed: 1 (%b=2, divided among 2 workers)\n" % name.encode() in read_all(client)


def test_connections_are_not_divided_when_no_number_was_set() -> None:
    one, several = (connection_limits(None, None, 1, Slot(Scoreboard(count))) for count in (1, MAX_WORKERS_COUNT))
    assert several[:2] == one[:2]
    assert several.total_count > MAX_CONNECTIONS_COUNT // MAX_WORKERS_COUNT


@pytest.mark.parametrize("sent", [b"", GET[:-4]], ids=["silent", "half-a-head"])
def test_gateway_works_when_strangers_hold_more_connections_than_it_has_descriptors(sent: bytes) -> None:
    with System(prefix=FEW_DESCRIPTORS) as system, ExitStack() as stack:
        for index in range(300):
            client = stack.enter_context(connect_from(f"127.0.0.{1 + index % 3}", system.port))
            client.sendall(sent)
        assert system.request("GET", "/healthz").status == 200
        assert system.request("POST", "/function/cat", b"hello").body == b"hello"
        assert system.ended(system.submit("cat", b"hello"))["state"] == "done"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1.2.3.4", "1.2.3.5", False),
        ("1.2.3.4", "::ffff:1.2.3.4", True),
        ("::ffff:1.2.3.4", "::ffff:1.2.3.5", False),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%1", "fe80::2%2", True),
    ],
)
def test_two_clients_count_as_one_when_they_have_one_network(one: str, other: str, same: bool) -> None:
    assert (network_of((one, 1)) == network_of((other, 2, 0, 0))) is same


def test_program_takes_all_the_descriptors_it_may_but_functions_get_the_soft_limit() -> None:
    with Program("watchdog", {"fprocess": "sh -c 'ulimit -Sn; ulimit -Hn'"}, prefix=SOFT_LIMIT) as program:
        assert descriptor_limit(program.pid) == (HARD, HARD)
        assert http_request(program.port).text.split() == [str(SOFT), str(HARD)]
