"""`mmkd data score`: a row of numbers for each training record, from one or several models.

Each model predicts the answers of the records, given their true beginning. The records are divided
among the processes. Scores are written to journals first, so that a second call continues:

    OUT.parts/MODEL-RANK.jsonl      blocks of records that a process has scored

When all models have scored, the first process writes OUT and deletes the journals.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from mmkd.commands.scored_models import ScoredModel, request_of, scored_models, tokenizer_hash
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.journal import Journal
from mmkd.data.records import Records, Source
from mmkd.data.score_file import COUNTS, MEANS, ScoreFile, write_scores
from mmkd.data.vocabulary import check_head, token_count
from mmkd.data.workers import work_ahead
from mmkd.errors import AGAIN, CheckpointError, DataError, RecipeError, StoppedError, nearest
from mmkd.evaluation.calibration import inputs_as
from mmkd.making.used import check_made
from mmkd.ops.token_scores import token_scores
from mmkd.recipe import DataConfig, Recipe
from mmkd.runs.provenance import source_facts
from mmkd.runtime import distributed
from mmkd.runtime.formats import parse_json
from mmkd.runtime.interrupt import asked, deferred
from mmkd.runtime.json_lines import complete_lines
from mmkd.runtime.progress import Bar, console, say
from mmkd.teachers import LiveTeacher

NUMBERS = (*COUNTS, *MEANS)
READ = {"images", "prompt", "ignore"}
"""Keys of a source that decide how its records are read."""
Row = list[Any]
"""Index, id, key in hexadecimal, and NUMBERS of a record; id and None for a bad record."""


@dataclass(frozen=True)
class Block:
    """Encoded records.

    Attributes:
        rows: index, id and key of each record, without a key for a bad one.
        batch: of the good records, in their order; None if all are bad.
    """

    rows: list[Row]
    batch: Batch | None


def score_data(
    recipe: Recipe,
    out: Path,
    *,
    models: Sequence[str] = (),
    stage: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Score the training records of a recipe, held-out records excluded. Every process must call
    it.

    A second call continues where the first one stopped. Scores do not depend on the batch size and
    the number of processes, up to rounding.

    Args:
        recipe: with the data and models.
        out: Parquet file to write, described in `mmkd.data.score_file`.
        models: names of teachers, `student`, or NAME=FOLDER; by default all teachers and the
            student before its first stage.
        stage: name of a stage with data of its own; None takes the recipe's data.
        batch_size: records per forward pass.
        device: where the models run.

    Returns:
        A summary for `print_scores`.

    Raises:
        RecipeError: there is no such model or stage, or the data are a stream.
        CheckpointError: `out` exists, or a model cannot be loaded.
        DataError: a record is bad, or a loss is not finite.
    """
    chosen, data = scored_models(recipe, models), _data_of(recipe, stage)
    check_made(recipe, [data])
    place = distributed.choose_device(device)
    distributed.connect(place, timeout_s=max(s.engine.timeout_s for s in recipe.stages))
    folder = out.with_name(f"{out.name}.parts")
    _check_out(out)
    with distributed.alone_in(folder):
        records = Records(data)
        shared = {
            "data": {part.label: source_facts(part) for part in data.parts},
            "sources": [part.model_dump(mode="json", include=READ) for part in data.parts],
            "records": [_rows_hash(source) for source in records.sources],
            "max_length": data.max_length,
            "on_bad_record": data.on_bad_record,
        }
        facts = {}
        for model in chosen:
            processor = model.processor()
            request = {**shared, **request_of(model, processor)}
            encoder = Encoder(records, processor, data)
            journal = Scores(folder, model.name, request)
            _score(model, encoder, journal, batch_size, place)
            facts[model.name] = {
                "model": model.source,
                "weights": model.request["weights"],
                "tokenizer": tokenizer_hash(processor),
            }
        distributed.barrier()
        if distributed.rank() == 0:
            _write(out, folder, records, facts)
            shutil.rmtree(folder)
        distributed.barrier()
    return summary(out)


