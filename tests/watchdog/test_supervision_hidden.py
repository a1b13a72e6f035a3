"""Nothing outlives its call either where /proc shows a watchdog no process but its own user's.

It is mounted with hidepid (proc(5)), as by systemd's ProtectProc=noaccess, and the watchdog is not root.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from testkit.harness import InBackground, Program, connect, crowding, http_request, wait_until

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount /proc, and become another user"),
    pytest.mark.parametrize("hidepid", [1, 2]),  # their entries are there and cannot be read, or are not there at all
]

GONE_S = 10.0  # after the answer, or the end of the watchdog: nothing is left, which would live for a minute
AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@contextmanager
def hidden(hidepid: int, **settings: str) -> Iterator[Program]:
    """Yield a watchdog from which the processes of other users are hidden."""
    mount = f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"'
    hiding = ["unshare", "--mount", "sh", "-c", mount, "sh", *AS_NOBODY]
    if subprocess.run([*hiding, "sh", "-c", "! cat /proc/1/stat"], capture_output=True).returncode:
        pytest.skip("no /proc here hides a process from another user")
    program = Program("watchdog", {"fprocess": "sh", "healthcheck_interval": "0", **settings}, prefix=hiding)
    program.temporary.chmod(0o777)
    with program:
        yield program


@contextmanager
def with_sudo(hidepid: int, **settings: str) -> Iterator[Program]:
    """Yield the same with a program `./sudo`, which makes itself root; what it runs is killed at the end."""
    with hidden(hidepid, **settings) as program:
        sudo = program.temporary / "sudo"
        shutil.copy(cast(str, shutil.which("setpriv")), sudo)
        sudo.chmod(0o4755)
        if os.statvfs(sudo).f_flag & os.ST_NOSUID:
            pytest.skip("no program here is run as another user than who starts it")
        try:
            yield program
        finally:
            for pid in program.functions():
                os.kill(pid, signal.SIGKILL)


AS_ROOT = "./sudo --reuid=0 sh -c ': >begun; exec sleep 60' >&- 2>&-"
IS_ROOT = "until [ -e begun ]; do :; done"


def test_process_gets_its_sigterm_when_it_has_left_the_session(hidepid: int) -> None:
    with hidden(hidepid, term_grace="1m") as program:
        tidied = program.temporary / "tidied"
        script = f"setsid sh -c \"trap 'touch {tidied}; exit' TERM; touch ready; sleep 60 & wait\" & wait"
        limit = {"X-Timeout": f"{2 * crowding():.1f}s"}
        assert http_request(program.port, "POST", "/", limit, script.encode()).status == 408
        program.wait_idle(GONE_S)
        assert tidied.exists()
        assert "without a SIGTERM" not in program.log()


def test_tree_is_gone_when_it_is_deeper_than_what_is_swept_without_a_freeze(hidepid: int) -> None:
    with hidden(hidepid) as program:
        deep = program.temporary / "deep.sh"
        deep.write_text('[ "$1" = 0 ] || setsid sh "$0" $(($1 - 1)) & exec sleep 60')
        with connect(program.port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 18\r\n\r\nexec sh deep.sh 20")
            program.wait_started(21)
        program.wait_idle(GONE_S)


def test_calls_are_answered_when_a_function_has_left_a_process_that_became_another_users(hidepid: int) -> None:
    with with_sudo(hidepid, suppress_lock="true") as program:
        assert http_request(program.port, "POST", body=f"setsid -f {AS_ROOT}; {IS_ROOT}".encode()).status == 200
        roots = program.wait_started()
        for script in (b"setsid -f sleep 60; :", b"setsid -f sleep 60; exec sleep 60"):
            http_request(program.port, "POST", "/", {"X-Timeout": "300ms"}, script)
            wait_until(lambda: program.functions() == roots, GONE_S, "nothing left of the other functions")
        program.terminate()
        assert program.wait_exit() == 0


def test_functions_are_gone_when_the_watchdog_is_killed_and_one_of_them_became_another_users(hidepid: int) -> None:
    with with_sudo(hidepid) as program:
        script = f"{AS_ROOT} & {IS_ROOT}; sleep 60"
        call = InBackground(lambda: http_request(program.port, "POST", body=script.encode()))
        program.wait_started(3)
        wait_until(lambda: (program.temporary / "begun").exists(), GONE_S, "one has become root")
        program.kill()
        wait_until(lambda: len(program.survivors()) == 1, GONE_S, "the others gone, and the guard")
        with pytest.raises(ConnectionError):
            call.result()
