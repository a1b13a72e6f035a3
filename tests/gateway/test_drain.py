"""What signals do to the gateway's processes: each is told, and the one that runs the functions goes last."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from faashound.gateway import FUNCTIONS_GRACE_S
from testkit.harness import connect, parse, read_all, wait_read, wait_until
from testkit.inspection import children_of, has_loop
from testkit.system import System, Worker, rows

POLLS_COUNT = 20
FUNCTIONS = """
[wait]
fprocess = "sh -c 'while [ ! -e go ]; do sleep 0.02; done; echo went'"

[long]
fprocess = "head -c 50000000 /dev/zero"

[cat]
fprocess = "cat"
"""
LONG_BYTES = 50_000_000
UPSTREAM_TIMEOUT_S = 60


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


def test_functions_outlast_the_requests_of_every_process_when_draining() -> None:
    with two_processes() as (system, first), ExitStack() as stack:
        client = connection_beside(system, first, stack)
        client.sendall(get("/function/long") + get("/function/cat"))
        begun = client.recv(1)  # so this answer says nothing of a drain, and the next request will be answered
        system.terminate()
        system.wait_log("Exiting. Active connections: 0")  # of the first, which has no request of its own
        end_s = time.monotonic() + 1
        wait_until(lambda: time.monotonic() > end_s, 10, "functions that are ended too early are gone")
        long, next_one = parse(begun + read_all(client))
        assert (long.status, len(long.body), next_one.status) == (200, LONG_BYTES, 200), system.log()
        assert system.wait_exit() == 0


def test_second_signal_ends_the_requests_of_every_process_at_once_when_draining() -> None:
    with two_processes() as (system, first), ExitStack() as stack:
        client = connection_beside(system, first, stack)
        client.sendall(get("/function/wait"))
        system.wait_started()
        system.terminate()
        system.wait_log("Exiting. Active connections: 0")
        system.terminate()
        assert b" 503 " in read_all(client)[:20]
        assert system.wait_exit() == 1
        system.wait_idle()  # what is killed needs a turn of the processor to be gone


def test_second_signal_counts_in_a_process_that_has_not_seen_the_first_yet() -> None:
    """The kernel keeps one of each number for a process that gets no time."""
    with two_processes() as (system, first), ExitStack() as stack:
        client = connection_beside(system, first, stack)
        client.sendall(get("/function/wait"))
        system.wait_started()
        (beside,) = set(serving(system)) - {first}
        os.kill(beside, signal.SIGSTOP)
        system.terminate()
        system.wait_log("Exiting. Active connections: 0")
        system.terminate()
        wait_until(lambda: not signals_waiting(system.pid), 5, "the second has been passed on")
        os.kill(beside, signal.SIGCONT)
        assert b" 503 " in read_all(client)[:20]
        assert system.wait_exit() == 1


def test_no_worker_is_started_for_queues_that_come_while_the_gateway_drains() -> None:
    with System(FUNCTIONS) as system:
        call_id = system.submit("wait")
        system.wait_started()
        system.terminate()
        wait_until(lambda: "draining" in system.request("GET", "/healthz").text, 15.0, "it drains")
        changed = f'{FUNCTIONS}annotations = {{ "com.openfaas.queue" = "later" }}\n'
        Path(system.environment["functions"]).write_text(changed)
        system.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "later" in system.request("GET", "/system/function/cat").text, 15.0, "the file is applied")
        (system.temporary / "go").touch()
        assert system.wait_exit() == 0
        assert "another worker" not in system.log()
        assert "next start in" not in system.log()
        assert [row["state"] for row in rows(system.spool, "SELECT state FROM calls WHERE id = ?", call_id)] == ["done"]


def test_call_that_a_worker_elsewhere_makes_finishes_when_the_gateway_drains(called: System) -> None:
    called.terminate()
    called.wait_log("Exiting. Active connections: 0")  # none of ours: it calls the function where that is
    end_s = time.monotonic() + FUNCTIONS_GRACE_S + 1
    wait_until(lambda: time.monotonic() > end_s, 20, "as long has passed as functions without a request get")
    (called.temporary / "go").touch()
    assert called.wait_exit() == 0
    wait_until(lambda: call_of(called)["state"] == "done", 10, "the worker has noted its end")
    assert call_of(called)["attempts"] == 1


def test_second_signal_ends_functions_that_a_worker_elsewhere_calls_at_once(called: System) -> None:
    called.terminate()
    called.wait_log("Exiting. Active connections: 0")
    start_s = time.monotonic()
    called.terminate()
    called.wait_exit()
    assert time.monotonic() - start_s < FUNCTIONS_GRACE_S
    called.wait_idle()


def call_of(system: System) -> dict[str, Any]:
    return rows(system.spool, "SELECT state, attempts FROM calls")[0]


@pytest.fixture
def called() -> Iterator[System]:
    """Yield a gateway whose function is called by a worker that is not its own."""
    settings = {"worker": "none", "upstream_timeout": f"{UPSTREAM_TIMEOUT_S}s"}
    with System(FUNCTIONS, settings) as system, Worker(system):
        system.submit("wait")
        system.wait_started()
        yield system


def test_functions_file_is_read_again_at_sighup_whichever_process_runs_the_functions() -> None:
    with two_processes() as (system, _):
        Path(system.environment["functions"]).write_text("[cat]\nfprocess = 1\nurl = 2")
        system.wait_log("the functions file is not applied")
        told_count = told(system)
        system.process.send_signal(signal.SIGHUP)  # to say again what is wrong, the file must have been read again
        wait_until(lambda: told(system) > told_count, 5.0, "the file has been read again")
        for pid in serving(system):
            os.kill(pid, signal.SIGHUP)
        assert system.request("POST", "/function/cat", b"on").text == "on"
        assert system.process.poll() is None


def told(system: System) -> int:
    return sum("the functions file is not applied" in line for line in system.log_lines())


@contextmanager
def two_processes() -> Iterator[tuple[System, int]]:
    """Yield a gateway of two processes, and the number of the one that runs the functions."""
    with System(FUNCTIONS, {"worker": "none", "workers": "2", "upstream_timeout": f"{UPSTREAM_TIMEOUT_S}s"}) as system:
        (first,) = [pid for pid in serving(system) if children_of(pid)]
        yield system, first


def serving(system: System) -> list[int]:
    return [pid for pid in system.children() if has_loop(pid)]


def connection_beside(system: System, first: int, stack: ExitStack) -> socket.socket:
    """Return a connection to the process that does not run the functions; those share what comes."""
    (beside,) = set(serving(system)) - {first}
    while True:
        before = sockets_of(beside)
        client = stack.enter_context(connect(system.port))
        client.sendall(get("/healthz"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        if sockets_of(beside) > before:
            return client


def signals_waiting(pid: int) -> int:
    """Return the bits of the signals that a process has been sent and not taken (proc_pid_status(5), ShdPnd)."""
    (bits,) = re.findall(r"^ShdPnd:\s+(\S+)$", Path(f"/proc/{pid}/status").read_text("ascii"), re.MULTILINE)
    return int(bits, 16)


def sockets_of(pid: int) -> int:
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            count += str(fd.readlink()).startswith("socket:")
    return count
