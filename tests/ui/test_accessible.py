"""Every view passes axe-core's rules, wide and narrow, light and dark: contrast, names, roles, order of headings."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from testkit.browser import Browser
from tests.ui.kit import Shown, with_password

AXE = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
RUN = "const done = arguments[arguments.length - 1]; axe.run(document, {resultTypes: ['violations']}).then(done, done)"
VIEWS = ("", "functions", "functions/broken", "calls", "dead", "schedules", "secrets", "deploy", "nowhere")


def violations(browser: Browser) -> list[str]:
    """Return what axe-core finds wrong, a line for each element."""
    browser.run(AXE)
    found = browser.driver.execute_async_script(RUN)
    return [
        f"{each['id']}: {node['html'][:160]} {node['failureSummary'][:300]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_passes_the_rules_of_accessibility(browser: Browser, scheme: str) -> None:
    with Shown(settings={"deploy": "process"}) as system:
        dead = system.submit("broken", b"x", {"X-Callback-Url": "http://127.0.0.1:9/"})
        system.ended(dead)
        system.request("POST", "/function/cat", b"x")
        browser.prefer(scheme)
        for view in (*VIEWS, f"calls/{dead}"):
            browser.open("about:blank")
            browser.open(f"{system.url}#/{view}")
            browser.find("h1")
            assert violations(browser) == [], view
        browser.click("button", "Delete")
        browser.find("dialog[open]")
        assert violations(browser) == [], "a question"
        browser.open("about:blank")
    browser.prefer("light")


def test_login_passes_the_rules_of_accessibility(browser: Browser, tmp_path: Path) -> None:
    with Shown(settings=with_password(tmp_path)) as system:
        browser.open(system.url)
        browser.find("h1", "Log in")
        assert violations(browser) == []
        browser.open("about:blank")
