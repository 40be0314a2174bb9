"""Divergences between two models' likelihoods of the same text, as Bernoulli distributions.

Let p and q be the likelihoods of a text under teacher and student, raised to the power of 1 / tau:

    kl           p log(p / q) + (1 - p) log((1 - p) / (1 - q))
    reverse_kl   the same with p and q exchanged
    tvd          |p - q|

These are f-divergences of two Bernoulli distributions, as in Approximate Likelihood Matching
(Minixhofer, Vulić and Ponti, arXiv 2503.20083, "binarised f-divergence"). The likelihood of a long
text is close to 0, where differences are small; tau moves it towards 1, and the divergence falls as
1 / tau. With tau = inf the result is the limit of tau times the divergence. For a and b, the
log-likelihoods of a text under teacher and student:

    kl           (a - b) + a log(b / a)
    reverse_kl   the same with a and b exchanged
    tvd          |a - b|

The limit of kl is `binary_kl_temp_limit` of the authors' code (tokenkit). It is also the KL
divergence between two Poisson distributions with rates -a and -b.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

BinaryKind = Literal["kl", "reverse_kl", "tvd"]
CERTAIN = 1e-6
"""Taken from every log-likelihood over tau, so that what is certain has a finite log-odds. With tau
= inf it is taken from the log-likelihood itself."""


def binary_divergence(
    teacher: Tensor, student: Tensor, *, kind: BinaryKind = "kl", temperature: float = math.inf
) -> Tensor:
    """The divergence of each text.

    Args:
        teacher: [n], log-likelihoods; gets no gradient.
        student: [n], log-likelihoods.
        kind: defined at the top of this module.
        temperature: tau > 0; inf for the limit of tau times the divergence.

    Returns:
        [n] in at least float32, at least 0 up to rounding, and 0 if the two are equal.

    Raises:
        ValueError: unknown kind, or a temperature that is not positive.
    """
    if kind not in get_args(BinaryKind):
        raise ValueError(f"unknown kind {kind!r}, known: {', '.join(get_args(BinaryKind))}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
    wide = torch.promote_types(student.dtype, torch.float32)
    tau = 1.0 if math.isinf(temperature) else temperature
    log_p, log_q = (x.to(wide) / tau - CERTAIN for x in (teacher.detach(), student))
    if math.isinf(temperature):
        return _limit(log_p, log_q, kind)
    if kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs()
    if kind == "reverse_kl":
        log_p, log_q = log_q, log_p
    log_no_p, log_no_q = ((-x.expm1()).log() for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) - log_p.expm1() * (log_no_p - log_no_q)


def _limit(a: Tensor, b: Tensor, kind: BinaryKind) -> Tensor:
    """The limit of tau times the divergence, for negative log-likelihoods of teacher and student.

    With r = b / a - 1, the limit of kl is -a (r - log(1 + r)). This form has no difference of large
    numbers where a and b are close. Elsewhere 1 + r could be rounded to 0.
    """
    if kind == "tvd":
        return (a - b).abs()
    if kind == "reverse_kl":
        a, b = b, a
    change = (b - a) / a
    close = change.abs() < 0.5
    small = torch.where(close, change, 0)
    near = -a * (small - small.log1p())
    return torch.where(close, near, (a - b) + a * (b / a).log())
