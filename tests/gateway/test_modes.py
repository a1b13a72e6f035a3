"""Functions of every mode behind the gateway: streams pass, protocols switch, limits and cancels arrive."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from websockets.sync.client import connect as connect_websocket

from testkit import app_server, websocket_echo
from testkit.harness import (
    ROOT,
    Answer,
    connect,
    crowding,
    http_request,
    read_all,
    read_until,
    run,
    wait_until,
)
from testkit.system import Receiver, System

LAST_CHUNK = b"0\r\n\r\n"
MIB = 1 << 20
FUNCTIONS = f"""
[live]
fprocess = "sh"
mode = "streaming"

[app]
fprocess = "{sys.executable} -S -E -I {app_server.__file__}"
mode = "http"
upstream_url = "http://127.0.0.1:0"

[talk]
fprocess = "{sys.executable} {websocket_echo.__file__}"
mode = "http"
upstream_url = "http://127.0.0.1:$PORT"

[site]
mode = "static"
static_path = "@SITE@"

[redirect]
fprocess = "printf 'Status: 303 See Other\\\\nLocation: /there\\\\n\\\\n'"
cgi_response = true
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    site = tmp_path_factory.mktemp("site")
    (site / "index.html").write_text("<p>hello</p>\n")
    (site / "zeros").write_bytes(bytes(4 * MIB))
    with System(FUNCTIONS.replace("@SITE@", str(site)), {"max_retry_attempts": "1"}) as system:
        yield system


def get(system: System, path: str, **headers: str) -> Answer:
    return system.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def send(system: System, function: str, script: str, headers: str = "") -> socket.socket:
    head = f"POST /function/{function} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(script)}\r\n{headers}\r\n"
    client = connect(system.port)
    client.sendall(f"{head}{script}".encode())
    return client


def test_line_is_with_the_client_soon_after_it_was_printed(system: System) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11; do sleep 0.03; date +%s%N; done"

    def median_late_s() -> float:
        late_s = []
        with send(system, "live", script, "Connection: close\r\n") as client:
            while piece := client.recv(65536):
                late_s += [time.time() - int(line) / 1e9 for line in re.findall(rb"^(\d{19})$", piece, re.MULTILINE)]
        assert len(late_s) == 11
        return sorted(late_s)[5]

    # The machine may hold up most lines of one answer; what we do to them, we do to each.
    wait_until(lambda: median_late_s() < 0.02 * crowding(), 5.0, "an answer whose lines are soon there")


