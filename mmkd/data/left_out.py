"""Files of records that are not trained on. `mmkd data check --drop` writes them.

Such a file has a section for each source of the recipe. It fits a source if number of records and
names and sizes of the files are as they were, and if the records have the ids that they had.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmkd.data.content import printable
from mmkd.data.schema import record_id
from mmkd.data.sources import find_files
from mmkd.data.sources.memory import MemorySource
from mmkd.data.sources.tables import is_saved
from mmkd.errors import DataError
from mmkd.recipe import HUB, SourceConfig
from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.formats import FormatError

AGAIN = (
    "take it out of the recipe, and write it again: `mmkd data check RECIPE --twins --drop FILE`"
)
CHECKED = 64
"""Number of records, evenly spread, whose ids are compared when a source is opened."""
Count = Annotated[int, Field(ge=0, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LeftOut(_Part):
    """A record that is not trained on: its index in the source, its id and the reason."""

    record: Count
    id: str
    why: str


class Section(_Part):
    """The records of one source, and what the source was like.

    Attributes:
        files: names and sizes in bytes; empty for data sets of the Hub.
        commit: of a data set of the Hub; None if it is not known.
    """

    train: str
    subset: str | None
    split: str
    records: Count
    files: list[tuple[str, Count]]
    commit: str | None
    leave_out: list[LeftOut]


class LeaveOutFile(_Part):
    """A file of records that are not trained on.

    Attributes:
        compared: how, and with what, for readers of the file.
    """

    format: Literal[1] = 1
    compared: dict[str, Any]
    sources: list[Section]


class _Rows(Protocol):
    def __len__(self) -> int: ...
    def row(self, index: int) -> dict[str, Any]: ...


def section(config: SourceConfig, rows: _Rows, left_out: Sequence[LeftOut]) -> Section:
    """The section of a source.

    Args:
        config: of the source.
        rows: its rows.
        left_out: the records that are left out.
    """
    return Section(
        train=config.train,
        subset=config.subset,
        split=config.split,
        records=len(rows),
        files=[(file.name, file.stat().st_size) for file in _files(config)],
        commit=getattr(rows, "commit", None),
        leave_out=list(left_out),
    )


def _files(config: SourceConfig) -> list[Path]:
    path = Path(config.train)
    if isinstance(config, MemorySource) or config.train.startswith(HUB):
        return []
    if is_saved(path):
        return sorted(file for file in path.glob("*.arrow") if file.is_file())
    return find_files(config.train)


def write_left_out(path: Path, sections: Sequence[Section], compared: dict[str, Any]) -> None:
    """Write a file of records that are not trained on."""
    whole = LeaveOutFile(compared=compared, sources=list(sections))
    write_json(path, whole.model_dump(mode="json"))


def read_left_out(path: Path) -> LeaveOutFile:
    """Read a file of records that are not trained on.

    Raises:
        DataError: it cannot be read, or is another kind of file.
    """
    if not path.is_file():
        raise DataError("no such file", where=str(path), hint="check leave_out")
    try:
        return LeaveOutFile.model_validate(read_json(path))
    except (OSError, FormatError, ValidationError) as error:
        raise DataError(
            "it is no file of records to leave out", where=str(path), hint=AGAIN
        ) from error


def left_out_rows(config: SourceConfig, rows: _Rows) -> np.ndarray:
    """The rows of a source that its `leave_out` lists, [n] int64, ascending.

    Raises:
        DataError: the file cannot be read, does not list the source, or was written for other
            content of the source.
    """
    assert config.leave_out is not None
    found = read_left_out(Path(config.leave_out)).sources
    now = section(config, rows, [])
    fitting = [s for s in found if _shape(s) == _shape(now)]
    if not fitting:
        named = [s for s in found if s.train == config.train or _names(s) == _names(now) != []]
        what = f"{config.leave_out} does not list this source"
        if named:
            before = named[0].records
            differs = f"records: {before:,}, now {now.records:,}"
            what = f"{config.leave_out} was written for other content (" + (
                differs if before != now.records else "files of another name or size"
            )
            what += ")"
        raise DataError(what, where=config.train, hint=AGAIN)
    listed = [record for part in fitting for record in part.leave_out]
    for record in listed[:: max(1, len(listed) // CHECKED)]:
        if not _is_same(record, rows):
            raise DataError(
                f"{config.leave_out} was written for other content (record {record.record:,} had "
                f"the id {printable(record.id, 60)!r})",
                where=config.train,
                hint=AGAIN,
            )
    return np.unique(np.array([record.record for record in listed], dtype=np.int64))


def _is_same(listed: LeftOut, rows: _Rows) -> bool:
    """Whether a listed record still has its id."""
    try:
        return listed.record < len(rows) and record_id(rows.row(listed.record)) == listed.id
    except DataError:
        return False


def _names(found: Section) -> list[str]:
    return [name for name, _ in found.files]


def _shape(found: Section) -> tuple[Any, ...]:
    return found.records, found.files, found.subset, found.split
