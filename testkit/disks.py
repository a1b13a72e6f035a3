"""File systems that are small, and full: what a queue lives on when a disk fills up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testkit.needed import want_root


@contextmanager
def mount_small_disk(place: Path, size_bytes: int = 2 << 20) -> Iterator[None]:
    """Make `place` a file system of 2 MiB, or `size_bytes`; the test is left out where nothing can be mounted."""
    want_root("mounting a small disk")
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "none", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(directory: Path) -> Path:
    """Leave no free byte on the file system of `directory`; return the file to remove for room."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return ballast
