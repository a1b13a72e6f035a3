"""What our programs print for people: when standard output takes no more, they end with a status, not a traceback."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from faashound.calls.model import State
from testkit.harness import START_DEADLINE_S, clean_environment, command_of, crowding
from testkit.queue_kit import SpoolDesk

SIGPIPE_STATUS = 141  # what a shell tells of a program that SIGPIPE ended

PRINTING = [
    *(f"{program} {flag}" for program in ("watchdog", "gateway", "worker") for flag in ("--help", "--version")),
    "worker dead --help",
    "worker dead list --help",
    "worker migrate --help",
    "worker dead list",
    "worker dead list --json",
    "worker dead show CALL-ID",
    "worker dead retry CALL-ID",
    "worker dead purge --all",
]


@dataclass(frozen=True)
class Letters:
    """A spool with two dead letters, and the id of one of them."""

    directory: Path
    call_id: str

    def run(self, command: str, stdout: int | None) -> subprocess.CompletedProcess[str]:
        """Run a command line on them; `stdout` is its standard output, None: it has none."""
        program, *arguments = command.replace("CALL-ID", self.call_id).split()
        return subprocess.run(
            [*(["sh", "-c", 'exec "$@" >&-', "sh"] if stdout is None else []), *command_of(program), *arguments],
            env=clean_environment({"queue_url": f"spool:{self.directory}"}),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=START_DEADLINE_S * crowding(),
            check=False,
        )

    def left(self) -> int:
        """Return how many dead letters there are."""
        desk = SpoolDesk(self.directory)
        try:
            return desk.do(desk.queue.stats()).by_state.get(State.DEAD, 0)
        finally:
            desk.close()


@pytest.fixture
def letters(tmp_path: Path) -> Letters:
    desk = SpoolDesk(tmp_path / "spool")
    try:
        for _ in range(2):
            call = desk.put("f.openfaas-fn")
            desk.finish(desk.claim_one(), State.DEAD)
    finally:
        desk.close()
    return Letters(tmp_path / "spool", call.id)


@contextmanager
def reader_that_has_left() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "wb") as file:
        yield file.fileno()


@pytest.mark.parametrize("command", PRINTING)
def test_program_ends_as_by_sigpipe_when_its_reader_has_left(letters: Letters, command: str) -> None:
    with reader_that_has_left() as stdout:
        done = letters.run(command, stdout)
    assert (done.stderr, done.returncode) == ("", SIGPIPE_STATUS)


@pytest.mark.parametrize("command", PRINTING)
def test_program_says_why_it_fails_when_the_disk_of_its_output_is_full(letters: Letters, command: str) -> None:
    with full_disk() as stdout:
        done = letters.run(command, stdout)
    assert (done.stderr, done.returncode) == ("cannot write to standard output: no space left on device\n", 1)


@pytest.mark.parametrize("command", PRINTING)
def test_program_says_why_it_fails_when_it_has_no_output(letters: Letters, command: str) -> None:
    done = letters.run(command, None)
    assert (done.stderr, done.returncode) == ("cannot write to standard output: it is closed\n", 1)


@pytest.mark.parametrize("output", [reader_that_has_left, full_disk])
def test_purge_deletes_every_letter_when_its_output_fails_at_the_first(
    letters: Letters, output: Callable[[], Iterator[int]]
) -> None:
    with output() as stdout:  # type: ignore[attr-defined]  # a context manager, whatever contextmanager says
        letters.run("worker dead purge --all", stdout)
    assert letters.left() == 0
