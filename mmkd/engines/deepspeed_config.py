"""DeepSpeed's config: settings of the recipe, and further settings of the user's DeepSpeed file.

For settings of the recipe, the file may have `auto` or the same value. Another value is an error.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmkd.engines.precision import choose_precision
from mmkd.errors import RecipeError
from mmkd.recipe import StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import read_json

AUTO = "auto"
ZERO = 2
OPTIMIZERS = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
SILENT = 2**62  # steps between DeepSpeed's own reports: mmkd has its own


def resolve(stage: StageConfig) -> dict[str, Any]:
    """The whole DeepSpeed config of a stage.

    Raises:
        RecipeError: the file cannot be read or contradicts the recipe, or the stage asks for
            something that ZeRO cannot do, or DeepSpeed is not installed.
    """
    engine = stage.engine
    if find_spec("deepspeed") is None:
        raise RecipeError(
            "DeepSpeed is not there",
            where=f"stage {stage.name}: engine.kind deepspeed",
            hint="pip install 'mmkd[deepspeed]', or set engine.kind to torch",
        )
    where = f"stage {stage.name}: engine"
    file = _read(engine.config) if engine.config else {}
    if engine.config:
        where = f"{where}.config {engine.config}"
    zero = engine.zero
    if zero is None:
        said = file.get("zero_optimization", {}).get("stage", AUTO)
        zero = ZERO if said == AUTO else said
    ours = _ours(stage, zero)
    file = _without_optimizer(file, stage, where)
    merged = _merge(ours, file, where)
    _refuse(stage, zero, merged, where)
    return merged


def _ours(stage: StageConfig, zero: int) -> dict[str, Any]:
    device = distributed.choose_device(stage.engine.device)
    half = choose_precision(stage.precision, device) == "bfloat16"
    optimization: dict[str, Any] = {"stage": zero}
    if stage.engine.offload != "none":
        pinned = device.type == "cuda"
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
        if stage.engine.offload == "all":
            optimization["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    processes = distributed.world_size()
    # Where a token budget cuts a step, only the engine knows how many micro-steps it has.
    micro_steps = stage.batch.micro_steps(processes) or 1
    size = stage.batch.records_per_step(processes) // (micro_steps * processes)
    return {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": size * micro_steps * processes,
        "gradient_clipping": stage.optimizer.max_grad_norm,
        "bf16": {"enabled": half},
        "fp16": {"enabled": False},
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": SILENT,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        found = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read the DeepSpeed file ({error})",
            where=path,
            hint="give a JSON file such as configs/deepspeed/zero2.json",
        ) from error
    if not isinstance(found, dict):
        raise RecipeError("a DeepSpeed file is one JSON object", where=path)
    return found


def _without_optimizer(file: dict[str, Any], stage: StageConfig, where: str) -> dict[str, Any]:
    """The file without optimizer and scheduler, which have to be the recipe's."""
    settings = stage.optimizer
    optimizer = file.get("optimizer", {})
    params = {"lr": settings.lr, "betas": list(settings.betas), "eps": settings.eps}
    params |= {"weight_decay": settings.weight_decay, "momentum": settings.momentum}
    _merge(
        {"type": OPTIMIZERS.get(settings.kind), "params": params}, optimizer, f"{where} optimizer"
    )
    scheduler = file.get("scheduler", {}).get("params", {})
    if any(value != AUTO for value in scheduler.values()):
        raise RecipeError(
            "it brings a scheduler of its own",
            where=where,
            hint="remove it: the recipe's 'schedule' runs",
        )
    return {k: v for k, v in file.items() if k not in ("optimizer", "scheduler")}


def _merge(ours: dict[str, Any], theirs: dict[str, Any], where: str, path: str = "") -> Any:
    """Both together.

    Raises:
        RecipeError: they say different things.
    """
    merged = dict(ours)
    for key, value in theirs.items():
        name = f"{path}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key, {}), dict):
            merged[key] = _merge(ours.get(key, {}), value, where, f"{name}.")
        elif key not in ours:
            if value == AUTO:
                continue  # DeepSpeed's own default
            merged[key] = value
        elif value not in (AUTO, ours[key]):
            raise RecipeError(
                f"{name} is {value!r}, the recipe says {ours[key]!r}",
                where=where,
                hint="make them equal, or write auto",
            )
    return merged


def _refuse(stage: StageConfig, zero: int, merged: dict[str, Any], where: str) -> None:
    """What would train wrongly or fail after minutes."""
    offload = [
        name
        for name in ("offload_optimizer", "offload_param")
        if merged["zero_optimization"].get(name, {}).get("device", "none") != "none"
    ]
    problem = hint = None
    if zero == 0 and merged["bf16"]["enabled"]:
        problem = "bfloat16 at stage 0 has no float32 master weights and drifts"
        hint = "set engine.zero to 1 or more"
    elif zero == 0 and offload:
        problem, hint = "stage 0 offloads nothing", "set engine.zero to 1 or more"
    elif zero < 3 and "offload_param" in offload:
        problem, hint = "only stage 3 offloads weights", "set engine.zero to 3"
    elif zero == 3 and stage.on_policy is not None:
        problem = "at stage 3 each token that the student samples would gather all weights"
        hint = "set engine.zero to 2"
    elif zero > 0 and stage.optimizer.kind == "adafactor":
        problem = "adafactor's states are rows and columns, ZeRO cuts weights into flat pieces"
        hint = "use adamw, or the torch engine"
    if problem:
        raise RecipeError(problem, where=where, hint=hint)
