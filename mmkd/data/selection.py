"""Choose the records of a source that are trained on (`data.sources[].select`).

The choice is a function of the source's records, the file of scores, the settings and their seed.
So it is the same on all processes, after a resume, and for any batch size. It is made after
held-out records were split off, and never for validation.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmkd.data.images import load_image
from mmkd.data.samples import key_of
from mmkd.data.schema import Record
from mmkd.data.score_file import AGAIN, CLUSTER, ScoreFile
from mmkd.data.selection_rules import (
    NothingToChooseByError,
    balanced,
    between,
    binned,
    count_of,
    is_number,
    largest,
    robust,
)
from mmkd.errors import DataError
from mmkd.recipe import (
    BalanceSelection,
    ClusterSelection,
    DifferenceSelection,
    DifficultySelection,
    RobustSelection,
    SelectionConfig,
)

COMPARED = 32
"""Number of records whose keys are compared with those of the scores."""
MOST_GROUPS = 1000


class SelectedRows(Protocol):
    """The rows that a choice reads."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Candidates:
    """The records of a source from which some are chosen.

    Attributes:
        name: of the source.
        rows: all rows of the source.
        numbers: [n] int64, indices of the candidates, ascending.
        record: parses the record of a row.
        where: place of a row, for messages.
    """

    name: str
    rows: SelectedRows
    numbers: np.ndarray
    record: Callable[[int], Record]
    where: Callable[[int], str]


@dataclass(frozen=True)
class Selection:
    """Chosen records of a source.

    Attributes:
        numbers: indices of their rows, ascending; a row that is repeated occurs several times.
        records: number of candidates.
        unread: number of candidates without the number that decides.
        how: kind of the selection.
    """

    numbers: np.ndarray = field(repr=False)
    records: int
    unread: int
    how: str

    def __str__(self) -> str:
        said = f"keeps {len(np.unique(self.numbers)):,} of {self.records:,} records"
        if len(self.numbers) > len(np.unique(self.numbers)):
            said += f", {len(self.numbers):,} with repeats"
        if self.unread:
            said += f"; {self.unread:,} have no number to choose by"
        return f"{said} (select: {self.how})"

    def facts(self) -> dict[str, Any]:
        """What was chosen, as JSON."""
        numbers = self.numbers.astype("<i8")
        return {
            "kind": self.how,
            "records": self.records,
            "kept": len(np.unique(numbers)),
            "length": len(numbers),
            "sha256_of_indices": hashlib.sha256(numbers.tobytes()).hexdigest(),
        }


def select(config: SelectionConfig, candidates: Candidates) -> Selection:
    """Choose records.

    Raises:
        DataError: the file of scores is not of these records, or there is nothing to choose by.
    """
    try:
        places, unread = _choose(config, candidates)
    except NothingToChooseByError as error:
        scores = getattr(config, "scores", None)
        raise DataError(
            f"there is nothing to choose the records of {candidates.name!r} by: {error}",
            where=scores or candidates.name,
            hint="name other models or another field, or leave 'select' out",
        ) from error
    if len(places) == 0:
        raise DataError(
            "its selection keeps no record",
            where=candidates.name,
            hint="change the bounds of 'select'",
        )
    numbers = candidates.numbers[places]
    return Selection(numbers, len(candidates.numbers), unread, config.kind)


@singledispatch
def _choose(config: Any, candidates: Candidates) -> tuple[np.ndarray, int]:
    """Places in `candidates.numbers`, and the number of candidates without a number."""
    raise TypeError(f"no selection for {type(config).__name__}")


@_choose.register
def _(config: DifferenceSelection, candidates: Candidates) -> tuple[np.ndarray, int]:
    file, rows = _scores(config.scores, candidates)
    names = config.small, config.large
    tokenizers = {file.model(name).tokenizer for name in names}
    losses = [file.column(f"{name}.nll")[rows] for name in names]
    if len(tokenizers) > 1:  # losses per token of different tokenizers cannot be compared
        losses = [
            loss * file.column(f"{n}.tokens")[rows] / _characters(file, n)[rows]
            for n, loss in zip(names, losses, strict=True)
        ]
    difference = losses[0] - losses[1]
    if config.keep == 1:
        return np.arange(len(rows)), 0
    count = count_of(config.keep, len(rows))
    return largest(difference, count), int(np.isnan(difference).sum())


@_choose.register
def _(config: RobustSelection, candidates: Candidates) -> tuple[np.ndarray, int]:
    file, rows = _scores(config.scores, candidates)
    file.model(config.model)
    gains = 1 - file.column(f"{config.model}.margin")[rows]
    budget = config.budget or count_of(config.keep or 1.0, len(rows))
    if budget >= len(rows):
        return np.arange(len(rows)), 0
    return robust(gains, budget, config.wrong, config.seed), int(np.isnan(gains).sum())


