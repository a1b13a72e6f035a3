"""Run our programs as an operator does, in processes of their own, and talk to them over real sockets.

    with Program("watchdog", {"fprocess": "cat"}) as program:
        assert http(program.port, "POST", "/", body=b"hello").body == b"hello"

A `Program` starts one of our modules with an environment that holds nothing but what it is given, waits until it
listens, collects what it logs, and on leaving stops it and proves that it left no process behind: every process it
starts inherits a mark, unique to the instance, in its environment.  Nothing here sleeps for a fixed time: `wait_until`
(in an event loop `eventually`) polls a condition up to a deadline.  Every bound of time is for a machine that does
nothing else; `crowding` stretches it on one that is busy, so that a test judges our programs and not their neighbours.
`http` is an ordinary client; `raw` sends any bytes, in any pieces, and `parse` reads the responses out of what came
back.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import io
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, Self, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 15.0
REPLY_DEADLINE_S = 15.0
SOON_S = 15.0  # for what comes at once, unless the process that brings it stands still: seconds, now and then
NOISE_S = 0.6  # what a machine of two cores that runs these tests and nothing else may add to any measured time
TICK_S = 0.001  # of libuv's clock, which knows whole milliseconds only: so much before its time may a timer ring
OWN_CROWD = 1.0  # processes for each core that the tests are themselves, three at a time, and their programs
TCP_ESTABLISHED = 1
PORTS = range(10_000, 20_000)  # below those that watchdogs choose for servers, and those that the kernel gives
MARK_NAME = "HARNESS_MARK"  # not FAASHOUND_...: what is named so is not passed on to functions

_PORT_NUMBERS = itertools.count(int.from_bytes(os.urandom(2)))  # not of `random`: Hypothesis seeds that for all alike
_PASSED_ON = re.compile(r"PATH|PYTHONPATH|COVERAGE_.*|COV_CORE_.*")


def crowding() -> float:
    """Return how many processes want each core, now or over the last minute: so many times longer all may take.

    It is 1 while no process has to wait for another, as on a machine that runs these tests and nothing else.
    """
    minute, _, _, running, _ = Path("/proc/loadavg").read_text(encoding="ascii").split()
    wanting = max(float(minute), float(running.partition("/")[0]))
    return max(wanting / len(os.sched_getaffinity(0)) - OWN_CROWD, 1.0)


def noise_s() -> float:
    """Return what the machine may add to any measured time, as busy as it is."""
    return NOISE_S * crowding()


def wait_until(condition: Callable[[], T | None], deadline_s: float, what: str) -> T:
    """Return the first true value of `condition`, polled for `deadline_s` seconds; AssertionError names `what`.

    A busy machine has more time: see `crowding`.
    """
    pauses = _pauses(time.monotonic(), deadline_s, what)
    while not (value := condition()):
        time.sleep(next(pauses))
    return value


async def eventually(condition: Callable[[], Awaitable[T | None]], deadline_s: float, what: str) -> T:
    """Do as `wait_until` in a running event loop, which goes on meanwhile."""
    pauses = _pauses(time.monotonic(), deadline_s, what)
    while not (value := await condition()):  # noqa: ASYNC110 - what is waited for is not ours, and sets no event
        await asyncio.sleep(next(pauses))
    return value


def _pauses(start_s: float, deadline_s: float, what: str) -> Iterator[float]:
    """Yield how long to pause before each look but the first; AssertionError once the time is over.

    The last look begins when it is over: we may ourselves have stood still for all of it after the one before.
    """
    pause_s, is_over = 0.0002, False
    while True:
        elapsed_s = time.monotonic() - start_s
        if is_over:
            raise AssertionError(f"not within {elapsed_s:.1f} s ({deadline_s} s when the machine is idle): {what}")
        is_over = elapsed_s > deadline_s and elapsed_s > deadline_s * crowding()
        yield pause_s
        pause_s = min(pause_s * 2, 0.02)


def command_of(name: str) -> list[str]:
    """Return the argument vector that starts our program `name`."""
    return [sys.executable, "-m", f"faashound.{name}"]


def clean_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return `settings` over the few variables without which neither Python nor its coverage would run."""
    return {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)} | dict(settings)


