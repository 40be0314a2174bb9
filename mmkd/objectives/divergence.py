"""Distillation of output distributions by a divergence of `mmkd.ops`, averaged over a region.

    L = 1/|M| sum_{t in M} D(p_t, q_t)

M are the rows of the region; p and q are the next-token distributions of teacher and student at
temperature T. LLaVA-MoD uses `kl` over the response (arXiv 2408.15881, section 3.3), LLaVA-KD also
over the image tokens (arXiv 2410.16236, section 3.2).
"""

from typing import ClassVar

from torch import Tensor

from mmkd.objectives.base import Targets
from mmkd.objectives.scoring import HeadObjective
from mmkd.objectives.settings import AlphaConfig, DivergenceConfig, JsdConfig, SkewConfig
from mmkd.ops import HeadLoss


class Divergence(HeadObjective):
    config_class: ClassVar[type[DivergenceConfig]] = DivergenceConfig
    config: DivergenceConfig

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def head_loss(self, targets: Targets) -> HeadLoss:
        settings = self.config.model_dump(include={"kind", "temperature", "beta", "alpha"})
        rows = self.rows(targets).flatten()
        return HeadLoss(mask=rows, vocab_size=self.shared_vocabulary, **settings)


class Jsd(Divergence):
    config_class = JsdConfig


class SkewDivergence(Divergence):
    config_class = SkewConfig


class AlphaDivergence(Divergence):
    config_class = AlphaConfig
