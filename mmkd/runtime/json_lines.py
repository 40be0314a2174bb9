"""Files of JSON lines that grow while a command runs, so that a killed command loses little."""

import json
import os
from pathlib import Path
from typing import Any


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file, without an incomplete last one; none if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1].splitlines()


class JsonLines:
    """Appends values to a file, one per line. One process writes it, others may read meanwhile.

    The first value that is added overwrites an incomplete last line, from a killed command.

    Args:
        path: the file. It need not exist.
        sync: wait until each value is on the disk. Otherwise a killed process keeps it, and a
            machine that fails may lose it.
    """

    def __init__(self, path: Path, *, sync: bool):
        self.path, self.sync = path, sync
        content = path.read_bytes() if path.exists() else b""
        self._end = content.rfind(b"\n") + 1

    def add(self, *values: Any) -> None:
        """Append values."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(value) + "\n" for value in values).encode()
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(text)
            file.flush()
            if self.sync:
                os.fsync(file.fileno())
        self._end += len(text)
