"""The loop that the losses over a vocabulary share: rows through the head in chunks.

A loss over N rows and V tokens needs logits [N, V]. Here only [chunk, V] exist at any time: the
gradient is taken chunk by chunk during the forward pass, while that chunk's logits are there, and
the backward pass scales what was stored. Rows that are masked out never meet the head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # of [chunk, V]: 64 MiB in float32

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits [C, V], rows) -> summed loss; `rows` is where the chunk lies among the kept rows."""


def rows_per_chunk(rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """How many rows to project at once; by default what fits in `CHUNK_ELEMENTS` logits."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, it must be at least 1")
    return max(1, min(rows, chunk_size or max(16, CHUNK_ELEMENTS // vocabulary)))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits [C, V] in at least float32; the product itself runs in the hidden states' dtype."""
    logits = hidden @ weight.to(hidden.dtype).t()  # [C, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits + bias.to(logits.dtype)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row_loss: RowLoss,
        chunk: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if need_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            logits = project(hidden[rows], weight, bias)  # [C, V]
            with torch.enable_grad():
                logits.requires_grad_(need_hidden or need_weight or need_bias)
                loss = row_loss(logits, rows)
            total += loss.detach()
            if not logits.requires_grad:
                continue
            (grad,) = torch.autograd.grad(loss, logits)  # [C, V]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple:
        scale = grad_output[0]
        grads = [
            None if grad is None else (grad * scale).to(dtype)
            for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_loss: RowLoss,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum of `row_loss` over all rows, differentiable in hidden, weight and bias (once).

    Args:
        hidden: [N, H], floating point; the rows that count.
        weight: [V, H].
        bias: [V] or None.
        row_loss: called once a chunk; must be a sum over the chunk's rows.
        chunk_size: rows per chunk; chosen by memory if None.
    """
    if hidden.shape[0] == 0:
        # Keeps the graph: the gradients are zeros, not None, on ranks that have no row.
        zero = hidden.sum() + weight.sum() * 0
        return zero if bias is None else zero + bias.sum() * 0
    chunk = rows_per_chunk(hidden.shape[0], weight.shape[0], chunk_size)
    # Autocast would re-round the float32 reductions and matmuls that are explicit here.
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearLoss.apply(hidden, weight, bias, row_loss, chunk)


def kept_rows(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [K, H] where the mask is True."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden states must be [N, H], got {list(hidden.shape)}")
    if mask is None:
        return hidden
    if mask.dtype != torch.bool or mask.shape != hidden.shape[:1]:
        raise ValueError(
            f"mask must be bool [{hidden.shape[0]}], got {mask.dtype} {list(mask.shape)}"
        )
    return hidden[mask]
