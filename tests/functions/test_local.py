"""local.py: real watchdog processes behind sockets: kept alive, woken, rolled, put to rest, and then gone."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from faashound.calls.names import parse_function_name
from faashound.functions import supervisor
from faashound.functions.table import Functions, watchdog_settings
from testkit.harness import InBackground, wait_until
from tests.functions.conftest import Log
from tests.functions.kit import (
    DEADLINE_S,
    KEPT,
    F,
    ask,
    call,
    call_at,
    exists,
    locals_of,
    parse,
    real,
    run,
    running,
    until,
)


def test_local_function_answers_at_its_url(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        async with running(locals_of('[far]\nurl = "http://h"\n[near]\nfprocess = "serve"', stand_in)) as local:
            near = parse_function_name("near")
            found = Functions(local.table).lookup("near")
            assert found is not None
            assert found.url == f"unix:{local.path(near)}"
            assert local.table[parse_function_name("far")].url == "http://h"
            assert [(await ask(local, "near"))["pid"]] == local.status()[near].pids

    run(test())


def test_watchdog_gets_a_clean_environment_and_only_its_descriptors(stand_in: tuple[str, ...]) -> None:
    unwanted = {
        "exec_timeout": "1s",
        "function_process": "x",
        "basic_auth": "true",
        "LISTEN_PID": "1",
        "FAASHOUND_X": "1",
    }
    environ = {"PATH": os.environ["PATH"], "KEPT": "yes", "log_format": "json", **unwanted}
    text = '[f]\nfprocess = "serve"\nread_timeout = "7s"\nenvironment = { KEPT2 = "too" }'
    open_here = [int(name) for name in os.listdir("/proc/self/fd")]
    leaked_by_our_parent = [fd for fd in open_here if Path(f"/proc/self/fd/{fd}").exists() and os.get_inheritable(fd)]

    async def test() -> None:
        async with running(locals_of(text, stand_in, environ=environ, hidden={"basic_auth", "log_format"})) as local:
            facts = await ask(local, "f")
        inherited = facts["environ"]
        assert isinstance(inherited, dict)
        assert {name: text for name, text in inherited.items() if name not in ("PATH", "LC_CTYPE")} == {
            "KEPT": "yes",
            "log_format": "json",
            "FAASHOUND_FUNCTION_KEPT2": "too",
            "fprocess": "serve",
            "read_timeout": "7s",
            "healthcheck_interval": "0",
            "workers": "1",
            "metrics_port": "0",
            "suppress_lock": "true",
            "LISTEN_FDS": "1",
            "FAASHOUND_LIFELINE_FD": "4",
            "OPENFAAS_NAME": "f",
            "OPENFAAS_NAMESPACE": "openfaas-fn",
        }
        assert facts["fds"] == sorted({0, 1, 2, 3, 4, *leaked_by_our_parent})
        assert facts["group"] == facts["pid"]

    run(test())


def test_watchdog_is_told_name_and_namespace_as_openfaas_tells_them(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        async with running(locals_of('["f.prod"]\nfprocess = "serve"', stand_in)) as local:
            inherited = (await ask(local, "f.prod"))["environ"]
        assert isinstance(inherited, dict)
        assert (inherited["OPENFAAS_NAME"], inherited["OPENFAAS_NAMESPACE"]) == ("f", "prod")

    run(test())


def test_file_may_set_the_healthcheck_interval(stand_in: tuple[str, ...]) -> None:
    settings = parse('[f]\nfprocess = "x"\nhealthcheck_interval = "3s"')[F].settings
    assert settings is not None
    assert watchdog_settings(settings)["healthcheck_interval"] == "3s"


def test_empty_setting_of_the_file_counts_as_unset() -> None:
    settings = parse('[f]\nfprocess = "x"\nworkers = ""\nhealthcheck_interval = ""')[F].settings
    assert settings is not None
    assert watchdog_settings(settings) == watchdog_settings({"fprocess": "x"})


def test_connection_is_never_refused_across_a_restart(stand_in: tuple[str, ...], log: Log) -> None:
    async def test() -> None:
        async with running(locals_of('[f]\nfprocess = "serve"', stand_in)) as local:
            first = (await ask(local, "f"))["pid"]
            assert isinstance(first, int)
            os.kill(first, signal.SIGKILL)
            await until(lambda: local.status()[F].pids != [first], "the death is seen")
            assert (await ask(local, "f"))["pid"] not in (first, None)  # connects while nobody accepts
            assert local.status()[F].restart_count == 1

    run(test())
    assert "error: the watchdog of f was ended by SIGKILL; next start in 0.1 s" in log


def test_watchdog_that_refuses_its_settings_is_logged_and_tried_again_late(stand_in: tuple[str, ...], log: Log) -> None:
    async def test() -> None:
        async with running(locals_of(f'[f]\nfprocess = "exit 2"\n{KEPT}', stand_in)):
            await until(lambda: "next start in 30 s" in log, "the exit is logged")

    run(test())
    assert "refused: nothing fits" in log
    assert "the watchdog of f exited with status 2: it refuses its settings" in log


def test_watchdog_that_cannot_be_started_is_logged_and_tried_again(log: Log) -> None:
    async def test() -> None:
        async with running(locals_of(f'[f]\nfprocess = "x"\n{KEPT}', ("/nowhere/watchdog",))) as local:
            await until(lambda: local.status()[F].restart_count >= 2, "two restarts")

    run(test())
    assert (
        "the watchdog of f cannot be started: no such file or directory (/nowhere/watchdog); next start in 0.1 s" in log
    )
    assert "next start in 0.2 s" in log


@pytest.mark.parametrize("word", ["serve", "deaf", "stubborn"])
def test_stop_ends_every_watchdog_however_it_takes_signals(
    stand_in: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(supervisor, "KILL_GRACE_S", 0.3)
    before = len(os.listdir("/proc/self/fd"))

    async def test() -> None:
        async with running(locals_of(f'[f]\nfprocess = "{word}"', stand_in), grace_s=0.3) as local:
            pid = (await ask(local, "f"))["pid"]
        assert isinstance(pid, int)
        assert not exists(pid)  # not even as a zombie

    run(test())
    assert len(os.listdir("/proc/self/fd")) <= before  # what another test has left may have gone
    assert "error" not in log


def test_stop_right_after_start_leaves_nothing(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        local = locals_of(f'[f]\nfprocess = "serve"\n{KEPT}\n[g]\nfprocess = "serve"', stand_in)
        local.open()
        local.start()
        await local.stop(0)
        assert not any(status.pids for status in local.status().values())
        await local.stop(0)  # twice is no harm

    run(test())


def test_start_that_runs_out_of_descriptors_closes_what_it_opened(stand_in: tuple[str, ...]) -> None:
    text = "\n".join(f'[f{number}]\nfprocess = "serve"' for number in range(20))

    async def test() -> None:
        local = locals_of(text, stand_in)
        before = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                local.open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) <= before  # what another test has left may have gone

    run(test())


GATEWAY = """
import asyncio, sys
from pathlib import Path
from faashound.functions.local import LocalFunctions
from faashound.functions.table import read_functions

