"""Naive float64 recurrences of scan and convolution, and how a backend is held against them."""

import pytest
import torch
import torch.nn.functional as F

from mmkd.ops import ssd_scan
from mmkd_models import kernels

# Forward and gradients, relative to the largest entry. On a GPU the kernels multiply float32 in
# TF32; under Triton's interpreter they keep to the first line (tests/models/test_kernels.py).
TOLERANCE = {"torch": (1e-5, 1e-4), "triton": (5e-3, 2e-2)}


def backends(kernel: str) -> pytest.MarkDecorator:
    """torch, and the kernels where they can run."""
    there = torch.cuda.is_available() and callable(kernels.load(kernel))
    return pytest.mark.parametrize("backend", ["torch", "triton"] if there else ["torch"])


def twin(x, dt, A, B, C, D=None, state=None, documents=None):
    """The recurrence by its definition, one token after the other."""
    heads, queries = x.shape[2], max(x.shape[2], C.shape[2])
    B = B.repeat_interleave(heads // B.shape[2], 2)
    C = C.repeat_interleave(queries // C.shape[2], 2)
    S = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3]) if state is None else state
    out = []
    for t in range(x.shape[1]):
        if documents is not None and t:
            S = S * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        S = S * torch.exp(dt[:, t] * A)[..., None, None]
        S = S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        y = torch.einsum("bhpn,bhn->bhp", S.repeat_interleave(queries // heads, 1), C[:, t])
        if D is not None:
            y = y + D[:, None] * x[:, t].repeat_interleave(queries // heads, 1)
        out.append(y)
    return torch.stack(out, 1), S


def conv_twin(x, weight, bias=None, activation=None, state=None, documents=None):
    """The convolution by its definition, one token after the other."""
    width = weight.shape[1]
    window = x.new_zeros(x.shape[0], x.shape[2], width - 1) if state is None else state
    out = []
    for t in range(x.shape[1]):
        if documents is not None and t:
            window = window * (documents[:, t] == documents[:, t - 1])[:, None, None]
        window = torch.cat([window, x[:, t, :, None]], -1)
        y = (window * weight).sum(-1) + (0 if bias is None else bias)
        out.append(y if activation is None else F.silu(y))
        window = window[..., 1:]
    return torch.stack(out, 1), window


def problem(form=(4, 2, 4), length=37, batch=2, width=16, size=8, seed=0):
    """x, dt, A, B, C, D and an initial state in float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    heads, b_groups, c_groups = form
    dt = F.softplus(normal(batch, length, heads) - 1)
    A = -normal(heads).exp()
    B, C = normal(batch, length, b_groups, size), normal(batch, length, c_groups, size)
    x, state = normal(batch, length, heads, width), normal(batch, heads, width, size)
    return [x, dt, A, B, C, normal(max(heads, c_groups)), state]


def conv_problem(width, length, channels=16, batch=3):
    g = torch.Generator().manual_seed(width)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return [
        normal(batch, length, channels),
        normal(channels, width),
        normal(channels),
        normal(batch, channels, width - 1),
    ]


def leaves(tensors, dtype=torch.float64, device="cpu"):
    return [t.detach().to(device, dtype).requires_grad_() for t in tensors]


def device_of(backend):
    return "cuda" if backend == "triton" else "cpu"


def scan(tensors, backend="torch", **kwargs):
    x, dt, A, B, C, D, state = tensors
    return ssd_scan(x, dt, A, B, C, D=D, initial_state=state, backend=backend, **kwargs)


def close(got, want, tolerance, name=""):
    """Largest difference, relative to the largest entry of `want`."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    error = (got.double().cpu() - want).abs().max() / want.abs().max().clamp(min=1e-12)
    assert error < tolerance, f"{name} {error:.1e}"


def agree(run, reference, tensors, backend="torch", dtype=torch.float32):
    """Outputs and gradients of `run` on `tensors` in `dtype` against `reference` in float64."""
    exact, single = leaves(tensors), leaves(tensors, dtype, device_of(backend))
    want, got = reference(exact), run(single)
    heads = [torch.sin(torch.arange(w.numel())).view_as(w).double() for w in want]
    want_grads = torch.autograd.grad(want, exact, heads)
    got_grads = torch.autograd.grad(got, single, [h.to(g) for h, g in zip(heads, got, strict=True)])
    forward, gradient = TOLERANCE[backend]
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        close(a, b, forward, f"output {i}")
    for i, (a, b) in enumerate(zip(got_grads, want_grads, strict=True)):
        assert a.dtype == single[i].dtype
        close(a, b, gradient, f"gradient {i}")
