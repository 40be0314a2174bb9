"""Records one behind another in rows, none of which sees another.

Positions start at 0 with every record and there is no attention mask: transformers then keeps
records apart in attention, mmkd's mixers in convolution and state.
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
    """Bins of items, the longest first, each into the fullest bin that still takes it.

    Args:
        lengths: of the items, each at most `capacity`.
        capacity: of a bin.

    Returns:
        Numbers of the items, by bin.
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
    """As few bins as best-fit-decreasing needs, and these as short as it can make them."""
    count = len(best_fit_decreasing(lengths, capacity))
    low, high = max(max(lengths), -(-sum(lengths) // count)), capacity
    while low < high:  # the least capacity that takes no more bins
        middle = (low + high) // 2
        if len(best_fit_decreasing(lengths, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return best_fit_decreasing(lengths, high)


def bins_of(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Records by packed row; a record that is longer than `capacity` makes all rows as long."""
    return even_bins(lengths, max(capacity, *lengths))


def renumbered(bins: list[list[int]], count: int) -> tuple[list[int], list[list[int]]]:
    """Put items in the order of their bins.

    Args:
        bins: numbers of items.
        count: how many are put in order; later ones keep their numbers.

    Returns:
        The items' numbers in the new order, and the bins by new numbers.
    """
    order = [i for row in bins for i in row if i < count]
    place = {i: at for at, i in enumerate(order)}
    return order, [[place.get(i, i) for i in row] for row in bins]


class Packing:
    """Where the tokens of padded rows go.

    Args:
        attention: [B, T] bool, False on padding; padding on the right.
        bins: numbers of the rows that lie in each packed row, every one once.
    """

    def __init__(self, attention: Tensor, bins: Sequence[Sequence[int]]):
        lengths = attention.sum(1).tolist()
        width = max(sum(lengths[i] for i in row) for row in bins)
        self.shape = attention.shape
        self.source = torch.full((len(bins), width), -1)  # [R, L], of the [B * T]
        self.positions = torch.zeros(len(bins), width, dtype=torch.long)
        for number, row in enumerate(bins):
            at = 0
            for record in [*row, None]:  # None: what is left is a document of padding
                length = width - at if record is None else lengths[record]
                places = torch.arange(length)
                self.positions[number, at : at + length] = places
                if record is not None:
                    self.source[number, at : at + length] = record * self.shape[1] + places
                at += length

    def __call__(self, x: Tensor, fill: Any) -> Tensor:
        """[B, T] -> [R, L], with `fill` where no token is."""
        moved = x.flatten()[self.source.clamp(min=0)]
        return moved.masked_fill(self.source < 0, fill)

    @property
    def starts(self) -> Tensor:
        """[R, L] bool: the first token of each record."""
        return self.positions == 0


def pack_inputs(inputs: dict[str, Tensor], packing: Packing, padding: int) -> dict[str, Tensor]:
    """A model's inputs in packed rows.

    Args:
        inputs: of padded rows; those with images in the order of the packed rows.
        packing: of the same rows.
        padding: the token that fills rows up.
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
    """What packed tokens are; nothing predicts a record's first token."""

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
    """A teacher's stored rows for packed tokens."""
    return replace(rows, at=packing(rows.at.view(packing.shape), -1).flatten())


def check_packed(context: StageContext) -> None:
    """Objectives of packed rows compare token by token, and the teacher gets the same rows.

    Raises:
        RecipeError: an objective does not, or the teacher has another processor.
    """
    if context.stage.batch.pack is None:
        return
    where, hint = f"{context.where}: batch.pack", "set it to null"
    for objective in context.objectives:
        if "chunks" in objective.needs:
            raise RecipeError(
                f"objective {objective.name} looks for chunks in records that stand alone",
                where=where,
                hint=hint,
            )
        if objective.relates_tokens:
            raise RecipeError(
                f"objective {objective.name} relates the tokens of a row, and packed rows hold "
                "several records",
                where=where,
                hint=hint,
            )
    theirs = context.teacher_processor
    reads = theirs is not None and bool(context.needing("teacher"))
    if reads and not same_processor(context.processor, theirs):
        what = "teacher and student have different processors"
        raise RecipeError(what, where=where, hint=hint)
