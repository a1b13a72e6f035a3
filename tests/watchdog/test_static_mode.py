"""mode=static: files below a directory, with validators and ranges, and no way out of it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import build_date, parse_range
from testkit.harness import Answer, Program, connect, crowding, http_request, parse, raw, read_all, run, wait_until

MIB = 1 << 20
HELLO = b"<p>hello</p>\n"
DIGITS = b"0123456789"
CHANGED_S = 1_700_000_000
CHANGED, BEFORE, AFTER = (build_date(CHANGED_S + shift).decode() for shift in (0, -1, 1))
SECRET = b"top secret\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to serve, with a secret beside it and many links."""
    place = tmp_path_factory.mktemp("place")
    (place / "secret").write_bytes(SECRET)
    (place / "site-secret").write_bytes(SECRET)
    site = place / "site"
    (site / "sub" / "empty").mkdir(parents=True)
    (site / "bare").mkdir()
    for name, content in {"index.html": HELLO, "digits.txt": DIGITS, "sub/index.html": HELLO, "none": b""}.items():
        (site / name).write_bytes(content)
    for name in ("a b.css", "ä.js", "x.tar.gz", "picture.png", "letters.woff2", "..dots", "plain.unknown", ".hidden"):
        (site / name).write_bytes(DIGITS)
    for name in ("digits.txt", "none"):
        os.utime(site / name, (CHANGED_S, CHANGED_S))
    links = {
        "inside": "digits.txt",
        "sub/up": "../digits.txt",
        "sub/same": "../sub",
        "out": "../secret",
        "out-absolute": str(place / "secret"),
        "out-directory": "..",
        "out-by-chain": "out",
        "prefix": "../site-secret",
        "loop": "loop",
        "gone": "nowhere",
        "environ": "/proc/self/environ",
        "root-of-process": "/proc/self/root",
        "device": "/dev/zero",
        "bare/index.html": "../../secret",
    }
    for name, target in links.items():
        (site / name).symlink_to(target)
    os.mkfifo(site / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(site / "socket"))
    listening.close()
    return site


@pytest.fixture(scope="module")
def program(site: Path) -> Iterator[Program]:
    with Program("watchdog", {"mode": "static", "static_path": str(site)}) as program:
        yield program


