"""What all engines have in common: who and where they are, precision, the micro-step's order."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mmkd.recipe import Precision
from mmkd.runtime import distributed


class EngineBase:
    """The parts of `Engine` that do not depend on who runs the model."""

    def __init__(self, device: torch.device, precision: Precision):
        self.device = device
        self.precision = precision
        self.rank = distributed.rank()
        self.world_size = distributed.world_size()
        self.gradient_scale = 1.0
        self._open = False

    def autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def total(self, values: Tensor) -> Tensor:
        return distributed.total(values)

    def barrier(self) -> None:
        distributed.barrier()

    def _begin(self) -> None:
        if self._open:
            raise RuntimeError("two forwards in one micro-step: call backward first")
        self._open = True

    def _end(self) -> None:
        if not self._open:
            raise RuntimeError("two backwards in one micro-step: add the losses up first")
        self._open = False

    def _between(self) -> None:
        if self._open:
            raise RuntimeError("generation or evaluation inside a micro-step: call backward first")
