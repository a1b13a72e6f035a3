"""What signals do to the gateway's processes: each is told, and the one that runs the functions goes last."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack

from testkit.harness import connect, read_all, wait_read, wait_until
from testkit.system import System

POLLS_COUNT = 20


def get(path: str, *fields: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *fields, "", ""]).encode()


def test_gateway_drains_when_it_is_told_to_stop_as_the_wait_for_a_call_runs_out() -> None:
    """A process that was stopped finds both at once: the time that has passed, and the signal."""
    with System(settings={"worker": "none"}) as system, ExitStack() as stack:
        call_id = system.submit("cat")
        polls = [stack.enter_context(connect(system.port)) for _ in range(POLLS_COUNT)]
        for poll in polls:
            poll.sendall(get(f"/async-function/{call_id}?wait=700ms", "Connection: close"))
            wait_read(poll)
        end_s = time.monotonic() + 0.7
        system.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: time.monotonic() > end_s, 5.0, "the time of the wait has passed")
        system.terminate()
        system.process.send_signal(signal.SIGCONT)
        answers = [read_all(poll) for poll in polls]
        assert [each[9:12] for each in answers] == [b"200"] * POLLS_COUNT, system.log()
        assert system.wait_exit() == 0
        assert "Traceback" not in system.log()
