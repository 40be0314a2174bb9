"""Next-token cross-entropy from hidden states, without logits for all rows."""

from torch import Tensor

from mmkd.ops.head_losses import CHUNK_BYTES, head_losses
from mmkd.ops.terms import Head, HeadLoss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
    backend: str = "auto",
) -> Tensor:
    """Mean of -log softmax(W h + b)[target] over the rows of the mask.

    Args:
        hidden: [N, H], final hidden states.
        weight: [V, H], the head.
        targets: [N] int64; read only at rows of the mask.
        mask: [N] bool, True for rows that count; None keeps all.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size, memory, backend: as in `head_losses`.

    Returns:
        Scalar in at least float32. Without rows: 0 with zero gradients.
    """
    loss = HeadLoss("ce", mask, targets=targets, vocab_size=vocab_size)
    total, _ = head_losses(
        Head(hidden, weight, bias),
        [loss],
        chunk_size=chunk_size,
        memory=memory,
        backend=backend,
    )
    return total / max(len(hidden) if mask is None else int(mask.sum()), 1)
