"""`mutual`: raise a lower bound of the mutual information of both models' hidden states.

    L   = -I
    I   = 1 + 1/K sum_i ln(e^{f_ii} / d_i) - 1/K^2 sum_ij e^{f_ij} / d_j
    d_j = alpha m_j + (1 - alpha) e^b,    m_j = 1/K sum_k e^{f_kj}

f_ij is a critic of the student's state of token i and the teacher's state of token j, for K tokens
of a micro-batch. The critic is the cosine of two linear maps to `width`, times a factor. The factor
and b are numbers that train with the maps and the student. This is the interpolated bound I_alpha
of Poole et al. (2019, arXiv 1905.06922, section 2.4). With alpha = 1 it is InfoNCE, which is at
most ln K. MI-alpha of Distiller (He et al. 2021, arXiv 2109.11105) uses it for layers of language
models. The critic and the choice of tokens are mmkd's, in the spirit of that paper.

K tokens are taken at equal distances from the rows of the region. The bound depends on the other
tokens of the micro-batch: those of one record are similar to each other, so several records in a
micro-batch make it a better one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkd.objectives.base import DecoderParts, Outcome, scale_to_global_mean
from mmkd.objectives.layer_settings import MutualConfig
from mmkd.objectives.layerwise import Layerwise
from mmkd.objectives.linear_maps import apply_map, linear_map
from mmkd.objectives.signals import LayerSignals, Signals
from mmkd.objectives.targets import Targets

FACTOR = 10.0
"""The critic's factor before training."""


class Critic(nn.Module):
    """Args:
    student, teacher: widths of both models' states.
    width: of the space in which they are compared.
    """

    def __init__(self, student: int, teacher: int, width: int):
        super().__init__()
        self.student, self.teacher = linear_map(student, width), linear_map(teacher, width)
        # One element and not a scalar: DeepSpeed has no parameters without dimensions.
        self.log_factor = nn.Parameter(torch.full((1,), math.log(FACTOR)))
        self.log_baseline = nn.Parameter(torch.zeros(1))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The critic of all pairs, [K, K], with students in rows, and b.

        Args:
            student, teacher: [K, width of the model].
        """
        mine = F.normalize(apply_map(self.student, student), dim=-1)
        theirs = F.normalize(apply_map(self.teacher, teacher), dim=-1)
        return mine @ theirs.T * self.log_factor.float().exp(), self.log_baseline.float()[0]


def interpolated_bound(critic: Tensor, log_baseline: Tensor, alpha: float) -> Tensor:
    """I_alpha, a scalar.

    Args:
        critic: [K, K], f; pairs that belong together are on the diagonal.
        log_baseline: scalar, b.
        alpha: from 0 to 1.
    """
    count = len(critic)
    log_mean = critic.logsumexp(0) - math.log(count)  # [K], ln m_j
    parts = [math.log(alpha) + log_mean] if alpha > 0 else []
    if alpha < 1:
        parts.append((math.log(1 - alpha) + log_baseline).expand(count))
    log_d = torch.stack(parts).logsumexp(0)  # [K]
    return 1 + (critic.diagonal() - log_d).mean() - (critic - log_d).exp().mean()


class Mutual(Layerwise):
    config_class = MutualConfig
    relates_tokens = True
    config: MutualConfig

    @property
    def compares_widths(self) -> bool:
        return False

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        assert teacher is not None  # a cache has no layers
        widths = student.width, teacher.width, self.config.width
        return nn.ModuleDict({str(s): Critic(*widths) for s, _ in self.pairs})

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None or self.own is None:
            raise ValueError(f"objective {self.name!r} needs a teacher and its own modules")
        rows = self.rows(targets)
        chosen = evenly(rows.flatten().nonzero()[:, 0], self.config.tokens)
        bounds = []
        with torch.autocast(rows.device.type, enabled=False):
            for mine, theirs in self.pairs:
                critic, baseline = self.own.get_submodule(str(mine))(
                    _states(student.layers[mine], chosen),
                    _states(teacher.layers[theirs], chosen).detach(),
                )
                bound = 0 * critic.sum()
                if len(chosen) > 1:
                    bound = interpolated_bound(critic, baseline, self.config.alpha)
                # Processes need gradients of the same weights: without rows, and with alpha 1 too.
                bounds.append(bound + 0 * baseline)
            return Outcome(scale_to_global_mean(-torch.stack(bounds).mean(), rows, count))


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` of some rows, at equal distances."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).round().long()]


def _states(layer: LayerSignals, rows: Tensor) -> Tensor:
    """Residual streams after a layer at some rows of [B * T], [K, H]."""
    assert layer.block_output is not None
    return layer.block_output.flatten(0, 1)[rows]
