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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from mmkd.commands.cluster_records import (
    Grouped,
    cluster_records,
    image_features,
    print_clusters,
)
from mmkd.commands.cluster_sheet import check_sheet, write_cluster_sheet
from mmkd.commands.score_passes import Block, Row, Scores, batch_of, journal_rows, run_pass
from mmkd.commands.scored_models import request_of, scored_models, tokenizer_hash
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records, Source
from mmkd.data.score_file import COUNTS, MEANS, ScoreFile, write_scores
from mmkd.data.vocabulary import token_count
from mmkd.errors import CheckpointError, DataError, RecipeError, nearest
from mmkd.evaluation.calibration import inputs_as
from mmkd.making.used import check_made
from mmkd.ops.token_scores import token_scores
from mmkd.recipe import DataConfig, Recipe
from mmkd.runs.provenance import source_facts
from mmkd.runtime import distributed
from mmkd.runtime.progress import console, say
from mmkd.teachers import LiveTeacher

NUMBERS = (*COUNTS, *MEANS)
READ = {"images", "prompt", "ignore"}
"""Keys of a source that decide how its records are read."""


def score_data(
    recipe: Recipe,
    out: Path,
    *,
    models: Sequence[str] = (),
    stage: str | None = None,
    clusters: int | None = None,
    sheet: Path | None = None,
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
            student before its first stage, or none with `clusters`.
        stage: name of a stage with data of its own; None takes the recipe's data.
        clusters: number of clusters of similar images, by the features of the first of `models`, by
            default of the first teacher or, without one, of the student; None for no clusters.
        sheet: PNG file of images of each cluster, which is written.
        batch_size: records per forward pass.
        device: where the models run.

    Returns:
        A summary for `print_scores`.

    Raises:
        RecipeError: there is no such model or stage, or the data are a stream.
        CheckpointError: `out` exists, or a model cannot be loaded.
        DataError: a record is bad, a loss is not finite, or there are too few images.
    """
    found, data = scored_models(recipe, models), _data_of(recipe, stage)
    by, chosen = found[0], found if models or clusters is None else []
    check_made(recipe, [data])
    place = distributed.choose_device(device)
    distributed.connect(place, timeout_s=max(s.engine.timeout_s for s in recipe.stages))
    folder = out.with_name(f"{out.name}.parts")
    _check_out(out)
    check_sheet(sheet)
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
            rows_of = partial(_scored, vocabulary=token_count(processor.tokenizer))
            run_pass(model, encoder, journal, batch_size, place, rows_of, model.name)
            facts[model.name] = {
                "model": model.source,
                "weights": model.request["weights"],
                "tokenizer": tokenizer_hash(processor),
            }
        grouped = None
        if clusters is not None:
            features = image_features(by, data, records, folder, shared, batch_size, place)
            grouped = cluster_records(features, clusters, recipe.seed, by.source)
        distributed.barrier()
        if distributed.rank() == 0:
            if grouped is not None and sheet is not None:
                write_cluster_sheet(sheet, records, grouped.labels)
            _write(out, folder, records, facts, grouped)
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


def _scored(block: Block, encoder: Encoder, model: LiveTeacher, vocabulary: int) -> list[Row]:
    """The rows of a block with their NUMBERS."""
    batch, nothing = batch_of(block, encoder, model), [None] * len(NUMBERS)
    if batch is None:
        return [[*row, *nothing] for row in block.rows]
    tokenizer = encoder.processor.tokenizer
    numbers = list(score_batch(model, batch.to(model.device), tokenizer, vocabulary))
    good = iter(numbers if block.batch is not None else [])
    return [[*row, *(next(good) if row[2] is not None else nothing)] for row in block.rows]


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
    for index, id, key, *values in journal_rows(folder, name):
        records[index] = (id, key)
        for column, value in zip(NUMBERS, values, strict=True):
            numbers[column][index] = np.nan if value is None else value
    return records, numbers


def _write(
    out: Path,
    folder: Path,
    records: Records,
    facts: dict[str, dict[str, Any]],
    grouped: Grouped | None,
) -> None:
    """Write the file of scores from the journals."""
    count, scores = len(records), {}
    known: list[tuple[str, str | None]] = [("", None)] * count
    for name in facts:
        read, scores[name] = read_scores(folder, name, count)
        known = [a if a[1] is not None else b for a, b in zip(known, read, strict=True)]
    if grouped is not None and not facts:
        known = grouped.records
    starts, sources = records.starts, records.sources
    rows = []
    for index, (id, key) in enumerate(known):
        number = records.source_of(index)
        source = sources[number]
        row = source.row_number(index - starts[number])
        rows.append((id, source.config.label, row, key))
    sizes = {s.config.label: {"records": s.size} for s in sources}
    said: dict[str, Any] = {"sources": sizes, "models": facts}
    if grouped is None:
        write_scores(out, rows, scores, said)
    else:
        write_scores(out, rows, scores, said | {"clusters": grouped.facts}, grouped.labels)


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
    whole = {"file": str(out), "records": len(file), "models": found}
    clusters = file.facts.clusters
    return whole if clusters is None else whole | {"clusters": clusters.model_dump()}


def print_scores(found: dict[str, Any]) -> None:
    """Print what `score_data` has found."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("model", "records", "tokens", "nll", "margin", "entropy", "nll a character"):
        table.add_column(title, justify="left" if title == "model" else "right", no_wrap=True)
    for name, facts in found["models"].items():
        means = [facts[key] for key in (*MEANS, "nll_per_character")]
        shown = ["" if mean is None else f"{mean:.4f}" for mean in means]
        table.add_row(name, f"{facts['records']:,}", f"{facts['tokens']:,}", *shown)
    if found["models"]:
        console.print(table)
    if "clusters" in found:
        print_clusters(found["clusters"])
    say(f"wrote {found['file']}: {found['records']:,} records")
