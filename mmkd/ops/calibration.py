"""How well the confidence of predictions matches their accuracy.

A calibrated model is right on 80 % of the predictions that it makes with probability 0.8. The
expected calibration error sorts n predictions into bins B_m of equal width by their confidence:

    ECE = sum_m |B_m| / n * |acc(B_m) - conf(B_m)|    (Guo et al., arXiv 1706.04599, equation 3)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkd.ops.head_losses import CHUNK_BYTES, project, rows_per_chunk

BINS = 10
BYTES_EACH = 40
"""Bytes of a logit and of all that is computed from it: float32, and four times float64."""


@dataclass(frozen=True)
class Predictions:
    """The most likely outcome of each of N distributions, compared with the true one.

    Attributes:
        confidence: [N] float64, probability of the most likely outcome.
        correct: [N] bool, the most likely outcome is the true one.
        nll: [N] float64, negative log-likelihood of the true outcome.
        brier: [N] float64, squared distance to the distribution that has the true outcome only.
    """

    confidence: Tensor
    correct: Tensor
    nll: Tensor
    brier: Tensor

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.confidence).all() and torch.isfinite(self.nll).all())

    def cpu(self) -> "Predictions":
        tensors = (self.confidence, self.correct, self.nll, self.brier)
        return Predictions(*(tensor.cpu() for tensor in tensors))


def predictions(logits: Tensor, targets: Tensor) -> Predictions:
    """Compare distributions with true outcomes.

    Args:
        logits: [N, K].
        targets: [N] int64, below K.
    """
    log_p = logits.double().log_softmax(1)  # [N, K]
    p = log_p.exp()
    confidence, best = p.max(1)
    true = log_p.gather(1, targets[:, None])[:, 0]  # [N]
    brier = p.square().sum(1) - 2 * true.exp() + 1
    return Predictions(confidence, best == targets, -true, brier)


@torch.no_grad()
def token_predictions(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    memory: int = CHUNK_BYTES,
) -> Predictions:
    """Compare next-token distributions softmax((W h + b) / temperature) with true tokens. Logits
    are computed in chunks of rows, and the rest in float64.

    Args:
        hidden: [N, H], final hidden states, on any device.
        weight: [V, H], the head. The computation runs on its device.
        targets: [N] int64, below `vocab_size`.
        bias: [V] or None.
        vocab_size: later rows of the head get probability 0.
        temperature: divides the logits.
        chunk_size: rows projected at once; what fits in `memory` if None.
        memory: bytes for a chunk's logits and the tensors computed from them.

    Returns:
        Predictions on the CPU.

    Raises:
        ValueError: shapes that do not match, or a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"the temperature is {temperature}, it must be positive")
    parts = [
        predictions(logits / temperature, true)
        for logits, true in logit_chunks(
            hidden, weight, targets, bias, vocab_size, chunk_size, memory
        )
    ]
    names = ("confidence", "correct", "nll", "brier")
    empty = {n: torch.empty(0, dtype=torch.float64) for n in names} | {
        "correct": torch.empty(0, dtype=torch.bool)
    }
    return Predictions(
        **{n: torch.cat([empty[n], *(getattr(part, n).cpu() for part in parts)]) for n in names}
    )


def logit_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_size: int | None,
    chunk_size: int | None,
    memory: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over chunks of rows: logits [C, V] float64 and targets [C], on the head's device;
    arguments and errors as in `token_predictions`."""
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [N, H] and targets [N], got {list(hidden.shape)} and "
            f"{list(targets.shape)}"
        )
    weight = weight[:vocab_size]
    bias = None if bias is None else bias[:vocab_size]
    chunk = rows_per_chunk(len(hidden), len(weight), chunk_size, BYTES_EACH, memory)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        with torch.autocast(weight.device.type, enabled=False):
            logits = project(hidden[rows].to(weight.device), weight, bias)
        yield logits.double(), targets[rows].to(weight.device)


class Reliability:
    """Collects predictions in bins of equal width by confidence. The bin m of M holds confidences
    in ((m - 1) / M, m / M].

    Args:
        bins: number of bins.
    """

    def __init__(self, bins: int = BINS):
        if bins < 1:
            raise ValueError(f"there are {bins} bins, at least 1 is needed")
        self.bins = bins
        self._edges = torch.arange(1, bins, dtype=torch.float64) / bins
        # [bins, 3]: number of predictions, sum of confidences, number of correct ones
        self._sums = torch.zeros(bins, 3, dtype=torch.float64)
        self._nll = self._brier = 0.0

    def add(self, found: Predictions) -> None:
        """Add predictions.

        Raises:
            ValueError: a value is not finite.
        """
        if not found.is_finite():
            raise ValueError("a prediction is not finite")
        confidence = found.confidence.cpu().clamp(max=1.0)
        facts = [torch.ones_like(confidence), confidence, found.correct.cpu().double()]
        self._sums.index_add_(0, torch.bucketize(confidence, self._edges), torch.stack(facts, 1))
        self._nll += float(found.nll.sum())
        self._brier += float(found.brier.sum())

    @property
    def count(self) -> int:
        """Number of predictions."""
        return int(self._sums[:, 0].sum())

    @property
    def ece(self) -> float:
        """The expected calibration error; 0 without predictions."""
        return float((self._sums[:, 1] - self._sums[:, 2]).abs().sum()) / max(self.count, 1)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON: means over all predictions, and count and means of each bin."""
        n = max(self.count, 1)
        confidence, correct = self._sums[:, 1:].sum(0).tolist()
        return {
            "count": self.count,
            "ece": self.ece,
            "accuracy": correct / n,
            "confidence": confidence / n,
            "nll": self._nll / n,
            "brier": self._brier / n,
            "bins": [
                {"count": int(c), "confidence": p / max(c, 1), "accuracy": a / max(c, 1)}
                for c, p, a in self._sums.tolist()
            ],
        }
