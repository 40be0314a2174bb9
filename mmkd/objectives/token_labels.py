"""`token_labels`: every image token says the word for what it shows.

    L = -1/|P| sum_{t in P} log softmax(W n(h_t))[w_t]

with P the image tokens inside of an object's box, w_t that object's word and W the output head.
With `background`, P has the picture's other tokens too, and their word is the end-of-turn token.
At `connector`, h is what the connector hands to the decoder and n scales it to unit root mean
square: image tokens come to lie where the head has their words, which with tied embeddings is where
the decoder knows them already. At `decoder`, h is the final hidden state and n does nothing.

Dense supervision of the vision tower, in the spirit of token labelling (Jiang et al. 2021,
arXiv 2104.10858). It needs records with `objects` (name and box).
"""

import torch
from torch import Tensor

from mmkd.objectives.base import (
    Objective,
    Outcome,
    Signals,
    Targets,
    share_of,
)
from mmkd.objectives.settings import TokenLabelsConfig
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
        return covered if background is None else covered | background

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
        return Outcome(share_of(mean, rows, count))


def _unit_rms(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * (wide.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()
