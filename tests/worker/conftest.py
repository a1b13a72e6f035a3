"""A system that the tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testkit.system import FUNCTIONS, SIGNING_SECRET, System


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A system that signs its callbacks, with a short lease: a worker that gets no time for so long loses its calls."""
    system = System(FUNCTIONS, {"ack_wait": "5s", "upstream_timeout": "500ms"})
    (system.temporary / "secret").write_text(SIGNING_SECRET)
    system.environment["callback_secret_file"] = str(system.temporary / "secret")
    with system:
        yield system
