"""`embedding`: match the teacher's embeddings of the image and of the answer's words.

    L = 1/n sum_i [ a (1 - cos(P v_i, u_i)) + (1 - a) (1 - cos(P v_i, t_i)) ]

For record i of n, v_i is the mean image token of the student and u_i that of the teacher, both
after the connector; t_i is the teacher's mean word embedding of the answer. P is a linear map from
the student's width to the teacher's, which trains with the student.

This is the idea of VL2V-ADiP (Addepalli et al. 2024, arXiv 2310.08255), for models that answer
questions: there, v and u are image embeddings of two encoders, and t is the text embedding of the
image's class. Its first stage trains P alone, its second one the encoder alone; here, P trains in
every stage with `embedding`, and `train` of the stage names what else does. The loss of equal
models is not 0, unless the teacher's image and words are parallel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.objectives.base import DecoderParts, Objective, Outcome
from mmkd.objectives.linear_maps import apply_map, linear_map
from mmkd.objectives.settings import EmbeddingConfig
from mmkd.objectives.signals import Signals
from mmkd.objectives.targets import Targets


class Embedding(Objective):
    config_class = EmbeddingConfig
    relates_tokens = True
    config: EmbeddingConfig

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        assert teacher is not None  # a cache has no embeddings
        return linear_map(student.width, teacher.width)

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the first response token of each record that has an image and an answer."""
        rows = targets.predicts("response") & targets.vision.any(1, keepdim=True)
        return rows & (rows.cumsum(1) == 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None or self.own is None:
            raise ValueError(f"objective {self.name!r} needs a teacher and its own module")
        assert student.embeddings is not None
        assert teacher.embeddings is not None
        records = self.rows(targets).any(1)  # [B]
        vision, response = targets.vision[records], targets.response[records]
        share = self.config.image_weight
        with torch.autocast(records.device.type, enabled=False):
            mine = apply_map(self.own, mean_over(student.embeddings[records], vision))
            theirs = teacher.embeddings[records].detach()
            image = F.cosine_similarity(mine, mean_over(theirs, vision).float(), dim=-1)
            words = F.cosine_similarity(mine, mean_over(theirs, response).float(), dim=-1)
            losses = share * (1 - image) + (1 - share) * (1 - words)  # [n]
            metrics = {"image": (1 - image).sum() / count, "words": (1 - words).sum() / count}
            return Outcome(losses.sum() / count, metrics)


def mean_over(hidden: Tensor, rows: Tensor) -> Tensor:
    """Means over the rows of each sequence, [n, H], in at least float32.

    Args:
        hidden: [n, T, H].
        rows: [n, T] bool, at least one in each sequence.
    """
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    weights = rows.to(wide.dtype)
    return (weights[:, None] @ wide)[:, 0] / weights.sum(1, keepdim=True)
