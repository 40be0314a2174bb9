"""Records in tables: Parquet files, data sets saved by `datasets`, and data sets of the Hub."""

import glob
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmkd.data.sources.arrow_index import unreadable
from mmkd.data.sources.files import exact
from mmkd.errors import DataError
from mmkd.recipe import HUB, SourceConfig
from mmkd.runtime import hub


class TableRows:
    """Rows of a `datasets.Dataset`. Images are bytes, which mmkd decodes later with limits. Other
    media are not decoded.

    Args:
        table: the data set.
        folder: of relative image paths.
        files: names of the files for messages, with the number of rows up to the end of each.

    Attributes:
        commit: of a data set on the Hub; None for others.
    """

    def __init__(
        self, table: Any, folder: Path | None, files: dict[str, int], commit: str | None = None
    ):
        self.folder, self.commit = folder, commit
        self._features = undecoded(table.features)
        self._table = table.with_format("arrow")
        self._names, self._ends = list(files), list(files.values())

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        number = bisect_right(self._ends, index)
        return f"{self._names[number]}: record {index - [0, *self._ends][number]}"

    def row(self, index: int) -> dict[str, Any]:
        return self._features.decode_example(self._table[index].to_pylist()[0])

    def column(self, name: str) -> Callable[[int], Any]:
        """A function that reads one column of a row; None if there is no such column."""
        if name not in self._features:
            return lambda index: None
        table = self._table.select_columns([name])
        features = type(self._features)({name: self._features[name]})
        return lambda index: features.decode_example(table[index].to_pylist()[0])[name]


def parquet_rows(files: list[Path], train: str) -> TableRows:
    """Rows of Parquet files, one file after the other.

    Raises:
        DataError: they cannot be read, or have different columns.
    """
    import datasets
    import pyarrow.parquet

    datasets.disable_progress_bars()
    try:
        names = [str(f) for f in files]
        # Checked before `datasets` reads them, because it logs errors.
        rows = [pyarrow.parquet.read_metadata(file.absolute()).num_rows for file in files]
        table = datasets.load_dataset("parquet", data_files=[*map(exact, files)], split="train")
    except Exception as error:
        raise unreadable(error, train) from error
    return TableRows(table, files[0].parent, dict(zip(names, accumulate(rows), strict=True)))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any(os.path.isfile(folder / name) for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path) -> TableRows:
    """Rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: it is damaged, or has several splits.
    """
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise unreadable(error, str(folder)) from error
    if not isinstance(table, datasets.Dataset):
        splits = ", ".join(table)
        raise DataError(
            f"it holds the splits {splits}", where=str(folder), hint="name the folder of one"
        )
    return TableRows(table, folder, {str(folder): len(table)})


def hub_rows(config: SourceConfig) -> TableRows:
    """Rows of a data set on the Hub.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    name = hub_name(config)
    datasets.disable_progress_bars()
    if not Path(name).exists():
        hub.unreachable()  # checked once here: the libraries would retry for minutes
    try:
        table = datasets.load_dataset(
            name, config.subset, split=config.split, revision=config.revision
        )
    except Exception as error:
        raise not_loaded(error, config.train) from error
    folder = Path(name) if Path(name).is_dir() else None
    if folder is None:
        hub.say_if_unreachable(name)
    commit = _commit(table) if folder is None else None
    return TableRows(table, folder, {config.train: len(table)}, commit)


def _commit(table: Any) -> str | None:
    """The commit of a data set on the Hub, from the name of its folder in the cache of
    `datasets`."""
    kept = table.cache_files
    return Path(kept[0]["filename"]).parent.name if kept else None


def hub_name(config: SourceConfig) -> str:
    """The name of a data set for `datasets`.

    Raises:
        DataError: `datasets` would interpret the name differently.
    """
    name = config.train.removeprefix(HUB)
    if glob.has_magic(name):
        raise DataError(
            "a data set's name with *, ? or [ in it", where=config.train, hint="rename its folder"
        )
    if name == "pandas":
        raise DataError(
            "`datasets` has a reader of this name, which opens pickled files, and these can run "
            "code",
            where=config.train,
            hint="name files, or write hub:OWNER/NAME",
        )
    return name


def not_loaded(error: Exception, where: str) -> DataError:
    """The error for a data set on the Hub that cannot be loaded."""
    silence = hub.unreachable()
    if silence is not None and isinstance(error, ConnectionError):
        return DataError(
            "cannot load the data set: it is not downloaded, and the Hub cannot be reached "
            f"({silence})",
            where=where,
            hint=hub.hint("name files"),
        )
    reason = unreadable(error, where).what.removeprefix("cannot read: ")
    hint = "check name, subset and split, and that the Hub can be reached"
    if silence is not None:
        hint = hub.hint("check name, subset and split")
    return DataError(f"cannot load the data set: {reason}", where=where, hint=hint)


def undecoded(features: Any) -> Any:
    """Features that do not decode images, sound and other media. JSON columns are parsed.

    Reading with these features does not copy the table, unlike casting nested columns.
    """
    import datasets

    def plain(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: plain(inner) for name, inner in feature.items()}
        if isinstance(feature, datasets.List | datasets.LargeList):
            return type(feature)(plain(feature.feature))
        if isinstance(feature, datasets.Json) or not hasattr(feature, "decode"):
            return feature
        return replace(feature, decode=False)

    return datasets.Features({name: plain(feature) for name, feature in features.items()})
