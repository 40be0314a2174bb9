"""Answers of a model, written as they come: a command that was stopped does not ask twice."""

import json
import os
from pathlib import Path
from typing import Any

from mmkd.errors import DataError
from mmkd.runtime.formats import FormatError, parse_json


class Journal:
    """A file of JSON lines that each reach the disk as soon as they are added.

    The first line is the request. A last line that was cut off by a kill is written over.

    Args:
        path: the file.
        request: what the answers depend on, as JSON.

    Raises:
        DataError: the file is damaged, or has answers to another request.
    """

    def __init__(self, path: Path, request: dict[str, Any]):
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self._end = content.rfind(b"\n") + 1
        hint = "repeat the command that began it, or delete it"
        try:
            lines = [parse_json(line) for line in content[: self._end].splitlines()]
        except FormatError as error:
            raise DataError(f"damaged ({error})", where=str(path), hint="delete it") from error
        if not all(isinstance(line, dict) for line in lines):
            raise DataError("damaged (a line is no object)", where=str(path), hint="delete it")
        if lines and lines[0] != json.loads(json.dumps(request)):
            raise DataError("it holds answers to another request", where=str(path), hint=hint)
        self.entries: list[dict[str, Any]] = lines[1:]
        if not lines:
            self._append(request)

    def add(self, *entries: dict[str, Any]) -> None:
        """Write entries to the disk."""
        self._append(*entries)
        self.entries += entries

    def _append(self, *entries: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(text)

    def delete(self) -> None:
        """Remove the file, once the output that it was kept for is written."""
        self.path.unlink(missing_ok=True)
