"""`mmkd cache`: run a recipe's teacher once over the data and store what it says.

For each row that one of the stages' divergences covers, the k likeliest tokens with their
log-probabilities and the mass of all others. Records are known by their content, so that the
cache serves any order, batch size and number of processes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.cache import Store, StoreWriter, drop_damaged, processor_hash
from mmkd.data.alignment import same_processor
from mmkd.data.batch import Batch, covered_rows
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.samples import Sample
from mmkd.data.vocabulary import check_head, shared_vocabulary
from mmkd.engines import choose_precision
from mmkd.errors import AGAIN, DataError, RecipeError, StoppedError
from mmkd.making.used import check_later, check_made
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import ObjectiveConfig, Region, Signals
from mmkd.objectives.relation import logit_factor
from mmkd.ops.head_losses import project, rows_per_chunk
from mmkd.recipe import DataConfig, Recipe, StageConfig, TeacherConfig
from mmkd.redact import redact_all
from mmkd.runtime import consent, distributed
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.interrupt import asked, deferred
from mmkd.runtime.progress import Bar, say
from mmkd.students import converted_processor
from mmkd.teachers import LiveTeacher, check_storable, place_teacher


def build_cache(recipe: Recipe) -> Store:
    """Store what the recipe's stages need of its teacher; every rank calls it.

    A second call goes on where the first stopped, and makes damaged shards again.

    Raises:
        MmkdError: the recipe names no folder or no model, a stage needs more than distributions,
            or the folder holds something else.
    """
    source = _teacher_to_store(recipe)
    kept = source.cache
    assert kept is not None
    stages = [s for s in reading_stages(recipe) if needed(s, hidden=kept.hidden)]
    if not stages:
        raise RecipeError(
            "no stage has an objective that reads a teacher",
            where="stages",
            hint="add one, such as {kind: kl}",
        )
    check_later(recipe.with_rounds())
    check_made(recipe, [recipe.stage_data(stage) for stage in stages])
    device = distributed.choose_device(stages[0].engine.device)
    distributed.connect(device, timeout_s=max(s.engine.timeout_s for s in stages))
    processor, student_processor = load_processor(source), converted_processor(recipe.student)
    if not same_processor(processor, student_processor):
        raise RecipeError(
            "teacher and student have different processors",
            where="teacher.source cache",
            hint="use models with one processor, or source: live",
        )
    vocabulary = shared_vocabulary(student_processor.tokenizer, processor.tokenizer)
    settings = _settings_of(recipe, source, stages, processor, vocabulary)
    model = load_model(source)
    check_head(model, processor.tokenizer, "teacher")
    if settings["hidden"] is not None:
        settings["hidden"]["width"] = model.get_output_embeddings().weight.shape[1]
    folder = Path(kept.folder)
    with distributed.alone_in(folder):
        if distributed.rank() == 0:
            for name in drop_damaged(folder):
                say(f"{folder / name}: damaged, made again")
        distributed.barrier()
        writer = StoreWriter(folder, settings, distributed.rank())
        if settings["hidden"] is not None and distributed.rank() == 0:
            writer.keep_head(*relative_head(model, vocabulary))
        distributed.barrier()
        teacher = place_teacher(model, source.placement, device)
        for stage, held_out in _readings(recipe, stages):
            data = recipe.stage_data(stage)
            records = Records(data, held_out=held_out)
            _store_data(data, records, stage, processor, teacher, writer)
        writer.flush()
        distributed.barrier()
        if distributed.rank() == 0:
            trusted = redact_all(consent.record())
            writer.finish(**{"trusted": trusted} if trusted else {})
        distributed.barrier()
    return Store(folder)


def _teacher_to_store(recipe: Recipe) -> TeacherConfig:
    """The recipe's teacher, with a `cache` and weights.

    Raises:
        RecipeError: one of them is missing.
    """
    source = recipe.teacher
    if source is None or source.cache is None:
        raise RecipeError(
            "the recipe does not say where to",
            where="teacher.cache",
            hint="add 'teacher: {model: ..., source: cache, cache: {folder: ...}}'",
        )
    if source.model is None and source.config is None:
        raise RecipeError("there is no model to run", where="teacher", hint="add 'model'")
    return source


def _settings_of(
    recipe: Recipe,
    source: TeacherConfig,
    stages: list[StageConfig],
    processor: Any,
    vocabulary: int,
) -> dict[str, Any]:
    """What a cache has to be made with to serve the stages; its manifest says it."""
    assert source.cache is not None
    return {
        "vocabulary": vocabulary,
        "k": min(source.cache.k, vocabulary),
        "regions": regions_of(stages),
        "hidden": hidden_of(stages),
        "max_length": recipe.stage_data(stages[0]).max_length,
        "teacher": _facts_of(source),
        "processor": processor_hash(processor),
    }


def _facts_of(source: TeacherConfig) -> dict[str, Any]:
    """What tells a cache of this teacher from another's."""
    facts = {"model": source.model, "weights": weights_hash(source.model)}
    return {**facts, "quantize": source.quantize} if source.quantize else facts


