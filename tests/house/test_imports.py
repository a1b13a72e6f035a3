"""The shape of the code: who may import whom, and how long a function and a module may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The rooms, in the order in which they stand: each may import itself and those before it.  `watchdog.py` runs alone.
ROOMS = ("watchdog", "network", "calls", "queues", "functions", "draining", "worker", "serving", "ui", "gateway")

# Of others, what each room may import besides the standard library.  Only watchdog has h11: HTTP is spoken there.
OTHERS: dict[str, set[str]] = {
    "watchdog": {"h11", "uvloop", "psutil", "prometheus_client"},
    "network": {"aiodns", "psutil"},
    "functions": {"cronsim", "psutil"},  # loaded in the fork server for the watchdogs' guards
    "queues": {"nats", "nkeys"},
    "draining": {"prometheus_client"},
    "worker": {"uvloop"},
    "serving": {"prometheus_client", "psutil"},
    "gateway": {"uvloop"},
}

# What stands beside the rooms, and whom it may import.  Tests and measurements share testkit and know not each other.
BESIDE: dict[str, set[str]] = {
    "testkit": {"faashound", "testkit"},
    "bench": {"faashound", "testkit", "bench"},
    "tests": {"faashound", "testkit", "tests", "docs", "examples"},
    "docs": {"faashound"},
    "examples": set(),
    "setup": set(),
}
TESTS_OF_BENCH = {"tests/system/test_chaos"}

# The ones that look behind the interface of a queue; for what no user of one can see.
LOOKS_INSIDE = {"testkit/spool_kit", *(f"tests/queues/test_jetstream{tail}" for tail in ("", "_deaths", "_faults"))}
OF_NAMED_TUPLES = {"_replace", "_asdict", "_fields"}

LONGEST_FUNCTION_LINES = 60
LONGEST_MODULE_LINES = 700  # but for watchdog.py, which is one file for images to copy


def module_id(path: Path) -> str:
    """Return the path of a module, that of its folder for an `__init__.py`."""
    return path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")


def modules_of(name: str) -> list[Path]:
    return sorted(path for path in [ROOT / f"{name}.py", *(ROOT / name).rglob("*.py")] if path.exists())


MODULES = [path for room in ROOMS for path in modules_of(room)]
OTHER_MODULES = [path for name in BESIDE for path in modules_of(name)]
TOOLS = [path for name in ("testkit", "bench", "docs") for path in modules_of(name)]


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
            module = [*base, *(node.module or "").split(".")] if node.module else list(base)
            yield from ((True, "/".join([*module, alias.name])) for alias in node.names)
            if node.module:
                yield True, "/".join(module)


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


@pytest.mark.parametrize("path", OTHER_MODULES, ids=module_id)
def test_tests_and_tools_import_only_what_they_may(path: Path) -> None:
    name = module_id(path)
    ours = {package for _, package in imports(path)} & {"faashound", *BESIDE, "bench"}
    assert ours <= BESIDE[room_of(name)] | ({"bench"} if name in TESTS_OF_BENCH else set())


@pytest.mark.parametrize("path", OTHER_MODULES, ids=module_id)
def test_tests_and_tools_read_no_private_names_of_others(path: Path) -> None:
    tree = parse(path)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    of_others = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match("_[^_]", node.attr)
        and ast.unparse(node.value) not in ("self", "cls", "os")  # os._exit is public, whatever its name
    }
    assert of_others - own - OF_NAMED_TUPLES == set() or module_id(path) in LOOKS_INSIDE


def test_every_module_stands_in_a_room_or_beside_them() -> None:
    paths = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py"))]
    found = {path.parts[0].removesuffix(".py") for path in paths} - {"__init__", "build"}
    assert found == {*ROOMS, *BESIDE}


def test_modules_import_each_other_in_no_circle() -> None:
    known = {module_id(path) for path in MODULES}
    needs = {
        name: {needed for is_ours, needed in imports(path) if is_ours} & known - {name}
        for path in MODULES
        for name in [module_id(path)]
    }
    list(TopologicalSorter(needs).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", [*MODULES, *TOOLS, *sorted(ROOT.glob("examples/*.py"))], ids=module_id)
def test_function_fits_on_a_page(path: Path) -> None:
    assert [(name, lines) for name, lines in functions(parse(path)) if lines > LONGEST_FUNCTION_LINES] == []


@pytest.mark.parametrize("path", [path for path in [*MODULES, *TOOLS] if path != ROOT / "watchdog.py"], ids=module_id)
def test_module_is_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_MODULE_LINES
