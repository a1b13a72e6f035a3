"""Connections themselves: peers that vanish, connections without end, addresses, and what is left for others."""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from faashound.watchdog import SILENT_S, WATCH_IDLE_S, expect_stalls, keep_watch
from tests.harness import Program, connect, free_port, http_request, probe_due_s


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
