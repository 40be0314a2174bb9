"""Temperature scaling: the temperature with the least negative log-likelihood (Guo et al., arXiv
1706.04599, section 4.2).

With b = 1 / T and logits z, the loss of a row with true token y is

    l(b) = logsumexp(b z) - b z_y,   l'(b) = E_p[z] - z_y,   l''(b) = Var_p[z],

where p = softmax(b z). It is convex in b, so its minimum is where the mean of l' is 0. The
temperature does not change which token is the most likely one.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mmkd.ops.calibration import logit_chunks
from mmkd.ops.head_losses import CHUNK_BYTES

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures between which the minimum is searched."""
TOLERANCE = 1e-9
"""Relative change of the temperature at which the search ends."""
MOST_PASSES = 100


class NoMinimumError(ValueError):
    """The loss still falls at a bound of the temperature.

    Attributes:
        lowest: at the lowest temperature; False at the highest.
    """

    def __init__(self, temperature: float, *, lowest: bool):
        self.lowest = lowest
        bound = "lowest" if lowest else "highest"
        super().__init__(
            f"the negative log-likelihood still falls at temperature {temperature:g}, the {bound} "
            "one that is tried"
        )


@torch.no_grad()
def fit_temperature(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> float:
    """The temperature that minimises the mean negative log-likelihood of true tokens.

    Newton's method in 1 / T, in float64; a step that leaves the interval in which the minimum must
    be is replaced by its geometric mean. Each step is one pass over the rows, in chunks. The result
    is deterministic.

    Args:
        hidden: [N, H], final hidden states, on any device.
        weight: [V, H], the head. The computation runs on its device.
        targets: [N] int64, below `vocab_size`.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Raises:
        NoMinimumError: there is none between `LOWEST` and `HIGHEST`. If every prediction is right,
            the loss falls to 0 with T; if they are no better than chance, it falls as T grows.
        ValueError: shapes that do not match, no rows, or logits that are not finite.
    """
    if not len(hidden):
        raise ValueError("there are no rows")
    bottom, top = 1 / HIGHEST, 1 / LOWEST
    low, high, b = bottom, top, 1.0
    tested: set[float] = set()
    for _ in range(MOST_PASSES):
        chunks = logit_chunks(hidden, weight, targets, bias, vocab_size, chunk_size, memory)
        slope, curvature = _derivatives(chunks, b, len(hidden))
        if not math.isfinite(slope) or not math.isfinite(curvature):
            raise ValueError("the logits are not finite")
        tested.add(b)
        if slope == 0:
            break
        if (slope < 0 and b == top) or (slope > 0 and b == bottom):
            raise NoMinimumError(1 / b, lowest=b == top)
        low, high = (b, high) if slope < 0 else (low, b)
        step = b - slope / curvature if curvature > 0 else math.inf
        if not low < step < high:
            bound = high if slope < 0 else low
            step = math.sqrt(low * high) if bound in tested else bound
        done = abs(math.log(step / b)) < TOLERANCE
        b = step
        if done:
            break
    return 1 / b


def _derivatives(
    chunks: Iterable[tuple[Tensor, Tensor]], b: float, rows: int
) -> tuple[float, float]:
    """First and second derivative of the mean loss at 1 / T = b."""
    slope = curvature = 0.0
    for logits, targets in chunks:
        p = (b * logits).softmax(1)  # [C, V]
        true = logits.gather(1, targets[:, None])  # [C, 1]
        ahead = logits - true  # [C, V]; differences, so that large equal logits cancel
        mean = (p * ahead).sum(1, keepdim=True)  # [C, 1]
        slope += float(mean.sum())
        curvature += float((p * (ahead - mean).square()).sum())
    return slope / rows, curvature / rows
