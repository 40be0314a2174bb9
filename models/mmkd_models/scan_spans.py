"""Divide a scan into blocks of chunks that fit the CPU cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}  # elements of the [T, T] matrices of all heads


@dataclass(frozen=True)
class Span:
    """A block that is computed together: `rows` of the batch, `chunks` times `size` tokens."""

    rows: slice
    start: int
    chunks: int
    size: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.size)

    def cut(self, t: Tensor) -> Tensor:
        """View [B, L, X, ...] as [b, K, X, T, ...]."""
        return t[self.rows, self.tokens].unflatten(1, (self.chunks, self.size)).transpose(2, 3)

    def copy(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, L, X, Y] as contiguous [b, K, X, T, Y]."""
        part = self.cut(t)
        return torch.empty(part.shape, dtype=dtype, device=t.device).copy_(part)

    def copy_heads(self, t: Tensor, states: int, dtype: torch.dtype) -> Tensor:
        """[B, L, S R, Y] as contiguous [b, K, S, R T, Y]."""
        part = self.copy(t, dtype)
        return part.reshape(*part.shape[:2], states, -1, part.shape[-1])

    def write(self, target: Tensor, values: Tensor) -> None:
        """Write [b, K, X, T, ...] or [b, K, S, R T, ...] into [B, L, X, ...]."""
        part = self.cut(target)
        part.copy_(values.reshape(part.shape))


def _row_blocks(batch: int, heads: int, size: int, budget: int) -> Iterator[slice]:
    rows = max(1, budget // (heads * size * size))
    for first in range(0, batch, rows):
        yield slice(first, min(first + rows, batch))


def _spans(rows: slice, length: int, heads: int, size: int, budget: int) -> list[Span]:
    chunks = max(1, budget // ((rows.stop - rows.start) * heads * size * size))
    whole = length // size
    spans = [
        Span(rows, first * size, min(chunks, whole - first), size)
        for first in range(0, whole, chunks)
    ]
    if length % size:
        spans.append(Span(rows, whole * size, 1, length % size))
    return spans


def plan_spans(
    batch: int, length: int, heads: int, chunk_size: int, device: torch.device
) -> list[list[Span]]:
    """Spans in the order of computation, one list for each block of rows of the batch.

    Args:
        batch: number of rows.
        length: number of tokens per row.
        heads: number of heads that have a [T, T] matrix.
        chunk_size: T.
        device: decides the size of a block.
    """
    budget = BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])
    size = min(chunk_size, length)
    return [
        _spans(rows, length, heads, size, budget)
        for rows in _row_blocks(batch, heads, size, budget)
    ]
