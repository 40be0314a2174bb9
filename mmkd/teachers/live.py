"""A teacher that runs beside the student: frozen, in eval mode, without gradients."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.batch import Batch
from mmkd.modeling.capture import capture, check_supported
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals, answer_logps
from mmkd.ops import CHUNK_BYTES


class LiveTeacher:
    """Runs the teacher on the student's batches, or on its own view of them.

    Every process holds all of its weights.

    Attributes:
        spread: whether processes have to run it together.
    """

    spread = False

    def __init__(self, model: PreTrainedModel, device: torch.device):
        check_supported(model, "teacher")
        self.device = device
        self.model = self._placed(model.requires_grad_(False).eval())

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return torch.nn.Module.to(model, self.device)

    @torch.no_grad()
    def signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        """The teacher's signals on a batch, one per student token; `request` says what is
        read off its decoder's layers."""
        own = self.own_signals(batch, request)
        if batch.alignment is None:
            return own
        aligned = batch.alignment(own.hidden)
        return replace(own, hidden=aligned, own_hidden=own.hidden, embeddings=None)

    @torch.no_grad()
    def own_signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        """The teacher's signals on its own tokens."""
        return capture(self.model, (batch.teacher or batch).inputs, request)

    @torch.no_grad()
    def answer_logps(
        self, batch: Batch, vocabulary: int | None, memory: int = CHUNK_BYTES
    ) -> Tensor:
        """Log-probability of each row's responses, [B]; arguments as in
        `mmkd.objectives.answer_logps`."""
        targets = (batch.teacher or batch).targets
        return answer_logps(self.own_signals(batch), targets, vocabulary, memory)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Its weights by name, sorted, whole, those whose names begin with `prefix`; every rank
        calls it."""
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(prefix):
                yield name, tensor
