"""A whole system whose function is updated again and again while it is called, now and later."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from testkit.harness import InBackground
from testkit.system import System

UPDATES_COUNT = 50
CALLERS_COUNT = 4


def deploy(system: System, method: str, version: int) -> int:
    """Deploy a version of `f`; return the status of the answer."""
    document = {"service": "f", "image": "process", "envProcess": "/bin/sh", "envVars": {"V": str(version)}}
    headers = {"Content-Type": "application/json"}
    return system.request(method, "/system/functions", json.dumps(document).encode(), headers).status


def test_no_call_fails_now_or_later_when_a_deployed_function_is_updated_under_load(tmp_path: Path) -> None:
    with System("", {"deploy": "process", "state": str(tmp_path / "state")}) as system:
        assert deploy(system, "POST", 0) == 202
        ended = threading.Event()

        def call_on() -> list[int]:
            statuses = []
            while not ended.is_set():
                statuses.append(system.request("POST", "/function/f", b"echo $V").status)
            return statuses

        def submit_on() -> list[str]:
            ids = []
            while not ended.wait(0.02):
                ids.append(system.submit("f", b"echo $V"))
            return ids

        callers, submitter = [InBackground(call_on) for _ in range(CALLERS_COUNT)], InBackground(submit_on)
        updates = [deploy(system, "PUT", version) for version in range(1, UPDATES_COUNT + 1)]
        ended.set()
        statuses, ids = [status for caller in callers for status in caller.result()], submitter.result()
        assert updates == [200] * UPDATES_COUNT
        assert set(statuses) == {200}
        assert ids
        calls = [system.ended(call_id) for call_id in ids]
        others = [call for call in calls if (call["state"], call["attempts"], call["status"]) != ("done", 1, 200)]
        told = [json.loads(system.request("GET", f"/system/calls/{call['id']}").body) for call in others[:3]]
        assert not others, [call["history"] for call in told]
