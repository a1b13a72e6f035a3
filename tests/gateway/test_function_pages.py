"""Web pages of functions and results in a real browser: they work, and do nothing in the name of the gateway's page."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from faashound.functions.exposure import BadExposure, parse_exposure
from faashound.serving.function_pages import SANDBOX_FIELD, fields_for_browsers, fields_of_result
from faashound.watchdog import Body, Request
from testkit.browser import Browser
from testkit.harness import raw
from testkit.system import Received, Receiver, Reply, System

SITE = """<!doctype html><title>a site</title><link rel="stylesheet" href="site/style.css">
<p id="styled">hello</p><img id="image" src="site/dot.svg" alt="">
<form method="POST" action="site/greet"><input name="who" value="you"><button>Greet</button></form>
<script src="site/page.js"></script>"""
PAGE_JS = "document.title = 'its script runs';"
STYLE = "#styled { color: rgb(1, 2, 3) }"
DOT = '<svg xmlns="http://www.w3.org/2000/svg" width="7" height="7"><rect width="7" height="7"/></svg>'
DEPLOYMENT = json.dumps({"service": "evil", "image": "process", "envProcess": "cat"})
# What a page tries in the gateway's name, at an address of the gateway, and what comes of it.
ATTEMPTS = """
const [base, deployment, done] = arguments;
const attempt = async (what) => { try { return await what(); } catch (error) { return error.name; } };
(async () => done({
  read: await attempt(async () => (await fetch(`${base}/system/functions`)).status),
  deploy: await attempt(async () => (await fetch(`${base}/system/functions`,
    {method: 'POST', headers: {'Content-Type': 'application/json'}, body: deployment})).status),
  blind: await attempt(async () => (await fetch(`${base}/system/functions`,
    {method: 'POST', mode: 'no-cors', body: deployment})).status),
  page: await attempt(async () => (await fetch(`${base}/ui/`)).status),
  own: await attempt(async () => (await fetch('/function/site/greet', {method: 'PUT', body: '{}'})).status),
  store: await attempt(async () => localStorage.length),
  worker: await attempt(async () =>
    (await navigator.serviceWorker.register('/function/site/page.js', {scope: '/'})).scope),
}))();
"""


def site(received: Received) -> Reply:
    path = received.path.partition("?")[0]
    fields = {"Service-Worker-Allowed": "/", "Clear-Site-Data": '"*"', "Content-Security-Policy": "object-src 'none'"}
    for end, media_type, body in (
        ("style.css", "text/css", STYLE),
        ("dot.svg", "image/svg+xml", DOT),
        ("page.js", "text/javascript", PAGE_JS),
    ):
        if path.endswith(end):
            return 200, fields | {"Content-Type": media_type}, body.encode()
    if received.method != "GET":
        return 200, fields | {"Content-Type": "text/html"}, b"greeted with " + received.body
    return 200, fields | {"Content-Type": "text/html"}, SITE.encode()


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with Receiver(site) as receiver:
        functions = f"""
[cat]
fprocess = "cat"

[site]
url = "{receiver.url("/fn")}"

