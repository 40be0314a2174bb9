"""The protocol that stages train through.

A micro-step is one forward (any number of objectives) and one backward. Losses arrive already
divided by the global batch's token counts, so gradients add up: over micro-steps and over ranks.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmkd.objectives import Signals


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

    def autocast(self) -> AbstractContextManager:
        """Precision of forwards; the teacher runs under it too."""
        ...

    def forward(self, inputs: dict[str, Tensor], **layers: Any) -> Signals:
        """Student signals with gradients; opens a micro-step. `layers` are the arguments of
        `mmkd.signals.capture` that say what is read off the layers."""
        ...

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """The student's answers, [B, prompt + answer] token ids, in evaluation mode; between
        micro-steps. `options` are those of transformers' `generate`."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Close the micro-step; `last` marks the last one before `step`. Once a micro-step."""
        ...

    def step(self) -> StepResult:
        """Clip, update, advance the schedule, clear gradients."""
        ...

    def total(self, values: Tensor) -> Tensor:
        """Sum over ranks."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and schedule; every rank calls it."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...
