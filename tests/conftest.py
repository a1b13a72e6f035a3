"""Programs that many tests share: each is started once per test process, and leaves nothing behind at the end."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from testkit.disks import mount_small_disk
from testkit.harness import Program

# Many examples are real requests to real processes: a busy machine is no failure of the program.
settings.register_profile("processes", deadline=None)
settings.load_profile("processes")

# Audit events; the last is raised by tests whose processes are started by another task, which a skip would not end.
STARTS_A_PROCESS = frozenset({"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "tests.starts_a_process"})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-processes", action="store_true", help="leave out each test that would start a process")


class NoProcesses:
    """Leaves out each test that is about to start a process: an audit hook knows that better than a list of tests."""

    def __init__(self) -> None:
        self._is_test = False
        sys.addaudithook(self._on_event)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        return (yield from self._watch())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        return (yield from self._watch())

    def _watch(self) -> Generator[None, None, None]:
        self._is_test = True
        try:
            return (yield)
        finally:
            self._is_test = False

    def _on_event(self, event: str, _: tuple[object, ...]) -> None:
        if self._is_test and event in STARTS_A_PROCESS:
            pytest.skip("starts a process")


def pytest_configure(config: pytest.Config) -> None:
    """Take back what a shell has ignored for us: `nohup`, or `&` in a script, must not change what programs inherit."""
    if config.getoption("--no-processes"):
        config.pluginmanager.register(NoProcesses())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail in CI what skips itself: a test that needs something absent must not look like one that passed."""
    report = yield
    if os.environ.get("CI") and report.skipped and not item.config.getoption("--no-processes"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CI allows no skipping: {reason}"
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Name at the end of a run the tests that failed, a line each; then count those left out, and say why.

    In CI pytest prints values whole, however long, so its own summary may be far up.
    """
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a process of pytest-xdist: its reports are with the one that started it
        return
    for report in (*reporter.getreports("failed"), *reporter.getreports("error")):
        message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        print(f"failed: {report.nodeid}: {message[:200].splitlines()[0]}")
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reporter.getreports("skipped"))
    if reasons:
        each = "; ".join(f"{count} ({reason})" for reason, count in reasons.most_common())
        print(f"{reasons.total()} tests were left out: {each}")


@pytest.fixture(scope="session")
def shell() -> Iterator[Program]:
    """A watchdog whose function runs the request's body as a shell script."""
    with Program("watchdog", {"fprocess": "/bin/sh"}) as program:
        yield program


@pytest.fixture(scope="session")
def cat() -> Iterator[Program]:
    """A watchdog whose function answers the request's body."""
    with Program("watchdog", {"fprocess": "cat"}) as program:
        yield program


@pytest.fixture(scope="session")
def printenv() -> Iterator[Program]:
    """A watchdog whose function answers its environment, each variable ended by NUL."""
    with Program("watchdog", {"fprocess": "env -0"}) as program:
        yield program


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    with mount_small_disk(place):
        yield place
