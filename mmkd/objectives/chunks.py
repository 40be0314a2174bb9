"""Pieces of answers that two tokenizers have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTokens:
    """The tokens that one model spells a batch's chunks with, n in all.

    Attributes:
        rows: [n] int64, of the model's own [B * T], those that predict the tokens.
        ids: [n] int64, the tokens.
        chunk: [n] int64, which chunk each belongs to, ascending from 0, none left out.
    """

    rows: Tensor
    ids: Tensor
    chunk: Tensor

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return int(self.chunk[-1]) + 1 if len(self.chunk) else 0

    @property
    def first_rows(self) -> Tensor:
        """[chunks] int64: the row that predicts each chunk's first token."""
        first = torch.ones_like(self.chunk, dtype=torch.bool)
        first[1:] = self.chunk[1:] != self.chunk[:-1]
        return self.rows[first]

    def to(self, device: torch.device) -> "ChunkTokens":
        return ChunkTokens(self.rows.to(device), self.ids.to(device), self.chunk.to(device))


@dataclass(frozen=True)
class Chunks:
    """The same pieces of text as student and teacher spell them."""

    student: ChunkTokens
    teacher: ChunkTokens

    def to(self, device: torch.device) -> "Chunks":
        return Chunks(self.student.to(device), self.teacher.to(device))
