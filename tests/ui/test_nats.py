"""The same page where the queue is on NATS: what a person does with it works, and what NATS cannot tell is said."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from testkit.browser import Browser
from testkit.nats_servers import Cluster
from tests.ui.kit import Shown
from tests.ui.test_browser import PATIENTLY_S, becomes, dead_letter, stay


@pytest.fixture(scope="module")
def system() -> Iterator[Shown]:
    with Cluster() as cluster:
        queue = {"queue_url": cluster.servers[0].url, "nats_prefix": f"t{uuid.uuid4().hex[:12]}"}
        with Shown(settings={**queue, "nats_max_bytes": "64MiB", "worker": "local"}) as system:
            yield system


def test_reader_watches_a_call_in_the_list_and_finds_it_by_its_id(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/calls?function=cat")
    browser.see("The queue is on NATS", ".hint")
    stay(browser)
    call_id = system.submit("cat", b"x", {"X-Delay": "6s"})
    browser.see("queued", f"tr[data-key='{call_id}']")
    browser.until(lambda: browser.all(f"tr[data-key='{call_id}']", "done"), "it is done in the list", PATIENTLY_S)
    assert browser.run("return window.stays")
    browser.open(f"{system.url}#/calls?id={call_id}")
    browser.until(lambda: len(browser.all("tbody tr")) == 1, "one call by its whole id")
    browser.open(f"{system.url}#/calls?id={call_id[:12]}")
    browser.see("No such calls")


def test_reader_finds_what_runs_and_cancels_it(browser: Browser, system: Shown) -> None:
    call_id = system.submit("slow")
    system.until(call_id, lambda status: status["state"] == "running")
    browser.open(f"{system.url}#/calls?state=running")
    browser.click(f"a[href='#/calls/{call_id}']")
    becomes(browser, "running")
    browser.click("button", "Cancel")
    browser.click("dialog button", "Cancel the call")
    becomes(browser, "cancelled")


def test_reader_tries_a_dead_letter_again_and_deletes_it(browser: Browser, system: Shown) -> None:
    call_id = dead_letter(system, "mended")
    first = system.status(call_id)["finished"]
    browser.open(f"{system.url}#/dead")
    browser.click(f"a[href='#/calls/{call_id}']")
    browser.see("exit status 1")
    browser.click("button", "Try again")
    system.until(call_id, lambda status: status["state"] == "dead" and status["finished"] != first)
    browser.until(lambda: not browser.all("dialog"), "no question")
    becomes(browser, "dead")
    browser.click("button", "Delete")
    browser.click("dialog button", "Delete")
    browser.find("h1", "Calls")
    assert system.request("GET", f"/async-function/{call_id}").status == 404


def test_overview_and_what_is_off(browser: Browser, system: Shown) -> None:
    browser.open(f"{system.url}#/")
    browser.see("Oldest", "dt")
    assert system.ask("/system/metrics")["queue"]["kind"] == "nats"
    browser.open(f"{system.url}#/secrets")
    browser.see("deploy=off", ".note")
    browser.open(f"{system.url}#/schedules")
    browser.see("@hourly", "td")