[trusted]
url = "{receiver.url("/fn")}"
annotations = {{ "com.faashound.pages" = "trust" }}
"""
        with System(functions, {"deploy": "process"}) as system:
            yield system


@pytest.fixture(scope="module")
def open_system() -> Iterator[System]:
    """A gateway that others reach, by any name."""
    with Receiver(site) as receiver:
        functions = f'[site]\nurl = "{receiver.url("/fn")}"'
        with System(functions, {"host": "0.0.0.0", "worker": "none"}) as system:
            yield system


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        browser.driver.set_script_timeout(20)
        yield browser


def deployed(system: System) -> list[str]:
    return [function["name"] for function in json.loads(system.request("GET", "/system/functions").body)]


def attempts(browser: Browser, base: str = "") -> dict[str, object]:
    found: dict[str, object] = browser.driver.execute_async_script(ATTEMPTS, base, DEPLOYMENT)
    return found


def origin(browser: Browser) -> str:
    return str(browser.run("return self.origin"))


def places(browser: Browser) -> list[str]:
    """Return the addresses of all windows, in order; of one that is still on its way, none."""
    found = []
    for handle in browser.driver.window_handles:
        browser.driver.switch_to.window(handle)
        found.append(str(browser.run("return document.readyState === 'complete' ? location.href : ''")))
    return sorted(found)


def see_it_work(browser: Browser) -> None:
    browser.until(lambda: browser.run("return document.title") == "its script runs", "its script")
    colour = "return getComputedStyle(document.getElementById('styled')).color"
    browser.until(lambda: browser.run(colour) == "rgb(1, 2, 3)", "its style")
    browser.until(lambda: browser.run("return document.getElementById('image').naturalWidth") == 7, "its image")
    browser.click("button", "Greet")
    browser.see("greeted with who=you")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_page_of_a_function_works_at_an_origin_of_its_own(system: System, browser: Browser, host: str) -> None:
    base = f"http://{host}:{system.port}"
    browser.open(f"{base}/function/site?x=1")
    assert browser.driver.current_url == f"http://functions.localhost:{system.port}/function/site?x=1"
    found = attempts(browser, base)
    assert found == {
        **dict.fromkeys(("read", "deploy", "page"), "TypeError"),
        "blind": 0,
        "own": 200,
        "store": 0,
        "worker": "SecurityError",
    }
    found = attempts(browser)
    assert [found[name] for name in ("read", "deploy", "blind", "page")] == [404] * 4
    assert "evil" not in deployed(system)
    see_it_work(browser)


def test_page_of_a_function_works_in_its_sandbox_where_it_has_no_origin_of_its_own(
    open_system: System, browser: Browser
) -> None:
    browser.open(f"http://gateway.localhost:{open_system.port}/function/site")
    assert origin(browser) == "null"
    found = attempts(browser)
    assert found == {
        **dict.fromkeys(("read", "deploy", "page", "own"), "TypeError"),
        "blind": 0,
        "store": "SecurityError",
        "worker": "SecurityError",
    }
    see_it_work(browser)


def test_page_that_a_sandboxed_page_opens_has_no_more_rights(open_system: System, browser: Browser) -> None:
    site_url = f"http://gateway.localhost:{open_system.port}/function/site"
    browser.open(site_url)
    for url in ("about:blank", "/function/site"):
        browser.run("window.open(arguments[0])", url)
    browser.until(lambda: places(browser) == ["about:blank", site_url, site_url], "both are open, and where they go")
    for handle in browser.driver.window_handles:
        browser.driver.switch_to.window(handle)
        browser.until(lambda: origin(browser) == "null", "no origin")
        assert attempts(browser, f"http://gateway.localhost:{open_system.port}")["read"] == "TypeError"


def test_trusted_page_has_our_origin_and_still_no_worker_over_it(system: System, browser: Browser) -> None:
    base = f"http://127.0.0.1:{system.port}"
    browser.open(f"{base}/function/trusted")
    found = attempts(browser)
    assert (origin(browser), found["read"], found["store"], found["worker"]) == (base, 200, 0, "SecurityError")


def test_answer_that_a_browser_may_keep_and_show_later_is_sandboxed(system: System) -> None:
    for headers in ({}, {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Site": "same-origin"}, {"Host": "gateway.localhost"}):
        answer = system.request("GET", "/function/site", headers=headers)
        assert (answer.status, answer.text) == (200, SITE)
        assert "allow-scripts" in answer.headers["content-security-policy"]


@pytest.mark.parametrize(
    ("method", "host", "headers", "led"),
    [
        ("GET", "localhost:8080", {}, "http://functions.localhost:8080/function/site?x"),
        ("HEAD", "LOCALHOST", {}, "http://functions.localhost/function/site?x"),
        ("GET", "[::1]:80", {}, "http://functions.localhost:80/function/site?x"),
        ("POST", "localhost:8080", {}, None),
        ("GET", "localhost:8080", {"X-Forwarded-Proto": "https"}, None),
        ("GET", "functions.localhost:8080", {}, None),
        ("GET", "192.0.2.1:8080", {}, None),
    ],
)
def test_browser_is_led_to_the_place_of_pages_where_there_is_one(
    system: System, method: str, host: str, headers: dict[str, str], led: str | None
) -> None:
    fields = {"Host": host, "Sec-Fetch-Mode": "navigate", **headers}
    answer = system.request(method, "/function/site?x", headers=fields)
    assert (answer.status, answer.headers.get("location")) == ((200, None) if led is None else (307, led))


def test_place_of_pages_has_functions_and_nothing_else(system: System) -> None:
    for path in ("/system/functions", "/ui/", "/", "/healthz", "/async-function/site"):
        for host in ("functions.localhost", f"Functions.LOCALHOST:{system.port}"):
            assert system.request("GET", path, headers={"Host": host}).status == 404


def test_stored_result_never_runs_as_a_page(system: System, browser: Browser) -> None:
    base = f"http://127.0.0.1:{system.port}"
    script = f"""const request = new XMLHttpRequest();
      request.open('POST', '/system/functions', false);
      request.setRequestHeader('Content-Type', 'application/json');
      request.send({json.dumps(DEPLOYMENT.replace("evil", "stored"))});"""
    body = f"<script>{script}</script>".encode()
    call_id = system.submit("cat", body, {"Content-Type": "text/html"})
    system.ended(call_id)
    path = f"/async-function/{call_id}/result"
    answer = system.request("GET", path)
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, "text/html", body)
    assert answer.headers["content-security-policy"] == "sandbox"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-disposition"] == "attachment"
    browser.open(f"{base}{path}")
    assert "stored" not in deployed(system)


def test_service_worker_of_a_function_is_below_it(system: System) -> None:
    fields = {"Service-Worker": "script"}
    for path in ("/function/site", "/async-function/site", "/function/site.openfaas-fn?x=/", "/system/functions"):
        assert system.request("GET", path, headers=fields).status == 403, path
    assert system.request("GET", "/function/site/page.js", headers=fields).status == 200


def test_callers_get_no_field_of_a_function_that_speaks_of_the_whole_origin(system: System) -> None:
    for name in ("site", "trusted"):
        answer = system.request("GET", f"/function/{name}/page.js")
        assert answer.text == PAGE_JS
        assert {"service-worker-allowed", "clear-site-data"}.isdisjoint(answer.headers)
    call_id = system.submit("site")
    system.ended(call_id)
    result = system.request("GET", f"/async-function/{call_id}/result")
    assert (result.status, "service-worker-allowed" in result.headers) == (200, False)


def test_functions_policy_holds_besides(system: System) -> None:
    head = b"GET /function/site HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = raw(system.port, head).lower()
    assert answer.count(b"\r\ncontent-security-policy: ") == 2
    assert b"object-src 'none'" in answer


def test_setting_trusts_the_pages_of_all_functions_but_those_that_say_otherwise() -> None:
    with Receiver(site) as receiver:
        up = f'url = "{receiver.url()}"'
        functions = f'[site]\n{up}\n[boxed]\n{up}\nannotations = {{ "com.faashound.pages" = "sandbox" }}'
        with System(functions, {"function_pages": "trust", "worker": "none"}) as system:
            trusted, boxed = (system.request("GET", f"/function/{name}") for name in ("site", "boxed"))
    assert "sandbox" not in trusted.headers["content-security-policy"]
    assert "sandbox" in boxed.headers["content-security-policy"]


def test_bad_annotation_says_what_is_allowed() -> None:
    with pytest.raises(BadExposure, match=r"com\.faashound\.pages: 'own': allowed: sandbox, trust"):
        parse_exposure({"com.faashound.pages": "own"})


@pytest.mark.parametrize(
    ("types", "boxed"),
    [
        ([b"application/json"], False),
        ([b"Text/Plain; charset=utf-8"], False),
        *(([each], True) for each in (b"text/html", b"image/svg+xml", b"application/xml", b"x", b"", b"*/*")),
        ([], True),
        ([b"text/plain, text/html"], True),
        ([b"text/plain", b"text/html"], True),
    ],
)
def test_answer_is_sandboxed_unless_no_browser_makes_a_page_of_it(types: list[bytes], boxed: bool) -> None:
    fields = [(b"Content-Type", each) for each in types]
    request = Request("GET", b"/", b"/", b"", b"localhost", (), Body(0, lambda: None))
    assert fields_for_browsers(request, fields, is_trusted=False) == ([*fields, SANDBOX_FIELD] if boxed else fields)
    assert fields_for_browsers(request, fields, is_trusted=True) == fields


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [b"attachment"]),
        ([b"inline; filename=x.html"], [b"attachment"]),
        ([b'Attachment; filename="x.pdf"'], [b'Attachment; filename="x.pdf"']),
        ([b"attachment", b"inline"], [b"attachment"]),
    ],
)
def test_result_is_saved_under_the_name_that_it_has(given: list[bytes], expected: list[bytes]) -> None:
    fields = fields_of_result([(b"content-disposition", value) for value in given])
    assert [value for name, value in fields if name.lower() == b"content-disposition"] == expected
