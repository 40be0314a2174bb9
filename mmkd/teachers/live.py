"""A teacher whose model runs in every step: frozen, in eval mode, without gradients."""

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
    """Runs the teacher's model on a batch, with the student's tokens or with tokens of its own.

    Each process has all weights of the model.

    Attributes:
        spread: the weights are sharded, so all processes must run the model at the same time.
    """

    spread = False

    def __init__(self, model: PreTrainedModel, device: torch.device):
        check_supported(model, "teacher")
        self.device = device
        self.model = self._placed(model.requires_grad_(False).eval())
        self._run_once: set[int] = set()  # layers that ran once in a forward pass of all layers

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        return torch.nn.Module.to(model, self.device)

    @torch.no_grad()
    def signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        """Signals of the teacher on a batch, aligned with the student's tokens.

        Args:
            batch: on the teacher's device.
            request: which tensors of decoder layers are captured.
        """
        own = self.own_signals(batch, request)
        if batch.alignment is None:
            return own
        aligned = batch.alignment(own.hidden)
        return replace(own, hidden=aligned, own_hidden=own.hidden, embeddings=None)

    @torch.no_grad()
    def own_signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        """Signals of the teacher at its own tokens; arguments as in `signals`."""
        if request.stops_early and not request.layers <= self._run_once:
            # Through all layers the first time, because `capture` refuses a model that runs a
            # recorded layer again after the others.
            self._run_once |= request.layers
            request = replace(request, outputs=True)
        own = batch.teacher or batch
        return self.run(own.inputs, replace(request, kept=own.kept))

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor], request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        """Signals of the teacher on inputs of its processor.

        Args:
            inputs: keyword arguments of the model, on the teacher's device.
            request: which tensors of decoder layers are captured.
        """
        return capture(self.model, inputs, request)

    @torch.no_grad()
    def answer_logps(
        self, batch: Batch, vocabulary: int | None, memory: int = CHUNK_BYTES
    ) -> Tensor:
        """Log-probability of each sequence's response, [B]; arguments as in
        `mmkd.objectives.answer_logps`."""
        targets = (batch.teacher or batch).targets
        return answer_logps(self.own_signals(batch), targets, vocabulary, memory)

    def close(self) -> None:
        """Release resources other than the weights; no further forward pass may run."""

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Iterate over names and gathered weights, sorted by name. Every rank must call it.

        Args:
            prefix: beginning of the names.
        """
        for name, tensor in sorted(self.model.state_dict().items()):
            if name.startswith(prefix):
                yield name, tensor
