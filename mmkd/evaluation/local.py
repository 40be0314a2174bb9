"""Data of lmms-eval's tasks from local parquet files instead of the Hub.

A task that reads the split `test` of the Hub's `owner/POPE` reads `DIR/POPE/test.parquet`; with a
configuration, `DIR/ScienceQA/ScienceQA-IMG/test.parquet`. The Hub's own layout works too: the
owner's folder, `data/`, and shards `test-00000-of-00002.parquet`.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, load_dataset

from mmkd.data.sources.files import exact
from mmkd.errors import DataError
from mmkd.evaluation.catalog import Task
from mmkd.evaluation.standard import COLUMNS, PICTURES

SHARDS = re.compile(r"-of-(\d+)\.parquet$")
BUILDERS = ("parquet", "json", "csv", "imagefolder", "arrow", "text", "pandas")
_ENCODED = {"bytes", "path"}


@dataclass(frozen=True)
class LocalData:
    """Where one task's documents are.

    Attributes:
        split: the split that is scored.
        files: its parquet files, in order.
        pictures: files with the columns id and image, where the documents hold imageId.
    """

    split: str
    files: list[Path]
    pictures: list[Path]

    def override(self, config: dict[str, Any]) -> dict[str, Any]:
        """A task's keys with this data in place of the Hub's."""
        files = {self.split: [*map(exact, self.files)]}
        changed: dict[str, Any] = {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "features": features(self.files[0])},
        }
        if self.pictures:
            changed["process_docs"] = lambda documents: with_pictures(
                documents, read_parquet(self.pictures)
            )
        return config | changed


def with_pictures(documents: Dataset, rows: Dataset) -> Dataset:
    """The documents with the column image, found by imageId in rows of id and image."""
    pictures = {row["id"]: row["image"] for row in rows.cast_column("image", Image(decode=False))}
    return documents.map(
        lambda document: {"image": pictures[document["imageId"]]},
        features=Features({**documents.features, "image": Image()}),
    )


def find_local(tasks: Iterable[Task], folder: Path) -> dict[str, LocalData]:
    """{task: its files in `folder`}, for all tasks whose data is on the Hub.

    Raises:
        DataError: the folder or a task's files are missing, empty or of another schema.
    """
    if not folder.is_dir():
        raise DataError(
            "no such folder of data", where=str(folder), hint="correct `local`, or leave it out"
        )
    return {
        task.name: _find(task, folder)
        for task in tasks
        if task.config.get("dataset_path") not in (None, *BUILDERS)
    }


def _find(task: Task, folder: Path) -> LocalData:
    config = task.config.get("dataset_name")
    split = str(task.split)
    files = _files(task, folder, config, split)
    check_columns(files, COLUMNS.get(task.name, ()), task.name)
    pictures = []
    if task.name in PICTURES:
        pictures = _files(task, folder, PICTURES[task.name], split)
        check_columns(pictures, ("id", "image"), task.name)
        _check_pictures(files, pictures)
    return LocalData(split, files, pictures)


def _files(task: Task, folder: Path, config: str | None, split: str) -> list[Path]:
    name = str(task.config["dataset_path"])
    short = name.rpartition("/")[2]
    for place in [folder / name, folder / short, *sorted(folder.glob(f"*/{glob.escape(short)}"))]:
        base = place / config if config else place
        for inner in (base, base / "data"):
            if (whole := inner / f"{split}.parquet").is_file():
                return [whole]
            if shards := sorted(inner.glob(f"{glob.escape(split)}-[0-9]*.parquet")):
                return _complete(shards, task.name)
    wanted = folder / short / (config or "") / f"{split}.parquet"
    raise DataError(
        f"no local data of task {task.name}",
        where=str(folder),
        hint=f"put {wanted} there, with the columns of the Hub's {name}, or leave `local` out",
    )


def _complete(shards: list[Path], task: str) -> list[Path]:
    """Refuse a part of the shards: its scores would look like those of the benchmark."""
    counted = SHARDS.search(shards[0].name)
    if counted and len(shards) != int(counted.group(1)):
        raise DataError(
            f"{len(shards)} of {int(counted.group(1))} shards of task {task} are here",
            where=str(shards[0].parent),
            hint="copy the others, or set evaluate.limit for a part",
        )
    return shards


def check_columns(files: Sequence[Path], columns: Sequence[str], task: str) -> None:
    """Refuse files without rows, without a column, or that are no parquet files."""
    for path in files:
        try:
            read = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                "not a parquet file", where=str(path), hint="write it with to_parquet"
            ) from error
        missing = [name for name in columns if name not in read.schema_arrow.names]
        if missing:
            raise DataError(
                f"task {task} reads the column {missing[0]}, which is not there",
                where=str(path),
                hint=f"give the columns {', '.join(columns)}",
            )
        if not read.metadata.num_rows:
            raise DataError("no rows", where=str(path), hint="give at least one")


def _check_pictures(files: Sequence[Path], pictures: Sequence[Path]) -> None:
    known = _values(pictures, "id")
    if missing := sorted(_values(files, "imageId") - known):
        raise DataError(
            f"no image with id {missing[0]}",
            where=", ".join(map(str, pictures)),
            hint="give the images of all questions",
        )


def _values(files: Sequence[Path], column: str) -> set[Any]:
    return {
        value
        for path in files
        for value in pq.read_table(path, columns=[column])[column].to_pylist()
    }


def read_parquet(files: Sequence[Path]) -> Dataset:
    """The rows of all files, images decoded on access."""
    return load_dataset(
        "parquet",
        data_files=[*map(exact, files)],
        features=features(files[0]),
        split="train",
    )


def features(path: Path) -> Features:
    """The types of a parquet file's columns; a column of bytes and path holds images, whether
    or not `datasets` wrote the file and said so."""
    found = Features.from_arrow_schema(pq.read_schema(path))
    return Features({name: _as_picture(kind) for name, kind in found.items()})


def _as_picture(kind: Any) -> Any:
    if isinstance(kind, dict) and set(kind) == _ENCODED:
        return Image()
    return List(_as_picture(kind.feature)) if isinstance(kind, List) else kind
