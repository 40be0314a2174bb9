"""The weight of a mixture of two models that gives true tokens the largest likelihood.

With q1 and q2 the probabilities that two models give the true token of each of N rows, the mean
negative log-likelihood of the mixture is

    l(a) = -1/N sum log(a q1 + (1 - a) q2),   l'(a) = -1/N sum (q1 - q2) / (a q1 + (1 - a) q2).

It is convex in a, so l' does not fall, and the minimum over [0, 1] is where l' changes its sign, or
at a bound.
"""

import math

import torch
from torch import Tensor

TOLERANCE = 1e-12
"""Width of the interval of weights at which the search ends."""


@torch.no_grad()
def fit_mixture_weight(first: Tensor, second: Tensor) -> float:
    """The weight in [0, 1] of the first of two models with the least negative log-likelihood.

    Bisection on the derivative, in float64. The result is deterministic.

    Args:
        first, second: [N], log-probability of each true token under the two models.

    Returns:
        The weight of `first`; `second` has the rest. 0 or 1 if the loss falls up to that bound.

    Raises:
        ValueError: shapes that do not match, no rows, values that are not finite, or two models
            that give every token the same probability, so that all weights have the same loss.
    """
    _check(first, second)
    ratio = first.double() - second.double()  # [N], log(q1 / q2)
    if not ratio.any():
        raise ValueError("both models give every token the same probability")
    if _slope(ratio, 0.0) >= 0:
        return 0.0
    if _slope(ratio, 1.0) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(ratio, middle) < 0 else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def mixture_nll(first: Tensor, second: Tensor, weight: float) -> float:
    """Mean negative log-likelihood of a mixture of two models, computed in float64.

    Args:
        first, second: [N], log-probability of each true token under the two models.
        weight: of `first`, in [0, 1]; `second` has the rest.

    Raises:
        ValueError: shapes that do not match, no rows, or values that are not finite.
    """
    _check(first, second)
    shares = [math.log(a) if a > 0 else -math.inf for a in (weight, 1 - weight)]
    mixed = torch.logaddexp(shares[0] + first.double(), shares[1] + second.double())  # [N]
    return -float(mixed.mean())


def _check(first: Tensor, second: Tensor) -> None:
    if first.dim() != 1 or first.shape != second.shape:
        raise ValueError(
            f"log-probabilities must be [N] of both models, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    if not len(first):
        raise ValueError("there are no rows")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError("the log-probabilities are not finite")


def _slope(ratio: Tensor, weight: float) -> float:
    """The derivative of the mean loss.

    Args:
        ratio: [N] float64, log(q1 / q2).
        weight: in [0, 1].
    """
    # Both probabilities are divided by the larger one, so that neither overflows.
    smaller = (-ratio.abs()).exp()  # [N]
    mixed = torch.where(  # [N]
        ratio > 0, weight + (1 - weight) * smaller, weight * smaller + (1 - weight)
    )
    return -float((ratio.sign() * (1 - smaller) / mixed).mean())
