"""The file of `mmkd data score`: a row of numbers for each training record.

Columns of the Parquet file:

    id              the record's id
    source, index   name of the source, and number of the row in it, from 0
    key             hash of the record's text and images, hexadecimal (`mmkd.cache.record_key`)
    MODEL.tokens    tokens of the answers, end of turn included
    MODEL.characters, MODEL.nll, MODEL.margin, MODEL.entropy
                    characters of these tokens; means over the tokens (`mmkd.ops.token_scores`)
    cluster         with --clusters: number of the record's cluster, from 0

Numbers of a record that a model could not read are null. Records are in the order of the data. The
schema's metadata has, under `mmkd`, the sources with their sizes and the models with their weights.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mmkd.errors import DataError, nearest
from mmkd.runtime.files import writing
from mmkd.runtime.formats import FormatError, parse_json
from mmkd.runtime.shapes import Count, Shape

FORMAT = 1
META = b"mmkd"
AGAIN = "score it again: mmkd data score RECIPE --out FILE"
CLUSTER = "cluster"
COUNTS = ("tokens", "characters")
MEANS = ("nll", "margin", "entropy")


class ScoredSource(Shape):
    """A source that was scored."""

    records: Count


class ScoredModel(Shape):
    """A model that has scored."""

    model: str
    tokenizer: str


class Clusters(Shape):
    """Clusters of records with similar images.

    Attributes:
        model: that made the features.
        sizes: number of records of each cluster.
        without_images: number of the cluster of records without images, which is the last one; None
            if all have images.
    """

    model: str
    sizes: list[Count]
    without_images: Count | None = None


class Facts(Shape):
    """The metadata of a file of scores."""

    format: Count
    sources: dict[str, ScoredSource]
    models: dict[str, ScoredModel]
    clusters: Clusters | None = None


def write_scores(
    path: Path,
    records: Sequence[tuple[str, str, int, str | None]],
    scores: dict[str, dict[str, np.ndarray]],
    facts: dict[str, Any],
    clusters: np.ndarray | None = None,
) -> None:
    """Write a file of scores.

    Args:
        path: the file.
        records: id, source, index and key of each of N records.
        scores: by model, then by name of the number, [N] float64; NaN for records that the model
            could not read.
        facts: as `Facts`, without the format.
        clusters: of the records, [N] float64; NaN for those that could not be read.

    Raises:
        CheckpointError: it cannot be written.
    """
    ids, sources, indices, keys = zip(*records, strict=True)
    columns: dict[str, pa.Array] = {
        "id": pa.array(ids, pa.string()),
        "source": pa.array(sources, pa.string()),
        "index": pa.array(indices, pa.int64()),
        "key": pa.array(keys, pa.string()),
    }
    for model, numbers in scores.items():
        for name in (*COUNTS, *MEANS):
            values, missing = numbers[name], np.isnan(numbers[name])
            kind = pa.int64() if name in COUNTS else pa.float64()
            filled = np.where(missing, 0, values).astype(kind.to_pandas_dtype())
            columns[f"{model}.{name}"] = pa.array(filled, kind, mask=missing)
    if clusters is not None:
        missing = np.isnan(clusters)
        whole = np.where(missing, 0, clusters).astype(np.int64)
        columns[CLUSTER] = pa.array(whole, pa.int64(), mask=missing)
    table = pa.table(columns)
    said = json.dumps({"format": FORMAT, **facts})
    with writing(path) as partial:
        pq.write_table(table.replace_schema_metadata({META: said.encode()}), partial)


class ScoreFile:
    """Reads a file of scores.

    Args:
        path: the file.

    Raises:
        DataError: it does not exist, or `mmkd data score` has not written it.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise DataError(
                "no such file of scores",
                where=str(path),
                hint="check the path, or write it: mmkd data score RECIPE --out FILE",
            )
        try:
            schema = pq.read_schema(path)
            said = parse_json((schema.metadata or {}).get(META, b""))
            facts = Facts.model_validate(said)
        except (pa.ArrowException, OSError, FormatError, ValidationError) as error:
            raise self._foreign() from error
        known = {"id", "source", "index", "key"} <= set(schema.names)
        if facts.format != FORMAT or not known:
            raise self._foreign()
        self.facts, self.columns = facts, list(schema.names)

    def _foreign(self) -> DataError:
        return DataError(
            "it is damaged, or `mmkd data score` has not written it",
            where=str(self.path),
            hint="score the records again",
        )

    def _read(self, *names: str) -> list[Any]:
        try:
            table = pq.read_table(self.path, columns=list(names))
            return [table.column(name).to_numpy() for name in names]
        except (pa.ArrowException, OSError) as error:
            raise self._foreign() from error

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, index and key of each row."""
        source, index, key = self._read("source", "index", "key")
        return source, index, key

    def rows(self, source: str, count: int, numbers: np.ndarray) -> np.ndarray:
        """The rows of some records of a source, [n] int64.

        Args:
            source: name of the source.
            count: number of all its records.
            numbers: [n], indices of the records, ascending.

        Raises:
            DataError: the file is of other records.
        """
        if source not in self.facts.sources:
            raise DataError(
                f"it has no records of the source {source!r}",
                where=str(self.path),
                hint=nearest(source, list(self.facts.sources)),
            )
        scored = self.facts.sources[source].records
        if scored != count:
            raise DataError(
                f"it is of a source of {scored:,} records, and {source!r} has {count:,}",
                where=str(self.path),
                hint=AGAIN,
            )
        sources, indices, _ = self._places
        own = np.flatnonzero(sources == source)
        order = own[np.argsort(indices[own], kind="stable")]
        found = np.searchsorted(indices[order], numbers)
        inside = found < len(order)
        if not (inside.all() and (indices[order][found] == numbers).all()):
            raise DataError(
                f"it does not have all training records of {source!r}",
                where=str(self.path),
                hint=AGAIN,
            )
        return order[found]

    def __len__(self) -> int:
        return len(self._places[0])

    def key(self, row: int) -> str | None:
        """The key of a row's record; None if no model could read it."""
        return self._places[2][row]

    def column(self, name: str) -> np.ndarray:
        """A column, [N]; numbers are float64, NaN where they are null.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.columns:
            raise DataError(
                f"it has no column {name!r}", where=str(self.path), hint=nearest(name, self.columns)
            )
        values: np.ndarray = self._read(name)[0]
        return values.astype(np.float64) if values.dtype.kind in "iuf" else values

    @property
    def clusters(self) -> Clusters:
        """The clusters of the records.

        Raises:
            DataError: there are none.
        """
        if self.facts.clusters is None or CLUSTER not in self.columns:
            raise DataError(
                "it has no clusters",
                where=str(self.path),
                hint="make them: mmkd data score RECIPE --out FILE --clusters K",
            )
        return self.facts.clusters

    def model(self, name: str) -> ScoredModel:
        """A model that has scored.

        Raises:
            DataError: there is no such model.
        """
        if name not in self.facts.models:
            raise DataError(
                f"it has no scores of a model {name!r}",
                where=str(self.path),
                hint=nearest(name, list(self.facts.models)),
            )
        return self.facts.models[name]
