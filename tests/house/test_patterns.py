"""Every regular expression of ours, and every one of h11's, takes time in proportion to what it reads.

A stranger chooses the bytes, so a pattern that can divide a run of them in two ways is a way to stop a program.  For
each pattern the strings that make backtracking expensive are derived from the pattern itself: what leads to each of
its parts, a long run of what it may repeat, and an end that makes it fail.
"""

from __future__ import annotations

import ast
import importlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, cast

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in ("setup", "__init__"))
H11 = ("_abnf", "_connection", "_events", "_headers", "_readers", "_receivebuffer", "_util", "_writers")
RUN_CHARS = 8000  # a head may be eight times as long
LIMIT_S = 0.02  # of processor time; linear takes some 50 us, quadratic 100 ms and more
REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)

Pattern = re.Pattern[str] | re.Pattern[bytes]


def compiled_patterns() -> Iterator[tuple[str, Pattern, str]]:
    """Yield (where, pattern, method) for every compiled pattern that a module of ours or of h11 holds."""
    for name in (*(f"faashound.{stem}" for stem in MODULES), *(f"h11.{stem}" for stem in H11)):
        module = importlib.import_module(name)
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        for key, value in vars(module).items():
            if isinstance(value, re.Pattern):
                for method in set(re.findall(rf"\b{key}\.(\w+)\(", source)) or {"fullmatch"}:  # as h11's validate does
                    yield f"{name}.{key}.{method}", value, method


def literal_patterns() -> Iterator[tuple[str, Pattern, str]]:
    """Yield (where, pattern, method) for every call like `re.fullmatch("...", text)` in a module of ours."""
    for stem in MODULES:
        for node in ast.walk(ast.parse((ROOT / f"{stem}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args:
                first, method = node.args[0], ast.unparse(node.func).removeprefix("re.")
                if isinstance(first, ast.Constant) and method != "compile":
                    pattern: Pattern = re.compile(cast(str, first.value))  # or bytes
                    yield f"faashound.{stem}:{node.lineno}", pattern, method


# Of a pattern that is looked for anywhere, a long run that leads to nothing is read again from each of its bytes.
NOT_FOR_STRANGERS = {"faashound.watchdog._DURATION_PART.findall": "it sees only what _DURATION has matched whole"}
PATTERNS = {
    where: (pattern, method)
    for where, pattern, method in (*compiled_patterns(), *literal_patterns())
    if where not in NOT_FOR_STRANGERS
}


def example(items: Sequence[Any]) -> str:
    """Return a short text that a parsed pattern matches, with what is optional there once."""
    return "".join(map(_example_of, items))


def _example_of(item: tuple[Any, Any]) -> str:
    kind, value = item
    if kind is sre.LITERAL:
        return chr(value)
    if kind in (sre.NOT_LITERAL, sre.ANY):
        return "a"
    if kind is sre.IN:
        return _member(value)
    if kind in REPEATS:
        return example(value[2]) * max(int(value[0]), 1)
    if kind is sre.BRANCH:
        return example(value[1][0])
    return example(value[-1]) if kind is sre.SUBPATTERN else ""


def _member(choices: Sequence[tuple[Any, Any]]) -> str:
    """Return a character of a set."""
    if choices[0][0] is sre.NEGATE:
        return "a"
    kind: object = choices[-1][0]
    value: Any = choices[-1][1]
    if kind is sre.LITERAL:
        return chr(value)
    return chr(value[1]) if kind is sre.RANGE else "0"  # a category, such as digits


def prefixes(items: Sequence[Any]) -> Iterator[str]:
    """Yield what leads to each part of a parsed pattern, at any depth."""
    for index, (kind, value) in enumerate(items):
        before = example(items[:index])
        yield before
        if kind in REPEATS or kind is sre.SUBPATTERN:
            yield from (before + inner for inner in prefixes(value[-1]))
        elif kind is sre.BRANCH:
            yield from (before + inner for branch in value[1] for inner in prefixes(branch))
    yield example(items)


def letters(items: Sequence[Any]) -> Iterator[str]:
    """Yield a character for each literal and set of a parsed pattern, at any depth."""
    for kind, value in items:
        if kind in REPEATS or kind in (sre.SUBPATTERN, sre.ASSERT, sre.ASSERT_NOT):
            yield from letters(value[-1])
        elif kind is sre.BRANCH:
            for branch in value[1]:
                yield from letters(branch)
        else:
            yield _example_of((kind, value))


def hostile_texts(pattern: Pattern) -> Iterator[str]:
    """Yield long texts made to have `pattern` try again and again."""
    source = pattern.pattern.decode("latin-1") if isinstance(pattern.pattern, bytes) else pattern.pattern
    items = list(_parser.parse(source, pattern.flags & ~re.UNICODE if isinstance(pattern.pattern, bytes) else 0))
    alphabet = sorted({letter for letter in letters(items) if letter} | {" ", "\t", "a"})
    runs = {one if one == other else one + other for one, other in product(alphabet, repeat=2)}
    for start, run, end in product(sorted(set(prefixes(items))), sorted(runs), ("\x01", "")):
        yield start + run * (RUN_CHARS // len(run)) + end


def processor_time_s(call: Callable[[Any], object], text: str | bytes) -> float:
    """Return what a call takes, as little as three tries need: another process may have spoilt a cache."""
    least_s = float("inf")
    for _ in range(3):
        before_s = time.thread_time()
        call(text)
        least_s = min(least_s, time.thread_time() - before_s)
        if least_s < LIMIT_S:
            break
    return least_s


def caller(pattern: Pattern, method: str) -> Callable[[Any], object]:
    """Return what applies `pattern` to a text as the module does that holds it."""
    return (
        partial(pattern.sub, "" if isinstance(pattern.pattern, str) else b"")
        if method == "sub"
        else getattr(pattern, method)
    )


@pytest.mark.parametrize(("pattern", "method"), PATTERNS.values(), ids=PATTERNS)
def test_pattern_takes_linear_time_when_a_stranger_chooses_the_text(pattern: Pattern, method: str) -> None:
    call = caller(pattern, method)
    for text in hostile_texts(pattern):
        took_s = processor_time_s(call, text.encode("latin-1") if isinstance(pattern.pattern, bytes) else text)
        assert took_s < LIMIT_S, f"{method} of {text[:40]!r}...{text[-20:]!r}: {took_s:.3f} s"
