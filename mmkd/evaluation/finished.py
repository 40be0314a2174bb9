"""Results of finished tasks, kept on disk until all tasks of an evaluation are finished."""

import json
import shutil
from pathlib import Path
from typing import Any

from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.shapes import Kept, read_if

FOLDER = "unfinished"


class FinishedTasks:
    """The results of finished tasks, one file for each in `out/unfinished/`.

    Args:
        out: folder of the evaluation; None keeps nothing.
        request: what the results depend on, as JSON. Results of another request are deleted.
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
        """The results of a task; None if it is not finished or its documents have changed."""
        found = read_if(Kept, self._path(task)) if self.folder is not None else None
        return found["given"] if found and found["facts"] == facts else None

    def write(self, task: str, facts: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Keep the results of a task; returns them as they are read back from JSON."""
        given = json.loads(json.dumps(given, default=str))
        if self.folder is not None:
            write_json(self._path(task), {"facts": facts, "given": given})
        return given

    def clear(self) -> None:
        """Delete all results; for the end of the evaluation."""
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
    """Name, size and modification time of each file. If they are equal, nothing has changed."""
    found = []
    for path in sorted(files):
        if path.is_file():
            status = path.stat()
            found.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return found
