"""The page in a real browser, wide and narrow: what a person does with it, and sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from faashound.serving.followers import MAX_OF_ADDRESS_COUNT
from testkit.browser import Browser, tabs_to
from testkit.harness import free_port, wait_until
from tests.ui.kit import PASSWORD, Shown, with_password
from tests.ui.test_events import Reader, readers_with_places

PATIENTLY_S = 30.0  # for what takes attempts, or a restart


def state_of(browser: Browser) -> str:
    """Return the state of the call that is shown whole."""
    found = browser.all(".identity .state")
    return found[0].text if found else ""


def becomes(browser: Browser, state: str) -> None:
    browser.until(lambda: state_of(browser) == state, f"the call shown is {state}", PATIENTLY_S)


def stay(browser: Browser) -> None:
    """Mark the page, so that one can tell whether it was loaded anew."""
    browser.run("window.stays = true")


def dead_letter(system: Shown, function: str = "broken") -> str:
    call_id = system.submit(function, b"the payload", {"X-Trace": "abc"})
    assert system.ended(call_id)["state"] == "dead"
    return call_id


def rows(browser: Browser) -> list[str]:
    return [row.text for row in browser.all("tbody tr")]


def test_reader_calls_a_function_and_sees_what_it_answers(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/functions")
    browser.click("td a", "cat")
    browser.type("textarea[name=body]", "hello <there>")
    browser.click("form.panel button", "Call")
    browser.see("hello <there>", "pre")
    browser.see("200", "form.panel b")
    browser.open(f"{system.url}#/functions/broken")
    browser.see("broken", "h1")
    browser.click("form.panel button", "Call")
    browser.see("500", "form.panel b.bad")
    browser.see("exit status 3", "pre")


def test_reader_watches_a_later_call_from_queued_to_done_without_reloading(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/functions/cat")
    stay(browser)
    browser.click("label", "later")
    browser.type("textarea[name=body]", "some day")
    browser.type("input[name=delay]", "6s")
    browser.click("form.panel button", "Call")
    browser.click("form.panel a[href*='#/calls/']")
    becomes(browser, "queued")
    becomes(browser, "done")
    browser.see("some day", "pre")
    assert browser.run("return window.stays")


def test_reader_sees_new_calls_come_into_the_list_and_change(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/calls?function=mended")
    browser.find("h1", "Calls")
    stay(browser)
    call_id = system.submit("mended", b"x", {"X-Delay": "6s"})
    browser.see("queued", f"tr[data-key='{call_id}']")
    browser.until(lambda: browser.all(f"tr[data-key='{call_id}']", "dead"), "it is dead in the list", PATIENTLY_S)
    assert browser.run("return window.stays")


def test_reader_opens_a_dead_letter_sees_why_and_tries_it_again(browser: Browser, system: Shown) -> None:
    mended = system.temporary / "mended"
    mended.unlink(missing_ok=True)
    call_id = dead_letter(system, "mended")
    browser.open(f"{system.url}#/dead")
    browser.click(f"a[href='#/calls/{call_id}']")
    becomes(browser, "dead")
    for text in ("status 500", "the payload", "exit status 1"):
        browser.see(text)
    browser.click("summary", "headers of the request")
    browser.see("abc", "td")
    mended.touch()
    browser.click("button", "Try again")
    becomes(browser, "done")
    mended.unlink()


def test_call_shows_the_lines_that_it_left(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/calls/{dead_letter(system)}")
    browser.see("the disk is on fire", "pre.log")


def test_reader_filters_calls_and_finds_them_by_the_address(browser: Browser, system: Shown) -> None:
    broken, done = dead_letter(system), system.submit("cat", b"x")
    system.ended(done)
    browser.open(f"{system.url}#/calls")
    browser.choose("select[name=state]", "dead")
    browser.until(lambda: browser.all(f"tr[data-key='{broken}']") and not browser.all(f"tr[data-key='{done}']"), "dead")
    browser.type("input[name=function]", "cat")
    browser.press(Keys.ENTER)
    browser.see("No such calls")
    assert browser.run("return location.hash") == "#/calls?function=cat&state=dead"
    browser.open("about:blank")
    browser.open(f"{system.url}#/calls?id={done[:20]}")
    browser.until(lambda: len(rows(browser)) == 1 and browser.all(f"tr[data-key='{done}']"), "one call by its id")
    browser.type("input[name=id]", "xyz")
    browser.press(Keys.ENTER)
    browser.see("eight of its characters")


def test_reader_reads_older_calls_page_by_page(browser: Browser, system: Shown) -> None:
    made = [system.submit("ticks", b"x") for _ in range(60)]
    system.ended(made[-1])
    browser.open(f"{system.url}#/calls?function=ticks")
    browser.until(lambda: len(rows(browser)) == 50, "the first page")
    browser.click("button", "Older calls")
    browser.until(lambda: browser.all(f"tr[data-key='{made[0]}']"), "the oldest")


@pytest.mark.parametrize(
    ("function", "headers", "state"), [("slow", {}, "running"), ("cat", {"X-Delay": "1h"}, "queued")]
)
def test_reader_cancels_a_call_after_a_question(
    browser: Browser, system: Shown, function: str, headers: dict[str, str], state: str
) -> None:
    call_id = system.submit(function, b"x", headers)
    browser.open(f"{system.url}#/calls/{call_id}")
    becomes(browser, state)
    browser.click("button", "Cancel")
    browser.click("dialog button", "Keep")
    browser.until(lambda: not browser.all("dialog"), "the question is gone")
    assert system.status(call_id)["state"] == state
    browser.click("button", "Cancel")
    browser.click("dialog button", "Cancel the call")
    becomes(browser, "cancelled")


def test_reader_deletes_a_dead_letter_after_a_question(browser: Browser, system: Shown) -> None:
    call_id = dead_letter(system)
    browser.open(f"{system.url}#/dead")
    browser.click(f"tr[data-key='{call_id}'] button", "Delete")
    browser.find("dialog", "cannot be undone")
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all("dialog"), "Escape keeps it")
    assert system.status(call_id)["state"] == "dead"
    browser.click(f"tr[data-key='{call_id}'] button", "Delete")
    browser.click("dialog button", "Delete")
    browser.until(lambda: not browser.all(f"tr[data-key='{call_id}']"), "its row is gone")
    assert system.request("GET", f"/async-function/{call_id}").status == 404


def test_overview_tells_what_is_not_well_and_draws_the_hour(browser: Browser, system: Shown) -> None:
    dead_letter(system)
    browser.open(f"{system.url}#/")
    browser.see("for a decision", ".wellness")
    browser.see("broken", "section table")
    browser.find("svg.chart rect.red")
    labels = browser.run(
        "return [...document.querySelectorAll('svg.chart')].map(each => each.getAttribute('aria-label'))"
    )
    assert [label.partition(" over")[0] for label in labels] == [
        "Calls per minute",
        "Calls that wait or run,",
        "How long the oldest due call has waited,",
    ]


def test_view_says_what_is_turned_off_and_what_there_is(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/secrets")
    browser.see("deploy=off", ".note")
    browser.open(f"{system.url}#/schedules")
    browser.see("@hourly", "td")
    browser.open(f"{system.url}#/functions")
    browser.find("h1", "Functions")
    assert not browser.all("a", "Deploy a function")
    browser.open(f"{system.url}#/calls/00000000-0000-7000-8000-000000000000")
    browser.see("no call has the id", ".note")
    browser.open(f"{system.url}#/nowhere")
    browser.see("no such view", "h1")


def test_page_is_as_wide_as_the_window_in_every_view(browser: Browser, system: Shown) -> None:
    call_id = dead_letter(system)
    for view in ("", "functions", "functions/cat", "calls", f"calls/{call_id}", "dead", "schedules", "secrets"):
        browser.open("about:blank")
        browser.open(f"{system.url}#/{view}")
        browser.find("h1")
        wide, window = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= window, view


def test_everything_is_reached_by_the_keyboard(browser: Browser, system: Shown) -> None:
    browser.open("about:blank")
    browser.open(f"{system.url}#/functions")
    browser.find("td a", "cat")
    browser.run("document.activeElement.blur(); document.getElementById('skip').focus()")
    assert browser.focused() == "Skip to content"
    tabs_to(browser, "Functions")
    tabs_to(browser, "cat")

    def entered() -> bool:
        if browser.focused() == "cat":  # the key may fall into the moment in which the table is drawn anew
            browser.press(Keys.ENTER)
        return bool(browser.all("h1", "cat"))

    browser.until(entered, "the page of cat")
    browser.until(lambda: browser.focused() == "cat", "the heading has the focus")
    browser.until(lambda: browser.all("textarea[name=body]"), "the form")
    tabs_to(browser, "body")
    browser.press("by hand")
    tabs_to(browser, "Call")
    browser.press(Keys.ENTER)
    browser.see("by hand", "pre")
    browser.run("document.querySelector('h1').focus()")
    browser.open(f"{system.url}#/functions")
    browser.find("td a", "cat")
    browser.press("/")
    browser.until(
        lambda: browser.run("return document.activeElement.type") == "search", "the slash leads to the search"
    )


def test_times_are_the_readers_and_the_exact_ones_are_told_beside(browser: Browser, system: Shown) -> None:
    browser.tell("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    try:
        call_id = dead_letter(system)
        accepted = system.status(call_id)["accepted"]
        browser.open(f"{system.url}#/calls/{call_id}")
        time = f"time[datetime='{accepted}']"
        hour = (int(accepted[11:13]) + 9) % 24
        browser.until(lambda: browser.find(time).text.startswith(f"{hour:02d}:"), "the reader's hour")
        browser.until(lambda: accepted in (browser.find(time).get_attribute("title") or ""), "the exact time")
    finally:
        browser.tell("Emulation.setTimezoneOverride", {"timezoneId": ""})


@pytest.fixture
def crowd(system: Shown) -> Iterator[list[Reader]]:
    """As many readers of events as there may be."""
    readers = readers_with_places(system, ["127.0.0.1"] * MAX_OF_ADDRESS_COUNT)
    yield readers
    for reader in readers:
        reader.close()


def test_page_asks_from_time_to_time_where_events_are_not_to_be_had(
    browser: Browser, system: Shown, crowd: list[Reader]
) -> None:
    wait_until(lambda: system.request("GET", "/system/events").status == 503, 15.0, "no place for another reader")
    browser.open(f"{system.url}#/calls?function=cat")
    browser.see("Asking every 3 s", "#link")
    call_id = system.submit("cat", b"x")
    browser.until(lambda: browser.all(f"tr[data-key='{call_id}']", "done"), "it comes all the same", PATIENTLY_S)
    for reader in crowd:
        reader.close()
    browser.until(lambda: browser.all("#link", "Live"), "events again", PATIENTLY_S)


def test_page_survives_a_restart_of_the_gateway(browser: Browser, tmp_path: Path) -> None:
    settings = {"port": str(free_port()), "state": str(tmp_path / "state")}
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        first = system.submit("cat", b"x")
        browser.open(f"{system.url}#/calls")
        browser.see("Live", "#link")
        browser.see("done", f"tr[data-key='{first}']")
        stay(browser)
    browser.until(lambda: browser.all("#link", "No connection"), "the page says that nothing answers", PATIENTLY_S)
    assert browser.all(f"tr[data-key='{first}']"), "what was known is still there"
    with Shown(settings=settings, spool=tmp_path / "spool") as system:
        second = system.submit("cat", b"x")
        browser.until(lambda: browser.all("#link", "Live"), "it is live again", PATIENTLY_S)
        browser.until(lambda: browser.all(f"tr[data-key='{second}']", "done"), "and up to date", PATIENTLY_S)
        assert browser.run("return window.stays")
        browser.open("about:blank")


def test_page_says_so_where_a_part_of_it_does_not_come(browser: Browser, system: Shown) -> None:
    browser.tell("Network.enable", {})
    browser.tell("Network.setCacheDisabled", {"cacheDisabled": True})
    try:
        browser.tell("Network.setBlockedURLs", {"urls": ["*/ui/format.js"]})
        browser.open(f"{system.url}#/functions")
        browser.see("Part of this page is missing", "main")
        browser.tell("Network.setBlockedURLs", {"urls": []})
        browser.driver.refresh()
        browser.see("cat", "td a")
        browser.complaints()  # of what was blocked
    finally:
        browser.tell("Network.disable", {})


def test_reader_logs_in_is_refused_and_logs_out(browser: Browser, tmp_path: Path) -> None:
    with Shown(settings=with_password(tmp_path)) as system:
        browser.open(f"{system.url}#/functions")
        browser.see("Log in", "h1")
        browser.type("input[name=user]", "admin")
        browser.type("input[name=password]", "wrong")
        browser.press(Keys.ENTER)
        browser.see("do not fit: basic-auth-users", "[role=alert]")
        browser.type("input[name=password]", PASSWORD)
        browser.press(Keys.ENTER)
        browser.see("cat", "td")
        browser.see("Live", "#link")
        kept: dict[str, Any] = browser.run(
            "return {address: location.href, local: {...localStorage}, session: {...sessionStorage},"
            " cookie: document.cookie}"
        )
        assert kept == {"address": f"{system.url}#/functions", "local": {}, "session": {}, "cookie": ""}
        browser.click("td a", "cat")
        browser.click("form.panel button", "Call")
        browser.see("200", "form.panel b")
        browser.click("button", "Log out")
        browser.see("Log in", "h1")
        assert "cat" not in browser.text()
        browser.driver.refresh()
        browser.see("Log in", "h1")
        browser.open("about:blank")


def test_function_is_not_told_the_password(browser: Browser, tmp_path: Path) -> None:
    with Shown("[env]\nfprocess = 'env'", settings=with_password(tmp_path)) as system:
        browser.open(f"{system.url}#/functions/env")
        browser.type("input[name=user]", "admin")
        browser.type("input[name=password]", PASSWORD)
        browser.press(Keys.ENTER)
        browser.click("form.panel button", "Call")
        browser.see("Http_User_Agent", "pre")
        assert "Http_Authorization" not in browser.text()
        browser.open("about:blank")


def test_reader_deploys_changes_and_removes_a_function_and_keeps_secrets(browser: Browser, tmp_path: Path) -> None:
    with Shown(settings={"deploy": "process", "state": str(tmp_path / "state")}) as system:
        browser.open(f"{system.url}#/secrets")
        browser.click("button", "New secret")
        browser.type("dialog input[name=name]", "api-key")
        browser.type("dialog textarea[name=value]", "s3cret-value")
        browser.click("dialog button", "Save")
        browser.see("api-key", "td")
        assert "s3cret-value" not in browser.text()

        browser.open(f"{system.url}#/functions")
        browser.click("a", "Deploy a function")
        browser.type("input[name=service]", "fresh")
        browser.type("input[name=envProcess]", "no-such-program")
        browser.click("button", "Deploy")
        browser.see("no-such-program", "[role=alert]")
        browser.type("input[name=envProcess]", "env")
        browser.type("textarea[name=envVars]", "GREETING=hello=you")
        browser.click("label", "api-key")
        browser.click("button", "Deploy")
        browser.find("h1", "fresh")
        browser.click("form.panel button", "Call")
        browser.see("GREETING=hello=you", "pre")

        browser.click("a", "Change")
        browser.find("h1", "Change fresh")
        browser.type("textarea[name=envVars]", "GREETING=bye")
        browser.click("button", "Change")
        browser.until(lambda: browser.all("h1") and browser.all("h1")[0].text == "fresh", "it is changed", PATIENTLY_S)
        browser.click("form.panel button", "Call")
        browser.see("GREETING=bye", "pre")

        browser.click("button", "Remove")
        browser.click("dialog button", "Remove")
        browser.find("h1", "Functions")
        assert system.request("POST", "/function/fresh").status == 404
        browser.open(f"{system.url}#/secrets")
        browser.click("td button", "Delete")
        browser.click("dialog button", "Delete")
        browser.see("No secrets")
        browser.open("about:blank")


def test_reader_scales_a_function(browser: Browser, system: Shown) -> None:
    browser.open("about:blank")
    browser.open(f"{system.url}#/functions/cat")
    browser.click("button", "Scale")
    browser.type("dialog input[name=replicas]", "2")
    browser.click("dialog button", "Scale")
    browser.until(lambda: not browser.all("dialog"), "the question is answered")
    assert system.ask("/system/function/cat")["replicas"] == 2
    browser.click("button", "Scale")
    browser.type("dialog input[name=replicas]", "100000")
    browser.click("dialog button", "Scale")
    browser.find("dialog [role=alert]")
    browser.press(Keys.ESCAPE)
    browser.until(lambda: not browser.all("dialog"), "Escape closes it")
