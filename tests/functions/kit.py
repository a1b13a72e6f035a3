"""What tests of local functions share: a small program in a watchdog's place, and ways to run and to ask."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

from faashound.calls.names import FunctionName, parse_function_name
from faashound.functions.local import LocalFunctions
from faashound.functions.table import Function, parse_functions
from testkit.harness import Answer, crowding, eventually, http_over

DEADLINE_S = 20.0
CAT, F = parse_function_name("cat"), parse_function_name("f")
KEPT = 'labels."com.openfaas.scale.zero" = "false"'  # started at once, and never put to rest

# Serves LISTEN_FDS and obeys the parent-death pipe as the watchdog does; otherwise it does what fprocess says.
STAND_IN = r"""
import json, os, signal, socket, sys, threading

def follow_lifeline():
    os.read(int(os.environ["FAASHOUND_LIFELINE_FD"]), 1)
    os._exit(9)

word, _, number = os.environ["fprocess"].partition(" ")
if word == "exit":
    print("refused: nothing fits", file=sys.stderr)
    sys.exit(int(number))
if word in ("deaf", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if word != "stubborn":
    threading.Thread(target=follow_lifeline, daemon=True).start()
listener = socket.socket(fileno=3)
while True:
    client, _ = listener.accept()
    listed = os.listdir("/proc/self/fd")
    fds = [int(fd) for fd in listed if os.path.exists(f"/proc/self/fd/{fd}") and int(fd) != client.fileno()]
    facts = {"pid": os.getpid(), "environ": dict(os.environ), "fds": sorted(fds), "group": os.getpgrp()}
    client.sendall(json.dumps(facts).encode())
    client.close()
"""


def parse(text: str) -> dict[FunctionName, Function]:
    return parse_functions(textwrap.dedent(text), "f.toml")


def locals_of(text: str, command: tuple[str, ...], **options: object) -> LocalFunctions:
    """Return the functions of a file whose watchdog is `command`."""
    environ: Mapping[str, str] = {"PATH": os.environ["PATH"]}
    return LocalFunctions(parse(text), **{"environ": environ, "watchdog": command} | options)  # type: ignore[arg-type]


def real(text: str) -> LocalFunctions:
    """Return the functions of a file, with our watchdog."""
    return LocalFunctions(parse(text), environ={"PATH": os.environ["PATH"]})


@contextlib.asynccontextmanager
async def running(local: LocalFunctions, grace_s: float = DEADLINE_S) -> AsyncIterator[LocalFunctions]:
    sys.audit("tests.starts_a_process")
    local.open()
    local.start()
    try:
        yield local
    finally:
        await local.stop(grace_s)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` holds; AssertionError names `what` after DEADLINE_S, which a busy machine has more of."""

    async def look() -> object:
        return condition()

    await eventually(look, DEADLINE_S, what)


async def ask(local: LocalFunctions, name: str) -> dict[str, object]:
    """Return what the stand-in tells of itself."""
    reader, writer = await asyncio.open_unix_connection(local.path(parse_function_name(name)))
    answer = json.loads(await asyncio.wait_for(reader.read(), DEADLINE_S * crowding()))
    writer.close()
    await writer.wait_closed()
    assert isinstance(answer, dict)
    return answer


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S * crowding())
        self.sock.connect(str(self._path))


def call_at(path: Path, body: bytes = b"", target: str = "/", headers: Mapping[str, str] | None = None) -> Answer:
    """Call the function behind a socket, over a connection of its own."""
    connection = UnixConnection(path)
    try:
        return http_over(connection, "POST", target, headers, body)
    finally:
        connection.close()


async def call(local: LocalFunctions, name: str, body: bytes = b"") -> Answer:
    """Call a function where it answers now."""
    return await asyncio.to_thread(call_at, local.path(parse_function_name(name)), body)


def run(test: Awaitable[None]) -> None:
    """Run a test's coroutine, within bounds."""

    async def bounded() -> None:
        await asyncio.wait_for(test, 3 * DEADLINE_S * crowding())

    asyncio.run(bounded())


@contextlib.contextmanager
def few_descriptors(count: int) -> Iterator[None]:
    """Have this process open no more than `count` descriptors besides those that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        taken: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[count:]:
            stack.callback(os.close, fd)
        for fd in taken[:count]:
            os.close(fd)
        yield


def exists(pid: int) -> bool:
    """Tell whether there is a process of this number, be it a zombie."""
    return Path(f"/proc/{pid}").exists()
