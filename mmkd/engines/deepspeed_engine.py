"""DeepSpeed's ZeRO engines with the interface of `Engine` (Rajbhandari et al. 2020, arXiv
1910.02054).

Checkpoints have gathered tensors by name, read and written by DeepSpeed's public `safe_get_*` and
`safe_set_*` functions. These need the optimizer's states, which DeepSpeed makes in its first step
and has no public way to make before. A resume therefore uses members of its ZeRO optimizers that
are not documented: `single_partition_of_fp32_groups` and `fp32_partitioned_groups_flat`, the
weights that this process updates (stages 1 and 2, and 3); `_optimizer_step`, which makes the
states; `_hp_optimizer_states_linked` and `_lazy_init_hp_params_optimizer_state`, which link them
to the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from mmkd.engines.base import Scored, StepResult
from mmkd.engines.common import EngineBase
from mmkd.engines.optim import forward_schedule
from mmkd.engines.root import OBJECTIVES, STUDENT, Root
from mmkd.engines.state import (
    OPTIMIZER,
    WEIGHTS,
    changing_weights,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    saved_buffers,
)
from mmkd.engines.zero import gathered, start
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals
from mmkd.recipe import Precision


class DeepSpeedEngine(EngineBase):
    """Implements `Engine`; stages 0 to 3.

    Args:
        root: the student with the modules of objectives, in full on every rank; the weights belong
            to the engine from here on.
        optimizer: over the trainable parameters.
        schedule: of that optimizer's learning rate; the engine steps it.
        config: DeepSpeed's, with every value resolved.
        device: of this rank.
        precision: bfloat16 keeps weights in bfloat16 and master weights in float32.
    """

    def __init__(
        self,
        root: Root,
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        config: dict[str, Any],
        device: torch.device,
        precision: Precision = "float32",
    ):
        super().__init__(device, precision)
        deepspeed = start(device)
        # DeepSpeed averages gradients over ranks; ours add up.
        self.gradient_scale = float(self.world_size)
        self.root, self.model = root, root.model
        self.schedule = schedule
        self.zero: int = config["zero_optimization"]["stage"]
        self._optimizer = optimizer
        self._dtypes = {name: t.dtype for name, t in root.state_dict().items()}
        buffers = {name: b.clone() for name, b in root.named_buffers()}
        self.engine, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config)
        for name, buffer in root.named_buffers():
            buffer.data = buffers[name].to(device)  # weights in bfloat16, positions not

    def forward(
        self,
        inputs: dict[str, Tensor],
        score: Callable[[Signals], Scored],
        request: CaptureRequest = OUTPUTS_ONLY,
    ) -> Scored:
        self._begin()

        def run(model: PreTrainedModel) -> Scored:
            with self.autocast():
                return score(capture(model, inputs, request))

        return self.engine(run)

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

        def run(model: PreTrainedModel) -> Scored:
            with self.autocast():
                return score(capture(model, inputs, request))

        self.engine.train(training)
        try:
            return self.engine(run)
        finally:
            self.engine.train()

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        self._between()
        model: Any = self.model
        self.engine.eval()
        try:
            return model.generate(**inputs, **options)
        finally:
            self.engine.train()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        self._end()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.gradient_scale, scale_wrt_gas=False)
        if not last:
            self.engine.step()  # counts the micro-step

    def step(self) -> StepResult:
        lr = float(self.schedule.get_last_lr()[0])
        norm = self._whole_norm() if self.zero == 0 else None
        self.engine.step()
        self.schedule.step()
        return StepResult(float(self.engine.get_global_grad_norm() if norm is None else norm), lr)

    def _whole_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self.root.parameters() if p.grad is not None]
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.zero == 0:
            yield from changing_weights(self.root)
            yield from optimizer_tensors(self.root, self._optimizer)
            return
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        trainable = {n: p for n, p in self.root.by_name().items() if p.requires_grad}
        for name, parameter in trainable.items():
            yield f"{WEIGHTS}/{name}", safe_get_full_fp32_param(parameter)
        yield from saved_buffers(self.root)
        states, step = self._states()
        self._link_states()
        for name, parameter in trainable.items():
            for state in states:
                whole = safe_get_full_optimizer_state(parameter, state)
                yield f"{OPTIMIZER}/{name}/{state}", whole
            if step is not None:
                yield f"{OPTIMIZER}/{name}/step", step

    def _states(self) -> tuple[list[str], Tensor | None]:
        """Names of the states that have a parameter's shape, and the count of steps."""
        state: dict[str, Any] = next(iter(self._optimizer.state.values()), {})
        step = state.get("step", self._optimizer.param_groups[0].get("step"))
        shaped = [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() > 0]
        return shaped, None if step is None else torch.as_tensor(step, dtype=torch.float32)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor], steps: int) -> None:
        if self.zero == 0:
            load_weights(self.root, saved)
            load_optimizer(self.root, self._optimizer, saved)
        else:
            self._restore_sharded(saved, steps)
        forward_schedule(self.schedule, steps)

    @torch.no_grad()
    def restore_weights(self, saved: Mapping[str, Tensor]) -> None:
        if self.zero == 0:
            load_weights(self.root, saved)
        else:
            self._restore_sharded_weights(saved)

    def _restore_sharded_weights(self, saved: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.root.by_name().items():
            if parameter.requires_grad:
                weight = saved[f"{WEIGHTS}/{name}"].to(self.device)
                with self._gathered([parameter], changed=True):
                    parameter.data.copy_(weight)
                safe_set_full_fp32_param(parameter, weight)
        for key, buffer in saved_buffers(self.root):
            buffer.copy_(saved[key])

    def _restore_sharded(self, saved: Mapping[str, Tensor], steps: int) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        self._create_states()
        self._link_states()
        self._restore_sharded_weights(saved)
        states, _ = self._states()
        for name, parameter in self.root.by_name().items():
            for state in states if parameter.requires_grad else []:
                value = saved.get(f"{OPTIMIZER}/{name}/{state}")
                if value is not None:  # torch keeps no states of what has no gradient
                    safe_set_full_optimizer_state(parameter, value.to(self.device), state)
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"]), steps)
        for group in self._optimizer.param_groups:
            if "step" in group:
                group["step"] = steps

    def _create_states(self) -> None:
        """Have the optimizer make its states: a step of zero gradients at learning rate zero."""
        zero: Any = self.engine.optimizer
        rates = [group["lr"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0
        if self.zero == 3:
            parts = zero.fp32_partitioned_groups_flat
        else:
            parts = zero.single_partition_of_fp32_groups
        before = [part.grad for part in parts]
        for part in parts:
            part.grad = torch.zeros_like(part)
        for number in range(len(parts)):
            zero._optimizer_step(number)
        for part, grad in zip(parts, before, strict=True):
            part.grad = grad
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _link_states(self) -> None:
        """Tell stages 1 and 2 where states are: they look once, when the first of their groups has
        made its step, and miss those of the others."""
        if self.zero < 3:
            zero: Any = self.engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _gathered(
        self, parameters: list[nn.Parameter], *, changed: bool = False
    ) -> AbstractContextManager:
        return gathered(parameters, changed=changed) if self.zero == 3 else nullcontext()

    def weights(self) -> dict[str, Tensor] | None:
        return self._whole(STUDENT)

    def own_weights(self) -> dict[str, Tensor] | None:
        return self._whole(OBJECTIVES)

    @torch.no_grad()
    def _whole(self, part: str) -> dict[str, Tensor] | None:
        """The state dict of one part of the root; None on all ranks but the first."""
        from deepspeed.utils import safe_get_full_fp32_param

        module = self.root.get_submodule(part)
        whole: dict[int, Tensor] = {}  # shared parameters once
        for parameter in module.parameters():
            master = None
            if parameter.requires_grad and self.zero > 0:
                master = safe_get_full_fp32_param(parameter)
            with self._gathered([parameter]):
                if self.rank == 0:
                    whole[id(parameter)] = (parameter if master is None else master).detach().cpu()
        if self.rank > 0:
            return None
        named = {n: whole[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
        named |= dict(module.named_buffers())
        dtypes = {
            name.removeprefix(f"{part}."): dtype
            for name, dtype in self._dtypes.items()
            if name.startswith(f"{part}.")
        }
        return {name: named[name].to(dtype) for name, dtype in dtypes.items()}

    def close(self) -> None:
        self.root.eval()
        self.engine.destroy()
