"""The gateway as its users see it: what is promised of each route, on real processes and sockets."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from faashound.calls.ids import new_call_id
from testkit.harness import (
    TICK_S,
    InBackground,
    connect,
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
from testkit.system import FUNCTIONS, Received, Receiver, Reply, System, always, has_ended, rows

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def echo(received: Received) -> Reply:
    """Answer what was received, as JSON; a path /status/N answers N."""
    status = int(received.path.partition("/status/")[2] or 200)
    facts = {"method": received.method, "path": received.path, "headers": dict(received.headers)}
    headers = {"X-Call-Id": "the function's own", "X-Answer": "yes", "Connection": "X-Hop", "X-Hop": "no"}
    if status in (301, 302, 307):
        headers["Location"] = "/elsewhere"
    return status, headers, b"" if status in (204, 304) else json.dumps(facts).encode()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Receiver]:
    with Receiver(echo) as receiver:
        yield receiver


def is_up(system: System, path: str) -> bool:
    return system.request("POST", path).status == 200


@pytest.fixture(scope="module")
def system(upstream: Receiver) -> Iterator[System]:
    functions = f"""{FUNCTIONS}
        [echo]
        url = "{upstream.url("/base")}"
        [down]
        url = "http://127.0.0.1:{free_port()}"
    """
    with System(functions, {"upstream_timeout": "2s", "max_body": "1MiB", "write_timeout": "10s"}) as system:
        for path in ("/function/cat", "/function/shell"):  # so that no test has to wait for a watchdog to start
            wait_until(partial(is_up, system, path), 20, path)
        yield system


def echoed(system: System, path: str = "/function/echo", **headers: str) -> dict[str, str]:
    """Return the headers that a function got."""
    answer = system.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    found: dict[str, str] = json.loads(answer.body)["headers"]
    return found


# /function/NAME


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_gateway_passes_on_any_method(system: System, method: str) -> None:
    answer = system.request(method, "/function/echo")
    assert answer.status == 200
    assert json.loads(answer.body)["method"] == method


def test_gateway_passes_on_the_answer_to_head_with_its_length(system: System) -> None:
    answer = system.request("HEAD", "/function/echo")
    assert answer.status == 200
    assert answer.body == b""
    assert int(answer.headers["content-length"]) > 100


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("/function/echo", "/base/"),
        ("/function/echo/", "/base/"),
        ("/function/echo/a/b?c=d&e", "/base/a/b?c=d&e"),
        ("/function/echo/a%2Fb%20c//d", "/base/a%2Fb%20c//d"),
        ("/function/echo?q=/../x", "/base/?q=/../x"),
        ("/function/echo.openfaas-fn/x", "/base/x"),
    ],
)
def test_gateway_passes_on_path_and_query_as_they_are(system: System, path: str, seen: str) -> None:
    assert json.loads(system.request("GET", path).body)["path"] == seen


@pytest.mark.parametrize("path", ["/../x", "/a/../../x", "/./x", "/%2e%2E/x", "/a/.."])
@pytest.mark.parametrize("area", ["function", "async-function"])
def test_gateway_refuses_a_path_that_would_leave_the_function(system: System, area: str, path: str) -> None:
    assert system.request("POST", f"/{area}/echo{path}").status == 400


@pytest.mark.parametrize("status", [201, 204, 301, 302, 304, 307, 404, 429, 503])
def test_gateway_passes_on_the_status_and_follows_no_redirect(system: System, status: int) -> None:
    answer = system.request("GET", f"/function/echo/status/{status}")
    assert answer.status == status
    assert answer.headers["x-answer"] == "yes"
    assert "x-openfaas-internal" not in answer.headers


def test_gateway_drops_hop_by_hop_fields_of_both_sides(system: System) -> None:
    answer = system.request("GET", "/function/echo", headers={"Connection": "X-Mine", "X-Mine": "1", "TE": "trailers"})
    assert "x-hop" not in answer.headers
    assert not {"x-mine", "te"} & json.loads(answer.body)["headers"].keys()


def test_gateway_adds_itself_to_via_and_forwarded_for(system: System) -> None:
    seen = echoed(system, Via="1.0 front", X_Forwarded_For="192.0.2.1")
    assert re.fullmatch("1.0 front, 1.1 faashound-[0-9a-f]{16}", seen["via"])
    assert seen["x-forwarded-for"] == "192.0.2.1, 127.0.0.1"


def test_gateway_tells_the_function_who_asked(system: System) -> None:
    before_ns = time.time_ns()
    seen = echoed(system)
    assert seen["x-forwarded-for"] == "127.0.0.1"
    assert seen["x-forwarded-host"] == f"127.0.0.1:{system.port}"
    assert seen["x-forwarded-proto"] == "http"
    assert before_ns <= int(seen["x-start-time"]) <= time.time_ns()


def test_gateway_keeps_the_proto_that_a_proxy_before_it_saw(system: System) -> None:
    assert echoed(system, X_Forwarded_Proto="https", X_Forwarded_Host="faas.example")["x-forwarded-proto"] == "https"


def test_gateway_never_lets_a_stranger_name_the_start_time(system: System) -> None:
    assert echoed(system, X_Start_Time="1")["x-start-time"] != "1"


@pytest.mark.parametrize("given", ["order-17", "A.b_c~d", "0190a1b2-0000-7000-8000-000000000001"])
def test_gateway_keeps_and_echoes_a_sane_call_id(system: System, given: str) -> None:
    answer = system.request("GET", "/function/echo", headers={"X-Call-Id": given})
    assert answer.headers["x-call-id"] == given == json.loads(answer.body)["headers"]["x-call-id"]
    assert answer.headers["x-start-time"] == json.loads(answer.body)["headers"]["x-start-time"]


@pytest.mark.parametrize("given", [None, "two words", 'a"b', "x" * 129])
def test_gateway_makes_a_call_id_when_there_is_no_sane_one(system: System, given: str | None) -> None:
    answer = system.request("GET", "/function/echo", headers={"X-Call-Id": given} if given else {})
    assert UUID.fullmatch(answer.headers["x-call-id"])
    assert answer.headers["x-call-id"] == json.loads(answer.body)["headers"]["x-call-id"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/function/nobody", 404), ("/function/down", 502), ("/function/", 404), ("/function/a%2Fb", 404)],
)
def test_gateway_marks_its_own_failures_and_echoes_the_call_id(system: System, path: str, status: int) -> None:
    answer = system.request("POST", path, headers={"X-Call-Id": "mine"})
    assert answer.status == status
    assert answer.headers["x-openfaas-internal"] == "gateway"
    assert answer.headers["x-call-id"] == "mine"
    assert "127.0.0.1" not in answer.text, "addresses are nobody's business"


def test_gateway_answers_504_at_upstream_timeout_and_the_function_ends(system: System) -> None:
    answer = system.request("POST", "/function/shell", b"sleep 60")
    assert answer.status == 504
    assert answer.headers["x-openfaas-internal"] == "gateway"
    assert 2.0 - TICK_S <= answer.elapsed_s < 20, "the function sleeps for a minute"
    system.wait_idle()


def test_gateway_passes_on_x_timeout(system: System) -> None:
    answer = system.request("POST", "/function/shell", b"sleep 60", {"X-Timeout": "200ms"})
    assert (answer.status, answer.text) == (408, "Killed process.\n")


def test_gateway_cuts_the_connection_when_the_function_stops_in_mid_answer() -> None:
    def stalls(received: Received) -> Reply:
        return 200, {"Content-Length": "100"}, b"abc"

    settings = {"upstream_timeout": "500ms", "worker": "none"}
    with Receiver(stalls) as receiver, System(f'[stall]\nurl = "{receiver.url()}"', settings) as system:
        started_s = time.monotonic()
        received = raw(system.port, b"GET /function/stall HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert received.endswith(b"abc")
        assert time.monotonic() - started_s < 20, "else nothing would end it"


def test_gateway_ends_the_function_when_a_caller_hangs_up(system: System) -> None:
    with connect(system.port) as client:
        client.sendall(b"POST /function/shell HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\nsleep 60")
        system.wait_started()
    system.wait_idle()
    system.wait_log("[499]")


def test_gateway_asks_for_the_body_only_of_a_function_that_exists(system: System) -> None:
    head = (
        "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    with connect(system.port) as client:
        client.sendall(head.format("/function/cat").encode())
        assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        client.sendall(b"hello")
        assert parse(read_all(client))[0].body == b"hello"
    assert raw(system.port, head.format("/function/nobody").encode()).startswith(b"HTTP/1.1 404 ")


def test_gateway_answers_options_asterisk(system: System) -> None:
    assert raw(system.port, b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 404 "
    )


def test_gateway_streams_large_bodies_both_ways_in_constant_memory() -> None:
    block = hashlib.sha256(b"seed").digest() * 32768  # 1 MiB
    with System(settings={"worker": "none"}) as system:
        system.request("POST", "/function/cat", b"warm")
        before = system.resident_bytes()
        connection = http.client.HTTPConnection("127.0.0.1", system.port, timeout=30)
        connection.request("POST", "/function/cat", iter([block] * 96), encode_chunked=True)
        response, digest, total = connection.getresponse(), hashlib.sha256(), 0
        while piece := response.read(1 << 20):
            digest.update(piece)
            total += len(piece)
        connection.close()
        assert (total, digest.digest()) == (96 << 20, hashlib.sha256(block * 96).digest())
        assert system.resident_bytes() - before < 16 << 20


# /async-function/NAME


def test_call_is_on_disk_when_the_202_is_given(system: System) -> None:
    before_s = time.time()
    answer = system.request("POST", "/async-function/cat/sub/path?q=1", b"hello", {"X-Mine": "1", "X-Delay": "1h"})
    call_id = answer.headers["x-call-id"]
    row = system.row(call_id)
    assert answer.status == 202
    assert answer.body == b""
    assert answer.headers["location"] == f"/async-function/{call_id}"
    assert before_s <= int(answer.headers["x-start-time"]) / 1e9 <= time.time()
    assert (row["path"], row["query"], row["inline"]) == ("/sub/path", "q=1", b"hello")
    assert ["x-mine", "1"] in json.loads(row["headers"])


def test_large_body_is_on_disk_when_the_202_is_given(system: System) -> None:
    call_id = system.submit("cat", b"x" * 300_000, {"X-Delay": "1h"})
    row = system.row(call_id)
    assert (system.spool / "bodies" / row["file"]).read_bytes() == b"x" * 300_000


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_gateway_takes_submissions_by_post_alone(system: System, method: str) -> None:
    answer = system.request(method, "/async-function/cat")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://example.com/", "http"),
        ("http:///path", "http"),
        ("example.com", "http"),
        ("http://user:secret@example.com/", "user name"),
        ("http://10.1.2.3/", "callback_allow"),
        ("http://169.254.169.254/latest", "callback_allow"),
        ("http://2130706434:99999/", "port"),
        ("http://0177.0.0.1.:80@x/", "user name"),
        ("http://[::ffff:10.0.0.1]/", "callback_allow"),
    ],
)
def test_gateway_refuses_a_callback_that_cannot_be(system: System, url: str, told: str) -> None:
    answer = system.request("POST", "/async-function/cat", b"", {"X-Callback-Url": url})
    assert answer.status == 400
    assert told in answer.text
    assert "secret" not in answer.text


def test_gateway_refuses_a_submission_to_nobody_without_confusing_a_worker(system: System) -> None:
    answer = system.request("POST", "/async-function/nobody", b"", {"X-Call-Id": "mine"})
    assert answer.status == 404
    assert answer.headers["x-call-id"] == "mine"
    assert "x-openfaas-internal" not in answer.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_gateway_refuses_a_body_over_max_body(system: System, chunked: bool) -> None:
    pieces = [b"x" * 65536] * 17
    body = iter(pieces) if chunked else b"".join(pieces)
    answer = http_request(system.port, "POST", "/async-function/cat", {"X-Call-Id": "big"}, body)
    assert answer.status == 413
    assert answer.headers["x-call-id"] == "big"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("X-Delay", "soon"),
        ("X-Delay", "-1s"),
        ("X-Expires", "0"),
        ("X-Expires", "x"),
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "x" * 256),
        ("Idempotency-Key", "ä"),
    ],
)
def test_gateway_names_a_bad_field(system: System, field: str, value: str) -> None:
    answer = system.request("POST", "/async-function/cat", b"", {field: value})
    assert answer.status == 400
    assert field in answer.text


@pytest.mark.parametrize("field", ["X-Delay", "X-Expires", "X-Callback-Url"])
def test_empty_field_asks_for_nothing(system: System, field: str) -> None:
    assert system.ended(system.submit("cat", b"", {field: ""}))["state"] == "done"


def test_gateway_refuses_a_call_that_could_never_run(system: System) -> None:
    assert system.request("POST", "/async-function/cat", b"", {"X-Delay": "2s", "X-Expires": "1s"}).status == 400


def test_call_id_of_the_caller_is_taken_once(system: System) -> None:
    call_id = str(uuid.uuid4())
    assert system.submit("cat", b"", {"X-Call-Id": call_id.upper()}) == call_id
    again = system.request("POST", "/async-function/cat", b"", {"X-Call-Id": call_id})
    assert again.status == 409
    assert again.headers["x-call-id"] == call_id


def test_call_gets_a_uuid_when_the_callers_id_is_none(system: System) -> None:
    assert UUID.fullmatch(system.submit("cat", b"", {"X-Call-Id": "order-17"}))


def test_idempotency_key_names_one_call_of_one_function(system: System) -> None:
    key = {"Idempotency-Key": f"order {uuid.uuid4()}"}
    first = system.request("POST", "/async-function/cat", b"first", key)
    second = system.request("POST", "/async-function/cat.openfaas-fn", b"first", key)
    assert (first.status, second.status) == (202, 202)
    assert second.headers["x-call-id"] == first.headers["x-call-id"]
    assert second.headers["x-start-time"] == first.headers["x-start-time"]
    assert system.submit("env", b"", key) != first.headers["x-call-id"]


@pytest.mark.parametrize(
    ("path", "body", "content_type"),
    [
        ("/async-function/cat/a?q=1", b"second", "text/plain"),
        ("/async-function/cat/a?q=1", b"first" * 100_000, "text/plain"),
        ("/async-function/cat/b?q=1", b"first", "text/plain"),
        ("/async-function/cat/a?q=2", b"first", "text/plain"),
        ("/async-function/cat/a", b"first", "text/plain"),
        ("/async-function/cat/a?q=1", b"first", "application/json"),
        ("/async-function/cat/a?q=1t", b"first", "ext/plain"),
    ],
)
def test_idempotency_key_with_another_request_is_refused_and_not_answered_with_the_first(
    system: System, path: str, body: bytes, content_type: str
) -> None:
    key = {"Idempotency-Key": f"order {uuid.uuid4()}"}
    first = {**key, "Content-Type": "text/plain"}
    assert system.request("POST", "/async-function/cat/a?q=1", b"first", first).status == 202
    answer = system.request("POST", path, body, {**key, "Content-Type": content_type})
    assert answer.status == 422
    assert "x-call-id" not in answer.headers
    assert "key" in answer.text
    again = http_request(system.port, "POST", "/async-function/cat/a?q=1", first, iter([b"fi", b"rst"]))
    assert again.status == 202, "the pieces in which a body comes are no difference"


def test_repeated_submission_with_id_and_key_is_the_same_call(system: System) -> None:
    fields = {"X-Call-Id": str(uuid.uuid4()), "Idempotency-Key": str(uuid.uuid4())}
    assert system.submit("cat", b"", fields) == system.submit("cat", b"", fields)


def test_gateway_forgets_what_a_caller_that_hangs_up_has_sent(system: System) -> None:
    call_id = str(uuid.uuid4())
    with connect(system.port) as client:
        fields = f"Host: localhost\r\nX-Call-Id: {call_id}\r\nContent-Length: 200000"
        client.sendall(f"POST /async-function/cat HTTP/1.1\r\n{fields}\r\n\r\n".encode() + b"x" * 100_000)
        wait_until(lambda: any((system.spool / "bodies").iterdir()), 5, "a body under way")
    system.wait_log("Queued [POST] for /async-function/cat - [499]")
    assert system.request("GET", f"/async-function/{call_id}").status == 404


def test_gateway_answers_503_and_not_202_when_the_queue_is_unavailable() -> None:
    with System(settings={"worker": "none", "metrics_port": str(free_port())}) as system:
        system.submit("cat", b"")
        for name in ("spool.sqlite3", "spool.sqlite3-wal", "spool.sqlite3-shm"):
            (system.spool / name).rename(system.spool / f"{name}.away")
        answer = system.request("POST", "/async-function/cat", b"x")
        assert answer.status == 503, answer.text
        assert 'gateway_async_submissions_total{code="503"} 1.0' in system.metrics()


# /async-function/CALL-ID


def test_status_tells_what_has_become_of_a_call(system: System) -> None:
    call_id = system.submit("shell", b"echo out; exit 3", {"X-Call-Id": str(uuid.uuid4())})
    status = system.ended(call_id)
    assert status["state"] == "dead"
    assert (status["attempts"], status["status"], status["function"]) == (3, 500, "shell.openfaas-fn")
    assert status["error"] == "gave up after 3 attempts: status 500"
    assert status["accepted"] <= status["started"] <= status["finished"] != status["accepted"]
    result = system.request("GET", f"/async-function/{call_id}/result")
    assert (result.status, result.text) == (500, "exit status 3\nout\n")


def test_wait_returns_as_soon_as_the_call_ends(system: System) -> None:
    def is_soon() -> bool:
        call_id = system.submit("shell", b"sleep 0.3")
        answer = system.request("GET", f"/async-function/{call_id}?wait=20s")
        assert json.loads(answer.body)["state"] == "done"
        return answer.elapsed_s < 0.3 + noise_s()

    assert any(is_soon() for _ in range(4)), "one may be held up by what else the machine does, not each"


def test_wait_returns_at_its_limit_with_the_state_as_it_is(system: System) -> None:
    call_id = system.submit("shell", b"sleep 60")
    system.until(call_id, lambda status: status["state"] == "running")
    answer = system.request("GET", f"/async-function/{call_id}?wait=300ms")
    assert json.loads(answer.body)["state"] == "running"
    assert 0.3 - TICK_S <= answer.elapsed_s < 20, "the call takes a minute"
    system.request("DELETE", f"/async-function/{call_id}")


@pytest.mark.parametrize("query", ["wait=long", "wait=", "wait=-1s", "wait=1h", "wat=1s"])
def test_status_names_a_bad_query(system: System, query: str) -> None:
    answer = system.request("GET", f"/async-function/{system.submit('cat')}?{query}")
    assert answer.status == 400
    assert "allowed" in answer.text


def test_result_is_the_answer_of_the_function(system: System) -> None:
    call_id = system.submit("echo/status/201", b"x")
    system.ended(call_id)
    result = system.request("GET", f"/async-function/{call_id}/result")
    assert result.status == 201
    assert result.headers["x-answer"] == "yes"
    assert result.headers["x-call-id"] == call_id
    assert json.loads(result.body)["path"] == "/base/status/201"


def test_large_result_comes_whole(system: System) -> None:
    call_id = system.submit("shell", b"head -c 3000000 /dev/zero")
    assert system.ended(call_id)["result_bytes"] == 3_000_000
    assert system.request("GET", f"/async-function/{call_id}/result").body == bytes(3_000_000)


def test_result_can_be_waited_for(system: System) -> None:
    go = system.temporary / "go"
    call_id = system.submit("shell", f"until [ -e {go} ]; do sleep 0.02; done; echo done".encode())
    assert system.request("GET", f"/async-function/{call_id}/result").status == 409
    waiting = InBackground(lambda: system.request("GET", f"/async-function/{call_id}/result?wait=20s"))
    go.touch()
    assert waiting.result(20).text == "done\n"


def test_there_is_no_result_when_the_function_was_never_reached(system: System) -> None:
    call_id = system.submit("down")
    status = system.ended(call_id)
    assert (status["state"], status["status"]) == ("dead", 503)
    assert system.request("GET", f"/async-function/{call_id}/result").status == 404


def test_cancel_ends_a_queued_call(system: System) -> None:
    call_id = system.submit("cat", b"", {"X-Delay": "1h"})
    answer = system.request("DELETE", f"/async-function/{call_id}")
    assert answer.status == 202
    assert json.loads(answer.body)["state"] == "cancelled"
    assert system.status(call_id)["state"] == "cancelled"
    assert system.request("DELETE", f"/async-function/{call_id}").status == 409


def test_cancel_kills_the_process_tree_of_a_running_call(system: System) -> None:
    call_id = system.submit("shell", b"sleep 60 & setsid sleep 61 & sleep 62")
    system.wait_started(4)
    started_s = time.monotonic()
    assert system.request("DELETE", f"/async-function/{call_id}").status == 202
    assert system.ended(call_id)["state"] == "cancelled"
    system.wait_idle()
    assert time.monotonic() - started_s < 15, "not with the next renewal, which is in 20 s"


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("query", ["", "?wait=60s"])
def test_unknown_call_is_404_at_once(system: System, method: str, query: str) -> None:
    answer = system.request(method, f"/async-function/{new_call_id()}{query}")
    assert answer.status == 404
    assert answer.elapsed_s < 30


def test_finished_call_cannot_be_cancelled(system: System) -> None:
    call_id = system.submit("cat")
    system.ended(call_id)
    assert system.request("DELETE", f"/async-function/{call_id}").status == 409


@pytest.mark.parametrize(
    ("method", "rest", "status", "allow"),
    [("POST", "", 405, "GET, HEAD, DELETE"), ("DELETE", "/result", 405, "GET, HEAD"), ("GET", "/other", 404, None)],
)
def test_call_has_no_other_methods_and_parts(
    system: System, method: str, rest: str, status: int, allow: str | None
) -> None:
    answer = system.request(method, f"/async-function/{new_call_id()}{rest}")
    assert (answer.status, answer.headers.get("allow")) == (status, allow)


# Health, metrics, /system


def test_healthz_answers_get_alone(system: System) -> None:
    assert (system.request("GET", "/healthz").status, system.request("GET", "/healthz").text) == (200, "OK")
    assert system.request("POST", "/healthz").status == 405


@pytest.mark.parametrize("path", ["/", "/metrics", "/functions", "/system", "/system/", "/system/function", "//"])
def test_other_paths_are_not_found(system: System, path: str) -> None:
    assert system.request("GET", path).status == 404


def test_metrics_have_the_names_of_openfaas() -> None:
    worker_port = free_port()
    settings = {
        "metrics_port": str(free_port()),
        "worker_metrics_port": str(worker_port),
        "function_url": "http://127.0.0.1:1/{name}",
    }
    with System(settings=settings) as system:
        system.request("POST", "/function/cat", b"x")
        system.request("POST", "/function/made-up-name", b"x")
        system.ended(system.submit("cat"))
        text, of_worker = system.metrics(), http_request(worker_port, "GET", "/metrics").text
    # The worker calls functions itself, and counts that under the same names: the sum over both is right.
    for each in (text, of_worker):
        assert 'gateway_function_invocation_total{code="200",function_name="cat.openfaas-fn"} 1.0' in each
        assert 'gateway_function_invocation_started{function_name="cat.openfaas-fn"} 1.0' in each
        assert 'gateway_functions_seconds_count{code="200",function_name="cat.openfaas-fn"} 1.0' in each
    assert 'gateway_queue_calls{state="done"} 1.0' in text
    assert 'gateway_async_submissions_total{code="202"} 1.0' in text
    assert 'gateway_function_invocation_total{code="502",function_name="other"} 1.0' in text
    assert "made-up-name" not in text, "strangers must not fill the memory"


# Authentication


@pytest.fixture(scope="module")
def guarded() -> Iterator[System]:
    system = System(settings={"basic_auth": "true"})
    (system.temporary / "basic-auth-user").write_text("admin\n")
    (system.temporary / "basic-auth-password").write_text("pass:wörd\n")
    system.environment["secret_mount_path"] = str(system.temporary)
    with system:
        yield system


def basic(text: str, scheme: str = "Basic") -> dict[str, str]:
    return {"Authorization": f"{scheme} {base64.b64encode(text.encode()).decode()}"}


def test_invoking_needs_no_password(guarded: System) -> None:
    assert guarded.request("POST", "/function/cat", b"x").status == 200
    guarded.submit("cat")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/system/functions"),
        ("GET", "/system/calls"),
        ("DELETE", "/system/calls?state=done"),
        ("GET", "/async-function/{}"),
        ("GET", "/async-function/{}/result"),
        ("DELETE", "/async-function/{}"),
    ],
)
@pytest.mark.parametrize(
    "headers", [{}, basic("admin:wrong"), basic("admin:pass:wörd", "Bearer"), {"X-Worker-Token": "x"}]
)
def test_seeing_and_cancelling_needs_the_password(
    guarded: System, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = guarded.request(method, path.format(new_call_id()), headers=headers)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Basic realm=")


@pytest.mark.parametrize("scheme", ["Basic", "basic"])
def test_password_opens_what_is_protected(guarded: System, scheme: str) -> None:
    headers = basic("admin:pass:wörd", scheme)
    call_id = guarded.submit("cat")
    assert guarded.request("GET", f"/async-function/{call_id}?wait=10s", headers=headers).status == 200
    assert guarded.request("GET", "/system/functions", headers=headers).status == 200


def test_retries_by_annotation_work_behind_a_password() -> None:
    functions = '[fails]\nfprocess = "false"\nannotations."com.openfaas.retry.attempts" = 2'
    system = System(functions, {"basic_auth": "true"})
    for name in ("basic-auth-user", "basic-auth-password"):
        (system.temporary / name).write_text("x")
    system.environment["secret_mount_path"] = str(system.temporary)
    with system:
        call_id = system.submit("fails")

        def ended() -> dict[str, object] | None:
            answer = system.request("GET", f"/async-function/{call_id}?wait=5s", headers=basic("x:x"))
            status: dict[str, object] = json.loads(answer.body)
            return status if has_ended(status) else None

        assert wait_until(ended, 15, "its end")["attempts"] == 2


# The log, and what must not be in it


def test_log_has_a_line_for_each_call_with_its_id_and_nothing_unescaped(system: System) -> None:
    call_id = str(uuid.uuid4())
    system.request("POST", "/function/cat?token=secret", b"x", {"X-Call-Id": call_id, "Authorization": "Bearer secret"})
    pattern = rf"Forwarded \[POST\] to /function/cat - \[200\] - [0-9.]+s call_id={call_id}"
    wait_until(lambda: re.search(pattern, system.log()), 5, pattern)
    system.request("GET", "/function/%0Afake%1b[31m")
    system.wait_log("/function/%0Afake%1b[31m")
    assert "secret" not in system.log()


def test_worker_token_reaches_neither_function_nor_log(system: System) -> None:
    token = (system.spool / "token").read_text().strip()
    call_id = system.submit("env", b"", {"X-Worker-Token": "guess"})
    system.ended(call_id)
    seen = system.request("GET", f"/async-function/{call_id}/result").text
    assert f"Http_X_Call_Id={call_id}" in seen
    assert not re.search("token|proof", seen, re.IGNORECASE)
    assert token not in seen + system.log()


# Starting and stopping


def test_gateway_names_every_bad_setting_of_its_own_of_the_worker_and_of_the_functions(tmp_path: Path) -> None:
    path = tmp_path / "functions.toml"
    path.write_text('[cat]\nfproces = "cat"\n[b]\nfprocess="cat"\nannotations."com.openfaas.retry.attempts" = "x"')
    settings = {"port": "x", "keep_results": "-1", "max_inflight": "0", "queue_url": "amqp://x", "functions": str(path)}
    ended = run("gateway", settings=settings)
    assert ended.returncode == 2
    for name in (
        "port='x'",
        "keep_results='-1'",
        "max_inflight='0'",
        "queue_url='amqp://x'",
        "[cat] fproces",
        "toml:5: [b]",
    ):
        assert ended.stderr.count(name) == 1, ended.stderr


@pytest.mark.parametrize(
    ("settings", "status", "told"),
    [
        ({"functions": "/nowhere/functions.toml"}, 2, "/nowhere/functions.toml: there is no such file"),
        ({"port": "9999", "metrics_port": "9999"}, 2, "two different ports"),
        ({"keep_results": "2h", "retention": "1h"}, 2, "keep_results='2h' is longer than retention=1h"),
        ({"max_body": "0"}, 2, "max_body='0': allowed: bytes, at least 1"),
        ({"max_queued_bytes": "0MiB"}, 2, "max_queued_bytes='0MiB': allowed: bytes, at least 1"),
        ({"keep_dead_bytes": "0"}, 2, "keep_dead_bytes='0': allowed: bytes, at least 1"),
        ({"metrics_port": "8083", "worker": "local"}, 2, "worker_metrics_port"),
        ({"basic_auth": "true", "secret_mount_path": "/nowhere"}, 1, "/nowhere/basic-auth-user"),
        ({"queue_url": "spool:/proc/nowhere"}, 1, "/proc/nowhere"),
        ({"host": "no.such.host.invalid"}, 1, "no.such.host.invalid"),
    ],
)
def test_gateway_says_why_it_does_not_start(settings: dict[str, str], status: int, told: str) -> None:
    ended = run("gateway", settings={"port": "0", "metrics_port": "0", "worker": "none"} | settings)
    assert ended.returncode == status
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_gateway_that_cannot_start_leaves_no_sockets_of_functions(workers: str) -> None:
    with tempfile.TemporaryDirectory(prefix="faashound-test-") as name:  # whose name is short enough for sockets
        functions = Path(name) / "functions.toml"
        functions.write_text('[cat]\nfprocess = "cat"\n')
        settings = {"functions": str(functions), "basic_auth": "true", "secret_mount_path": name, "workers": workers}
        ended = run("gateway", settings=settings | {"TMPDIR": name, "port": "0", "metrics_port": "0"})
        assert (ended.returncode, "basic_auth=true needs it" in ended.stderr) == (1, True), ended
        assert not list(Path(name).glob("faashound.run.*"))


@pytest.mark.parametrize("name", ["port", "metrics_port"])
def test_gateway_says_that_a_port_is_in_use_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"port": "0", "metrics_port": "0", name: str(port), "queue_url": f"spool:{tmp_path}/spool"}
        ended = run("gateway", settings=settings)
    assert ended.returncode == 1
    assert f"port {port}" in ended.stderr


def test_gateway_shows_version_and_help() -> None:
    assert re.fullmatch(r"faashound \d+\.\d+\.\d+\n", run("gateway", ["--version"]).stdout)
    shown = run("gateway", ["--help"])
    assert (shown.returncode, "upstream_timeout" in shown.stdout) == (0, True)
    assert run("gateway", ["--what"]).returncode == 2


def test_gateway_tells_at_the_start_what_it_serves(system: System) -> None:
    assert system.wait_log(f"Serving http://127.0.0.1:{system.port}/function/cat")
    assert "basic_auth=false" not in system.log()


def test_gateway_warns_when_others_can_reach_it_without_password() -> None:
    with System(settings={"host": "0.0.0.0", "worker": "none"}) as system:
        system.wait_log("basic_auth=false")


def test_worker_reaches_a_gateway_that_listens_on_one_address_only() -> None:
    with System(settings={"host": "127.0.0.2"}) as system:
        system.wait_log("worker: Draining")
        answer = http_request(system.port, "POST", "/async-function/cat", host="127.0.0.2")
        path = answer.headers["location"]
        status = http_request(system.port, "GET", f"{path}?wait=10s", host="127.0.0.2")
        assert json.loads(status.body)["state"] == "done"


def test_worker_none_leaves_calls_in_the_queue() -> None:
    with System(settings={"worker": "none"}) as system:
        call_id = system.submit("cat")
        assert system.status(call_id, "?wait=300ms")["state"] == "queued"
        assert rows(system.spool, "SELECT * FROM leases") == []


def test_sigterm_makes_unhealthy_lets_calls_finish_and_ends_long_polls() -> None:
    with System() as system, connect(system.port) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(client, b"OK")
        late = system.submit("cat", b"", {"X-Delay": "1h"})
        waits = b'echo begun >>"$TMPDIR/begun"; until [ -e "$TMPDIR/go" ]; do sleep 0.02; done; '
        asynchronous = system.submit("shell", waits)
        synchronous = InBackground(lambda: system.request("POST", "/function/shell", waits + b"echo done"))
        poll = InBackground(lambda: system.request("GET", f"/async-function/{late}?wait=60s"))
        begun = system.temporary / "begun"
        wait_until(lambda: begun.exists() and begun.read_text() == 2 * "begun\n", 15, "both run")
        system.terminate()
        system.wait_log("SIGTERM: draining")
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 503 ")
        assert json.loads(poll.result().body)["state"] == "queued"
        (system.temporary / "go").touch()
        assert synchronous.result().text == "done\n"
        assert system.wait_exit() == 0
        system.wait_idle()
        states = {row["id"]: row["state"] for row in rows(system.spool, "SELECT id, state FROM calls")}
        assert states == {late: "queued", asynchronous: "done"}


def test_second_signal_ends_everything_at_once_and_hands_the_call_back() -> None:
    with System() as system:
        call_id = system.submit("shell", b"sleep 60")
        system.wait_started()
        system.process.send_signal(signal.SIGINT)
        system.wait_log("SIGINT: draining; once more to stop at once")
        system.process.send_signal(signal.SIGINT)
        assert system.wait_exit() in (0, 1)
        wait_until(lambda: not system.survivors(), 15, "functions gone, and the guards, which look around last")
        row = system.row(call_id)
        assert (row["state"], row["attempts"]) == ("queued", 0)


def test_kill_of_the_gateway_leaves_no_process_and_loses_no_call() -> None:
    with System() as system:
        call_id = system.submit("shell", b"sleep 60 & setsid sleep 61")
        system.wait_started(3)
        system.kill()
        wait_until(lambda: not system.survivors(), 15, "every process gone")
        assert system.row(call_id)["state"] in ("queued", "running")
        with System(settings={"max_retry_attempts": "1"}, spool=system.spool) as successor:
            successor.until(call_id, lambda status: status["state"] == "running")
            successor.request("DELETE", f"/async-function/{call_id}")


def test_gateway_takes_the_socket_that_it_is_given() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hand_over = f"import os, sys; os.dup2({listener.fileno()}, 3); os.execvp(sys.argv[1], sys.argv[1:])"
        given = [sys.executable, "-c", hand_over]
        with System(settings={"LISTEN_FDS": "1"}, prefix=given, pass_fds=[listener.fileno()]) as system:
            assert system.port == listener.getsockname()[1]
            assert system.ended(system.submit("cat"))["state"] == "done"


def test_status_code_of_an_answer_that_the_function_marks_as_internal_is_kept() -> None:
    internal = always(404, {"X-OpenFaaS-Internal": "of-watchdog"})
    with Receiver(internal) as receiver, System(f'[up]\nurl = "{receiver.url()}"') as system:
        status = system.ended(system.submit("up"))
        assert (status["state"], status["status"], status["attempts"]) == ("dead", 404, 3)


def test_gateway_warns_at_start_when_timeouts_do_not_agree() -> None:
    functions = """
[patient]
fprocess = "cat"
exec_timeout = "2m"

[quick]
fprocess = "cat"
exec_timeout = "5s"

[endless]
fprocess = "cat"
"""
    with System(functions, {"upstream_timeout": "30s", "call_timeout": "1m"}) as system:
        system.wait_log("Serving")
        warnings = [line for line in system.log_lines() if "is shorter than exec_timeout of" in line]
    assert len(warnings) == 2
    assert "upstream_timeout (30s) is shorter than exec_timeout of patient (2m)" in warnings[0]
    assert "call_timeout (1m) is shorter than exec_timeout of patient (2m)" in warnings[1]
