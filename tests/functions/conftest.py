"""Fixtures of tests of local functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.functions.kit import STAND_IN


class Log:
    """What has been written to stderr, by us and by our watchdogs, since the test began."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    def __str__(self) -> str:
        self._text += self._capture.readouterr().err
        return self._text

    def __contains__(self, text: str) -> bool:
        return text in str(self)


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Log:
    return Log(capfd)


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[str, ...]:
    """The command of a program that serves LISTEN_FDS and obeys the parent-death pipe as the watchdog does."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN, encoding="utf-8")
    return (sys.executable, str(path))
