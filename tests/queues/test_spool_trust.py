"""What a spool's directory must be like to be trusted: its token opens /system, and its rows are run."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from faashound.calls.model import QueueUnavailable
from faashound.queues.spool.directory import TOKEN_CHARS
from faashound.queues.spool.limits import DATABASE
from faashound.queues.spool.queue import Spool
from testkit.needed import want_root
from testkit.spool_kit import Desk

STRANGER = 65534
KEPT = ("token", "writer.lock", "bodies", "owners", "bells", "reserve", DATABASE)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A queue's directory as it is left by the program."""
    desk = Desk(tmp_path / "spool")
    desk.put()
    desk.close()
    return desk.directory


def refused(directory: Path) -> str:
    """What the start says."""
    with pytest.raises(QueueUnavailable) as caught:
        asyncio.run(Spool.open(directory))
    return str(caught.value)


# -- the token


@pytest.mark.parametrize("text", ["", "\n", "a" * (TOKEN_CHARS - 1), " " * TOKEN_CHARS], ids=repr)
def test_queue_refuses_to_start_when_its_token_is_short(directory: Path, text: str) -> None:
    (directory / "token").write_text(text)
    said = refused(directory)
    assert str(directory / "token") in said
    assert f"allowed: {TOKEN_CHARS} or more" in said


def test_token_is_made_anew_when_it_was_removed(directory: Path) -> None:
    (directory / "token").unlink()
    (directory / "token.new").symlink_to(directory.parent / "elsewhere")  # what was planted is not written through
    desk = Desk(directory)
    assert len(desk.spool.token) >= TOKEN_CHARS
    desk.close()
    assert not (directory.parent / "elsewhere").exists()


# -- who may write


def give_away(path: Path) -> None:
    want_root("making a file another user's")
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def open_to_group(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWGRP)


def open_to_all(path: Path) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | stat.S_IWOTH)


@pytest.mark.parametrize("name", ["", *KEPT])
@pytest.mark.parametrize("change", [give_away, open_to_group, open_to_all], ids=lambda change: change.__name__)
def test_queue_refuses_to_start_when_others_may_write(
    directory: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(directory / name)
    said = refused(directory)
    assert str(directory / name) in said
    assert ("belongs to nobody" if change is give_away else "chmod go-w") in said


@pytest.mark.parametrize("name", KEPT)
def test_queue_refuses_to_follow_a_link_in_its_directory(directory: Path, name: str) -> None:
    path, elsewhere = directory / name, directory.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert f"{path} is a symbolic link" in refused(directory)


@pytest.mark.parametrize("name", ["writer.lock", "token", "reserve", DATABASE])
def test_queue_does_not_wait_when_a_fifo_stands_in_for_a_file(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert f"{directory / name} is a special file" in refused(directory)


def test_queue_refuses_a_directory_that_a_stranger_has_planted(tmp_path: Path) -> None:
    planted = tmp_path / "spool"
    planted.mkdir()
    (planted / "token").write_text("x" * TOKEN_CHARS)
    for path in (planted, planted / "token"):
        give_away(path)
    assert f"{planted} is a directory that belongs to nobody" in refused(planted)


def test_queue_follows_a_link_to_its_directory_only_when_it_is_ours(directory: Path) -> None:
    link = directory.parent / "link"
    link.symlink_to(directory)
    Desk(link).close()
    give_away(link)
    assert f"{link} is a symbolic link that belongs to nobody" in refused(link)


# -- what is not refused


def test_queue_opens_when_others_may_only_read(directory: Path) -> None:
    """As a backup, or a unit's StateDirectoryMode, may have left it."""
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    desk = Desk(directory)
    assert len(desk.do(desk.spool.calls())) == 1
    desk.close()


def test_queue_is_closed_to_other_users_when_it_is_made_with_an_open_umask(tmp_path: Path) -> None:
    program = f"""
import asyncio, os
from pathlib import Path
from faashound.queues.spool.queue import Spool
os.umask(0)
async def main():
    await (await Spool.open(Path({str(tmp_path / "spool")!r}))).close()
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    assert {path.stat().st_mode & 0o022 for path in [tmp_path / "spool", *(tmp_path / "spool").iterdir()]} == {0}
    Desk(tmp_path / "spool").close()
