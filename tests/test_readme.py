"""The README says what the programs do: its reference of settings is theirs, byte for byte."""

from __future__ import annotations

import pytest

from faashound.watchdog import settings_table
from tests import reference


def test_reference_in_readme_is_the_generated_one_when_compared() -> None:
    readme = reference.README.read_text(encoding="utf-8")
    expected = reference.replace_reference(readme, reference.build_reference())
    assert readme == expected, "run: python -m tests.reference --write"


def test_reference_has_each_setting_of_each_program_once_when_generated() -> None:
    lines = reference.build_reference().splitlines()
    for kind in reference.PROGRAMS.values():
        for row in settings_table(kind).values():
            assert any(line.startswith(f"| `{row.name}`") and row.help.replace("|", "\\|") in line for line in lines)
    row_count = sum(len(settings_table(kind)) for kind in reference.PROGRAMS.values())
    assert sum(line.startswith("| `") for line in lines) == row_count


@pytest.mark.parametrize(
    "readme",
    [
        "",
        reference.BEGIN,
        f"{reference.END}\n{reference.BEGIN}",
        f"{reference.BEGIN}\n{reference.BEGIN}\n{reference.END}",
    ],
    ids=["none", "begin-only", "reversed", "twice"],
)
def test_readme_is_refused_when_its_markers_are_not_right(readme: str) -> None:
    with pytest.raises(ValueError, match="once each"):
        reference.replace_reference(readme, "table\n")


def test_text_around_the_markers_is_kept_when_reference_is_replaced() -> None:
    readme = f"before\n{reference.BEGIN}\nold\n{reference.END}\nafter\n"
    replaced = reference.replace_reference(readme, "new\n")
    assert replaced == f"before\n{reference.BEGIN}\nnew\n{reference.END}\nafter\n"
    assert reference.replace_reference(replaced, "new\n") == replaced