def run(name: str, arguments: Sequence[str] = (), settings: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Run our program `name` to its end, for what never listens: --help, --version, refused settings."""
    return subprocess.run(
        [*command_of(name), *arguments],
        env=clean_environment(settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S * crowding(),
        check=False,
    )


def said(
    command: Sequence[str],
    *,
    stdin: bytes | None = None,
    deadline_s: float = 60.0,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Run a command and return what it prints; AssertionError with what it says of its failure."""
    done = subprocess.run(
        command,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        timeout=deadline_s,
        env={**environment, "DOCKER_BUILDKIT": "0"},  # BuildKit would take a plugin of the client
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr.decode(errors='replace')[-3000:]}"
    return done.stdout.decode(errors="replace")


def processes_marked(mark: str) -> set[int]:
    """Return the ids of the live processes whose environment holds `mark` (a zombie's is empty)."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:  # it ended while we looked
                continue
            if mark.encode() in environment:
                found.add(int(entry.name))
    return found


def command_line_of(pid: int) -> list[bytes]:
    """Return the words that process `pid` was started with; none once it has ended, be it a zombie."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return text.split(b"\0") if text else []


def runs_our_program(pid: int) -> bool:
    """Tell whether process `pid` runs one of our programs (or is a fork of one), or has ended."""
    words = command_line_of(pid)
    return not words or any(word.startswith(b"faashound.") or word.endswith(b"watchdog.py") for word in words)


class Program:
    """One of our programs, running.  Use as a context manager; `port` and `metrics_port` are known once entered."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, str] | None = None,
        *,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        ready_line: str = r"Listening on port: (\d+)",
    ) -> None:
        """Prepare to start program `name`; nothing runs before the context is entered.

        `prefix` goes before its command line, `pass_fds` are descriptors it inherits, `ready_line` is the regular
        expression of the log line that says that it is up, whose first group, if any, is the port.  Ports are 0 and
        metrics are off unless `settings` say otherwise, and one process serves; TMPDIR is a new directory.
        """
        self.mark = f"{MARK_NAME}={uuid.uuid4()}"
        self.temporary = Path(tempfile.mkdtemp(prefix="faashound-test-"))
        name_of_mark, _, value = self.mark.partition("=")
        fixed = {"TMPDIR": str(self.temporary), name_of_mark: value, "port": "0", "metrics_port": "0", "workers": "1"}
        self.environment = clean_environment(fixed | dict(settings or {}))
        self.port = self.metrics_port = 0
        self._argv = [*prefix, *command_of(name)]
        self._pass_fds = tuple(pass_fds)
        self._ready_line = ready_line
        self._lines: list[str] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._argv,
            env=self.environment,
            cwd=self.temporary,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            pass_fds=self._pass_fds,
        )
        try:
            assert self._process.stdout is not None
            self._collector = threading.Thread(target=self._collect, args=(self._process.stdout,), daemon=True)
            self._collector.start()
            self._wait_until_ready()
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._stop()
                wait_until(lambda: not self.survivors(), SOON_S, f"every process of {self._argv} gone")
        finally:
            self._clean_up()

    def _wait_until_ready(self) -> None:
        def said(pattern: str) -> re.Match[str] | None:
            matches = (re.search(pattern, line) for line in self.log_lines())
            found = next((match for match in matches if match), None)
            if found is None and self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode} before it listened:\n{self.log()}")
            return found

        def port_of(pattern: str) -> int:
            match = wait_until(lambda: said(pattern), START_DEADLINE_S, f"{pattern!r} in the log")
            return int(match[1]) if match.re.groups else 0

        self.port = port_of(self._ready_line)
        if self.environment["metrics_port"] != "0":
            self.metrics_port = port_of(r"Metrics on port: (\d+)")

    def _collect(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.append(line.rstrip("\n"))

    def _stop(self) -> None:
        """Stop at once, by repeated SIGTERM (two that are pending at the same time are one to the kernel)."""
        start_s = time.monotonic()
        while self.process.poll() is None:
            if time.monotonic() - start_s > STOP_DEADLINE_S * crowding():
                raise AssertionError(f"survived SIGTERM for {STOP_DEADLINE_S} s:\n{self.log()}")
            self.process.terminate()
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue

    def _clean_up(self) -> None:
        for pid in self.survivors():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)
        self._collector.join(STOP_DEADLINE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def process(self) -> subprocess.Popen[str]:
        """The running program; AssertionError before the context is entered."""
        assert self._process is not None, "enter the context first"
        return self._process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def log_lines(self) -> list[str]:
        """Return the lines it has written so far, to its log or its standard output."""
        return list(self._lines)

    def log(self) -> str:
        """Return what it has written so far as one text."""
        return "\n".join(self.log_lines())

    def wait_log(self, substring: str, deadline_s: float = SOON_S) -> str:
        """Return the first line with `substring`, waiting for it up to `deadline_s`."""
        return wait_until(
            lambda: next((line for line in self.log_lines() if substring in line), None),
            deadline_s,
            f"{substring!r} in the log:\n{self.log()}",
        )

    def survivors(self) -> set[int]:
        """Return the ids of all processes besides it that carry its mark, whatever their parent is now."""
        return processes_marked(self.mark) - {self.pid}

    def functions(self) -> set[int]:
        """Return the ids of the survivors that run something else than our own programs."""
        return {pid for pid in self.survivors() if not runs_our_program(pid)}

    def wait_started(self, count: int = 1) -> set[int]:
        """Wait until at least `count` processes of functions live; return their ids."""
        return wait_until(
            lambda: found if len(found := self.functions()) >= count else None,
            SOON_S,
            f"{count} processes of functions",
        )

    def wait_idle(self, deadline_s: float = SOON_S) -> None:
        """Wait until no process of a function lives."""
        wait_until(lambda: not self.functions(), deadline_s, "no process of a function left")

    def terminate(self) -> None:
        """Send SIGTERM, once."""
        self.process.terminate()

    def kill(self) -> None:
        """Kill it, and it alone, as a power failure would."""
        self.process.kill()
        self.process.wait(STOP_DEADLINE_S)

    def wait_exit(self, deadline_s: float = STOP_DEADLINE_S) -> int:
        """Return its exit code, waiting for it up to `deadline_s`."""
        return self.process.wait(deadline_s * crowding())

    def resident_bytes(self) -> int:
        """Return the most memory it ever had resident."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def children(self) -> list[int]:
        """Return the ids of its children, zombies among them."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text("ascii").split()]

    def descriptors(self) -> int:
        """Return how many descriptors it has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@dataclass(frozen=True)
class Answer:
    """One response, as a client sees it; header names are in lower case, the last of a repeat wins."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    elapsed_s: float = 0.0

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8", "backslashreplace")


def _answer_of(response: http.client.HTTPResponse, start_s: float) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    body = response.read()
    return Answer(response.status, response.reason, headers, body, time.monotonic() - start_s)


def http_over(
    connection: http.client.HTTPConnection,
    method: str,
    path: str = "/",
    headers: Mapping[str, str] | None = None,
    body: bytes | Iterable[bytes] | None = None,
) -> Answer:
    """Send one request over `connection`, which stays open if both sides agree, and return the response."""
    start_s = time.monotonic()
    connection.request(method, path, body, dict(headers or {}))
    return _answer_of(connection.getresponse(), start_s)


def http_request(
    port: int,
    method: str = "GET",
    path: str = "/",
    headers: Mapping[str, str] | None = None,
    body: bytes | Iterable[bytes] | None = None,
    timeout_s: float | None = None,
    host: str = "127.0.0.1",
) -> Answer:
    """Send one request over a connection of its own and return the response; no reply in time: TimeoutError."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s or REPLY_DEADLINE_S * crowding())
    try:
        return http_over(connection, method, path, headers, body)
    finally:
        connection.close()


class InBackground(Generic[T]):
    """A call in a thread of its own; `result` waits for it, and raises what it raised."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._call())
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller of result()
            self._errors.append(error)

    def done(self) -> bool:
        """Tell whether it has returned or raised."""
        return not self._thread.is_alive()

    def result(self, deadline_s: float = REPLY_DEADLINE_S) -> T:
        """Return what the call returned, or raise what it raised."""
        self._thread.join(deadline_s * crowding())
        assert not self._thread.is_alive(), f"no result within {deadline_s} s"
        if self._errors:
            raise self._errors[0]
        return self._results[0]


def connect(port: int, host: str = "127.0.0.1", timeout_s: float | None = None) -> socket.socket:
    """Return a connected socket that sends each piece at once."""
    client = socket.create_connection((host, port), timeout=timeout_s or REPLY_DEADLINE_S * crowding())
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def server_side(client: socket.socket) -> tuple[int, int] | None:
    """Return (TCP state, unread bytes) of the other end of `client`, or None if the kernel knows none any more."""
    found = inspect_server_side(client)
    return None if found is None else (found[17], struct.unpack_from("=I", found, 72)[0])


def probe_due_s(client: socket.socket) -> float | None:
    """Return in how many seconds the other end of `client` asks whether we live; None: never (SO_KEEPALIVE is off)."""
    found = inspect_server_side(client)
    is_watched = found is not None and found[18] == 2  # the timer of keepalive probes
    return struct.unpack_from("=I", found, 68)[0] / 1000 if found is not None and is_watched else None


def inspect_server_side(client: socket.socket) -> bytes | None:
    """Return what sock_diag(7) says of the other end of `client`, with its header; None if there is none any more.

    One question of sock_diag(7) about one IPv4 connection: /proc/net/tcp says the same, but takes milliseconds to
    read on a machine with thousands of connections that have lately been closed.
    """
    try:
        (host, port), (peer_host, peer_port) = client.getsockname(), client.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # reset
            raise
        return None
    ends = socket.inet_aton(peer_host), socket.inet_aton(host)
    wanted = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0xFFFFFFFF)
    wanted += struct.pack("!HH4s12x4s12x4x8s", peer_port, port, *ends, b"\xff" * 8)  # any interface, no cookie
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:  # NETLINK_SOCK_DIAG
        diag.send(struct.pack("=IHHII", 16 + len(wanted), 20, 1, 0, 0) + wanted)  # SOCK_DIAG_BY_FAMILY
        answer = diag.recv(8192)
    kind, first_word = struct.unpack_from("=H", answer, 4)[0], struct.unpack_from("=i", answer, 16)[0]
    if kind == 20:
        return answer
    if first_word != -errno.ENOENT:
        raise OSError(-first_word, "sock_diag")
    return None


def wait_read(client: socket.socket, deadline_s: float = SOON_S) -> None:
    """Wait until the server has read all that `client` sent, or has closed."""

    def is_read() -> bool:
        side = server_side(client)
        return side is None or side[1] == 0

    wait_until(is_read, deadline_s, "the server read what was sent")


def wait_closed(client: socket.socket, deadline_s: float) -> None:
    """Wait until the server has closed its end of `client`, without reading from it."""

    def is_closed() -> bool:
        side = server_side(client)
        return side is None or side[0] != TCP_ESTABLISHED

    wait_until(is_closed, deadline_s, "the server closed the connection")


def read_all(client: socket.socket, timeout_s: float | None = None) -> bytes:
    """Return all that comes until the server closes; TimeoutError if it has not closed in time."""
    end_s = time.monotonic() + (timeout_s or REPLY_DEADLINE_S * crowding())
    received = bytearray()
    while True:
        client.settimeout(max(end_s - time.monotonic(), 0.001))
        try:
            piece = client.recv(65536)
        except ConnectionResetError:
            return bytes(received)
        if not piece:
            return bytes(received)
        received += piece


def read_until(client: socket.socket, ending: bytes, timeout_s: float | None = None) -> bytes:
    """Return what comes until it ends with `ending`; AssertionError if the server closes first."""
    client.settimeout(timeout_s or REPLY_DEADLINE_S * crowding())
    received = bytearray()
    while not received.endswith(ending):
        piece = client.recv(65536)
        assert piece, f"closed after {bytes(received)!r}"
        received += piece
    return bytes(received)


def raw(port: int, pieces: bytes | Iterable[bytes], timeout_s: float | None = None) -> bytes:
    """Send `pieces`, each once the server has read the one before; return all it says until it closes.

    It must close by itself (the last request says `Connection: close`, or was refused): else TimeoutError.
    """
    pieces = [pieces] if isinstance(pieces, bytes) else list(pieces)
    with connect(port) as client:
        try:
            for index, piece in enumerate(pieces):
                client.sendall(piece)
                if index < len(pieces) - 1:
                    wait_read(client)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it refused early and closed; what it said is still to be read
        return read_all(client, timeout_s)


class _Replay(io.BytesIO):
    """Bytes that http.client takes for a socket, and that stay open after one response for the next."""

    def makefile(self, *_: object) -> Self:
        return self

    def close(self) -> None:
        pass


def parse(received: bytes, methods: Sequence[str] = ()) -> list[Answer]:
    """Return the responses in `received`; `methods` are those of the requests, where they matter (HEAD).

    Fails on anything that is not a sequence of whole responses; 100 Continue is skipped.
    """
    stream = _Replay(received)
    answers: list[Answer] = []
    while stream.tell() < len(received):
        method = methods[len(answers)] if len(answers) < len(methods) else "GET"
        response = http.client.HTTPResponse(stream, method=method)  # type: ignore[arg-type]
        response.begin()
        answers.append(_answer_of(response, time.monotonic()))
    return answers


def free_port() -> int:
    """Return a port that is free, and that the kernel does not choose for a socket bound to port 0 (ip(7)).

    Each process of tests goes through them from a place of its own: two that look at once find different ones.
    """
    for _ in PORTS:
        port = PORTS[next(_PORT_NUMBERS) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # another process has it
                continue
            return port
    raise AssertionError(f"none of {PORTS} is free")
