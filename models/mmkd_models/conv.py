"""The short causal convolution before a Mamba-2 scan, for whole sequences and single tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import document_runs
from .kernels import conv_unfit, kernel_conv, kernel_conv_step, use_kernel

ACTIVATIONS = (None, "silu")
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}  # elements of the input per block


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: y_t = act(bias + sum_j weight[:, K-1-j] * x_{t-j}).

    Differentiable (once) in x, weight, bias and the initial state.

    Args:
        x: [B, L, C], floating point, L >= 1.
        weight: [C, K], K >= 1; its last column is multiplied with the current token.
        bias: [C] or None.
        activation: None or "silu".
        initial_state: [B, C, K-1], the inputs before the first token; None: zeros.
        documents: [B, L] integers, equal for all tokens of a packed document. Tokens of other
            documents count as zeros. The initial state belongs to the first document of a row.
        backend: "auto" (causal-conv1d on CUDA if it supports the inputs, else torch), "torch" or
            "triton" (causal-conv1d or an error).

    Returns:
        y [B, L, C] and the last document's final state [B, C, K-1], both in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown setting, or a backend that does not fit.
        RuntimeError: backend "triton" where causal-conv1d cannot be imported.
    """
    _check(x, weight, bias, activation, initial_state, (1, 2))
    runs = document_runs(documents, x)
    if use_kernel(backend, "causal_conv1d_fn", x, conv_unfit(x, weight)):
        y = kernel_conv(x, weight, bias, activation, initial_state, runs)
    else:
        head = None if initial_state is None else initial_state.transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):
            y = _Conv.apply(x, weight, bias, head, runs, activation == "silu")
    return y, _final_state(x, weight.shape[1] - 1, initial_state, runs)


def causal_conv_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`causal_conv` of one token.

    Args:
        x: [B, C].
        state: [B, C, K-1], the inputs before it; not modified.
        weight, bias, activation, backend: as in `causal_conv`.

    Returns:
        y [B, C] and the new state [B, C, K-1], both in x's dtype.

    Raises:
        ValueError, RuntimeError: as `causal_conv`.
    """
    _check(x, weight, bias, activation, state, (1,))
    unfit = conv_unfit(x, weight)
    if unfit is None and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        unfit = "the convolution's step kernel has no backward pass"
    if use_kernel(backend, "causal_conv1d_update", x, unfit):
        return kernel_conv_step(x, state, weight, bias, activation)
    window = torch.cat([state.to(x.dtype), x[..., None]], dim=-1)  # [B, C, K]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (window.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype), window[..., 1:].contiguous()


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    state: Tensor | None,
    axes: tuple[int, ...],
) -> None:
    """Check shapes and settings; `axes` are the axes of x for tokens and channels, or channels."""
    if x.dim() != axes[-1] + 1 or 0 in x.shape:
        form = "[B, L, C]" if len(axes) > 1 else "[B, C]"
        raise ValueError(f"x must be {form}, none of them 0, got {list(x.shape)}")
    batch, channels = x.shape[0], x.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be [{channels}, K], got {list(weight.shape)}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}], got {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, it must be None or 'silu'")
    expected = (batch, channels, weight.shape[1] - 1)
    if state is not None and state.shape != expected:
        raise ValueError(f"the state must be {list(expected)}, got {list(state.shape)}")


def _final_state(x: Tensor, taps: int, state: Tensor | None, runs: Tensor | None) -> Tensor:
    """The last `taps` inputs of the last document, zeros before its start, [B, C, taps]."""
    batch, length, channels = x.shape
    tail = x[:, max(0, length - taps) :] if taps else x[:, :0]
    if runs is not None:
        same = runs[:, length - tail.shape[1] :] == runs[:, -1:]  # [B, min(L, taps)]
        tail = tail * same[..., None]
    missing = taps - tail.shape[1]
    if missing:
        before = x.new_zeros(batch, missing, channels)
        if state is not None:
            before = state[..., -missing:].transpose(1, 2).to(x.dtype)
            if runs is not None:
                before = before * (runs[:, -1] == 0)[:, None, None]
        tail = torch.cat([before, tail], dim=1)
    return tail.transpose(1, 2).contiguous()


class _Conv(torch.autograd.Function):
    """Computes blocks that fit the CPU cache. Only its inputs are saved for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Tensor | None,
        runs: Tensor | None,
        silu: bool,
    ) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        taps = _taps(weight, x)
        for tile in _tiles(x):
            window, masks = _window(x, head, runs, tile, taps.shape[0])
            z = _mix(window, taps, bias, masks)
            y[tile] = F.silu(z, inplace=True) if silu else z
        ctx.save_for_backward(x, weight, bias, head, runs)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx: Any, *grad_output: Tensor) -> tuple:
        (grad,) = grad_output
        x, weight, bias, head, runs = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx, d_head, d_taps, d_bias = _conv_backward(x, weight, bias, head, runs, ctx.silu, grad)
        return (
            dx.to(x.dtype),
            d_taps.t().to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None if head is None else d_head.to(head.dtype),
            None,
            None,
        )


