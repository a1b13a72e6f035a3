"""What a web page that is open on the same machine, or in an operator's browser, may do here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import pytest

from faashound.network.hosts import UnknownHost, parse_hosts
from faashound.serving.browsers import BrowserRules, parse_origins
from faashound.watchdog import Body, Request
from testkit.harness import free_port, http_request, raw
from testkit.system import Receiver, System, always

NO_CALL = "0190a1b2-0000-7000-8000-000000000001"  # an id that no call has
APP = "https://app.example"
EVIL = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A gateway on loopback, without a password."""
    settings = {"allowed_hosts": "faas.internal", "allowed_origins": APP, "metrics_port": str(free_port())}
    with System(settings=settings) as system:
        yield system


def status(system: System, method: str, path: str, headers: Mapping[str, str], body: bytes | None = None) -> int:
    return system.request(method, path, body, headers).status


# Whose name is in Host.


@pytest.mark.parametrize(
    ("host", "known"),
    [
        *((b"localhost", True), (b"LOCALHOST:8080", True), (b"localhost.:80", True), (b"app.localhost", True)),
        *((b"127.0.0.1:8080", True), (b"[::1]:8080", True), (b"192.168.1.7", True), (b"", True), (b":80", True)),
        *((b"faas.internal", True), (b"FAAS.internal.:8080", True)),
        *((b"rebind.example", False), (b"rebind.example:8080", False), (b"localhost.rebind.example", False)),
        *((b"127.0.0.1.rebind.example", False), (b"xlocalhost", False), (b"1.faas.internal", False)),
        *((b"127.0.0.1.", True), (b"2130706433", False), (b"a" * 300, False), (b"a" * 300 + b".localhost", False)),
        *((b"0.0.0.0:8080", False), (b"[::]:8080", False), (b"[::ffff:7f00:1]:8080", False)),
    ],
)
def test_rules_know_a_host_whose_owner_cannot_be_a_stranger(host: bytes, known: bool) -> None:
    rules = BrowserRules(True, frozenset(("faas.internal",)), frozenset())
    request = Request("GET", b"/", b"/", b"", host, (), Body(0, lambda: None))
    if known:
        rules.check_host(request)
    else:
        with pytest.raises(UnknownHost, match="allowed_hosts"):
            rules.check_host(request)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "/system/calls"), ("DELETE", "/system/calls?state=done"), ("GET", "/system/functions")),
        *(("POST", "/function/cat"), ("GET", "/function/cat"), ("POST", "/async-function/cat"), ("GET", "/healthz")),
        *(("GET", f"/async-function/{NO_CALL}"), ("GET", "/nothing")),
    ],
)
def test_gateway_on_loopback_answers_421_to_a_name_that_was_bound_to_its_address(
    system: System, method: str, path: str
) -> None:
    answer = system.request(method, path, headers={"Host": f"rebind.example:{system.port}"})
    assert answer.status == 421
    assert "allowed_hosts" in answer.text


def test_metrics_answer_421_to_a_name_that_was_bound_to_their_address(system: System) -> None:
    assert http_request(system.metrics_port, "GET", "/metrics", {"Host": "rebind.example"}).status == 421
    assert http_request(system.metrics_port, "GET", "/metrics").status == 200


def test_refused_page_is_in_the_log_on_one_line(system: System) -> None:
    system.request("GET", "/function/cat%0A", headers={"Host": "rebind.example", "Origin": "http://x\t1"})
    system.wait_log('/function/cat%0A - [421] host=rebind.example origin="http://x\\t1" peer=127.0.0.1')


def test_gateway_answers_to_the_names_that_its_operator_lists(system: System) -> None:
    for host in ("faas.internal", "faas.internal:8080", "localhost"):
        assert status(system, "POST", "/function/cat", {"Host": host}) == 200


