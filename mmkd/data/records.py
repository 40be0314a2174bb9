"""The records of a data set: all of its sources as one sequence."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, count
from math import gcd
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from mmkd.data.content import printable
from mmkd.data.images import image_size, load_image
from mmkd.data.left_out import left_out_rows
from mmkd.data.schema import Record, parse_record, record_id, unparsed
from mmkd.data.selection import Candidates, Selection, select
from mmkd.data.sources import MemorySource, StreamedRows, find_files, open_rows
from mmkd.data.sources.tables import is_saved
from mmkd.data.unread import without
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, SelectionConfig, SourceConfig
from mmkd.runtime.hashes import stamp

# Fraction of a sequence's length. Multiples of the golden ratio are far from all earlier ones.
STRIDE = 0.618
# Replacements are spread over the data. If so many are bad, nearly all records are.
MOST_TRIED = 1_000

T = TypeVar("T")


class Source:
    """The records of one source. Errors name the file and the record.

    Args:
        config: settings of the source.
        share: share of its records that is held out from training; None for none.
        held_out: contain the held-out records instead of the others.
        apart: number of records that are neither trained on nor in that share (`data.sampling`).
        measured: contain these instead.
        whole: contain all records for training, those of `leave_out` and those that `select` does
            not choose too.

    Attributes:
        unfiltered: number of its records before `leave_out` and `select`.
        left_out: number of training records that `leave_out` removes.
        selection: the choice that `select` has made among the others; None without it.
    """

    def __init__(
        self,
        config: SourceConfig,
        *,
        share: float | None = None,
        held_out: bool = False,
        apart: int = 0,
        measured: bool = False,
        whole: bool = False,
    ):
        self.config = config
        self._rows = open_rows(config)
        self._numbers: np.ndarray | None = None
        self.root = Path(config.images) if config.images else self._rows.folder
        self.selection: Selection | None = None
        if len(self) == 0:
            raise DataError("the data set is empty", where=config.train, hint="add records")
        if share is not None or apart:
            parts = self._split(share, apart)
            self._numbers = parts[0 if held_out else 1 if measured else 2]
        self.unfiltered, self.left_out = len(self), 0
        trained = not (held_out or measured or whole)
        if config.leave_out is not None and trained:
            self._leave_out(left_out_rows(config, self._rows))
        if config.select is not None and trained:
            self.selection = self._select(config.select, (share, apart))
            self._numbers = self.selection.numbers

    def _leave_out(self, numbers: np.ndarray) -> None:
        """Remove rows, [n] int64, from the source."""
        kept = np.setdiff1d(self.rows, numbers)
        self.left_out = len(self) - len(kept)
        if not len(kept):
            raise DataError(
                f"all of its records are left out by {self.config.leave_out}",
                where=self.config.train,
                hint="drop the source",
            )
        self._numbers = kept

    @property
    def rows(self) -> np.ndarray:
        """Index of each record's row in the files, [records] int64, ascending."""
        return np.arange(len(self._rows)) if self._numbers is None else self._numbers

    def _split(self, share: float | None, apart: int) -> list[np.ndarray]:
        """Indices of the rows of the share, of those that are kept apart, and of all others, each
        [n] int64, ascending."""
        count = len(self._rows)
        if share is not None and count == 1:
            raise DataError(
                "its only record cannot be held out",
                where=self.config.train,
                hint="give data.validation a file",
            )
        first = 0 if share is None else min(max(1, round(share * count)), count - 1)
        if first + apart >= count:
            raise DataError(
                f"it has {count:,} records, of which {first + apart:,} would not be trained on",
                where=self.config.train,
                hint="lower data.sampling.held_out, or give the source more records",
            )
        return [np.sort(part) for part in np.split(_shuffled(count), [first, first + apart])]

    def _select(self, config: SelectionConfig, split: tuple[float | None, int]) -> Selection:
        """The records that are trained on, of those that are not held out."""
        key = _selection_key(self.config, split)
        if key is None or key not in _selections:
            place = self._rows.place
            candidates = Candidates(self.config.label, self._rows, self.rows, self._record, place)
            found = select(config, candidates)
            if key is None:
                return found
            _selections[key] = found
        return _selections[key]

    def row_number(self, index: int) -> int:
        """Index of a record's row in the source."""
        return index if self._numbers is None else int(self._numbers[index])

    def __len__(self) -> int:
        return len(self._rows) if self._numbers is None else len(self._numbers)

    @property
    def size(self) -> int:
        """Number of all records of the source, held-out and unselected ones included."""
        return len(self._rows)

    @property
    def window(self) -> int | None:
        """Number of records in a window of a stream; None for other sources."""
        return self._rows.window if isinstance(self._rows, StreamedRows) else None

    @property
    def commit(self) -> str | None:
        """Commit of a data set on the Hub; None for other sources, or if the Hub is unreachable."""
        return getattr(self._rows, "commit", None)

    def id(self, index: int) -> str:
        """Id of a record; "" if it has none, or cannot be read."""
        try:
            return record_id(self._row(self.row_number(index)))
        except DataError:
            return ""

    def where(self, index: int) -> str:
        """Place of a record for messages: the file, the record's index and its id."""
        name = printable(self.id(index))
        return self._rows.place(self.row_number(index)) + (f" (id {name})" if name else "")

    def _row(self, number: int, ignore: Sequence[str] = ()) -> dict[str, Any]:
        try:
            return without(self._rows.row(number), ignore)
        except (DataError, OSError, MemoryError):
            raise
        except Exception as error:  # unexpected values
            raise unparsed(error) from error

    def __getitem__(self, index: int) -> Record:
        with located(lambda: self.where(index)):
            return self._record(self.row_number(index))

    def _record(self, number: int) -> Record:
        return parse_record(self._row(number, self.config.ignore), number, self.root)


