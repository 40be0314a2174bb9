"""JSON lines about a stage's steps, cut back to where the stage resumes."""

import json
import math
from pathlib import Path
from typing import Any

from mmkd.files import write_text


class StepLog:
    """One file of lines with a `step` each, written by one rank.

    Attributes:
        last: the newest line that is kept.
        kept: the text of all lines that were kept.
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
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        found = [s for s in map(_step_of, lines) if s < math.inf]
        self.written = int(max(found, default=0))
        self.kept = kept
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        if active and len(kept) < len(lines):
            write_text(path, "".join(line + "\n" for line in kept))

    @property
    def found(self) -> list[dict[str, Any]]:
        """The lines that were kept."""
        return list(map(json.loads, self.kept))

    def write(self, line: dict[str, Any]) -> None:
        if self.active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    # A kill can cut the last line short; such a step is redone anyway.
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf
