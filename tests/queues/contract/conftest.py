"""What every queue promises to gateways, workers and people: one behaviour a test, by its public interface.

Each test here runs against each queue, by the fixture `desk`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from faashound.queues.jetstream import flows as flows_module
from testkit.queue_kit import Desk, JetDesk, SpoolDesk


@pytest.fixture(params=["spool", "jetstream"])
def desk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    # The order of what is claimed is looked at: nothing goes back to the servers because we stand still for a moment.
    monkeypatch.setattr(flows_module, "STASH_S", 10.0)
    desk: Desk
    if request.param == "spool":
        desk = SpoolDesk(tmp_path / "spool", uvloop.new_event_loop)
    else:
        desk = JetDesk(request.getfixturevalue("options"), uvloop.new_event_loop)
    yield desk
    desk.close()