_selections: dict[tuple[Any, ...], Selection] = {}


def _selection_key(config: SourceConfig, split: tuple[float | None, int]) -> tuple[Any, ...] | None:
    """Everything that determines the selection from files; None for other sources. Preflight, run
    and provenance all open a source, and a selection may read all of its records."""
    if isinstance(config, MemorySource) or is_saved(Path(config.train)):
        return None
    named = (getattr(config.select, "scores", None), config.leave_out)
    try:
        files = [*find_files(config.train), *(Path(file) for file in named if file is not None)]
        stamps = [stamp(file) for file in files]
    except (DataError, OSError):
        return None
    return (config.model_dump_json(), split, *stamps)


def _shuffled(count: int) -> np.ndarray:
    """The integers below `count` in a fixed pseudo-random order, [count] int64. The integers below
    a smaller count have the same order among each other, so appending records changes little."""
    with np.errstate(over="ignore"):  # SplitMix64
        key = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(key ^ (key >> np.uint64(31)), kind="stable")


class Records:
    """The records of all sources, one source after the other.

    Args:
        config: settings of the data.
        held_out: contain the records of `data.validation` instead of those for training.
        measured: contain the records on which `data.sampling` measures the sources instead.
    """

    def __init__(self, config: DataConfig, *, held_out: bool = False, measured: bool = False):
        share = config.held_out_share
        parts = config.validation_parts if held_out else config.parts
        own = not held_out or share is not None  # the training sources, not other ones
        apart = config.records_apart if own else 0
        kind = {"held_out": held_out, "measured": measured}
        try:
            self.sources = [Source(part, share=share, apart=apart, **kind) for part in parts]
        except DataError as error:
            if not held_out or share is not None:
                raise
            hint = (error.hint or "").replace("data.train", "data.validation")
            raise DataError(error.what, where=error.where, hint=hint) from error
        self._ends = list(accumulate(map(len, self.sources)))

    @property
    def name(self) -> str:
        """Name of the whole data set in messages."""
        return ", ".join(s.config.train for s in self.sources)

    @property
    def starts(self) -> list[int]:
        """Index of the first record of each source."""
        return [0, *self._ends[:-1]]

    def __len__(self) -> int:
        """Number of records of all sources. An epoch may have fewer or more (`Mixture`)."""
        return self._ends[-1]

    def source_of(self, index: int) -> int:
        """Index of a record's source."""
        return bisect_right(self._ends, index)

    def _at(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.source_of(index)
        return self.sources[number], index - self.starts[number]

    def where(self, index: int) -> str:
        """Place of a record for messages: the file, the record's index and its id."""
        source, own = self._at(index)
        return source.where(own)

    def __getitem__(self, index: int) -> Record:
        source, own = self._at(index)
        return source[own]

    def tried(self, index: int) -> Iterator[int]:
        """Yields a record, then its replacements if it is bad. Replacements are far away, since
        neighbours are often bad for the same reason, but in the same window of a stream."""
        first, size = self._span(index)
        stride = coprime(size)
        for attempt in range(min(size, MOST_TRIED)):
            yield first + (index - first + attempt * stride) % size

    def _span(self, index: int) -> tuple[int, int]:
        """The first record of the range of possible replacements of a record, and its size."""
        source, own = self._at(index)
        if source.window is None:
            return 0, len(self)
        begin = own - own % source.window
        return index - own + begin, min(source.window, len(source) - begin)

    def usable(self, index: int, read: Callable[[int], T], skipped: list[str]) -> T:
        """Read a record, or its first replacement that is not bad.

        Args:
            index: of the record.
            read: reads a record; raises DataError if it is bad.
            skipped: error messages are appended to it.

        Raises:
            DataError: all replacements are bad.
        """
        reason = ""
        for number in self.tried(index):
            try:
                return read(number)
            except DataError as error:
                skipped.append(str(error))
                reason = error.what
        every = len(self) <= MOST_TRIED
        raise DataError(
            f"{'every record is' if every else f'{MOST_TRIED:,} records in a row are'} bad, "
            f"the last one: {reason}",
            where=self.name,
            hint="see why with `mmkd data check`",
        )

    def sizes(self, record: Record) -> list[tuple[int, int]]:
        """Width and height of a record's images."""
        return [image_size(ref, record.root) for ref in record.images]

    def pictures(
        self, record: Record, load: Callable[[Any, Path | None], Image.Image] = load_image
    ) -> list[Image.Image]:
        """A record's images, decoded to RGB, or the results of `load` for reference and root."""
        return [load(ref, record.root) for ref in record.images]


class GivenRecords(Records):
    """Replaces the records of a data set for an encoder that is given single records.

    Args:
        name: of the data in messages.
    """

    def __init__(self, name: str):
        self.sources, self._ends, self._name = [], [0], name

    @property
    def name(self) -> str:
        return self._name

    def where(self, index: int) -> str:
        return self._name


@cache
def coprime(size: int) -> int:
    """A stride that is coprime to `size`, so that its multiples reach every record."""
    near = count(int(STRIDE * size))
    return next(n for n in near if gcd(n, size) == 1)


@contextmanager
def located(where: Callable[[], str]) -> Iterator[None]:
    """Context manager that adds the place to a data error without one."""
    try:
        yield
    except DataError as error:
        if error.where is not None:
            raise
        raise error.at(where()) from error
