"""Divergences between two models' likelihoods of the same text, as Bernoulli distributions.

Let p and q be the likelihoods of a text under teacher and student, raised to the power of 1 / tau:

    kl           p log(p / q) + (1 - p) log((1 - p) / (1 - q))
    reverse_kl   the same with p and q exchanged
    tvd          |p - q|

These are f-divergences of two Bernoulli distributions, as in Approximate Likelihood Matching
(Minixhofer, Vulić and Ponti, arXiv 2503.20083, "binarised f-divergence"). The likelihood of a long
text is close to 0, where differences are small; tau moves it towards 1.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

BinaryKind = Literal["kl", "reverse_kl", "tvd"]
CERTAIN = 1e-6
"""Taken from every log-likelihood over tau, so that what is certain has a finite log-odds."""


def binary_divergence(
    teacher: Tensor, student: Tensor, *, kind: BinaryKind = "kl", temperature: float = 100.0
) -> Tensor:
    """The divergence of each text.

    Args:
        teacher: [n], log-likelihoods; gets no gradient.
        student: [n], log-likelihoods.
        kind: defined at the top of this module.
        temperature: tau > 0.

    Returns:
        [n] in at least float32, at least 0, and 0 if the two are equal.

    Raises:
        ValueError: unknown kind, or a temperature that is not positive.
    """
    if kind not in get_args(BinaryKind):
        raise ValueError(f"unknown kind {kind!r}, known: {', '.join(get_args(BinaryKind))}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = (x.to(wide) / temperature - CERTAIN for x in (teacher.detach(), student))
    if kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs()
    if kind == "reverse_kl":
        log_p, log_q = log_q, log_p
    log_no_p, log_no_q = ((-x.expm1()).log() for x in (log_p, log_q))
    return log_p.exp() * (log_p - log_q) - log_p.expm1() * (log_no_p - log_no_q)