def _data_of(recipe: Recipe, stage: str | None) -> DataConfig:
    """The data that are scored: all records, whatever the recipe selects."""
    data = recipe.data
    if stage is not None:
        names = [s.name for s in recipe.stages]
        if stage not in names:
            raise RecipeError(f"no stage {stage!r}", where="--stage", hint=nearest(stage, names))
        data = recipe.stage_data(recipe.stages[names.index(stage)])
    if any(part.stream is not None for part in data.parts):
        raise RecipeError(
            "a stream has no fixed records to score",
            where="data.sources",
            hint="leave 'stream' out, or download the data set",
        )
    return data.without_selection()


def _rows_hash(source: Source) -> str:
    """A hash of the numbers of a source's rows that are scored."""
    return hashlib.sha256(source.rows.astype("<i8").tobytes()).hexdigest()


def _check_out(out: Path) -> None:
    """
    Raises:
        CheckpointError: the file exists, or is not a Parquet file.
    """
    if out.suffix != ".parquet":
        raise CheckpointError(
            "scores are written as Parquet", where=str(out), hint="name a file that ends in "
            ".parquet"
        )  # fmt: skip
    if out.exists():
        raise CheckpointError(
            "it is there already", where=str(out), hint="name a new file, or delete this one"
        )


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


def _score(
    model: ScoredModel, encoder: Encoder, journal: Scores, batch_size: int, device: torch.device
) -> None:
    """Score this process's share of the records that are not scored yet."""
    count = len(encoder.records)
    blocks = [range(n, min(n + batch_size, count)) for n in range(0, count, batch_size)]
    left = [block for block in blocks if not journal.done.issuperset(block)]
    if not left:
        if distributed.rank() == 0:
            say(f"{model.name}: all {count:,} records are scored already")
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
    vocabulary, bad = token_count(encoder.processor.tokenizer), 0
    with deferred(), Bar(model.name, len(shares), quiet=distributed.rank() > 0) as bar:
        for number, block in enumerate(encoded, 1):
            if isinstance(block, Exception):
                raise block
            rows = _scored(block, encoder, running, vocabulary)
            if rows:
                journal.add(rows)
            bad += sum(row[2] is None for row in rows)
            bar.advance()
            if asked(device):
                raise StoppedError(
                    f"{model.name} stopped at block {number} of {len(shares)}", hint=AGAIN
                )
    bad = sum(distributed.gather([bad]))
    if bad and distributed.rank() == 0:
        say(f"{model.name}: {bad} bad records have no scores")


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


def _scored(block: Block, encoder: Encoder, model: LiveTeacher, vocabulary: int) -> list[Row]:
    """The rows of a block with their numbers. A sharded model runs in any case, because all
    processes must run it."""
    batch = block.batch
    if batch is None:
        if not model.spread:
            return [[*row, *[None] * len(NUMBERS)] for row in block.rows]
        batch = encoder.records.usable(0, lambda index: encoder.batch([encoder.load(index)]), [])
    numbers = score_batch(model, batch.to(model.device), encoder.processor.tokenizer, vocabulary)
    good = iter(numbers if block.batch is not None else [])
    return [
        [*row, *(next(good) if row[2] is not None else [None] * len(NUMBERS))] for row in block.rows
    ]