def test_gateway_answers_a_request_of_http_1_0_without_host(system: System) -> None:
    assert raw(system.port, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_gateway_for_others_answers_to_every_name() -> None:
    with System(settings={"host": "0.0.0.0", "worker": "none"}) as system:
        assert status(system, "POST", "/function/cat", {"Host": "faas.example.com"}) == 200


def test_password_before_calls_does_not_open_functions_on_loopback_to_pages() -> None:
    system = System(settings={"basic_auth": "true", "worker": "none", "allowed_hosts": "faas.internal"})
    for name in ("basic-auth-user", "basic-auth-password"):
        (system.temporary / name).write_text("x")
    system.environment["secret_mount_path"] = str(system.temporary)
    with system:
        for path in ("/function/cat", "/async-function/cat"):
            assert status(system, "POST", path, {"Host": "rebind.example"}) == 421
            assert status(system, "POST", path, EVIL) == 403
            assert status(system, "POST", path, {"Host": "faas.internal"}) // 100 == 2
            assert status(system, "POST", path, {}) // 100 == 2


def test_gateway_for_others_answers_only_to_listed_names_when_there_is_a_list() -> None:
    with System(settings={"host": "0.0.0.0", "allowed_hosts": "faas.example.com", "worker": "none"}) as system:
        assert status(system, "POST", "/function/cat", {"Host": "faas.example.com"}) == 200
        assert status(system, "POST", "/function/cat", {"Host": "rebind.example"}) == 421


# What shows and changes.


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "http://localhost:1"}, 200),
        ({"Origin": "http://HOST"}, 200),
        ({"Origin": "https://faas.example", "X-Forwarded-Host": "faas.example"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": APP}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": APP}, 403),
        (EVIL, 403),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/system/calls"), ("DELETE", "/system/calls?state=done")])
def test_system_answers_its_own_pages_and_what_is_no_page(
    system: System, method: str, path: str, headers: dict[str, str], expected: int
) -> None:
    host = f"127.0.0.1:{system.port}"
    given = {name: value.replace("HOST", host) for name, value in headers.items()}
    assert status(system, method, path, given) == expected


