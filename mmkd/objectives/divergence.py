"""Distillation of output distributions by a divergence of `mmkd.ops`, averaged over a region.

    L = 1/|M| sum_{t in M} D(p_t, q_t)

M are the rows of the region; p and q are the next-token distributions of teacher and student at
temperature T. LLaVA-MoD uses `kl` over the response (arXiv 2408.15881, section 3.3), LLaVA-KD also
over the image tokens (arXiv 2410.16236, section 3.2).
"""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from mmkd.objectives.divergence_settings import (
    AlphaConfig,
    BalancedKlConfig,
    DivergenceConfig,
    EnhancedConfig,
    JsdConfig,
    SkewConfig,
)
from mmkd.objectives.scoring import ACCEPTANCE, HeadObjective
from mmkd.objectives.targets import Targets
from mmkd.ops import HeadLoss

_OF_LOSS = {"kind", "temperature", "teacher_temperature", "top_k", "top_p", "rest"} | {
    *("beta", "alpha", "gamma")
}
"""Settings that a loss has too."""


class Divergence(HeadObjective):
    config_class: ClassVar[type[DivergenceConfig]] = DivergenceConfig
    config: DivergenceConfig

    @property
    def metric_names(self) -> list[str]:
        return [ACCEPTANCE] if self.config.acceptance else []

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def head_loss(self, targets: Targets) -> HeadLoss:
        settings = self.config.model_dump(include=_OF_LOSS)
        rows = self.rows(targets).flatten()
        return HeadLoss(mask=rows, vocab_size=self.shared_vocabulary, **settings)

    def acceptance(self, targets: Targets) -> HeadLoss | None:
        if not self.config.acceptance:
            return None
        rows = self.rows(targets).flatten()
        return HeadLoss("tvd", rows, scale=0.0, vocab_size=self.shared_vocabulary)


class Jsd(Divergence):
    config_class = JsdConfig


class SkewDivergence(Divergence):
    config_class = SkewConfig


class AlphaDivergence(Divergence):
    config_class = AlphaConfig


class BalancedKl(Divergence):
    config_class = BalancedKlConfig
    config: BalancedKlConfig

    def head_loss(self, targets: Targets) -> HeadLoss:
        return replace(super().head_loss(targets), kappa=self.config.kappa * self.config.sign)


class Enhanced(Divergence):
    config_class = EnhancedConfig

    def head_loss(self, targets: Targets) -> HeadLoss:
        return replace(super().head_loss(targets), targets=targets.next_ids().flatten())


DIVERGENCES: tuple[type[Divergence], ...] = (
    Divergence,
    Jsd,
    SkewDivergence,
    AlphaDivergence,
    BalancedKl,
    Enhanced,
)