def get(program: Program, path: str, method: str = "GET", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return http_request(program.port, method, path, named)


def etag(program: Program, path: str = "/digits.txt") -> str:
    return get(program, path).headers["etag"]


FOUND = {
    "/": ("text/html; charset=utf-8", HELLO),
    "/index.html": ("text/html; charset=utf-8", HELLO),
    "/sub/": ("text/html; charset=utf-8", HELLO),
    "/digits.txt": ("text/plain; charset=utf-8", DIGITS),
    "/digits.txt?v=1": ("text/plain; charset=utf-8", DIGITS),
    "//digits.txt": ("text/plain; charset=utf-8", DIGITS),
    "/a%20b.css": ("text/css; charset=utf-8", DIGITS),
    "/%C3%A4.js": ("text/javascript; charset=utf-8", DIGITS),
    "/picture.png": ("image/png", DIGITS),
    "/letters.woff2": ("font/woff2", DIGITS),
    "/x.tar.gz": ("application/gzip", DIGITS),
    "/plain.unknown": ("application/octet-stream", DIGITS),
    "/..dots": ("application/octet-stream", DIGITS),
    "/.hidden": ("application/octet-stream", DIGITS),
    "/none": ("application/octet-stream", b""),
    "/inside": ("application/octet-stream", DIGITS),
    "/sub/up": ("application/octet-stream", DIGITS),
    "/sub/same/same/index.html": ("text/html; charset=utf-8", HELLO),
}


@pytest.mark.parametrize(("path", "kind", "body"), [(path, *found) for path, found in FOUND.items()], ids=FOUND)
def test_file_is_served_with_the_type_that_its_name_tells(program: Program, path: str, kind: str, body: bytes) -> None:
    answer = get(program, path)
    assert (answer.status, answer.headers["content-type"], answer.body) == (200, kind, body)
    head = get(program, path, "HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(body)))
    assert {name: value for name, value in head.headers.items() if name != "date"} == {
        name: value for name, value in answer.headers.items() if name != "date"
    }


NOT_FOUND = [
    *("/absent", "/digits.txt/", "/digits.txt/x", "/sub/empty/", "/bare/", "/fifo", "/socket", "/loop", "/gone"),
    *("/out", "/out-absolute", "/out-by-chain", "/out-directory/secret", "/out-directory/", "/prefix", "/environ"),
    *("/root-of-process/etc/passwd", "/device", "/sub/same/../../../secret", "/../secret", "/sub/../../secret"),
    *(
        "/%2e%2e/secret",
        "/%2e%2e%2fsecret",
        "/..%2fsecret",
        "/.%2e/secret",
        "/%2E%2E/secret",
        "/sub/%2e%2e/%2e%2e/secret",
    ),
    *("/%252e%252e/secret", "/..%5csecret", "/..\\secret", "/%c0%ae%c0%ae/secret", "/..;/secret", "//../secret"),
    *("/./digits.txt", "/%2e/digits.txt", "/proc/self/environ", "/etc/passwd", "//etc/passwd", "/%2fetc%2fpasswd"),
    *("/" + "a" * 300, "/" + "a/" * 5000, "/../site/digits.txt", "/../site-secret", "/secret%23", "/~root"),
]


@pytest.mark.parametrize("path", NOT_FOUND, ids=[path[:40] for path in NOT_FOUND])
def test_no_path_leads_out_of_the_directory_or_to_what_is_no_file(program: Program, path: str) -> None:
    for start in ("", "http://h"):
        request = f"GET {start}{path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
        (answer,) = parse(raw(program.port, request.encode()))
        assert (answer.status, answer.body) == (404, b"there is no such file\n")


@given(
    st.lists(st.sampled_from(["..", ".", "/", "%2e", "%2f", "sub", "same", "out-directory", "secret", "site", "\\"]))
)
def test_secret_is_not_reached_by_any_path(program: Program, parts: list[str]) -> None:
    assert SECRET not in get(program, "/" + "".join(parts)).body


def test_nul_is_a_bad_request(program: Program) -> None:
    assert get(program, "/digits.txt%00.png").status == 400


@pytest.mark.parametrize(
    ("path", "place"), [("/sub", "./sub/"), ("/sub?a=b", "./sub/?a=b"), ("//sub", "./sub/"), ("/sub/same", "./same/")]
)
def test_path_of_a_directory_leads_to_the_one_with_a_slash(program: Program, path: str, place: str) -> None:
    answer = get(program, path)
    assert (answer.status, answer.headers["location"]) == (301, place)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_are_not_allowed(program: Program, method: str) -> None:
    answer = get(program, "/", method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


# Conditions: which of them decide, in which order, is RFC 9110 13.2.2.  `same` and `weak` stand for the file's tag.

CONDITIONS: dict[str, tuple[dict[str, str], int]] = {
    "none": ({}, 200),
    "none-match": ({"If-None-Match": "same"}, 304),
    "none-match-weak": ({"If-None-Match": "weak"}, 304),
    "none-match-list": ({"If-None-Match": '"a", same ,"b"'}, 304),
    "none-match-any": ({"If-None-Match": "*"}, 304),
    "none-match-other": ({"If-None-Match": '"a"'}, 200),
    "none-match-broken": ({"If-None-Match": "a"}, 200),
    "none-match-wins": ({"If-None-Match": '"a"', "If-Modified-Since": AFTER}, 200),
    "modified-since": ({"If-Modified-Since": CHANGED}, 304),
    "modified-since-later": ({"If-Modified-Since": AFTER}, 304),
    "modified-since-before": ({"If-Modified-Since": BEFORE}, 200),
    "modified-since-rfc-850": ({"If-Modified-Since": "Tuesday, 14-Nov-23 22:13:20 GMT"}, 304),
    "modified-since-asctime": ({"If-Modified-Since": "Tue Nov 14 22:13:20 2023"}, 304),
    "modified-since-no-date": ({"If-Modified-Since": "yesterday"}, 200),
    "modified-since-no-day": ({"If-Modified-Since": "Tue, 99 Nov 99999 22:13:20 GMT"}, 200),
    "match": ({"If-Match": "same"}, 200),
    "match-any": ({"If-Match": "*"}, 200),
    "match-weak": ({"If-Match": "weak"}, 412),
    "match-other": ({"If-Match": '"a"'}, 412),
    "match-wins": ({"If-Match": "same", "If-Unmodified-Since": BEFORE}, 200),
    "unmodified-since": ({"If-Unmodified-Since": CHANGED}, 200),
    "unmodified-since-before": ({"If-Unmodified-Since": BEFORE}, 412),
    "both": ({"If-Match": "same", "If-None-Match": "same"}, 304),
    "range": ({"Range": "bytes=2-4"}, 206),
    "range-and-none-match": ({"Range": "bytes=2-4", "If-None-Match": "same"}, 304),
    "range-if-tag": ({"Range": "bytes=2-4", "If-Range": "same"}, 206),
    "range-if-weak-tag": ({"Range": "bytes=2-4", "If-Range": "weak"}, 200),
    "range-if-other-tag": ({"Range": "bytes=2-4", "If-Range": '"a"'}, 200),
    "range-if-date": ({"Range": "bytes=2-4", "If-Range": CHANGED}, 206),
    "range-if-later-date": ({"Range": "bytes=2-4", "If-Range": AFTER}, 200),
    "range-outside": ({"Range": "bytes=10-"}, 416),
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("headers", "status"), CONDITIONS.values(), ids=CONDITIONS)
def test_condition_decides_as_the_standard_has_it(
    program: Program, headers: dict[str, str], status: int, method: str
) -> None:
    tag = etag(program)
    given = {name: value.replace("same", tag).replace("weak", f"W/{tag}") for name, value in headers.items()}
    answer = http_request(program.port, method, "/digits.txt", given)
    assert answer.status == (200 if method == "HEAD" and status in (206, 416) else status)
    assert answer.headers["etag"] == tag
    assert answer.headers["last-modified"] == CHANGED
    assert answer.body == ({200: DIGITS, 206: b"234"}.get(status, b"") if method == "GET" else b"")


RANGES: dict[str, tuple[int, bytes, str | None]] = {
    "bytes=0-0": (206, b"0", "bytes 0-0/10"),
    "bytes=2-4": (206, b"234", "bytes 2-4/10"),
    "bytes=7-": (206, b"789", "bytes 7-9/10"),
    "bytes=7-99": (206, b"789", "bytes 7-9/10"),
    "bytes=-3": (206, b"789", "bytes 7-9/10"),
    "bytes=-99": (206, DIGITS, "bytes 0-9/10"),
    "BYTES=0-1": (206, b"01", "bytes 0-1/10"),
    "bytes=10-": (416, b"", "bytes */10"),
    "bytes=99-": (416, b"", "bytes */10"),
    "bytes=99-100": (416, b"", "bytes */10"),
    "bytes=-0": (416, b"", "bytes */10"),
    "bytes=4-2": (200, DIGITS, None),
    "bytes=0-1,4-5": (200, DIGITS, None),
    "bytes=": (200, DIGITS, None),
    "bytes=a-b": (200, DIGITS, None),
    "items=0-1": (200, DIGITS, None),
    "bytes=0-" + "9" * 30: (200, DIGITS, None),
}


@pytest.mark.parametrize(("value", "status", "body", "place"), [(k, *v) for k, v in RANGES.items()], ids=RANGES)
def test_range_is_a_part(program: Program, value: str, status: int, body: bytes, place: str | None) -> None:
    answer = get(program, "/digits.txt", Range=value)
    assert (answer.status, answer.body, answer.headers.get("content-range")) == (status, body, place)


def test_range_of_an_empty_file_is_the_whole_of_it(program: Program) -> None:
    for value in ("bytes=0-", "bytes=0-99", "bytes=-5"):
        answer = get(program, "/none", Range=value)
        assert (answer.status, answer.body, answer.headers.get("content-range")) == (200, b"", None)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40))
def test_range_is_within_the_file(first: int, last: int, size: int) -> None:
    part = parse_range(b"bytes=%d-%d" % (first, last), size)
    whole = range(size)
    expected = None if last < first and last < size else [at for at in whole if first <= at <= last]
    assert (None if part is None else list(part)) == expected


def test_tag_is_another_when_the_file_has_changed(program: Program, site: Path) -> None:
    path = site / "changing"
    path.write_bytes(b"one")
    before = etag(program, "/changing")
    path.write_bytes(b"two")
    os.utime(path, ns=(0, CHANGED_S * 10**9))
    assert etag(program, "/changing") != before


def test_large_file_is_sent_in_constant_memory_and_no_descriptor_is_left(program: Program, site: Path) -> None:
    (site / "large").write_bytes(os.urandom(MIB) * 64)
    get(program, "/digits.txt")
    memory, descriptors = program.resident_bytes(), program.descriptors()
    with connect(program.port) as leaver:
        leaver.sendall(b"GET /large HTTP/1.1\r\nHost: h\r\n\r\n")
        leaver.recv(1000)
    received = read_all_of(program, "/large")
    assert received == (site / "large").read_bytes()
    assert program.resident_bytes() - memory < 8 * MIB
    wait_until(lambda: program.descriptors() <= descriptors, 5.0, "every file is closed")


def read_all_of(program: Program, path: str) -> bytes:
    with connect(program.port) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        return read_all(client, 30 * crowding()).partition(b"\r\n\r\n")[2]


def test_no_program_is_started_and_health_is_as_ever(program: Program) -> None:
    assert program.functions() == set()
    assert get(program, "/_/health").text == "OK"
    assert get(program, "/_/ready").status == 200


def test_log_has_a_line_for_each_request(program: Program) -> None:
    get(program, "/digits.txt?secret=1", Range="bytes=0-4")
    line = program.wait_log("Wrote 5 Bytes")
    assert re.search(r"status=206 method=GET path=/digits.txt$", line)


def test_start_fails_when_the_directory_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    settings = {"mode": "static", "static_path": str(missing), "TMPDIR": str(tmp_path)}
    ended = run("watchdog", settings=settings | {"port": "0", "metrics_port": "0"})
    assert ended.returncode == 1
    assert f"static_path='{missing}': there is no such directory" in ended.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fprocess", "cat", "fprocess"),
        ("max_body", "1KiB", "max_body='1KiB'"),
        ("max_inflight", "2", "max_inflight='2'"),
    ],
)
def test_program_and_its_limits_are_refused_where_none_runs(name: str, value: str, said: str) -> None:
    ended = run("watchdog", settings={"mode": "static", name: value})
    assert ended.returncode == 2
    assert f"{said} means nothing with mode=static" in ended.stderr
