"""Chunks: pieces of responses that begin and end at a token boundary of two tokenizers."""

from dataclasses import dataclass, replace

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
        return self.rows[self._changes(0)]

    @property
    def first_ids(self) -> Tensor:
        """[chunks] int64: the first token of each chunk."""
        return self.ids[self._changes(0)]

    @property
    def last_rows(self) -> Tensor:
        """[chunks] int64: for each chunk, the position of its last token, which predicts the token
        after the chunk."""
        return self.rows[self._changes(1)] + 1

    @property
    def follows(self) -> Tensor:
        """[chunks] bool: chunks that come directly after the chunk before them."""
        first, last = self.first_rows, self.last_rows
        return torch.cat([first[:1] < 0, first[1:] == last[:-1]])

    def _changes(self, offset: int) -> Tensor:
        """[n] bool: the first token of each chunk (offset 0), or the last one (offset 1)."""
        marks = torch.ones(len(self.chunk) + 1, dtype=torch.bool, device=self.chunk.device)
        marks[1:-1] = self.chunk[1:] != self.chunk[:-1]
        return marks[offset : offset + len(self.chunk)]

    def where(self, chosen: Tensor) -> "ChunkTokens":
        """The tokens of some chunks, [chunks] bool."""
        kept = chosen[self.chunk]
        numbers = chosen.cumsum(0) - 1
        return ChunkTokens(self.rows[kept], self.ids[kept], numbers[self.chunk[kept]])

    def to(self, device: torch.device) -> "ChunkTokens":
        return ChunkTokens(self.rows.to(device), self.ids.to(device), self.chunk.to(device))


@dataclass(frozen=True)
class Boundaries:
    """What is needed for the probability that a text ends where a chunk ends.

    Attributes:
        answer: [chunks] int64, index of each chunk's answer: ascending.
        closing: [chunks] bool, chunks that are the end of a turn. No text can continue them.
        student, teacher: [V] bool, the tokens of each model that begin with white space or are
            special. A text is complete if one of them comes next.
    """

    answer: Tensor
    closing: Tensor
    student: Tensor
    teacher: Tensor

    def where(self, chosen: Tensor) -> "Boundaries":
        """The boundaries of some chunks, [chunks] bool."""
        return replace(self, answer=self.answer[chosen], closing=self.closing[chosen])

    def to(self, device: torch.device) -> "Boundaries":
        return Boundaries(**{name: x.to(device) for name, x in vars(self).items()})


@dataclass(frozen=True)
class Chunks:
    """The same chunks as tokenized by student and teacher.

    Attributes:
        student, teacher: the tokens of each model.
        boundaries: where chunks end; None if it was not asked for.
    """

    student: ChunkTokens
    teacher: ChunkTokens
    boundaries: Boundaries | None = None

    def where(self, chosen: Tensor) -> "Chunks":
        """Some of the chunks, [chunks] bool; all or none of an answer."""
        bounds = None if self.boundaries is None else self.boundaries.where(chosen)
        return Chunks(self.student.where(chosen), self.teacher.where(chosen), bounds)

    def to(self, device: torch.device) -> "Chunks":
        bounds = None if self.boundaries is None else self.boundaries.to(device)
        return Chunks(self.student.to(device), self.teacher.to(device), bounds)
