"""Passes of models over all records, for `mmkd data score`: shares of processes and journals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmkd.commands.scored_models import ScoredModel
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.journal import Journal
from mmkd.data.vocabulary import check_head
from mmkd.data.workers import work_ahead
from mmkd.errors import AGAIN, DataError, StoppedError
from mmkd.runtime import distributed
from mmkd.runtime.formats import parse_json
from mmkd.runtime.interrupt import asked, deferred
from mmkd.runtime.json_lines import complete_lines
from mmkd.runtime.progress import Bar, say
from mmkd.teachers import LiveTeacher

Row = list[Any]
"""Index, id and key in hexadecimal of a record, None for the key of a bad one, and what a pass has
found."""


@dataclass(frozen=True)
class Block:
    """Encoded records.

    Attributes:
        rows: index, id and key of each record, without a key for a bad one.
        batch: of the good records, in their order; None if all are bad.
    """

    rows: list[Row]
    batch: Batch | None


class Scores:
    """The journal of one model and process.

    Args:
        folder: of the journals.
        name: of the model.
        request: settings that the scores depend on.

    Attributes:
        done: indices of the records that any process has scored.
    """

    def __init__(self, folder: Path, name: str, request: dict[str, Any]):
        rank, size = distributed.rank(), distributed.world_size()
        numbers = [int(path.stem.rpartition("-")[2]) for path in journals(folder, name)]
        own = {number for number in numbers if number % size == rank} | {rank}
        distributed.barrier()  # all processes have listed the files before one is added
        read = {n: Journal(folder / f"{name}-{n}.jsonl", request) for n in sorted(own)}
        self._journal = read[rank]
        found = [row[0] for j in read.values() for entry in j.entries for row in entry["rows"]]
        self.done = set(distributed.gather(found))

    def add(self, rows: list[Row]) -> None:
        """Write the rows of a block to the disk."""
        self._journal.add({"rows": rows})


def journals(folder: Path, name: str) -> list[Path]:
    """The journals of a model, of all processes."""
    found = folder.glob(f"{name}-*.jsonl")
    return sorted(p for p in found if p.stem.removeprefix(f"{name}-").isdigit())


def journal_rows(folder: Path, name: str) -> Iterator[Row]:
    """Iterate over what all processes have written."""
    for path in journals(folder, name):
        for entry in map(parse_json, complete_lines(path)[1:]):
            yield from entry["rows"]


def run_pass(
    model: ScoredModel,
    encoder: Encoder,
    journal: Scores,
    batch_size: int,
    device: torch.device,
    rows_of: Callable[[Block, Encoder, LiveTeacher], list[Row]],
    title: str,
) -> None:
    """Run a model over this process's share of the records that the journal does not have.

    Args:
        model: the model.
        encoder: of the records.
        journal: of the pass.
        batch_size: records per forward pass.
        device: where the model runs.
        rows_of: the rows of a block with what is found.
        title: what messages call the pass.

    Raises:
        DataError: a record is bad, and the recipe does not skip such records.
        StoppedError: the command was asked to stop.
    """
    count = len(encoder.records)
    blocks = [range(n, min(n + batch_size, count)) for n in range(0, count, batch_size)]
    left = [block for block in blocks if not journal.done.issuperset(block)]
    if not left:
        if distributed.rank() == 0:
            say(f"{title}: all {count:,} records are scored already")
        return
    if not journal.done:  # a bad first record is refused before the weights are loaded
        encode(encoder, [0])
    running = model.load(device)
    check_head(running.model, encoder.processor.tokenizer, model.name)
    if running.spread and distributed.world_size() > 1:
        encoder = Encoder(encoder.records, encoder.processor, encoder.config, filler=True)
    # As many on each process, because a stop is agreed on after each of them.
    shares = [list(share[0]) if share else [] for share in distributed.equal_shares(left, 1)]
    work = partial(encode, encoder)
    encoded = work_ahead(work, iter(shares), encoder.config.workers)
    bad = 0
    with deferred(), Bar(title, len(shares), quiet=distributed.rank() > 0) as bar:
        for number, block in enumerate(encoded, 1):
            if isinstance(block, Exception):
                raise block
            rows = rows_of(block, encoder, running)
            if rows:
                journal.add(rows)
            bad += sum(row[2] is None for row in rows)
            bar.advance()
            if asked(device):
                raise StoppedError(
                    f"{title} stopped at block {number} of {len(shares)}", hint=AGAIN
                )
    bad = sum(distributed.gather([bad]))
    if bad and distributed.rank() == 0:
        say(f"{title}: {bad} bad records have no scores")


def encode(encoder: Encoder, indices: list[int]) -> Block:
    """Encode records.

    Args:
        encoder: of the records.
        indices: of the records.

    Raises:
        DataError: a record is bad, and the recipe does not skip such records.
    """
    if encoder.config.on_bad_record == "stop":
        samples = [encoder.load(index) for index in indices]
        rows = [[s.index, s.record.id, s.key.hex()] for s in samples]
        return Block(rows, encoder.batch(samples) if samples else None)
    samples, rows = [], []
    for index in indices:
        source, own = encoder.records.source_of(index), index
        try:
            sample = encoder.load(index)
            encoder.batch([sample])  # the processor may refuse it
        except DataError:
            own -= encoder.records.starts[source]
            rows.append([index, encoder.records.sources[source].id(own), None])
            continue
        samples.append(sample)
        rows.append([index, sample.record.id, sample.key.hex()])
    return Block(rows, encoder.batch(samples) if samples else None)


def batch_of(block: Block, encoder: Encoder, model: LiveTeacher) -> Batch | None:
    """The batch of a block; None if there is nothing to run. A sharded model runs in any case,
    because all processes must run it."""
    if block.batch is not None or not model.spread:
        return block.batch
    return encoder.records.usable(0, lambda index: encoder.batch([encoder.load(index)]), [])
