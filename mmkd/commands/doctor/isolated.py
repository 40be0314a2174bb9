"""Runs checks in another process. A check that raises, crashes or hangs becomes a row too."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from mmkd.errors import one_line
from mmkd.redact import redact
from mmkd.runtime.interrupt import begin_worker

State = Literal["ok", "missing", "broken"]
SECONDS = 180.0


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        state: `broken` is installed and does not work.
        detail: a version, a size, or what is wrong.
        hint: the command that fixes it; the check's own if empty.
        name: of the part, if a check looks at several; the check's own if empty.
        needed: whether mmkd requires it; None is the check's own value.
    """

    state: State
    detail: str
    hint: str = ""
    name: str = ""
    needed: bool | None = None


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        section, name: place of its row.
        run: a function that can be pickled.
        hint: the command that fixes it, for findings that have none.
        needed: mmkd requires it.
    """

    section: str
    name: str
    run: Callable[[], list[Finding]]
    hint: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    state: State
    detail: str
    hint: str
    needed: bool


def run_isolated(checks: Sequence[Check], seconds: float = SECONDS) -> Iterator[Row]:
    """The rows of all checks in order.

    One process runs them. If a check ends it or takes longer than `seconds`, a new process runs the
    rest.
    """
    done = 0
    while done < len(checks):
        for findings in _one_process(checks[done:], seconds):
            check = checks[done]
            for found in findings:
                name, hint = found.name or check.name, found.hint
                if found.state != "ok":
                    hint = hint or check.hint
                needed = check.needed if found.needed is None else found.needed
                yield Row(
                    check.section, name, found.state, redact(found.detail), redact(hint), needed
                )
            done += 1


def _one_process(checks: Sequence[Check], seconds: float) -> Iterator[list[Finding]]:
    """Findings of the first checks, one check or more."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads and locks
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(os.getpid(), checks, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for _ in checks:
            try:
                found = ours.recv() if ours.poll(seconds) else None
            except (EOFError, OSError):
                process.join()
                yield [Finding("broken", f"it ends the process ({_end(process)})")]
                return
            if found is None:
                yield [Finding("broken", f"no answer within {seconds:.0f} s")]
                return
            yield found
    finally:
        process.kill()
        process.join()
        ours.close()


def _end(process: Any) -> str:
    code = process.exitcode
    return signal.Signals(-code).name if code < 0 else f"status {code}"


def _answer(parent: int, checks: Sequence[Check], answers: Connection) -> None:
    begin_worker(parent)
    # Libraries print while they are imported, some of them from C.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    for check in checks:
        try:
            findings = check.run()
        except BaseException as error:  # SystemExit too: whatever it is, it is a row
            findings = [Finding("broken", one_line(error))]
        answers.send(findings)
