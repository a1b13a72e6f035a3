"""A stranger's page in a real browser, whose user has a gateway that is deployed to: it changes and calls nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from testkit.browser import Browser
from testkit.system import Receiver, System, always

# Each way a page has: asking for permission (a preflight), not asking, and a form, which may be sent anywhere.
PAGE = """<!doctype html><title>a stranger</title>
<form id="form" method="POST" enctype="text/plain" target="frame">
  <input name='{"service":"form","x":"' value='"}'>
</form>
<iframe name="frame"></iframe>
<script>
async function attempt(url, options) {
  try { const answer = await fetch(url, options); return answer.type + " " + answer.status; }
  catch (error) { return String(error.name); }
}
function send(url) {
  document.getElementById("form").action = url;
  document.getElementById("form").submit();
}
</script>"""
EVIL = json.dumps({"service": "evil", "image": "process", "envProcess": "cat"})


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System('[cat]\nfprocess = "cat"', {"deploy": "process", "worker": "none"}) as system:
        yield system


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Receiver(always(200, {"Content-Type": "text/html"}, PAGE.encode())) as stranger, Browser() as browser:
        browser.open(stranger.url("/"))
        yield browser


def attempt(browser: Browser, url: str, **options: object) -> str:
    """Return what the page is told of a request that it makes."""
    browser.driver.set_script_timeout(20)
    script = "const done = arguments[2]; attempt(arguments[0], arguments[1]).then(done)"
    return str(browser.driver.execute_async_script(script, url, options))


def deployed(system: System) -> list[str]:
    found = json.loads(system.request("GET", "/system/functions").body)
    return [function["name"] for function in found if function["name"] != "cat"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_strangers_page_deploys_nothing_whichever_way_it_tries(system: System, browser: Browser, host: str) -> None:
    url, refused = f"http://{host}:{system.port}/system/functions", "Refused [POST] /system/functions - [403]"
    before = system.log().count(refused)
    as_json = {"Content-Type": "application/json"}
    assert attempt(browser, url, method="POST", body=EVIL, headers=as_json) == "TypeError"
    assert attempt(browser, url, method="PUT", body=EVIL, headers=as_json) == "TypeError"
    system.wait_log("Refused [OPTIONS] /system/functions - [403]")
    assert attempt(browser, url, method="POST", body=EVIL, mode="no-cors") == "opaque 0"
    browser.run("send(arguments[0])", url)
    browser.until(lambda: system.log().count(refused) == before + 2, "both are refused")
    assert deployed(system) == []


def test_strangers_page_reads_and_calls_nothing(system: System, browser: Browser) -> None:
    base = f"http://127.0.0.1:{system.port}"
    assert attempt(browser, f"{base}/system/functions") == "TypeError"
    assert attempt(browser, f"{base}/function/cat", method="POST", body="x") == "TypeError"
    system.wait_log("Refused [POST] /function/cat - [403]")


def test_name_that_leads_to_us_is_none_of_ours(system: System) -> None:
    """What DNS rebinding comes to: the page's own name in Host, and no Origin that would tell."""
    headers = {
        "Host": f"evil.example:{system.port}",
        "Sec-Fetch-Site": "same-origin",
        "Content-Type": "application/json",
    }
    answer = system.request("POST", "/system/functions", EVIL.encode(), headers)
    assert answer.status == 421
    assert deployed(system) == []
