"""Log-probabilities of given tokens from hidden states, without logits for all rows.

    l_i = log softmax(W h_i + b)[y_i]

Unlike in `head_losses`, the result is a value per row, so gradients cannot be computed in the
forward pass. The backward pass computes the logits of each chunk again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.ops.head_losses import CHUNK_BYTES, project, rows_per_chunk


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> Tensor:
    """The log-probability of each row's token.

    Args:
        hidden: [N, H], final hidden states.
        weight: [V, H], the head.
        targets: [N] int64, below `vocab_size`.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        [N] in at least float32, differentiable once in hidden, weight and bias.

    Raises:
        ValueError: shapes that do not match.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [N, H] and targets [N], got {list(hidden.shape)} and "
            f"{list(targets.shape)}"
        )
    weight = weight[:vocab_size]
    bias = None if bias is None else bias[:vocab_size]
    chunk = rows_per_chunk(hidden.shape[0], weight.shape[0], chunk_size, memory=memory)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(hidden, weight, bias, targets, chunk)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk = chunk
        found = hidden.new_empty(len(hidden), dtype=wide(hidden))
        for rows in chunks_of(len(hidden), chunk):
            logits = project(hidden[rows], weight, bias)  # [C, V]
            chosen = logits.gather(1, targets[rows, None])[:, 0]
            found[rows] = chosen - logits.logsumexp(1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, bias, targets = ctx.saved_tensors

        def step(rows: slice) -> Tensor:
            # d l / d logits = onehot - softmax
            step = project(hidden[rows], weight, bias).softmax(1).neg_()  # [C, V]
            step.scatter_add_(1, targets[rows, None], torch.ones_like(step[:, :1]))
            return step.mul_(grad[rows, None])

        wanted = ctx.needs_input_grad[:3]
        return (*head_gradients(hidden, weight, bias, wanted, step, ctx.chunk), None, None)


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: Sequence[bool],
    step: Callable[[slice], Tensor],
    chunk: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from those of the logits, chunk by chunk.

    Args:
        hidden: [N, H].
        weight: [V, H].
        bias: [V] or None.
        wanted: which of the three gradients are computed; the others are None.
        step: maps a chunk of rows to the gradient of its logits, [C, V].
        chunk: number of rows of a chunk.
    """
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide(hidden)) if wanted[1] else None
    grad_bias = None
    if bias is not None and wanted[2]:
        grad_bias = torch.zeros_like(bias, dtype=wide(hidden))
    for rows in chunks_of(len(hidden), chunk):
        logits = step(rows)
        if grad_bias is not None:
            grad_bias += logits.sum(0)
        narrow = logits.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden[rows] = narrow @ weight.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight += narrow.t() @ hidden[rows]
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over logits: that of `x`, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def chunks_of(rows: int, chunk: int) -> list[slice]:
    """The rows of each chunk."""
    return [slice(i, i + chunk) for i in range(0, rows, chunk)]
