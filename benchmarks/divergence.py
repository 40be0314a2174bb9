"""Divergences over a vocabulary: mmkd's chunked op against dense autograd, time and peak memory.

    python -m benchmarks.divergence --json runs/bench/divergence.json

Times: both interleaved in this process, medians over the repeats. Memory: growth of the peak
resident size in a fresh process each.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import peak_bytes, save
from mmkd.ops import linear_divergence
from mmkd.progress import console

KINDS = ("kl", "reverse_kl", "jsd")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(rows: int, vocabulary: int, student: int, teacher: int, masked: float) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hs, ws = normal(rows, student).requires_grad_(), normal(vocabulary, student).mul_(0.05)
    ht, wt = normal(rows, teacher), normal(vocabulary, teacher).mul_(0.05)
    mask = torch.rand(rows, generator=generator) >= masked
    return hs, ws.requires_grad_(), ht, wt, mask


def dense(kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor) -> None:
    """What training code usually does: all logits of both models, then a masked mean."""
    log_q = torch.log_softmax(hs @ ws.t(), -1)
    with torch.no_grad():
        log_p = torch.log_softmax(ht @ wt.t(), -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "kl":
        rows = kl(log_p, log_q)
    elif kind == "reverse_kl":
        rows = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        rows = 0.5 * (kl(log_p, log_m) + kl(log_q, log_m))
    ((rows * mask).sum() / mask.sum()).backward()


def chunked(kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor) -> None:
    linear_divergence(hs, ws, ht, wt, kind=kind, mask=mask).backward()


METHODS: dict[str, Callable[..., None]] = {"dense": dense, "mmkd": chunked}


def seconds(method: str, kind: str, inputs: Inputs) -> float:
    inputs[0].grad = inputs[1].grad = None
    start = time.perf_counter()
    METHODS[method](kind, *inputs)
    return time.perf_counter() - start


def make_call(method: str, kind: str, *shape: Any) -> Callable[[], None]:
    return partial(METHODS[method], kind, *make_inputs(*shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for masked in (0.5, 0.0):
        shape = (args.rows, args.vocabulary, args.student, args.teacher, masked)
        inputs = make_inputs(*shape)
        for kind in KINDS:
            times: dict[str, list[float]] = {m: [] for m in METHODS}
            for repeat in range(args.repeats + 1):
                for method in METHODS:
                    taken = seconds(method, kind, inputs)
                    if repeat:  # the first round warms up
                        times[method].append(taken)
            row = {"kind": kind, "masked": masked}
            for method in METHODS:
                row[f"{method}_seconds"] = statistics.median(times[method])
                row[f"{method}_peak_bytes"] = peak_bytes(
                    make_call, (method, kind, *shape), (method, kind, 8, 64, 8, 8, 0.0)
                )
            results.append(row)
    report(results)
    save(args, results=results)


def report(results: list[dict]) -> None:
    table = Table(title="divergence, forward and backward")
    for name in ("kind", "masked", "dense s", "mmkd s", "ratio", "dense MB", "mmkd MB", "ratio "):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r["kind"],
            f"{r['masked']:.0%}",
            f"{r['dense_seconds']:.2f}",
            f"{r['mmkd_seconds']:.2f}",
            f"{r['mmkd_seconds'] / r['dense_seconds']:.2f}",
            f"{r['dense_peak_bytes'] / 1e6:.0f}",
            f"{r['mmkd_peak_bytes'] / 1e6:.0f}",
            f"{r['mmkd_peak_bytes'] / max(r['dense_peak_bytes'], 1):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
