"""mode=http: the function is a server, started once; requests are passed on, and it is watched over."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.sync.client import connect as connect_websocket

from faashound.watchdog import SERVER_GRACE_S
from testkit import app_server, websocket_echo
from testkit.harness import (
    TICK_S,
    Answer,
    InBackground,
    Program,
    connect,
    crowding,
    free_port,
    http_request,
    noise_s,
    parse,
    raw,
    read_all,
    read_until,
    run,
    wait_until,
)
from testkit.inspection import in_flight, is_free, state_of

SERVER = f"{sys.executable} -S -E -I {app_server.__file__}"
SETTINGS = {"fprocess": SERVER, "mode": "http", "upstream_url": "http://127.0.0.1:$PORT", "healthcheck_interval": "0"}
LAST_CHUNK = b"0\r\n\r\n"
MIB = 1 << 20
SOON_S = 10.0  # until what follows an answer or a signal has happened


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    """A watchdog with room for two calls, whose server takes connections."""
    with Program("watchdog", {**SETTINGS, "max_inflight": "2", "metrics_port": str(free_port())}) as program:
        wait_healthy(program)
        yield program


def health(program: Program) -> Answer:
    return http_request(program.port, "GET", "/_/health")


def wait_healthy(program: Program) -> None:
    wait_until(lambda: health(program).status == 200, 10.0, f"the server takes connections:\n{program.log()}")


def get(program: Program, path: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http_request(program.port, "GET", path, headers=named)


def echo(program: Program, method: str = "GET", path: str = "/echo", body: Any = None, **headers: str) -> Any:
    return json.loads(http_request(program.port, method, path, headers, body).body)


def server_pid(program: Program) -> int:
    return int(get(program, "/pid").text)


def request_of(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n{headers}\r\n".encode()


# What the server sees.


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_server_gets_any_method_target_and_host_as_they_came(program: Program, method: str) -> None:
    seen = echo(program, method, "/a%20b//c/..%2Fd?x=%31&y", Host="example.org:99", X_A="b")
    assert (seen["method"], seen["target"]) == (method, "/a%20b//c/..%2Fd?x=%31&y")
    assert [value for name, value in seen["headers"] if name.lower() == "host"] == ["example.org:99"]


@pytest.mark.parametrize(
    ("target", "seen"),
    [("*", "*"), ("http://other:8/a?b", "/a?b"), ("http://other", "/"), ("/?", "/?"), ("/a?b?c", "/a?b?c")],
)
def test_server_gets_the_target_in_the_form_for_origin_servers(program: Program, target: str, seen: str) -> None:
    request = f"OPTIONS {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    (answer,) = parse(raw(program.port, request.encode()))
    assert json.loads(answer.body)["target"] == seen


def test_server_gets_no_fields_of_the_hop(program: Program) -> None:
    seen = echo(program, Connection="X-B", X_B="c", TE="trailers")
    assert not {"X-B", "Connection", "TE"} & {name for name, _ in seen["headers"]}


@pytest.mark.parametrize(
    ("body", "length"), [(b"hello", 5), (bytes(3 * MIB), 3 * MIB), (iter([b"a" * 9, b"b" * MIB]), 9 + MIB)]
)
def test_server_gets_the_body_whole(program: Program, body: Any, length: int) -> None:
    assert echo(program, "POST", body=body)["length"] == length


def test_head_is_answered_without_a_body(program: Program) -> None:
    answer = http_request(program.port, "HEAD", "/pid")
    assert (answer.status, answer.body, int(answer.headers["content-length"]) > 0) == (200, b"", True)


def test_head_is_told_no_length_that_the_server_has_not_told(program: Program) -> None:
    answer = http_request(program.port, "HEAD", "/stream")
    assert (answer.status, answer.headers.get("content-length")) == (200, None)
    assert answer.headers["transfer-encoding"] == "chunked"
    program.wait_log("status=200 method=HEAD path=/stream")


def test_answer_has_the_one_date_of_the_server(program: Program) -> None:
    received = raw(program.port, b"GET /dated HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
    assert re.findall(rb"(?i)^date: (.*)\r$", received, re.MULTILINE) == [app_server.DATE.encode()]


@pytest.mark.parametrize("status", [204, 302, 304, 404, 500, 503])
def test_status_is_the_servers(program: Program, status: int) -> None:
    assert get(program, f"/status/{status}").status == status


def test_answer_has_its_duration(program: Program) -> None:
    answer = get(program, "/pid")
    assert 0 < float(answer.headers["x-duration-seconds"]) <= answer.elapsed_s


def test_path_of_the_upstream_is_a_prefix() -> None:
    with Program("watchdog", {**SETTINGS, "upstream_url": "http://127.0.0.1:0/pre/fix/"}) as program:
        wait_healthy(program)
        assert echo(program, path="/echo?x")["target"] == "/pre/fix/echo?x"


@pytest.mark.parametrize(
    "path", ["/%2e%2e/admin", "/a/..%2f../admin", "/..;/admin", "/../admin?x", "/.", "http://h/.."]
)
def test_path_that_would_lead_out_of_the_upstreams_is_a_400(path: str) -> None:
    with Program("watchdog", {**SETTINGS, "upstream_url": "http://127.0.0.1:0/pre/fix"}) as program:
        wait_healthy(program)
        (answer,) = parse(raw(program.port, request_of(path, "Connection: close\r\n")))
        assert (answer.status, "dot segments" in answer.text) == (400, True)
        assert echo(program, path="/a.b/..c?/../")["target"] == "/pre/fix/a.b/..c?/../"


def test_many_requests_have_one_process(program: Program) -> None:
    assert len({server_pid(program) for _ in range(5)}) == 1
    assert len(program.functions()) == 1


def test_several_workers_have_one_server() -> None:
    with Program("watchdog", {**SETTINGS, "workers": "3"}, ready_line=r"Listening on port: (\d+)") as program:
        wait_healthy(program)
        assert len({server_pid(program) for _ in range(12)}) == 1
        program.terminate()
        assert program.wait_exit() == 0
        wait_until(lambda: not program.survivors(), SOON_S, "nothing left")


def test_body_is_sent_with_its_length_when_it_is_buffered() -> None:
    with Program("watchdog", {**SETTINGS, "http_buffer_req_body": "true"}) as program:
        wait_healthy(program)
        for size in (5, 3 * MIB):
            seen = echo(program, "POST", body=iter([bytes(size - 1), b"x"]))
            assert (seen["length"], dict(seen["headers"])["Content-Length"]) == (size, str(size))


def test_body_above_the_limit_is_refused() -> None:
    with Program("watchdog", {**SETTINGS, "max_body": "10"}) as program:
        wait_healthy(program)
        assert http_request(program.port, "POST", "/echo", body=b"a" * 11).status == 413
        assert http_request(program.port, "POST", "/echo", body=iter([b"a" * 11])).status == 413
        assert echo(program, "POST", body=b"a" * 10)["length"] == 10


def test_answer_in_two_writes_is_not_held_up(program: Program) -> None:
    took_s = [get(program, "/pid").elapsed_s for _ in range(21)]
    assert sorted(took_s)[10] < 0.02 * crowding()


# Streams, and how they end.


def test_stream_comes_as_it_is_sent_while_the_body_still_comes(program: Program) -> None:
    with connect(program.port) as client:
        client.sendall(b"POST /stream HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"text/event-stream" in read_until(client, b"begin\n\r\n")
        for word in (b"one", b"two"):
            client.sendall(b"3\r\n" + word + b"\r\n")
            assert read_until(client, word + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        read_until(client, LAST_CHUNK)


def test_call_counts_as_in_flight_until_its_stream_ends(program: Program) -> None:
    with connect(program.port) as one, connect(program.port) as two:
        for client in (one, two):
            client.sendall(request_of("/half"))
            read_until(client, b"half\n\r\n")
        assert in_flight(program) == 2
        assert get(program, "/pid").status == 429
    wait_until(lambda: is_free(program), SOON_S, "the slots are free")


def test_server_learns_that_the_client_has_gone(program: Program) -> None:
    told = "the other end has gone"
    before = program.log().count(told)
    with connect(program.port) as client:
        client.sendall(request_of("/half"))
        read_until(client, b"half\n\r\n")
    wait_until(lambda: program.log().count(told) > before, SOON_S, "it has heard of it")
    wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def test_answer_is_cut_when_the_servers_breaks_off(program: Program) -> None:
    received = raw(program.port, request_of("/cut"))
    assert b"half\n" in received
    assert not received.endswith(LAST_CHUNK)


def test_slow_reader_holds_up_the_server_and_not_the_memory() -> None:
    with Program("watchdog", SETTINGS) as program:
        wait_healthy(program)
        get(program, "/zeros/1000000")
        before = program.resident_bytes()
        with connect(program.port) as client:
            client.sendall(request_of(f"/zeros/{256 * MIB}", "Connection: close\r\n"))
            time.sleep(0.3)  # a reader that reads nothing for a while
            assert len(read_all(client, 60 * crowding())) > 256 * MIB
        assert program.resident_bytes() - before < 16 * MIB


# Limits and failures.


def is_ours(answer: Answer) -> bool:
    return answer.headers.get("x-openfaas-internal") == "of-watchdog"


def test_limit_of_the_caller_is_a_504(program: Program) -> None:
    answer = get(program, "/hang", X_Timeout="200ms")
    assert (answer.status, is_ours(answer)) == (504, True)
    assert float(answer.headers["x-duration-seconds"]) >= 0.2
    assert answer.elapsed_s < 0.2 + SOON_S * crowding()


def test_limit_cuts_a_stream(program: Program) -> None:
    limit_s = min(round(2 * crowding(), 1), 20.0)  # by then the answer is to have begun; write_timeout is 30 s
    start_s = time.monotonic()
    received = raw(program.port, request_of("/half", f"X-Timeout: {limit_s}s\r\n"))
    assert b"half\n" in received
    assert not received.endswith(LAST_CHUNK)
    assert limit_s - TICK_S <= time.monotonic() - start_s < limit_s + SOON_S * crowding()


def test_exec_timeout_is_a_504_and_the_server_lives_on() -> None:
    with Program("watchdog", {**SETTINGS, "exec_timeout": f"{2 * crowding():.1f}s"}) as program:
        wait_healthy(program)
        pid = server_pid(program)
        assert get(program, "/hang", X_Timeout="60s").status == 504
        assert server_pid(program) == pid


HALF_A_BODY = "POST /echo HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{}Content-Length: 4\r\n\r\nab"


def test_exec_timeout_begins_after_the_body_when_that_is_buffered() -> None:
    limits = {"exec_timeout": f"{2 * crowding():.1f}s", "read_timeout": "10m", "metrics_port": str(free_port())}
    with Program("watchdog", {**SETTINGS, **limits, "http_buffer_req_body": "true"}) as program:
        wait_healthy(program)
        with connect(program.port) as client:
            client.sendall(HALF_A_BODY.format("").encode())
            wait_until(lambda: in_flight(program) == 1, SOON_S, "the call has begun")
            assert get(program, "/hang").status == 504  # begun later, and at its limit
            client.sendall(b"cd")
            (answer,) = parse(read_all(client))
        assert (answer.status, json.loads(answer.body)["length"]) == (200, 4)


def test_limit_of_the_caller_bounds_the_body_as_well_when_that_is_buffered() -> None:
    with Program("watchdog", {**SETTINGS, "read_timeout": "10m", "http_buffer_req_body": "true"}) as program:
        wait_healthy(program)
        with connect(program.port) as client:
            client.sendall(HALF_A_BODY.format("X-Timeout: 200ms\r\n").encode())
            (answer,) = parse(read_all(client))
        assert (answer.status, is_ours(answer)) == (504, True)
        assert float(answer.headers["x-duration-seconds"]) >= 0.2


def test_no_answer_is_a_502(program: Program) -> None:
    answer = get(program, "/nothing")
    assert (answer.status, is_ours(answer)) == (502, True)


def test_bad_limit_is_a_400(program: Program) -> None:
    assert get(program, "/pid", X_Timeout="soon").status == 400


# Supervision.


def test_health_and_calls_wait_for_a_server_that_is_slow() -> None:
    with Program("watchdog", {**SETTINGS, "fprocess": f"{SERVER} 3"}) as program:
        answer = health(program)
        assert answer.status == 503
        assert answer.text == "the function's server runs, but takes no connections yet\n"
        assert get(program, "/status/204").status == 204
        assert health(program).status == 200
        program.wait_log("The server takes connections at 127.0.0.1:")


def test_call_is_told_to_come_again_when_the_server_never_listens() -> None:
    with Program("watchdog", {**SETTINGS, "fprocess": f"{SERVER} never"}) as program:
        answer = get(program, "/pid", X_Timeout="300ms")
        assert (answer.status, is_ours(answer), answer.headers["retry-after"]) == (503, True, "1")
        assert answer.text == "the function's server runs, but takes no connections yet\n"
        program.wait_log("takes no connections at 127.0.0.1:", 15.0)
        assert http_request(program.port, "GET", "/_/ready").status == 503


@pytest.mark.parametrize(("fprocess", "reason"), [("false", "ended (exit status 1)"), ("no-such", "cannot be started")])
def test_server_that_dies_is_started_again_with_growing_delay_and_the_reason(fprocess: str, reason: str) -> None:
    with Program("watchdog", {**SETTINGS, "fprocess": fprocess}) as program:
        for delay in ("0.1", "0.2", "0.4"):
            assert reason in program.wait_log(f"next start in {delay} s")

        def is_not_running() -> bool:  # unless the call's limit falls into the moment before it dies once more
            answer = get(program, "/", X_Timeout="100ms")
            assert answer.status == 503
            return answer.text.startswith("the function's server is not running, a")

        wait_until(is_not_running, SOON_S, "a call is told so")


def test_calls_wait_for_the_next_life_of_a_server() -> None:
    with Program("watchdog", SETTINGS) as program:
        wait_healthy(program)
        before = server_pid(program)
        http_request(program.port, "POST", "/exit/3")
        program.wait_log("exit status 3")
        assert server_pid(program) != before
        lines = [line for line in program.log_lines() if "about to exit" in line or "exit status 3" in line]
        assert [line[20:] for line in lines] == [
            "stdout: about to exit",
            "error: the server ended (exit status 3); next start in 0.1 s",
        ]


def test_all_that_a_server_started_is_gone_before_its_next_life() -> None:
    with Program("watchdog", SETTINGS) as program:
        wait_healthy(program)
        get(program, "/daemon")
        get(program, "/child")
        wait_until(lambda: len(program.functions()) == 3, 5.0, "all have begun")
        os.kill(server_pid(program), signal.SIGKILL)
        program.wait_log("the server ended (signal: killed)")
        wait_healthy(program)
        assert len(program.functions()) == 1


def test_what_a_server_orphans_is_reaped_and_otherwise_left_in_peace(program: Program) -> None:
    get(program, "/zombie")
    get(program, "/daemon")
    wait_until(lambda: len(program.functions()) == 2, SOON_S, "the server and a sleeper are what is left")
    (sleeper,) = program.functions() - {server_pid(program)}
    for _ in range(20):
        get(program, "/pid")
    assert sleeper in program.functions()
    wait_until(lambda: "Z" not in map(state_of, program.children()), SOON_S, "no zombies")


@pytest.mark.parametrize("ending", ["terminated", "twice", "killed"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_server_and_all_that_it_started_end_with_the_watchdog(ending: str, workers: str) -> None:
    with Program("watchdog", {**SETTINGS, "workers": workers}) as program:
        wait_healthy(program)
        get(program, "/daemon")
        get(program, "/child")
        if ending == "killed":
            program.kill()
        else:
            program.terminate()
            if ending == "twice":
                program.wait_log("SIGTERM: draining")
                program.terminate()
            assert program.wait_exit() == 0
        wait_until(lambda: not program.survivors(), SOON_S, "nothing left")


def test_server_comes_again_with_the_worker_process_that_had_it() -> None:
    with Program("watchdog", {**SETTINGS, "workers": "2"}) as program:
        wait_healthy(program)
        get(program, "/daemon")
        before = server_pid(program)
        holder = int(Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[1])
        assert holder != program.pid
        os.kill(holder, signal.SIGKILL)
        # Not its environment, which is gone a moment before the socket that it listens on.
        wait_until(lambda: state_of(before) in ("X", "Z"), SOON_S, "the server has ended with it")
        wait_healthy(program)
        assert server_pid(program) != before
        assert len(program.functions()) == 1


def test_calls_in_flight_of_every_worker_process_finish_before_the_server_is_ended() -> None:
    with Program("watchdog", {**SETTINGS, "workers": "2"}) as program:
        wait_healthy(program)
        clients = [connect(program.port) for _ in range(6)]
        for client in clients:
            client.sendall(b"POST /stream HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            read_until(client, b"begin\n\r\n")
        program.terminate()
        program.wait_log("No new connections allowed")
        for client in clients:
            client.sendall(b"3\r\none\r\n0\r\n\r\n")
            assert read_all(client).endswith(b"one\r\n" + LAST_CHUNK)
            client.close()
        assert program.wait_exit() == 0


def serves_client(pid: int, client: socket.socket) -> bool:
    """Tell whether `pid` has the other end of a connection."""
    ports = {each.raddr.port for each in psutil.Process(pid).net_connections("tcp") if each.raddr}
    return client.getsockname()[1] in ports


def test_request_that_has_begun_to_arrive_at_another_worker_process_is_answered_before_the_server_is_ended() -> None:
    with Program("watchdog", {**SETTINGS, "workers": "2", "exec_timeout": "1m"}) as program:
        wait_healthy(program)
        server = server_pid(program)
        holder = psutil.Process(server).ppid()
        others: list[socket.socket] = []
        clients: list[socket.socket] = []
        while len(clients) < 6 or not others:  # a process that stands still gets none meanwhile
            assert len(clients) < 100
            client = connect(program.port)
            client.sendall(request_of("/pid") + request_of("/pid")[:-4])
            read_until(client, b"%d" % server)  # so the second has begun, which came with the first
            clients.append(client)
            if not serves_client(holder, client):
                others.append(client)
        for client in clients:
            if client not in others:
                client.close()
        program.terminate()
        program.wait_log("Exiting. Active connections: 0")  # says the holder
        for _ in range(20):  # in which it looks for the others
            assert server in program.functions()
            time.sleep(0.01)
        for client in others:
            client.sendall(b"\r\n\r\n")
            assert read_all(client).startswith(b"HTTP/1.1 200")
            client.close()
        assert program.wait_exit() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may change users")
def test_server_runs_as_the_user_that_is_named_and_ends_with_the_watchdog() -> None:
    with Program("watchdog", {**SETTINGS, "fprocess": "sleep 60", "user": "65534:65534"}) as program:
        (pid,) = program.wait_started()
        assert Path(f"/proc/{pid}").stat().st_uid == 65534


def test_calls_in_flight_finish_before_the_server_is_ended() -> None:
    script = 'trap "echo ending; exit 0" TERM; '
    settings = {**SETTINGS, "fprocess": f"sh -c '{script}{SERVER} & wait; wait'", "term_grace": "30s"}
    with Program("watchdog", settings) as program, connect(program.port) as client:
        wait_healthy(program)
        client.sendall(b"POST /stream HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        read_until(client, b"begin\n\r\n")
        program.terminate()
        program.wait_log("draining: 1 requests")
        client.sendall(b"3\r\none\r\n0\r\n\r\n")
        assert read_all(client).endswith(b"one\r\n" + LAST_CHUNK)
        assert program.wait_exit() == 0
        program.wait_log("stdout: ending")


def test_server_that_does_not_heed_sigterm_is_killed_after_its_grace() -> None:
    settings = {**SETTINGS, "fprocess": f"""sh -c 'trap "" TERM; {SERVER}'""", "term_grace": "300ms"}
    with Program("watchdog", settings) as program:
        wait_healthy(program)
        start_s = time.monotonic()
        program.terminate()
        assert program.wait_exit() == 0
        assert 0.3 <= time.monotonic() - start_s < max(SERVER_GRACE_S, 1.3 + noise_s())  # which it has unless told


# What it prints, and readiness.


@pytest.mark.parametrize(("prefix", "shown"), [("true", "stderr: HELLO"), ("false", "HELLO")])
def test_what_a_server_prints_is_in_the_log(prefix: str, shown: str) -> None:
    with Program("watchdog", {**SETTINGS, "prefix_logs": prefix}) as program:
        wait_healthy(program)
        get(program, "/print/hello")
        line = program.wait_log(shown)
        assert line.endswith(shown)
        assert (line == shown) == (prefix == "false")
        program.wait_log(shown.replace("stderr", "stdout").replace("HELLO", "hello"))


def test_ready_asks_the_server_where_ready_path_says() -> None:
    with Program("watchdog", {**SETTINGS, "ready_path": "/status/418"}) as program:
        wait_healthy(program)
        assert http_request(program.port, "GET", "/_/ready").status == 418
        assert health(program).status == 200


# Upgrade.


def upgrade(port: int, path: str = "/", headers: str = "") -> socket.socket:
    client = connect(port)
    client.sendall(request_of(path, f"Connection: keep-alive, Upgrade\r\nUpgrade: echo\r\n{headers}"))
    return client


def switched(port: int, path: str = "/", headers: str = "") -> socket.socket:
    client = upgrade(port, path, headers)
    assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    return client


def test_other_protocol_passes_both_ways_once_the_server_has_switched(program: Program) -> None:
    with upgrade(program.port) as client:
        head = read_until(client, b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"upgrade: echo\r\n" in head.lower()
        assert b"x-a: b\r\n" in head.lower()
        for data in (b"hello", b"GET / HTTP/1.1\r\n\r\n", bytes(range(256))):
            client.sendall(data)
            assert read_until(client, data) == data
        assert in_flight(program) == 1
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"
    wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def test_connection_is_closed_when_the_server_ends_the_other_protocol(program: Program) -> None:
    with upgrade(program.port) as client:
        read_until(client, b"\r\n\r\n")
        client.sendall(b"quit")
        assert read_all(client) == b""
    wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def test_much_passes_in_the_other_protocol_when_both_sides_are_slow(program: Program) -> None:
    with upgrade(program.port) as client:
        read_until(client, b"\r\n\r\n")
        data = os.urandom(MIB) * 16
        sent = InBackground(lambda: client.sendall(data))
        received = b""
        while len(received) < len(data):
            received += client.recv(1 << 16)
        sent.result()
        assert received == data


def test_callers_limit_is_for_the_switch_and_not_for_what_follows(program: Program) -> None:
    limit_s = 1.5 * crowding()  # in which to switch
    with switched(program.port, headers=f"X-Timeout: {limit_s:.1f}s\r\n") as client:
        time.sleep(limit_s + 0.4)  # what is asserted is that nothing happens meanwhile
        client.sendall(b"still here")
        assert read_until(client, b"still here")


def test_client_may_go_on_when_the_server_has_ended_its_side(program: Program) -> None:
    with switched(program.port, "/ends-first") as client:
        assert read_all(client) == b""
        client.sendall(b"behind the end")
        program.wait_log("stdout: behind the end")
        assert in_flight(program) == 1
    wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def fill(client: socket.socket) -> None:
    """Send until nothing is taken any more."""
    client.settimeout(0.3)
    with suppress(TimeoutError, ConnectionError):  # or it was cut already
        while True:
            client.send(bytes(65536))


def reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("is_filled", [True, False], ids=["full", "empty"])
@pytest.mark.parametrize("ends_first", [False, True], ids=["open", "half-closed"])
def test_client_that_is_reset_is_let_go_while_the_server_does_not_read(
    program: Program, is_filled: bool, ends_first: bool
) -> None:
    clients = [switched(program.port, "/deaf") for _ in range(2)]
    for client in clients:
        if is_filled:
            fill(client)
        if ends_first:
            client.shutdown(socket.SHUT_WR)
    assert not is_free(program)
    for client in clients:
        reset(client)
    wait_until(lambda: is_free(program), SOON_S, "the slots are free")
    wait_until(lambda: in_flight(program) == 0, SOON_S, "both are")


@pytest.mark.parametrize(("path", "fills"), [("/deaf", True), ("/talks", False)])
def test_side_that_takes_nothing_has_the_write_timeout(path: str, fills: bool) -> None:
    settings = {**SETTINGS, "max_inflight": "1", "write_timeout": "500ms", "exec_timeout": "60s"}
    with Program("watchdog", settings) as program:
        wait_healthy(program)
        with switched(program.port, path) as client:
            client.sendall(b"go on")

            def is_cut() -> bool:
                if fills:  # again and again: who stands still takes more later
                    fill(client)
                return is_free(program)

            wait_until(is_cut, SOON_S, "the slot is free")


def test_silence_of_both_sides_has_the_exec_timeout() -> None:
    limit_s = math.ceil(3 * crowding())
    with Program("watchdog", {**SETTINGS, "max_inflight": "1", "exec_timeout": f"{limit_s}s"}) as program:
        wait_healthy(program)
        with switched(program.port) as client:
            for _ in range(4):
                time.sleep(0.27 * limit_s)  # by far less than the limit, but all of them are more
                start_s = time.monotonic()
                client.sendall(b"ping")
                assert read_until(client, b"ping")
            assert read_all(client, 2 * limit_s + SOON_S) == b""
            assert limit_s - TICK_S <= time.monotonic() - start_s < limit_s + SOON_S * crowding()
        program.wait_log(f"a switched connection is closed: silent for {limit_s}s")
        wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def test_drain_does_not_wait_for_what_has_switched_but_for_requests_and_the_server_may_say_goodbye() -> None:
    with Program("watchdog", SETTINGS) as program:
        wait_healthy(program)
        with switched(program.port) as client, switched(program.port, "/deaf"), connect(program.port) as other:
            other.sendall(b"POST /stream HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            read_until(other, b"begin\n\r\n")
            program.terminate()
            program.wait_log("draining: 3 requests")
            client.sendall(b"still here")
            read_until(client, b"still here")
            other.sendall(LAST_CHUNK)
            assert read_all(other).endswith(LAST_CHUNK)
            start_s = time.monotonic()
            assert read_all(client) == b"bye"
            assert program.wait_exit() == 0
            assert (
                time.monotonic() - start_s < 1.0 + 3.0 + SOON_S * crowding()
            )  # a farewell, and the server's own grace


@pytest.mark.parametrize("options", ["close", "keep-alive, close"])
def test_upgrade_is_not_passed_on_when_connection_does_not_name_it(program: Program, options: str) -> None:
    (answer,) = parse(raw(program.port, request_of("/echo", f"Connection: {options}\r\nUpgrade: echo\r\n")))
    assert "upgrade" not in {name.lower() for name, _ in json.loads(answer.body)["headers"]}


@pytest.mark.parametrize(
    "upgrade",
    [
        "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
        "Upgrade: echo, h2c\r\n",
        "Upgrade: echo\r\nUpgrade: H2C\r\n",
        "Upgrade: echo,h2c/14\r\n",
        "Upgrade: , echo\r\n",
        "Upgrade: echo,\r\n",
        "Upgrade: \r\n",
    ],
)
def test_h2c_and_what_names_no_protocol_is_not_passed_on(program: Program, upgrade: str) -> None:
    head = f"Connection: Upgrade, HTTP2-Settings, close\r\n{upgrade}"
    (answer,) = parse(raw(program.port, request_of("/echo", head)))
    names = {name.lower() for name, _ in json.loads(answer.body)["headers"]}
    assert not names & {"upgrade", "http2-settings"}


def test_server_may_choose_among_the_protocols_that_were_asked_for(program: Program) -> None:
    with upgrade(program.port, "/as/ECHO/other", "Upgrade: more, other\r\n") as client:
        assert b"\r\nupgrade: echo, other\r\n" in read_until(client, b"\r\n\r\n").lower()


@pytest.mark.parametrize("names", ["evil", "echo/2", "echo/evil", ""])
def test_switch_to_what_was_not_asked_for_is_a_502(program: Program, names: str) -> None:
    with upgrade(program.port, f"/as/{names}", "X-Timeout: 10s\r\n") as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 502 ")
    wait_until(lambda: is_free(program), SOON_S, "the slot is free")


def test_head_and_http_1_0_are_not_switched(program: Program) -> None:
    wish = b"Host: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    (answer,) = parse(
        raw(program.port, b"HEAD /echo HTTP/1.1\r\nX-A: b\r\n" + wish.replace(b"Up", b"close, Up", 1)), ["HEAD"]
    )
    assert answer.status == 200
    (answer,) = parse(raw(program.port, b"GET /echo HTTP/1.0\r\n" + wish))  # RFC 9110 7.8: "MUST ignore"
    assert "upgrade" not in {name.lower() for name, _ in json.loads(answer.body)["headers"]}


def test_real_websockets_meet_through_the_watchdog() -> None:
    with Program("watchdog", {**SETTINGS, "fprocess": f"{sys.executable} {websocket_echo.__file__}"}) as program:
        wait_healthy(program)
        with connect_websocket(f"ws://127.0.0.1:{program.port}/") as client:
            for message in ("hello", bytes(100_000), "x" * 70_000):
                client.send(message)
                assert client.recv(timeout=10 * crowding()) == message
            client.ping().wait(10 * crowding())
        program.wait_log("status=101")


# Settings.


@pytest.mark.parametrize(
    ("settings", "problems"),
    [
        ({"mode": "http", "fprocess": "x"}, ["upstream_url is not set; it is required with mode=http"]),
        ({"mode": "http", "upstream_url": "http://h"}, ["fprocess is not set; it is required"]),
        (
            {"mode": "http", "fprocess": "x", "upstream_url": "ftp://h?", "cgi_response": "1", "static_path": "/srv"},
            [
                "upstream_url='ftp://h?': allowed: http",
                "cgi_response='1' means nothing with mode=http",
                "static_path='/srv' means",
            ],
        ),
        (
            {"fprocess": "x", "upstream_url": "http://h", "ready_path": "/r"},
            ["upstream_url='http://h' means", "ready_path='/r' means"],
        ),
    ],
)
def test_settings_of_another_mode_are_refused_all_named(settings: dict[str, str], problems: list[str]) -> None:
    ended = run("watchdog", settings=settings)
    assert ended.returncode == 2
    assert [problem for problem in problems if problem not in ended.stderr] == []


def test_setting_of_another_mode_that_asks_for_nothing_is_let_pass() -> None:
    with Program("watchdog", {**SETTINGS, "cgi_headers": "true", "content_type": ""}) as program:
        wait_healthy(program)
