"""Records of JSON files, stored as text, because their keys and types may differ.

Published files have ids that are numbers or strings, records without `image`, and additional keys.
A table with typed columns refuses such rows or adds keys; here each record is parsed by itself.
Files are read in pieces: a list of 665,000 records in one line needs no more memory than its
    largest one.

ijson also reads lists in pieces, but returns parsed values, where a table needs their text. Parsing
a file and writing each record as JSON again takes longer than finding where records end: 1.9 s and
1.5 s for 73 MB (ijson 3.6 with its C parser). Its messages have no line or column, it refuses NaN
and a byte order mark, replaces half of a surrogate pair by "?", and takes 1 GB for a text of 20,000
opening brackets.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmkd.data.sources.arrow_index import keep, of_each_file, stamps
from mmkd.errors import DataError
from mmkd.runtime.formats import FormatError, parse_json

BETWEEN = re.compile(r"\s*")
NO_JSON = "a record is not a JSON object"
REPAIR = "repair the file: a list of records, or one record per line"
PIECE = 2**22  # bytes


class JsonRows:
    """Records of json files (one list each) or jsonl files (one record per line)."""

    def __init__(self, files: list[Path], train: str):
        from datasets import Features, Value

        number = Value("int64")
        features = Features({"file": number, "record": number, "text": Value("large_string")})
        self.files = files
        self.folder: Path | None = files[0].parent
        self._table = keep(of_each_file, features, train, files=stamps(files), read=_texts)

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        found = self._table[index]
        return f"{self.files[found['file']]}: record {found['record']}"

    def row(self, index: int) -> dict[str, Any]:
        return parse_object(self._table[index]["text"])


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        DataError: `text` is not a JSON object.
    """
    try:
        row = parse_json(text)
    except FormatError as error:
        raise DataError(f"{NO_JSON}: {error}", hint="repair or drop it", kind=NO_JSON) from error
    if not isinstance(row, dict):
        raise DataError(NO_JSON, hint="repair or drop it")
    return row


def _texts(name: str) -> Iterator[dict[str, Any]]:
    with open(name, "rb") as file:
        begin = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(begin)
        parts = map(bytes.strip, iter(lambda: file.read(PIECE), b""))
        lines = name.endswith(".jsonl") or next(filter(None, parts), b"")[:1] != b"["
        file.seek(begin)
        try:
            for record, text in enumerate(_lines(file) if lines else _elements(_Text(file))):
                yield {"record": record, "text": text}
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read: {error}", hint=REPAIR) from error


def _lines(file: BinaryIO) -> Iterator[str]:
    """The lines that are not empty. A broken line raises an error only when its record is read, but
    if the first line is broken, the file is not JSON lines."""
    first, at = True, file.tell()
    for number, content in enumerate(file, start=1):
        text = _decoded(content, at).strip()
        at += len(content)
        if text and first:
            first = False
            try:
                json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{error.msg}: line {number} column {error.colno}") from error
        if text:
            yield text


def _decoded(content: bytes, at: int, decoder: codecs.IncrementalDecoder | None = None) -> str:
    """Decode UTF-8.

    Args:
        content: bytes to decode.
        at: offset of `content` in its file, for messages.
        decoder: an incremental decoder, if `content` is a part of the text.
    """
    try:
        return content.decode() if decoder is None else decoder.decode(content, not content)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {at + error.start}") from error


class _Text:
    """The text of a file. Only a part of it is in memory.

    Attributes:
        text: the part that has been read and not been dropped.
    """

    def __init__(self, file: BinaryIO):
        self.text = ""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = file.tell()  # number of decoded bytes
        self._line = self._column = 1  # position of the first character of `text`

    def more(self) -> bool:
        """Read as much text as is in memory already; False at the end of the file."""
        content = self._file.read(max(PIECE, len(self.text)))
        at = self._bytes - len(self._decoder.getstate()[0])
        self.text += _decoded(content, at, self._decoder)
        self._bytes += len(content)
        return bool(content)

    def solid(self, at: int) -> int:
        """Position of the first character from `at` on that is not whitespace, or the end."""
        while True:
            at = BETWEEN.match(self.text, at).end()  # type: ignore[union-attr]
            if at < len(self.text) or not self.more():
                return at

    def value(self, at: int) -> int:
        """Position after the JSON value that begins at `at`."""
        decode = json.JSONDecoder().raw_decode
        while True:
            try:
                _, end = decode(self.text, at)
                if end < len(self.text) or not self.more():
                    return end
            except json.JSONDecodeError as error:
                if not self.more():
                    raise self.error(error.msg, error.pos) from error

    def passed(self, at: int) -> int:
        """Drop the text before `at`, and return the new position of `at`."""
        self._line, self._column = self._position(at)
        self.text = self.text[at:]
        return 0

    def error(self, what: str, at: int) -> ValueError:
        line, column = self._position(at)
        return ValueError(f"{what}: line {line} column {column}")

    def _position(self, at: int) -> tuple[int, int]:
        lines = self.text.count("\n", 0, at)
        if not lines:
            return self._line, self._column + at
        return self._line + lines, at - self.text.rindex("\n", 0, at)


def _elements(file: _Text) -> Iterator[str]:
    """The texts of the elements of a JSON list. After a broken element, reading stops."""
    at = file.solid(file.solid(0) + 1)
    if not file.text.startswith("]", at):
        while True:
            end = file.value(at)
            yield file.text[at:end]
            at = file.solid(end)
            if file.text.startswith("]", at):
                break
            if not file.text.startswith(",", at):
                raise file.error("',' or ']' expected", at)
            at = file.solid(at + 1)
            if at > PIECE:
                at = file.passed(at)
    rest = file.solid(at + 1)
    if rest < len(file.text):
        raise file.error("more text after the list", rest)
