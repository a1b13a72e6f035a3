"""What some tests want of the machine beyond the Python environment, and what becomes of them where it is missing.

    python -m testkit.needed        # the Debian packages that are missing, if any, on one line

`make test` installs those as root with apt.  Elsewhere the tests that want them are left out, each with its reason, and
the run's last line counts them; in CI they fail (tests/conftest.py), for a test that is skipped there tests nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGES = {  # of Debian, by the program that they bring
    "chromedriver": "chromium-driver",
    "chromium": "chromium",
    "docker": "docker.io",
    "dockerd": "docker.io",
    "git": "git",
    "mmdebstrap": "mmdebstrap",
    "openssl": "openssl",
    "promtool": "prometheus",
    "runc": "runc",
    "systemd-analyze": "systemd",
}
SEARCHED = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin"


def missing_packages() -> list[str]:
    """Return the packages that this machine lacks."""
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program, path=SEARCHED) is None})


@cache
def tool(name: str) -> str:
    """Return the path of a program of the test environment or the machine; the test is left out without it."""
    found = shutil.which(name, path=SEARCHED)
    if found is None:
        origin = f"apt-get install {PACKAGES[name]}" if name in PACKAGES else "the extra `test` of setup.py has it"
        pytest.skip(f"no program {name}: {origin}")
    return found


def want_root(purpose: str) -> None:
    """Leave the test out unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip(f"{purpose} takes root")


if __name__ == "__main__":
    print(*missing_packages())
