"""What mmkd reports, and progress of long work: a bar with ETA on a terminal, a line every 30
seconds elsewhere.

All of it goes to the logger `mmkd` of Python's `logging`, at level INFO. A program that imports
mmkd decides what becomes of it, as with any library. `log_to_console` prints it as the command
`mmkd` does.

rich draws the bars. `Bar` adds what rich and tqdm do not have: lines in a log file (rich prints
nothing to a file before a bar ends, tqdm redraws it with carriage returns), and the time left for
all stages of a run.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from mmkd.errors import one_row
from mmkd.redact import redact

logger = logging.getLogger("mmkd")
logger.addHandler(logging.NullHandler())

console = Console()
SECONDS_BETWEEN_LINES = 30.0
HEADING = "mmkd_heading"
"""An attribute of log records whose text is a heading."""
WIDE, NARROW, WIDE_ENOUGH = 40, 10, 120
"""Width of a bar, on terminals of at least `WIDE_ENOUGH` columns and on narrower ones."""


class ConsoleHandler(logging.Handler):
    """Prints records as they are: without markup, colours and a prefix, and without breaking lines.

    It catches no exception: a signal that stops the command may raise one while this prints.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if getattr(record, HEADING, False):
            console.rule(text)
        else:
            console.print(text, highlight=False, markup=False, soft_wrap=True)


def log_to_console(show: bool = True) -> None:
    """Print what mmkd reports on standard output, with progress bars on a terminal.

    Args:
        show: False ends it: the logger `mmkd` is then as it was at the import.
    """
    for handler in logger.handlers.copy():
        if isinstance(handler, ConsoleHandler):
            logger.removeHandler(handler)
    logger.setLevel(logging.INFO if show else logging.NOTSET)
    logger.propagate = not show  # a handler of the root logger would print it a second time
    if show:
        logger.addHandler(ConsoleHandler())


@contextmanager
def muted(mute: bool = True) -> Iterator[None]:
    """Inside, nothing that mmkd reports is logged, for processes that do the same as another one.

    Args:
        mute: False changes nothing.
    """
    level = logger.level
    if mute:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def on_console() -> bool:
    """Whether `log_to_console` prints what mmkd reports."""
    handled = any(isinstance(handler, ConsoleHandler) for handler in logger.handlers)
    return handled and logger.isEnabledFor(logging.INFO)


def say(text: str) -> None:
    """Log a text, and nothing else: control characters other than line breaks are written as
    escapes, and secrets are left out."""
    logger.info("\n".join(map(one_row, redact(text).split("\n"))))


def say_heading(text: str) -> None:
    """Log the title of the work that follows; the console draws a line on both sides of it."""
    logger.info(text, extra={HEADING: True})


_said: set[str] = set()


def say_once(text: str) -> None:
    """Log a text that this process has not logged by this function before."""
    if text not in _said:
        _said.add(text)
        say(text)


def live() -> bool:
    """Whether a bar is shown, redrawn in place. With FORCE_COLOR, which CI services set, rich takes
    a file for a terminal, so the file itself is asked too."""
    return on_console() and console.is_interactive and console.file.isatty()


class Course:
    """The parts of a run in their order, to estimate the time left for all of them.

    Args:
        steps: number of steps of each part, by its name; None if it is not known.
        kinds: a key for each part. Steps of parts with equal keys take the same time.
    """

    def __init__(self, steps: dict[str, int | None], kinds: dict[str, str]):
        self._steps, self._kinds = steps, kinds
        self._rates: dict[str, float] = {}  # seconds per step, by kind
        self._now = ""
        self.title = ""

    @contextmanager
    def part(self, name: str, title: str) -> Iterator[None]:
        """Inside, a `Bar` with `part=True` belongs to this part; `title` such as "stage 2 of 4"."""
        global _course
        _course, self._now, self.title = self, name, title
        try:
            yield
        finally:
            _course = None

    def seconds_after(self, rate: float) -> float | None:
        """Seconds that the parts after the present one take; None if the steps of one are unknown.

        Args:
            rate: seconds per step of the present part. It stands in for kinds that have not run.
        """
        self._rates[self._kinds.get(self._now, "")] = rate
        names = list(self._steps)
        later = names[names.index(self._now) + 1 :] if self._now in names else []
        counts = [self._steps[name] for name in later]
        if any(count is None for count in counts):
            return None
        rates = [self._rates.get(self._kinds.get(name, ""), rate) for name in later]
        return sum((c or 0) * r for c, r in zip(counts, rates, strict=True))


_course: Course | None = None


class Bar:
    """One bar. `advance` moves it and shows a short note.

    Args:
        name: name of the work.
        total: number of steps.
        done: steps that were done before.
        quiet: show nothing.
        part: if a part of a `Course` is running, show its title and the time left for all parts.
    """

    def __init__(
        self, name: str, total: int, *, done: int = 0, quiet: bool = False, part: bool = False
    ):
        self.name, self.total, self.done, self.quiet = name, total, done, quiet
        self._course = _course if part else None
        self._start, self._first, self._last_line = math.nan, done, -math.inf
        self._progress: Progress | None = None
        self._room = 0

    def __enter__(self) -> "Bar":
        self._start = time.monotonic()  # not in __init__: trackers may take a minute to start
        if live() and not self.quiet:
            bar = WIDE if console.width >= WIDE_ENOUGH else NARROW
            title = self.name if self._course is None else f"{self.name} ({self._course.title})"
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console,
            )
            # The note gets the rest of the line. Otherwise rich shortens the name for it.
            times = len(" 0:00:00 eta 0:00:00 ")
            counts = 2 * len(str(self.total)) + 1
            self._room = console.width - len(title) - bar - counts - times - 3
            self._progress.start()
            self._progress.add_task(title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, note: str = "", count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        rate = (now - self._start) / max(self.done - self._first, 1)
        later = None if self._course is None else self._course.seconds_after(rate)
        whole = None
        if later:
            whole = timedelta(seconds=round((self.total - self.done) * rate + later))
        if self._progress is not None:
            text = note if whole is None else f"all {whole}  {note}"
            shown = text[: max(self._room, 0)]
            self._progress.update(self._progress.task_ids[0], advance=count, note=shown)
            return
        finished = self.done == self.total
        if self.quiet or not (finished or now - self._last_line > SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        eta = f"eta {timedelta(seconds=round((self.total - self.done) * rate))}"
        if self._course is not None:
            eta = f"{self._course.title}, {eta}"
        if whole is not None:
            eta += f", {whole} for all stages"
        say(f"{self.name} {self.done}/{self.total}, {eta}  {note}".rstrip())


def track(rows: Iterable[Any], name: str, total: int, *, quiet: bool = False) -> Iterator[Any]:
    """Iterate with a bar."""
    with Bar(name, total, quiet=quiet) as bar:
        for row in rows:
            yield row
            bar.advance()
