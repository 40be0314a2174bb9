"""`ce`: next-token cross-entropy on the responses of the data set.

    L = -1/|M| sum_{t in M} log q(y_{t+1} | y_{<=t}, image)

M are the rows that predict the tokens of the region.
"""

from torch import Tensor

from mmkd.objectives.divergence_settings import CrossEntropyConfig
from mmkd.objectives.scoring import HeadObjective
from mmkd.objectives.targets import Targets
from mmkd.ops import HeadLoss


class CrossEntropy(HeadObjective):
    config_class = CrossEntropyConfig
    config: CrossEntropyConfig

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def head_loss(self, targets: Targets) -> HeadLoss:
        rows = self.rows(targets).flatten()
        return HeadLoss("ce", rows, targets=targets.next_ids().flatten())
