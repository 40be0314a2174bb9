"""The engine for one process, or a few with replicated weights: plain torch.

torch's own DistributedDataParallel is not used. It averages the gradients of one forward and its
backward; here gradients add up over micro-steps of several objectives, into float32 copies of
16-bit weights (`mmkd.engines.masters`), some weights have no gradient in some steps, and a step may
have none at all. DDP also groups weights anew after its first step, by the order in which their
gradients came. With more than two processes sums are then rounded in another order, so that the
losses of a resumed run would differ in the last bits. The price is that the sums do not overlap
with the backward. torch's FSDP2 (`fully_shard`) would spread the weights; this engine replicates
them, and `mmkd.engines.deepspeed_engine` spreads them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mmkd.engines.base import Scored, StepResult
from mmkd.engines.common import EngineBase
from mmkd.engines.masters import Masters
from mmkd.engines.optim import forward_schedule
from mmkd.engines.root import Root
from mmkd.engines.state import changing_weights, load_optimizer, load_weights, optimizer_tensors
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals
from mmkd.recipe import Precision

BUCKET_BYTES = 2**25


class TorchEngine(EngineBase):
    """Implements `Engine`; gradients are summed over ranks once per step.

    Args:
        root: the student with the modules of objectives.
        optimizer: over their trainable parameters, or the float32 copies of these.
        schedule: of the optimizer's learning rate.
        device: of this rank.
        precision: of forwards.
        max_grad_norm: longest gradient; 0 switches clipping off.
        masters: the copies, if the optimizer is over them.
    """

    def __init__(
        self,
        root: Root,
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        device: torch.device,
        precision: Precision = "float32",
        max_grad_norm: float = 1.0,
        masters: Masters | None = None,
    ):
        super().__init__(device, precision)
        self.root, self.model = root, root.model
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.masters = masters

    @property
    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def forward(
        self,
        inputs: dict[str, Tensor],
        score: Callable[[Signals], Scored],
        request: CaptureRequest = OUTPUTS_ONLY,
    ) -> Scored:
        self._begin()
        with self.autocast():
            return score(capture(self.model, inputs, request))

    @torch.no_grad()
    def evaluate(
        self,
        inputs: dict[str, Tensor],
        score: Callable[[Signals], Scored],
        request: CaptureRequest = OUTPUTS_ONLY,
        *,
        training: bool = False,
    ) -> Scored:
        self._between()
        self.root.train(training)
        try:
            with self.autocast():
                return score(capture(self.model, inputs, request))
        finally:
            self.root.train()

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        self._between()
        model: Any = self.model
        model.eval()
        try:
            return model.generate(**inputs, **options)
        finally:
            model.train()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._end()
        if loss.requires_grad:
            loss.backward()

    def step(self) -> StepResult:
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world_size > 1:
            self._sum_gradients()
        limit = self.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        if self.masters is not None:
            self.masters.write()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(float(norm), lr)

    def _sum_gradients(self) -> None:
        """Over ranks, many in one message: each alone would wait for the network again."""
        waiting: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self._parameters:
            assert parameter.grad is not None
            bucket = waiting.setdefault(parameter.grad.dtype, [])
            bucket.append(parameter.grad)
            if sum(g.nbytes for g in bucket) >= BUCKET_BYTES:
                _all_reduce(waiting.pop(parameter.grad.dtype))
        for bucket in waiting.values():
            _all_reduce(bucket)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from changing_weights(self.root, self.masters)
        yield from optimizer_tensors(self.root, self.optimizer, self.masters)

    def restore(self, saved: Mapping[str, Tensor], steps: int) -> None:
        load_weights(self.root, saved, self.masters)
        load_optimizer(self.root, self.optimizer, saved, self.masters)
        forward_schedule(self.schedule, steps)

    def restore_weights(self, saved: Mapping[str, Tensor]) -> None:
        load_weights(self.root, saved)

    def weights(self) -> dict[str, Tensor] | None:
        return self.model.state_dict() if self.rank == 0 else None

    def own_weights(self) -> dict[str, Tensor] | None:
        return self.root.objectives.state_dict() if self.rank == 0 else None

    def close(self) -> None:
        self.root.eval()
        if self.masters is not None:
            self.masters.close()


def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum each over ranks, in place."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))
