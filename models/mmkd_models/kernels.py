"""Wrappers of the CUDA kernels of mamba-ssm and causal-conv1d.

Written for mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0. They are imported with importlib at the
first call: transformers refuses remote code with import statements of packages that are not
installed.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
CHUNK_SIZE = 256
HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
PACKAGES = {
    "mamba_chunk_scan_combined": ("mamba-ssm", "mamba_ssm.ops.triton.ssd_combined"),
    "selective_state_update": ("mamba-ssm", "mamba_ssm.ops.triton.selective_state_update"),
    "causal_conv1d_fn": ("causal-conv1d", "causal_conv1d"),
    "causal_conv1d_update": ("causal-conv1d", "causal_conv1d"),
}


@functools.cache
def load(kernel: str) -> Callable[..., Any] | Exception:
    """The kernel's function, or the exception that its import raised."""
    try:
        return getattr(importlib.import_module(PACKAGES[kernel][1]), kernel)
    except Exception as error:  # a build for another torch raises many types, not only ImportError
        return error


def use_kernel(backend: str, kernel: str, x: Tensor, unfit: str | None) -> bool:
    """Whether a call should use a kernel.

    Args:
        backend: "auto", "torch" or "triton".
        kernel: name of the kernel.
        x: an input of the call.
        unfit: reason why the kernel does not support the inputs, or None.

    Raises:
        ValueError: an unknown backend, or "triton" with inputs that the kernel does not support.
        RuntimeError: "triton" if the kernel's package cannot be imported.
    """
    if backend == "torch":
        return False
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(BACKENDS)}")
    # Triton's interpreter runs its kernels on CPU tensors: slow, for tests.
    on_device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        return x.is_cuda and unfit is None and callable(load(kernel))
    if not on_device:
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, x is on {x.device.type}: move it or take "
            "backend='auto'"
        )
    if unfit is not None:
        raise ValueError(f"backend 'triton': {unfit}: take backend='auto'")
    found = load(kernel)
    if isinstance(found, Exception):
        cause = str(found).splitlines()[0] if str(found) else type(found).__name__
        raise RuntimeError(
            f"backend 'triton' needs {PACKAGES[kernel][0]}, which cannot be imported ({cause}): "
            "pip install 'mmkd[cuda]' or take backend='auto'"
        )
    return True


def _call(kernel: str, *args: Any, **kwargs: Any) -> Any:
    function = load(kernel)
    assert callable(function)
    return function(*args, **kwargs)


def scan_unfit(x: Tensor) -> str | None:
    """Reason why `mamba_chunk_scan_combined` does not support the inputs, or None."""
    if x.dtype not in HALF_OR_SINGLE:
        return f"the scan kernel does not support {x.dtype}"
    return None


def kernel_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    runs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` with `mamba_chunk_scan_combined`; `runs` [B, L] are document indices from 0."""
    shared = max(1, C.shape[2] // x.shape[2])
    if shared > 1:  # the kernel does not support states that several query heads share
        x, dt = (t.repeat_interleave(shared, dim=2) for t in (x, dt))
        A = A.repeat_interleave(shared)
        if initial_state is not None:
            initial_state = initial_state.repeat_interleave(shared, dim=1)
    groups = math.lcm(B.shape[2], C.shape[2])
    y, final = _call(
        "mamba_chunk_scan_combined",
        x if x.stride(-1) == 1 else x.contiguous(),
        dt.float(),
        A.float(),
        B.to(x.dtype).repeat_interleave(groups // B.shape[2], dim=2),
        C.to(x.dtype).repeat_interleave(groups // C.shape[2], dim=2),
        CHUNK_SIZE,
        D=None if D is None else D.float(),
        initial_states=None if initial_state is None else initial_state.float().contiguous(),
        seq_idx=None if runs is None else runs.to(torch.int32).contiguous(),
        return_final_states=True,
    )
    return y, final[:, ::shared]


def step_unfit(x: Tensor, B: Tensor, C: Tensor, state: Tensor) -> str | None:
    """Reason why `selective_state_update` does not support the inputs, or None."""
    if x.dtype not in HALF_OR_SINGLE:
        return f"the step kernel does not support {x.dtype}"
    if C.shape[1] > state.shape[1]:
        return "the step kernel does not support states that several query heads share"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, B, C, state)):
        return "the step kernel has no backward pass"
    return None


def kernel_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd_step` with `selective_state_update`. It crashes without D and dt_bias, so they are zeros
    by default."""
    batch, heads, width, size = state.shape
    groups = math.lcm(B.shape[1], C.shape[1])
    zeros = torch.zeros(heads, dtype=torch.float32, device=x.device)
    new = state.float().clone(memory_format=torch.contiguous_format)
    # With strides of 0 the kernel treats dt and A as one number per head.
    y = _call(
        "selective_state_update",
        new,
        x,
        dt.float()[:, :, None].expand(batch, heads, width),
        A.float()[:, None, None].expand(heads, width, size),
        B.repeat_interleave(groups // B.shape[1], dim=1),
        C.repeat_interleave(groups // C.shape[1], dim=1),
        D=(zeros if D is None else D.float())[:, None].expand(heads, width),
        dt_bias=zeros[:, None].expand(heads, width),
    )
    return y, new


def conv_unfit(x: Tensor, weight: Tensor) -> str | None:
    """Reason why causal-conv1d does not support the inputs, or None."""
    if x.dtype not in HALF_OR_SINGLE:
        return f"the convolution kernel does not support {x.dtype}"
    if not 2 <= weight.shape[1] <= 4:
        return f"the convolution kernel supports widths 2 to 4, not {weight.shape[1]}"
    if weight.shape[0] % 8:
        return f"the convolution kernel needs a multiple of 8 channels, not {weight.shape[0]}"
    return None


def kernel_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    runs: Tensor | None,
) -> Tensor:
    """The outputs of `causal_conv` with `causal_conv1d_fn`; `runs` [B, L] are document indices from
    0."""
    before = 0
    if state is not None:
        # The state is prepended to the inputs, with the index of the first document: some versions
        # of the kernel do not accept initial states together with document indices.
        before = state.shape[2]
        x = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
        if runs is not None:
            runs = torch.nn.functional.pad(runs, (before, 0))
    if x.stride(2) != 1 or x.stride(1) % 8 or x.stride(0) % 8:
        x = x.contiguous()
    y = _call(
        "causal_conv1d_fn",
        x.transpose(1, 2),  # [B, C, L], channels last
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        seq_idx=None if runs is None else runs.to(torch.int32).contiguous(),
        activation=activation,
    )
    return y.transpose(1, 2)[:, before:]


def kernel_conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv_step` with `causal_conv1d_update`, on a copy of the state."""
    new = state.to(x.dtype).clone(memory_format=torch.contiguous_format)
    y = _call(
        "causal_conv1d_update",
        x.contiguous(),
        new,
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        activation,
    )
    return y, new
