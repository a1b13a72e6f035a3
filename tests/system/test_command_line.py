"""What our programs print for people: when standard output takes no more, they end with a status, not a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from faashound.calls.model import State
from faashound.queues.spool.limits import DATABASE
from testkit.harness import START_DEADLINE_S, clean_environment, command_of, crowding
from testkit.needed import want_root
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


# Another user may not read our modules everywhere: they are read before.
AS_STRANGER = """
import os, sys
import faashound.queues.jetstream.queue, faashound.queues.migrate
from faashound.worker import main
os.setuid(65534)
sys.exit(main(sys.argv[1:], os.environ))
"""


def told(arguments: list[str], directory: Path, *, as_stranger: bool = False) -> str:
    """Return what a command of fworker, which is to fail, says on standard error; it has one line of it, or usage."""
    command = [sys.executable, "-c", AS_STRANGER] if as_stranger else command_of("worker")
    done = subprocess.run(
        [*command, *arguments],
        env=clean_environment({"queue_url": f"spool:{directory}", "PYTHONPATH": os.pathsep.join(sys.path)}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=START_DEADLINE_S * crowding(),
        check=False,
    )
    said = done.stderr.decode()
    assert done.returncode in (1, 2), said
    assert "Traceback" not in said
    return said


ON_A_SPOOL = [
    ["dead", "list"],
    ["dead", "show", "X"],
    ["cancel", "--all"],
    ["migrate", "--from", "spool:DIRECTORY", "--to", "nats://127.0.0.1:1"],
]


@pytest.fixture(params=ON_A_SPOOL, ids=" ".join)
def on(request: pytest.FixtureRequest) -> Callable[[Path], list[str]]:
    """Return what makes a command of people on the spool in a directory."""
    return lambda directory: [word.replace("DIRECTORY", str(directory)) for word in request.param]


def test_command_makes_no_queue_of_a_directory_that_is_none(tmp_path: Path, on: Callable[[Path], list[str]]) -> None:
    (tmp_path / "file").touch()
    said = told(on(tmp_path), tmp_path)
    assert f"spool:{tmp_path}: there is no queue" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_command_names_the_queue_in_a_directory_below(letters: Letters, on: Callable[[Path], list[str]]) -> None:
    above = letters.directory.parent
    assert f"meant is {letters.directory}?" in told(on(above), above)
    assert not (above / DATABASE).exists()


@pytest.mark.parametrize("name", ["a" * 300, "file/below", "absent"])
def test_command_says_what_is_wrong_with_a_path(tmp_path: Path, on: Callable[[Path], list[str]], name: str) -> None:
    (tmp_path / "file").touch()
    said = told(on(tmp_path / name), tmp_path / name)
    assert f"spool:{tmp_path / name}: " in said
    assert "Errno" not in said


@pytest.mark.parametrize("closed", ["above", "directory", "owners"])
def test_command_says_whose_a_queue_is_that_it_may_not_use(
    letters: Letters, on: Callable[[Path], list[str]], closed: str
) -> None:
    """As another user than that of gateway and worker."""
    want_root("becoming another user")
    for place in letters.directory.parents:
        if place.stat().st_mode & 0o005 != 0o005 and place != Path("/tmp"):  # what pytest made
            place.chmod(0o755)
    if closed == "owners":
        for place in (letters.directory, *letters.directory.iterdir()):
            place.chmod(0o755 if place.is_dir() else 0o644)
        (letters.directory / "owners").chmod(0o700)
    elif closed == "above":
        letters.directory.parent.chmod(0o700)
    said = told(on(letters.directory), letters.directory, as_stranger=True)
    assert "belongs to root" in said
    assert "this process runs as nobody" in said


@pytest.mark.parametrize("command", ["show", "retry", "purge"])
def test_id_that_no_call_can_have_is_refused(letters: Letters, command: str) -> None:
    said = told(["dead", command, os.fsdecode(b"\xff")], letters.directory)
    assert "allowed: an id of a call" in said
