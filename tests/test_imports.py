"""The shape of the code: who may import whom, and how long a function may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Of ours, what each module may import.  Imports run one way: watchdog <- parts <- programs.
_PARTS = {"watchdog", "names", "spool", "queues", "keeper", "functions", "callbacks", "retries", "calls"}
_PARTS |= {"addresses", "lookups"}
OURS: dict[str, set[str]] = {
    "__init__": set(),
    "watchdog": set(),
    "names": {"watchdog"},
    "spool": {"watchdog", "names"},
    "keeper": {"watchdog"},
    "functions": {"watchdog", "names", "keeper"},
    "addresses": {"watchdog"},
    "lookups": {"watchdog", "addresses"},
    "callbacks": {"watchdog", "names", "addresses"},
    "retries": {"watchdog", "names"},
    "jetstream": {"watchdog", "names", "spool"},
    "queues": {"watchdog", "names", "spool", "jetstream"},  # which of the two a URL names
    "calls": {"watchdog", "names", "spool", "queues"},
    "migrate": {"watchdog", "names", "spool", "queues"},
    "worker": _PARTS | {"migrate"},
    "gateway": _PARTS | {"worker"},  # it may start a worker beside itself, and knows its settings
}

# Of others, what each may import besides the standard library.  HTTP is spoken in one place: only watchdog has h11.
OTHERS: dict[str, set[str]] = {
    "watchdog": {"h11", "uvloop", "psutil", "prometheus_client"},
    "gateway": {"uvloop", "prometheus_client"},
    "worker": {"uvloop", "prometheus_client"},
    "jetstream": {"nats"},
    "addresses": {"psutil"},
}

LONGEST_FUNCTION_LINES = 60
MODULES = sorted(path for path in ROOT.glob("*.py") if path.name != "setup.py")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.Module) -> Iterator[tuple[bool, str]]:
    """Yield (whether it is one of ours, top-level name) for each import anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield False, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "there is nothing above the package"
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((True, name) for name in names)


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, count of lines without docstring) of every function in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring_lines = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
            yield node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring_lines


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_imports_only_what_its_row_allows(path: Path) -> None:
    assert path.stem in OURS, f"{path.name} needs a row in the table of imports"
    found = set(imports(parse(path)))
    ours = {name for is_ours, name in found if is_ours}
    others = {name for is_ours, name in found if not is_ours} - sys.stdlib_module_names
    assert ours <= OURS[path.stem]
    assert others <= OTHERS.get(path.stem, set())


def test_table_of_imports_has_no_circle() -> None:
    left = dict(OURS)
    while left:
        free = [name for name, needed in left.items() if not needed & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path", [*MODULES, *sorted(ROOT.glob("examples/*.py"))], ids=lambda path: path.stem)
def test_function_fits_on_a_page(path: Path) -> None:
    assert [(name, lines) for name, lines in functions(parse(path)) if lines > LONGEST_FUNCTION_LINES] == []
