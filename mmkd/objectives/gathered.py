"""Objectives that compare all records of the global batch with each other.

The loss is a function L(f_1, ..., f_n) of feature vectors, one set for each record that the
objective covers. A stage may compute them in several micro-batches and processes. The gradient is
exact all the same, because

    dL/dw = sum_i <dL/df_i, df_i/dw>

Within a micro-batch, `GatheredObjective` collects the feature vectors of all processes. Over
several micro-batches, `mmkd.training.gathered` computes all feature vectors first, without
gradients, and then their gradients in each micro-batch (GradCache, Gao et al. 2021, arXiv
2101.06983, section 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mmkd.objectives.base import Objective, Outcome
from mmkd.objectives.base_settings import GatheredObjectiveConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets
from mmkd.runtime import distributed


@dataclass(frozen=True)
class Features:
    """Feature vectors of n records, in at least float32.

    Attributes:
        student: [n, ...].
        teacher: [n, ...], detached; the shape of a record may differ from the student's. [0] if the
            teacher did not run because no record is covered.
    """

    student: Tensor
    teacher: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Features"]) -> "Features":
        """The records of all parts, in their order."""
        return cls(torch.cat([p.student for p in parts]), torch.cat([p.teacher for p in parts]))

    def gathered(self) -> "Features":
        """The records of all processes, in the order of their ranks. Gradients flow into those of
        this process only. Every process must call it."""
        return Features(
            distributed.gather_rows(self.student), distributed.gather_rows(self.teacher)
        )


class GatheredObjective(Objective):
    """Base class of objectives whose loss is a function of feature vectors of records. A subclass
    implements `rows`, with one row for each record that it covers, `features` and `compare`."""

    relates_records = True
    config: GatheredObjectiveConfig

    @property
    def gathers(self) -> bool:
        return self.config.gather

    def features(self, signals: Signals, targets: Targets) -> Tensor:
        """Feature vectors of one model, [n, ...] in at least float32, for the n covered records of
        a micro-batch, in order."""
        raise NotImplementedError

    def compare(self, features: Features) -> Tensor:
        """The loss, summed over records; 0 if there are too few records to compare."""
        raise NotImplementedError

    @final
    def features_of(self, student: Signals, teacher: Signals | None, targets: Targets) -> Features:
        """Feature vectors of both models.

        Args:
            student, teacher: signals of a micro-batch; no teacher if it did not run because the
                objective covers no record.
            targets: of the micro-batch, restricted to the objective's data sources.
        """
        with torch.autocast(targets.attention.device.type, enabled=False):
            mine = self.features(student, targets)
            if teacher is not None:
                return Features(mine, self.features(teacher, targets).detach())
        if len(mine):
            raise ValueError(f"objective {self.name!r} needs a teacher")
        return Features(mine, mine.new_zeros(0))

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        """The loss of one micro-batch, or of one micro-batch of each process if the objective
        gathers. Then every process must call it, and the value is this process's share."""
        own = self.features_of(student, teacher, targets)
        compared = own.gathered() if self.gathers else own
        with torch.autocast(targets.attention.device.type, enabled=False):
            loss = self.compare(compared) / count
        value = loss.detach() * (len(own.student) / max(len(compared.student), 1))
        return Outcome(value + (loss - loss.detach()))
