"""A teacher that is resident beside the student: frozen, in eval mode, without gradients."""

from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.data.batches import Batch
from mmkd.objectives import Signals
from mmkd.signals import capture, check_supported


class LiveTeacher:
    """Runs the teacher on the student's batches."""

    def __init__(self, model: PreTrainedModel, device: torch.device):
        check_supported(model, "teacher")
        self.model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def signals(self, batch: Batch, **layers: Any) -> Signals:
        """The teacher's signals on a batch; `layers` as in `mmkd.signals.capture`."""
        return capture(self.model, batch.inputs, **layers)
