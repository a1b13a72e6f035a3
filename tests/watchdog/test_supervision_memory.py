"""No body, no output and no log exhausts memory, and none is changed on its way."""

from __future__ import annotations

import hashlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from testkit.harness import (
    START_DEADLINE_S,
    STOP_DEADLINE_S,
    InBackground,
    Program,
    clean_environment,
    command_of,
    connect,
    crowding,
    free_port,
    http_request,
    noise_s,
    wait_until,
)
from testkit.inspection import serves

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30
SOON_S = 10.0  # until what follows an answer has happened
PEAK_BYTES = 64 * MIB  # what the watchdog may ever have resident
PATTERN = bytes(range(256)) * 4096 + b"prime"  # 1 MiB and 5 bytes: no buffer's size divides it
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"

SLOW = pytest.mark.timeout(180)  # a gibibyte on a busy machine


def pattern(size_bytes: int) -> Iterator[bytes]:
    """Yield `size_bytes` bytes of PATTERN over and over."""
    while size_bytes > 0:
        yield PATTERN[:size_bytes]
        size_bytes -= len(PATTERN)


def digest(pieces: Iterator[bytes]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


@cache
def digest_of_pattern(size_bytes: int) -> str:
    return digest(pattern(size_bytes))


def read_pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while piece := response.read(MIB):
        yield piece


@SLOW
@pytest.mark.parametrize("length_known", [True, False], ids=["length", "chunked"])
def test_memory_is_bounded_and_body_is_whole_when_it_is_1_gib(length_known: bool) -> None:
    size_bytes = GIB if length_known else 64 * MIB
    headers = {"Content-Length": str(size_bytes)} if length_known else {}
    with Program("watchdog", {"fprocess": "sha256sum", "read_timeout": "3m"}) as program:
        answer = http_request(program.port, "POST", "/", headers, pattern(size_bytes), timeout_s=150)
        assert answer.text.split()[0] == digest_of_pattern(size_bytes)
        assert program.resident_bytes() < PEAK_BYTES


WRITER = """
import os, sys
pattern = bytes(range(256)) * 4096 + b"prime"
left = int(sys.argv[1])
while left > 0:
    view = memoryview(pattern)[:left]
    left -= len(view)
    while view:
        view = view[os.write(1, view):]
sys.exit(int(sys.argv[2]))
"""


@SLOW
def test_memory_is_bounded_and_output_is_whole_when_it_is_1_gib(tmp_path: Path) -> None:
    script = tmp_path / "writer.py"
    script.write_text(WRITER)
    with Program("watchdog", {"fprocess": f"{sys.executable} {script} {GIB} 0", "write_timeout": "3m"}) as program:
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=150)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert (response.status, response.length) == (200, GIB)
        assert digest(read_pieces(response)) == digest_of_pattern(GIB)
        connection.close()
        assert program.resident_bytes() < PEAK_BYTES
        assert not list(program.temporary.glob("[!.]*")), "the file of the output is unlinked"


