"""Write the reference of settings, docs/settings.md, from the programs' own tables.

python -m docs.write_settings            print it
python -m docs.write_settings --write    put it into docs/settings.md, between its two marker lines
"""

from __future__ import annotations

import sys
from pathlib import Path

from faashound import watchdog, worker
from faashound.serving import settings as gateway
from faashound.watchdog import Setting, settings_table

PAGE = Path(__file__).resolve().parent / "settings.md"
BEGIN = "<!-- settings: written by `python -m docs.write_settings --write` -->"
END = "<!-- /settings -->"
PROGRAMS = {
    "fwatchdog": watchdog.Settings,
    "fgateway": gateway.Settings,
    "fworker": worker.Settings,
}


def build_reference() -> str:
    """Return the reference as Markdown: for each program a heading and a table of its settings."""
    return "\n".join([*(_section(program, kind) for program, kind in PROGRAMS.items()), _mode_table()])


def _section(program: str, kind: type) -> str:
    rows = [_row(setting) for setting in settings_table(kind).values()]
    return "\n".join([f"## {program}", "", "| variable | default | meaning |", "|---|---|---|", *rows, ""])


def _mode_table() -> str:
    """Return which settings of the watchdog mean something in some of its modes only."""
    rows = [
        f"| {row.name} | " + " | ".join("yes" if mode in row.modes else "" for mode in watchdog.MODES) + " |"
        for row in settings_table(watchdog.Settings).values()
        if row.modes
    ]
    heads = " | ".join(f"`mode={mode}`" for mode in watchdog.MODES)
    text = (
        "Set to anything but its default in another mode, such a setting stops the start; all others are for each mode."
    )
    return "\n".join(
        ["## Settings of some modes of fwatchdog", "", text, "", f"| variable | {heads} |", "|---" * 5 + "|", *rows, ""]
    )


def _row(setting: Setting) -> str:
    name = f"`{setting.name}`" + (f" (or `{setting.alias}`)" if setting.alias else "")
    default = setting.default_note or ("required" if setting.default is None else "unset")
    if setting.default and not setting.default_note:
        default = f"`{setting.default}`"
    return f"| {name} | {_cell(default)} | {_cell(setting.help)} |"


def _cell(text: str) -> str:
    """Return `text` so that it stays within one cell of a table."""
    return text.replace("|", "\\|")


def replace_reference(page: str, reference: str) -> str:
    """Return the text `page` with `reference` between its marker lines; ValueError if it has not both, once each."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(END) < page.index(BEGIN):
        raise ValueError(f"docs/settings.md must have the lines {BEGIN!r} and {END!r}, once each and in this order")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{reference}{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    """Print the reference, or write it into the page; return the exit code."""
    if arguments == []:
        print(build_reference(), end="")
        return 0
    if arguments != ["--write"]:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(replace_reference(PAGE.read_text(encoding="utf-8"), build_reference()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
