"""Log-probabilities of a set of tokens from hidden states, without logits for all rows.

    l_i = log sum_{v in S} softmax(W h_i + b)[v] = -log(1 + exp(r_i - s_i))

s and r are the logarithms of the sums of exp(logits) over the set and over all other tokens. The
second form never exceeds 0, and keeps its precision where the set has nearly all probability. The
backward pass computes the logits of each chunk again.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.ops.head_losses import (
    CHUNK_BYTES,
    add_gradients,
    differentiable,
    in_dtypes_of,
    new_gradients,
    project,
    rows_per_chunk,
)
from mmkd.ops.token_logps import chunks_of, wide


def set_logps(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> Tensor:
    """The log-probability that a row's next token is in a set.

    Args:
        hidden: [N, H], final hidden states.
        weight: [V, H], the head.
        mask: [M] bool with M <= V: the tokens of the set. Later rows of the head are not in it.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        [N] in at least float32, at most 0, differentiable once in hidden, weight and bias. -inf
        for an empty set.

    Raises:
        ValueError: shapes that do not match.
    """
    weight = weight[:vocab_size]
    bias = None if bias is None else bias[:vocab_size]
    if hidden.dim() != 2 or mask.dim() != 1 or len(mask) > len(weight):
        raise ValueError(
            f"hidden must be [N, H] and mask at most [{len(weight)}], got {list(hidden.shape)} and "
            f"{list(mask.shape)}"
        )
    mask = F.pad(mask, (0, len(weight) - len(mask)))
    chunk = rows_per_chunk(hidden.shape[0], weight.shape[0], chunk_size, memory=memory)
    with torch.autocast(hidden.device.type, enabled=False):
        return _SetLogps.apply(*differentiable(hidden, weight, bias), mask, chunk)


class _SetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, chunk: int
    ) -> Tensor:
        found = hidden.new_empty(len(hidden), dtype=wide(hidden))
        for rows in chunks_of(len(hidden), chunk):
            logits = project(hidden[rows], weight, bias)  # [C, V]
            inside = logits.masked_fill(~mask, -math.inf).logsumexp(1)
            outside = logits.masked_fill_(mask, -math.inf).logsumexp(1)
            found[rows] = -F.softplus(outside - inside)
        ctx.save_for_backward(hidden, weight, bias, mask, found)
        ctx.chunk = chunk
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, bias, mask, found = ctx.saved_tensors
        grads = new_gradients(ctx.needs_input_grad, hidden, weight, bias, wide(hidden))
        own = weight.to(hidden.dtype)
        for rows in chunks_of(len(hidden), ctx.chunk):
            # d l / d logits = (1 - P(set)) (softmax over the set - softmax over the other tokens)
            logits = project(hidden[rows], weight, bias)  # [C, V]
            inside = logits.masked_fill(~mask, -math.inf).softmax(1)
            # NaN if there are no other tokens
            outside = logits.masked_fill_(mask, -math.inf).softmax(1).nan_to_num_(nan=0.0)
            rest = -found[rows, None].expm1()  # [C, 1], probability of the other tokens
            step = inside.sub_(outside).mul_(rest * grad[rows, None])
            add_gradients(grads, step, rows, hidden, own)
        return (*in_dtypes_of(grads, hidden, weight, bias), None, None)
