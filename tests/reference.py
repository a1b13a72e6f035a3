"""The README's reference of settings, generated from the programs' own tables.

python -m tests.reference            print it
python -m tests.reference --write    put it into README.md, between its two marker lines
"""

from __future__ import annotations

import sys
from pathlib import Path

from faashound import gateway, watchdog, worker
from faashound.watchdog import Setting, settings_table

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- settings: written by `python -m tests.reference --write` -->"
END = "<!-- /settings -->"
PROGRAMS = {
    "fwatchdog": watchdog.Settings,
    "fgateway": gateway.Settings,
    "fworker": worker.Settings,
}


def build_reference() -> str:
    """Return the reference as Markdown: for each program a heading and a table of its settings."""
    return "\n".join(_section(program, kind) for program, kind in PROGRAMS.items())


def _section(program: str, kind: type) -> str:
    rows = [_row(setting) for setting in settings_table(kind).values()]
    return "\n".join([f"### {program}", "", "| variable | default | meaning |", "|---|---|---|", *rows, ""])


def _row(setting: Setting) -> str:
    name = f"`{setting.name}`" + (f" (or `{setting.alias}`)" if setting.alias else "")
    default = setting.default_note or ("required" if setting.default is None else "unset")
    if setting.default and not setting.default_note:
        default = f"`{setting.default}`"
    return f"| {name} | {_cell(default)} | {_cell(setting.help)} |"


def _cell(text: str) -> str:
    """Return `text` so that it stays within one cell of a table."""
    return text.replace("|", "\\|")


def replace_reference(readme: str, reference: str) -> str:
    """Return the text `readme` with `reference` between its marker lines; ValueError if it has not both, once each."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}, once each and in this order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{reference}{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    """Print the reference, or write it into the README; return the exit code."""
    if arguments == []:
        print(build_reference(), end="")
        return 0
    if arguments != ["--write"]:
        print(__doc__, file=sys.stderr)
        return 2
    README.write_text(replace_reference(README.read_text(encoding="utf-8"), build_reference()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
