"""Records of JSON files, kept as text: no two of them need the same keys and types.

Published files mix ids of numbers and strings, lack `image` here and there, and have keys of their
own. A table with typed columns refuses such rows or invents keys; here each is parsed alone.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmkd.data.sources.kept import Stamp, keep, stamps
from mmkd.errors import DataError

BETWEEN = re.compile(r"\s*")
NO_JSON = "a record is no JSON object"


class JsonRows:
    """Records of json files (a list each) or jsonl files (one a line)."""

    def __init__(self, files: list[Path], train: str):
        from datasets import Features, Value

        number = Value("int64")
        features = Features({"file": number, "record": number, "text": Value("large_string")})
        self.files = files
        self.folder: Path | None = files[0].parent
        self._table = keep(_texts, features, train, files=stamps(files))

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        found = self._table[index]
        return f"{self.files[found['file']]}: record {found['record']}"

    def row(self, index: int) -> dict[str, Any]:
        return parse_object(self._table[index]["text"])


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is none.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{NO_JSON}: {error}", mend="mend or drop it", kind=NO_JSON) from error
    if not isinstance(row, dict):
        raise DataError(NO_JSON, mend="mend or drop it")
    return row


def _texts(files: list[Stamp]) -> Iterator[dict[str, Any]]:
    for number, (name, _, _) in enumerate(files):
        try:
            for record, text in enumerate(_records(Path(name))):
                yield {"file": number, "record": record, "text": text}
        except UnicodeDecodeError as error:
            raise DataError(
                f"cannot read: no UTF-8 at byte {error.start}", where=name, mend="mend the file"
            ) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"cannot read: {error}", where=name, mend="mend the file") from error


def _records(path: Path) -> Iterator[str]:
    """The text of each record. A line may be broken, and is so only when it is read; a list of
    which one element is broken has no others behind it."""
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        if path.suffix == ".jsonl" or not first.lstrip().startswith("["):
            if first:
                json.loads(first)  # another kind of file altogether has no records
                yield first.strip()
            yield from (line.strip() for line in file if line.strip())
            return
    yield from _elements(path.read_text(encoding="utf-8-sig"))


def _elements(text: str) -> Iterator[str]:
    """The texts of a JSON list's elements."""
    decode = json.JSONDecoder().raw_decode

    def skip(at: int) -> int:
        return BETWEEN.match(text, at).end()  # type: ignore[union-attr]

    at = skip(skip(0) + 1)
    if text.startswith("]", at):
        return
    while True:
        _, end = decode(text, at)
        yield text[at:end]
        at = skip(end)
        if text.startswith("]", at):
            break
        if not text.startswith(",", at):
            raise json.JSONDecodeError("',' or ']' expected", text, at)
        at = skip(at + 1)
    if skip(at + 1) < len(text):
        raise json.JSONDecodeError("more text behind the list", text, skip(at + 1))