@_choose.register
def _(config: BalanceSelection, candidates: Candidates) -> tuple[np.ndarray, int]:
    values = [_hashable(value) for value in _values(config, candidates)]
    if config.bins is None:
        groups = values
        known = {group for group in groups if group is not None}
        if len(known) > MOST_GROUPS:
            raise DataError(
                f"{config.field!r} has {len(known):,} different values",
                where=candidates.name,
                hint=f"give 'bins', such as 10; without it, at most {MOST_GROUPS:,} values are "
                "balanced",
            )
    elif any(map(is_number, values)):
        groups = binned(values, config.bins)
    else:
        groups = [None] * len(values)
    if all(group is None for group in groups):
        raise _no_field(config, candidates)
    return balanced(groups, config.to, config.seed), sum(group is None for group in groups)


@_choose.register
def _(config: DifficultySelection, candidates: Candidates) -> tuple[np.ndarray, int]:
    values = [v if is_number(v) else np.nan for v in _values(config, candidates)]
    numbers = np.array(values, np.float64)
    unread = int(np.isnan(numbers).sum())
    if unread == len(numbers):
        raise _no_field(config, candidates)
    return between(numbers, config.least, config.most), unread


@_choose.register
def _(config: ClusterSelection, candidates: Candidates) -> tuple[np.ndarray, int]:
    file, rows = _scores(config.scores, candidates)
    found = file.clusters
    for part in config.parts:
        if part >= len(found.sizes):
            raise DataError(
                f"it has no cluster {part:,}",
                where=config.scores,
                hint=f"its clusters are 0 to {len(found.sizes) - 1:,}",
            )
    labels = file.column(CLUSTER)[rows]
    return np.flatnonzero(np.isin(labels, config.parts)), int(np.isnan(labels).sum())


def _no_field(config: BalanceSelection | DifficultySelection, candidates: Candidates) -> DataError:
    kind = "number" if config.kind == "difficulty" or config.bins else "value"
    return DataError(
        f"no record has a {kind} in {config.field!r}",
        where=config.scores or candidates.name,
        hint="check 'field'; keys inside of mappings are written with dots, such as made.pass_rate",
    )


def _characters(file: ScoreFile, model: str) -> np.ndarray:
    """Characters of the answers; NaN for answers without any."""
    found = file.column(f"{model}.characters")
    return np.where(found > 0, found, np.nan)


def _scores(path: str, candidates: Candidates) -> tuple[ScoreFile, np.ndarray]:
    """A file of scores, and its rows for the candidates.

    Raises:
        DataError: it is of other records.
    """
    file = ScoreFile(Path(path))
    rows = file.rows(candidates.name, len(candidates.rows), candidates.numbers)
    count = min(COMPARED, len(rows))
    for place in (i * len(rows) // count for i in range(count)):
        number = int(candidates.numbers[place])
        scored, own = file.key(int(rows[place])), _key(candidates, number)
        if scored is not None and own is not None and scored != own:
            raise DataError(
                f"it is of another record than {candidates.where(number)}",
                where=path,
                hint=AGAIN,
            )
    return file, rows


def _key(candidates: Candidates, number: int) -> str | None:
    """The key of a record; None if it is bad."""
    try:
        record = candidates.record(number)
        return key_of(record, [load_image(ref, record.root) for ref in record.images]).hex()
    except DataError:
        return None


def _values(
    config: BalanceSelection | DifficultySelection, candidates: Candidates
) -> Iterator[Any]:
    """The field of each candidate: a column of the scores, or a value in the record."""
    if config.scores is not None:
        file, rows = _scores(config.scores, candidates)
        yield from file.column(config.field)[rows].tolist()
        return
    path = config.field.split(".")
    read = _reader(candidates.rows, path[0])
    for number in candidates.numbers.tolist():
        try:
            value = read(number)
        except DataError:  # a row that cannot be read
            value = None
        for key in path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        yield value


def _reader(rows: Any, name: str) -> Callable[[int], Any]:
    """A function that reads one key of a row. Of tables, only its column is read."""
    column = getattr(rows, "column", None)
    return (lambda number: rows.row(number).get(name)) if column is None else column(name)


def _hashable(value: Any) -> Any:
    """A value as a group; None for a value that is none, such as a list."""
    if isinstance(value, bool | str):
        return f"{type(value).__name__} {value}"  # True is not 1
    return value if is_number(value) else None
