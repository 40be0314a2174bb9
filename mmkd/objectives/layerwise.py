"""Layer-wise objectives: distances between tensors of the student's and the teacher's layers.

    mixer_mse    |h_s - h_t|^2 / width      heads before the output projection
                                            (mmMamba, arXiv 2502.13145, stages 1 and 2)
    layer_l2     |y_s - y_t|                at the block's output (MaTVLM's layer loss,
                                            arXiv 2503.13440) or at the mixer's (MOHAWK,
                                            arXiv 2408.10189, stage 2)
    hidden_mse   |x_s - x_t|^2 / width      residual streams (TinyBERT, arXiv 1909.10351, eq. 8);
                                            with `linear_map`, W x_s in place of x_s, as there;
                                            with `normalize: token`
                            |x_s - x_t|^2 / |x_t|^2 (SquareHead, arXiv 2310.06927)
    matrix       |A - M|                    rows of the attention's probabilities A and the mixer's
                                            matrix M (MOHAWK, stage 1)

Each is a mean over layers and covered tokens. |.| is the 2-norm of one token's vector. MaTVLM and
MOHAWK use the Frobenius norm of a whole sequence; a norm per token can be averaged over batches of
any layout.

SquareHead divides by the mean square of the teacher's states over all tokens of a batch. With
`normalize: token`, each token is divided by its own instead: a few tokens with a very large norm
then do not determine the scale of the loss of all others, and the loss does not depend on the batch
layout.

With `teacher_forced`, the input of each student layer is the input of the teacher's layer, so that
layers train independently and errors of earlier layers do not propagate.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from mmkd.objectives.base import DecoderParts, Objective, Outcome
from mmkd.objectives.layer_settings import (
    HiddenMseConfig,
    LayerL2Config,
    LayerwiseConfig,
    MatrixConfig,
    MixerMseConfig,
)
from mmkd.objectives.linear_maps import apply_map, linear_map
from mmkd.objectives.signals import LayerSignals, Signals
from mmkd.objectives.targets import Targets

EPSILON = 1e-8
"""Is added to the mean square of a teacher's token in `normalize: token`."""


class Layerwise(Objective):
    """Base class: a distance per token, averaged over pairs of layers."""

    config: LayerwiseConfig

    @property
    def compares_widths(self) -> bool:
        return True

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of the compared layers: (student layer, teacher layer)."""
        own = self.config.layers
        layers = self.mamba_layers if own is None else own
        return list(zip(layers, self.config.teacher_layers or layers, strict=True))

    @property
    def compares_blocks(self) -> bool:
        """Whether it compares outputs of whole layers, instead of outputs of their mixers."""
        return False

    @property
    def forced(self) -> Literal["mixer", "block"] | None:
        if not self.config.teacher_forced:
            return None
        return "block" if self.compares_blocks else "mixer"

    def rows(self, targets: Targets) -> Tensor:
        return targets.predicts(self.config.region)

    def distance(self, student: LayerSignals, teacher: LayerSignals) -> Tensor:
        """Distance per token, [B, T]."""
        raise NotImplementedError

    def mapped(self, layer: int, signals: LayerSignals) -> LayerSignals:
        """The signals of a student layer as they are compared."""
        return signals

    def _layers_of(self, student: Signals) -> dict[int, LayerSignals]:
        """Signals of the free, mixer-forced or block-forced run that this objective compares."""
        if self.forced is None:
            return student.layers
        return student.forced_blocks if self.forced == "block" else student.forced_mixers

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        mine = self._layers_of(student)
        rows = self.rows(targets)
        with torch.autocast(rows.device.type, enabled=False):
            distances = [
                self.distance(self.mapped(s, mine[s]), teacher.layers[t])[rows]
                for s, t in self.pairs
            ]
            return Outcome(torch.stack(distances).sum() / (count * len(self.pairs)))


class MixerMse(Layerwise):
    config_class = MixerMseConfig

    def distance(self, student: LayerSignals, teacher: LayerSignals) -> Tensor:
        return _mean_square(student.mixer_heads, teacher.mixer_heads)


class LayerL2(Layerwise):
    config_class = LayerL2Config
    config: LayerL2Config

    @property
    def compares_blocks(self) -> bool:
        return self.config.at == "block"

    def distance(self, student: LayerSignals, teacher: LayerSignals) -> Tensor:
        if self.config.at == "mixer":
            return _norm(student.mixer_output, teacher.mixer_output)
        return _norm(student.block_output, teacher.block_output)


class HiddenMse(Layerwise):
    config_class = HiddenMseConfig
    config: HiddenMseConfig
    compares_blocks = True

    @property
    def compares_widths(self) -> bool:
        return not self.config.linear_map

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        if not self.config.linear_map:
            return None
        assert teacher is not None  # a cache has no layers
        maps = {str(s): linear_map(student.width, teacher.width) for s, _ in self.pairs}
        return nn.ModuleDict(maps)

    def mapped(self, layer: int, signals: LayerSignals) -> LayerSignals:
        if self.own is None:
            return signals
        assert signals.block_output is not None
        found = apply_map(self.own.get_submodule(str(layer)), signals.block_output)
        return replace(signals, block_output=found)

    def distance(self, student: LayerSignals, teacher: LayerSignals) -> Tensor:
        squares = _mean_square(student.block_output, teacher.block_output)
        if self.config.normalize == "none":
            return squares
        assert teacher.block_output is not None
        scale = teacher.block_output.detach().float().square().mean(-1)  # [B, T]
        return squares / (scale + EPSILON)


class Matrix(Layerwise):
    config_class = MatrixConfig
    relates_tokens = True

    def distance(self, student: LayerSignals, teacher: LayerSignals) -> Tensor:
        if student.matrix is None or teacher.matrix is None:
            raise ValueError(f"objective {self.name!r} needs mixing matrices")
        return _norm(student.matrix, teacher.matrix).mean(1)  # [B, heads, T] -> [B, T]


def _mean_square(a: Tensor | None, b: Tensor | None) -> Tensor:
    assert a is not None
    assert b is not None
    return (a.float() - b.float()).square().mean(-1)


def _norm(a: Tensor | None, b: Tensor | None) -> Tensor:
    assert a is not None
    assert b is not None
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1)
