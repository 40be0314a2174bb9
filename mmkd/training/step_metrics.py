"""The metrics of a step, summed over ranks in two all-reduces.

    counts = all_reduce(rows of each objective, tokens, skipped records, ...)   before the forwards
    totals = all_reduce(losses, load of each expert, stop requests)             after the backwards

The first all-reduce comes before the forwards, because each loss is divided by its number of rows.
The second one is read before the update, so that a non-finite loss never changes the weights.
Between the two, all values stay on the device: no micro-batch synchronizes with the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.records import Records
from mmkd.engines import Engine
from mmkd.objectives import Objective
from mmkd.training.on_policy import AnswerCounts

Metrics = dict[str, Any]
"""Numbers by name; the shares of tokens that experts get are lists by layer."""


@dataclass(frozen=True)
class Counts:
    """Counts of the global batch.

    Attributes:
        rows: number of rows that each objective covers, by its name.
        metrics: tokens, skipped records and other counts, as logged.
    """

    rows: dict[str, float]
    metrics: Metrics


@dataclass(frozen=True)
class Totals:
    """Sums over the micro-batches of all ranks.

    Attributes:
        losses: the loss, and each objective's part and metrics, by name.
        metrics: share of the tokens of each expert, by sparse layer; empty without sparse layers.
        stop: at least one rank was asked to stop.
        squares: [objectives], squared norms of the objectives' gradients; empty if they are not
            measured.
    """

    losses: dict[str, float]
    metrics: Metrics
    stop: bool
    squares: Tensor


def sum_over_ranks(values: Mapping[str, Tensor], engine: Engine) -> dict[str, Tensor]:
    """Sum named tensors over ranks: one all-reduce, one copy to the host.

    Args:
        values: of any shape, on the engine's device or the CPU; the same names and shapes on every
            rank.
        engine: of the stage.

    Returns:
        The sums by name, float64, on the CPU. Counts up to 2^53 are exact.
    """
    flat = [v.detach().to(engine.device, torch.float64).flatten() for v in values.values()]
    sums = engine.total(torch.cat(flat)).cpu().split([v.numel() for v in values.values()])
    return {n: part.view(v.shape) for (n, v), part in zip(values.items(), sums, strict=True)}


def count_batches(
    batches: Sequence[Batch],
    objectives: Sequence[Objective],
    records: Records,
    engine: Engine,
    *,
    answers: AnswerCounts | None,
    corrects: bool,
) -> Counts:
    """Count rows, tokens and records of the global batch. All ranks must call it.

    Args:
        batches: this rank's micro-batches, on the engine's device.
        objectives: of the stage.
        records: of the stage's data, one or several sources.
        engine: of the stage.
        answers: of this rank's micro-batches, that the student sampled; None without on-policy
            distillation.
        corrects: the teacher corrects these answers.
    """
    targets = [b.targets for b in batches]
    values = {
        "rows": torch.stack(
            [torch.stack([o.counted_rows(t).sum() for t in targets]) for o in objectives]
        ).sum(1),
        "real": torch.stack([t.attention.sum() for t in targets]).sum(),
        "supervised": torch.stack([t.response.sum() for t in targets]).sum(),
        "skipped": torch.tensor(sum(len(b.skipped) for b in batches)),
        "places": torch.tensor(sum(t.attention.numel() for t in targets)),
        "answers": torch.tensor(astuple(answers or AnswerCounts())),
        "sources": _of_sources(batches, records),
    }
    sums = sum_over_ranks(values, engine)
    real, places = float(sums["real"]), float(sums["places"])
    metrics: Metrics = {
        "tokens": real,
        "supervised_tokens": float(sums["supervised"]),
        "skipped": float(sums["skipped"]),
        "padding": round(1 - real / places, 4),
    }
    if answers is not None:
        metrics |= _of_answers(AnswerCounts(*sums["answers"].long().tolist()), corrects=corrects)
    if len(records.sources) > 1:
        labels = [source.config.label for source in records.sources]
        metrics["sources"] = dict(zip(labels, sums["sources"].tolist(), strict=True))
    names = [o.name for o in objectives]
    return Counts(dict(zip(names, sums["rows"].tolist(), strict=True)), metrics)


def _of_answers(counts: AnswerCounts, *, corrects: bool) -> Metrics:
    """Number of sampled answers, share of these that the teacher has corrected, and if there are
    any, mean position of the replaced tokens."""
    metrics: Metrics = {"sampled": float(counts.sampled)}
    if corrects:
        metrics["corrected"] = round(counts.corrected / max(counts.sampled, 1), 4)
    if counts.replaced:
        metrics["corrected_at"] = round(counts.positions / counts.replaced, 2)
    return metrics


def _of_sources(batches: Sequence[Batch], records: Records) -> Tensor:
    """Number of records from each source, [sources]."""
    counts = torch.zeros(len(records.sources), dtype=torch.float64)
    if len(records.sources) > 1:
        for index in (i for batch in batches for i in batch.indices):
            counts[records.source_of(index)] += 1
    return counts


def sum_losses(
    losses: Mapping[str, Tensor],
    load: Mapping[int, Tensor],
    engine: Engine,
    *,
    stop: bool,
    squares: Tensor | None = None,
) -> Totals:
    """Sum the losses and expert loads over ranks. All ranks must call it.

    Args:
        losses: float64, by name.
        load: number of tokens of each expert, [E], by layer.
        engine: of the stage.
        stop: whether this rank was asked to stop.
        squares: [objectives] float64, squared norms of the objectives' gradients on this rank.
    """
    values = {"losses": torch.stack(list(losses.values())), "stop": torch.tensor(stop)}
    values["squares"] = torch.zeros(0) if squares is None else squares
    if load:
        values["load"] = torch.stack(list(load.values()))  # [layers, E]
    sums = sum_over_ranks(values, engine)
    named = dict(zip(losses, sums["losses"].tolist(), strict=True))
    metrics: Metrics = {}
    if load:
        shares = (sums["load"] / sums["load"].sum(1, keepdim=True)).tolist()
        rounded = [[round(share, 4) for share in layer] for layer in shares]
        metrics["expert_load"] = dict(zip(map(str, load), rounded, strict=True))
    return Totals(named, metrics, bool(sums["stop"]), sums["squares"])
