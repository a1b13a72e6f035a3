"""What the tests of the page share: a system that serves it, with its figures counted.  Holds no tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testkit.harness import free_port
from testkit.system import System

FUNCTIONS = """
[cat]
fprocess = "cat"

[broken]
fprocess = "sh -c 'echo the disk is on fire >&2; exit 3'"
combine_output = false

[mended]
fprocess = "sh -c 'test -e $TMPDIR/mended && cat || exit 1'"

[slow]
fprocess = "sleep 60"

[ticks]
fprocess = "cat"
annotations.topic = "cron-function"
annotations.schedule = "@hourly"
"""
PASSWORD = "pass:wörd"


class Shown(System):
    """A system whose worker has a port for its metrics, so that all calls can be counted; nothing is tried twice."""

    def __init__(
        self, functions: str = FUNCTIONS, settings: Mapping[str, str] | None = None, spool: Path | None = None
    ) -> None:
        ports = {"worker_metrics_port": str(free_port()), "max_retry_attempts": "1", "callback_retry_attempts": "1"}
        super().__init__(functions, ports | dict(settings or {}), spool)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.port}/ui/"

    def ask(self, path: str) -> Any:
        """Return what the gateway answers as JSON."""
        answer = self.request("GET", path)
        assert answer.status == 200, answer
        return json.loads(answer.body)


def with_password(directory: Path) -> dict[str, str]:
    """Return the settings of a gateway that asks for `admin` and PASSWORD."""
    (directory / "basic-auth-user").write_text("admin")
    (directory / "basic-auth-password").write_text(PASSWORD)
    return {"basic_auth": "true", "secret_mount_path": str(directory)}
