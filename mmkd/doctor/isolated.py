"""Checks in a process of their own: one that raises, crashes or hangs is a row like others."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from mmkd.interrupt import begin_worker

State = Literal["ok", "missing", "broken"]
SECONDS = 180.0
LONGEST = 200


@dataclass(frozen=True)
class Finding:
    """What a check says.

    Attributes:
        state: broken is there and does not work.
        detail: a version, a size, or what is wrong.
        mend: the command that mends it; the check's own if left out.
        name: of what was found, where a check finds several things.
        needed: whether mmkd does nothing without it; as the check says if left out.
    """

    state: State
    detail: str
    mend: str = ""
    name: str = ""
    needed: bool | None = None


@dataclass(frozen=True)
class Check:
    """One thing to look at.

    Attributes:
        section, name: where its row goes.
        run: a function that another process can be given.
        mend: the command for what is missing or broken, if a finding has none.
        needed: mmkd does nothing without it.
    """

    section: str
    name: str
    run: Callable[[], list[Finding]]
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    state: State
    detail: str
    mend: str
    needed: bool


def run_isolated(checks: Sequence[Check], seconds: float = SECONDS) -> Iterator[Row]:
    """All checks' rows in order, each check within so many seconds.

    One process runs them, and another one goes on behind a check that ends it.
    """
    done = 0
    while done < len(checks):
        for findings in _one_process(checks[done:], seconds):
            check = checks[done]
            for found in findings:
                name, mend = found.name or check.name, found.mend
                if found.state != "ok":
                    mend = mend or check.mend
                needed = check.needed if found.needed is None else found.needed
                yield Row(check.section, name, found.state, found.detail, mend, needed)
            done += 1


def one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[:LONGEST] if said else type(error).__name__


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
