"""Secrets at the path where programs for OpenFaaS look for them: each function sees its own, with and without root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from faashound.functions import mounts
from faashound.functions.forkserver import SECRETS_PATH
from testkit.harness import Answer
from testkit.needed import tool, want_root
from testkit.system import System

# A machine where the directory is there, though this one may have none: everything else in /var is hidden.
MACHINE = f'mount -t tmpfs none /var && mkdir -p {SECRETS_PATH} && exec "$@"'
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
# The module's text, as another user may not be let into the directory that it lies in.
BINDS = f"""{Path(mounts.__file__).read_text(encoding="utf-8")}
import sys
bind(sys.argv[1], sys.argv[2])
os.execvp("sh", ["sh", "-c", "cat $0/*; id -u; id -g; grep Cap.rm /proc/self/status", sys.argv[2]])
"""


def machine() -> list[str]:
    """Return what runs a command on a machine that has the directory."""
    rights = [] if os.geteuid() == 0 else ["--map-root-user"]
    return [tool("unshare"), *rights, "--mount", "sh", "-c", MACHINE, "sh"]


def send(system: System, method: str, what: str, document: object) -> Answer:
    headers = {"Content-Type": "application/json"}
    return system.request(method, f"/system/{what}", json.dumps(document).encode(), headers)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    settings = {"deploy": "process", "state": str(tmp_path_factory.mktemp("state")), "worker": "none"}
    with System("", settings, prefix=machine()) as system:
        for name in ("one", "two"):
            assert send(system, "POST", "secrets", {"name": name, "value": f"value of {name}"}).status == 201
            document = {"service": name, "image": "process", "envProcess": "/bin/sh", "secrets": [name]}
            assert send(system, "POST", "functions", document).status == 202
        yield system


def test_each_function_sees_its_own_secrets_at_the_fixed_path_and_a_changed_one_at_the_next_call(
    system: System,
) -> None:
    for name in ("one", "two"):
        found = system.request("POST", f"/function/{name}", f"cd {SECRETS_PATH}; ls; cat *".encode())
        assert found.text == f"{name}\nvalue of {name}"
    assert send(system, "PUT", "secrets", {"name": "two", "value": "changed"}).status == 200
    assert system.request("POST", "/function/two", f"cat {SECRETS_PATH}/two".encode()).text == "changed"
    assert system.request("POST", "/function/two", b"cat $secret_mount_path/two").text == "changed"


def test_directory_of_the_machine_stays_empty(system: System) -> None:
    root = Path(f"/proc/{system.process.pid}/root")
    assert list((root / SECRETS_PATH.removeprefix("/")).iterdir()) == []


def test_function_is_killed_at_its_deadline_as_ever(system: System) -> None:
    answer = system.request("POST", "/function/one", b"setsid sleep 60 & sleep 60", {"X-Timeout": "300ms"})
    assert answer.status == 408


@pytest.mark.parametrize("prefix", [(), NOBODY], ids=["as we are", "nobody"])
def test_directory_is_bound_with_and_without_privileges_and_the_user_stays(
    tmp_path: Path, prefix: tuple[str, ...]
) -> None:
    if prefix:
        want_root("becoming another user")
    for directory in (tmp_path, *tmp_path.parents):
        if directory.is_relative_to(tempfile.gettempdir()) and directory != Path(tempfile.gettempdir()):
            directory.chmod(0o755)
    (tmp_path / "token").write_text("secret\n")
    python = os.path.realpath(sys.executable)  # not the environment's, for the same reason
    command = [*machine(), *prefix, python, "-I", "-c", BINDS, str(tmp_path), SECRETS_PATH]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    secret, uid, gid, permitted = ran.stdout.splitlines()
    assert secret == "secret"
    if prefix:
        assert (uid, gid) == ("65534", "65534")
        assert int(permitted.split()[1], 16) == 0, "what it executes has no rights in the namespace"


@pytest.mark.skipif(os.geteuid() != 0, reason="without root there is no mount without a user namespace")
def test_functions_log_says_where_the_secrets_are_not(tmp_path: Path) -> None:
    """A kernel that allows no user namespace: the limit on their number is nought, and so is our right to mount."""
    forbidden = [*machine(), "sh", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"', "sh"]
    poor = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    own = ["unshare", "--user", "--map-root-user"]
    settings = {"deploy": "process", "state": str(tmp_path), "worker": "none"}
    with System("", settings, prefix=[*own, *forbidden, *poor]) as system:
        assert send(system, "POST", "secrets", {"name": "one", "value": "x"}).status == 201
        document = {"service": "f", "image": "process", "envProcess": "/bin/sh", "secrets": ["one"]}
        assert send(system, "POST", "functions", document).status == 202
        assert system.request("POST", "/function/f", b"cat $secret_mount_path/one").text == "x"
        system.wait_log(f"the secrets are where secret_mount_path says, and not at {SECRETS_PATH}: ", 15)
