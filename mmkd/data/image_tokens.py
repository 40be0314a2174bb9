"""Leave out a random part of the image tokens of a batch, the same for all models (`image_tokens`).

Vision tower and connector process whole images. The decoders of student and teachers run on shorter
sequences: `mmkd.modeling.kept_inputs`. This is the saving of masked distillation in the spirit of
DMAE (Bai et al. 2022, arXiv 2208.12256), whose student sees a random part of the image patches.
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.labels import IGNORED
from mmkd.objectives import Chunks, ChunkTokens, Targets
from mmkd.ops import KeptTokens

FILLER = -1
"""Stands for the index of a record in rows that only fill up a batch."""


@dataclass(frozen=True)
class ImageTokenDropout:
    """Chooses the image tokens that are kept.

    The choice is a function of seed, step and record. So it does not depend on the batch layout and
    the number of processes, and both answers of a preference pair have the same image tokens.

    The last image token of each contiguous run is always kept: its position predicts the text
    after the image. Each region then has the rows that it has with all tokens, without those of the
    image tokens that are left out.

    Attributes:
        keep: share of a record's image tokens that are kept, in (0, 1].
        seed: of the stage.
        image_token: id of the token that image features replace.
    """

    keep: float
    seed: int
    image_token: int

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch with shorter targets, and the columns that models have to keep of its inputs.

        Args:
            batch: padded on the right, not packed.
            step: of the stage.
        """
        ids, mask = (batch.inputs[name] for name in ("input_ids", "attention_mask"))  # [R, T]
        keep = mask.bool().cpu()
        vision = (ids == self.image_token).cpu() & keep
        count = len(batch.targets.input_ids)
        for row in vision.any(1).nonzero()[:, 0].tolist():
            record = batch.indices[row % len(batch.indices)] if row < count else FILLER
            keep[row, self._left_out(vision[row], step, record)] = False
        kept = KeptTokens.of(keep).to(ids.device)
        return replace(batch, targets=_shorter(batch.targets, kept.truncate(count)), kept=kept)

    def _left_out(self, vision: Tensor, step: int, record: int) -> Tensor:
        """Columns of the image tokens that are left out of a row.

        Args:
            vision: [T] bool, image tokens.
            step: of the stage.
            record: its index.
        """
        last = vision.clone()
        last[:-1] &= ~vision[1:]
        free = (vision & ~last).nonzero()[:, 0]
        total = int(vision.sum())
        digest = sha256(f"{self.seed} {step} {record}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        order = torch.randperm(len(free), generator=generator)
        return free[order[: total - round(self.keep * total)]]


def _shorter(targets: Targets, kept: KeptTokens) -> Targets:
    """The targets of the kept tokens.

    Args:
        targets: [B, T], of rows that are not packed.
        kept: tokens of the same rows.
    """

    def moved(x: Tensor | None, fill: Any) -> Tensor | None:
        return None if x is None else kept(x).masked_fill(~kept.real, fill)

    made: dict[str, Any] = {
        name: moved(getattr(targets, name), fill)
        for name, fill in {
            "input_ids": 0,
            "attention": False,
            "response": False,
            "vision": False,
            "vision_labels": IGNORED,
            "background": False,
            "sources": -1,
        }.items()
    }
    chunks = targets.chunks
    if chunks is not None:
        new = kept.new_columns(targets.input_ids.shape[1])
        student, teacher = (
            _moved_chunks(tokens, new, kept) for tokens in (chunks.student, chunks.teacher)
        )
        chunks = Chunks(student, teacher, chunks.boundaries)
    return replace(targets, **made, chunks=chunks)


def _moved_chunks(tokens: ChunkTokens, new: Tensor, kept: KeptTokens) -> ChunkTokens:
    """Chunks with rows of the shorter sequences. All tokens of answers, and those before them, are
    kept.

    Args:
        tokens: of one model, whose processor is the student's.
        new: [B, T] int64, the columns of kept tokens in the shorter rows.
        kept: tokens of the same rows.
    """
    row = tokens.rows // new.shape[1]
    return replace(tokens, rows=row * kept.real.shape[1] + new.flatten()[tokens.rows])