def test_events_pass_both_ways_while_the_server_still_answers(system: System) -> None:
    with connect(system.port) as client:
        client.sendall(b"POST /function/app/stream HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"text/event-stream" in read_until(client, b"begin\n\r\n")
        for word in (b"one", b"two"):
            client.sendall(b"3\r\n" + word + b"\r\n")
            read_until(client, word + b"\r\n")
        client.sendall(LAST_CHUNK)
        read_until(client, LAST_CHUNK)


@pytest.mark.parametrize("script", ["setsid -f sleep 60; echo half; sleep 60", "exec cat /dev/zero"])
def test_function_ends_when_the_client_hangs_up(system: System, script: str) -> None:
    idle = len(system.functions())
    with send(system, "live", script) as client:
        client.recv(100)
        wait_until(lambda: len(system.functions()) > idle, 15.0, "the function runs")
    wait_until(lambda: len(system.functions()) <= idle, 15.0, "the function has ended")


def test_limit_of_the_caller_cuts_a_stream_and_ends_the_function(system: System) -> None:
    idle = len(system.functions())
    for limit_s in (0.4, 5.0):  # the other is for a function that did not get the time to say something
        start_s = time.monotonic()
        with send(system, "live", "echo half; sleep 60", f"X-Timeout: {limit_s}s\r\n") as client:
            received = read_all(client)
        if b"half\n" in received:
            break
    assert b"half\n" in received
    assert not received.endswith(LAST_CHUNK)
    assert limit_s <= time.monotonic() - start_s < 30, "the function sleeps for a minute"
    wait_until(lambda: len(system.functions()) <= idle, 15.0, "the function has ended")


def test_limit_of_the_caller_is_a_504_of_a_server(system: System) -> None:
    answer = get(system, "/function/app/hang", X_Timeout="200ms")
    assert (answer.status, answer.headers["x-openfaas-internal"]) == (504, "of-watchdog")


def test_stream_takes_constant_memory_when_its_reader_is_slow(system: System) -> None:
    get(system, "/function/app/zeros/1000000")
    before = system.resident_bytes()
    with connect(system.port) as client:
        path = f"/function/app/zeros/{256 * MIB}"
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        time.sleep(0.3)  # a reader that reads nothing for a while
        assert len(read_all(client, 60 * crowding())) > 256 * MIB
    assert system.resident_bytes() - before < 16 * MIB


def test_server_sees_path_query_and_who_asked(system: System) -> None:
    seen = json.loads(get(system, "/function/app/a%20b?c=d").body)
    assert seen["target"] == "/a%20b?c=d"
    assert ["x-forwarded-for", "127.0.0.1"] in [[name.lower(), value] for name, value in seen["headers"]]


def test_other_protocol_passes_both_ways(system: System) -> None:
    with connect(system.port) as client:
        client.sendall(b"GET /function/app HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        head = read_until(client, b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n")
        assert b"x-call-id: " in head.lower()
        client.sendall(b"hello")
        read_until(client, b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"bye"


SWITCHING = FUNCTIONS.partition("[app]")[2].partition("[talk]")[0]


def switched(system: System, path: str = "") -> socket.socket:
    client = connect(system.port)
    head = f"GET /function/app{path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    client.sendall(head.encode())
    assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
    return client


@pytest.mark.parametrize("is_filled", [True, False], ids=["full", "empty"])
def test_client_that_is_reset_is_let_go_while_the_server_does_not_read(is_filled: bool) -> None:
    with System(f"[app]{SWITCHING}max_inflight = 1\n", {"max_inflight": "1"}) as system:
        client = switched(system, "/deaf")
        client.settimeout(0.5)
        with suppress(TimeoutError):
            while is_filled:
                client.send(bytes(65536))
        assert get(system, "/function/app/pid").status == 429
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: get(system, "/function/app/pid").status == 200, 15.0, "the place is free")


def test_silence_of_both_sides_has_the_upstream_timeout() -> None:
    with System(f"[app]{SWITCHING}", {"upstream_timeout": "4s"}) as system:
        wait_until(lambda: get(system, "/function/app/pid").status == 200, 10.0, "the server takes connections")
        with switched(system) as client:
            for _ in range(4):
                time.sleep(1.2)  # less than the limit, but all of them are more
                client.sendall(b"ping")
                assert read_until(client, b"ping")
            start_s = time.monotonic()
            assert read_all(client) == b""
            assert time.monotonic() - start_s >= 3.9


def test_gateway_does_not_wait_for_what_has_switched_when_it_stops() -> None:
    with System(f"[app]{SWITCHING}") as system, switched(system) as client, switched(system, "/deaf"):
        start_s = time.monotonic()
        system.terminate()
        assert read_all(client) == b"bye"
        assert system.wait_exit() == 0
        assert time.monotonic() - start_s < 30, "neither for its limit of silence, which is a minute"


def test_real_websockets_meet_through_gateway_and_watchdog(system: System) -> None:
    with connect_websocket(f"ws://127.0.0.1:{system.port}/function/talk", open_timeout=20 * crowding()) as client:
        for message in ("hello", bytes(100_000), "x" * 70_000):
            client.send(message)
            assert client.recv(timeout=10 * crowding()) == message


def test_files_are_served(system: System) -> None:
    answer = get(system, "/function/site/")
    assert (answer.status, answer.body) == (200, b"<p>hello</p>\n")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    part = get(system, "/function/site/zeros", Range="bytes=1-3000000")
    assert (part.status, len(part.body)) == (206, 3_000_000)


def test_status_is_the_programs_own(system: System) -> None:
    answer = get(system, "/function/redirect")
    assert (answer.status, answer.headers["location"]) == (303, "/there")


# Asynchronous calls.


def test_stream_is_the_result_of_an_asynchronous_call(system: System) -> None:
    call_id = system.submit("live", b"echo one; sleep 0.1; echo two")
    assert system.ended(call_id)["state"] == "done"
    assert get(system, f"/async-function/{call_id}/result").body == b"one\ntwo\n"


@pytest.mark.parametrize("size", [5, 3_000_000], ids=["short", "long"])
def test_stream_that_is_cut_is_a_failed_call_and_what_came_is_kept(system: System, size: int) -> None:
    with Receiver() as receiver:
        script = f"head -c {size} /dev/zero; sleep 0.1; exit 3"
        call_id = system.submit("live", script.encode(), {"X-Callback-Url": receiver.url()})
        status = system.ended(call_id)
        assert (status["state"], status["status"]) == ("dead", 502)
        assert f"the answer broke off after {size} bytes" in status["error"]
        assert get(system, f"/async-function/{call_id}/result").body == bytes(size)
        (got,) = receiver.wait_for(1)
        assert (got.headers["x-function-status"], got.body) == ("502", bytes(size))


def test_cancelled_call_ends_its_stream(system: System) -> None:
    idle = len(system.functions())
    call_id = system.submit("live", b"echo half; sleep 60")
    wait_until(lambda: len(system.functions()) > idle, 15.0, "the function runs")
    system.request("DELETE", f"/async-function/{call_id}")
    assert system.ended(call_id)["state"] == "cancelled"
    wait_until(lambda: len(system.functions()) <= idle, 15.0, "the function has ended")


def test_call_that_a_server_breaks_off_is_tried_again() -> None:
    with System(FUNCTIONS.partition("[talk]")[0]) as system:
        call_id = system.submit("app/cut")
        status = system.ended(call_id)
        assert (status["state"], status["status"], status["attempts"]) == ("dead", 502, 3)


# The functions file.


def test_settings_of_another_mode_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "functions.toml"
    path.write_text('[a]\nfprocess = "x"\nmode = "http"\ncgi_response = true\n[b]\nmode = "static"\nprewarm = 2\n')
    ended = run("gateway", settings={"functions": str(path), "queue_url": f"spool:{tmp_path}/spool"})
    assert ended.returncode != 0
    for place, problem in (
        ("1: [a]", "upstream_url is not set; it is required with mode=http"),
        (
            "1: [a]",
            "cgi_response='true' means nothing with mode=http; allowed: with mode=serializing or mode=streaming",
        ),
        ("5: [b]", "prewarm='2' means nothing with mode=static"),
    ):
        assert re.search(re.escape(f"functions.toml:{place}") + ".*" + re.escape(problem), ended.stderr), ended.stderr


def test_server_that_is_deployed_serves_as_soon_as_it_takes_connections() -> None:
    with System("", {"deploy": "process"}) as system:
        command = f"{sys.executable} -S -E -I {app_server.__file__} 0.5"
        variables = {"mode": "http", "upstream_url": "http://127.0.0.1:$PORT"}
        document = {"service": "app", "image": "process", "envProcess": command, "envVars": variables}
        headers = {"Content-Type": "application/json"}
        for method, status in (("POST", 202), ("PUT", 200)):
            body = json.dumps({**document, "envVars": {**variables, "LIFE": method}}).encode()
            assert http_request(system.port, method, "/system/functions", headers, body, 20.0).status == status
            assert get(system, "/function/app/pid").status == 200


def test_deployment_of_a_server_that_never_listens_is_told_why_it_fails() -> None:
    with System("", {"deploy": "process"}) as system:
        variables = {"mode": "http", "upstream_url": "http://127.0.0.1:$PORT"}
        document = {"service": "app", "image": "process", "envProcess": "sleep 60", "envVars": variables}
        body, headers = json.dumps(document).encode(), {"Content-Type": "application/json"}
        answer = http_request(system.port, "POST", "/system/functions", headers, body, 60.0 * crowding())
        assert answer.status == 400
        assert "the function's server runs, but takes no connections yet" in answer.text


def test_examples_of_each_mode_answer() -> None:
    functions = (ROOT / "examples" / "functions.toml").read_text().replace("examples/", f"{ROOT}/examples/")
    with System(functions) as system:
        post = partial(system.request, "POST")
        assert post("/function/tokens", b"one").body == b"data: one\n\ndata: [DONE]\n\n"
        assert [post("/function/counter/tea").text for _ in range(2)] == [
            f"/tea was called {n} times\n" for n in (1, 2)
        ]
        assert "without a program" in get(system, "/function/site/").text
        assert [post("/function/door", name).status for name in (b"alice", b"owner", b"bob")] == [200, 302, 404]
