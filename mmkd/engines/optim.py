"""Optimizers and schedules of a stage, from torch and transformers.

Those of transformers are imported where they are used: their module imports peft and accelerate.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mmkd.errors import RecipeError
from mmkd.recipe import OptimizerConfig, ScheduleConfig
from mmkd.recipe.context import StageContext


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: OptimizerConfig,
    *,
    own: Sequence[tuple[Iterable[nn.Parameter], float | None]] = (),
    fused: bool = False,
) -> Optimizer:
    """The optimizer over the trainable parameters; vectors get no weight decay.

    Args:
        parameters: of the student.
        config: of the stage.
        own: parameters of objectives with their learning rate; None for the stage's.
        fused: one kernel a step for adam and adamw, on GPUs and for states that wait on the CPU.
    """
    groups = []
    for members, rate in ((parameters, None), *own):
        trainable = [p for p in members if p.requires_grad]
        for decay, params in (
            (config.weight_decay, [p for p in trainable if p.dim() >= 2]),
            (0.0, [p for p in trainable if p.dim() < 2]),
        ):
            lr = config.lr if rate is None else rate
            groups.append({"params": params, "weight_decay": decay, "lr": lr})
    groups = [g for g in groups if g["params"]]
    match config.kind:
        case "adamw" | "adam":
            make = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
            return make(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        case "adafactor":
            from transformers import Adafactor

            return Adafactor(groups, lr=config.lr, scale_parameter=False, relative_step=False)


def build_schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LRScheduler:
    """The learning rate's course over `steps` optimizer steps.

    One step at least follows the warm-up, which begins at 0 or at `min_ratio`: a stage of one step
    trains. Rounding never makes warm-up and decay of `wsd` longer than the stage.
    """
    from transformers.optimization import (
        get_constant_schedule_with_warmup,
        get_cosine_with_min_lr_schedule_with_warmup,
        get_polynomial_decay_schedule_with_warmup,
        get_wsd_schedule,
    )

    warmup = min(round(config.warmup * steps), max(0, steps - 1))
    match config.kind:
        case "cosine":
            return get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, warmup, steps, min_lr_rate=config.min_ratio
            )
        case "wsd":
            decay = min(round(config.decay * steps), steps - warmup)
            return get_wsd_schedule(
                optimizer, warmup, decay, num_training_steps=steps, min_lr_ratio=config.min_ratio
            )
        case "linear":
            # The polynomial schedule divides by lr - lr_end: the two must differ.
            end = min(config.min_ratio, 1 - 1e-9) * optimizer.defaults["lr"]
            return get_polynomial_decay_schedule_with_warmup(
                optimizer, warmup, steps, lr_end=end, power=1.0
            )
        case "constant":
            return get_constant_schedule_with_warmup(optimizer, warmup)


def forward_schedule(schedule: LRScheduler, steps: int) -> None:
    """Put a fresh schedule where `steps` steps would have brought it."""
    assert isinstance(schedule, LambdaLR)
    rates = [
        base * course(steps)
        for base, course in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._step_count, schedule._last_lr = steps, steps + 1, rates


def check_schedule(context: StageContext) -> None:
    """The warm-up ends before the decay begins.

    Raises:
        RecipeError: together they take more than all steps.
    """
    course = context.stage.schedule
    if course.kind == "wsd" and course.warmup + course.decay > 1:
        raise RecipeError(
            f"warmup {course.warmup} and decay {course.decay} take more than all steps",
            where=f"{context.where}: schedule",
            hint="lower one of them: both are shares of the steps",
        )
