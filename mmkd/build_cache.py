"""`mmkd cache`: run a recipe's teacher once over the data and store what it says.

For each row that one of the stages' divergences covers, the k likeliest tokens with their
log-probabilities and the mass of all others. Records are known by their content, so that the
cache serves any order, batch size and number of processes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkd import distributed
from mmkd.cache import Store, StoreWriter, processor_hash
from mmkd.data.alignment import same_processor
from mmkd.data.batch import covered_rows
from mmkd.data.encoder import Encoder
from mmkd.engines import choose_precision
from mmkd.errors import DataError, RecipeError
from mmkd.loading import load_model, load_processor
from mmkd.objectives import Objective, Region, Signals, build_objective
from mmkd.ops.head_losses import project, rows_per_chunk
from mmkd.progress import Bar, console
from mmkd.provenance import weights_hash
from mmkd.recipe import DataConfig, Recipe, StageConfig
from mmkd.teachers import LiveTeacher, check_storable, place_teacher
from mmkd.vocabulary import shared_vocabulary


def build_cache(recipe: Recipe) -> Store:
    """Store what the recipe's stages need of its teacher; every rank calls it.

    A second call goes on where the first stopped.

    Raises:
        MmkdError: the recipe names no folder or no model, a stage needs more than distributions,
            or the folder holds something else.
    """
    teacher_config = recipe.teacher
    if teacher_config is None or teacher_config.cache is None:
        raise RecipeError(
            "the recipe does not say where to",
            where="teacher.cache",
            mend="add 'teacher: {model: ..., source: cache, cache: {folder: ...}}'",
        )
    if teacher_config.model is None and teacher_config.config is None:
        raise RecipeError("there is no model to run", where="teacher", mend="add 'model'")
    stages = [s for s in recipe.stages if needed(s)]
    if not stages:
        raise RecipeError("no stage has an objective that reads a teacher", where="stages")
    device = distributed.choose_device(stages[0].engine.device)
    distributed.connect(device, patience=max(s.engine.patience for s in stages))
    processor, student_processor = load_processor(teacher_config), load_processor(recipe.student)
    if not same_processor(processor, student_processor):
        raise RecipeError(
            "teacher and student have different processors",
            where="teacher.source cache",
            mend="use models with one processor, or source: live",
        )
    regions = regions_of(stages)
    vocabulary = shared_vocabulary(student_processor.tokenizer, processor.tokenizer)
    folder = Path(teacher_config.cache.folder)
    settings = {
        "vocabulary": vocabulary,
        "k": min(teacher_config.cache.k, vocabulary),
        "regions": regions,
        "max_length": recipe.stage_data(stages[0]).max_length,
        "teacher": {
            "model": teacher_config.model,
            "weights": weights_hash(Path(teacher_config.model or "")),
        },
        "processor": processor_hash(processor),
    }
    writer = StoreWriter(folder, settings, distributed.rank())
    distributed.barrier()
    model = load_model(teacher_config)
    teacher = place_teacher(model, teacher_config.placement, device)
    for name, stage in _files(recipe, stages).items():
        _store_file(name, recipe.stage_data(stage), stage, processor, teacher, writer)
    writer.flush()
    distributed.barrier()
    if distributed.rank() == 0:
        writer.finish()
    distributed.barrier()
    return Store(folder)


def needed(stage: StageConfig) -> list[Objective]:
    """The stage's objectives that read a teacher.

    Raises:
        RecipeError: one of them needs more of it than distributions at temperature 1.
    """
    found = [o for o in map(build_objective, stage.objectives) if "teacher" in o.needs]
    check_storable(stage, found)
    return found


def _files(recipe: Recipe, stages: list[StageConfig]) -> dict[str, StageConfig]:
    """Data files, each with the first stage that reads it.

    Raises:
        RecipeError: two stages cut sequences at different lengths.
    """
    lengths = {recipe.stage_data(s).max_length for s in stages}
    if len(lengths) > 1:
        raise RecipeError(
            f"stages with a teacher have different max_length ({sorted(lengths)})",
            where="stages.data",
            mend="give them one, or caches of their own",
        )
    found: dict[str, StageConfig] = {}
    for stage in stages:
        found.setdefault(recipe.stage_data(stage).train, stage)
    return found


def _store_file(
    name: str,
    data: DataConfig,
    stage: StageConfig,
    processor: Any,
    teacher: LiveTeacher,
    writer: StoreWriter,
) -> None:
    """Store this process's share of a data file's records."""
    encoder = Encoder.of(
        [build_objective(o) for o in stage.objectives],
        data,
        processor,
        filler=teacher.spread and distributed.world_size() > 1,
    )
    count, size = len(encoder.records), stage.batch.size
    ranks, rank = distributed.world_size(), distributed.rank()
    # Each rank makes as many batches, for a teacher that is spread over them.
    batches = -(-count // (size * ranks))
    precision = choose_precision(stage.precision, teacher.device)
    skipped = 0
    with Bar(Path(name).name, batches, quiet=rank > 0) as bar:
        for number in range(batches):
            first = (number * ranks + rank) * size
            skipped += _store_records(
                encoder, range(first, min(first + size, count)), teacher, writer, precision
            )
            bar.advance(f"{len(writer.stored):,} records on this process")
    if skipped:
        console.print(f"{name}: {skipped} bad records left out", highlight=False)


def _store_records(
    encoder: Encoder, indices: range, teacher: LiveTeacher, writer: StoreWriter, precision: str
) -> int:
    """Store records that are not there yet; returns how many are bad."""
    samples, bad = [], 0
    for index in indices:
        try:
            sample = encoder.load(index)
        except DataError:
            if encoder.config.on_bad_sample == "stop":
                raise
            bad += 1
            continue
        if sample.key not in writer.stored:
            writer.stored.add(sample.key)
            samples.append(sample)
    if not samples and not teacher.spread:
        return bad
    batch = encoder.batch(samples or [encoder.load(0)]).to(teacher.device)
    half = precision == "bfloat16"
    with torch.autocast(teacher.device.type, dtype=torch.bfloat16, enabled=half):
        signals = teacher.signals(batch).first(len(batch.targets.input_ids))
    covered = covered_rows(batch.targets, writer.settings["regions"])  # [B, T]
    codec = writer.codec
    parts = likeliest(signals, covered, codec.vocabulary, codec.k)
    rows = np.concatenate([codec.encode(*part) for part in parts])
    ends = covered.sum(1).cumsum(0).tolist()
    for sample, start, end in zip(samples, [0, *ends], ends, strict=False):
        writer.add(sample.key, rows[start:end])
    return bad


@torch.no_grad()
def likeliest(
    signals: Signals, rows: Tensor, vocabulary: int, k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ids and log-probabilities of the k likeliest tokens and the mass of the others, chunk by
    chunk of the rows.

    Args:
        signals: of the teacher.
        rows: [B, T] bool.
        vocabulary: tokens that count.
        k: tokens to keep.
    """
    hidden = signals.hidden[rows]  # [n, H]
    weight = signals.head_weight[:vocabulary]
    bias = None if signals.head_bias is None else signals.head_bias[:vocabulary]
    for some in hidden.split(rows_per_chunk(max(len(hidden), 1), vocabulary, None)):
        log_p = torch.log_softmax(project(some, weight, bias), -1)  # [C, V]
        log_probs, ids = log_p.topk(k)
        rest = log_p.exp_().scatter_(1, ids, 0).sum(1)
        yield ids, log_probs, rest


def regions_of(stages: list[StageConfig]) -> list[Region]:
    """The regions that the stages' divergences cover."""
    return sorted({getattr(o.config, "region") for s in stages for o in needed(s)})  # noqa: B009
