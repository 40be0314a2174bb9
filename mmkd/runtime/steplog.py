"""Log files of a stage: one JSON line per step. Lines after the step of a resume are dropped."""

import json
import math
import os
from pathlib import Path
from typing import Any, TypeGuard

from mmkd.runtime.files import sync_file, write_text
from mmkd.runtime.progress import say

_decode = json.JSONDecoder().raw_decode


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects with a `step` in a log file; an empty list if there is no such file.

    Incomplete lines and zero bytes, which a kill or a power failure leaves, are ignored. If a line
    has two objects, both are read.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = [value for line in text.split("\n") for value in _objects(line.strip(" \0\t\r"))]
    return [line for line in found if _has_step(line)]


def _objects(text: str) -> list[Any]:
    found = []
    while text:
        try:
            value, end = _decode(text)
        except (ValueError, RecursionError):
            break
        found.append(value)
        text = text[end:].lstrip()
    return found


def _has_step(line: Any) -> bool:
    if not isinstance(line, dict):
        return False
    step = line.get("step")
    return _is_number(step) and 0 <= step < math.inf


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class StepLog:
    """A log file with a line for each step, written by one rank.

    Attributes:
        last: the newest line that was kept; empty if there is none.
        found: the lines that were kept.
        written: the last step in the file before lines were dropped.
    """

    def __init__(self, path: Path, step: int, *, active: bool = True, key: str | None = None):
        """
        Args:
            path: the file. Lines after `step` are dropped; the stage writes them again.
            step: the step that the stage resumes after.
            active: whether this rank writes.
            key: a number that each line must have; lines without it are dropped.

        Raises:
            OSError: the file cannot be written without the dropped lines.
        """
        self.path, self.active = path, active
        lines = read_lines(path)
        if key is not None:
            lines = [line for line in lines if _is_number(line.get(key))]
        self.found = [line for line in lines if line["step"] <= step]
        self.written = int(max((line["step"] for line in lines), default=0))
        self.last: dict[str, Any] = self.found[-1] if self.found else {}
        text = "".join(json.dumps(line) + "\n" for line in self.found)
        if active and path.exists() and path.read_bytes() != text.encode():
            write_text(path, text)

    def missing(self, step: int, every: int = 1) -> list[int]:
        """Multiples of `every` up to `step` that have no line."""
        return sorted(set(range(every, step + 1, every)) - {line["step"] for line in self.found})

    def say_missing(self, step: int, every: int = 1) -> None:
        """Tell the user which lines are lost; arguments as in `missing`."""
        lost = self.missing(step, every)
        if lost and self.active:
            some = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            say(f"{self.path}: the lines of {len(lost)} steps are lost ({some}); training goes on")

    def write(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written; the file is unchanged.
        """
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            content = (json.dumps(line) + "\n").encode()
            try:
                if file.write(content) != len(content):
                    file.write(content[file.tell() - end :])  # raises what stopped the first one
            except OSError as error:
                os.ftruncate(file.fileno(), end)
                error.filename = error.filename or str(self.path)
                raise

    def sync(self) -> None:
        """Wait until all lines are on the disk, so that a power failure never leaves a checkpoint
        without the lines before it."""
        if self.active and self.path.exists():
            sync_file(self.path)
