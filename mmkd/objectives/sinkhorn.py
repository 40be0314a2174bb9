"""`sinkhorn`: optimal transport between groups of a student's and a teacher's distributions.

    L = 1/|M| sum over groups of n S(q_1 ... q_n, p_1 ... p_n)

The rows of each record in the region form groups of n in the order of their positions; the last one
may be smaller. S is the debiased entropic transport cost of `mmkd.ops.sinkhorn`, in the spirit of
SinKD (arXiv 2402.17110). With n = 1 the loss is twice `tvd`.
"""

from typing import ClassVar

from torch import Tensor

from mmkd.objectives.base import Objective, Outcome
from mmkd.objectives.divergence_settings import SinkhornConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import Head, linear_sinkhorn


class Sinkhorn(Objective):
    config_class: ClassVar[type[SinkhornConfig]] = SinkhornConfig
    relates_tokens = True
    config: SinkhornConfig

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        rows = self.rows(targets)
        total = linear_sinkhorn(
            _head(student, rows),
            _head(teacher, rows),
            self._sizes(rows),
            temperature=self.config.temperature,
            epsilon=self.config.epsilon,
            iterations=self.config.iterations,
            vocab_size=self.shared_vocabulary,
            memory=self.head_memory,
        )
        return Outcome(total / count)

    def _sizes(self, rows: Tensor) -> list[int]:
        """Sizes of the groups, sequence by sequence."""
        n = self.config.group
        return [min(n, left) for count in rows.sum(1).tolist() for left in range(count, 0, -n)]


def _head(signals: Signals, rows: Tensor) -> Head:
    return Head(signals.hidden[rows], signals.head_weight, signals.head_bias)
