"""Whether losses on a head's output go to torch or, on CUDA, to the Triton kernel."""

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from mmkd.ops.terms import HeadLoss

BACKENDS = ("auto", "torch", "triton")


@functools.cache
def load(device: torch.device) -> ModuleType | Exception:
    """`mmkd.ops.triton_rows` after a first row on the device, or why it cannot be had."""
    try:
        from mmkd.ops import triton_rows

        logits = torch.zeros(1, 2, device=device)
        sums = torch.zeros(1, dtype=torch.float64, device=device)
        rows = torch.zeros(1, dtype=torch.long, device=device)
        triton_rows.chunk_losses(logits, logits.clone(), rows, [(0, HeadLoss("kl"))], sums)
    except Exception as error:  # no triton, no C compiler for its launcher, a card too old, ...
        return error
    return triton_rows


def kernel_for(backend: str, x: Tensor, unfit: str | None) -> ModuleType | None:
    """`mmkd.ops.triton_rows` where a call takes it; None where it takes torch.

    Args:
        backend: "auto" (the kernel on CUDA where it fits and runs), "torch" or "triton".
        x: a tensor of the call.
        unfit: why the kernel cannot take the call, or None.

    Raises:
        ValueError: an unknown backend, or "triton" for what the kernel cannot take.
        RuntimeError: "triton" where the kernel does not run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and (not x.is_cuda or unfit is not None)):
        return None
    # Triton's interpreter runs its kernels on CPU tensors: slow, for tests.
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, these are on {x.device.type}: move them or take "
            "backend='auto'"
        )
    if unfit is not None:
        raise ValueError(f"backend 'triton': {unfit}: take backend='auto'")
    found = load(x.device)
    if isinstance(found, ModuleType):
        return found
    if backend == "auto":
        return None
    cause = str(found).splitlines()[0] if str(found) else type(found).__name__
    raise RuntimeError(
        f"backend 'triton': the kernel does not run here ({cause}): pip install triton, or take "
        "backend='auto'"
    )
