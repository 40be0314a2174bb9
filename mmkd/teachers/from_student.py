"""Use the student as it was before a stage as the teacher of that stage."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.modeling.adapters import adapters_off
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals
from mmkd.teachers.live import LiveTeacher


class WithoutAdapters(LiveTeacher):
    """Runs the student itself with its adapters disabled, so no weight is in memory twice."""

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return torch.nn.Module.to(model, self.device)

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor], request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        training = self.model.training
        self.model.eval()
        try:
            with adapters_off(self.model):
                return super().run(inputs, request)
        finally:
            self.model.train(training)


def own_teacher(
    student: PreTrainedModel, device: torch.device, *, only_adapters: bool
) -> LiveTeacher:
    """A frozen copy of the student, or the student without its adapters.

    Args:
        student: before its trainable parameters are chosen.
        device: of the stage.
        only_adapters: only adapters are trained, and weights are not sharded. Then no copy is made.
    """
    kind = WithoutAdapters if only_adapters else LiveTeacher
    return kind(student if only_adapters else copy.deepcopy(student), device)
