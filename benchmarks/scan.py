"""The SSD scan, forward and backward, against transformers' torch Mamba-2 and causal attention.

    python -m benchmarks.scan --json runs/bench/scan.json
    python -m benchmarks.scan --device cuda --dtype bfloat16 --json ...

Two levels, one row of tokens, 8 heads of 64 with states of 64:
`op` is the scan alone (attention: `scaled_dot_product_attention` alone); `mixer` is a layer of
width 256 with its projections, convolution, gate and norm (attention: q, k, v and o projections).
The two Mamba-2 mixers share every line but convolution and scan, and their outputs are compared
before anything is timed. transformers runs at its default chunk of 256 and at 64, where it is
faster; its CUDA kernels are not in play. On a GPU `mmkd` runs by mamba-ssm's and causal-conv1d's
kernels where they are installed, and `mmkd, torch` without them.

Times: all interleaved in this process, medians over the repeats. Memory: growth of the peak
resident size in a fresh process each, on a GPU of what tensors take there.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import median_seconds, peak_bytes, save
from mmkd.ops import causal_conv, ssd_scan
from mmkd.runtime.progress import console

# Out of sight of transformers, which would take them even for CPU tensors.
HIDDEN_PACKAGES = ("mamba_ssm", "causal_conv1d")
sys.modules.update(dict.fromkeys(HIDDEN_PACKAGES))  # type: ignore[arg-type]

from transformers import Mamba2Config  # noqa: E402
from transformers.models.mamba2.modeling_mamba2 import (  # noqa: E402
    Mamba2Mixer,
    mamba2_chunk_scan,
)

for package in HIDDEN_PACKAGES:
    del sys.modules[package]

HEADS, HEAD_DIM, STATE, HIDDEN, CONV = 8, 64, 64, 256, 4
METHODS = ("mmkd", "transformers", "transformers, chunk 64", "attention")
ON_GPU = ("mmkd", "mmkd, torch", "transformers", "transformers, chunk 64", "attention")
REPEATS = {256: 20, 1024: 10, 4096: 5}  # by tokens; 3 past them
CHUNKS = {"transformers": 256, "transformers, chunk 64": 64}


class OurMixer(Mamba2Mixer):
    """transformers' mixer with mmkd's convolution and scan."""

    backend = "auto"

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        sizes = [self.intermediate_size, self.conv_dim, self.num_heads]
        gate, channels, dt = self.in_proj(hidden_states).split(sizes, dim=-1)
        channels, _ = causal_conv(
            channels,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            backend=self.backend,
        )
        groups = self.n_groups * self.ssm_state_size
        x, B, C = channels.split([self.intermediate_size, groups, groups], dim=-1)
        y, _ = ssd_scan(
            x.unflatten(-1, (self.num_heads, -1)),
            F.softplus(dt + self.dt_bias),
            -torch.exp(self.A_log.float()),
            B.unflatten(-1, (self.n_groups, -1)),
            C.unflatten(-1, (self.n_groups, -1)),
            D=self.D,
            backend=self.backend,
        )
        return self.out_proj(self.norm(y.flatten(-2), gate))


class Attention(nn.Module):
    """Causal attention of the same heads and width, without positions."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * groups) * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        heads = self.qkv(hidden_states).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, self.groups, self.groups], dim=1)
        return self.out(attend(q, k, v).flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[1, heads, L, P] each -> [1, L, heads, P]."""
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def make_op(
    method: str, tokens: int, groups: int, device: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Forward and backward of the scan (or attention) alone; returns the output."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=g).to(device, dtype)

    x, B, C = normal(HEADS, HEAD_DIM), normal(groups, STATE), normal(groups, STATE)
    dt = F.softplus(normal(HEADS).float() - 2)
    A, D = -torch.arange(1.0, HEADS + 1, device=device), torch.ones(HEADS, device=device)
    grad = torch.ones_like(x)
    backend = backend_of(method)
    q = normal(HEADS, HEAD_DIM)
    used = [q, B, C] if method == "attention" else [x, dt, A, B, C, D]
    for t in used:
        t.requires_grad_()

    def call() -> Tensor:
        for t in used:
            t.grad = None
        if method == "attention":
            y = attend(*(t.transpose(1, 2) for t in (q, B, C)))
        elif method in CHUNKS:
            y = mamba2_chunk_scan(x, dt, A, B, C, CHUNKS[method], D=D)
        else:
            y, _ = ssd_scan(x, dt, A, B, C, D=D, backend=backend)
        y.backward(grad.to(y.dtype))
        return y.detach()

    return call


def make_mixer(
    method: str, tokens: int, groups: int, device: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    """Forward and backward of a whole layer; returns the output."""
    torch.manual_seed(0)
    if method == "attention":
        module: nn.Module = Attention(groups)
    else:
        config = Mamba2Config(
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            hidden_size=HIDDEN,
            state_size=STATE,
            expand=HEADS * HEAD_DIM // HIDDEN,
            conv_kernel=CONV,
            n_groups=groups,
            chunk_size=CHUNKS.get(method, 256),
            num_hidden_layers=1,
        )
        module = (Mamba2Mixer if method in CHUNKS else OurMixer)(config, layer_idx=0)
        module.backend = backend_of(method)  # type: ignore[assignment]
    module.to(device, dtype)
    u = torch.randn(1, tokens, HIDDEN).to(device, dtype).requires_grad_()
    grad = torch.ones_like(u)

    def call() -> Tensor:
        module.zero_grad()
        u.grad = None
        y = module(u)
        y.backward(grad)
        return y.detach()

    return call


def backend_of(method: str) -> str:
    return "torch" if method == "mmkd, torch" else "auto"


LEVELS = {"op": make_op, "mixer": make_mixer}


def largest_difference(level: str, *where: Any) -> float:
    """Between mmkd's and transformers' outputs, relative to the largest of them."""
    ours, theirs = (LEVELS[level](m, 300, *where)() for m in ("mmkd", "transformers"))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def measure(level: str, tokens: int, *where: Any) -> dict[str, Any]:
    make = LEVELS[level]
    methods = METHODS if where[1] == "cpu" else ON_GPU
    calls = {m: make(m, tokens, *where) for m in methods}
    seconds = median_seconds(calls, REPEATS.get(tokens, 3))
    del calls
    memory = {m: peak_bytes(make, (m, tokens, *where), (m, 64, *where)) for m in methods}
    return {"level": level, "tokens": tokens, "seconds": seconds, "peak_bytes": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--groups", type=int, default=HEADS, help="groups of B and C, kv heads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = (args.groups, args.device, getattr(torch, args.dtype))
    differences = {level: largest_difference(level, *where) for level in LEVELS}
    exact = args.device == "cpu" and args.dtype == "float32"
    if max(differences.values()) > (1e-4 if exact else 3e-2):
        raise SystemExit(f"mmkd and transformers disagree: {differences}")
    results = []
    for level in LEVELS:
        for tokens in args.tokens:
            results.append(measure(level, tokens, *where))
            console.print(f"{level} {tokens} done", highlight=False)
    report(results)
    save(args, differences=differences, results=results)


def report(results: list[dict[str, Any]]) -> None:
    """Times and memory of all methods; in brackets what the others take per mmkd's 1."""
    for title, key, form, scale in (
        ("ms, forward and backward", "seconds", "{:.1f}", 1e3),
        ("peak MB", "peak_bytes", "{:.0f}", 1e-6),
    ):
        table = Table(title=title)
        methods = list(results[0][key])
        for name in ("level", "tokens", *methods):
            table.add_column(name, justify="right")
        for result in results:
            values = result[key]
            cell = partial(_cell, form=form, scale=scale, unit=values["mmkd"])
            table.add_row(
                result["level"], str(result["tokens"]), *(cell(values[m]) for m in methods)
            )
        console.print(table)


def _cell(value: float, form: str, scale: float, unit: float) -> str:
    text = form.format(value * scale)
    return text if value == unit else f"{text} ({value / max(unit, 1e-9):.2f}x)"


if __name__ == "__main__":
    main()
