"""`token_labels`: image tokens predict the name of the object that they show.

    L = -1/|P| sum_{t in P} log softmax(W n(h_t))[w_t]

P are the image tokens inside of an object's box, w_t is the token of that object's name and W the
output head. With `background`, P also contains the other tokens of the image, and their label is
the end-of-turn token. At `connector`, h is the connector's output and n scales it to a root mean
square of 1: the image tokens move towards the head's weights of their names, which with tied
embeddings are the decoder's embeddings of these words. At `decoder`, h is the final hidden state
and n is the identity.

This is dense supervision of the vision tower, similar to token labelling (Jiang et al. 2021,
arXiv 2104.10858). It needs records with `objects` (name and box).
"""

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome, scale_to_global_mean
from mmkd.objectives.settings import TokenLabelsConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import linear_cross_entropy

EPSILON = 1e-6


class TokenLabels(Objective):
    config_class = TokenLabelsConfig
    config: TokenLabelsConfig

    def rows(self, targets: Targets) -> Tensor:
        if targets.vision_labels is None:
            raise ValueError("token_labels needs records with objects (name and box)")
        covered = targets.vision & (targets.vision_labels >= 0)
        background = self._background(targets)
        return targets.covered(covered if background is None else covered | background)

    def _background(self, targets: Targets) -> Tensor | None:
        return targets.background if self.config.background else None

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        rows = self.rows(targets)
        assert targets.vision_labels is not None
        labels = targets.vision_labels
        background = self._background(targets)
        if background is not None:
            labels = labels.masked_fill(background, targets.end_id)
        hidden = student.hidden
        if self.config.at == "connector":
            if student.embeddings is None:
                raise ValueError("token_labels at the connector needs the decoder's input")
            hidden = _unit_rms(student.embeddings)
        mean = linear_cross_entropy(
            hidden.flatten(0, 1),
            student.head_weight,
            labels.flatten(),
            mask=rows.flatten(),
            bias=student.head_bias,
            memory=self.head_memory,
            backend=self.head_backend,
        )
        return Outcome(scale_to_global_mean(mean, rows, count))


def _unit_rms(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * (wide.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
