"""What lies around a program when it is started: closed streams, files that are called like ours, variables."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from faashound import watchdog
from testkit.harness import (
    STOP_DEADLINE_S,
    Program,
    clean_environment,
    command_line_of,
    command_of,
    crowding,
    free_port,
    http_request,
    wait_until,
)
from testkit.system import System

CLOSINGS = {"all": "<&- >&- 2>&-", "input": "<&-", "output": ">&-", "errors": "2>&-"}


def answers(port: int, path: str) -> bool:
    try:
        return http_request(port, "GET", path).status == 200
    except ConnectionError:
        return False


@contextmanager
def started_without_streams(name: str, closing: str, environment: dict[str, str], cwd: Path) -> Iterator[None]:
    command = ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *command_of(name)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with subprocess.Popen(command, env=clean_environment(environment), cwd=cwd, **streams) as process:  # type: ignore[call-overload]
        try:
            yield
            taken = [Path(f"/proc/{process.pid}/fd/{fd}").readlink() for fd in range(3)]
            assert taken == [Path("/dev/null")] * 3
        finally:
            process.terminate()
            assert process.wait(STOP_DEADLINE_S * crowding()) == 0


@pytest.mark.parametrize("closing", CLOSINGS.values(), ids=CLOSINGS)
def test_gateway_and_its_worker_serve_when_started_without_standard_streams(tmp_path: Path, closing: str) -> None:
    (tmp_path / "functions.toml").write_text('[cat]\nfprocess = "cat"\n')
    port = free_port()
    body = bytes(range(256)) * 1200
    with started_without_streams("gateway", closing, {"port": str(port), "metrics_port": "0"}, tmp_path):
        wait_until(lambda: answers(port, "/healthz"), 15.0, "the gateway serves")
        wait_until(
            lambda: http_request(port, "POST", "/function/cat", {}, body).body == body, 10.0, "the function serves"
        )
        accepted = http_request(port, "POST", "/async-function/cat", {}, body)
        assert accepted.status == 202
        status = f"/async-function/{accepted.headers['x-call-id']}"
        wait_until(lambda: b'"done"' in http_request(port, "GET", f"{status}?wait=5s").body, 15.0, "the call is done")
        assert http_request(port, "GET", f"{status}/result").body == body


@pytest.mark.parametrize("closing", CLOSINGS.values(), ids=CLOSINGS)
def test_worker_works_when_started_without_standard_streams(tmp_path: Path, closing: str) -> None:
    functions = '[cat]\nfprocess = "cat"\n'
    port = free_port()
    with System(functions, {"worker": "none"}) as system:
        gateway_url = f"http://127.0.0.1:{system.port}"
        settings = {"queue_url": f"spool:{system.spool}", "gateway_url": gateway_url, "metrics_port": str(port)}
        with started_without_streams("worker", closing, settings, tmp_path):
            assert system.ended(system.submit("cat", b"x"))["state"] == "done"


# Files that are called like modules, where a person keeps functions.

LIKE_OURS = "email calendar json random string queue token copy uuid hashlib datetime secrets select signal socket http"
SHADOW = "import sys; sys.stderr.write('a file of the function was run by ours'); raise SystemExit(99)"


@pytest.fixture
def shadows(tmp_path: Path) -> Path:
    """A directory with files that are called like modules which our programs import."""
    directory = tmp_path / "shadows"
    directory.mkdir()
    for name in [*LIKE_OURS.split(), "h11", "uvloop", "psutil"]:
        (directory / f"{name}.py").write_text(SHADOW)
    return directory


CONSOLE = "import sys; sys.argv[0] = 'bin/{0}'; from faashound.{1} import main; sys.exit(main())"
STARTS = {
    "module": lambda name: ["-m", f"faashound.{name}"],
    "console-script": lambda name: ["-c", CONSOLE.format(f"f{name}", name)],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("name", ["watchdog", "gateway", "worker"])
def test_program_runs_none_of_them_when_they_lie_in_the_working_directory_or_in_pythonpath(
    shadows: Path, name: str, start: Callable[[str], list[str]]
) -> None:
    # Without the measuring of coverage: its start comes before our first line, and would itself import what lies there.
    environment = {key: text for key, text in clean_environment({}).items() if not key.startswith("COVERAGE")} | {
        "PYTHONPATH": str(shadows)
    }
    done = subprocess.run(
        [sys.executable, *start(name), "--version"],
        env=environment,
        cwd=shadows,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_watchdog_runs_none_of_them_when_it_is_a_file_beside_them(shadows: Path) -> None:
    shutil.copy(Path(watchdog.__file__), shadows / "watchdog.py")
    done = subprocess.run(
        [sys.executable, "watchdog.py", "--version"], cwd=shadows, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_gateway_serves_now_and_later_when_they_lie_beside_the_functions_file() -> None:
    system = System('[hello]\nfprocess = "python3 email.py"\n')
    for name in LIKE_OURS.split():
        (system.temporary / f"{name}.py").write_text("print('hello')")
    with system:
        assert system.request("POST", "/function/hello").text == "hello\n"
        (system.temporary / "faashound.py").write_text(SHADOW)
        os.kill(system.worker_pid(), signal.SIGKILL)
        assert system.ended(system.submit("hello"))["state"] == "done"


# Variables: what is a function's is not its watchdog's, and the other way round.

POISON = {
    "PYTHONHOME": "/nowhere",
    "PYTHONPATH": "shadows",
    "PYTHONMALLOC": "nonsense",
    "LD_PRELOAD": "/nowhere.so",
    "LD_LIBRARY_PATH": "/nowhere",
    "TMPDIR": "/nowhere",
    "TZ": "Asia/Tokyo",
    "MALLOC_ARENA_MAX": "many",
}


@pytest.mark.parametrize(("name", "value"), POISON.items(), ids=POISON)
def test_variable_reaches_the_function_only_when_it_would_change_its_watchdog(
    shadows: Path, name: str, value: str
) -> None:
    value = str(shadows) if value == "shadows" else value
    functions = f"[f]\nfprocess = \"sh -c 'echo ${name}'\"\nenvironment = {{ {name} = '{value}' }}\n"
    with System(functions, {"worker": "none"}) as system:
        assert system.request("POST", "/function/f", b"x").text.splitlines()[-1] == value
        watchdogs = [pid for pid in system.survivors() if b"faashound.functions.forkserver" in command_line_of(pid)]
        assert len(watchdogs) > 1  # the fork server, and what it has forked
        assert all(f"\0{name}={value}" not in variables(pid) for pid in watchdogs)


def variables(pid: int) -> str:
    with suppress(OSError):  # it has ended
        return "\0" + Path(f"/proc/{pid}/environ").read_text()
    return ""


OURS_ALONE = {
    "NOTIFY_SOCKET": "/run/notify",
    "WATCHDOG_USEC": "5000000",
    "CREDENTIALS_DIRECTORY": "/run/credentials",
    "LISTEN_FDNAMES": "web",
    "FAASHOUND_X": "1",
    "max_inflight": "3",
    "suppress_lock": "true",
}
TOLD = {"exec_timeout": "9s", "read_timeout": "8s", "write_timeout": "7s", "healthcheck_interval": "1s", "KEPT": "yes"}


def test_function_sees_neither_what_systemd_tells_us_nor_our_settings_when_its_watchdog_stands_alone() -> None:
    with Program("watchdog", {"fprocess": "env -0", **OURS_ALONE, **TOLD}) as program:
        text = http_request(program.port).text
    seen = dict(entry.partition("=")[::2] for entry in text.split("\0") if entry)
    assert not seen.keys() & (OURS_ALONE.keys() | {"fprocess", "port", "metrics_port", "workers"})
    assert {name: seen.get(name) for name in TOLD} == TOLD
