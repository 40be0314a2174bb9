"""The metrics of a step, summed over ranks in two all-reduces.

    counts <- all-reduce(rows of each objective, tokens, skipped records, ...)   before the forwards
    totals <- all-reduce(losses, load of each expert, stop requests)             after the backwards

The first one cannot wait, since every loss is divided by its rows. The second one is read before
the update, so that a loss that is infinite or no number never reaches the weights. Until then
everything stays on the device: no micro-batch waits for the host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.records import Records
from mmkd.engines import Engine
from mmkd.objectives import Objective

Metrics = dict[str, Any]
"""Numbers by name; the shares of tokens that experts get are lists by layer."""


@dataclass(frozen=True)
class Counts:
    """What the global batch holds.

    Attributes:
        rows: that each objective covers, by its name.
        metrics: tokens, skipped records and what else a step's line says of the batch.
    """

    rows: dict[str, float]
    metrics: Metrics


@dataclass(frozen=True)
class Totals:
    """What the forwards of all ranks gave.

    Attributes:
        losses: the loss, and each objective's part and metrics, by name.
        metrics: the share of tokens that each expert of each sparse layer got; empty without one.
        stop: some rank was asked to stop.
    """

    losses: dict[str, float]
    metrics: Metrics
    stop: bool


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
    sampled: int | None,
) -> Counts:
    """Count what the global batch holds; every rank calls it.

    Args:
        batches: this rank's micro-batches, on the engine's device.
        objectives: of the stage.
        records: of the stage's data, one or several sources.
        engine: of the stage.
        sampled: answers of this rank's micro-batches that are the student's own; None without
            on-policy distillation.
    """
    targets = [b.targets for b in batches]
    values = {
        "rows": torch.stack(
            [torch.stack([o.rows(t.of(o.sources)).sum() for t in targets]) for o in objectives]
        ).sum(1),
        "real": torch.stack([t.attention.sum() for t in targets]).sum(),
        "supervised": torch.stack([t.response.sum() for t in targets]).sum(),
        "skipped": torch.tensor(sum(len(b.skipped) for b in batches)),
        "places": torch.tensor(sum(t.attention.numel() for t in targets)),
        "sampled": torch.tensor(sampled or 0),
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
    if sampled is not None:
        metrics["sampled"] = float(sums["sampled"])
    if len(records.sources) > 1:
        labels = [source.config.label for source in records.sources]
        metrics["sources"] = dict(zip(labels, sums["sources"].tolist(), strict=True))
    names = [o.name for o in objectives]
    return Counts(dict(zip(names, sums["rows"].tolist(), strict=True)), metrics)


def _of_sources(batches: Sequence[Batch], records: Records) -> Tensor:
    """How many records of the micro-batches come from each source."""
    counts = torch.zeros(len(records.sources), dtype=torch.float64)
    if len(records.sources) > 1:
        for index in (i for batch in batches for i in batch.indices):
            counts[records.source_of(index)] += 1
    return counts


def sum_losses(
    losses: Mapping[str, Tensor], load: Mapping[int, Tensor], engine: Engine, *, stop: bool
) -> Totals:
    """Sum what the forwards gave; every rank calls it.

    Args:
        losses: float64, by name.
        load: how often each expert was chosen, by layer.
        engine: of the stage.
        stop: this rank was asked to stop.
    """
    values = {"losses": torch.stack(list(losses.values())), "stop": torch.tensor(stop)}
    if load:
        values["load"] = torch.stack(list(load.values()))  # [layers, E]
    sums = sum_over_ranks(values, engine)
    named = dict(zip(losses, sums["losses"].tolist(), strict=True))
    metrics: Metrics = {}
    if load:
        shares = (sums["load"] / sums["load"].sum(1, keepdim=True)).tolist()
        rounded = [[round(share, 4) for share in layer] for layer in shares]
        metrics["expert_load"] = dict(zip(map(str, load), rounded, strict=True))
    return Totals(named, metrics, bool(sums["stop"]))
