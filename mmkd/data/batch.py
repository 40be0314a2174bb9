"""A micro-batch: a model's inputs and what its tokens are."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.alignment import Alignment, Grid, align
from mmkd.data.chunks import Answer, pair_chunks
from mmkd.objectives import Chunks, Region, Targets
from mmkd.ops import SparseRows


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: what the model is called with, without labels; with a filler, one row more than the
            rest.
        targets: what its tokens are.
        ids: the records' ids, for messages; a pair's two rows have one.
        skipped: messages of the records that were left out.
        indices: the records.
        grids: rows and columns of image tokens of each image of each row.
        teacher: the same records as the teacher's own processor encodes them, None where it is the
            student's.
        alignment: which of the teacher's tokens are which of the student's.
        stored: the teacher's distributions, where they come from its cache.
        answers: of each record as its tokens cut them, where chunks are asked for.
        stored_hidden: [B, T, H] float16, its final hidden states from there; zeros where none are.
    """

    inputs: dict[str, Tensor]
    targets: Targets
    ids: list[str]
    skipped: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    grids: list[list[Grid]] = field(default_factory=list)
    teacher: "Batch | None" = None
    alignment: Alignment | None = None
    stored: SparseRows | None = None
    answers: list[list[Answer]] = field(default_factory=list)
    stored_hidden: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor | Chunks) else value

        return replace(
            self,
            inputs={k: move(v) for k, v in self.inputs.items()},
            targets=Targets(**{k: move(v) for k, v in vars(self.targets).items()}),
            teacher=None if self.teacher is None else self.teacher.to(device),
            alignment=None if self.alignment is None else self.alignment.to(device),
            stored=None if self.stored is None else self.stored.to(device),
            stored_hidden=move(self.stored_hidden),
        )


def paired(
    batch: Batch, theirs: Batch | None, regions: Collection[Region], *, chunks: bool
) -> Batch:
    """The batch with what the teacher sees of it.

    Args:
        batch: as the student's processor encodes it.
        theirs: as the teacher's does, if that is another.
        regions: where the tokens of two processors are matched one by one.
        chunks: find the chunks of its answers.

    Raises:
        DataError: they do not fit.
    """
    if theirs is not None:
        rows = zip(batch.grids, theirs.grids, strict=True)
        grids = [list(zip(mine, other, strict=True)) for mine, other in rows]
        ids = batch.ids * (len(grids) // len(batch.ids))
        alignment = align(batch.targets, theirs.targets, grids, ids, regions)
        batch = replace(batch, teacher=theirs, alignment=alignment)
    if chunks:
        other = theirs or batch
        tokens = batch.targets.input_ids, other.targets.input_ids
        found = pair_chunks(*tokens, batch.answers, other.answers, batch.ids)
        batch = replace(batch, targets=replace(batch.targets, chunks=found))
    return batch


def covered_rows(targets: Targets, regions: Sequence[Region]) -> Tensor:
    """[B, T] bool: the rows of any of the regions."""
    covered = torch.zeros_like(targets.attention)
    for region in regions:
        covered |= targets.predicts(region)
    return covered