def reading_stages(recipe: Recipe) -> list[StageConfig]:
    """The stages that do not have the student after an earlier stage as their teacher."""
    return [s for s in recipe.stages if s.teacher is None or s.teacher.stage is None]


def needed(stage: StageConfig, *, hidden: bool) -> list[ObjectiveConfig]:
    """Settings of the stage's objectives that read a teacher.

    Raises:
        RecipeError: one of them needs more of it than distributions at temperature 1, and final
            hidden states where these are kept (`hidden`).
    """
    found = [o for o in stage.objectives if "teacher" in o.needs]
    check_storable(stage, found, hidden=hidden)
    return found


def _readings(recipe: Recipe, stages: list[StageConfig]) -> list[tuple[StageConfig, bool]]:
    """Each set of records that the stages read, once: the first stage that reads it, and whether
    these are its held-out records.

    Raises:
        RecipeError: two stages cut sequences at different lengths.
    """
    lengths = {recipe.stage_data(s).max_length for s in stages}
    if len(lengths) > 1:
        raise RecipeError(
            f"stages with a teacher have different max_length ({sorted(lengths)})",
            where="stages.data",
            hint="give them one, or caches of their own",
        )
    found: dict[str, tuple[StageConfig, bool]] = {}
    for stage in stages:
        data = recipe.stage_data(stage)
        measured = data.validation is not None and stage.validation.interval is not None
        share = None if data.validation is None else data.validation.share
        for held_out in [False, True] if measured else [False]:
            parts = data.validation_parts if held_out else data.parts
            # The same sources hold other records where another share of them is held out.
            split = [held_out, share, data.records_apart]
            key = json.dumps([*split, *(part.model_dump_json() for part in parts)])
            found.setdefault(key, (stage, held_out))
    return list(found.values())


def _store_data(
    data: DataConfig,
    records: Records,
    stage: StageConfig,
    processor: Any,
    teacher: LiveTeacher,
    writer: StoreWriter,
) -> None:
    """Store this process's share of a data set's records."""
    encoder = Encoder.of(
        stage.objectives,
        data,
        processor,
        records=records,
        filler=teacher.spread and distributed.world_size() > 1,
    )
    name = ", ".join(source.config.label for source in records.sources)
    count, size = len(encoder.records), stage.batch.size
    blocks = [range(first, min(first + size, count)) for first in range(0, count, size)]
    shares = distributed.equal_shares(blocks, 1)
    precision = choose_precision(stage.precision, teacher.device)
    skipped = 0
    with deferred(), Bar(name, len(shares), quiet=distributed.rank() > 0) as bar:
        for number, share in enumerate(shares, 1):
            indices = [index for block in share for index in block]
            skipped += _store_records(encoder, indices, teacher, writer, precision)
            bar.advance(f"{len(writer.stored):,} records on this process")
            if asked(teacher.device):
                writer.flush()
                raise StoppedError(f"{name} stopped at batch {number} of {len(shares)}", hint=AGAIN)
    if skipped:
        say(f"{name}: {skipped} bad records left out")


