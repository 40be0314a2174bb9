"""The inputs of a loss on a head's output: kind, rows, and the teacher's distributions."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = (
    *("kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl", "soft_reverse_kl"),
    *("hellinger", "pearson", "neyman", "alpha", "tvd"),
)

WITH_LABELS = ("enhanced",)
"""Divergences that depend on the next token of the text."""

KINDS = ("ce", *DIVERGENCES, "balanced_kl", *WITH_LABELS)

ALPHAS = {"hellinger": (0.5, 0.5), "pearson": (2.0, 2.0), "neyman": (-1.0, 2.0)}
"""Divergences that are a multiple of the `alpha` divergence: its order and the factor."""


@dataclass(frozen=True)
class Head:
    """An output head and the hidden states that it is applied to.

    Attributes:
        hidden: [N, H], final hidden states.
        weight: [V, H].
        bias: [V] or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class SparseRows:
    """A teacher's distributions: the k most likely tokens, and the probability of all others.

    Divergences compare these k tokens and one value for the others, for the student too. The value
    is never larger than the full divergence.

    Attributes:
        ids: [n, k] int64, tokens of the stored rows, without duplicates.
        log_probs: [n, k] float32, at temperature 1.
        log_rest: [n] float32, log of the total probability of all other tokens.
        at: [N] int64, index of each row of the batch among the stored rows; -1 if it is not stored.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    at: Tensor

    def to(self, device: torch.device) -> "SparseRows":
        return SparseRows(*(t.to(device) for t in vars(self).values()))


class TeacherPart(NamedTuple):
    """The part of the teacher's distribution that a loss reads, see `mmkd.ops.cells`.

    Attributes:
        temperature: divides the teacher's logits.
        top_k: number of tokens; None for all.
        top_p: probability of the tokens; None for all.
        rest: what happens to the other tokens: `cell` or `drop`.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    rest: str = "cell"

    @property
    def is_whole(self) -> bool:
        """Whether it is the distribution over all tokens that are known."""
        return self.top_k is None and self.top_p is None and self.rest == "cell"


@dataclass(frozen=True)
class HeadLoss:
    """One loss and the rows that it covers.

    Attributes:
        kind: one of `KINDS`.
        mask: [N] bool, the rows; None for all.
        scale: factor of the loss's sum over rows in the total.
        row_weights: [N], factors of the rows in the sum, without gradient; None for 1.
        targets: [N] int64, the tokens of `ce` and `enhanced`.
        temperature: divides the logits of a divergence.
        teacher_temperature: divides the teacher's logits in its place; None for `temperature`.
        top_k: the teacher's most likely tokens that a divergence reads; None for all.
        top_p: the divergence reads the teacher's most likely tokens up to this probability.
        rest: `cell` compares the total probability of the other tokens, `drop` ignores them.
        beta: weight of the teacher in the mixture of jsd.
        alpha: skew of skew_kl and skew_reverse_kl; order of alpha.
        kappa: scale of the difference of entropies of balanced_kl; a negative one exchanges the
            two weights.
        gamma: exponent of the teacher's probabilities in enhanced.
        vocab_size: tokens with a probability; None for all rows of the head.
    """

    kind: str
    mask: Tensor | None = None
    scale: float = 1.0
    row_weights: Tensor | None = None
    targets: Tensor | None = None
    temperature: float = 1.0
    teacher_temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    rest: str = "cell"
    beta: float = 0.5
    alpha: float = 0.1
    kappa: float = 1.0
    gamma: float = 1.0
    vocab_size: int | None = None

    def scaled(self, scale: float) -> "HeadLoss":
        return replace(self, scale=scale)

    def weighted(self, row_weights: Tensor) -> "HeadLoss":
        """The loss with further factors of its rows, [N]."""
        own = self.row_weights
        return replace(self, row_weights=row_weights if own is None else own * row_weights)

    def computed(self) -> list["HeadLoss"]:
        """The losses that are computed for it, whose sum it is.

        `jeffreys` is `kl` and `reverse_kl`. A kind is replaced by its limit where the setting
        reaches it: `jsd` with beta 0 or 1, a skew of 0, and `alpha` of order 0 or 1.
        """
        ends = ["reverse_kl", "kl"]
        if self.kind == "jeffreys":
            kinds = ["kl", "reverse_kl"]
        elif self.kind == "jsd" and self.beta in (0.0, 1.0):
            kinds = [ends[int(1 - self.beta)]]
        elif self.kind == "alpha" and self.alpha in (0.0, 1.0):
            kinds = [ends[int(self.alpha)]]
        elif self.kind.startswith("skew_") and self.alpha == 0.0:
            kinds = [self.kind.removeprefix("skew_")]
        else:
            return [self]
        return [replace(self, kind=kind) for kind in kinds]

    @property
    def teacher_part(self) -> TeacherPart:
        """The part of the teacher's distribution that it reads."""
        own = self.teacher_temperature
        temperature = self.temperature if own is None else own
        return TeacherPart(temperature, self.top_k, self.top_p, self.rest)

    def factors(self, rows: Tensor, dtype: torch.dtype) -> Tensor | float:
        """Factors of rows [C] in the sum, [C] or 1."""
        return 1.0 if self.row_weights is None else self.row_weights.detach()[rows].to(dtype)

    @property
    def order(self) -> tuple[float, float]:
        """Order and factor of an `alpha` divergence or of a multiple of one."""
        return ALPHAS.get(self.kind, (self.alpha, 1.0))
