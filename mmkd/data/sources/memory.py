"""Records in memory: a list, a `datasets.Dataset`, or a data set of torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import PrivateAttr

from mmkd.errors import DataError
from mmkd.recipe import SourceConfig

NAME = "dataset"
"""Name of records in memory in messages."""


class Numbered(Protocol):
    """Records by index: a list, a `datasets.Dataset`, a `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MemoryRows:
    """Rows in memory. The same index must always return the same row.

    Args:
        records: as in a data file. Images are open Pillow images, bytes, or paths below `images`.
        images: folder of image paths; None if there are none.
    """

    def __init__(self, records: Numbered, images: Path | None):
        self._records, self.folder = records, images

    def __len__(self) -> int:
        return len(self._records)

    def place(self, index: int) -> str:
        return f"{NAME}: record {index}"

    def row(self, index: int) -> dict[str, Any]:
        record = self._records[index]
        if not isinstance(record, Mapping):
            raise DataError(
                f"the record is a {type(record).__name__}",
                hint="give a mapping, such as {'images': [...], 'messages': [...]}",
            )
        return dict(record)


class MemorySource(SourceConfig):
    """A source of a recipe with rows in memory, instead of the files that `train` names."""

    _rows: MemoryRows = PrivateAttr()

    @property
    def rows(self) -> MemoryRows:
        return self._rows


def memory_source(records: Any, images: Path | None = None, *, name: str = NAME) -> MemorySource:
    """A source of records in memory.

    Args:
        records: with a length and an index. Images of a `datasets.Dataset` are not decoded until
            they are needed.
        images: folder of relative image paths.
        name: of the source.

    Raises:
        DataError: the records have no length or no index, such as streams.
    """
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise DataError(
            f"a {type(records).__name__} has no length or no index",
            where=name,
            hint="give a list, a datasets.Dataset, or a torch Dataset with __len__ and __getitem__",
        )
    if isinstance(records, Mapping):
        raise DataError(
            f"a {type(records).__name__} of {len(records)} entries is not one data set",
            where=name,
            hint="give one of its splits, such as dataset['train']",
        )
    source = MemorySource(train=name)
    source._rows = MemoryRows(_undecoded(records), images)
    return source


def _undecoded(records: Any) -> Any:
    """Turn off decoding of images in a `datasets.Dataset`, because mmkd decodes them with limits.
    Other records are returned unchanged."""
    if not hasattr(records, "features") or not hasattr(records, "with_format"):
        return records
    from mmkd.data.sources.tables import TableRows

    return _Table(TableRows(records, None, {NAME: len(records)}))


class _Table:
    def __init__(self, rows: Any):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows.row(index)
