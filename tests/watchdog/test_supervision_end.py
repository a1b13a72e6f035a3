"""However the watchdog ends, told or killed, its functions end with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from faashound import watchdog
from testkit import tree
from testkit.harness import (
    START_DEADLINE_S,
    TICK_S,
    Answer,
    InBackground,
    Program,
    clean_environment,
    command_of,
    connect,
    crowding,
    free_port,
    http_request,
    wait_until,
)
from testkit.inspection import guard_of, serves

GONE_S = 10.0  # after the end of the watchdog: nothing of its functions is left, which would live for a minute
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
HEAD = b"POST / HTTP/1.1\r\nHost: h\r\n"

# Scripts for /bin/sh, and how many processes each is once it is up.
FUNCTIONS = {
    "plain": (b"exec sleep 60", 1),
    "children": (b"sleep 60 & sleep 60 & wait", 3),
    "ignores-signals": (b"trap '' TERM INT HUP; sleep 60; sleep 60", 2),
    "daemons": (b"setsid -f sleep 60; (setsid sleep 60 &); exec sleep 60", 3),
    "many": (b"for i in $(seq 50); do setsid -f sleep 60; done; exec sleep 60", 51),
    "without-our-mark": (b"exec env -i HARNESS_MARK=$HARNESS_MARK sh -c 'sleep 60 & sleep 60'", 2),
    "stopped": (b"sleep 60 & kill -STOP $$", 2),
}


@pytest.fixture
def running() -> Iterator[Program]:
    """A watchdog with each kind of function running, and a limit for draining that is longer than the test."""
    with Program("watchdog", {"fprocess": "sh", "write_timeout": "1m", "healthcheck_interval": "0"}) as program:
        clients = [connect(program.port) for _ in FUNCTIONS]
        for client, (script, _) in zip(clients, FUNCTIONS.values(), strict=True):
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(script), script))
        program.wait_started(sum(count for _, count in FUNCTIONS.values()))
        yield program
        for client in clients:
            client.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGHUP, signal.SIGQUIT])
def test_functions_are_gone_when_the_watchdog_is_killed(running: Program, number: signal.Signals) -> None:
    running.process.send_signal(number)
    assert running.wait_exit() == -number
    wait_until(lambda: not running.survivors(), GONE_S, "functions and guard gone")


def test_functions_are_gone_when_the_guard_was_killed_before_the_watchdog() -> None:
    with Program("watchdog", {"fprocess": "sh"}) as program:
        first = guard_of(program)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: (program.survivors() - program.functions()) - {first}, GONE_S, "another guard")
        program.wait_log("guard")
        call = InBackground(lambda: http_request(program.port, "POST", body=b"setsid -f sleep 60; exec sleep 60"))
        program.wait_started(2)
        program.kill()
        wait_until(lambda: not program.survivors(), GONE_S, "functions and guard gone")
        with pytest.raises(ConnectionError):
            call.result()


def test_all_is_killed_when_the_guard_has_had_no_processor_for_as_long_as_it_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "FREEZE_LIMIT_S", 0.0)
    monkeypatch.setattr(watchdog, "SWEEP_LIMIT_S", 0.0)
    mark = uuid.uuid4().hex
    with subprocess.Popen(["sleep", "60"], env={"FAASHOUND_CALL": f"{mark}.0.call"}) as left:
        try:
            watchdog.kill_left(mark.encode(), frozenset())
            assert left.wait(GONE_S) == -signal.SIGKILL
        finally:
            left.kill()


def test_guard_holds_nothing_but_its_pipe_when_the_watchdog_was_given_descriptors_far_apart() -> None:
    far = ["/bin/sh", "-c", 'exec 7</dev/null; exec "$@"', "sh"]
    with Program("watchdog", {"fprocess": "sh"}, prefix=far) as program:
        held = Path(f"/proc/{guard_of(program)}/fd")
        wait_until(lambda: len(list(held.iterdir())) == 1, GONE_S, "all others closed")


def test_trees_are_gone_when_the_watchdog_is_killed_while_they_grow(tmp_path: Path) -> None:
    described = b'{"children": [%b]}' % b", ".join([b'{"traits": ["orphan", "setsid"], "children": [{}, {}]}'] * 30)
    for count in (1, 20, 60):
        with Program("watchdog", {"fprocess": tree.command(tmp_path)}) as program, connect(program.port) as client:
            client.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(described), described))
            wait_until(lambda: len(list(tmp_path.iterdir())) >= count, GONE_S, "some have grown")  # noqa: B023
            program.kill()
            # Not zombies: they are the new parent's to reap now.
            wait_until(lambda: not tree.alive(tmp_path, or_zombie=False) and not program.survivors(), GONE_S, "gone")
        for file in tmp_path.iterdir():
            file.unlink()


@pytest.mark.parametrize(
    "numbers", [[signal.SIGTERM] * 2, [signal.SIGINT] * 2, [signal.SIGTERM, signal.SIGINT]], ids=["TERM", "INT", "both"]
)
def test_watchdog_and_functions_end_at_once_when_told_twice(running: Program, numbers: list[signal.Signals]) -> None:
    running.process.send_signal(numbers[0])
    running.wait_log("raining")
    start_s = time.monotonic()
    running.process.send_signal(numbers[1])
    assert running.wait_exit() == 1
    assert time.monotonic() - start_s < GONE_S * crowding()
    wait_until(lambda: not running.survivors(), GONE_S, "functions and guard gone")


@pytest.mark.parametrize("grace", ["0", "500ms", "1m"])
def test_stuck_functions_do_not_hold_the_watchdog_when_it_drains(grace: str) -> None:
    limits = {"write_timeout": "800ms", "healthcheck_interval": "0", "term_grace": grace}
    with Program("watchdog", {"fprocess": "sh"} | limits) as program:
        calls = [InBackground(lambda s=script: call(program, s)) for script, _ in FUNCTIONS.values()]  # type: ignore[misc]
        program.wait_started(sum(count for _, count in FUNCTIONS.values()))
        start_s = time.monotonic()
        program.terminate()
        assert program.wait_exit() == 1
        assert 0.8 - TICK_S <= time.monotonic() - start_s < 0.8 + GONE_S * crowding()
        wait_until(lambda: not program.survivors(), GONE_S, "functions and guard gone")
        assert [each.result().status for each in calls] == [503] * len(calls)


def test_connection_that_asks_nothing_is_no_call_that_was_cut_when_the_watchdog_drains() -> None:
    settings = {"fprocess": "sh", "write_timeout": "500ms", "exec_timeout": "300ms", "healthcheck_interval": "0"}
    with Program("watchdog", settings) as program, connect(program.port):
        program.terminate()
        assert program.wait_exit() == 0


def call(program: Program, script: bytes) -> Answer:
    return http_request(program.port, "POST", body=script)


@pytest.fixture
def polite(tmp_path: Path) -> Iterator[Program]:
    """A watchdog with a long term_grace and a process that waits; what is told to end tidies up once `go` is there."""
    script = tmp_path / "function.sh"
    tidy = "until test -e go; do sleep 0.01; done; touch tidied-$$; exit"
    script.write_text(f"trap '{tidy}' TERM; touch ready-$$; sleep 60 & wait; wait")
    warm = {"fprocess": f"sh {script}", "prewarm": "1", "cgi_headers": "false"}
    with Program("watchdog", warm | {"term_grace": "1m", "healthcheck_interval": "0"}) as program:
        yield program


def said(program: Program, word: str) -> set[str]:
    """Return which processes of the function have said `word`."""
    return {path.name.partition("-")[2] for path in program.temporary.glob(f"{word}-*")}


def test_all_that_waits_or_ends_may_tidy_up_when_the_watchdog_is_told_once(polite: Program) -> None:
    wait_until(lambda: said(polite, "ready"), START_DEADLINE_S, "one that waits")
    assert http_request(polite.port, "POST", "/", {"X-Timeout": "1ms"}).status == 408
    wait_until(lambda: len(said(polite, "ready")) == 2, START_DEADLINE_S, "the next that waits")
    polite.terminate()
    polite.wait_log("Exiting")
    (polite.temporary / "go").touch()
    assert polite.wait_exit() == 0
    assert said(polite, "tidied") == said(polite, "ready")


def test_watchdog_ends_at_once_when_told_twice_while_functions_tidy_up(polite: Program) -> None:
    wait_until(lambda: said(polite, "ready"), START_DEADLINE_S, "one that waits")
    polite.terminate()
    polite.wait_log("Exiting")
    polite.terminate()
    assert polite.wait_exit() == 0
    assert not said(polite, "tidied")
    wait_until(lambda: not polite.survivors(), GONE_S, "functions and guard gone")


def test_deadline_holds_when_it_comes_while_draining() -> None:
    limit = f"{2 * crowding():.1f}s"  # the function is to have started, and the watchdog to drain, before that
    limits = {"exec_timeout": limit, "write_timeout": "1m", "healthcheck_interval": "0"}
    with Program("watchdog", {"fprocess": "sh"} | limits) as program:
        running = InBackground(lambda: call(program, b"setsid -f sleep 60; exec sleep 60"))
        program.wait_started(2)
        program.terminate()
        assert running.result().status == 408
        assert program.wait_exit() == 0
        wait_until(lambda: not program.survivors(), GONE_S, "functions and guard gone")


def test_daemon_is_gone_when_it_was_left_by_a_call_and_the_watchdog_is_killed_right_after() -> None:
    with Program("watchdog", {"fprocess": "sh"}) as program:
        for _ in range(5):
            assert call(program, b"for i in 1 2 3 4 5; do setsid -f sleep 60; done; echo hi").text == "hi\n"
        program.kill()
        wait_until(lambda: not program.survivors(), GONE_S, "daemons and guard gone")


@pytest.mark.skipif(os.geteuid() != 0, reason="everything here runs as somebody else already")
def test_functions_are_gone_when_the_watchdog_is_not_root() -> None:
    limits = {"fprocess": "sh", "healthcheck_interval": "0", "suppress_lock": "true"}
    program = Program("watchdog", limits, prefix=NOBODY)
    program.temporary.chmod(0o777)
    with program:
        for script, _ in FUNCTIONS.values():
            answer = http_request(program.port, "POST", "/", {"X-Timeout": "300ms"}, script)
            assert answer.status == 408
            program.wait_idle(GONE_S)
        running = [InBackground(lambda s=script: call(program, s)) for script, _ in FUNCTIONS.values()]  # type: ignore[misc]
        program.wait_started(sum(count for _, count in FUNCTIONS.values()))
        program.kill()
        wait_until(lambda: not program.survivors(), GONE_S, "functions and guard gone")
        for each in running:
            with pytest.raises(ConnectionError):
                each.result()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a program that is run as root")
def test_other_functions_are_gone_and_the_watchdog_ends_when_a_function_left_a_child_of_another_user() -> None:
    """As `sudo daemon &` does: nothing of ours may signal it."""
    limits = {"fprocess": "sh", "healthcheck_interval": "0", "suppress_lock": "true"}
    program = Program("watchdog", limits, prefix=NOBODY)
    program.temporary.chmod(0o777)
    with program:
        sudo = shutil.copy(cast(str, shutil.which("setpriv")), program.temporary / "sudo")
        Path(sudo).chmod(0o4755)
        if os.statvfs(sudo).f_flag & os.ST_NOSUID:
            pytest.skip("no program here is run as another user than who starts it")
        left = b"setsid -f ./sudo --reuid=0 sh -c ': >begun; exec sleep 60' >&- 2>&-; until [ -e begun ]; do :; done"
        assert http_request(program.port, "POST", body=left).status == 200
        roots = program.wait_started()
        try:
            for script in (b"setsid -f sleep 60; :", b"setsid -f sleep 60; exec sleep 60"):
                http_request(program.port, "POST", "/", {"X-Timeout": "300ms"}, script)
                wait_until(lambda: program.functions() == roots, GONE_S, "nothing left of the other functions")
            waiting = InBackground(lambda: call(program, b"sleep 60"))
            program.wait_started(2)
            program.terminate()
            program.wait_log("SIGTERM: draining")
            program.terminate()
            assert program.wait_exit() == 1
            assert waiting.result().status == 503
        finally:
            for pid in roots:
                os.kill(pid, signal.SIGKILL)


def test_calls_run_and_are_not_cut_when_the_watchdog_is_started_without_standard_streams() -> None:
    """A log line must not go to whatever has got the number 2, be it a client or the guard's pipe."""
    with Program("watchdog", {"fprocess": "cat"}) as other:
        port = free_port()
        environment = clean_environment(other.environment | {"fprocess": "sh", "port": str(port), "suppress_lock": "1"})
        closing = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command_of("watchdog")]
        with subprocess.Popen(closing, env=environment) as process:
            try:
                wait_until(lambda: serves(port), START_DEADLINE_S, "it serves")
                for _ in range(3):
                    answer = http_request(port, "POST", body=b"sleep 0.1; ls -x /proc/$$/fd; :")
                    assert (answer.status, answer.text) == (200, "0  1  2\n")
            finally:
                process.kill()
