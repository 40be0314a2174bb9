"""Inner products of Gram matrices, without building the matrices.

    <A A^T, B B^T> = sum_ij (a_i . a_j) (b_i . b_j) = |A^T B|^2

by tiles of tokens (cost n^2 (Da + Db)) or of features (n Da Db), whichever is cheaper. The second
form is that of linear CKA (Kornblith et al. 2019, arXiv 1905.00414).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 2**22  # elements in memory at the same time


def gram_inner(a: Tensor, b: Tensor, *, diagonal: bool = True) -> Tensor:
    """The inner product of two Gram matrices.

    Differentiable once, in memory that does not grow with n^2.

    Args:
        a: [n, Da].
        b: [n, Db], of a's dtype.
        diagonal: include i = j.

    Returns:
        A scalar in the inputs' dtype.

    Raises:
        ValueError: shapes that do not match.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        raise ValueError(f"a and b must be [n, D], got {list(a.shape)} and {list(b.shape)}")
    inner: Tensor = _GramInner.apply(a, b)
    if diagonal:
        return inner
    return inner - (a.square().sum(1) * b.square().sum(1)).sum()


class _GramInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        total = a.new_zeros(())
        if _by_tokens(a, b):
            for rows in _tiles(len(a), len(a)):
                total += ((a[rows] @ a.T) * (b[rows] @ b.T)).sum()
        else:
            for columns in _tiles(a.shape[1], b.shape[1]):
                total += (a[:, columns].T @ b).square().sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        if _by_tokens(a, b):
            for rows in _tiles(len(a), len(a)):
                grad_a[rows] = (b[rows] @ b.T) @ a
                grad_b[rows] = (a[rows] @ a.T) @ b
        else:
            for columns in _tiles(a.shape[1], b.shape[1]):
                tile = a[:, columns].T @ b  # [columns, Db]
                grad_a[:, columns] = b @ tile.T
                grad_b += a[:, columns] @ tile
        return 2 * grad * grad_a, 2 * grad * grad_b


def _by_tokens(a: Tensor, b: Tensor) -> bool:
    return len(a) * (a.shape[1] + b.shape[1]) < a.shape[1] * b.shape[1]


def _tiles(count: int, width: int) -> list[slice]:
    """Slices of `count`, so that a tile of that many rows of `width` stays small."""
    size = max(1, TILE_ELEMENTS // max(width, 1))
    return [slice(i, i + size) for i in range(0, count, size)]
