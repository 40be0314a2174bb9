"""Divergences between a teacher's and a student's next-token distributions.

With p the teacher's and q the student's distribution of one row, both softmax(logits / T):

    kl                KL(p || q)                          forward KL, Hinton et al. 2015
    reverse_kl        KL(q || p)                          MiniLLM, arXiv 2306.08543
    jsd               b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q
                                                          GKD, arXiv 2306.13649, eq. 1
    skew_kl           KL(p || a p + (1 - a) q)            DistiLLM, arXiv 2402.03898, eq. 3
    skew_reverse_kl   KL(q || a q + (1 - a) p)            DistiLLM, arXiv 2402.03898, section 3.1
    tvd               1/2 sum |p - q|                     total variation, arXiv 2307.15190

Every divergence is its true value: 0 when the two are equal. The factor T^2 of Hinton et al. is
NOT multiplied in, for any kind: use the objective's weight for that. `jsd` at b = 0 and b = 1 is
0 by its formula; there it is taken as `kl` and `reverse_kl`, its limits up to scale, as GKD does.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mmkd.ops.linear_loss import kept_rows, linear_loss, project

KINDS = ("kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over rows of KL(p || q), [C, V] each. p = 0 adds nothing, whatever q is."""
    return (log_p.exp() * (log_p - log_q)).sum()


def _mix(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), stable where either is tiny."""
    if share == 0.0:
        return log_q
    if share == 1.0:
        return log_p
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    if beta == 0.0:
        return _kl(log_p, log_q)
    if beta == 1.0:
        return _kl(log_q, log_p)
    log_m = _mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _divergence(kind: str, beta: float, alpha: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(log p, log q) [C, V] -> summed divergence of the chunk."""
    table: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "kl": _kl,
        "reverse_kl": lambda p, q: _kl(q, p),
        "jsd": lambda p, q: _jsd(p, q, beta),
        "skew_kl": lambda p, q: _kl(p, _mix(p, q, alpha)),
        "skew_reverse_kl": lambda p, q: _kl(q, _mix(q, p, alpha)),
        "tvd": lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(),
    }
    if kind not in table:
        raise ValueError(f"unknown divergence {kind!r}, known: {', '.join(KINDS)}")
    return table[kind]


def _shared_vocabulary(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    smaller = min(student.shape[0], teacher.shape[0])
    if vocab_size is None:
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"the heads have {student.shape[0]} (student) and {teacher.shape[0]} (teacher) "
                "rows: give vocab_size, the number of tokens that both share"
            )
        return smaller
    if not 0 < vocab_size <= smaller:
        raise ValueError(f"vocab_size is {vocab_size}, it must be between 1 and {smaller}")
    return vocab_size


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Mean divergence over the kept rows, from hidden states, without logits for all rows.

    Args:
        student_hidden: [N, Hs], final hidden states.
        student_weight: [Vs, Hs], the student's head.
        teacher_hidden: [N, Ht]; gets no gradient.
        teacher_weight: [Vt, Ht]; gets no gradient.
        kind: one of `KINDS`, defined at the top of this module.
        temperature: T > 0 divides both models' logits; the result is not multiplied by T^2.
        beta: weight of the teacher in the mixture of `jsd`, in [0, 1].
        alpha: skew of `skew_kl` and `skew_reverse_kl`, in [0, 1).
        mask: [N] bool, True for rows that count; None keeps all.
        student_bias: [Vs] or None.
        teacher_bias: [Vt] or None.
        vocab_size: tokens that both heads share, when they are padded differently. Rows of a
            head past it get no mass: they are as if their logit were -inf.
        chunk_size: rows projected at once; chosen by memory if None.

    Returns:
        Scalar in at least float32. Zero kept rows give 0 with zero gradients.

    Raises:
        ValueError: unknown kind, a setting out of range, or shapes that do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be positive")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, it must be in [0, 1]")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, it must be in [0, 1)")
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"{student_hidden.shape[0]} student rows but {teacher_hidden.shape[0]} teacher rows"
        )
    divergence = _divergence(kind, beta, alpha)
    shared = _shared_vocabulary(student_weight, teacher_weight, vocab_size)
    student = kept_rows(student_hidden, mask)  # [K, Hs]
    teacher = kept_rows(teacher_hidden, mask).detach()  # [K, Ht]
    head = teacher_weight[:shared].detach()
    head_bias = None if teacher_bias is None else teacher_bias[:shared].detach()

    def row_loss(logits: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            teacher_logits = project(teacher[rows], head, head_bias).to(logits.dtype)
            log_p = torch.log_softmax(teacher_logits / temperature, -1)  # [C, V]
        return divergence(log_p, torch.log_softmax(logits / temperature, -1))

    total = linear_loss(
        student,
        student_weight[:shared],
        None if student_bias is None else student_bias[:shared],
        row_loss,
        chunk_size=chunk_size,
    )
    return total / max(student.shape[0], 1)
