"""Distillation of output distributions: the divergences of `mmkd.ops` over a region.

    L = 1/|M| sum_{t in M} D(p_t, q_t)

with p the teacher's and q the student's distribution at temperature T. LLaVA-MoD mimics with `kl`
over the response (arXiv 2408.15881, section 3.3); LLaVA-KD adds it over the visual tokens
(arXiv 2410.16236, section 3.2).
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmkd.objectives.base import Need, ObjectiveConfig, Region, Targets
from mmkd.objectives.together import HeadObjective
from mmkd.ops import HeadLoss


class DivergenceConfig(ObjectiveConfig):
    """Divergence between the teacher's and the student's next-token distributions."""

    kind: Literal["kl", "reverse_kl", "tvd"]
    region: Region = Field("response", description="tokens that it covers")
    temperature: float = Field(1.0, gt=0, description="divides both logits; no T^2 factor")


class JsdConfig(DivergenceConfig):
    """Generalised Jensen-Shannon divergence."""

    kind: Literal["jsd"]  # type: ignore[assignment]
    beta: float = Field(0.5, ge=0, le=1, description="weight of the teacher in the mixture")


class SkewConfig(DivergenceConfig):
    """KL against a mixture of teacher and student."""

    kind: Literal["skew_kl", "skew_reverse_kl"]  # type: ignore[assignment]
    alpha: float = Field(0.1, ge=0, lt=1, description="skew")


class Divergence(HeadObjective):
    config_class: ClassVar[type[DivergenceConfig]] = DivergenceConfig
    config: DivergenceConfig
    needs: frozenset[Need] = frozenset({"teacher", "distribution"})

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
