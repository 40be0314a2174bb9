"""The inputs of a loss on a head's output: kind, rows, and the teacher's distributions."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DIVERGENCES = (
    *("kl", "reverse_kl", "jeffreys", "jsd", "skew_kl", "skew_reverse_kl", "soft_reverse_kl"),
    *("hellinger", "pearson", "neyman", "alpha", "tvd"),
)

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


@dataclass(frozen=True)
class HeadLoss:
    """One loss and the rows that it covers.

    Attributes:
        kind: `ce` or one of `DIVERGENCES`.
        mask: [N] bool, the rows; None for all.
        scale: factor of the loss's sum over rows in the total.
        targets: [N] int64, the tokens of `ce`.
        temperature: divides the logits of a divergence.
        beta: weight of the teacher in the mixture of jsd.
        alpha: skew of skew_kl and skew_reverse_kl; order of alpha.
        vocab_size: tokens with a probability; None for all rows of the head.
    """

    kind: str
    mask: Tensor | None = None
    scale: float = 1.0
    targets: Tensor | None = None
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    vocab_size: int | None = None

    def scaled(self, scale: float) -> "HeadLoss":
        return replace(self, scale=scale)

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
    def order(self) -> tuple[float, float]:
        """Order and factor of an `alpha` divergence or of a multiple of one."""
        return ALPHAS.get(self.kind, (self.alpha, 1.0))


def check(loss: HeadLoss, student: Head, teacher: Head | SparseRows | None) -> None:
    rows, size = student.hidden.shape[0], student.weight.shape[0]
    if student.hidden.dim() != 2:
        raise ValueError(f"hidden states must be [N, H], got {list(student.hidden.shape)}")
    if loss.mask is not None and (loss.mask.dtype != torch.bool or loss.mask.shape != (rows,)):
        raise ValueError(
            f"mask must be bool [{rows}], got {loss.mask.dtype} {list(loss.mask.shape)}"
        )
    if loss.kind == "ce":
        if loss.targets is None or loss.targets.shape != (rows,):
            raise ValueError(f"ce needs targets [{rows}]")
        return
    if loss.kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {loss.kind!r}, known: {', '.join(DIVERGENCES)}")
    if loss.temperature <= 0:
        raise ValueError(f"temperature is {loss.temperature}, it must be positive")
    if not 0 <= loss.beta <= 1:
        raise ValueError(f"beta is {loss.beta}, it must be in [0, 1]")
    if loss.kind == "alpha":
        if not math.isfinite(loss.alpha):
            raise ValueError(f"alpha is {loss.alpha}, it must be finite")
    elif not 0 <= loss.alpha < 1:
        raise ValueError(f"alpha is {loss.alpha}, it must be in [0, 1)")
    if teacher is None:
        raise ValueError(f"{loss.kind} needs a teacher")
    if isinstance(teacher, SparseRows):
        _check_stored(loss, teacher, rows)
        return
    if teacher.hidden.shape[0] != rows:
        raise ValueError(f"{rows} student rows but {teacher.hidden.shape[0]} teacher rows")
    smaller = min(size, teacher.weight.shape[0])
    if loss.vocab_size is None and size != teacher.weight.shape[0]:
        raise ValueError(
            f"the heads have {size} (student) and {teacher.weight.shape[0]} (teacher) rows: give "
            "vocab_size, the number of tokens that both share"
        )
    if loss.vocab_size is not None and not 0 < loss.vocab_size <= smaller:
        raise ValueError(f"vocab_size is {loss.vocab_size}, it must be between 1 and {smaller}")


def _check_stored(loss: HeadLoss, teacher: SparseRows, rows: int) -> None:
    if loss.temperature != 1:
        raise ValueError(f"stored rows are of temperature 1, the loss asks for {loss.temperature}")
    if teacher.at.shape != (rows,):
        raise ValueError(f"stored rows are for {len(teacher.at)} rows, the batch has {rows}")
    wanted = teacher.at if loss.mask is None else teacher.at[loss.mask]
    if bool((wanted < 0).any()):
        raise ValueError(f"{int((wanted < 0).sum())} rows of {loss.kind} are not stored")
