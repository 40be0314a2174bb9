"""Stream a data set of the Hub in windows, without downloading all of it.

A window is a number of consecutive rows. Each window is downloaded once, cached as an Arrow table
and deleted two windows later. The first window is kept, because preflight, plan and check read it.
While a window is used, a separate process downloads the next one. `mmkd.data.mixture` reads the
windows in order.

`datasets` reads the rows, and its `IterableDataset.state_dict` is the start of the next window.
Batches do not come from the iterator itself: a run resumes at a step, with any number of processes
and workers, and an iterator's state belongs to one number of them. StatefulDataLoader of torchdata
0.11 refuses a state of another `num_workers`, and `datasets` gives each worker other files.
mosaicml streaming resumes with another number of processes, but only reads data sets in its own
format.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from mmkd.data.sources.arrow_index import keep
from mmkd.data.sources.tables import hub_name, not_loaded, undecoded
from mmkd.errors import DataError
from mmkd.recipe import HUB, SourceConfig
from mmkd.runtime import hub
from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.progress import track

BYTES = "__bytes__"
LOOKS = 512
"""After reads of this many rows of a window, the next one is downloaded. Checks before a run read
fewer rows."""


class WorkerError(DataError):
    """A data loader's worker would have read a stream. `datasets` would give it some shards
    only."""


class StreamedRows:
    """The first rows of a data set on the Hub, in its order.

    Attributes:
        window: number of rows per window.
        commit: of the data set; None if the Hub is unreachable.

    Raises:
        DataError: the first window cannot be read, or is empty.
    """

    def __init__(self, config: SourceConfig):
        assert config.stream is not None
        self.name = config.train
        self.folder: Path | None = None
        self.window = min(config.window, config.stream)
        name = hub_name(config)
        self.commit = None if Path(name).exists() else hub.data_commit(name, config.revision)
        self._source = {
            "name": name,
            "subset": config.subset,
            "split": config.split,
            "revision": config.revision,
        }
        self._tables: dict[int, Any] = {}
        self._asked_for: Counter[int] = Counter()  # number of reads, by window
        self._length = config.stream
        first = len(self._rows_of(0))
        known = read_state(self._source, self.window).get("examples")
        ends = first if first < self.window else known
        self._length = min(config.stream, ends or config.stream)

    def __len__(self) -> int:
        return self._length

    def place(self, index: int) -> str:
        return f"{self.name}: record {index}"

    def row(self, index: int) -> dict[str, Any]:
        number, place = divmod(index, self.window)
        rows = self._rows_of(number)
        self._asked_for[number] += 1
        if self._asked_for[number] == min(LOOKS, self.window // 2 + 1):
            self._read_ahead(number + 1)
        if place >= len(rows):
            whole = number * self.window + len(rows)
            raise DataError(
                f"the data set ends after {whole:,} records", hint=f"set stream to {whole}"
            )
        kept = rows[place]

        def restore(value: dict[str, Any]) -> Any:
            return kept["pictures"][value[BYTES]] if value.keys() == {BYTES} else value

        try:
            return json.loads(kept["text"], object_hook=restore)
        except (IndexError, TypeError) as error:  # a record of the data set has the key BYTES
            raise DataError(f"a record has the key {BYTES}", hint="drop it") from error

    def _rows_of(self, number: int) -> Any:
        if number not in self._tables:
            self._tables[number] = self._kept(number)
            for old in [n for n in self._tables if n > 0 and abs(n - number) > 1]:
                _forget(self._tables.pop(old))
                del self._asked_for[old]
        return self._tables[number]

    def _asked(self, number: int) -> tuple[dict[str, Any], int, int]:
        first = number * self.window
        return self._source, first, min(self.window, self._length - first)

    def _kept(self, number: int) -> Any:
        asked = self._asked(number)
        while get_worker_info() is not None:
            if not is_kept(*asked):
                done = subprocess.run(
                    _command(*asked), capture_output=True, text=True, start_new_session=True
                )
                if done.returncode:
                    reason = (done.stderr.splitlines() or ["its process was killed"])[-1]
                    raise DataError(f"cannot read on: {reason}", hint="run the same command again")
            try:
                return kept_window(*asked)
            except WorkerError:  # a process that is two windows ahead has deleted it
                continue
        return kept_window(*asked)

    def _read_ahead(self, number: int) -> None:
        """Start to download a window, unless there is none or another process on this machine has
        started."""
        if number * self.window >= self._length:
            return
        asked = self._asked(number)
        begun = state_file(*asked[:2]).with_suffix(".begun")
        if _is_dead(begun):
            begun.unlink(missing_ok=True)
        try:
            begun.parent.mkdir(parents=True, exist_ok=True)
            begun.touch(exist_ok=False)
        except OSError:
            return
        nothing = subprocess.DEVNULL
        reader = subprocess.Popen(
            _command(*asked), stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
        )
        begun.write_text(str(reader.pid))


def _is_dead(begun: Path) -> bool:
    """Whether the process that was downloading a window has ended. It ends with its run."""
    try:
        os.kill(int(begun.read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # no such file, another user's process, or not written yet
        return False
    return False


def kept_window(source: dict[str, Any], first: int, count: int) -> Any:
    """The table of a window. It is downloaded if it does not exist, once for all processes.

    Args:
        source: name, subset, split and revision of the data set.
        first: the window's first row.
        count: number of rows; fewer at the end of the data set.
    """
    from datasets import Features, Value

    features = Features({"text": Value("large_string"), "pictures": [Value("large_binary")]})
    found = keep(
        _read,
        features,
        HUB + source["name"],
        at_once=50,  # images
        **source,
        first=first,
        count=count,
    )
    state = state_file(source, first)
    # Several processes write the same content. To a reader, an incomplete file is a missing window.
    state.parent.mkdir(parents=True, exist_ok=True)
    state.with_suffix(f".{count}.table").write_text(found.cache_files[0]["filename"])
    state.with_suffix(".begun").unlink(missing_ok=True)
    return found


def is_kept(source: dict[str, Any], first: int, count: int) -> bool:
    """Whether the table of a window is on disk."""
    known = state_file(source, first).with_suffix(f".{count}.table")
    return known.is_file() and Path(known.read_text()).is_file()


def _forget(table: Any) -> None:
    """Delete a window's table. Processes that have opened it can still read it."""
    for folder in {Path(file["filename"]).parent for file in table.cache_files}:
        shutil.rmtree(folder, ignore_errors=True)


