"""What a run of the harness has found: figures, printed as a table while it runs, and as JSON at its end."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

COLUMNS = "| point | what | measured | target | holds |\n|---|---|---:|---:|---|"
MEASURED_PACKAGES = ("h11", "uvloop", "psutil", "prometheus-client")


@dataclass(frozen=True)
class Target:
    """What the project holds itself to: at least, or at most, `bound`."""

    bound: float
    at_least: bool

    def holds(self, value: float) -> bool:
        """Tell whether `value` is on the right side."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {format_value(self.bound)}"


def at_least(bound: float) -> Target:
    """Return the target of `bound` or more."""
    return Target(bound, at_least=True)


def at_most(bound: float) -> Target:
    """Return the target of `bound` or less."""
    return Target(bound, at_least=False)


@dataclass(frozen=True)
class Figure:
    """One row: the median of `rounds`, in `unit` ("x" for a ratio)."""

    point: str
    what: str
    unit: str
    rounds: tuple[float, ...]
    target: Target | None = None

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else self.target.holds(self.value)

    def row(self) -> str:
        """Return the figure as a row of the table."""
        verdict = {None: "", True: "yes", False: "**no**"}[self.holds]
        target = "" if self.target is None else f"{self.target} {self.unit}"
        return f"| {self.point} | {self.what} | {format_value(self.value)} {self.unit} | {target} | {verdict} |"


@dataclass
class Report:
    """Collects figures and remarks, and prints each at once."""

    machine: Mapping[str, str]
    figures: list[Figure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Print what it runs on and the head of the table."""
        for name, value in self.machine.items():
            print(f"{name}: {value}")
        print(f"\n{COLUMNS}", flush=True)

    def add(self, point: str, what: str, unit: str, rounds: Sequence[float], target: Target | None = None) -> Figure:
        """Print a figure and keep it."""
        figure = Figure(point, what, unit, tuple(rounds), target)
        self.figures.append(figure)
        print(figure.row(), flush=True)
        return figure

    def remark(self, text: str) -> None:
        """Print a remark at the end."""
        self.remarks.append(text)

    def end(self, path: Path) -> None:
        """Print the remarks and write everything to `path` as JSON."""
        missed_count = sum(figure.holds is False for figure in self.figures)
        print()
        for remark in self.remarks:
            print(f"- {remark}")
        print(f"- targets: {sum(figure.holds is True for figure in self.figures)} met, {missed_count} missed")
        figures = [asdict(each) | {"value": each.value, "holds": each.holds} for each in self.figures]
        document = {"machine": dict(self.machine), "figures": figures, "remarks": self.remarks}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def format_value(value: float) -> str:
    """Return a number with three significant digits, large ones whole."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round: what was measured side by side is compared side by side."""
    return [one / other for one, other in zip(above, below, strict=True)]


def describe_machine(directory: Path) -> dict[str, str]:
    """Return what the figures depend on; `directory` is where queues and spilled bodies lie."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    mounts = [part for part in psutil.disk_partitions(all=True) if directory.is_relative_to(part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint))
    wrk = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout.split(" [")[0]
    packages = ", ".join(f"{name} {version(name)}" for name in MEASURED_PACKAGES)
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores of {cpu}, {psutil.virtual_memory().total >> 20} MiB",
        "kernel": platform.release(),
        "python": f"{platform.python_version()}, {packages}",
        "disk": mount.fstype,
        "load generator": f"{wrk}, one thread, on the same machine",
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }
