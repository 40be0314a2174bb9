"""JSON lines about a stage's steps, cut back to where the stage resumes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from mmkd.runtime.files import sync_file, write_text

_decode = json.JSONDecoder().raw_decode


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects with a `step` in a file of lines; empty if there is no such file.

    What a kill or a power failure has cut off, or left as zero bytes, is passed over; two objects
    in one line are both read.
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
    return isinstance(step, int | float) and not isinstance(step, bool) and 0 <= step < math.inf


class StepLog:
    """One file of lines with a `step` each, written by one rank.

    Attributes:
        last: the newest line that is kept; empty if there is none.
        found: the lines that were kept.
        written: the last step of the file as it was found, redone or not.
    """

    def __init__(self, path: Path, step: int, *, active: bool = True):
        """
        Args:
            path: the file; lines past `step` are dropped, they will be written again.
            step: where the stage resumes.
            active: whether this rank writes.
        """
        self.path, self.active = path, active
        lines = read_lines(path)
        self.found = [line for line in lines if line["step"] <= step]
        self.written = int(max((line["step"] for line in lines), default=0))
        self.last: dict[str, Any] = self.found[-1] if self.found else {}
        text = "".join(json.dumps(line) + "\n" for line in self.found)
        if active and path.exists() and path.read_bytes() != text.encode():
            write_text(path, text)

    def missing(self, step: int) -> list[int]:
        """Steps up to `step` that have no line."""
        return sorted(set(range(1, step + 1)) - {line["step"] for line in self.found})

    def write(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written; nothing of it stays in the file.
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
        """Wait until all lines are on the disk: a checkpoint of their step must not outlive them in
        a power failure."""
        if self.active and self.path.exists():
            sync_file(self.path)
