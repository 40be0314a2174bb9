"""Sparse experts, forward and backward, against transformers' Mixtral block and against the ideal.

    python -m benchmarks.moe --json runs/bench/moe.json
    python -m benchmarks.moe --device cuda --dtype bfloat16 --experts 8 --json ...

One router and E gated experts on n tokens. `ideal` is one dense network of an expert's
size on n x top_k tokens: what the chosen experts must multiply, no routing and nothing to move.
transformers runs as users get it (`eager`) and with its `grouped_mm`. Outputs are compared before
anything is timed. Times: all methods in turn in this process, medians. Memory: growth of the peak
resident size in a fresh process each, on a GPU of what tensors take there.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.measure import median_seconds, peak_bytes, save
from mmkd.ops import expert_ffn, route
from mmkd.runtime.progress import console

METHODS = ("mmkd", "transformers", "transformers, grouped_mm", "ideal")


def make(
    method: str,
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    top_k: int,
    device: str,
    dtype: str,
) -> Callable[[], Tensor]:
    """Forward and backward; the call returns the output, [tokens, hidden]."""
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = "grouped_mm" if "grouped_mm" in method else "eager"
    block = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    place = (device, getattr(torch, dtype))
    block.to(*place)
    x = torch.randn(tokens, hidden, generator=generator).to(*place).requires_grad_()
    grad = torch.randn(tokens, hidden, generator=generator).to(*place)
    gate, up = (w.detach().clone() for w in block.experts.gate_up_proj.chunk(2, dim=1))
    down = block.experts.down_proj.detach().clone()
    leaves = [gate, up, down]
    for leaf in leaves:
        leaf.requires_grad_()

    def ours() -> Tensor:
        routing = route(F.linear(x, block.gate.weight), top_k)
        return expert_ffn(x, routing, up, down, gate=gate, activation=F.silu)

    def ideal() -> Tensor:
        sent = x.repeat(top_k, 1)
        made = F.linear(F.silu(F.linear(sent, gate[0])) * F.linear(sent, up[0]), down[0])
        return made.view(top_k, tokens, hidden).sum(0)

    forward = {"mmkd": ours, "ideal": ideal}.get(method, lambda: block(x[None])[0])

    def call() -> Tensor:
        block.zero_grad()
        for leaf in (x, *leaves):
            leaf.grad = None
        y = forward()
        y.backward(grad)
        return y.detach()

    return call


def largest_difference(*shape: int) -> float:
    """Between mmkd's and transformers' outputs, relative to the largest of them."""
    found = [make(m, *shape)() for m in METHODS[:3]]
    return max(((found[0] - y).abs().max() / y.abs().max()).item() for y in found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = (args.hidden, args.inner, args.experts, args.top_k, args.device, args.dtype)
    difference = largest_difference(100, *sizes)
    if difference > (1e-4 if args.dtype == "float32" else 3e-2):
        raise SystemExit(f"mmkd and transformers disagree: {difference}")
    results = []
    for tokens in args.tokens:
        calls = {m: make(m, tokens, *sizes) for m in METHODS}
        seconds = median_seconds(calls, args.repeats)
        del calls
        memory = {m: peak_bytes(make, (m, tokens, *sizes), (m, 8, *sizes)) for m in METHODS}
        results.append({"tokens": tokens, "seconds": seconds, "peak_bytes": memory})
        console.print(f"{tokens} tokens done", highlight=False)
    report(results)
    save(args, difference=difference, results=results)


def report(results: list[dict[str, Any]]) -> None:
    """Times and memory; in brackets what each takes per the ideal's 1."""
    for title, key, scale in (
        ("ms, forward and backward", "seconds", 1e3),
        ("peak MB", "peak_bytes", 1e-6),
    ):
        table = Table(title=title)
        for name in ("tokens", *METHODS):
            table.add_column(name, justify="right")
        for result in results:
            values = result[key]
            cells = [
                f"{scale * values[m]:.1f} ({values[m] / max(values['ideal'], 1e-9):.2f}x)"
                for m in METHODS
            ]
            table.add_row(str(result["tokens"]), *cells)
        console.print(table)


if __name__ == "__main__":
    main()