@pytest.mark.parametrize("headers", [EVIL, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_foreign_page_cannot_see_or_cancel_a_call(system: System, headers: dict[str, str]) -> None:
    call_id = system.submit("cat", b"", {"X-Delay": "1h"})
    for method, rest in (("GET", ""), ("GET", "/result"), ("DELETE", "")):
        assert status(system, method, f"/async-function/{call_id}{rest}", headers) == 403
    assert system.status(call_id)["state"] == "queued"


def test_foreign_page_is_refused_where_a_browser_would_send_the_password() -> None:
    system = System(settings={"basic_auth": "true", "host": "0.0.0.0", "worker": "none"})
    for name in ("basic-auth-user", "basic-auth-password"):
        (system.temporary / name).write_text("x")
    system.environment["secret_mount_path"] = str(system.temporary)
    with system:
        headers = {"Authorization": "Basic eDp4"}
        assert status(system, "DELETE", "/system/calls?state=done", headers) == 200
        assert status(system, "DELETE", "/system/calls?state=done", headers | EVIL) == 403


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
def test_system_takes_a_body_only_as_json(system: System, headers: dict[str, str], expected: int) -> None:
    assert status(system, "DELETE", "/system/calls?state=done", headers, b"{}") == expected


# Calling functions.


@pytest.mark.parametrize("path", ["/function/cat", "/async-function/cat"])
@pytest.mark.parametrize(
    "headers",
    [
        *(EVIL, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}),
        *({"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"}),
    ],
    ids=["both", "origin", "null", "site", "same site", "another port"],
)
def test_foreign_page_cannot_call_functions_on_loopback(system: System, path: str, headers: dict[str, str]) -> None:
    answer = system.request("POST", path, b"x", {**headers, "Content-Type": "text/plain"})
    assert answer.status == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_page_of_an_allowed_origin_calls_functions_and_reads_the_answers(system: System, site: str) -> None:
    headers = {"Origin": APP, "Sec-Fetch-Site": site, "Content-Type": "text/plain"}
    for method, path, expected in (
        ("POST", "/function/cat", 200),
        ("POST", "/async-function/cat", 202),
        ("POST", "/function/nobody", 404),
        ("PUT", "/async-function/cat", 405),
    ):
        answer = system.request(method, path, b"x", headers)
        assert answer.status == expected
        assert answer.headers["access-control-allow-origin"] == APP
        assert "X-Call-Id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "Origin"


def test_page_of_an_allowed_origin_gets_the_permission_that_it_asks_for(system: System) -> None:
    asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x-mine,content-type"}
    for path in ("/function/cat", "/async-function/cat"):
        answer = system.request("OPTIONS", path, headers={"Origin": APP, **asked})
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-allow-methods"] == "PUT"
        assert answer.headers["access-control-allow-headers"] == "x-mine,content-type"
        refused = system.request("OPTIONS", path, headers={**EVIL, **asked})
        assert (refused.status, "access-control-allow-origin" in refused.headers) == (403, False)


def test_permission_does_not_reach_what_shows_and_changes_calls(system: System) -> None:
    asked = {"Origin": APP, "Access-Control-Request-Method": "DELETE"}
    for path in ("/system/calls", f"/async-function/{NO_CALL}"):
        answer = system.request("OPTIONS", path, headers=asked)
        assert (answer.status, "access-control-allow-origin" in answer.headers) == (403, False)


def test_gateway_speaks_of_origins_in_place_of_the_function_where_origins_are_set() -> None:
    own = {"Access-Control-Allow-Origin": "*", "Vary": "Accept"}
    settings = {"allowed_origins": APP, "worker": "none"}
    with Receiver(always(200, own)) as receiver, System(f'[up]\nurl = "{receiver.url()}"', settings) as system:
        head = b"GET /function/up HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nOrigin: %b\r\n\r\n"
        answer = raw(system.port, head % APP.encode()).lower()
    assert answer.count(b"access-control-allow-origin") == 1
    assert f"access-control-allow-origin: {APP}\r\n".encode() in answer
    assert answer.count(b"\r\nvary: ") == 2


def test_gateway_for_others_leaves_origins_to_its_functions_unless_they_are_set() -> None:
    own = {"Access-Control-Allow-Origin": "*"}
    settings = {"host": "0.0.0.0", "worker": "none"}
    with Receiver(always(200, own)) as receiver, System(f'[up]\nurl = "{receiver.url()}"', settings) as system:
        answer = system.request("POST", "/function/up", b"", EVIL)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert "vary" not in answer.headers
        preflight = {**EVIL, "Access-Control-Request-Method": "PUT"}
        assert system.request("OPTIONS", "/function/up", headers=preflight).status == 200
        assert receiver.received()[-1].method == "OPTIONS"


# The settings.


def test_origins_are_read_as_browsers_write_them() -> None:
    assert parse_origins("https://App.example:443, http://x:80,http://[::1]:8080") == {
        b"https://app.example",
        b"http://x",
        b"http://[::1]:8080",
    }


@pytest.mark.parametrize(
    "text", ["*", "null", "app.example", "https://app.example/", "https://u:p@h", "http://x:99999"]
)
def test_bad_origin_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: http://HOST"):
        parse_origins(text)


@pytest.mark.parametrize("text", ["http://x", "x:80", "*.x", "127.0.0.1", "a b"])
def test_bad_host_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: host names"):
        parse_hosts(text)


def test_host_check_takes_time_in_proportion_to_the_host() -> None:
    rules = BrowserRules(True, frozenset(), frozenset())

    def seconds(count: int) -> float:
        best_s = 9.0
        for round_number in range(5):
            host = b"%d" % round_number + b":1" * count
            request = Request("GET", b"/", b"/", b"", host, (), Body(0, lambda: None))
            started_s = time.process_time()
            with pytest.raises(UnknownHost):
                rules.check_host(request)
            best_s = min(best_s, time.process_time() - started_s)
        return best_s

    assert seconds(30_000) < 8 * seconds(7_500) + 0.001


def test_callback_reaches_functions_and_nothing_else(system: System) -> None:
    call_id = system.submit("cat", b"", {"X-Delay": "1h"})
    proof = {"X-Callback-Proof": "0" * 64, "X-Call-Id": call_id}
    for method, path in (
        ("POST", f"/system/calls/{call_id}/retry"),
        ("DELETE", f"/async-function/{call_id}"),
        ("POST", f"/async-function/{call_id}"),
        ("GET", "/system/functions"),
        ("POST", "/healthz"),
    ):
        assert status(system, method, path, proof) == 403
    assert status(system, "POST", "/function/cat", proof) == 200
    assert system.status(call_id)["state"] == "queued"