@torch.no_grad()
def score_batch(
    model: LiveTeacher, batch: Batch, tokenizer: Any, vocabulary: int
) -> Iterator[list[float]]:
    """Yields NUMBERS of each record of a batch.

    Args:
        model: on its device.
        batch: of B records, on the same device.
        tokenizer: of the model.
        vocabulary: number of the tokenizer's tokens.

    Raises:
        DataError: a number is not finite.
    """
    targets = batch.targets
    inputs = inputs_as(batch, model.model.dtype)
    signals = model.signals(replace(batch, inputs=inputs)).truncate(len(targets.input_ids))
    rows = targets.predicts("response")  # [B, T]
    found = token_scores(
        signals.hidden[rows],
        signals.head_weight,
        targets.next_ids()[rows],
        bias=signals.head_bias,
        vocab_size=vocabulary,
    )
    counts = rows.sum(1).tolist()
    parts: list[tuple[Tensor, ...]] = [getattr(found, name).split(counts) for name in MEANS]
    for number, count in enumerate(counts):
        means = [float(part[number].mean()) for part in parts]
        if count and not all(map(math.isfinite, means)):
            raise DataError(
                "a loss or a probability of its answer is not finite",
                where=f"record {batch.ids[number]}",
                hint="check the weights of the model, and its dtype",
            )
        answer = targets.input_ids[number][targets.response[number]]
        text = tokenizer.decode(answer.tolist(), skip_special_tokens=True)
        yield [count, len(text), *(means if count else [None] * len(means))]


def read_scores(
    folder: Path, name: str, count: int
) -> tuple[list[tuple[str, str | None]], dict[str, np.ndarray]]:
    """Ids and keys, and numbers [count], of all records from the journals of a model."""
    records: list[tuple[str, str | None]] = [("", None)] * count
    numbers = {key: np.full(count, np.nan) for key in NUMBERS}
    for path in journals(folder, name):
        entries = map(parse_json, complete_lines(path)[1:])
        for index, id, key, *values in (row for entry in entries for row in entry["rows"]):
            records[index] = (id, key)
            for column, value in zip(NUMBERS, values, strict=True):
                numbers[column][index] = np.nan if value is None else value
    return records, numbers


def _write(out: Path, folder: Path, records: Records, facts: dict[str, dict[str, Any]]) -> None:
    """Write the file of scores from the journals."""
    count, scores = len(records), {}
    known: list[tuple[str, str | None]] = [("", None)] * count
    for name in facts:
        read, scores[name] = read_scores(folder, name, count)
        known = [a if a[1] is not None else b for a, b in zip(known, read, strict=True)]
    starts, sources = records.starts, records.sources
    rows = []
    for index, (id, key) in enumerate(known):
        number = records.source_of(index)
        source = sources[number]
        row = source.row_number(index - starts[number])
        rows.append((id, source.config.label, row, key))
    sizes = {s.config.label: {"records": s.size} for s in sources}
    write_scores(out, rows, scores, {"sources": sizes, "models": facts})


def summary(out: Path) -> dict[str, Any]:
    """Means over the records of a file of scores, by model."""
    file = ScoreFile(out)
    found: dict[str, Any] = {}
    for name, facts in file.facts.models.items():
        numbers = {key: file.column(f"{name}.{key}") for key in NUMBERS}
        scored = numbers["tokens"] > 0  # False for NaN
        known = {key: values[scored] for key, values in numbers.items()}
        characters = known["characters"].sum()
        found[name] = {
            "model": facts.model,
            "records": int(scored.sum()),
            "tokens": int(known["tokens"].sum()),
            **{key: float(known[key].mean()) if scored.any() else None for key in MEANS},
            "nll_per_character": float((known["nll"] * known["tokens"]).sum() / characters)
            if characters
            else None,
        }
    return {"file": str(out), "records": len(file), "models": found}


def print_scores(found: dict[str, Any]) -> None:
    """Print what `score_data` has found."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("model", "records", "tokens", "nll", "margin", "entropy", "nll a character"):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for name, facts in found["models"].items():
        means = [facts[key] for key in (*MEANS, "nll_per_character")]
        shown = ["" if mean is None else f"{mean:.4f}" for mean in means]
        table.add_row(name, f"{facts['records']:,}", f"{facts['tokens']:,}", *shown)
    console.print(table)
    say(f"wrote {found['file']}: {found['records']:,} records")
