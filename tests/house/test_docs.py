"""Documentation: the reference of settings is the programs' own, byte for byte, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import write_settings as reference
from faashound.watchdog import settings_table


def test_reference_in_docs_is_the_generated_one_when_compared() -> None:
    page = reference.PAGE.read_text(encoding="utf-8")
    expected = reference.replace_reference(page, reference.build_reference())
    assert page == expected, "run: python -m docs.write_settings --write"


def test_reference_has_each_setting_of_each_program_once_when_generated() -> None:
    lines = reference.build_reference().splitlines()
    for kind in reference.PROGRAMS.values():
        for row in settings_table(kind).values():
            assert any(line.startswith(f"| `{row.name}`") and row.help.replace("|", "\\|") in line for line in lines)
    row_count = sum(len(settings_table(kind)) for kind in reference.PROGRAMS.values())
    assert sum(line.startswith("| `") for line in lines) == row_count


@pytest.mark.parametrize(
    "page",
    [
        "",
        reference.BEGIN,
        f"{reference.END}\n{reference.BEGIN}",
        f"{reference.BEGIN}\n{reference.BEGIN}\n{reference.END}",
    ],
    ids=["none", "begin-only", "reversed", "twice"],
)
def test_page_is_refused_when_its_markers_are_not_right(page: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        reference.replace_reference(page, "table\n")


def test_text_around_the_markers_is_kept_when_reference_is_replaced() -> None:
    page = f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n"
    replaced = reference.replace_reference(page, "new\n")
    assert replaced == f"before\n{reference.BEGIN}\nnew\n{reference.END}\nafter\n"
    assert reference.replace_reference(replaced, "new\n") == replaced


PAGES = sorted([*reference.PAGE.parent.glob("*.md"), *reference.PAGE.parent.parent.glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_ten_kilobytes_at_most() -> None:
    assert (reference.PAGE.parent.parent / "README.md").stat().st_size <= 10_000


def test_map_names_only_what_is_there() -> None:
    root = reference.PAGE.parent.parent
    page, program = ((root / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "watchdog.py"))
    paths = re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.(?:py|js))?)`", page)
    assert len(paths) > 50
    assert [path for path in paths if not (root / path).exists()] == []
    sections = re.findall(r'"([A-Z][A-Za-z ]+)"', page)
    assert sections
    assert [section for section in sections if f"# {section}" not in program] == []
