"""A world of its own for hostile inputs: a network namespace with our programs in it, and what they must not reach.

    world.gateway     a gateway with its local functions and a worker beside it, on 127.0.0.1
    world.watchdog    a watchdog that stands alone
    world.forbidden   listens on addresses that no call and no callback may reach, and remembers who came
    names             `rebound` and `inner` lead to forbidden addresses; for others a server is asked that never answers

The process that runs the tests enters the namespace for as long as this folder's tests last; what it starts meanwhile
is in it too.  Nothing here can leave the machine: the namespace has a loopback interface and no other.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import pytest

from testkit.harness import START_DEADLINE_S, Program
from testkit.needed import want_root
from testkit.system import FUNCTIONS, System

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8913, 0x8914, 0x8916, 0x1  # linux/sockios.h, net/if.h
FORBIDDEN = ("169.254.169.254", "10.0.0.1", "192.168.1.1", "100.100.100.200")  # metadata services, private networks
FLOOD_S = 60.0  # of sending what has no end, at the most: until the test has seen enough
NAME_SERVER = "127.0.0.53"
NAMES = "127.0.0.1 localhost\n169.254.169.254 rebound\n10.0.0.1 inner\n"  # of /etc/hosts
WITH_NAMES = 'mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/resolv.conf" /etc/resolv.conf && exec "$@"'

REMOTE = """
[far]
url = "http://127.0.0.1:{port}"
"""


@contextmanager
def network_of_its_own() -> Iterator[None]:
    """Put this thread, and all that it starts, into a new network namespace whose loopback interface is up."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            pytest.skip(f"no network namespace can be had here: {os.strerror(ctypes.get_errno())}")
        try:
            set_up_loopback()
            yield
        finally:
            libc.setns(before, CLONE_NEWNET)
    finally:
        os.close(before)


def set_up_loopback() -> None:
    """Bring `lo` up and give it the forbidden addresses, so that who goes there arrives somewhere."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:

        def ask(request: int, label: str, argument: bytes) -> bytes:
            return fcntl.ioctl(control, request, struct.pack("16s24s", label.encode(), argument))

        (flags,) = struct.unpack_from("h", ask(SIOCGIFFLAGS, "lo", b""), 16)
        ask(SIOCSIFFLAGS, "lo", struct.pack("h", flags | IFF_UP))
        for number, address in enumerate(FORBIDDEN, 1):
            ask(SIOCSIFADDR, f"lo:{number}", struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(address)))


class Forbidden:
    """Listens on a port of every address but ours, and remembers the addresses that were connected to."""

    def __init__(self, port: int) -> None:
        self.reached: list[str] = []
        self._listeners = [socket.create_server((address, port)) for address in FORBIDDEN]
        self._threads = [threading.Thread(target=self._accept, args=(each,), daemon=True) for each in self._listeners]
        for thread in self._threads:
            thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                client, _ = listener.accept()
                self.reached.append(client.getsockname()[0])
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsecret\n")
                client.close()

    def close(self) -> None:
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()


class Peer:
    """A server that says its script to whoever connects, once it has read something, and then that it has no more."""

    def __init__(self) -> None:
        self.script: bytes = b""
        self.repeat: bytes = b""  # said again and again behind it, until `enough` or the other side has had enough
        self.enough = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.settimeout(30)
            client.recv(65536)
            client.sendall(self.script)
            end_s = time.monotonic() + FLOOD_S
            while self.repeat and not self.enough.is_set() and time.monotonic() < end_s:
                client.sendall(self.repeat)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass

    def say(self, script: bytes, repeat: bytes) -> None:
        """Say this from now on."""
        self.script, self.repeat = script, repeat
        self.enough.clear()

    def close(self) -> None:
        self.enough.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@dataclass(frozen=True)
class World:
    """All that there is in the namespace."""

    gateway: System
    watchdog: Program
    forbidden: Forbidden
    peer: Peer

    def program(self, name: str) -> Program:
        """Return one of our programs that takes connections."""
        return {"gateway": self.gateway, "watchdog": self.watchdog}[name]


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """The namespace, with a name server that takes every question and never answers."""
    want_root("making a network namespace")
    with network_of_its_own(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind((NAME_SERVER, 53))
        yield


@pytest.fixture(scope="module")
def world(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Our programs, running; started once for all tests of this file, which is a part of what they show."""
    etc = tmp_path_factory.mktemp("etc")
    (etc / "hosts").write_text(NAMES)
    (etc / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
    prefix = ["unshare", "--mount", "sh", "-c", WITH_NAMES, str(etc)]
    with ExitStack() as stack:
        peer = Peer()
        stack.callback(peer.close)
        gateway = System(
            FUNCTIONS + REMOTE.format(port=peer.port),
            {"function_url": "http://{name}:80", "callback_retry_attempts": "1", "max_retry_attempts": "1"},
            prefix=prefix,
        )
        forbidden = Forbidden(80)
        stack.callback(forbidden.close)
        stack.enter_context(gateway)
        watchdog = stack.enter_context(Program("watchdog", {"fprocess": "cat"}, prefix=prefix))
        gateway.wait_log("Draining", START_DEADLINE_S)
        yield World(gateway, watchdog, forbidden, peer)
