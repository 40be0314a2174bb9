"""Log-probabilities of given tokens from hidden states, without logits for all rows.

    l_i = log softmax(W h_i + b)[y_i],   dl_i / dz_i = onehot(y_i) - softmax(z_i),   z_i = W h_i + b

The result is a value per row, so the upstream gradients are not known in the forward pass. The
gradient of a hidden state is the upstream gradient of its row times a vector, which the forward
pass computes. The gradient of the head is a sum over rows with the upstream gradients as weights:
for it, the backward pass computes the logits of each chunk again, unless the head is frozen.
`mmkd.ops.pair_loss` avoids this for losses of pairs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkd.ops.distributions import Workspace
from mmkd.ops.head_losses import (
    CHUNK_BYTES,
    HeadGradients,
    add_product,
    differentiable,
    in_dtypes_of,
    new_gradients,
    project,
    rows_per_chunk,
)

SOFTMAX_PARTS = 8
"""A chunk's softmax is computed in this many parts, which share a small second buffer."""


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
    check_rows(hidden, targets)
    width = len(weight[:vocab_size])
    chunk = logps_per_chunk(hidden, width, chunk_size, memory)
    tensors = differentiable(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenLogps.apply(*tensors, targets, width, chunk)


def check_rows(hidden: Tensor, targets: Tensor) -> None:
    """
    Raises:
        ValueError: shapes that do not match.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [N, H] and targets [N], got {list(hidden.shape)} and "
            f"{list(targets.shape)}"
        )


def logps_per_chunk(hidden: Tensor, vocabulary: int, chunk_size: int | None, memory: int) -> int:
    """How many rows `TokenRows` projects at once; by default what fits in `memory` bytes."""
    size = wide(hidden).itemsize
    bytes_each = size + size // SOFTMAX_PARTS + (size % SOFTMAX_PARTS > 0)
    if hidden.dtype != wide(hidden):
        bytes_each += hidden.dtype.itemsize  # logits or their gradients in the narrower dtype
    return rows_per_chunk(len(hidden), vocabulary, chunk_size, bytes_each, memory)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        width: int,
        chunk: int,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:3])
        tokens = TokenRows(hidden, weight, bias, targets, width, gradients=wanted)
        found = hidden.new_empty(len(hidden), dtype=wide(hidden))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in chunks_of(len(hidden), chunk):
            found[rows] = tokens.logps(rows)
            if slope is not None:
                slope[rows] = tokens.hidden_gradient()
        ctx.save_for_backward(hidden, weight, bias, targets, slope)
        ctx.sizes = width, chunk
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, weight, bias, targets, slope = ctx.saved_tensors
        width, chunk = ctx.sizes
        wanted = (False, *ctx.needs_input_grad[1:3])
        grads = new_gradients(wanted, hidden, weight, bias, wide(hidden))
        if any(wanted):
            tokens = TokenRows(hidden, weight, bias, targets, width)
            for rows in chunks_of(len(hidden), chunk):
                tokens.logps(rows)
                tokens.add_head_gradients(grads, rows, grad[rows])
        of_hidden = None if slope is None else slope * grad[:, None]
        return (*in_dtypes_of((of_hidden, *grads[1:]), hidden, weight, bias), None, None, None)


class TokenRows:
    """Log-probabilities of a chunk of rows, and the gradients of these.

    `logps` projects a chunk and keeps softmax(z) - onehot(y) for it in a buffer. The other methods
    read the chunk that was projected last.

    Args:
        hidden: [N, H], final hidden states.
        weight: [V, H], the head.
        bias: [V] or None.
        targets: [N] int64, the tokens y.
        width: tokens with a probability: the first rows of the head.
        gradients: False where only log-probabilities are wanted.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        width: int,
        gradients: bool = True,
    ):
        self.hidden, self.targets, self.width, self.gradients = hidden, targets, width, gradients
        self.weight = weight[:width].to(hidden.dtype)
        self.bias = None if bias is None else bias[:width]
        self._workspace = Workspace(wide(hidden), hidden.device)
        self._error = hidden.new_empty(0)  # softmax(z) - onehot(y), [C, V]

    def logps(self, rows: slice | Tensor) -> Tensor:
        """Log-probabilities of the tokens of a chunk of rows, [C] in at least float32."""
        hidden, token = self.hidden[rows], self.targets[rows, None]
        z = project(hidden, self.weight, self.bias, self._workspace("z", len(hidden), self.width))
        found = z.gather(1, token)[:, 0]
        part = -(-len(z) // SOFTMAX_PARTS) or 1
        for start in range(0, len(z), part):
            some = z[start : start + part]
            q = self._workspace("q", *some.shape)
            torch.softmax(some, 1, out=q)
            # torch.logsumexp takes several times as long on CPUs, and the memory of the logits.
            found[start : start + part] -= some.amax(1) - q.amax(1).log_()
            if self.gradients:
                some.copy_(q)
        if self.gradients:
            self._error = z.scatter_add_(1, token, z.new_full((), -1).expand_as(token))
        return found

    def hidden_gradient(self) -> Tensor:
        """Gradient of each row's log-probability with respect to its hidden state, [C, H]."""
        return (self._error.to(self.hidden.dtype) @ self.weight).neg_()

    def add_head_gradients(
        self, into: HeadGradients, rows: slice | Tensor, upstream: Tensor
    ) -> None:
        """Add the gradients of the head.

        Args:
            into: of `new_gradients`.
            rows: those of the last call of `logps`.
            upstream: [C], gradients of the loss with respect to the log-probabilities.
        """
        _, of_weight, of_bias = into
        if of_bias is not None:
            of_bias[: self.width] -= upstream.to(self._error.dtype) @ self._error
        if of_weight is not None:
            # A factor of rows of hidden states is cheaper than one of rows of logits.
            scaled = (self.hidden[rows] * -upstream[:, None]).to(self.hidden.dtype)
            error = self._error.to(self.hidden.dtype)
            add_product(of_weight[: self.width], error.t(), scaled)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums over logits: that of `x`, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def chunks_of(rows: int, chunk: int) -> list[slice]:
    """The rows of each chunk."""
    return [slice(i, i + chunk) for i in range(0, rows, chunk)]
