"""How a model predicts given tokens: loss, margin and entropy of each prediction.

With p = softmax(W h + b), p_1 >= p_2 >= ... in order of size, and the true token y:

    nll = -log p_y        margin = p_1 - p_2        entropy = -sum_v p_v log p_v
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.ops.calibration import logit_chunks
from mmkd.ops.head_losses import CHUNK_BYTES


@dataclass(frozen=True)
class TokenScores:
    """Scores of N predictions.

    Attributes:
        nll: [N] float64, in nats.
        margin: [N] float64, between 0 and 1.
        entropy: [N] float64, in nats.
    """

    nll: Tensor
    margin: Tensor
    entropy: Tensor


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> TokenScores:
    """Score next-token distributions softmax(W h + b) on true tokens. Logits are computed in chunks
    of rows, and the rest in float64.

    Args:
        hidden: [N, H], final hidden states, on any device.
        weight: [V, H], the head. The computation runs on its device.
        targets: [N] int64, below `vocab_size`.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        Scores on the CPU.

    Raises:
        ValueError: shapes that do not match, or a head of fewer than two tokens.
    """
    if len(weight[:vocab_size]) < 2:
        raise ValueError("a margin needs a head of at least two tokens")
    parts = [
        _scores(logits, true)
        for logits, true in logit_chunks(
            hidden, weight, targets, bias, vocab_size, chunk_size, memory
        )
    ]
    found = torch.cat([torch.empty(3, 0, dtype=torch.float64), *parts], 1)
    return TokenScores(*found)


def _scores(logits: Tensor, true: Tensor) -> Tensor:
    """nll, margin and entropy, [3, C] on the CPU.

    Args:
        logits: [C, V] float64.
        true: [C] int64.
    """
    log_p = logits.log_softmax(1)  # [C, V]
    first, second = log_p.topk(2, 1).values.exp().unbind(1)
    nll = -log_p.gather(1, true[:, None])[:, 0]
    return torch.stack([nll, first - second, torch.special.entr(log_p.exp_()).sum(1)]).cpu()
