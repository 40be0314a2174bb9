"""`ce`: next-token cross-entropy on the data set's own responses.

    L = -1/|M| sum_{t in M} log q(y_{t+1} | y_{<=t}, image)

with M the rows that predict the region's tokens.
"""

from typing import Literal

from torch import Tensor

from mmkd.objectives.base import (
    Need,
    Objective,
    ObjectiveConfig,
    Outcome,
    Signals,
    Targets,
    share_of,
)
from mmkd.ops import linear_cross_entropy


class CrossEntropyConfig(ObjectiveConfig):
    """Cross-entropy on the text of the data set."""

    kind: Literal["ce"] = "ce"
    region: Literal["response", "prompt"] = "response"


class CrossEntropy(Objective):
    config_class = CrossEntropyConfig
    config: CrossEntropyConfig
    needs: frozenset[Need] = frozenset({"distribution"})

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        rows = self.rows(targets)
        mean = linear_cross_entropy(
            student.hidden.flatten(0, 1),
            student.head_weight,
            targets.next_ids().flatten(),
            mask=rows.flatten(),
            bias=student.head_bias,
        )
        return Outcome(share_of(mean, rows, count))
