"""What the fork server starts is watched, or it does not run."""

from __future__ import annotations

import asyncio
import errno
import os
import sys

import pytest

from faashound.functions.forkserver import ForkServer
from faashound.functions.supervisor import ManagedProgram
from testkit.inspection import children_of
from tests.functions.kit import few_descriptors, run, until

ENVIRON = {"PATH": os.environ["PATH"]}
SETTINGS = {"fprocess": "cat", "port": "0", "metrics_port": "0", "suppress_lock": "true", "workers": "1"}


def test_watchdog_whose_descriptor_finds_no_room_here_is_killed() -> None:
    program = ManagedProgram("a watchdog", (), ENVIRON | SETTINGS)

    async def test() -> None:
        sys.audit("tests.starts_a_process")
        before, (watched, held) = children_of(os.getpid()), os.pipe()
        server = ForkServer(ENVIRON)
        server.start()
        try:
            (await server.launch(program, watched)).close()
            (forks,) = children_of(os.getpid()) - before
            await until(lambda: not children_of(forks), "the first, which shows that the server works, is gone")
            launching = asyncio.create_task(server.launch(program, watched))
            await asyncio.sleep(0)  # it has asked
            with few_descriptors(0), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                await launching
            await until(lambda: not children_of(forks), "the second is gone")
        finally:
            await server.stop()
            os.close(watched)
            os.close(held)

    run(test())
