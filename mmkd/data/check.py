"""Check all records of a data set for problems that would stop training."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field

from mmkd.data.bounds import check_scaled
from mmkd.data.fingerprints import Fingerprints, Wanted
from mmkd.data.images import image_size, load_image
from mmkd.data.records import Source
from mmkd.data.schema import Record, no_response, text_of
from mmkd.data.twins import image_hash
from mmkd.errors import DataError
from mmkd.recipe import SourceConfig
from mmkd.runtime.interrupt import begin_worker
from mmkd.runtime.progress import Bar

CHUNK = 256  # records per task of a process
PLACES = 3


@dataclass
class Problem:
    """A kind of problem, with the number of records that have it and the first of them.

    Attributes:
        places: file, record and message of the first records.
    """

    kind: str
    hint: str | None
    records: int = 0
    places: list[str] = field(default_factory=list)


@dataclass
class Findings:
    """Results of checking a source.

    Attributes:
        bad: number of records with at least one problem.
        fingerprints: of the records, if `Look.fingerprints` asks for them.
    """

    source: SourceConfig
    records: int
    pictures: int = 0
    bad: int = 0
    problems: dict[str, Problem] = field(default_factory=dict)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)


@dataclass(frozen=True)
class Look:
    """Checks in addition to those of training.

    Attributes:
        decode: decode images, not only their headers.
        unique_ids: find records of a source that have the same id.
        edges: lengths in pixels to which the processors of the models scale shorter edges.
        answers: a record without an answer is bad.
        fingerprints: also take fingerprints of the records, which decodes images; None for none.
    """

    decode: bool = False
    unique_ids: bool = False
    edges: tuple[int, ...] = ()
    answers: bool = True
    fingerprints: Wanted | None = None


@dataclass
class _Part:
    """A process's results for some records: number of images, ids and fingerprints if needed, and
    problems as the record's index, the error and its place."""

    pictures: int = 0
    ids: list[tuple[int, str]] = field(default_factory=list)
    errors: list[tuple[int, DataError]] = field(default_factory=list)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)


def check_source(config: SourceConfig, look: Look, workers: int) -> Findings:
    """Check the records of a source in several processes.

    Args:
        config: the source. Records that training leaves out are checked too.
        look: additional checks.
        workers: number of processes.

    Raises:
        DataError: the source cannot be read, or a process died.
    """
    source = Source(config, whole=True)
    found = Findings(config, len(source))
    chunks = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    workers = min(workers, len(chunks))
    seen: dict[str, int] = {}
    with (
        _parts(source, look, chunks, workers) as parts,
        Bar(config.label, len(source)) as bar,
    ):
        for chunk, part in zip(chunks, parts, strict=True):
            part.errors += _repeated(source, part, seen)
            _count(found, part)
            bar.advance(f"{found.bad:,} bad" if found.bad else "", len(chunk))
    return found


def _count(found: Findings, part: _Part) -> None:
    found.pictures += part.pictures
    found.fingerprints.add(part.fingerprints)
    found.bad += len({index for index, _ in part.errors})
    firsts: dict[tuple[int, str], DataError] = {}
    for index, error in part.errors:
        firsts.setdefault((index, error.kind), error)
    for (_, kind), error in firsts.items():
        problem = found.problems.setdefault(kind, Problem(kind, error.hint))
        problem.records += 1
        if len(problem.places) < PLACES:
            problem.places.append(f"{error.where}: {error.what}")


def _repeated(source: Source, part: _Part, seen: dict[str, int]) -> list[tuple[int, DataError]]:
    found = []
    for index, name in part.ids:
        if seen.setdefault(name, index) != index:
            what = f"record {seen[name]} has the same id"
            found.append((index, DataError(what, where=source.where(index), kind="id twice")))
    return found


@contextmanager
def _parts(
    source: Source, look: Look, chunks: list[range], workers: int
) -> Iterator[Iterator[_Part]]:
    if workers == 1:
        yield (_look(source, look, chunk) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_open, initargs=(os.getpid(), source, look))
    try:
        yield pool.map(_in_process, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that checked it died",
            where=source.config.train,
            hint="use fewer --workers if memory is short",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_OPENED: tuple[Source, Look]


def _open(parent: int, source: Source, look: Look) -> None:
    global _OPENED
    # Ctrl-C reaches all processes. One that dies with the queue's lock would block the others.
    begin_worker(parent)
    _OPENED = source, look


def _in_process(chunk: range) -> _Part:
    return _look(*_OPENED, chunk)


def _look(source: Source, look: Look, chunk: range) -> _Part:
    part = _Part()
    for index in chunk:
        try:
            record = source[index]
        except DataError as error:
            part.errors.append((index, error))
            continue
        if look.answers and not record.has_answer:
            part.errors.append((index, no_response().at(source.where(index))))
            continue
        part.pictures += len(record.images)
        if look.unique_ids and (name := source.id(index)):
            part.ids.append((index, name))
        hashes: list[int] = []
        errors = list(_problems(record, look, hashes))
        if look.fingerprints is not None:
            part.fingerprints.of_record(index, record, hashes, look.fingerprints)
        if errors:
            where = source.where(index)
            part.errors += [(index, error.at(where)) for error in errors]
    return part


def _problems(record: Record, look: Look, hashes: list[int]) -> Iterator[DataError]:
    """Yields the problems of a record. If needed, hashes of its images are appended to `hashes`."""
    for conversation in (record.messages, record.rejected or []):
        for message in conversation:
            if message["role"] == "assistant" and not text_of(message).strip():
                yield DataError("an answer is empty", hint="drop the turn or the record")
    for picture in record.images:
        try:
            if look.decode or look.fingerprints is not None:
                image = load_image(picture, record.root)
                size = image.size
            else:
                size = image_size(picture, record.root)
            for edge in look.edges:
                check_scaled(size, edge)
            if look.fingerprints is not None:
                hashes.append(image_hash(image))
        except DataError as error:
            yield error


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
