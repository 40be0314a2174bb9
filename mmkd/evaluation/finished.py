"""Finished tasks of an evaluation that is not: kept on disk, so that it goes on with the others."""

import json
import shutil
from pathlib import Path
from typing import Any

from mmkd.files import read_json, write_json

FOLDER = "unfinished"


class FinishedTasks:
    """What the finished tasks gave, a file each in `out/unfinished/`.

    Args:
        out: folder of the evaluation; None keeps nothing.
        request: what was asked for, as JSON. What another request has left is deleted.
    """

    def __init__(self, out: Path | None, request: dict[str, Any]):
        self.folder = None if out is None else out / FOLDER
        if self.folder is None:
            return
        known = self.folder / "request.json"
        if _read(known) != request:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(known, request)

    def read(self, task: str, facts: Any) -> dict[str, Any] | None:
        """What a task gave; None if it is not finished, or its documents have changed since."""
        found = _read(self._path(task)) if self.folder is not None else None
        return found["given"] if found and found["facts"] == facts else None

    def write(self, task: str, facts: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Keep what a task gave; returns it as JSON gives it back."""
        given = json.loads(json.dumps(given, default=str))
        if self.folder is not None:
            write_json(self._path(task), {"facts": facts, "given": given})
        return given

    def clear(self) -> None:
        """Delete them: the evaluation is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, task: str) -> Path:
        assert self.folder is not None
        return self.folder / f"task-{task}.json"


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def facts_of(files: list[Path]) -> list[list[Any]]:
    """Name, size and time of files, which tell whether they have changed."""
    found = []
    for path in sorted(files):
        if path.is_file():
            status = path.stat()
            found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
