"""mode=streaming: output is sent as it is printed, and supervision is what it is in the other modes."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator

import pytest

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
    run,
    wait_closed,
    wait_until,
)
from testkit.inspection import in_flight, is_free

LAST_CHUNK = b"0\r\n\r\n"
GONE_S = 10.0  # after a deadline or a hang-up: all is gone, which would run for a minute
DAEMON = "setsid -f sleep 60; sleep 60 & "
ENDLESS = "exec cat /dev/zero"
MIB = 1 << 20


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """A streaming watchdog with room for one call; its function is the shell that runs the body."""
    settings = {"fprocess": "sh", "mode": "streaming", "max_inflight": "1", "metrics_port": str(free_port())}
    with Program("watchdog", settings) as program:
        yield program


def request_of(script: str, headers: str = "", version: str = "1.1") -> bytes:
    head = f"POST / HTTP/{version}\r\nHost: h\r\nContent-Length: {len(script)}\r\n{headers}\r\n"
    return f"{head}{script}".encode()


def send(program: Program, script: str, headers: str = "", version: str = "1.1") -> socket.socket:
    client = connect(program.port)
    client.sendall(request_of(script, headers, version))
    return client


def wait_over(program: Program) -> None:
    """Wait until nothing is left of a call: neither its processes nor its place."""
    program.wait_idle(GONE_S)
    wait_until(lambda: is_free(program), GONE_S, "the slot is free")


def counted(program: Program, code: int) -> int:
    text = http_request(program.metrics_port, "GET", "/metrics").text
    found = re.findall(rf'^http_requests_total{{code="{code}",method="post"}} (\S+)$', text, re.MULTILINE)
    return int(float(found[0])) if found else 0


def test_client_reads_each_line_while_the_function_runs(program: Program) -> None:
    with send(program, "echo one; sleep 60") as client:
        received = read_until(client, b"one\n\r\n")
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Transfer-Encoding: chunked" in received
        assert program.functions()
    wait_over(program)


def test_line_is_with_the_client_soon_after_it_was_printed() -> None:
    settings = {"fprocess": "sh -c 'while read -r _; do date +%s%N; done'", "mode": "streaming"}
    late_s = []
    with Program("watchdog", settings) as program, connect(program.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):  # each when the one before has come: who stands still makes one late, and not all
            client.sendall(b"2\r\nx\n\r\n")
            received = b""
            while (printed := re.search(rb"(\d{19})\n\r\n$", received)) is None:
                piece = client.recv(65536)
                assert piece, received
                received += piece
            late_s.append(time.time() - int(printed[1]) / 1e9)
    assert sorted(late_s)[10] < 0.02 * crowding()


def test_answer_ends_well_when_the_process_exits_with_0(program: Program) -> None:
    (answer,) = parse(raw(program.port, request_of("echo whole", "Connection: close\r\n")))
    assert (answer.status, answer.body) == (200, b"whole\n")
    program.wait_log("Wrote 6 Bytes")


def test_connection_carries_the_next_call_when_an_answer_ended_well(program: Program) -> None:
    with connect(program.port) as client:
        for word in (b"first", b"second"):
            client.sendall(request_of(f"echo {word.decode()}"))
            assert word in read_until(client, LAST_CHUNK)


@pytest.mark.parametrize(
    ("script", "status", "body"),
    [("exit 0", 200, b""), ("exit 3", 500, b"exit status 3\n"), ("kill -9 $$", 500, b"signal: killed\n")],
    ids=["0", "3", "killed"],
)
def test_exit_status_decides_when_nothing_was_printed(program: Program, script: str, status: int, body: bytes) -> None:
    answer = http_request(program.port, "POST", body=script.encode())
    assert (answer.status, answer.body) == (status, body)


def test_deadline_decides_when_nothing_was_printed(program: Program) -> None:
    answer = http_request(program.port, "POST", headers={"X-Timeout": "200ms"}, body=b"sleep 60")
    assert (answer.status, answer.body) == (408, b"Killed process.\n")
    wait_over(program)


@pytest.mark.parametrize(("ending", "reason"), [("exit 3", "exit status 3"), ("kill -9 $$", "signal: killed")])
def test_connection_is_cut_when_the_process_ends_badly_after_output(program: Program, ending: str, reason: str) -> None:
    before = counted(program, 500)
    received = raw(program.port, request_of(f"echo half; {ending}"))
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"half\n" in received
    assert not received.endswith(LAST_CHUNK)
    wait_over(program)
    assert counted(program, 500) == before + 1
    assert "Killed process" not in program.wait_log(f"{reason} - Duration: ")


@pytest.mark.parametrize("reads", [True, False], ids=["reads", "does-not-read"])
@pytest.mark.parametrize("script", [f"{DAEMON}echo half; sleep 60", f"{DAEMON}{ENDLESS}"], ids=["silent", "endless"])
def test_deadline_cuts_the_stream_and_kills_the_tree(program: Program, script: str, reads: bool) -> None:
    start_s, limit_s = time.monotonic(), round(crowding(), 1)  # by then the answer is to have begun
    with send(program, script, f"X-Timeout: {limit_s}s\r\n") as client:
        if reads:
            assert not read_all(client).endswith(LAST_CHUNK)
        else:
            wait_closed(client, GONE_S)
        assert limit_s - TICK_S <= time.monotonic() - start_s < limit_s + GONE_S * crowding()
    wait_over(program)


@pytest.mark.parametrize("script", [f"{DAEMON}echo half; sleep 60", f"{DAEMON}{ENDLESS}"], ids=["silent", "endless"])
def test_tree_is_killed_when_the_client_hangs_up(program: Program, script: str) -> None:
    before = counted(program, 499)
    with send(program, script) as client:
        client.recv(100)
        program.wait_started(2)
    wait_over(program)
    assert counted(program, 499) == before + 1


def test_tree_is_killed_when_a_client_that_pipelined_more_than_is_read_hangs_up(program: Program) -> None:
    with send(program, "echo half; sleep 60") as client:
        read_until(client, b"half\n\r\n")
        client.sendall(request_of("echo next") * 3000)
    wait_over(program)


def test_child_left_behind_is_killed_when_the_answer_ended_well(program: Program) -> None:
    received = raw(program.port, request_of(f"{DAEMON}echo whole", "Connection: close\r\n"))
    assert received.endswith(LAST_CHUNK)
    wait_over(program)


def test_call_counts_as_in_flight_until_its_stream_ends(program: Program) -> None:
    with send(program, "echo one; sleep 60") as client:
        read_until(client, b"one\n\r\n")
        assert in_flight(program) == 1
        assert http_request(program.port, "POST", body=b"echo").status == 429
    wait_over(program)
    assert in_flight(program) == 0


def test_slow_reader_slows_the_function(program: Program) -> None:
    with send(program, f"echo $$; {ENDLESS}") as client:
        client.recv(100)
        (pid,) = program.wait_started()

        def written_bytes() -> int:
            with open(f"/proc/{pid}/io", encoding="ascii") as file:
                return int(re.findall(r"wchar: (\d+)", file.read())[0])

        def stands_still() -> bool:
            before = written_bytes()
            time.sleep(0.05)  # what is asserted is that nothing happens meanwhile
            return before == written_bytes()

        wait_until(stands_still, 5.0, "the function waits for its reader")
        assert written_bytes() < 16 * MIB
    wait_over(program)


def test_large_stream_takes_constant_memory() -> None:
    with Program("watchdog", {"fprocess": "head -c 268435456 /dev/zero", "mode": "streaming"}) as program:
        http_request(program.port, "POST")
        before = program.resident_bytes()
        assert len(http_request(program.port, "POST", timeout_s=60 * crowding()).body) == 256 * MIB
        assert program.resident_bytes() - before < 16 * MIB


def test_client_of_http_1_0_gets_the_stream_until_close(program: Program) -> None:
    received = raw(program.port, request_of("echo whole", version="1.0"))
    assert received.endswith(b"\r\n\r\nwhole\n")


def test_client_of_http_1_0_is_reset_when_the_process_ends_badly(program: Program) -> None:
    with send(program, "echo half; exit 3", version="1.0") as client:
        client.settimeout(5 * crowding())
        with pytest.raises(ConnectionResetError):
            list(iter(lambda: client.recv(65536), b""))
    wait_over(program)


def test_process_that_waited_streams_too() -> None:
    settings = {"fprocess": "sh", "mode": "streaming", "prewarm": "1", "cgi_headers": "false"}
    with Program("watchdog", settings) as program, send(program, "echo one; sleep 60") as client:
        read_until(client, b"one\n\r\n")


@pytest.mark.parametrize("ends", ["terminated", "killed"])
def test_streams_end_with_the_watchdog(ends: str) -> None:
    settings = {"fprocess": "sh", "mode": "streaming", "healthcheck_interval": "0", "write_timeout": "300ms"}
    with Program("watchdog", settings) as program, send(program, f"{DAEMON}echo half; sleep 60") as client:
        read_until(client, b"half\n\r\n")
        if ends == "terminated":
            program.terminate()
            assert not read_all(client).endswith(LAST_CHUNK)
            program.wait_exit()
        else:
            program.kill()
        wait_until(lambda: not program.survivors(), GONE_S, "functions and guard gone")


def test_unknown_mode_is_refused_at_the_start() -> None:
    ended = run("watchdog", settings={"fprocess": "cat", "mode": "banana"})
    assert ended.returncode == 2
    assert "mode='banana': allowed: serializing, streaming" in ended.stderr
