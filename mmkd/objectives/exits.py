"""`exits`: a loss on the output head after some of the student's decoder layers.

    L = sum_i w_i L(z_i),    z_i = W n_i(b_i(h_i))

h_i is the residual stream after layer i and W the student's output head. L is `ce` or a divergence,
as a mean over covered tokens; a divergence compares with the teacher, or with the student's own
output after its last layer, without gradients. This is hierarchical self-distillation with exits
(MoSE, arXiv 2503.03008). There, w_i = i / n for the i-th of n layers: `weighting: depth`. The sum
is not divided by the sum of the weights, so that the head's gradient grows with it.

n_i is the student's final norm, or a copy of it for this exit. b_i is nothing, or a copy of the
next layer for this exit. With `block: true` and the loss `enhanced`, the exits are the branches of
OFA-KD (arXiv 2310.19444), with a decoder layer and the student's head in place of a projector into
the teacher's logits, which would have as many parameters as the head.

After training, the layers up to an exit, its norm and the head are a smaller student.
"""

import copy
from typing import Any, ClassVar

from torch import Tensor, nn

from mmkd.objectives.base import DecoderParts, Objective, Outcome
from mmkd.objectives.divergence import DIVERGENCES
from mmkd.objectives.exit_settings import ExitsConfig
from mmkd.objectives.language_modeling import CrossEntropy
from mmkd.objectives.scoring import HeadObjective, head_of
from mmkd.objectives.signals import Exit, Signals, StoredSignals, TeacherSignals
from mmkd.objectives.targets import Targets
from mmkd.ops import Head, SparseRows, head_losses
from mmkd.runtime.registry import settings_kinds

_CLASSES: tuple[type[HeadObjective], ...] = (CrossEntropy, *DIVERGENCES)
LOSSES = {kind: cls for cls in _CLASSES for kind in settings_kinds(cls.config_class)}


def following(layer: int, count: int) -> int:
    """Index of the layer that the block of an exit is a copy of: the next one; for the last layer,
    that layer itself."""
    return min(layer + 1, count - 1)


def _trainable(module: nn.Module) -> nn.Module:
    """A copy of a module that trains. It has no hooks: those of the model's earlier stages, such as
    hooks for packed rows, would read a state that is copied too."""
    made = copy.deepcopy(module).requires_grad_(True)
    for part in made.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return made


class Exits(Objective):
    config_class: ClassVar[type[ExitsConfig]] = ExitsConfig
    config: ExitsConfig
    accepts_stored_rows = True

    def __init__(self, config: ExitsConfig, **settings: Any):
        super().__init__(config, **settings)
        self.loss = LOSSES[config.loss.kind](config.loss, **settings)

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        if not self.config.trains_own:
            return None
        own: dict[str, nn.Module] = {}
        for layer in self.config.layers:
            parts: dict[str, nn.Module] = {}
            if self.config.norm == "own":
                assert student.final_norm is not None
                parts["norm"] = student.final_norm
            if self.config.block:
                parts["block"] = student.layers[following(layer, len(student.layers))]
            own[str(layer)] = nn.ModuleDict({name: _trainable(m) for name, m in parts.items()})
        return nn.ModuleDict(own)

    @property
    def exits(self) -> list[Exit]:
        if self.own is None:
            return [Exit(layer) for layer in self.config.layers]
        found = []
        for layer in self.config.layers:
            modules: Any = self.own.get_submodule(str(layer))
            parts = dict(modules.items())
            found.append(Exit(layer, parts.get("block"), parts.get("norm")))
        return found

    @property
    def metric_names(self) -> list[str]:
        return [f"layer_{layer}" for layer in self.config.layers]

    def rows(self, targets: Targets) -> Tensor:
        return self.loss.rows(targets)

    def __call__(
        self, student: Signals, teacher: TeacherSignals | None, targets: Targets, count: float
    ) -> Outcome:
        if self.config.trains_own and self.own is None:
            raise ValueError(f"objective {self.name!r} needs its own modules")
        theirs = self._compared(student, teacher)
        loss = self.loss.head_loss(targets)
        terms, metrics = [], {}
        for place in self.exits:
            read = student.exits[place]
            weight = read.share if self.config.weighting == "depth" else 1.0
            total, sums = head_losses(
                Head(read.hidden.flatten(0, 1), student.head_weight, student.head_bias),
                [loss.scaled(weight / count)],
                theirs,
                memory=self.head_memory,
                backend=self.head_backend,
            )
            terms.append(total)
            metrics[f"layer_{place.layer}"] = sums[0] / count
        return Outcome(sum(terms[1:], terms[0]), metrics)

    def _compared(
        self, student: Signals, teacher: TeacherSignals | None
    ) -> Head | SparseRows | None:
        """What the divergence compares with; None for `ce`."""
        if "teacher" not in self.loss.needs:
            return None
        if self.config.teacher == "self":
            last = head_of(student.detached())
            return Head(last.hidden.detach(), last.weight, last.bias)
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        return teacher.rows if isinstance(teacher, StoredSignals) else head_of(teacher)
