"""What is installed is whole: by pip from a clone, and in the images, whose Dockerfiles name folders one by one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from testkit.harness import ROOT, clean_environment, said
from testkit.needed import tool

PROGRAMS = ("fwatchdog", "fgateway", "fworker")
INSTALL_DEADLINE_S = 240.0  # pip fetches what builds, and builds
NOT_INSTALLED = {"tests", "testkit", "bench", "docs", "examples", "deploy"}


def tracked() -> list[Path]:
    """Return the files that a clone would have, as they are here."""
    names = said([tool("git"), "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    return [path for name in names.split("\0")[:-1] if (ROOT / (path := Path(name))).is_file()]


def rooms() -> set[str]:
    return {path.parts[0] for path in tracked() if len(path.parts) > 1 and path.suffix == ".py"} - NOT_INSTALLED


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install a copy of the sources, as pip does from a clone, into a directory of its own."""
    clone, target = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("installed")
    for path in tracked():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, clone / path)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    said([*pip, "install", "--no-deps", "--target", str(target), str(clone)], deadline_s=INSTALL_DEADLINE_S)
    return target


def test_pip_installs_every_module_of_every_room_and_nothing_else(installed: Path) -> None:
    package = installed / "faashound"
    found = {path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    modules = {
        path
        for path in tracked()
        if (path.suffix == ".py" or path.parts[0] == "ui") and path.parts[0] not in NOT_INSTALLED
    }
    assert found == modules - {Path("setup.py")} | {Path("py.typed")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_installed_program_starts_from_any_directory(installed: Path, tmp_path: Path, program: str) -> None:
    # What it depends on comes from here; PYTHONPATH reads no .pth file, so our own sources do not.
    places = os.pathsep.join([str(installed), sysconfig.get_path("purelib")])
    environment = clean_environment({}) | {"PYTHONPATH": places}
    command = [str(installed / "bin" / program), "--help"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert program in ran.stdout


def test_watchdog_starts_from_the_root_of_a_clone_and_as_a_file_of_its_own(tmp_path: Path) -> None:
    shutil.copy(ROOT / "watchdog.py", tmp_path)
    for directory in (ROOT, tmp_path):
        said([sys.executable, str(directory / "watchdog.py"), "--version"])


def test_image_is_built_from_every_room() -> None:
    dockerfile, ignored = ((ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", ".dockerignore"))
    assert set(re.findall(r"^COPY (\w+) \1$", dockerfile, re.MULTILINE)) == rooms()
    assert set(re.findall(r"^!(\w+)$", ignored, re.MULTILINE)) - {"wheels"} == rooms()


def test_image_of_the_watchdog_is_built_from_one_module_alone() -> None:
    dockerfile = (ROOT / "Dockerfile.watchdog").read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (?!--)(.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]}
    assert {word for word in copied if word.endswith(".py")} == {"setup.py", "__init__.py", "watchdog.py"}
