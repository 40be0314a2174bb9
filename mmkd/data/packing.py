"""Packing: several records in one row, isolated from each other.

Position ids start again at 0 with each record, and there is no attention mask. From this,
transformers isolates the records in attention, and mmkd's mixers isolate them in convolution and
state.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.alignment import same_processor
from mmkd.errors import RecipeError
from mmkd.objectives import Targets
from mmkd.ops import SparseRows
from mmkd.recipe.context import StageContext


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the longest item first, each into the fullest bin with
    enough space.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a bin.

    Returns:
        Indices of the items, by bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what a bin still takes, its number), ascending
    for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        at = bisect_left(room, (lengths[item], -1))
        if at == len(room):
            left, number = capacity, len(bins)
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(item)
        insort(room, (left - lengths[item], number))
    return bins


def even_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As many bins as best-fit-decreasing needs, with the smallest capacity for that number."""
    count = len(best_fit_decreasing(lengths, capacity))
    low, high = max(max(lengths), -(-sum(lengths) // count)), capacity
    while low < high:  # find the smallest capacity with the same number of bins
        middle = (low + high) // 2
        if len(best_fit_decreasing(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return best_fit_decreasing(lengths, high)


def bins_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Records by packed row. If a record is longer than `capacity`, its length is the capacity."""
    return even_bins(lengths, max(capacity, *lengths))


def renumbered(bins: list[list[int]], count: int) -> tuple[list[int], list[list[int]]]:
    """Reorder items by bin.

    Args:
        bins: indices of items, by bin.
        count: number of items to reorder; later items keep their indices.

    Returns:
        The old indices in the new order, and the bins with new indices.
    """
    order = [i for row in bins for i in row if i < count]
    place = {i: at for at, i in enumerate(order)}
    return order, [[place.get(i, i) for i in row] for row in bins]


class Packing:
    """A mapping of the tokens of padded rows to packed rows.

    Args:
        attention: [B, T] bool, False on padding, which is on the right.
        bins: indices of the padded rows in each packed row; each occurs once.
    """

    def __init__(self, attention: Tensor, bins: Sequence[Sequence[int]]):
        lengths = attention.sum(1).tolist()
        width = max(sum(lengths[i] for i in row) for row in bins)
        self.shape = attention.shape
        self.source = torch.full((len(bins), width), -1)  # [R, L], of the [B * T]
        self.positions = torch.zeros(len(bins), width, dtype=torch.long)
        for number, row in enumerate(bins):
            at = 0
            for record in [*row, None]:  # None: the rest of the row is a document of padding
                length = width - at if record is None else lengths[record]
                places = torch.arange(length)
                self.positions[number, at : at + length] = places
                if record is not None:
                    self.source[number, at : at + length] = record * self.shape[1] + places
                at += length

    def __call__(self, x: Tensor, fill: Any) -> Tensor:
        """[B, T] -> [R, L], with `fill` on padding."""
        moved = x.flatten()[self.source.clamp(min=0)]
        return moved.masked_fill(self.source < 0, fill)

    @property
    def starts(self) -> Tensor:
        """[R, L] bool: the first token of each record."""
        return self.positions == 0


def pack_inputs(inputs: dict[str, Tensor], packing: Packing, padding: int) -> dict[str, Tensor]:
    """A model's inputs in packed rows.

    Args:
        inputs: of padded rows. Rows with images are in the order of the packed rows.
        packing: of the same rows.
        padding: id of the pad token.
    """
    made = {
        "input_ids": packing(inputs["input_ids"], padding),
        "position_ids": packing.positions,
    }
    for name, value in inputs.items():
        if name not in ("input_ids", "attention_mask"):
            along_tokens = value.shape == inputs["input_ids"].shape
            made[name] = packing(value, 0) if along_tokens else value
    return made


def pack_targets(targets: Targets, packing: Packing, ignored: int) -> Targets:
    """Targets in packed rows. The first token of a record is not predicted."""

    def moved(x: Tensor | None, fill: Any) -> Tensor | None:
        return None if x is None else packing(x, fill)

    return replace(
        targets,
        input_ids=packing(targets.input_ids, 0),
        attention=packing(targets.attention, False),
        response=packing(targets.response, False),
        vision=packing(targets.vision, False),
        vision_labels=moved(targets.vision_labels, ignored),
        background=moved(targets.background, False),
        starts=packing.starts,
        sources=moved(targets.sources, -1),
    )


def pack_stored(rows: SparseRows, packing: Packing) -> SparseRows:
    """A teacher's stored distributions in packed rows."""
    return replace(rows, at=packing(rows.at.view(packing.shape), -1).flatten())


def check_packed(context: StageContext) -> None:
    """Check that packing works with a stage's objectives and teacher.

    Raises:
        RecipeError: an objective relates tokens or chunks of a row, or the teacher has another
            processor.
    """
    if context.stage.batch.pack is None:
        return
    where, hint = f"{context.where}: batch.pack", "set it to null"
    for objective in context.objectives:
        if "chunks" in objective.needs:
            raise RecipeError(
                f"objective {objective.name} needs chunks, which are found without packing only",
                where=where,
                hint=hint,
            )
        if objective.relates_tokens:
            raise RecipeError(
                f"objective {objective.name} relates the tokens of a row, and packed rows have "
                "several records",
                where=where,
                hint=hint,
            )
    theirs = context.teacher_processor
    reads = theirs is not None and bool(context.needing("teacher"))
    if reads and not same_processor(context.processor, theirs):
        what = "teacher and student have different processors"
        raise RecipeError(what, where=where, hint=hint)
