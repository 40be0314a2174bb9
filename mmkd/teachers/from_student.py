"""The student as it was before a stage, as its teacher."""

import copy

import torch
from transformers import PreTrainedModel

from mmkd.data.batch import Batch
from mmkd.modeling.adapters import adapters_off
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals
from mmkd.teachers.live import LiveTeacher


class WithoutAdapters(LiveTeacher):
    """Runs the student itself, its adapters switched off: no weight is there twice."""

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return torch.nn.Module.to(model, self.device)

    @torch.no_grad()
    def own_signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        training = self.model.training
        self.model.eval()
        try:
            with adapters_off(self.model):
                return super().own_signals(batch, request)
        finally:
            self.model.train(training)


def own_teacher(
    student: PreTrainedModel, device: torch.device, *, only_adapters: bool
) -> LiveTeacher:
    """A teacher that stays what the student is now.

    Args:
        student: before its weights are set to train.
        device: of the stage.
        only_adapters: nothing but adapters will train, and all weights stay whole on each process.
    """
    kind = WithoutAdapters if only_adapters else LiveTeacher
    return kind(student if only_adapters else copy.deepcopy(student), device)