async def main():
    local = LocalFunctions(read_functions(Path(sys.argv[1])).functions, environ={}, watchdog=sys.argv[2:] or None)
    local.open()
    local.start()
    while not all(status.pids for status in local.status().values()):
        await asyncio.sleep(0.005)
    print(*[f"{status.pids[0]} {status.path}" for status in local.status().values()], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_killed_gateway_takes_its_watchdogs_with_it(tmp_path: Path, stand_in: tuple[str, ...]) -> None:
    path = tmp_path / "f.toml"
    path.write_text(f'[f]\nfprocess = "deaf"\n{KEPT}\n[g]\nfprocess = "deaf"\n{KEPT}\n', encoding="utf-8")
    command = [sys.executable, "-c", GATEWAY, str(path), *stand_in]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        pids = [int(word) for word in gateway.stdout.readline().split()[::2]]
        gateway.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(exists(pid) for pid in pids), DEADLINE_S, "both watchdogs gone")


# --- the same with the real watchdog -----------------------------------------------------------------------------


def test_real_watchdog_runs_the_function_with_its_environment() -> None:
    text = """
        [f]
        fprocess = "/bin/sh"
        environment = { GREETING = "hello" }
    """

    async def test() -> None:
        async with running(real(text)) as local:
            assert (await call(local, "f", b"echo $GREETING")).body == b"hello\n"
            inherited = (await call(local, "f", b"env; ls /proc/self/fd")).body.decode()
            assert not [line for line in inherited.splitlines() if line.startswith(("LISTEN_", "FAASHOUND_L"))]

    run(test())


def test_log_of_a_function_in_another_namespace_names_it_whole(log: Log) -> None:
    async def test() -> None:
        async with running(real('["f.prod"]\nfprocess = "cat"')) as local:
            await call(local, "f.prod", b"")

    run(test())
    assert "f.prod: " in log


def test_real_watchdog_that_is_killed_again_and_again_never_refuses_a_connection() -> None:
    async def test() -> None:
        async with running(real('[f]\nfprocess = "cat"')) as local:
            for _ in range(3):
                for pid in local.status()[F].pids:
                    os.kill(pid, signal.SIGKILL)
                    await until(lambda: pid not in local.status()[F].pids, "the death is seen")  # noqa: B023
                assert (await call(local, "f", b"still here")).body == b"still here"

    run(test())


def test_real_watchdog_finishes_its_calls_before_it_stops(tmp_path: Path) -> None:
    started = tmp_path / "started"

    async def test() -> None:
        async with running(real('[f]\nfprocess = "/bin/sh"')) as local:
            script = f"touch {started}; sleep 0.5; echo whole"
            calling = asyncio.create_task(call(local, "f", script.encode()))
            await until(started.exists, "the function runs")
        assert (await calling).body == b"whole\n"

    run(test())


def test_killed_gateway_takes_its_functions_with_it(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(f'[f]\nfprocess = "/bin/sh"\n{KEPT}\n', encoding="utf-8")
    with subprocess.Popen([sys.executable, "-c", GATEWAY, str(path)], stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        pid, socket_path = gateway.stdout.readline().split()
        script = f"setsid sleep 1000 & echo $! $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait"
        calling = InBackground(lambda: call_at(Path(socket_path), script.encode()))
        wait_until((tmp_path / "pids").exists, DEADLINE_S, "the function runs")
        gateway.kill()
    pids = [int(pid), *(int(word) for word in (tmp_path / "pids").read_text().split())]
    wait_until(lambda: not any(exists(each) for each in pids), DEADLINE_S, f"{pids} gone")
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert calling.result().status != 200


def test_directory_is_there_for_the_next_process_when_one_that_was_forked_closes() -> None:
    local = real("[f]\nfprocess = 'sh'\n")
    local.open()
    try:
        pid = os.fork()
        if pid == 0:
            local.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert local.path(F).exists()
    finally:
        local.close()
    assert not local.directory.exists()
