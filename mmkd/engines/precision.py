"""What `precision: auto` is on a device."""

import torch

from mmkd.recipe import Precision


def choose_precision(wanted: Precision, device: torch.device) -> Precision:
    """The recipe's precision; `auto` takes bfloat16 where the device multiplies it in hardware.

    A processor that lacks the instructions converts every matrix, which takes several times as long
    as multiplying it in float32.
    """
    if wanted != "auto":
        return wanted
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda" and not torch.cuda.is_available():
        return True  # a GPU that is planned for
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
