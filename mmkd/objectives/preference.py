"""Preference objectives: raise the student's log-ratio to a reference for the chosen answer,
relative to that of the rejected answer.

Let r = log pi_S(y | x) - log pi_ref(y | x) be the log-ratio of a whole answer, r_c of the chosen
and r_r of the rejected one:

    kto_pair   1/2 [1 - s(b (r_c - z_r))] + 1/2 [1 - s(b (z_c - r_r))],  z = max(0, mean r)
                                                    (LLaVA-MoD, arXiv 2408.15881; KTO, arXiv
                                                    2402.01306)
    sigmoid    -log s(b (r_c - r_r))                (DPO, arXiv 2305.18290, eq. 7)
    ipo        (r_c - r_r - 1 / (2 b))^2            (arXiv 2310.12036)
    hinge      max(0, 1 - b (r_c - r_r))            (SLiC, arXiv 2305.10425)
    margin_mse (r_c - r_r)^2                        (Margin-MSE, arXiv 2010.02666)

`margin_mse` makes the student's difference between two answers equal to that of the reference. It
does not depend on which of them is the chosen one.

s is the logistic function and b is `beta`. z is computed over the micro-batches of all ranks and
gets no gradient. LLaVA-MoD's reference is the teacher. `self` is the student before the stage, as
in DPO. Without a reference, r is the log-probability itself.

With z, the gradients of a pair depend on the other pairs, so the logits of `kto_pair` are computed
again in the backward pass. The other losses compute gradients in the forward pass
(`mmkd.ops.pair_loss`).
"""

