"""Progress of long work: a bar with ETA on a terminal, a line now and then elsewhere."""

import math
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
SECONDS_BETWEEN_LINES = 30.0


def say(text: str) -> None:
    """Print text as it is: no markup, no colours, and lines as long as they are."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def live() -> bool:
    """Whether a bar can be drawn again in place. FORCE_COLOR, which services that run tests set,
    makes rich take a file for a terminal; a log of cursor movements is none."""
    return console.is_interactive and console.file.isatty()


class Bar:
    """One bar: `advance` by `count` with a short note on what is going on."""

    def __init__(self, name: str, total: int, *, done: int = 0, quiet: bool = False):
        self.name, self.total, self.done, self.quiet = name, total, done, quiet
        self._start, self._first, self._last_line = math.nan, done, -math.inf
        self._progress: Progress | None = None

    def __enter__(self) -> "Bar":
        self._start = time.monotonic()  # not before: trackers may take a minute to start
        if live() and not self.quiet:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            self._progress.start()
            self._progress.add_task(self.name, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, note: str = "", count: int = 1) -> None:
        self.done += count
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], advance=count, note=note)
            return
        now = time.monotonic()
        finished = self.done == self.total
        if self.quiet or not (finished or now - self._last_line > SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        eta = timedelta(seconds=round((self.total - self.done) / max(rate, 1e-9)))
        say(f"{self.name} {self.done}/{self.total}, eta {eta}  {note}".rstrip())


def track(rows: Iterable[Any], name: str, total: int, *, quiet: bool = False) -> Iterator[Any]:
    """Iterate with a bar."""
    with Bar(name, total, quiet=quiet) as bar:
        for row in rows:
            yield row
            bar.advance()
