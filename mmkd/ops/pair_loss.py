"""Losses of pairs of sequences from hidden states, without logits for all rows.

    L = sum_p f_p(s_p, s'_p),   s = sum of log softmax(W h_i + b)[y_i] over the rows of a sequence

f_p is any function of the two log-probabilities of pair p, so the gradients of a pair need the
pair's own rows only. Pairs that fit in a chunk together are projected once: f_p is evaluated while
the softmax of their rows is in memory, and gradients are computed in the forward pass, as in
`head_losses`. If a single pair is larger than a chunk, its last chunk is projected once and the
others twice. A loss in which pairs depend on each other needs `token_logps`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkd.ops.head_losses import CHUNK_BYTES, differentiable, new_gradients, scaled_gradients
from mmkd.ops.token_logps import TokenRows, check_rows, logps_per_chunk, wide

PairLoss = Callable[[Tensor, slice], Tensor]
"""Maps the log-probabilities [2, p] of consecutive pairs, and the slice of these pairs, to the sum
of their losses."""


def linear_pair_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sequences: Tensor,
    pairs: int,
    loss: PairLoss,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over pairs of sequences.

    Args:
        hidden: [N, H], final hidden states of all sequences.
        weight: [V, H], the head.
        targets: [N] int64, the tokens y, below `vocab_size`.
        sequences: [N] int64, the sequence of each row. Sequences p and `pairs` + p are a pair.
        pairs: number of pairs.
        loss: of some pairs; differentiable, and called once for each group of consecutive pairs.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        The sum, differentiable once in hidden, weight and bias, and the log-probabilities,
        [2, pairs], without gradient; both in at least float32. Without pairs: 0 with zero
        gradients.

    Raises:
        ValueError: shapes that do not match.
    """
    check_rows(hidden, targets)
    if sequences.shape != targets.shape or (pairs < 1 and len(targets)):
        raise ValueError(
            f"{len(targets)} rows need as many sequences, of at least one pair, got "
            f"{list(sequences.shape)} and {pairs}"
        )
    width = len(weight[:vocab_size])
    chunk = logps_per_chunk(hidden, width, chunk_size, memory)
    tensors = differentiable(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return _PairLoss.apply(*tensors, targets, sequences, pairs, loss, width, chunk)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        sequences: Tensor,
        pairs: int,
        loss: PairLoss,
        width: int,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad[:3])
        grads = new_gradients(ctx.needs_input_grad, hidden, weight, bias, wide(hidden))
        tokens = TokenRows(hidden, weight, bias, targets, width, gradients=wanted)
        logps = hidden.new_zeros(2, pairs, dtype=wide(hidden))
        slopes = torch.zeros_like(logps)
        total = logps.new_zeros(())
        for some, rows in _groups(sequences, pairs, chunk):
            parts = _parts(rows, chunk)
            for part in parts:
                logps.view(-1).index_add_(0, sequences[part], tokens.logps(part))
                if grads[0] is not None:
                    grads[0][part] = tokens.hidden_gradient()
            value, slopes[:, some] = _evaluate(loss, logps[:, some], some, wanted)
            total += value
            upstream = slopes.view(-1)[sequences]
            if grads[0] is not None:
                grads[0][rows] *= upstream[rows, None].to(hidden.dtype)
            if grads[1] is not None or grads[2] is not None:
                for part in reversed(parts):
                    if part is not parts[-1]:
                        tokens.logps(part)
                    tokens.add_head_gradients(grads, part, upstream[part])
        ctx.grads = grads
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(logps)
        return total, logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        return (*scaled_gradients(ctx, grad_outputs[0]), *[None] * 6)


def _groups(sequences: Tensor, pairs: int, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive pairs that fit in a chunk together, or a single one, and their rows."""
    pair_of = sequences % max(pairs, 1)
    order = pair_of.argsort(stable=True)
    sizes: Sequence[int] = pair_of.bincount(minlength=pairs).tolist()
    first = start = 0
    while first < pairs:
        last, stop = first + 1, start + sizes[first]
        while last < pairs and stop + sizes[last] - start <= chunk:
            stop += sizes[last]
            last += 1
        yield slice(first, last), order[start:stop]
        first, start = last, stop


def _parts(rows: Tensor, chunk: int) -> Sequence[Tensor]:
    """Chunks of rows. The last one is full, because it is not projected again."""
    whole, rest = divmod(len(rows), chunk)
    sizes = [rest] * (rest > 0 or not whole) + [chunk] * whole
    return rows.split(sizes)


def _evaluate(
    loss: PairLoss, logps: Tensor, some: slice, wanted: bool
) -> tuple[Tensor, Tensor | float]:
    """The loss of some pairs, and its gradient [2, p] if `wanted`, else 0."""
    if not wanted:
        return loss(logps, some), 0.0
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_()
        value = loss(leaf, some)
        (slope,) = torch.autograd.grad(value, leaf)
    return value.detach(), slope
