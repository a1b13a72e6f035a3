"""One system and one browser for each width, shared by the tests that leave both as they found them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testkit.browser import Browser
from tests.ui.kit import Shown

WIDTHS = (1400, 400)


@pytest.fixture(scope="module")
def system() -> Iterator[Shown]:
    with Shown() as system:
        yield system


@pytest.fixture(scope="session", params=WIDTHS, ids=["wide", "narrow"])
def any_browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    with Browser(width=request.param) as browser:
        yield browser


@pytest.fixture
def browser(any_browser: Browser) -> Iterator[Browser]:
    """A browser of each width, whose console has nothing to complain of when the test is over."""
    any_browser.open("about:blank")
    any_browser.complaints()
    yield any_browser
    assert any_browser.complaints() == []
    any_browser.open("about:blank")  # lets go of the gateway, which is stopped next
