"""A real browser for tests of the page: Chromium without a window, driven through its own driver.

    with Browser(width=1400) as browser:
        browser.open(f"http://127.0.0.1:{system.port}/ui/")
        browser.click("button", "Call")
        browser.see("hello")
        assert browser.complaints() == []

Everything waits for a condition, never for a time; `see` and `find` poll until what they name is there.  The browser
has a profile of its own, and reaches nothing but this machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from selenium import webdriver
from selenium.common.exceptions import (
    ElementNotInteractableException,
    StaleElementReferenceException,
    WebDriverException,
)
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from testkit.harness import wait_until
from testkit.needed import tool

T = TypeVar("T")

ASKS_FOR_RELOAD = "return document.getElementById('main')?.textContent === 'Part of this page is missing. Reload it.'"
SEEN_WITHIN_S = 20.0
STAYS_S = 0.05  # what stays where it is for so long is not about to be moved
FLAGS = (
    "--headless=new",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",  # a container's is small
    "--disable-gpu",
    "--disable-search-engine-choice-screen",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost, EXCLUDE *.localhost",
    "--js-flags=--expose-gc",
    "--no-first-run",
)
EXPECTED = "Failed to load resource"  # Chromium's own line for each answer that is none of 2xx


class Browser:
    """One browser with one tab; leaving it ends its processes."""

    def __init__(self, width: int = 1400, height: int = 900, *, dark: bool = False) -> None:
        chromium, driver = tool("chromium"), tool("chromedriver")
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        options = Options()
        options.binary_location = chromium
        flags = [*FLAGS, f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # which Chromium refuses to build for root
        for flag in flags:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(executable_path=driver))
        self._size = width, height
        self.resize(width, height)
        self.prefer("dark" if dark else "light")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(WebDriverException):
            self.driver.quit()
        self._profile.cleanup()

    def resize(self, width: int, height: int) -> None:
        """Give the page a size, in CSS pixels; a window cannot be as narrow as a telephone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.tell("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """Have the reader prefer `light` or `dark`, and no animation."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.tell("Emulation.setEmulatedMedia", {"features": features})

    def tell(self, command: str, parameters: dict[str, Any]) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, parameters)

    def open(self, url: str) -> None:
        """Go to an address."""
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        """Return what a script returns in the page."""
        return self.driver.execute_script(script, *arguments)

    # -- finding

    def all(self, selector: str, text: str = "") -> list[WebElement]:
        """Return what is visible now and matches a CSS selector and has `text` in it."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [each for each in found if each.is_displayed() and text in each.text]

    def find(self, selector: str, text: str = "") -> WebElement:
        """Return the first such element, as soon as there is one."""
        return self.until(lambda: self.all(selector, text), f"{selector} with {text!r}")[0]

    def see(self, text: str, selector: str = "body") -> None:
        """Wait until a text is in sight."""
        self.find(selector, text)

    def until(self, condition: Callable[[], T | None], what: str, deadline_s: float = SEEN_WITHIN_S) -> T:
        """Return what `condition` returns once that is true; the page may be drawn anew meanwhile."""

        def look() -> T | None:
            try:
                found = condition()
            except (StaleElementReferenceException, ElementNotInteractableException):
                return None
            if not found and self.run(ASKS_FOR_RELOAD):  # now and then a file does not come, twice in a row
                self.driver.refresh()
            return found

        try:
            return wait_until(look, deadline_s, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.look_of()}; in sight: {self.text()[:2000]}") from None

    def look_of(self) -> str:
        """Return where the page is, how large its window, how much of it has been drawn, and which files have come."""
        script = (
            "return `${location.href} ${document.readyState} ${innerWidth}x${innerHeight},"
            " ${document.body.innerHTML.length} characters, has loaded`"
            " + performance.getEntriesByType('resource').map(each => ' ' + each.name.split('/ui/').at(-1))"
        )
        return str(self.run(script))

    def text(self) -> str:
        """Return all that is in sight."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)

    # -- acting

    def click(self, selector: str, text: str = "") -> None:
        """Click the first such element, once it stays where it is: what is drawn above it would move it away."""

        def press() -> bool:
            for each in self.all(selector, text)[:1]:
                self.run("arguments[0].scrollIntoView({block: 'center'})", each)
                before = each.rect
                time.sleep(STAYS_S)
                if each.rect != before:
                    return False
                with suppress(WebDriverException):  # something lies above it yet
                    each.click()
                    return True
            return False

        self.until(press, f"a click on {selector} with {text!r}")

    def type(self, selector: str, text: str) -> None:
        """Replace what is in a field."""

        def write() -> bool:
            for field in self.all(selector)[:1]:
                field.clear()
                field.send_keys(text)
                return True
            return False

        self.until(write, f"a field {selector}")

    def choose(self, selector: str, value: str) -> None:
        """Choose what has a value among those of a list."""

        def pick() -> bool:
            for field in self.all(selector)[:1]:
                Select(field).select_by_value(value)
                return True
            return False

        self.until(pick, f"{value} in {selector}")

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()  # not of an element, which may just be drawn anew

    def focused(self) -> str:
        """Return the text or the name of what has the focus."""
        return str(
            self.run(
                "const e = document.activeElement;"
                "return (e.getAttribute('aria-label') || e.innerText || e.name || e.tagName).trim()"
            )
        )

    # -- judging

    def complaints(self) -> list[str]:
        """Return the console's errors and warnings so far, but for answers that the page asks for knowingly."""
        read: Callable[[str], list[dict[str, str]]] = self.driver.get_log
        return [
            entry["message"]
            for entry in read("browser")
            if entry["level"] in ("SEVERE", "WARNING") and EXPECTED not in entry["message"]
        ]

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Keep a picture of what is in sight, or of the whole page, as PNG."""
        if whole:
            width = self._size[0]
            height = int(self.run("return document.documentElement.scrollHeight"))
            self.resize(width, height)
        path.write_bytes(self.driver.get_screenshot_as_png())
        if whole:
            self.resize(*self._size)


def tabs_to(browser: Browser, name: str, limit: int = 60) -> Sequence[str]:
    """Press Tab until what is called `name` has the focus; return what had it on the way."""
    passed: list[str] = []
    for _ in range(limit):
        browser.press(Keys.TAB)
        passed.append(browser.focused())
        if passed[-1].startswith(name):
            return passed
    raise AssertionError(f"no {name!r} among {passed}")