def read_state(source: dict[str, Any], first: int) -> dict[str, Any]:
    """The iterator's state at a row; empty if it is not known."""
    path = state_file(source, first)
    return read_json(path) if path.is_file() else {}


def state_file(source: dict[str, Any], first: int) -> Path:
    """File of the iterator's state at a row. With it, reading from a row skips all rows before
    it."""
    import datasets
    from datasets.fingerprint import Hasher

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mmkd-streams" / Hasher.hash(source)
    return folder / f"{first}.json"


def _read(
    name: str, subset: str | None, split: str, revision: str | None, first: int, count: int
) -> Iterator[dict[str, Any]]:
    """Rows as JSON text, with bytes in a second column, so that one table format fits all data
    sets."""
    import datasets

    if get_worker_info() is not None:
        raise WorkerError("a worker cannot read a stream")
    source = {"name": name, "subset": subset, "split": split, "revision": revision}
    if not Path(name).exists():
        hub.unreachable()  # checked once here: the libraries would retry for minutes
    try:
        rows = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        plain = None if rows.features is None else undecoded(rows.features)
        state = read_state(source, first)
        skipped = state.get("skipped", first)
        tables = rows.with_format("arrow").skip(skipped)
        if state:
            tables.load_state_dict(state["place"])
        title = f"reading {name}" + (f" from {first:,} on" if first else "")
        for _, table in zip(track(range(count), title, count), tables, strict=False):
            (row,) = table.to_pylist()
            row = row if plain is None else plain.decode_example(row)
            pictures: list[bytes] = []

            def put(value: Any, pictures: list[bytes] = pictures) -> Any:
                if not isinstance(value, bytes):
                    return str(value)
                pictures.append(value)
                return {BYTES: len(pictures) - 1}

            yield {"text": json.dumps(row, default=put), "pictures": pictures}
        known = (rows.info.splits or {}).get(split)
        state = {
            "skipped": skipped,
            "place": tables.state_dict(),
            "examples": None if known is None else known.num_examples,
        }
        write_json(state_file(source, first + count), state)
    except Exception as error:
        raise not_loaded(error, HUB + name) from error


def _command(*asked: Any) -> list[str]:
    run = (
        "import sys; from mmkd.runtime.interrupt import end_with; end_with(int(sys.argv[2]));"
        f"import {__name__} as streamed; streamed.main(sys.argv[1])"
    )
    return [sys.executable, "-P", "-c", run, json.dumps(asked), str(os.getpid())]


def main(said: str) -> None:
    """Download a window in a separate process. An error is the last line of its output."""
    try:
        kept_window(*json.loads(said))
    except DataError as error:
        sys.exit(str(error))
