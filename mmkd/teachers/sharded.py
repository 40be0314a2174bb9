"""A teacher whose weights are sharded over processes or offloaded to the CPU.

This is ZeRO stage 3 without an optimizer: the weights of each layer are gathered when it runs
(Rajbhandari et al. 2020, arXiv 1910.02054, section 5.3).
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.engines.root import Root
from mmkd.engines.zero import gathered, start
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.objectives import Signals
from mmkd.teachers.live import LiveTeacher

WHOLE_BELOW = 100_000
"""Weights with fewer elements are not sharded."""


class ShardedTeacher(LiveTeacher):
    """Runs a sharded teacher. Its signals equal those of a replicated one.

    The head is not sharded, because objectives project chunks of rows through it after the
    teacher's forward pass.

    Args:
        model: the teacher with all weights; this object takes ownership.
        device: of this rank.
        offload: keep each process's shard on the CPU.
    """

    spread = True

    def __init__(self, model: PreTrainedModel, device: torch.device, *, offload: bool = False):
        self.offload = offload
        super().__init__(model, device)

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        deepspeed = start(self.device)
        head = copy.deepcopy(model.get_output_embeddings()).to(self.device)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": WHOLE_BELOW}
        if self.offload:
            pinned = self.device.type == "cuda"
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
        half = next(model.parameters()).dtype == torch.bfloat16
        self.engine, *_ = deepspeed.initialize(
            model=Root(model),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "bf16": {"enabled": half},
                "zero_optimization": zero,
            },
        )
        self.engine.eval()
        for name, buffer in model.named_buffers():
            buffer.data = buffers[name].to(self.device)
        self._spread_head = model.get_output_embeddings()
        model.set_output_embeddings(head)
        return model

    @torch.no_grad()
    def run(self, inputs: dict[str, Tensor], request: CaptureRequest = OUTPUTS_ONLY) -> Signals:
        precision = self._precision()
        # DeepSpeed releases and prefetches weights in hooks after each module, so all modules run.
        request = replace(request, outputs=True)

        def captured(model: PreTrainedModel) -> Signals:
            with precision:  # DeepSpeed disables the outer autocast context
                return capture(model, inputs, request)

        return self.engine(captured)

    def _precision(self) -> AbstractContextManager:
        kind = self.device.type
        return torch.autocast(
            kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )

    def close(self) -> None:
        self.engine.destroy()

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in super().tensors(prefix):
            parameter = parameters.get(name)
            if parameter is None or not hasattr(parameter, "ds_id"):
                yield name, tensor
                continue
            with gathered([parameter]):
                yield name, parameter.detach()
