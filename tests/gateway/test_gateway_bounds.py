"""What a stranger can take of a gateway, and reach through it: bounds, names that lead nowhere, HEAD."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from faashound.functions.table import Functions, parse_function_url
from faashound.serving.settings import Settings
from faashound.watchdog import BadSettings, parse_settings
from testkit.harness import connect, free_port, http_request, parse, raw, read_all, run
from testkit.system import Receiver, System, always

NO_CALL = "0190a1b2-0000-7000-8000-000000000001"  # an id that no call has


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(settings={"metrics_port": str(free_port()), "worker_metrics_port": "0"}) as system:
        yield system


# Long polls.


def test_gateway_answers_503_when_too_many_wait_for_calls() -> None:
    with System(settings={"max_long_polls": "2", "worker": "none"}) as system, ExitStack() as stack:
        path = f"/async-function/{system.submit('cat', b'', {'X-Delay': '1h'})}"
        polls = [stack.enter_context(connect(system.port)) for _ in range(3)]
        for poll in polls:
            poll.sendall(f"GET {path}?wait=60s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        (answered,), _, _ = select.select(polls, [], [], 20)  # whichever was looked at last
        refused = parse(read_all(answered))[0]
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert "max_long_polls" in refused.text
        assert system.request("GET", path).status == 200, "to ask without waiting is always possible"
        system.request("DELETE", path)
        assert [parse(read_all(poll))[0].status for poll in polls if poll is not answered] == [200, 200]
        assert system.request("GET", f"/async-function/{system.submit('cat')}?wait=1ms").status == 200


# HEAD.


@pytest.mark.parametrize(
    "path",
    [
        *("/healthz", "/system/functions", "/system/function/cat", "/system/calls", "/system/calls/ID"),
        *("/async-function/ID", "/async-function/ID?wait=1s", "/async-function/ID/result"),
    ],
)
def test_head_is_answered_as_get_without_the_body(system: System, path: str) -> None:
    call_id = system.submit("shell", b"head -c 300000 /dev/zero")
    system.ended(call_id)
    got, asked = (system.request(method, path.replace("ID", call_id)) for method in ("GET", "HEAD"))
    assert (asked.status, asked.body) == (got.status, b"") == (200, b"")
    assert asked.headers["content-length"] == got.headers["content-length"] == str(len(got.body))
    assert asked.headers.get("content-type") == got.headers.get("content-type")


def test_head_of_metrics_is_answered(system: System) -> None:
    assert http_request(system.metrics_port, "HEAD", "/metrics").status == 200


def test_connection_goes_on_after_head(system: System) -> None:
    head = b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    received = raw(system.port, head + get)
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert received.count(b"OK") == 2 + 1  # two reasons, one body


# Names that strangers make up.


@pytest.mark.parametrize(
    "name",
    [
        *("2852039166", "0x7f000001", "017700000001", "127", "localhost", "cat.localhost", "169.254", "x.127"),
        *("10.0.0.1", "[::1]", "a.b.c", "cat.", ".cat", "CAT", "cat%2e", "%6cocalhost"),
    ],
)
def test_gateway_knows_no_function_whose_name_is_an_address(name: str) -> None:
    functions = Functions({}, "http://{name}.{namespace}:1", frozenset(("openfaas-fn", "127", "254", "localhost")))
    assert functions.lookup(name) is None


def test_gateway_looks_up_functions_in_the_listed_namespaces_only() -> None:
    with Receiver(always(200)) as receiver:
        settings = {"function_url": receiver.url("/{namespace}/{name}"), "namespaces": "openfaas-fn, prod"}
        with System(settings=settings) as system:
            assert system.request("POST", "/function/far.prod/x").status == 200
            assert system.request("POST", "/function/far").status == 200
            assert system.request("POST", "/function/far.dev").status == 404
            assert system.request("POST", "/async-function/far.dev").status == 404
            status = system.ended(system.submit("far.prod/y"))
            assert (status["state"], status["function"]) == ("done", "far.prod")
        assert [each.path for each in receiver.received()] == ["/prod/far/x", "/openfaas-fn/far/", "/prod/far/y"]


def test_keys_and_metrics_of_namespaces_are_apart() -> None:
    with Receiver(always(200)) as receiver:
        port = str(free_port())
        settings = {
            "function_url": receiver.url("/{namespace}/{name}"),
            "namespaces": "prod,dev",
            "metrics_port": port,
            "worker_metrics_port": "0",
        }
        with System(settings=settings) as system:
            ids = [system.submit(name, b"x", {"Idempotency-Key": "order-1"}) for name in ("cat.prod", "cat.dev")]
            assert ids[0] != ids[1]
            for call_id in ids:
                system.ended(call_id)
            for _ in range(2):  # a name is counted as such once it has answered
                system.request("POST", "/function/cat.dev")
            assert 'gateway_function_invocation_total{code="200",function_name="cat.dev"} 1.0' in system.metrics()


@pytest.mark.parametrize("text", ["", "prod,", "127", "Prod", "a b", "localhost"])
def test_bad_namespaces_stop_the_start(text: str) -> None:
    ended = run("gateway", settings={"namespaces": text or ","})
    assert ended.returncode == 2
    assert "namespaces" in ended.stderr


def test_namespaces_that_function_url_does_not_tell_apart_stop_the_start() -> None:
    with pytest.raises(BadSettings, match=r"\{namespace\} in function_url"):
        parse_settings(Settings, {"namespaces": "prod,dev", "function_url": "http://{name}:1"})
    parse_settings(Settings, {"namespaces": "prod", "function_url": "http://{name}:1"})
    parse_settings(Settings, {"namespaces": "prod,dev", "function_url": "http://{name}.{namespace}:1"})


@pytest.mark.parametrize(("retention", "kept_s"), [("30m", 1800), ("", 3600), ("48h", 3600)])
def test_results_are_kept_as_long_as_calls_are_remembered_when_that_is_short(retention: str, kept_s: float) -> None:
    assert parse_settings(Settings, {"retention": retention}).results_kept_s == kept_s


@pytest.mark.parametrize("area", ["function", "async-function"])
def test_gateway_connects_to_no_address_that_a_callers_name_leads_to_inside(area: str) -> None:
    """Every name below .localhost is the loopback address, by RFC 6761 and by systemd's resolver."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://{{name}}.localhost:{listener.getsockname()[1]}"
        with System(settings={"function_url": url, "initial_retry_wait": "10ms"}) as system:
            if area == "function":
                answer = system.request("POST", "/function/inside/latest/meta-data")
                assert (answer.status, answer.text) == (502, "inside: no answer\n")
            else:
                assert system.ended(system.submit("inside"))["state"] == "dead"
            system.wait_log("127.0.0.1 is loopback" if can_resolve("inside.localhost") else "inside.localhost")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def can_resolve(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, 80))
    except OSError:
        return False


