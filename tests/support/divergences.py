"""Divergences of dense distributions by their definitions, for autograd in float64."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_EXPONENT = 20.0


def by_definition(kind: str, log_p: Tensor, log_q: Tensor, *, beta: float, alpha: float) -> Tensor:
    """A divergence by row, [...], of log-probabilities [..., V]."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    def mix(share: float, a: Tensor, b: Tensor) -> Tensor:
        return torch.logaddexp(a + math.log(share), b + math.log(1 - share))

    def power(
        f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], order: float
    ) -> Tensor:
        """sum q f(p / q), with f continued by its tangents where a power leaves its bound."""
        limit = LARGEST_EXPONENT / max(abs(order), abs(order - 1))
        c = (log_p - log_q).clamp(-limit, limit).exp()
        return (q * (f(c) - slope(c) * c) + p * slope(c)).sum(-1)

    a, b = alpha, beta
    m = mix(b, log_p, log_q)
    return {
        "kl": lambda: kl(log_p, log_q),
        "reverse_kl": lambda: kl(log_q, log_p),
        "jeffreys": lambda: ((p - q) * (log_p - log_q)).sum(-1),
        "jsd": lambda: b * kl(log_p, m) + (1 - b) * kl(log_q, m),
        "skew_kl": lambda: kl(log_p, mix(a, log_p, log_q)),
        "skew_reverse_kl": lambda: kl(log_q, mix(a, log_q, log_p)),
        "soft_reverse_kl": lambda: 2 * kl(mix(0.5, log_p, log_q), log_p),
        "hellinger": lambda: power(lambda r: (1 - r.sqrt()) ** 2, lambda r: 1 - r**-0.5, 0.5),
        "pearson": lambda: power(lambda r: (r - 1) ** 2, lambda r: 2 * (r - 1), 2.0),
        "neyman": lambda: power(lambda r: (1 - r) ** 2 / r, lambda r: 1 - r**-2, -1.0),
        "alpha": lambda: power(
            lambda r: (r**a - 1 - a * (r - 1)) / (a * (a - 1)),
            lambda r: (r ** (a - 1) - 1) / (a - 1),
            a,
        ),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[kind]()


def balanced_kl(log_p: Tensor, log_q: Tensor, kappa: float) -> Tensor:
    """The divergence by row, with weights that autograd does not see."""
    p, q = log_p.exp(), log_q.exp()
    gap = (p * log_p).sum(-1) - (q * log_q).sum(-1)  # entropy of q less that of p
    share = torch.sigmoid(gap / kappa).detach()
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return 2 * (1 - share) * forward + 2 * share * reverse


def enhanced(log_p: Tensor, log_q: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """OFA-KD's cross-entropy by row, less its smallest value; labels are [...]."""
    target = enhanced_target(log_p.exp(), labels, gamma)
    least = (target * (target / target.sum(-1, keepdim=True)).log()).sum(-1)
    return least - (target * log_q).sum(-1)


def enhanced_target(p: Tensor, labels: Tensor, gamma: float) -> Tensor:
    own = p.gather(-1, labels[..., None])
    return (p**gamma).scatter(-1, labels[..., None], (1 + own) ** gamma - 1).detach()
