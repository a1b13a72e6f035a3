"""A network and a table of names of one's own, for tests of look-ups: run a function of a test in new namespaces.

    run_apart(inside_the_gateway)       # a function of a module of tests, without arguments

In there only loopback is up, /etc/hosts has HOSTS, everything else is asked of the DNS server at NAMESERVER, and one
is root.  What the function raises, the test raises, with what it wrote.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAMESERVER = "127.0.0.9"
HOSTS = "127.0.0.1 localhost\n127.0.0.1 good.test\n127.0.0.2 two.test\n127.0.0.3 two.test\n"
UNSHARE = [
    "unshare",
    *(["-Ur"] if os.geteuid() else []),
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--mount-proc",
    "--kill-child",
]
ROOT = Path(__file__).resolve().parent.parent


def run_apart(function: Callable[[], None], deadline_s: float = 60) -> None:
    """Run `function` in namespaces of its own, in a process of its own."""
    module, name = function.__module__, function.__name__
    code = f"from testkit import apart; apart.settle(); from {module} import {name}; {name}()"
    command = [*UNSHARE, sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=deadline_s)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


def settle() -> None:
    """Make the new namespaces ready."""
    lo_up()
    with tempfile.TemporaryDirectory() as directory:
        for name, text in {
            "hosts": HOSTS,
            "resolv.conf": f"nameserver {NAMESERVER}\noptions timeout:3 attempts:2\n",
            "nsswitch.conf": "hosts: files dns\n",
        }.items():
            path = Path(directory, name)
            path.write_text(text)
            subprocess.run(["mount", "--bind", path, Path("/etc", name)], check=True)


def lo_up(up: bool = True) -> None:
    """Bring the loopback interface up, or down: then it loses every packet without a word (netdevice(7))."""
    set_flags, is_up = 0x8914, 1
    with socket.socket() as sock:
        fcntl.ioctl(sock, set_flags, struct.pack("16sh14x", b"lo", is_up if up else 0))


def _first_name(question: bytes) -> str:
    labels = []
    while size := question[0]:
        labels.append(question[1 : size + 1].decode().lower())
        question = question[size + 1 :]
    return ".".join(labels)


@contextmanager
def dead_dns() -> Iterator[Counter[str]]:
    """Yield how often each name was asked for, of a DNS server that never answers."""
    asked: Counter[str] = Counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((NAMESERVER, 53))

        def listen() -> None:
            with suppress(OSError):  # closed
                while question := sock.recv(512)[12:]:
                    asked[_first_name(question)] += 1

        threading.Thread(target=listen, daemon=True).start()
        yield asked
        with suppress(OSError):  # not connected; but it wakes the thread, which gets b""
            sock.shutdown(socket.SHUT_RDWR)
