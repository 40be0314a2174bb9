"""The protocol that stages train through.

A micro-step is one forward (any number of objectives) and one backward. Losses arrive already
divided by the global batch's token counts, so gradients add up: over micro-steps and over ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals

Scored = TypeVar("Scored")


@dataclass(frozen=True)
class StepResult:
    """Gradient norm before clipping, and the learning rate that the step used."""

    grad_norm: float
    lr: float


class Engine(Protocol):
    """What a stage needs from an engine."""

    rank: int
    world_size: int
    device: torch.device
    gradient_scale: float
    """Factor of all gradients in a backward pass; `step` divides by it."""

    def autocast(self) -> AbstractContextManager:
        """Precision of forwards; the teacher runs under it too."""
        ...

    def forward(
        self,
        inputs: dict[str, Tensor],
        score: Callable[[Signals], Scored],
        request: CaptureRequest = OUTPUTS_ONLY,
    ) -> Scored:
        """What `score` makes of the student's signals, with gradients; opens a micro-step.

        Objectives run inside of the forward: only there are all weights that they read, the head's
        among them, whole on every rank. `request` says what is read off the decoder's layers.
        """
        ...

    def evaluate(
        self,
        inputs: dict[str, Tensor],
        score: Callable[[Signals], Scored],
        request: CaptureRequest = OUTPUTS_ONLY,
        *,
        training: bool = False,
    ) -> Scored:
        """What `score` makes of the student's signals in evaluation mode, without gradients;
        between micro-steps. Every rank calls it equally often. Arguments as in `forward`; with
        `training` the student stays in training mode, so that it draws dropout."""
        ...

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """The student's answers, [B, prompt + answer] token ids, in evaluation mode; between
        micro-steps. `options` are those of transformers' `generate`."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Close the micro-step; `last` of its step. Once a micro-step."""
        ...

    def step(self) -> StepResult:
        """Clip, update, advance the schedule, clear gradients.

        The gradient of a weight that no loss of the step depends on is zero: its momentum and its
        decay go on.
        """
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that training changes, by name, whole and exact: `weights/NAME`, then
        `optimizer/NAME/STATE`. Every rank calls it and sees the same in the same order."""
        ...

    def restore(self, saved: Mapping[str, Tensor], steps: int) -> None:
        """Continue after `steps` steps from what `tensors` gave, on any engine and any number of
        ranks."""
        ...

    def restore_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Take the weights of what `tensors` gave, and leave the optimizer as it is: the student is
        not trained on. Every rank calls it."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """The student's whole state dict for a model folder, None on all ranks but the first;
        every rank calls it."""
        ...

    def own_weights(self) -> dict[str, Tensor] | None:
        """The state dict of the modules of objectives, by the objective's name; None on all ranks
        but the first. Every rank calls it."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds on to; the student is not trained on."""
        ...
