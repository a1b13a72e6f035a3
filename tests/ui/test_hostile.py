"""Whatever a function, a header or a caller writes is data on the page: shown as it is, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver.common.keys import Keys

from testkit.browser import Browser
from tests.ui.kit import Shown

MARKUP = (
    "<img src=x onerror=window.pwned=1>",
    "<script>window.pwned=1</script>",
    "\"'><svg onload=window.pwned=1>",
    "</pre></textarea><iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "&lt;b&gt;&#x202e;",
    "javascript:window.pwned=1",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1}",
)
TRICKS = {  # and how they are shown
    "\u202egnp.exe": "⟨U+202E⟩gnp.exe",
    "a\x00b\x1b[31mc\x7f": "a␀b␛[31mc␡",
    "\u200bzero\ufeff": "⟨U+200B⟩zero⟨U+FEFF⟩",
    "\u2066isolated\u2069": "⟨U+2066⟩isolated⟨U+2069⟩",
    "line\u2028separator": "line⟨U+2028⟩separator",
}
LARGE = "<b>x</b>" * 131072  # 1 MiB
FUNCTIONS = """
[say]  # answers with what it was sent, says it on stderr and in a header
fprocess = "sh -c 'tee /dev/stderr'"
combine_output = false

[fail]
fprocess = "sh -c 'cat; exit 1'"

[site]  # serves a page, of the same origin since it is trusted
fprocess = "echo hello"
content_type = "text/html"
annotations."com.faashound.pages" = "trust"

