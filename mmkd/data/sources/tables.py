"""Records in tables: parquet files, data sets saved by `datasets`, and those of the Hub."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmkd.data.sources.kept import keep, unreadable
from mmkd.errors import DataError
from mmkd.progress import track
from mmkd.recipe import HUB, SourceConfig

BYTES = "__bytes__"


class TableRows:
    """Rows of a `datasets.Dataset`, pictures as their bytes: what they hold is looked at later,
    with limits, and of other media nothing is.

    Args:
        table: the data set.
        folder: what image paths are relative to.
        files: for messages: where the rows come from, with the number of rows until each one's end.
    """

    def __init__(self, table: Any, folder: Path | None, files: dict[str, int]):
        self.folder = folder
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


def parquet_rows(files: list[Path], train: str) -> TableRows:
    """Rows of parquet files, one behind another.

    Raises:
        DataError: they cannot be read, or have different columns.
    """
    import datasets
    import pyarrow.parquet

    datasets.disable_progress_bars()
    try:
        names = [str(f) for f in files]
        # Before `datasets`, which logs what it cannot read.
        rows = [pyarrow.parquet.read_metadata(name).num_rows for name in names]
        table = datasets.load_dataset("parquet", data_files=names, split="train")
    except Exception as error:
        raise unreadable(error, train) from error
    return TableRows(table, files[0].parent, dict(zip(names, accumulate(rows), strict=True)))


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_rows(folder: Path) -> TableRows:
    """Rows of a folder that `save_to_disk` wrote.

    Raises:
        DataError: it is damaged, or holds several splits.
    """
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise unreadable(error, str(folder)) from error
    if not isinstance(table, datasets.Dataset):
        splits = ", ".join(table)
        raise DataError(
            f"it holds the splits {splits}", where=str(folder), mend="name the folder of one"
        )
    return TableRows(table, folder, {str(folder): len(table)})


def hub_rows(config: SourceConfig) -> "TableRows | StreamedRows":
    """Rows of a Hub data set, or of the first of them.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    if config.stream is not None:
        return StreamedRows(config)
    name = config.train.removeprefix(HUB)
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            name, config.subset, split=config.split, revision=config.revision
        )
    except Exception as error:
        raise _not_loaded(error, config.train) from error
    folder = Path(name) if Path(name).is_dir() else None
    return TableRows(table, folder, {config.train: len(table)})


class StreamedRows:
    """The first rows of a Hub data set, read once in its order and kept: from then on they can be
    asked for by number like any other."""

    def __init__(self, config: SourceConfig):
        from datasets import Features, Value

        self.name = config.train
        self.folder: Path | None = None
        features = Features({"text": Value("large_string"), "pictures": [Value("large_binary")]})
        self._table = keep(
            _streamed,
            features,
            config.train,
            at_once=50,  # pictures
            name=config.train.removeprefix(HUB),
            subset=config.subset,
            split=config.split,
            revision=config.revision,
            count=config.stream,
        )

    def __len__(self) -> int:
        return len(self._table)

    def place(self, index: int) -> str:
        return f"{self.name}: record {index}"

    def row(self, index: int) -> dict[str, Any]:
        kept = self._table[index]

        def restore(value: dict[str, Any]) -> Any:
            return kept["pictures"][value[BYTES]] if value.keys() == {BYTES} else value

        try:
            return json.loads(kept["text"], object_hook=restore)
        except (IndexError, TypeError) as error:  # a record of the data set's says BYTES itself
            raise DataError(f"a record has the key {BYTES}", mend="drop it") from error


def _streamed(
    name: str, subset: str | None, split: str, revision: str | None, count: int
) -> Iterator[dict[str, Any]]:
    """Rows as JSON with what is bytes beside it: a table of any columns is one of these two."""
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        plain = None if rows.features is None else undecoded(rows.features)
        tables = rows.with_format("arrow").take(count)
        for table in track(tables, f"reading {name}", count):
            (row,) = table.to_pylist()
            row = row if plain is None else plain.decode_example(row)
            pictures: list[bytes] = []

            def put(value: Any, pictures: list[bytes] = pictures) -> Any:
                if not isinstance(value, bytes):
                    return str(value)
                pictures.append(value)
                return {BYTES: len(pictures) - 1}

            yield {"text": json.dumps(row, default=put), "pictures": pictures}
    except Exception as error:
        raise _not_loaded(error, HUB + name) from error


def _not_loaded(error: Exception, where: str) -> DataError:
    from huggingface_hub import is_offline_mode

    reason = unreadable(error, where).what.removeprefix("cannot read: ")
    mend = "check name, subset and split, and that the Hub can be reached"
    if is_offline_mode():
        mend = "unset HF_HUB_OFFLINE for what is not downloaded yet, or name files"
    return DataError(f"cannot load the data set: {reason}", where=where, mend=mend)


def undecoded(features: Any) -> Any:
    """Features of which none opens pictures, sound or the like; JSON becomes what it says.

    Reading by them copies no table, which casting columns of nested ones does.
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