def _store_records(
    encoder: Encoder, indices: list[int], teacher: LiveTeacher, writer: StoreWriter, precision: str
) -> int:
    """Store records that are not there yet; returns how many are bad. The teacher runs once, if
    only on a stand-in, where the ranks have to run it together."""
    samples, bad = _new_samples(encoder, indices, writer.stored)
    if not samples and not teacher.spread:
        return bad
    batch = encoder.batch(samples or [_stand_in(encoder)]).to(teacher.device)
    half = precision == "bfloat16"
    with torch.autocast(teacher.device.type, dtype=torch.bfloat16, enabled=half):
        signals = teacher.signals(batch).truncate(len(batch.targets.input_ids))
    covered = covered_rows(batch.targets, writer.settings["regions"])  # [B, T]
    codec = writer.codec
    parts = likeliest(signals, covered, codec.vocabulary, codec.k)
    rows = np.concatenate([codec.encode(*part) for part in parts])
    ends = covered.sum(1).cumsum(0).tolist()
    states = _hidden_states(signals, batch, writer)
    for number, (sample, start, end) in enumerate(zip(samples, [0, *ends], ends, strict=False)):
        writer.add(sample.key, rows[start:end], states[number] if states else None)
    return bad


def _new_samples(
    encoder: Encoder, indices: list[int], stored: set[bytes]
) -> tuple[list[Sample], int]:
    """Samples that are not stored yet, which are counted as stored from here on, and how many
    records are bad.

    Raises:
        DataError: one is bad, and the recipe does not skip such records.
    """
    stops = encoder.config.on_bad_record == "stop"
    samples, bad = [], 0
    for index in indices:
        try:
            sample = encoder.load(index)
        except DataError:
            if stops:
                raise
            bad += 1
            continue
        if sample.key not in stored:
            stored.add(sample.key)
            samples.append(sample)
    if stops or not samples:
        return samples, bad
    try:
        encoder.batch(samples)
    except DataError:  # the processor refuses one of them
        taken = [sample for sample in samples if _is_taken(encoder, sample)]
        return taken, bad + len(samples) - len(taken)
    return samples, bad


def _is_taken(encoder: Encoder, sample: Sample) -> bool:
    try:
        encoder.batch([sample])
    except DataError:
        return False
    return True


def _stand_in(encoder: Encoder) -> Sample:
    """The first record that is good: the teacher runs on it, and nothing is stored."""

    def read(index: int) -> Sample:
        sample = encoder.load(index)
        encoder.batch([sample])
        return sample

    return encoder.records.usable(0, read, [])


def _hidden_states(signals: Signals, batch: Batch, writer: StoreWriter) -> list[Tensor]:
    """[h, H] float16 of each record, if they are kept."""
    wanted = writer.settings["hidden"]
    if wanted is None:
        return []
    covered = covered_rows(batch.targets, wanted["regions"])  # [B, T]
    states = [row[mask].half().cpu() for row, mask in zip(signals.hidden, covered, strict=True)]
    if not all(torch.isfinite(s).all() for s in states):
        raise DataError(
            "final hidden states are too large for 16 bits",
            where=batch.ids[0],
            hint="set 'hidden: false' in teacher.cache",
        )
    return states


@torch.no_grad()
def relative_head(model: PreTrainedModel, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """A head of the same inner products of logits as the model's, [D, H] and [D] or None, smaller
    where the vocabulary is larger than the model's width."""
    head: Any = model.get_output_embeddings()
    weight = head.weight[:vocabulary].float().cpu()
    bias = None if getattr(head, "bias", None) is None else head.bias[:vocabulary].float().cpu()
    whole = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    if len(whole) <= whole.shape[1]:
        return weight, bias
    small = logit_factor(whole).T
    return (small, None) if bias is None else (small[:, :-1], small[:, -1])


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
    found = [o for s in stages for o in needed(s, hidden=True) if not o.reads_hidden]
    return sorted({getattr(o, "region") for o in found})  # noqa: B009


def hidden_of(stages: list[StageConfig]) -> dict[str, Any] | None:
    """The regions of whose hidden states the stages' objectives read."""
    found = {r for s in stages for o in needed(s, hidden=True) for r in o.reads_hidden}
    return {"regions": sorted(found)} if found else None
