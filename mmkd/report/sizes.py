"""Sizes of models' weights, compared at one dtype.

Compared with a student in float32, a teacher in bfloat16 would seem half as large as it is. If
models have different numbers of bytes per parameter, all sizes are given for 16 bits.
"""

from collections.abc import Sequence
from dataclasses import replace

from mmkd.report.metrics import COST, Column
from mmkd.report.rundata import Scores

BYTES, COUNT = "weights_bytes", "parameters"
EQUAL = 1.2
"""Ratio of bytes per parameter up to which two dtypes count as equal. Headers and the few weights
that stay float32 cause small differences."""


def compared(
    columns: Sequence[Column], models: Sequence[dict[int, Scores]]
) -> tuple[list[Column], list[dict[int, Scores]]]:
    """The columns and the models' scores by seed, with comparable sizes."""
    costs = [s[COST] for seeds in models for s in seeds.values() if BYTES in s.get(COST, {})]
    widths = [c[BYTES] / c[COUNT] for c in costs if c.get(COUNT)]
    if len(widths) == len(costs) and (not widths or max(widths) <= EQUAL * min(widths)):
        return list(columns), list(models)
    named = [replace(c, title="weights, 16 bit") if c.key == (COST, BYTES) else c for c in columns]
    return named, [{seed: _in_16_bits(s) for seed, s in seeds.items()} for seeds in models]


def _in_16_bits(scores: Scores) -> Scores:
    costs = {k: v for k, v in scores.get(COST, {}).items() if k != BYTES}
    if costs.get(COUNT):
        costs[BYTES] = 2 * costs[COUNT]
    return {**scores, COST: costs} if COST in scores else scores
