"""A micro-batch: inputs of the model, and targets."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.alignment import Alignment, Grid, align
from mmkd.data.chunks import Answer, pair_chunks
from mmkd.objectives import Chunks, Region, Targets
from mmkd.ops import KeptTokens, SparseRows


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: keyword arguments of the model, without labels. With a filler they have one row more
            than the targets.
        targets: token ids, masks and labels.
        ids: ids of the records, for messages; both rows of a pair have the same one.
        skipped: error messages of records that were skipped.
        indices: of the records.
        grids: rows and columns of image tokens, for each image of each row.
        teacher: the same records, encoded by the teacher's processor; None if it is the same as the
            student's.
        alignment: between the tokens of student and teacher.
        stored: output distributions from the teacher's cache.
        answers: token boundaries in the answers of each record, if chunks are needed.
        stored_hidden: [B, T, H] float16, final hidden states from the cache, zeros where it has
            none.
        kept: the tokens of the inputs on which decoders run, if image tokens are left out. The
            targets are then those of the kept tokens.
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
    kept: KeptTokens | None = None

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
            kept=None if self.kept is None else self.kept.to(device),
        )


def paired(
    batch: Batch,
    theirs: Batch | None,
    regions: Collection[Region],
    boundary_tokens: tuple[Tensor, Tensor] | None,
) -> Batch:
    """Add the teacher's encoding of the same records to a batch.

    Args:
        batch: encoded by the student's processor.
        theirs: encoded by the teacher's processor, if it differs.
        regions: regions whose tokens are aligned.
        boundary_tokens: of student and teacher, to find the chunks of the answers; None to find no
            chunks.

    Raises:
        DataError: the two encodings cannot be aligned.
    """
    if theirs is not None:
        rows = zip(batch.grids, theirs.grids, strict=True)
        grids = [list(zip(mine, other, strict=True)) for mine, other in rows]
        ids = batch.ids * (len(grids) // len(batch.ids))
        alignment = align(batch.targets, theirs.targets, grids, ids, regions)
        batch = replace(batch, teacher=theirs, alignment=alignment)
    if boundary_tokens is not None:
        other = theirs or batch
        tokens = batch.targets.input_ids, other.targets.input_ids
        answers = batch.answers, other.answers
        found = pair_chunks(*tokens, *answers, batch.ids, boundary_tokens)
        batch = replace(batch, targets=replace(batch.targets, chunks=found))
    return batch


def covered_rows(targets: Targets, regions: Sequence[Region]) -> Tensor:
    """[B, T] bool: the rows of any of the regions."""
    covered = torch.zeros_like(targets.attention)
    for region in regions:
        covered |= targets.predicts(region)
    return covered
