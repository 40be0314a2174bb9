"""Sources of records: files, shards, data sets and memory, each as rows with an index."""

from pathlib import Path
from typing import Any, Protocol

from mmkd.data.sources.files import find_files, kind_of
from mmkd.data.sources.json_records import JsonRows
from mmkd.data.sources.memory import MemorySource, memory_source
from mmkd.data.sources.shards import ShardRows
from mmkd.data.sources.streamed import StreamedRows
from mmkd.data.sources.tables import hub_rows, is_saved, parquet_rows, saved_rows
from mmkd.errors import DataError
from mmkd.recipe import HUB, SourceConfig

__all__ = [
    "MemorySource",
    "Rows",
    "StreamedRows",
    "find_files",
    "is_there",
    "memory_source",
    "open_rows",
]


class Rows(Protocol):
    """Rows by index, in a fixed order."""

    @property
    def folder(self) -> Path | None:
        """Folder of relative image paths, if the recipe names none."""

    def __len__(self) -> int: ...

    def place(self, index: int) -> str:
        """The file of a row, and its index there, for messages."""

    def row(self, index: int) -> dict[str, Any]:
        """A row with the values in its file.

        Raises:
            DataError: it cannot be read. The error has no place.
        """


def is_there(config: SourceConfig) -> bool:
    """Whether the files of a source exist. True for a data set on the Hub."""
    if config.train.startswith(HUB) or is_saved(Path(config.train)):
        return True
    try:
        return bool(find_files(config.train))
    except DataError:
        return False


def open_rows(config: SourceConfig) -> Rows:
    """Open the rows of a source.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    if isinstance(config, MemorySource):
        return config.rows
    if config.train.startswith(HUB):
        return hub_rows(config) if config.stream is None else StreamedRows(config)
    if is_saved(Path(config.train)):
        return saved_rows(Path(config.train))
    files = find_files(config.train)
    kind = kind_of(files, config.train)
    if kind == "tar":
        return ShardRows(files, config.train, config.prompt)
    return JsonRows(files, config.train) if kind == "json" else parquet_rows(files, config.train)
