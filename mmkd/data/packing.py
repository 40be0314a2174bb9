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

from mmkd.errors import DataError
from mmkd.objectives import Targets
from mmkd.ops import SparseRows

SEQUENCE = ("input_ids", "attention_mask")
"""Inputs that run along the tokens; all others belong to pictures."""


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


class Packing:
    """Where the tokens of padded rows go.

    Args:
        attention: [B, T] bool, False on padding; padding on the right.
        capacity: most tokens of a packed row, if no record is longer.
    """

    def __init__(self, attention: Tensor, capacity: int):
        lengths = attention.sum(1).tolist()
        bins = even_bins(lengths, max(capacity, *lengths))
        self.order = [record for row in bins for record in row]
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


def pack_inputs(
    inputs: dict[str, Tensor], packing: Packing, pictures: Sequence[int], padding: int
) -> dict[str, Tensor]:
    """A model's inputs in packed rows.

    Args:
        inputs: of padded rows.
        packing: of the same rows.
        pictures: how many each row has.
        padding: the token that fills rows up.

    Raises:
        DataError: an input belongs neither to tokens nor to pictures.
    """
    starts = [sum(pictures[:row]) for row in range(len(pictures))]
    order = [starts[row] + i for row in packing.order for i in range(pictures[row])]
    made = {
        "input_ids": packing(inputs["input_ids"], padding),
        "position_ids": packing.positions,
    }
    for name, value in inputs.items():
        if name in SEQUENCE:
            continue
        if len(value) != len(order):
            raise DataError(
                f"{name} {list(value.shape)} cannot be packed: it is not one item for each of "
                f"{len(order)} pictures",
                mend="set batch.pack to null for this family",
            )
        made[name] = value[torch.tensor(order, dtype=torch.long)]
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
