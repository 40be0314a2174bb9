"""`token_labels`: every image token says the word for what it shows.

    L = -1/|P| sum_{t in P} log q_t(w_t)

with P the image tokens and w_t the word of the object whose box covers the token's patch. Dense
supervision of vision tower, connector and word embeddings at once, in the spirit of token labelling
(Jiang et al. 2021, arXiv 2104.10858). It needs records with `objects` (name and box).
"""

from typing import ClassVar, Literal

from torch import Tensor

from mmkd.objectives.base import Need, Objective, ObjectiveConfig, Outcome, Signals, Targets
from mmkd.ops import linear_cross_entropy


class TokenLabelsConfig(ObjectiveConfig):
    """Cross-entropy of image tokens against the word of the object they show."""

    kind: Literal["token_labels"] = "token_labels"


class TokenLabels(Objective):
    config_class = TokenLabelsConfig
    needs: ClassVar[frozenset[Need]] = frozenset({"vision_labels"})

    def rows(self, targets: Targets) -> Tensor:
        if targets.vision_labels is None:
            raise ValueError("token_labels needs records with objects (name and box)")
        return targets.vision & (targets.vision_labels >= 0)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        rows = self.rows(targets)
        assert targets.vision_labels is not None
        mean = linear_cross_entropy(
            student.hidden.flatten(0, 1),
            student.head_weight,
            targets.vision_labels.flatten(),
            mask=rows.flatten(),
            bias=student.head_bias,
        )
        return Outcome(mean * (rows.sum() / count))
