"""What tests of queues share: a spool that lives as long as its test, and a NATS server that outlives them all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from faashound.queues.jetstream.connection import Options
from testkit.nats_servers import Cluster
from testkit.spool_kit import Desk


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "spool")
    yield desk
    desk.close()


@pytest.fixture(scope="session")
def server() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def options(server: Cluster) -> Options:
    """Return the options of a queue of the test's own on that server."""
    return server.options(f"t{uuid.uuid4().hex[:12]}")
