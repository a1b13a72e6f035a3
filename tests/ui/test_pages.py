"""The files of the page: what is served, with which policy, to whom, and how much of it there is."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from faashound.serving.pages import FOLDER, TYPES, Pages
from testkit.harness import ROOT, Answer
from testkit.system import System
from tests.ui.kit import with_password

MAX_PAGE_BYTES = 100 * 1024  # of all files together, unpacked
MAX_PICTURE_BYTES = 100 * 1024
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in TYPES)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System("[cat]\nfprocess = 'cat'", {"worker": "none"}) as system:
        yield system


def ask(system: System, path: str, **fields: str) -> Answer:
    return system.request("GET", path, headers={name.replace("_", "-"): value for name, value in fields.items()})


@pytest.mark.parametrize("name", FILES)
def test_gateway_serves_each_file_with_its_type_and_a_strict_policy(system: System, name: str) -> None:
    answer = ask(system, f"/ui/{name}")
    assert (answer.status, answer.body) == (200, (FOLDER / name).read_bytes())
    assert answer.headers["content-type"] == TYPES[Path(name).suffix].decode()
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_gateway_sends_the_page_packed_and_no_file_that_the_browser_has(system: System) -> None:
    packed = ask(system, "/ui/", Accept_Encoding="gzip")
    assert gzip.decompress(packed.body) == (FOLDER / "index.html").read_bytes()
    again = ask(system, "/ui/", If_None_Match=packed.headers["etag"])
    assert (again.status, again.body) == (304, b"")


def test_page_is_small() -> None:
    sizes = {name: len(page.content) for name, page in Pages.load().files.items()}
    assert sum(sizes.values()) < MAX_PAGE_BYTES, sizes


def test_gateway_leads_a_browser_to_the_page_and_tells_others_what_there_is(system: System) -> None:
    browser = ask(system, "/", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (browser.status, browser.headers["location"]) == (302, "/ui/")
    assert ask(system, "/", Accept="*/*").status == 404
    assert ask(system, "/ui").headers["location"] == "/ui/"


@pytest.mark.parametrize(
    "path", ["/ui/../setup.py", "/ui/%2e%2e/setup.py", "/ui/__init__.py", "/ui/views", "/ui//", "/uix/"]
)
def test_gateway_serves_nothing_but_the_files_of_the_page(system: System, path: str) -> None:
    assert ask(system, path).status == 404


def test_gateway_answers_no_foreign_name_and_no_other_method(system: System) -> None:
    assert ask(system, "/ui/", Host="evil.example").status == 421
    assert system.request("POST", "/ui/", b"x").status == 405
    head = system.request("HEAD", "/ui/")
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("path", ["/system/metrics", "/system/events"])
def test_gateway_tells_no_page_of_another_origin(system: System, path: str) -> None:
    assert ask(system, path, Sec_Fetch_Site="cross-site").status == 403
    assert ask(system, path, Origin="https://evil.example").status == 403


def test_gateway_without_the_page_has_nothing_there() -> None:
    with System("[cat]\nfprocess = 'cat'", {"worker": "none", "ui": "off"}) as system:
        for path in ("/", "/ui", "/ui/", "/ui/app.js"):
            assert ask(system, path, Accept="text/html").status == 404


def test_gateway_with_a_password_shows_the_form_and_no_data_without_it(tmp_path: Path) -> None:
    with System("[cat]\nfprocess = 'cat'", {"worker": "none", **with_password(tmp_path)}) as system:
        assert ask(system, "/ui/").status == 200
        for path in ("/system/metrics", "/system/events", "/system/functions", "/system/calls"):
            assert ask(system, path).status == 401


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_script_names_no_other_host_and_makes_no_markup(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"'`\s]+", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    assert (
        re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|localStorage|sessionStorage|cookie =",
            text,
        )
        == []
    )


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".js")])
def test_script_imports_files_that_are_there_and_names_that_they_export(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    for names, target in re.findall(r"^import \{([^}]*)\} from \"([^\"]+)\";", text, re.MULTILINE):
        exported = (FOLDER / name).parent.joinpath(target).resolve().read_text(encoding="utf-8")
        for each in (word.strip() for word in names.split(",") if word.strip()):
            assert re.search(rf"^export (?:async )?(?:function|const|class) {each}\b", exported, re.MULTILINE), (
                name,
                each,
            )
            assert len(re.findall(rf"\b{each}\b", text)) > 1, f"{name} does not use {each}"


@pytest.mark.parametrize("name", ["overview.png", "call.png"])
def test_picture_of_the_readme_is_there_and_small(name: str) -> None:
    content = (ROOT / "docs" / "pictures" / name).read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) < MAX_PICTURE_BYTES
