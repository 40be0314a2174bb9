"""`affinity`: match the teacher's similarities between the images and the answers of a batch.

Let I_i be the mean final hidden state of record i's image tokens, and T_j that of record j's
response tokens, both scaled to length 1:

    A = softmax over j of I_i T_j / tau,    B = softmax over i of I_i T_j / tau
    L = 1/n sum_i KL(A^T_i || A^S_i) + 1/n sum_j KL(B^T_j || B^S_j)

This is TinyCLIP's affinity mimicking (Wu et al. 2023, arXiv 2309.12314, section 3.1), with KL
instead of cross-entropy, so that the loss of equal models with one tau is 0. As in TinyCLIP, the
teacher may have a tau of its own (`teacher_temperature`). By default, I and T are centred over the
batch, because the hidden states of a decoder have a large common component. The n records are all
records of a step that have an image and an answer, over micro-batches and processes, as in
TinyCLIP. With `gather: false` they are those of a micro-batch of one process; a micro-batch with
only one of them is not counted in the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkd.objectives.embedding import mean_over
from mmkd.objectives.gathered import Features, GatheredObjective
from mmkd.objectives.settings import AffinityConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets


class Affinity(GatheredObjective):
    config_class = AffinityConfig
    relates_tokens = True
    config: AffinityConfig

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the first response token of each record that has an image and an answer;
        without `gather` all False if the micro-batch has only one such record."""
        rows = targets.predicts("response") & targets.vision.any(1, keepdim=True)
        rows = rows & (rows.cumsum(1) == 1)
        return rows if self.gathers else rows & (rows.any(1).sum() > 1)

    def features(self, signals: Signals, targets: Targets) -> Tensor:
        """[n, 2, H]: mean final hidden states of the image and of the answer."""
        records = self.rows(targets).any(1)
        hidden = signals.hidden[records]
        regions = (targets.vision, targets.predicts("response"))
        return torch.stack([mean_over(hidden, rows[records]) for rows in regions], dim=1)

    def compare(self, features: Features) -> Tensor:
        if len(features.student) < 2:
            return 0 * features.student.sum()
        own = self.config.temperature
        mine = self._affinities(features.student) / own
        theirs = self._affinities(features.teacher) / (self.config.teacher_temperature or own)
        kl = [
            F.kl_div(mine.log_softmax(d), theirs.log_softmax(d), reduction="sum", log_target=True)
            for d in (0, 1)
        ]
        return torch.stack(kl).sum()

    def _affinities(self, features: Tensor) -> Tensor:
        """Cosines, [n, n]: images in rows, answers in columns."""
        if self.config.center:
            features = features - features.mean(0)
        pictures, answers = F.normalize(features, dim=-1).unbind(1)
        return pictures @ answers.T
