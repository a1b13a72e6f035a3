"""supervisor.py: when a process is started again, and what its exit means."""

from __future__ import annotations

import pytest

from faashound.functions.supervisor import describe_exit
from faashound.watchdog import next_restart_s


@pytest.mark.parametrize(
    ("delay_s", "lived_s", "status", "expected_s"),
    [
        pytest.param(None, 0.0, 1, 0.1, id="first death"),
        pytest.param(0.1, 0.0, 1, 0.2, id="doubles"),
        pytest.param(25.6, 9.9, -9, 30.0, id="is bounded"),
        pytest.param(30.0, 10.0, 1, 0.1, id="starts over after a proven life"),
        pytest.param(None, 0.0, 2, 30.0, id="no haste with bad settings"),
    ],
)
def test_restart_delay(delay_s: float | None, lived_s: float, status: int, expected_s: float) -> None:
    assert next_restart_s(delay_s, lived_s, status) == expected_s


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (2, "exited with status 2: it refuses its settings (its message is above)"),
        (-9, "was ended by SIGKILL"),
        (-40, "was ended by signal 40"),
    ],
)
def test_exit_is_described(status: int, words: str) -> None:
    assert describe_exit(status) == words
