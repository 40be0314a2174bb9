"""Which engine a stage runs on."""

import torch
from transformers import PreTrainedModel

from mmkd.engines.base import Engine
from mmkd.engines.cpu_attention import prefer_float32_attention
from mmkd.engines.deepspeed_config import resolve
from mmkd.engines.deepspeed_engine import DeepSpeedEngine
from mmkd.engines.masters import Masters
from mmkd.engines.optim import build_optimizer, build_schedule
from mmkd.engines.precision import check_dtype, choose_precision
from mmkd.engines.torch_engine import TorchEngine
from mmkd.modeling.capture import check_supported
from mmkd.recipe import StageConfig
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed


def build_engine(
    config: StageConfig, student: PreTrainedModel, steps: int, device: torch.device
) -> Engine:
    """The engine that a stage's recipe asks for, with the student in training mode; its trainable
    weights are chosen already."""
    check_supported(student, "student")
    torch.nn.Module.to(student, device)
    student.train()
    precision = choose_precision(config.precision, device)
    if device.type == "cpu" and precision == "bfloat16":
        prefer_float32_attention(student)
    if config.activation_checkpointing:
        student.activation_checkpointing_enable()
    fused = device.type == "cuda"
    # DeepSpeed makes float32 copies of its own.
    masters = Masters(student) if config.engine.kind == "torch" else None
    parameters = student.parameters() if masters is None else masters.parameters(student)
    optimizer = build_optimizer(parameters, config.optimizer, fused=fused)
    schedule = build_schedule(optimizer, config.schedule, steps)
    if config.engine.kind == "deepspeed":
        return DeepSpeedEngine(
            student,
            optimizer,
            schedule,
            config=resolve(config),
            device=device,
            precision=precision,
        )
    return TorchEngine(
        student,
        optimizer,
        schedule,
        device=device,
        precision=precision,
        max_grad_norm=config.optimizer.max_grad_norm,
        masters=masters,
    )


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
