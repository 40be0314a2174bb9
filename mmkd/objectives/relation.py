"""`relation`: match the teacher's similarities between the tokens of a region.

Let Y be the features of n tokens, [n, D], and G = Y Y^T:

    L = 1 - cos(G_S, G_T) = 1 - <G_S, G_T> / (|G_S| |G_T|)

In LLaVA-KD (arXiv 2410.16236, section 3.2), Y are the logits at image tokens, without centring. The
mean over tokens then dominates G, and the cosine of any two models is close to 1 (0.999 for
independent random features). So by default Y is centred over the tokens here, and 1 - L is linear
CKA (arXiv 1905.00414). With `layers`, Y are the hidden states after decoder layers, and L is a mean
over pairs of layers. Their widths may differ.
"""

from typing import ClassVar

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome
from mmkd.objectives.layer_settings import RelationConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.ops.gram import gram_inner

JITTER = 1e-10  # relative to the head's mean square, so that W^T W has a Cholesky factor


def visual_relation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    center: bool = True,
    normalize: bool = False,
    diagonal: bool = True,
) -> Tensor:
    """1 - cosine of the two token-to-token similarity matrices, averaged over sequences.

    Args:
        student: [B, T, Ds], features in any floating dtype.
        teacher: [B, T, Dt].
        mask: [B, T] bool, the tokens to relate. Sequences with less than two are left out.
        center, normalize, diagonal: see `RelationConfig`.

    Returns:
        A scalar in at least float32; 0 with a zero gradient if no sequence has two tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    if student.shape[:2] != mask.shape or teacher.shape[:2] != mask.shape:
        raise ValueError(
            f"mask is {list(mask.shape)}, student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}: batch and tokens must agree"
        )
    rows = _relations(student, teacher, mask, center, normalize, diagonal)
    return torch.stack(rows).mean() if rows else 0 * student.sum()


def _relations(
    student: Tensor, teacher: Tensor, mask: Tensor, center: bool, normalize: bool, diagonal: bool
) -> list[Tensor]:
    """The loss of each sequence with at least two tokens."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    found = []
    for mine, theirs, chosen in zip(student, teacher, mask, strict=True):
        if int(chosen.sum()) < 2:
            continue
        pair = [_prepared(y[chosen].to(wide), center, normalize) for y in (mine, theirs)]
        inner, own, other = (
            gram_inner(a, b, diagonal=diagonal)
            for a, b in (pair, (pair[0], pair[0]), (pair[1], pair[1]))
        )
        found.append(1 - inner / (own * other).clamp_min(torch.finfo(wide).tiny).sqrt())
    return found


def _prepared(features: Tensor, center: bool, normalize: bool) -> Tensor:
    """Features [n, D], scaled so that their fourth powers neither overflow nor underflow. The
    cosine does not depend on the scale."""
    if center:
        features = features - features.mean(0)
    if normalize:
        features = torch.nn.functional.normalize(features, dim=-1)
    scale = features.detach().square().mean().sqrt()
    return features / scale.clamp_min(torch.finfo(features.dtype).tiny)


class Relation(Objective):
    """Averages the loss over sequences, weighted by their numbers of tokens."""

    config_class: ClassVar[type[RelationConfig]] = RelationConfig
    relates_tokens = True
    any_vocabulary = True
    config: RelationConfig

    @property
    def pairs(self) -> list[tuple[int, int]]:
        layers = self.config.layers or []
        return list(zip(layers, self.config.teacher_layers or layers, strict=True))

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: tokens of the region, in sequences that have at least two of them."""
        covered = targets.predicts(self.config.region)
        return covered & (covered.sum(1, keepdim=True) > 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        rows = self.rows(targets)
        how = self.config.model_dump(include={"center", "normalize", "diagonal"})
        tokens = rows.sum(1)
        tokens = tokens[tokens > 0]  # of each sequence that has a loss
        if not len(tokens):
            return Outcome(0 * student.hidden.sum())
        with torch.autocast(rows.device.type, enabled=False):
            terms = []
            for mine, theirs in self._compared(student, teacher):
                losses = torch.stack(_relations(mine, theirs, rows, **how))
                terms.append((losses * (tokens.to(losses.dtype) / count)).sum())
            return Outcome(torch.stack(terms).mean())

    def _compared(self, student: Signals, teacher: Signals) -> list[tuple[Tensor, Tensor]]:
        """Features of student and teacher, [B, T, D]: of each pair of layers, or at the output."""
        if self.config.layers is None:
            return [(self._features(student), self._features(teacher))]
        return [
            (_after_layer(student, mine), _after_layer(teacher, theirs))
            for mine, theirs in self.pairs
        ]

    def _features(self, signals: Signals) -> Tensor:
        hidden = signals.hidden.float()
        if self.config.features == "hidden":
            return hidden
        weight = signals.head_weight[: self.shared_vocabulary].float()
        if signals.head_bias is not None:
            bias = signals.head_bias[: self.shared_vocabulary].float()
            weight = torch.cat([weight, bias[:, None]], dim=1)
            hidden = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)
        return hidden @ logit_factor(weight)


def _after_layer(signals: Signals, layer: int) -> Tensor:
    hidden = signals.layers[layer].block_output
    assert hidden is not None
    return hidden


def logit_factor(weight: Tensor) -> Tensor:
    """L, [H, H], with W^T W = L L^T. Vectors h L have the same inner products as the logits h W^T.

    Args:
        weight: [V, H], W, the weight of an output head.
    """
    gram = (weight.T @ weight).double()  # [H, H]
    jitter = JITTER * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device).double()
    return torch.linalg.cholesky(gram + jitter).to(weight.dtype)
