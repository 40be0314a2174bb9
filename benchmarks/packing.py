"""Packing of records of unequal length: how full rows are, and tokens placed a second.

    python -m benchmarks.packing --json runs/bench/packing.json

Lengths are drawn log-normally (median 245 tokens, 8 to 4,000). `padded`: one record a row,
micro-batches as they come. `greedy`: rows are filled in the order of the records and closed when
the next does not fit, as plain packers do. Times include moving the tokens, masks and positions.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import median_seconds, save
from mmkd.data.packing import Packing, best_fit_decreasing, bins_of, pack_inputs, pack_targets
from mmkd.objectives import Targets
from mmkd.runtime.progress import console


def draw(records: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(records, generator=generator).mul(0.8).add(5.5).exp()
    return drawn.round().clamp(8, 4000).long().tolist()


def greedy(lengths: list[int], capacity: int) -> list[list[int]]:
    """Rows in the order of the records."""
    bins: list[list[int]] = [[]]
    used = 0
    for item, length in enumerate(lengths):
        if used + length > capacity:
            bins.append([])
            used = 0
        bins[-1].append(item)
        used += length
    return bins


def batch(lengths: list[int]) -> tuple[dict[str, torch.Tensor], Targets]:
    """Padded inputs and targets of a micro-batch without images."""
    attention = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.ones_like(attention, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": attention.long()}
    return inputs, Targets(ids, attention, attention, torch.zeros_like(attention))


def pack(made: tuple[dict[str, torch.Tensor], Targets], capacity: int) -> float:
    """Pack a micro-batch; returns how full its rows are."""
    inputs, targets = made
    lengths = targets.attention.sum(1).tolist()
    packing = Packing(targets.attention, bins_of(lengths, capacity))
    pack_inputs(inputs, packing, 0)
    return float(pack_targets(targets, packing, -100).attention.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--records", type=int, default=20_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths = draw(args.records)
    total, capacity = sum(lengths), args.capacity
    makers: dict[str, Callable[..., list[list[int]]]] = {
        "greedy": greedy,
        "best fit decreasing": best_fit_decreasing,
    }
    seconds = median_seconds(
        {n: lambda m=m: m(lengths, capacity) for n, m in makers.items()}, args.repeats
    )
    rows: list[dict[str, Any]] = [
        {
            "what": f"{name}, all {args.records:,} records",
            "fill": total / (len(make(lengths, capacity)) * capacity),
            "tokens_per_second": total / seconds[name],
        }
        for name, make in makers.items()
    ]
    for size in args.batch:
        parts = [lengths[i : i + size] for i in range(0, args.records - size + 1, size)]
        padded = sum(map(sum, parts)) / sum(max(p) * len(p) for p in parts)
        rows.append({"what": f"padded, micro-batches of {size}", "fill": padded})
        some = [batch(p) for p in parts[:16]]
        started = time.perf_counter()
        fills = [pack(made, capacity) for made in some]
        taken = time.perf_counter() - started
        rows.append(
            {
                "what": f"packed, micro-batches of {size}",
                "fill": sum(fills) / len(fills),
                "tokens_per_second": sum(map(sum, parts[:16])) / taken,
            }
        )
    table = Table(title=f"rows of {capacity} tokens")
    for name in ("", "fill", "tokens/s"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        speed = row.get("tokens_per_second")
        table.add_row(row["what"], f"{row['fill']:.3f}", f"{speed:,.0f}" if speed else "")
    console.print(table)
    save(args, rows=rows)


if __name__ == "__main__":
    main()
