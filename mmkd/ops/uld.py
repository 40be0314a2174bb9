"""Universal Logit Distillation: distributions over any two vocabularies, compared by rank.

Let p and q be the probabilities of teacher and student for one row, each sorted in descending
order, the shorter one padded with zeros:

    L = sum_i |p_(i) - q_(i)|

This is the Wasserstein distance of Boizard et al. 2024 (arXiv 2402.12030), with the same distance
between all pairs of tokens, so that tokens of the two vocabularies need not be matched.

Let g_i = sign(q_(i) - p_(i)), in the order of the student's tokens. The gradient with respect to
the student's logits is q (g - <q, g>).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.ops.head_losses import (
    CHUNK_BYTES,
    add_gradients,
    differentiable,
    new_gradients,
    project,
    rows_per_chunk,
    scaled_gradients,
)
from mmkd.ops.terms import Head

BUFFERS = 9
"""Blocks of [chunk, V] that are there at one time; the order of a sort is two."""


def linear_uld(
    student: Head,
    teacher: Head,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> Tensor:
    """The sum of the distances of N rows' distributions, without logits for all rows.

    Args:
        student: hidden [N, H], weight [V, H]; gets gradients where `requires_grad` is set.
        teacher: hidden [N, H'], weight [V', H']; gets none.
        vocab_size: later rows of both heads get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        A scalar in at least float32, between 0 and 2 N, differentiable once. Without rows: 0
        with zero gradients.

    Raises:
        ValueError: the two have different numbers of rows.
    """
    rows = len(student.hidden)
    if len(teacher.hidden) != rows:
        raise ValueError(f"{rows} student rows but {len(teacher.hidden)} teacher rows")
    mine, theirs = (
        Head(h.hidden, h.weight[:vocab_size], None if h.bias is None else h.bias[:vocab_size])
        for h in (student, teacher)
    )
    widest = max(len(mine.weight), len(theirs.weight))
    chunk = rows_per_chunk(rows, widest, chunk_size, 4 * BUFFERS, memory)
    with torch.autocast(mine.hidden.device.type, enabled=False):
        tensors = differentiable(mine.hidden, mine.weight, mine.bias)
        return _Uld.apply(*tensors, theirs, chunk)


class _Uld(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: Head, chunk: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own = weight.to(hidden.dtype)
        grads = new_gradients(ctx.needs_input_grad, hidden, weight, bias, wide)
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            q = project(hidden[rows], own, bias).softmax(1)  # [C, V]
            p = project(teacher.hidden[rows], teacher.weight, teacher.bias).softmax(1)  # [C, V']
            value, slope = _distance(q, p.to(q.dtype))
            total += value
            grad = q * (slope - (q * slope).sum(1, keepdim=True))  # [C, V]
            add_gradients(grads, grad, rows, hidden, own)
        ctx.grads = grads
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return (*scaled_gradients(ctx, grad_outputs[0]), None, None)


def _distance(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over rows of [C, V] and [C, V'], in float64, and its gradient by q."""
    ranked, order = q.sort(1, descending=True)
    other = p.sort(1, descending=True).values
    width, rest = q.shape[1], other[:, q.shape[1] :]
    apart = ranked.sub_(F.pad(other[:, :width], (0, max(0, width - p.shape[1]))))
    value = apart.abs().sum(dtype=torch.float64) + rest.sum(dtype=torch.float64)
    return value, torch.empty_like(q).scatter_(1, order, apart.sign_())
