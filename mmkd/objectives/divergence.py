"""Distillation of output distributions: the divergences of `mmkd.ops.divergence` over a region.

    L = 1/|M| sum_{t in M} D(p_t, q_t)

with p the teacher's and q the student's distribution at temperature T. LLaVA-MoD mimics with `kl`
over the response (arXiv 2408.15881, section 3.3); LLaVA-KD adds it over the visual tokens
(arXiv 2410.16236, section 3.2).
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from mmkd.objectives.base import (
    Need,
    Objective,
    ObjectiveConfig,
    Outcome,
    Region,
    Signals,
    Targets,
    share_of,
)
from mmkd.ops import linear_divergence


class DivergenceConfig(ObjectiveConfig):
    """Divergence between the teacher's and the student's next-token distributions."""

    kind: Literal["kl", "reverse_kl", "tvd"]
    region: Region = "response"
    temperature: float = Field(1.0, gt=0, description="divides both logits; no T^2 factor")


class JsdConfig(DivergenceConfig):
    """Generalised Jensen-Shannon divergence."""

    kind: Literal["jsd"]  # type: ignore[assignment]
    beta: float = Field(0.5, ge=0, le=1, description="weight of the teacher in the mixture")


class SkewConfig(DivergenceConfig):
    """KL against a mixture of teacher and student."""

    kind: Literal["skew_kl", "skew_reverse_kl"]  # type: ignore[assignment]
    alpha: float = Field(0.1, ge=0, lt=1, description="skew")


class Divergence(Objective):
    config_class: ClassVar[type[DivergenceConfig]] = DivergenceConfig
    config: DivergenceConfig
    needs: frozenset[Need] = frozenset({"teacher", "distribution"})

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        settings = self.config.model_dump(include={"kind", "temperature", "beta", "alpha"})
        rows = self.rows(targets)
        mean = linear_divergence(
            student.hidden.flatten(0, 1),
            student.head_weight,
            teacher.hidden.flatten(0, 1),
            teacher.head_weight,
            mask=rows.flatten(),
            student_bias=student.head_bias,
            teacher_bias=teacher.head_bias,
            vocab_size=self.shared_vocabulary,
            **settings,
        )
        return Outcome(share_of(mean, rows, count))


class Jsd(Divergence):
    config_class = JsdConfig


class SkewDivergence(Divergence):
    config_class = SkewConfig
