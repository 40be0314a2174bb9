"""The report of a run: an HTML page, and tables in the terminal."""

from pathlib import Path

from mmkd.redact import redact
from mmkd.report.decoding import decoding_table
from mmkd.report.page import render
from mmkd.report.rundata import read_run
from mmkd.report.summary import evaluation_warnings
from mmkd.report.tables import build_tables, print_table, print_tables
from mmkd.report.use import how_to_use
from mmkd.runtime.files import write_text
from mmkd.runtime.progress import on_console, say


def write_report(folder: Path, *, use: bool = False) -> Path:
    """Write `folder/report.html`, print the score tables if the console is used, and return the
    path of the page.

    Unfinished runs and runs without evaluation get a page too.

    Args:
        folder: a run's folder.
        use: also print the folders of the students, and code that asks one about an image.

    Raises:
        CheckpointError: the folder is not a run.
    """
    run = read_run(folder)
    tables = build_tables(run)
    path = run.folder.report
    write_text(path, redact(render(run, tables)))
    if on_console():
        print_tables(tables)
        if decoding := decoding_table(run):
            print_table(decoding)
    for warning in evaluation_warnings(run):
        say(warning)
    say(f"report: {path}")
    if use and (text := how_to_use(run)):
        say(f"\n{text}")
    return path


__all__ = ["write_report"]
