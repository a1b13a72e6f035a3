"""What the gateway refuses to pass on: paths that lead out of a function's own, and requests that come round."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence

import pytest

from faashound.serving.proxying import LoopDetected, build_via
from faashound.watchdog import BadPath, Body, Request, check_path
from testkit.harness import free_port, wait_until
from testkit.system import FUNCTIONS, Receiver, System, always


def request_with(*headers: tuple[bytes, bytes]) -> Request:
    return Request("GET", b"/", b"/", b"", b"x", headers, Body(0, lambda: None))


def test_path_with_dot_segments_is_refused() -> None:
    check_path(b"/a.b/..c")
    with pytest.raises(BadPath, match="dot segments"):
        check_path(b"/a/%2e%2e/x")


@pytest.mark.parametrize(
    ("entries", "looped"),
    [
        ((), False),
        ((b"1.0 front",), False),
        ((b"1.1 faashound",), False),
        ((b"1.1 faashound-0123456789abcdef",), False),
        ((b"1.1 OURS",), True),
        ((b"1.0 front,1.1 OURS (a comment), 1.1 other",), True),
        ((b"1.0 front", b"HTTP/1.1\tOURS"), True),
        ((b"1.1 xOURS",), False),
    ],
)
def test_gateway_knows_its_own_entry_in_via(entries: Sequence[bytes], looped: bool) -> None:
    via = build_via("token")
    request = request_with(*((b"via", entry.replace(b"OURS", via.pseudonym.upper())) for entry in entries))
    assert via.has_passed(request) is looped
    if looped:
        with pytest.raises(LoopDetected):
            via.check(request)
    assert via.extend(request)[1].lower().count(via.pseudonym + b",") <= 1


def test_gateways_with_the_same_token_have_one_pseudonym_and_others_another() -> None:
    assert build_via("one") == build_via("one") != build_via("two")
    assert b"one" not in build_via("one").pseudonym


@pytest.mark.parametrize("area", ["function", "async-function"])
def test_gateway_answers_508_when_a_functions_address_is_its_own(area: str) -> None:
    port = free_port()
    functions = f'[loop]\nurl = "http://127.0.0.1:{port}/{area}/loop"'
    with System(functions, {"port": str(port), "worker": "none"}) as system:
        answer = system.request("POST", "/function/loop", b"x")
        assert answer.status == 508
        assert "x-openfaas-internal" not in answer.headers, "a worker would try again"
        wait_until(lambda: system.log().count("508]") == 2, 5, "a line for each round")


@pytest.mark.parametrize("area", ["function", "async-function"])
def test_gateway_ends_an_asynchronous_call_that_goes_round(area: str) -> None:
    port = free_port()
    functions = f'[loop]\nurl = "http://127.0.0.1:{port}/{area}/loop"'
    with System(functions, {"port": str(port)}) as system:
        status = system.ended(system.submit("loop", b"x"))
        assert (status["status"], status["attempts"]) == (508, 1)


def test_function_may_call_the_gateway_whose_call_it_answers() -> None:
    port = free_port()
    script = f"import urllib.request as u; print(u.urlopen('http://127.0.0.1:{port}/function/cat', b'hi').read())"
    functions = f"{FUNCTIONS}\n[chain]\nfprocess = '''{shlex.join([sys.executable, '-c', script])}'''"
    with System(functions, {"port": str(port)}) as system:
        assert system.request("POST", "/function/chain").text == "b'hi'\n"
        call_id = system.submit("chain")
        system.ended(call_id)
        assert system.request("GET", f"/async-function/{call_id}/result").text == "b'hi'\n"


def test_function_sees_the_gateway_once_in_via_whichever_way_it_is_called() -> None:
    def headers_of(received: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, json.dumps(dict(received.headers)).encode()  # type: ignore[attr-defined]

    with Receiver(headers_of) as receiver, System(f'[echo]\nurl = "{receiver.url()}"') as system:
        now = json.loads(system.request("GET", "/function/echo", headers={"Via": "1.0 front"}).body)
        call_id = system.submit("echo", headers={"Via": "1.0 front"})
        system.ended(call_id)
        later = json.loads(system.request("GET", f"/async-function/{call_id}/result").body)
    assert now["via"] == later["via"]
    assert re.fullmatch("1.0 front, 1.1 faashound-[0-9a-f]{16}", now["via"])


def test_gateway_refuses_a_via_of_its_own_that_a_function_passes_on() -> None:
    with Receiver(always(200)) as receiver, System(f'[up]\nurl = "{receiver.url()}"') as system:
        system.request("GET", "/function/up")
        via = receiver.wait_for(1)[0].headers["via"]
        for area in ("function", "async-function"):
            assert system.request("POST", f"/{area}/up", headers={"Via": via}).status == 508
        assert len(receiver.received()) == 1
