"""The shape of the code: who may import whom, and how long a function may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The rooms, in the order in which they stand: each may import itself and those before it.  `watchdog.py` runs alone.
ROOMS = ("watchdog", "network", "calls", "jetstream", "queues", "functions", "draining", "worker", "serving", "gateway")

# Of others, what each room may import besides the standard library.  Only watchdog has h11: HTTP is spoken there.
OTHERS: dict[str, set[str]] = {
    "watchdog": {"h11", "uvloop", "psutil", "prometheus_client"},
    "network": {"aiodns", "psutil"},
    "functions": {"cronsim", "psutil"},  # loaded in the fork server for the watchdogs' guards
    "jetstream": {"nats"},
    "draining": {"prometheus_client"},
    "worker": {"uvloop"},
    "serving": {"prometheus_client", "psutil"},
    "gateway": {"uvloop"},
}

LONGEST_FUNCTION_LINES = 60
LONGEST_MODULE_LINES = 700
MODULES = sorted(
    path
    for room in ROOMS
    for path in [ROOT / f"{room}.py", *(ROOT / room).rglob("*.py")]
    if (path.exists() and path.name != "__init__.py") or path == ROOT / "queues" / "__init__.py"
)


def module_id(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is one of ours, path of the module or name of the package) for each import of `path`."""
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield False, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= len(folder) + 1, "there is nothing above the package"
            base = folder[: len(folder) + 1 - node.level]
            names = [node.module.replace(".", "/")] if node.module else [alias.name for alias in node.names]
            yield from ((True, "/".join([*base, name])) for name in names)


def room_of(module: str) -> str:
    return module.partition("/")[0]


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, count of lines without docstring) of every function in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring_lines = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring_lines


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_module_imports_only_rooms_that_stand_before_its_own(path: Path) -> None:
    room = room_of(module_id(path))
    found = set(imports(path))
    ours = {room_of(name) for is_ours, name in found if is_ours}
    others = {name for is_ours, name in found if not is_ours} - sys.stdlib_module_names
    assert ours <= set(ROOMS[: ROOMS.index(room) + 1])
    assert others <= OTHERS.get(room, set())


def test_modules_import_each_other_in_no_circle() -> None:
    known = {module_id(path) for path in MODULES}
    needs = {module_id(path): {name for is_ours, name in imports(path) if is_ours} & known for path in MODULES}
    list(TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", [*MODULES, *sorted(ROOT.glob("examples/*.py"))], ids=module_id)
def test_function_fits_on_a_page(path: Path) -> None:
    assert [(name, lines) for name, lines in functions(parse(path)) if lines > LONGEST_FUNCTION_LINES] == []