[annotated]
fprocess = "cat"
annotations."<img src=x onerror=window.pwned=1>" = "<script>window.pwned=1</script>"
"""


@pytest.fixture(scope="module")
def hostile() -> Iterator[Shown]:
    with Shown(FUNCTIONS) as system:
        yield system


def harmless(browser: Browser) -> None:
    """Assert that nothing was run, nothing was made an element, and nothing is wider than the window."""
    found = browser.run(
        "return {pwned: window.pwned ?? null,"
        " alien: document.querySelectorAll('main :is(img, script, iframe), [onload], [onerror], [onclick]').length,"
        " raw: /[\\u202a-\\u202e\\u2066-\\u2069\\u0000-\\u0008]/.test(document.body.textContent),"
        " wide: document.documentElement.scrollWidth > innerWidth}"
    )
    assert found == {"pwned": None, "alien": 0, "raw": False, "wide": False}


@pytest.mark.parametrize("text", [*MARKUP, *TRICKS], ids=range(len(MARKUP) + len(TRICKS)))
def test_page_shows_a_payload_a_result_and_log_lines_as_they_are(browser: Browser, hostile: Shown, text: str) -> None:
    call_id = hostile.submit("say", text.encode())
    hostile.ended(call_id)
    browser.open(f"{hostile.url}#/calls/{call_id}")
    shown = TRICKS.get(text, text)
    browser.until(lambda: len(browser.all("pre", shown)) >= 2, "payload and result")
    browser.find("pre.log")
    harmless(browser)


def test_page_shows_headers_paths_queries_and_keys_as_they_are(browser: Browser, hostile: Shown) -> None:
    fields = {f"X-Evil-{number}": text for number, text in enumerate(MARKUP)}
    fields |= {
        "Idempotency-Key": MARKUP[0],
        "X-Callback-Url": "http://127.0.0.1:9/?<img/src=x>",
        "User-Agent": MARKUP[1],
    }
    path = "fail/%3Cimg%20src=x%20onerror=pwned=1%3E?q=<script>pwned=1</script>"
    answer = hostile.request("POST", f"/async-function/{path}", b"x", fields)
    if answer.status != 202:  # what no request line or URL may hold is refused there, and never gets here
        fields.pop("X-Callback-Url")
        answer = hostile.request("POST", "/async-function/fail/%3Cimg%20src=x%3E?q=%3Cscript%3E", b"x", fields)
    assert answer.status == 202, answer
    call_id = answer.headers["x-call-id"]
    hostile.ended(call_id)
    browser.open(f"{hostile.url}#/calls/{call_id}")
    browser.click("summary", "headers of the request")
    for text in MARKUP:
        browser.see(text, "td")
    browser.see(MARKUP[0], ".facts")
    harmless(browser)


def test_page_shows_the_answer_of_a_function_as_it_is(browser: Browser, hostile: Shown) -> None:
    browser.open(f"{hostile.url}#/functions/say")
    for text in (MARKUP[0], MARKUP[3]):
        browser.type("textarea[name=body]", text)
        browser.click("form.panel button", "Call")
        browser.see(text, "form.panel pre")
        harmless(browser)


def test_page_shows_annotations_and_an_address_as_they_are(browser: Browser, hostile: Shown) -> None:
    browser.open(f"{hostile.url}#/functions/annotated")
    browser.see("<img src=x onerror=window.pwned=1>: <script>window.pwned=1</script>", ".facts")
    harmless(browser)
    for address in (
        "#/functions/%3Cimg%20src=x%20onerror=pwned=1%3E",
        "#/calls?function=%3Cscript%3E&state=%22",
        "#/calls/%E0%A4%A",
    ):
        browser.open("about:blank")
        browser.open(f"{hostile.url}{address}")
        browser.find("h1")
        harmless(browser)


def test_page_shows_the_beginning_of_a_megabyte_and_the_rest_when_asked(browser: Browser, hostile: Shown) -> None:
    call_id = hostile.submit("say", LARGE.encode())
    hostile.ended(call_id)
    browser.open(f"{hostile.url}#/calls/{call_id}")
    browser.see("The first 64.0 KiB of 1.0 MiB")
    browser.click("button", "Show all 65,536 characters")
    browser.until(
        lambda: (
            browser.run("return Math.max(...[...document.querySelectorAll('pre')].map(e => e.textContent.length))")
            >= 65536
        ),
        "all that the gateway tells",
    )
    harmless(browser)
    browser.open(f"{hostile.url}#/functions/say")
    browser.find("textarea[name=body]")
    browser.run("document.querySelector('textarea[name=body]').value = arguments[0]", LARGE)
    browser.click("form.panel button", "Call")
    browser.see("Only the beginning is shown", "form.panel")
    harmless(browser)


def test_page_shows_bytes_that_are_no_text_as_base64(browser: Browser, hostile: Shown) -> None:
    call_id = hostile.submit("say", b"\xff\xfe\x00<img>")
    hostile.ended(call_id)
    browser.open(f"{hostile.url}#/calls/{call_id}")
    browser.see("//4APGltZz4=", "pre")
    harmless(browser)


def test_id_in_the_filter_is_never_a_path(browser: Browser, hostile: Shown) -> None:
    browser.open(f"{hostile.url}#/calls")
    browser.type("input[name=id]", "../../healthz")
    browser.press(Keys.ENTER)
    browser.see("eight of its characters")
    harmless(browser)


def test_policy_stops_markup_and_scripts_that_a_fault_of_ours_would_let_in(hostile: Shown) -> None:
    with Browser() as browser:  # of its own, since its console complains, as it should
        browser.open(hostile.url)
        browser.find("h1")
        refused = browser.run(
            "let refused = 0;"
            "try { document.body.innerHTML = arguments[0]; } catch { refused += 1; }"
            "try { const s = document.createElement('script'); s.src = '/function/say'; } catch { refused += 1; }"
            "try { document.createElement('script').textContent = 'window.pwned = 1'; } catch { refused += 1; }"
            "return [refused, window.pwned ?? null]",
            MARKUP[0],
        )
        assert refused == [3, None]


def test_page_that_a_function_serves_gets_no_hold_of_ours(hostile: Shown) -> None:
    with Browser() as browser:
        browser.open(f"http://127.0.0.1:{hostile.port}/function/site")
        browser.see("hello")
        browser.run("window.other = window.open('/ui/')")
        browser.until(lambda: len(browser.driver.window_handles) == 2, "our page is open")
        browser.until(lambda: browser.run("return window.other.closed"), "and out of reach of the one that opened it")
        browser.run(
            "document.body.append(Object.assign(document.createElement('iframe'), {src: '/ui/', id: 'framed'}))"
        )
        framed = (
            "try { return document.getElementById('framed').contentDocument?.querySelector('main') ?? null }"
            " catch { return null }"
        )
        browser.until(lambda: browser.complaints(), "the frame is refused, and the console says so")
        assert browser.run(framed) is None