def _conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Tensor | None,
    runs: Tensor | None,
    silu: bool,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [B, L, C], head [B, K-1, C], taps [K, C] and bias [C], in at least float32."""
    taps = _taps(weight, x)
    width = taps.shape[0]
    dx = torch.empty(x.shape, dtype=taps.dtype, device=x.device)
    d_head = dx.new_zeros(x.shape[0], width - 1, x.shape[2])
    d_taps, d_bias = torch.zeros_like(taps), torch.zeros_like(taps[0])
    for tile in _tiles(x):
        rows, tokens = tile
        window, masks = _window(x, head, runs, tile, width)
        dz = grad[tile].to(taps.dtype)
        if silu:
            dz = torch.ops.aten.silu_backward(dz, _mix(window, taps, bias, masks))
        d_bias += dz.sum((0, 1))
        size = dz.shape[1]
        d_window = torch.zeros_like(window, memory_format=torch.contiguous_format)
        for k in range(width):
            part = dz if masks is None else dz * masks[k]
            d_taps[k] += (part * window[:, k : k + size]).sum((0, 1))
            d_window[:, k : k + size].addcmul_(part, taps[k])
        dx[tile] = d_window[:, width - 1 :]
        early = d_window[:, : width - 1]  # gradients of inputs in earlier tiles, or of the state
        inside = min(tokens.start, width - 1)
        dx[rows, tokens.start - inside : tokens.start] += early[:, width - 1 - inside :]
        d_head[rows, tokens.start :] += early[:, : width - 1 - inside]
    return dx, d_head, d_taps, d_bias


def _taps(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as [K, C], in at least float32, contiguous."""
    return weight.t().to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _tiles(x: Tensor) -> list[tuple[slice, slice]]:
    """Blocks of rows and tokens that are computed together."""
    batch, length, channels = x.shape
    budget = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS["cuda"])
    tokens = min(length, max(16, budget // channels))
    rows = min(batch, max(1, budget // (channels * tokens)))
    return [
        (slice(b, min(b + rows, batch)), slice(t, min(t + tokens, length)))
        for b in range(0, batch, rows)
        for t in range(0, length, tokens)
    ]


def _window(
    x: Tensor, head: Tensor | None, runs: Tensor | None, tile: tuple[slice, slice], width: int
) -> tuple[Tensor, list[Tensor] | None]:
    """The inputs of a tile and the K-1 before it, [b, K-1+T, C], and for each tap a mask of the
    tokens that use it."""
    rows, tokens = tile
    first = tokens.start - (width - 1)
    window = x[rows, max(0, first) : tokens.stop]
    if first < 0:
        before = window.new_zeros(window.shape[0], width - 1, window.shape[2])
        if head is not None:
            before = head[rows].to(window.dtype)
        window = torch.cat([before[:, tokens.start :], window], dim=1)
    window = window.to(torch.promote_types(x.dtype, torch.float32))
    if runs is None:
        return window, None
    own = F.pad(runs[rows, : tokens.stop], (width - 1, 0))[:, tokens.start :]  # [b, K-1+T]
    size = tokens.stop - tokens.start
    masks = [(own[:, k : k + size] == own[:, width - 1 :])[..., None] for k in range(width)]
    return window, masks


def _mix(window: Tensor, taps: Tensor, bias: Tensor | None, masks: list[Tensor] | None) -> Tensor:
    """The outputs before the activation, [b, T, C]."""
    size = window.shape[1] - (taps.shape[0] - 1)
    last = taps.shape[0] - 1
    z = window[:, last:] * taps[last]
    if bias is not None:
        z += bias.to(z.dtype)
    for k in range(last):
        part = window[:, k : k + size]
        z.addcmul_(part if masks is None else part * masks[k], taps[k])
    return z
