"""Divergences between a teacher's and a student's next-token distributions.

Let p and q be the distributions of teacher and student for one row, both softmax(logits / T):

    kl                KL(p || q)                          forward KL, Hinton et al. 2015
    reverse_kl        KL(q || p)                          MiniLLM, arXiv 2306.08543
    jeffreys          KL(p || q) + KL(q || p)
    jsd               b KL(p || m) + (1 - b) KL(q || m),  m = b p + (1 - b) q
                                                          GKD, arXiv 2306.13649, eq. 1
    skew_kl           KL(p || a p + (1 - a) q)            DistiLLM, arXiv 2402.03898, eq. 3
    skew_reverse_kl   KL(q || a q + (1 - a) p)            DistiLLM, arXiv 2402.03898, section 3.1
    soft_reverse_kl   2 KL(m || p), m = (p + q) / 2       f-distill, arXiv 2502.15681
    hellinger         sum (sqrt p - sqrt q)^2             the same
    pearson           sum (p - q)^2 / q
    neyman            sum (p - q)^2 / p                   f-distill
    alpha             (sum p^a q^(1 - a) - 1) / (a (a - 1))   Amari 1985
    tvd               1/2 sum |p - q|                     total variation, arXiv 2307.15190
    balanced_kl       w KL(q || p) + (2 - w) KL(p || q),  in the spirit of BD-KD, arXiv 2212.12965
                      w = 2 sigmoid((H(q) - H(p)) / kappa) of each row, without gradient
    enhanced          W KL(w / W || q), W = sum w,        target enhancement of OFA-KD,
                      arXiv 2310.19444; w = p^gamma, but (1 + p)^gamma - 1 at the next token
                      of the text

`alpha` has the limits `kl` at a = 1 and `reverse_kl` at a = 0, which are computed there.
`hellinger` is half of `alpha` at a = 1/2; `pearson` and `neyman` are twice `alpha` at a = 2 and -1.
Powers of p / q are bounded: `mmkd.ops.distributions`.

`enhanced` has the gradient of cross-entropy against w, which is OFA-KD's loss, and the gradient of
`kl` for gamma = 1. `top_k`, `top_p` and `rest` reduce p and q to a part of the tokens: see
`mmkd.ops.cells`.

No constant is dropped: each divergence is 0 when p and q are
equal (`enhanced`: when q is w / W). No kind is multiplied by the
factor T^2 of Hinton et al.; use the objective's weight for it. For b = 0 and b = 1 the formula of
`jsd` is 0, so `kl` and `reverse_kl` are computed instead, which are its limits up to scale. GKD
does the same.
"""

from torch import Tensor

from mmkd.ops.head_losses import head_losses
from mmkd.ops.terms import Head, HeadLoss


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    rest: str = "cell",
    beta: float = 0.5,
    alpha: float = 0.1,
    kappa: float = 1.0,
    gamma: float = 1.0,
    targets: Tensor | None = None,
    row_weights: Tensor | None = None,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean divergence over the rows of the mask, from hidden states, without logits for all rows.

    Args:
        student_hidden: [N, Hs], final hidden states.
        student_weight: [Vs, Hs], the student's head.
        teacher_hidden: [N, Ht]; gets no gradient.
        teacher_weight: [Vt, Ht]; gets no gradient.
        kind: one of those defined at the top of this module.
        temperature: T > 0 divides both models' logits; the result is not multiplied by T^2.
        teacher_temperature: divides the teacher's logits in its place.
        top_k: read only the teacher's k most likely tokens.
        top_p: read only its most likely tokens up to this probability, in (0, 1].
        rest: `cell` keeps one entry for the other tokens, `drop` keeps none.
        beta: weight of the teacher in the mixture of `jsd`, in [0, 1].
        alpha: skew of `skew_kl` and `skew_reverse_kl`, in [0, 1); order of `alpha`, any
            finite number.
        kappa: scale of the difference of entropies of `balanced_kl`; not 0.
        gamma: exponent of `enhanced`, positive.
        targets: [N] int64, the next tokens, for `enhanced`.
        row_weights: [N], factors of the rows, without gradient; the mean is over their number.
        mask: [N] bool, True for rows that count; None keeps all.
        student_bias: [Vs] or None.
        teacher_bias: [Vt] or None.
        vocab_size: tokens that both heads share, when they are padded differently. Rows of a
            head after these get probability 0, as with a logit of -inf.
        chunk_size: rows projected at once; chosen by memory if None.
        backend: as in `head_losses`.

    Returns:
        Scalar in at least float32. Without rows: 0 with zero gradients.

    Raises:
        ValueError: unknown kind, a setting out of range, or shapes that do not match.
    """
    loss = HeadLoss(
        kind,
        mask,
        row_weights=row_weights,
        targets=targets,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        top_k=top_k,
        top_p=top_p,
        rest=rest,
        beta=beta,
        alpha=alpha,
        kappa=kappa,
        gamma=gamma,
        vocab_size=vocab_size,
    )
    total, _ = head_losses(
        Head(student_hidden, student_weight, student_bias),
        [loss],
        Head(teacher_hidden, teacher_weight, teacher_bias),
        chunk_size=chunk_size,
        backend=backend,
    )
    return total / max(len(student_hidden) if mask is None else int(mask.sum()), 1)