from typing import get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome
from mmkd.objectives.settings import PreferenceConfig, PreferenceKind
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import CHUNK_BYTES, linear_pair_loss, token_logps


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    kind: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean loss over pairs of answers.

    Args:
        policy_chosen, policy_rejected: [B], log-probabilities of whole answers by the student.
        reference_chosen, reference_rejected: [B], by the reference; zeros for none.
        kind: one of those defined at the top of this module.
        beta: positive; not used by `margin_mse`.
        label_smoothing: probability that the labels of a pair are swapped, below 0.5; for
            `sigmoid` only.

    Returns:
        A scalar; 0 with a zero gradient for no pairs.

    Raises:
        ValueError: unknown kind, a setting out of range, or shapes that do not fit.
    """
    if kind not in get_args(PreferenceKind):
        raise ValueError(
            f"unknown preference loss {kind!r}, known: {', '.join(get_args(PreferenceKind))}"
        )
    if beta <= 0:
        raise ValueError(f"beta is {beta}, it must be positive")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(
            f"label_smoothing is {label_smoothing}, it must be 0, or below 0.5 for sigmoid"
        )
    shapes = {t.shape for t in (policy_chosen, policy_rejected, reference_chosen,
                                reference_rejected)}  # fmt: skip
    if len(shapes) != 1 or policy_chosen.dim() != 1:
        raise ValueError(f"log-probabilities must be [B] each, got {sorted(map(list, shapes))}")
    chosen = policy_chosen - reference_chosen.detach()  # [B]
    rejected = policy_rejected - reference_rejected.detach()
    margin = chosen - rejected
    if kind == "kto_pair":
        z_chosen, z_rejected = (_baseline(r) for r in (chosen, rejected))
        terms = 1 - torch.stack(
            [
                torch.sigmoid(beta * (chosen - z_rejected)),
                torch.sigmoid(beta * (z_chosen - rejected)),
            ]
        )
        terms = terms.mean(0)
    elif kind == "sigmoid":
        terms = -(1 - label_smoothing) * F.logsigmoid(beta * margin)
        terms = terms - label_smoothing * F.logsigmoid(-beta * margin)
    elif kind == "ipo":
        terms = (margin - 1 / (2 * beta)).square()
    elif kind == "margin_mse":
        terms = margin.square()
    else:
        terms = F.relu(1 - beta * margin)
    return terms.sum() / max(len(terms), 1)


def _baseline(ratios: Tensor) -> Tensor:
    """max(0, mean) over the micro-batches of all ranks, without gradients."""
    total = torch.stack([ratios.detach().sum(), ratios.new_tensor(float(len(ratios)))])
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total[0] / total[1].clamp_min(1)).clamp_min(0)


def answer_logps(
    signals: Signals, targets: Targets, vocabulary: int | None, memory: int = CHUNK_BYTES
) -> Tensor:
    """Log-probability of each sequence's response, [B], in at least float32.

    Args:
        signals: of the student or the reference.
        targets: of a batch of pairs, rejected answers included.
        vocabulary: number of tokens that both models share; None for the whole head.
        memory: bytes for the logits of a chunk of rows.
    """
    rows = targets.predicts_answers()  # [B, T]
    signals = signals.truncate(len(rows))
    found = token_logps(
        signals.hidden[rows],
        signals.head_weight,
        targets.next_ids()[rows],
        bias=signals.head_bias,
        vocab_size=vocabulary,
        memory=memory,
    )
    sums = found.new_zeros(rows.shape[0])
    return sums.index_add(0, rows.nonzero()[:, 0], found)


class Preference(Objective):
    """Reads batches of pairs: all chosen answers first, then the rejected answers in the same
    order."""

    config_class = PreferenceConfig
    relates_tokens = True
    config: PreferenceConfig

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: one row per pair, that of the chosen answer's first token."""
        rows = targets.predicts("response")
        return rows & (rows.cumsum(1) == 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if targets.rejected is None:
            raise ValueError(f"objective {self.name!r} needs pairs of answers")
        rows = targets.predicts_answers()  # [B, T]
        tokens = rows.sum(1).clamp_min(1).view(2, -1)  # [2, pairs], chosen answers first
        reference = torch.zeros_like(tokens)
        if self.config.reference != "none":
            if targets.reference_logps is None:
                raise ValueError(f"objective {self.name!r} needs log-probabilities of a reference")
            reference = targets.reference_logps.reshape(2, -1)

        def total(policy: Tensor, some: slice = slice(None)) -> Tensor:
            return self._mean(policy, reference[:, some], tokens[:, some]) * policy.shape[1]

        if self.config.loss == "kto_pair":
            policy = answer_logps(student, targets, self.shared_vocabulary, self.head_memory)
            policy = policy.view(2, -1)
            loss = total(policy)
        else:
            student = student.truncate(len(rows))
            loss, policy = linear_pair_loss(
                student.hidden[rows],
                student.head_weight,
                targets.next_ids()[rows],
                rows.nonzero()[:, 0],
                tokens.shape[1],
                total,
                bias=student.head_bias,
                vocab_size=self.shared_vocabulary,
                memory=self.head_memory,
            )
        ratios = policy.detach() - reference.to(policy.dtype)
        if self.config.average:
            ratios = ratios / tokens
        return Outcome(loss / count, self._metrics(ratios[0], ratios[1], count))

    def _mean(self, policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """The mean loss of some pairs.

        Args:
            policy, reference: [2, p], log-probabilities of chosen and rejected answers.
            tokens: [2, p], their lengths.
        """
        reference = reference.to(policy.dtype)
        likelihood = policy / tokens
        if self.config.average:
            policy, reference = likelihood, reference / tokens
        loss = preference_loss(
            *policy,
            *reference,
            kind=self.config.loss,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
        )
        if self.config.lambda_sft:
            loss = loss - self.config.lambda_sft * likelihood[0].mean()
        return loss

    def _metrics(self, chosen: Tensor, rejected: Tensor, count: float) -> dict[str, Tensor]:
        """Metrics from the log-ratios [pairs] of both answers."""
        share = len(chosen) / count
        scale = 1.0 if self.config.loss == "margin_mse" else self.config.beta
        return {
            "accuracy": (chosen > rejected).to(chosen.dtype).mean() * share,
            "margin": scale * (chosen - rejected).mean() * share,
            "chosen": chosen.mean() * share,
            "rejected": rejected.mean() * share,
        }
