"""Arrow tables that `datasets` stores on disk, memory-mapped by every process."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmkd.data.content import printable
from mmkd.errors import DataError
from mmkd.runtime.files import disk_error
from mmkd.runtime.progress import track

Stamp = tuple[str, int, int]
"""Path, size in bytes and modification time of a file."""

# Part of the key of a stored table. Increase it when the content of tables changes.
VERSION = 2
MOST_NAMED = 20


def keep(
    make: Callable[..., Iterable[dict[str, Any]]],
    features: Any,
    where: str,
    *,
    at_once: int = 1000,
    **arguments: Any,
) -> Any:
    """A table of the rows that `make(**arguments)` yields. It is made once and then read from disk.

    Args:
        make: a function of a module. It is not called if there is a table for the same arguments.
        features: `datasets.Features` of the table.
        where: its name in messages.
        at_once: number of rows in memory before they are written.
        arguments: everything the rows depend on; files as their `stamps`.

    Raises:
        DataError: from `make`.
    """
    import datasets

    datasets.disable_progress_bars()
    arguments = {"make": make, "version": VERSION, "arguments": arguments}
    try:
        return datasets.Dataset.from_generator(
            _rows, features=features, gen_kwargs=arguments, writer_batch_size=at_once
        )
    except Exception as error:
        raise unreadable(error, where) from error


def _rows(make: Callable[..., Iterable[dict[str, Any]]], version: int, arguments: dict) -> Any:
    yield from make(**arguments)


def unreadable(error: Exception, where: str) -> DataError:
    """A one-line error for an exception of `datasets`. A DataError that caused it is returned
    unchanged."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, DataError):
        cause = cause.__cause__
    if isinstance(cause, DataError):
        return cause
    known = disk_error(cause) if isinstance(cause, Exception) else None
    if known is not None:
        return DataError(known.what, where=known.where or where, hint=known.hint)
    reason = printable(" ".join(str(cause).split()), 200)
    if "corresponds to no data" in reason:
        return DataError("the data set is empty", where=where, hint="add records")
    return DataError(f"cannot read: {reason}", where=where, hint="repair the file")


def stamps(files: list[Path]) -> list[Stamp]:
    """The stamps of files, which are part of a table's key."""
    found = []
    for file in files:
        facts = file.stat()
        found.append((str(file.absolute()), facts.st_size, facts.st_mtime_ns))
    return found


def of_each_file(
    files: list[Stamp], read: Callable[[str], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The rows of all files, each with the index of its file.

    Args:
        files: stamps of the files.
        read: yields the rows of a file.

    Raises:
        DataError: some files cannot be read; all of them are named.
    """
    broken: list[DataError] = []
    for number, (name, _, _) in enumerate(track(files, "files", len(files), quiet=len(files) < 2)):
        try:
            for row in read(name):
                if not broken:
                    yield {"file": number, **row}
        except DataError as error:
            broken.append(error.at(name))
    if broken:
        first, *others = broken
        names = ", ".join(str(error.where) for error in others[:MOST_NAMED])
        more = ", ..." if len(others) > MOST_NAMED else ""
        also = f"; {len(others):,} more cannot be read: {names}{more}" if others else ""
        raise DataError(first.what + also, where=first.where, hint=first.hint)
