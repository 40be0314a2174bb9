"""Next-token cross-entropy from hidden states, without logits for all rows."""

import torch
from torch import Tensor

from mmkd.ops.linear_loss import kept_rows, linear_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Mean of -log softmax(W h + b)[target] over the kept rows.

    Args:
        hidden: [N, H], final hidden states.
        weight: [V, H], the head.
        targets: [N] int64; only the kept rows' are read.
        mask: [N] bool, True for rows that count; None keeps all.
        bias: [V] or None.
        vocab_size: rows of the head past it get no mass.
        chunk_size: rows projected at once; chosen by memory if None.

    Returns:
        Scalar in at least float32. Zero kept rows give 0 with zero gradients.
    """
    kept_targets = targets if mask is None else targets[mask]

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, kept_targets[rows], reduction="sum")

    kept = kept_rows(hidden, mask)
    total = linear_loss(
        kept,
        weight[:vocab_size],
        None if bias is None else bias[:vocab_size],
        row_loss,
        chunk_size=chunk_size,
    )
    return total / max(kept.shape[0], 1)