@pytest.mark.parametrize("size_bytes", [0, 1, 262_143, 262_144, 262_145, 327_680, 3 * MIB + 1])
def test_status_decides_and_output_is_whole_when_it_is_just_below_or_above_the_bound(
    writer: Program, size_bytes: int
) -> None:
    for code in (0, 7):
        answer = http_request(writer.port, "POST", body=b"%d %d" % (size_bytes, code))
        assert answer.status == (500 if code else 200)
        assert answer.body == (b"exit status 7\n" if code else b"") + b"".join(pattern(size_bytes))


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A watchdog whose function writes as much, and exits with what, the request says: `<bytes> <code>`."""
    script = tmp_path_factory.mktemp("writer") / "writer.py"
    script.write_text(WRITER)
    with Program("watchdog", {"fprocess": f"sh -c 'read s c; exec {sys.executable} -SEI {script} $s $c'"}) as program:
        yield program


def test_memory_is_bounded_when_twenty_calls_write_20_mb_each(writer: Program) -> None:
    calls = [InBackground(lambda: http_request(writer.port, "POST", body=b"20000000 0")) for _ in range(20)]
    assert {len(call.result(60).body) for call in calls} == {20_000_000}
    assert writer.resident_bytes() < PEAK_BYTES


def test_memory_is_bounded_when_body_and_output_flow_at_once() -> None:
    size_bytes = 200 * MIB
    headers = {"Content-Length": str(size_bytes)}
    with Program("watchdog", {"fprocess": "cat"}) as program:
        answer = http_request(program.port, "POST", "/", headers, pattern(size_bytes), timeout_s=60)
        assert hashlib.sha256(answer.body).hexdigest() == digest_of_pattern(size_bytes)
        assert program.resident_bytes() < PEAK_BYTES


def test_memory_is_bounded_when_the_function_does_not_read_and_the_client_does_not_stop() -> None:
    settings = {"fprocess": "sleep 60", "exec_timeout": "1s"}
    with Program("watchdog", settings) as program, connect(program.port) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % GIB)
        received = InBackground(lambda: client.recv(65536))
        try:
            for piece in pattern(GIB):
                client.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert received.result().startswith(b"HTTP/1.1 408 ")
        assert program.resident_bytes() < PEAK_BYTES


def test_memory_is_bounded_when_the_request_is_marshalled() -> None:
    size_bytes = 100 * MIB
    settings = {"fprocess": "wc -c", "marshal_request": "true"}
    with Program("watchdog", settings) as program:
        headers = {"Content-Length": str(size_bytes)}
        answer = http_request(program.port, "POST", "/", headers, pattern(size_bytes), timeout_s=60)
        assert int(answer.text) > size_bytes * 4 // 3
        assert program.resident_bytes() < PEAK_BYTES


def test_answer_is_500_with_the_reason_when_the_disk_does_not_take_the_output() -> None:
    # A limit on the size of files stands for a full disk: the write fails in the same place.
    limited = ["/bin/sh", "-c", 'ulimit -f 2000; exec "$@"', "sh"]
    with Program("watchdog", {"fprocess": "sh"}, prefix=limited) as program:
        assert serves(program.port)  # the first connection opens what all others share
        descriptors = program.descriptors()
        answer = http_request(program.port, "POST", body=b"setsid -f sleep 60; exec cat /dev/zero")
        assert answer.status == 500
        assert "could not be kept" in answer.text
        program.wait_idle(SOON_S)
        assert http_request(program.port, "POST", body=b"echo on").text == "on\n"
        wait_until(lambda: program.descriptors() <= descriptors + 1, SOON_S, "the file closed")


# The log.


FLOODS = {
    "short-lines": b"yes line | head -c 5000000 >&2",
    "empty-lines": b"yes '' | head -c 1000000 >&2",
    "no-lines": b"head -c 20000000 /dev/zero >&2",
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_others_are_answered_and_memory_is_bounded_when_a_function_floods_the_log(flood: bytes) -> None:
    settings = {"fprocess": "sh", "combine_output": "false"}
    with Program("watchdog", settings) as program, Program("watchdog", settings) as quiet:
        # A million lines take a busy machine its time; the promise is about the others.
        flooding = InBackground(lambda: http_request(program.port, "POST", body=flood + b"; echo done", timeout_s=60))
        program.wait_log("stderr: ")
        ports = (program.port, quiet.port)  # in turns: what the second one takes longer is the machine's doing
        pairs = [[http_request(port, "POST", body=b"echo on").elapsed_s for port in ports] for _ in range(20)]
        elapsed_s, machine_s = (sorted(each) for each in zip(*pairs, strict=True))
        assert elapsed_s[10] < 0.1 * crowding()
        assert elapsed_s[-2] < noise_s() + machine_s[-1]  # who stands still once makes one of them late
        assert elapsed_s[-1] < SOON_S * crowding()
        answer = flooding.result(60)
        assert (answer.status, answer.text) == (200, "done\n")
        assert program.resident_bytes() < PEAK_BYTES


def test_calls_are_answered_and_memory_is_bounded_when_nobody_reads_the_log() -> None:
    """As when the terminal is stopped (Ctrl-S), or the collector of a container's log hangs."""
    with Program("watchdog", {"fprocess": "true"}) as other:
        port = free_port()
        settings = {"fprocess": "sh", "combine_output": "false", "port": str(port), "suppress_lock": "true"}
        environment = clean_environment(other.environment | settings)
        with subprocess.Popen(command_of("watchdog"), env=environment, stderr=subprocess.PIPE) as process:
            try:
                wait_until(lambda: serves(port), START_DEADLINE_S, "it serves")
                flood = http_request(port, "POST", body=b"yes line | head -c 5000000 >&2; echo done")
                assert (flood.status, flood.text) == (200, "done\n")
                answers = [http_request(port, "POST", body=b"echo a line >&2; echo on") for _ in range(30)]
                assert {answer.text for answer in answers} == {"on\n"}
                status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                peak_kib = int(status.partition("VmHWM:")[2].split()[0])
                assert peak_kib * 1024 < PEAK_BYTES
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM)
                assert process.wait(STOP_DEADLINE_S * crowding()) in (0, 1), (
                    "it ends although its last lines cannot be written"
                )
            finally:
                process.kill()


@pytest.mark.parametrize("length", [0, 1, 8191, 8192, 8193, 65_535, 65_536, 300_000])
@pytest.mark.parametrize("ending", ["newline", "none"])
def test_line_is_whole_in_the_log_when_it_has_any_length(stderr: Program, length: int, ending: str) -> None:
    before = len(stderr.log_lines())
    script = f"printf '<%s>{'' if ending == 'none' else chr(92) + 'n'}' $(head -c {length} /dev/zero | tr '\\0' x) >&2"
    assert http_request(stderr.port, "POST", body=script.encode()).status == 200
    wait_until(lambda: any(">" in line for line in stderr.log_lines()[before:]), 5.0, "the end of the line")
    pieces = [line for line in stderr.log_lines()[before:] if set(line) <= set("<x>") and line]
    assert "".join(pieces) == f"<{'x' * length}>"
    assert max(map(len, pieces)) <= 8192


@pytest.fixture(scope="module")
def stderr() -> Iterator[Program]:
    """A watchdog whose function's stderr goes to the log as it is."""
    settings = {"fprocess": "sh", "combine_output": "false", "prefix_logs": "false"}
    with Program("watchdog", settings) as program:
        yield program


@SLOW
def test_nothing_has_grown_when_calls_ended_well_timed_out_and_were_abandoned_1500_times() -> None:
    """The whole soak is `python -m bench.soak --calls 10000`; this is the same, shorter."""
    command = [sys.executable, "-m", "bench.soak", "--calls", "1500"]
    start_s = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"after {time.monotonic() - start_s:.0f} s:\n{result.stdout}{result.stderr}"
