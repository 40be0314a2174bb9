"""What `precision: auto` is on a device, and which weights can train in it."""

import torch

from mmkd.errors import RecipeError
from mmkd.recipe import Precision, StageConfig


def choose_precision(wanted: Precision, device: torch.device) -> Precision:
    """The recipe's precision; `auto` takes bfloat16 where the device multiplies it in hardware.

    A processor that lacks the instructions converts every matrix, which takes several times as long
    as multiplying it in float32.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def check_dtype(dtype: str, stage: StageConfig, device: torch.device) -> None:
    """Refuse a student's `dtype` that a stage cannot train.

    Raises:
        RecipeError: it is float16, or DeepSpeed would be given 16-bit weights without master
            weights.
    """
    where = f"student.dtype, in stage {stage.name}"
    if dtype == "float16":
        raise RecipeError(
            "float16 gradients underflow without loss scaling, which mmkd does not have",
            where=where,
            hint="set it to bfloat16 or float32",
        )
    single = choose_precision(stage.precision, device) == "float32"
    if dtype == "bfloat16" and single and stage.engine.kind == "deepspeed":
        raise RecipeError(
            "DeepSpeed keeps master weights of a bfloat16 student in precision bfloat16 only",
            where=where,
            hint="set the stage's precision to bfloat16, or student.dtype to float32",
        )


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():
        return True  # a GPU that is planned for
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