def test_host_that_the_operator_wrote_out_may_be_anywhere() -> None:
    with Receiver(always(200)) as receiver:
        with System(settings={"function_url": receiver.url("/{name}"), "worker": "none"}) as system:
            assert system.request("POST", "/function/far").status == 200
        assert receiver.received()[0].path == "/far/"


def test_function_url_may_have_its_placeholders_anywhere() -> None:
    for text in ("http://{name}:8080", "http://{name}.{namespace}.svc.cluster.local:8080", "http://h/{name}"):
        assert parse_function_url(text) == text


# What is repeated of a request.


@pytest.mark.parametrize(
    "path",
    [
        f"/async-function/{NO_CALL}?{'x' * 5000}=1",
        f"/async-function/{NO_CALL}?wait={'x' * 5000}",
        f"/system/calls?{'x' * 5000}=1",
        f"/system/calls?state={'x' * 5000}",
        f"/system/calls/{'x' * 5000}",
        f"/system/function/{'x' * 5000}",
        f"/function/{'x' * 5000}",
        f"/{'x' * 5000}",
    ],
)
def test_what_an_answer_repeats_of_a_request_is_bounded(system: System, path: str) -> None:
    answer = system.request("GET", path)
    assert 400 <= answer.status < 500
    assert len(answer.body) < 1000
    assert all(len(line) < 1000 for line in system.log_lines())


def test_unknown_method_is_bounded_in_the_log(system: System) -> None:
    system.request("X" * 5000, "/function/nobody")
    system.wait_log(f"Forwarded [{'X' * 20}] to /function/nobody - [404]")


def test_system_tells_name_and_namespace(system: System) -> None:
    found = json.loads(system.request("GET", "/system/function/cat.openfaas-fn").body)
    assert (found["name"], found["namespace"]) == ("cat", "openfaas-fn")


@pytest.mark.parametrize(
    "name",
    [
        *("Authorization", "Cookie", "X-Api-Key", "X-Auth-Token", "Private-Token", "X-Vault-Token", "Token"),
        *("Ocp-Apim-Subscription-Key", "X-Goog-Iap-Jwt-Assertion", "X-Client-Secret", "X-Forwarded-Access-Token"),
        *("Proxy-Authorization", "X-Session", "Password"),
    ],
)
def test_call_is_shown_without_the_credentials_that_came_with_it(system: System, name: str) -> None:
    call_id = system.submit("cat", b"", {name: "s3cr3t", "X-Plain": "seen", "X-Delay": "1h"})
    shown = system.request("GET", f"/system/calls/{call_id}").text
    assert "s3cr3t" not in shown
    assert "seen" in shown
    assert "s3cr3t" not in system.log()


def test_bounds_of_a_spool_are_refused_beside_nats() -> None:
    ended = run("gateway", settings={"queue_url": "nats://127.0.0.1:1", "max_queued": "5", "keep_dead": "1h"})
    assert ended.returncode == 2
    for setting in ("max_queued='5'", "keep_dead='1h'"):
        assert f"  {setting} bounds a spool, and queue_url=nats://127.0.0.1:1 is none" in ended.stderr
