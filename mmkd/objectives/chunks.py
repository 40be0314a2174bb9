"""Chunks: pieces of responses that begin and end at a token boundary of two tokenizers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTokens:
    """The n tokens of all chunks of a batch, as one model tokenizes them.

    Attributes:
        rows: [n] int64, indices into the model's [B * T] of the positions that predict the tokens.
        ids: [n] int64, the tokens.
        chunk: [n] int64, index of each token's chunk: ascending, from 0, without gaps.
    """

    rows: Tensor
    ids: Tensor
    chunk: Tensor

    @property
    def count(self) -> int:
        """Number of chunks."""
        return int(self.chunk[-1]) + 1 if len(self.chunk) else 0

    @property
    def first_rows(self) -> Tensor:
        """[chunks] int64: for each chunk, the position that predicts its first token."""
        first = torch.ones_like(self.chunk, dtype=torch.bool)
        first[1:] = self.chunk[1:] != self.chunk[:-1]
        return self.rows[first]

    def to(self, device: torch.device) -> "ChunkTokens":
        return ChunkTokens(self.rows.to(device), self.ids.to(device), self.chunk.to(device))


@dataclass(frozen=True)
class Chunks:
    """The same chunks as tokenized by student and teacher."""

    student: ChunkTokens
    teacher: ChunkTokens

    def to(self, device: torch.device) -> "Chunks":
        return Chunks(self.student.to(device), self.teacher.to(device))
