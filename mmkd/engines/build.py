"""Which engine a stage runs on."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from mmkd.engines.base import Engine
from mmkd.engines.cpu_attention import prefer_float32_attention
from mmkd.engines.deepspeed_config import resolve
from mmkd.engines.deepspeed_engine import DeepSpeedEngine
from mmkd.engines.masters import Masters
from mmkd.engines.optim import build_optimizer, build_schedule
from mmkd.engines.precision import check_dtype, choose_precision
from mmkd.engines.root import Root
from mmkd.engines.torch_engine import TorchEngine
from mmkd.modeling.capture import check_supported
from mmkd.recipe import StageConfig
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed


def build_engine(
    config: StageConfig,
    student: PreTrainedModel,
    steps: int,
    device: torch.device,
    own: nn.ModuleDict | None = None,
) -> Engine:
    """The engine that a stage's recipe asks for, with the student in training mode.

    Args:
        config: settings of the stage.
        student: its trainable weights are chosen already.
        steps: of the stage.
        device: of this process.
        own: modules of objectives, by the objective's name; None if there are none.
    """
    check_supported(student, "student")
    root = Root(student, own)
    nn.Module.to(root, device)
    root.train()
    precision = choose_precision(config.precision, device)
    if device.type == "cpu" and precision == "bfloat16":
        prefer_float32_attention(student)
    if config.activation_checkpointing:
        student.activation_checkpointing_enable()
    fused = device.type == "cuda"
    # DeepSpeed makes float32 copies of its own.
    masters = Masters(root) if config.engine.kind == "torch" else None
    optimizer = _optimizer(config, root, masters, fused=fused)
    schedule = build_schedule(optimizer, config.schedule, steps)
    if config.engine.kind == "deepspeed":
        return DeepSpeedEngine(
            root,
            optimizer,
            schedule,
            config=resolve(config),
            device=device,
            precision=precision,
        )
    return TorchEngine(
        root,
        optimizer,
        schedule,
        device=device,
        precision=precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        masters=masters,
    )


def _optimizer(
    config: StageConfig, root: Root, masters: Masters | None, *, fused: bool
) -> Optimizer:
    """The optimizer over the student, or the float32 copies of its weights, and over the modules of
    objectives."""

    def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
        return module.parameters() if masters is None else masters.parameters(module)

    rates = {o.metric_name: getattr(o, "lr", None) for o in config.objectives}
    own = [(parameters(module), rates.get(name)) for name, module in root.objectives.items()]
    return build_optimizer(parameters(root.model), config.optimizer, own=own, fused=fused)


def check_engine(context: StageContext) -> None:
    """The engine can train the student's weights with the stage's batch.

    Raises:
        RecipeError: it cannot.
    """
    stage = context.stage
    device = distributed.choose_device(stage.engine.device)
    check_dtype(context.recipe.student.dtype, stage, device)
    stage.batch.records_per_step(distributed.world_size())
    if stage.engine.kind == "deepspeed":
        resolve(stage)
