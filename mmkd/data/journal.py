"""A journal of a model's answers, so that an interrupted command need not repeat them."""

import json
from pathlib import Path
from typing import Any

from mmkd.errors import DataError
from mmkd.runtime.formats import FormatError, parse_json
from mmkd.runtime.json_lines import JsonLines, complete_lines


class Journal:
    """A file of JSON lines, which are written to disk as soon as they are added.

    The first line is the request. An incomplete last line, from a killed command, is overwritten.

    Args:
        path: the file.
        request: all settings that the answers depend on, as JSON.

    Raises:
        DataError: the file is damaged, or has answers to another request.
    """

    def __init__(self, path: Path, request: dict[str, Any]):
        self.path, self._file = path, JsonLines(path, sync=True)
        hint = "repeat the command that began it, or delete it"
        try:
            lines = [parse_json(line) for line in complete_lines(path)]
        except FormatError as error:
            raise DataError(f"damaged ({error})", where=str(path), hint="delete it") from error
        if not all(isinstance(line, dict) for line in lines):
            raise DataError("damaged (a line is not an object)", where=str(path), hint="delete it")
        if lines and lines[0] != json.loads(json.dumps(request)):
            raise DataError("it has answers to another request", where=str(path), hint=hint)
        self.entries: list[dict[str, Any]] = lines[1:]
        if not lines:
            self._file.add(request)

    def add(self, *entries: dict[str, Any]) -> None:
        """Write entries to the disk."""
        self._file.add(*entries)
        self.entries += entries

    def delete(self) -> None:
        """Delete the file, after the command has written its output."""
        self.path.unlink(missing_ok=True)
