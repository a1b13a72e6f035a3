"""URLs of functions as they are put together, and paths that would lead out of a function's own."""

from __future__ import annotations

import time

import pytest

from faashound.network.paths import below
from faashound.watchdog import Url, has_dot_segments, parse_url

BELOW: dict[str, tuple[str, str, str, str]] = {
    "the root": ("http://h:8080", "", "", "/"),
    "a path": ("http://h:8080", "/a/b", "", "/a/b"),
    "a slash alone": ("http://h:8080", "/", "", "/"),
    "a query without a path": ("http://h:8080", "", "a=1", "/?a=1"),
    "a path and a query": ("http://h:8080/", "/a", "b=1&c", "/a?b=1&c"),
    "below a path": ("http://h:8080/base", "/a", "", "/base/a"),
    "below a path that ends with a slash": ("http://h:8080/base/", "/a/", "q", "/base/a/?q"),
    "the root of a path": ("http://h:8080/base", "", "", "/base/"),
    "what is encoded stays so": ("http://h:8080", "/a%2Fb//c", "x=%20?", "/a%2Fb//c?x=%20?"),
}


@pytest.mark.parametrize(("base", "path", "query", "target"), BELOW.values(), ids=BELOW)
def test_path_and_query_are_put_behind_an_address(base: str, path: str, query: str, target: str) -> None:
    assert below(parse_url(base), path, query) == Url("http", "h", 8080, target)


@pytest.mark.parametrize(
    "path",
    [
        *(b"/..", b"/.", b"/../x", b"/a/../../x", b"/a/./x", b"/a/.."),
        *(b"/%2e%2e/x", b"/%2E./x", b"/a%2f..%2fx", b"/..%2f", b"/a/%2e"),
        *(b"/%252e%252e/x", b"/%25252e./x", b"/%25%32%65%25%32%65/x", b"/a%252f..%252fx"),
        *(b"/..\\x", b"/..%5cx", b"\\..\\x", b"/a%5C..%5Cx"),
        *(b"/..;/x", b"/..;a=b/x", b"/%2e%2e%3b/x"),
    ],
)
def test_path_has_dot_segments_when_an_upstream_may_read_them_in_it(path: bytes) -> None:
    assert has_dot_segments(path)


@pytest.mark.parametrize(
    "path",
    [
        *(b"", b"/", b"/a.b/c..d/...", b"/.well-known/x", b"/a..", b"/..a", b"/a%2Fb%20c//d", b"/%25", b"/100%25.txt"),
        *(b"/v1;x=..", b"/a%2e/b", b"/%2e%2e%2e/x"),
    ],
)
def test_path_has_no_dot_segments_when_its_dots_are_none(path: bytes) -> None:
    assert not has_dot_segments(path)


def test_search_for_dot_segments_takes_time_in_proportion_to_the_path() -> None:
    def seconds(count: int) -> float:
        best_s = 9.0
        for _ in range(5):
            started_s = time.process_time()
            has_dot_segments(b"/" + b"%25" * count)
            has_dot_segments(b"/a" + b"/..a" * count)
            best_s = min(best_s, time.process_time() - started_s)
        return best_s

    assert seconds(20_000) < 8 * seconds(5_000) + 0.001
