"""`mmkd doctor`: which parts of mmkd work on this machine, and how to fix the others.

This module must work even if torch, transformers or another package is broken. So only the checks
import them, in a process of their own.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mmkd.commands.doctor.checks import all_checks
from mmkd.commands.doctor.isolated import Row, run_isolated
from mmkd.commands.doctor.packages import FAMILIES, WANT_TORCHVISION
from mmkd.runtime.progress import console, live, say

STYLES = {"ok": "green", "missing": "yellow", "broken": "bold red"}


def examine(output_dir: Path) -> list[Row]:
    """The rows of all checks; `output_dir` is the folder for runs."""
    rows = []
    with console.status("python") if live() else nullcontext() as status:
        for row in run_isolated(all_checks(output_dir)):
            rows.append(row)
            if status is not None:
                status.update(f"{row.name}: {row.state}")
    return rows


def hindering(rows: list[Row]) -> list[Row]:
    """The rows of required parts that are missing or broken."""
    return [row for row in rows if row.needed and row.state != "ok"]


def as_json(rows: list[Row]) -> dict[str, Any]:
    return {
        "ready": not hindering(rows),
        "families_without_processor": families_without_processor(rows),
        "rows": [vars(row) for row in rows],
    }


def families_without_processor(rows: list[Row]) -> list[str]:
    """Families that cannot be used because torchvision is missing or broken."""
    usable = all(row.state == "ok" for row in rows if row.name == "torchvision")
    return [] if usable else list(WANT_TORCHVISION)


def print_rows(rows: list[Row]) -> None:
    """Print a table with a section for each kind of check, and below it the commands that fix what
    is missing or broken."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    for section in dict.fromkeys(row.section for row in rows):
        table.add_row(Text(section, style="bold"))
        for row in rows:
            if row.section == section:
                table.add_row(f"  {row.name}", Text(row.state, STYLES[row.state]), Text(row.detail))
    console.print(table)
    for hint in dict.fromkeys(row.hint for row in rows if row.hint):
        say(f"{', '.join(row.name for row in rows if row.hint == hint)}: {hint}")
    names = [row.name for row in hindering(rows)]
    lost = len(families_without_processor(rows))
    but = f", but {lost} of {FAMILIES} families cannot be used without torchvision" if lost else ""
    ready = f"what mmkd needs is there and works{but}"
    say(f"mmkd needs: {', '.join(names)}" if names else ready)
