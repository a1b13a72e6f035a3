"""What tests see of processes is right at the moments that are rare, too."""

from __future__ import annotations

import os

from testkit.harness import command_line_of, runs_our_program


def test_process_that_has_ended_and_waits_to_be_reaped_is_no_function() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert command_line_of(pid) == []
        assert runs_our_program(pid)
    finally:
        os.waitpid(pid, 0)
