"""`affinity`: match the teacher's similarities between the images and the answers of a batch.

Let I_i be the mean final hidden state of record i's image tokens, and T_j that of record j's
response tokens, both scaled to length 1:

    A = softmax over j of I_i T_j / tau,    B = softmax over i of I_i T_j / tau
    L = 1/n sum_i KL(A^T_i || A^S_i) + 1/n sum_j KL(B^T_j || B^S_j)

This is TinyCLIP's affinity mimicking (Wu et al. 2023, arXiv 2309.12314, section 3.1), with KL
instead of cross-entropy, so that the loss of equal models with one tau is 0. As in TinyCLIP, the
teacher may have a tau of its own (`teacher_temperature`). By default, I and T are centred over the
batch, because the hidden states of a decoder have a large common component. The batch is the
micro-batch of one process. A micro-batch with only one record that has an image and an answer is
not counted in the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.objectives.base import (
    Objective,
    Outcome,
    Signals,
    Targets,
)
from mmkd.objectives.embedding import mean_over
from mmkd.objectives.settings import AffinityConfig


class Affinity(Objective):
    config_class = AffinityConfig
    relates_tokens = True
    relates_records = True
    config: AffinityConfig

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the first response token of each record that has an image and an answer;
        all False if the micro-batch has only one such record."""
        rows = targets.predicts("response") & targets.vision.any(1, keepdim=True)
        return rows & (rows.cumsum(1) == 1) & (rows.any(1).sum() > 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        samples = self.rows(targets).any(1)
        if not samples.any():
            return Outcome(0 * student.hidden.sum())
        with torch.autocast(samples.device.type, enabled=False):
            own = self.config.temperature
            other = self.config.teacher_temperature or own
            mine = self._affinities(student.hidden[samples], targets, samples) / own
            theirs = self._affinities(teacher.hidden[samples].detach(), targets, samples) / other
            kl = [
                F.kl_div(mine.log_softmax(d), theirs.log_softmax(d), reduction="sum",
                         log_target=True)
                for d in (0, 1)
            ]  # fmt: skip
        return Outcome(torch.stack(kl).sum() / count)

    def _affinities(self, hidden: Tensor, targets: Targets, samples: Tensor) -> Tensor:
        """Cosines, [n, n]: images in rows, answers in columns."""
        pictures, answers = (
            self._unit(mean_over(hidden, rows[samples]))
            for rows in (targets.vision, targets.predicts("response"))
        )
        return pictures @ answers.T

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x - x.mean(0) if self.config.center else x, dim=-1)
