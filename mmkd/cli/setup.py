"""Before the first run: what works on this machine, and a recipe to begin with."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmkd.cli.app import AsJson, app


@app.command()
def doctor(
    output_dir: Annotated[Path, typer.Option(help="folder for runs")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """What works on this machine, what is missing or broken, and the commands that fix it.

    Exit status 1 if something that mmkd needs is missing or broken.
    """
    from mmkd.commands.doctor import as_json as described
    from mmkd.commands.doctor import examine, hindering, print_rows

    rows = examine(output_dir)
    if as_json:
        print(json.dumps(described(rows), indent=1))
    else:
        print_rows(rows)
    raise typer.Exit(int(bool(hindering(rows))))


@app.command()
def init(
    method: Annotated[Optional[str], typer.Argument(help="see --list")] = None,  # noqa: UP045
    teacher: Annotated[Optional[str], typer.Option(help="Hub id or folder")] = None,  # noqa: UP045
    student: Annotated[Optional[str], typer.Option(help="Hub id or folder")] = None,  # noqa: UP045
    data: Annotated[Optional[str], typer.Option(help="file of records")] = None,  # noqa: UP045
    images: Annotated[Optional[str], typer.Option(help="folder of image paths")] = None,  # noqa: UP045
    pairs: Annotated[Optional[str], typer.Option(help="file of preference pairs")] = None,  # noqa: UP045
    held_out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="with --offline: file of records to ask about, not trained on"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="folders only, sample answers instead of benchmarks")
    ] = False,
    out: Annotated[Path, typer.Option(help="recipe to write")] = Path("recipe.yaml"),
    listed: Annotated[bool, typer.Option("--list", help="the methods")] = False,
) -> None:
    """Write a commented recipe of a method for a teacher and a student."""
    from mmkd.commands.starters import HUB, Choices, missing_files, summaries, write_starter
    from mmkd.runtime.progress import say

    if method is None or listed:
        for name, summary in summaries().items():
            say(f"{name:11} {summary}")
        say(f"{'(Hub)':11} {HUB}")
        return
    choices = Choices(teacher, student, data, images, pairs, held_out, offline)
    write_starter(method, choices, out)
    for path in missing_files(choices):
        print(f"mmkd: {path}: no such file or folder yet", file=sys.stderr)
    file = shlex.quote(str(out))
    say(f"wrote {out}; next: mmkd plan {file}, then mmkd run {file}")
