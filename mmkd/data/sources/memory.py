"""Records in memory: a list, a data set of `datasets`, or one of torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import PrivateAttr

from mmkd.errors import DataError
from mmkd.recipe import SourceConfig

NAME = "dataset"
"""What messages call records in memory."""


class Numbered(Protocol):
    """Records by number: a list, a `datasets.Dataset`, a `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MemoryRows:
    """Rows that are in memory, as the rows of a file. The same number always gives the same row.

    Args:
        records: as in a data file; images are open Pillow images, bytes, or paths below `images`.
        images: the folder of paths; None if there are none.
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
    """A source of a recipe whose rows are given, in place of the files that `train` names."""

    _rows: MemoryRows = PrivateAttr()

    @property
    def rows(self) -> MemoryRows:
        return self._rows


def memory_source(records: Any, images: Path | None = None, *, name: str = NAME) -> MemorySource:
    """A source of records in memory.

    Args:
        records: with a length and rows by number. Of a `datasets.Dataset`, images stay as they
            are stored until they are needed.
        images: the folder that image paths are relative to.
        name: of the source.

    Raises:
        DataError: they have no length or no numbers, as streams.
    """
    if not (hasattr(records, "__len__") and hasattr(records, "__getitem__")):
        raise DataError(
            f"a {type(records).__name__} has no length, or no records by number",
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
    """The records of a `datasets.Dataset` with images as their bytes: what they hold is looked
    at later, with limits. Others as they are."""
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
