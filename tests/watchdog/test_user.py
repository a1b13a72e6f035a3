"""`user`: functions that run as another user than their watchdog, which they can neither read nor end."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from testkit.harness import (
    ROOT,
    InBackground,
    Program,
    clean_environment,
    command_of,
    crowding,
    http_request,
    run,
    wait_until,
)
from testkit.inspection import state_of
from testkit.system import System

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may change users")

UID, GID = 100_000 + os.getpid(), 54322  # a user of this run alone
USER = f"{UID}:{GID}"
GONE_S = 10.0  # until what is killed is gone
LIBRARY_SIGNALS = 0b11 << 31  # 32 and 33 are the C library's own: what was ignored at our start stays so


@pytest.fixture(scope="module")
def guarded() -> Iterator[Program]:
    """A watchdog of root whose function runs scripts as nobody special."""
    with Program("watchdog", {"fprocess": "sh", "user": USER, "HOME": "/root"}) as program:
        yield program


def said(program: Program, script: str) -> str:
    return http_request(program.port, "POST", body=script.encode()).text


def test_function_has_no_right_and_no_group_of_the_watchdog_when_it_runs_as_another_user(guarded: Program) -> None:
    status = said(guarded, "grep -E '^(Uid|Gid|Groups|Cap(Prm|Eff|Amb)|SigBlk|SigIgn):' /proc/self/status")
    facts = {name: value.split() for name, _, value in (line.partition(":") for line in status.splitlines())}
    assert facts.pop("Uid") == [str(UID)] * 4
    assert facts.pop("Gid") == [str(GID)] * 4
    assert facts.pop("Groups") == []
    ignored = int(facts.pop("SigIgn")[0], 16) & ~LIBRARY_SIGNALS
    assert ignored == 0
    assert facts == {name: ["0" * 16] for name in ("CapPrm", "CapEff", "CapAmb", "SigBlk")}


def test_function_has_the_groups_and_the_variables_of_a_user_when_that_has_a_name() -> None:
    with Program("watchdog", {"fprocess": "sh", "user": "nobody", "HOME": "/root", "USER": "root"}) as program:
        assert said(program, "id -un; id -gn; id -G") == said(program, "echo nobody; id -gn nobody; id -G nobody")
        assert said(program, "echo $HOME $USER $LOGNAME") == said(program, "echo ~nobody nobody nobody")


def test_function_has_no_home_of_root_when_its_user_has_no_name(guarded: Program) -> None:
    assert said(guarded, "echo ${HOME-none} ${USER-none}") == "none none\n"


ATTACKS = {
    "signal": "kill -9 $PPID",
    "stop": "kill -STOP $PPID",
    "all": "exec kill -9 -1",
    "environment": "cat /proc/$PPID/environ",
    "descriptors": "ls /proc/$PPID/fd",
    "memory": "head -c 1 /proc/$PPID/mem",
    "threads": "for task in /proc/$PPID/task/*; do kill -9 ${task##*/} && echo done; done",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_watchdog_and_guard_live_and_tell_nothing_when_their_function_attacks(guarded: Program, attack: str) -> None:
    guards = guarded.survivors() - guarded.functions()
    answer = said(guarded, f"{attack} 2>&1; :")
    assert HARNESS not in answer
    assert "done" not in answer
    assert http_request(guarded.port, "GET", "/_/health").status == 200
    assert guards <= guarded.survivors()


HARNESS = "HARNESS_MARK="


def test_function_writes_to_its_streams_when_it_opens_them_by_name(guarded: Program) -> None:
    assert said(guarded, "echo out >/dev/stdout; echo err >/dev/stderr") == "out\nerr\n"


TREES = {
    "children": "sleep 60 & sleep 60 & wait",
    "daemons": "setsid -f sleep 60; (setsid sleep 60 &); exec sleep 60",
    "without-our-mark": "exec env -i sh -c 'setsid -f sleep 60; sleep 60 & sleep 60'",
    "stopped": "sleep 60 & kill -STOP $$",
}


@pytest.mark.parametrize("script", TREES.values(), ids=TREES)
def test_tree_is_gone_at_the_deadline_when_it_belongs_to_another_user(guarded: Program, script: str) -> None:
    answer = http_request(guarded.port, "POST", "/", {"X-Timeout": "300ms"}, script.encode())
    assert answer.status == 408
    wait_until(lambda: not of_user(), GONE_S, "no process of that user")


def of_user() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and owner(name) == UID]


def owner(pid: str) -> int:
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except FileNotFoundError:
        return 0


def test_tree_of_another_user_is_gone_when_the_watchdog_is_killed() -> None:
    with Program("watchdog", {"fprocess": "sh", "user": USER}) as program:
        scripts = [TREES[name] for name in ("children", "daemons", "stopped")]
        calls = [InBackground(lambda s=script: said(program, s)) for script in scripts]  # type: ignore[misc]
        wait_until(lambda: len(of_user()) == 8, GONE_S, "trees grown")
        program.kill()
        try:
            # Not zombies: they are the new parent's to reap now.
            wait_until(lambda: all(state_of(pid) in "ZX" for pid in of_user()), GONE_S, "nothing left")
        finally:
            for pid in of_user():
                with suppress(ProcessLookupError):  # a zombie that its new parent has reaped meanwhile
                    os.kill(pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(ConnectionError):
                call.result()


BOMB = "use POSIX; while (1) { my $pid = fork; POSIX::setsid() if defined $pid && !$pid }"


@pytest.mark.parametrize("end", ["deadline", "told-twice", "killed"])
def test_nothing_is_left_when_a_function_is_a_fork_bomb_in_sessions_of_its_own(end: str) -> None:
    """Root is not held by the limit of processes that bounds it, so it takes another user."""
    settings = {
        "fprocess": f"prlimit --nproc=100 perl -e '{BOMB}'",
        "user": USER,
        "exec_timeout": f"{2 * crowding():.1f}s",
    }
    with Program("watchdog", settings) as program:
        call = InBackground(lambda: http_request(program.port))
        try:
            wait_until(lambda: len(of_user()) > 90, GONE_S, "the limit reached")
            if end == "deadline":
                assert call.result().status == 408
            elif end == "killed":
                program.kill()
            else:
                program.terminate()
                program.wait_log("raining")
                program.terminate()
                program.wait_exit()
            wait_until(lambda: all(state_of(pid) in "ZX" for pid in of_user()), GONE_S, "nothing left")
        finally:
            while alive := [pid for pid in of_user() if state_of(pid) not in "ZX"]:
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for pid in alive:
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)


def test_no_exit_is_overlooked_when_many_calls_end_while_others_start(guarded: Program) -> None:
    calls = [InBackground(lambda: http_request(guarded.port, "POST", body=b"exit 3")) for _ in range(150)]
    assert {call.result().text for call in calls} == {"exit status 3\n"}


def test_reason_is_told_when_that_user_may_not_execute_the_program(tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("of-root") / "program"
    secret.write_text("#!/bin/sh\n")
    secret.chmod(0o700)
    with Program("watchdog", {"fprocess": str(secret), "user": USER}) as program:
        answer = http_request(program.port)
        assert (answer.status, answer.text) == (500, f"fork/exec {secret}: permission denied\n")


def test_function_waits_for_its_request_as_that_user_when_prewarmed() -> None:
    settings = {"fprocess": "sh", "user": USER, "prewarm": "2", "cgi_headers": "false"}
    with Program("watchdog", settings) as program:
        wait_until(lambda: len(of_user()) == 2, GONE_S, "two wait")
        assert said(program, "id -u") == f"{UID}\n"


def documented_rights() -> list[str]:
    """Return the capabilities that the manual names for a watchdog which is not root."""
    return re.findall(r"CAP_[A-Z_]+", (ROOT / "docs" / "operations.md").read_text())


def test_no_right_passes_to_functions_when_the_watchdog_has_only_some_of_root_s() -> None:
    rights = ",".join("+" + name.removeprefix("CAP_").lower() for name in documented_rights())
    prefix = ["setpriv", "--reuid=54320", "--regid=54320", "--clear-groups", f"--inh-caps={rights}"]
    program = Program("watchdog", {"fprocess": "sh", "user": USER}, prefix=[*prefix, f"--ambient-caps={rights}"])
    program.temporary.chmod(0o777)
    with program:
        script = "grep -E '^Cap(Prm|Eff|Amb)' /proc/self/status | cut -f2 | uniq; id -u"
        assert said(program, script) == "0" * 16 + f"\n{UID}\n"


def test_start_is_refused_when_the_watchdog_may_not_change_users() -> None:
    words = ["setpriv", "--reuid=54320", "--regid=54320", "--clear-groups", *command_of("watchdog")]
    environment = clean_environment({"fprocess": "cat", "user": USER})
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert set(re.findall(r"CAP_[A-Z_]+", done.stderr)) == set(documented_rights())
    assert "runs as root" in done.stderr


def test_function_of_a_gateway_can_not_read_what_is_the_gateway_s_when_it_runs_as_another_user() -> None:
    functions = f'[f]\nfprocess = "sh"\nuser = "{USER}"\n[root]\nfprocess = "sh"\n'
    with System(functions) as system:
        system.worker_pid()
        ours = [system.pid, *(system.survivors() - system.functions())]
        token = shlex.quote(str(system.spool / "token"))
        attack = f"cat {token} {' '.join(f'/proc/{pid}/environ' for pid in ours)}; kill -9 {' '.join(map(str, ours))}"
        answer = system.request("POST", "/function/f", f"({attack}) 2>/dev/null; echo end".encode())
        assert answer.text == "end\n"
        assert system.request("POST", "/function/root", f"cat {token} | wc -c".encode()).text != "0\n"


def test_gateway_names_file_line_and_key_when_the_user_is_unknown(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("f") / "functions.toml"
    file.write_text('[f]\nfprocess = "cat"\nuser = "no-such-user"\n')
    done = run("gateway", settings={"functions": str(file)})
    assert done.returncode == 2
    assert f"{file}:3: [f] user: 'no-such-user': there is no such user" in done.stderr
