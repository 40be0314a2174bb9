"""Divergences over a vocabulary, forward and backward, against other libraries.

    pip install -e '.[bench]' && pip install --no-deps torchtune==0.6.1 nvidia-modelopt
    python -m benchmarks.divergence --json runs/bench/divergence.json
    python -m benchmarks.divergence --vocabulary 152000 --rows 512 --json ...
    python -m benchmarks.divergence --device cuda --json ...

From final hidden states to the gradients of the student's hidden states and head. Before anything
is timed all methods' gradients are compared in float32 with a dense float64 twin on a small
problem. Times: all methods in turn in this process, medians. Memory: growth of the peak resident
size in a fresh process each, on a GPU of what tensors take there, where `mmkd, torch` leaves the
Triton kernel out.
"""

import argparse
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import median_seconds, peak_bytes, save
from benchmarks.peers import Method, peers
from mmkd.ops import linear_divergence
from mmkd.runtime.progress import console

SETTINGS: dict[str, dict[str, Any]] = {"kl_top_50": {"kind": "kl", "top_k": 50}}
"""Names that are no kind."""
KINDS = (
    *("kl", "reverse_kl", "jsd", "jeffreys", "soft_reverse_kl", "hellinger", "pearson"),
    *("balanced_kl", *SETTINGS),
)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    rows: int,
    vocabulary: int,
    student: int,
    teacher: int,
    masked: float,
    device: str = "cpu",
    dtype: Any = torch.float32,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    hs, ws = normal(rows, student).requires_grad_(), normal(vocabulary, student).mul_(0.05)
    ht, wt = normal(rows, teacher), normal(vocabulary, teacher).mul_(0.05)
    mask = torch.rand(rows, generator=generator) >= masked
    return hs, ws.requires_grad_(), ht, wt, mask.to(device)


def dense(kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor) -> Tensor:
    """All logits of both models, then a masked mean, by autograd."""
    log_q = torch.log_softmax(hs @ ws.t(), -1)
    with torch.no_grad():
        log_p = torch.log_softmax(ht @ wt.t(), -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if kind == "kl_top_50":
        ids = log_p.topk(min(50, log_p.shape[1]), 1).indices

        def cells(log_x: Tensor) -> Tensor:
            rest = log_x.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
            return torch.cat([log_x.gather(1, ids), rest.clamp(min=-80)], 1)

        rows = kl(cells(log_p), cells(log_q))
    elif kind == "balanced_kl":
        gap = (log_p.exp() * log_p).sum(-1) - (log_q.exp() * log_q).sum(-1)
        share = torch.sigmoid(gap).detach()
        rows = 2 * (1 - share) * kl(log_p, log_q) + 2 * share * kl(log_q, log_p)
    elif kind == "kl":
        rows = kl(log_p, log_q)
    elif kind == "reverse_kl":
        rows = kl(log_q, log_p)
    elif kind == "jeffreys":
        rows = kl(log_p, log_q) + kl(log_q, log_p)
    elif kind == "hellinger":
        rows = ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
    elif kind == "pearson":
        rows = (2 * log_p - log_q).exp().sum(-1) - 1
    else:
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
        rows = {
            "jsd": lambda: 0.5 * (kl(log_p, log_m) + kl(log_q, log_m)),
            "soft_reverse_kl": lambda: 2 * kl(log_m, log_p),
        }[kind]()
    return (rows * mask).sum() / mask.sum()


def mmkd(
    kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor, backend: str = "auto"
) -> Tensor:
    settings = SETTINGS.get(kind, {"kind": kind})
    return linear_divergence(hs, ws, ht, wt, mask=mask, backend=backend, **settings)


@cache
def methods() -> dict[str, Method]:
    plain = {"mmkd, torch": partial(mmkd, backend="torch")} if torch.cuda.is_available() else {}
    return {"mmkd": mmkd, **plain, **peers()[0], "dense": dense}


def has(method: str, kind: str) -> bool:
    return methods()[method](kind, *make_inputs(8, 16, 4, 4, 0.0)) is not None


def step(method: str, kind: str, inputs: Inputs) -> None:
    inputs[0].grad = inputs[1].grad = None
    loss = methods()[method](kind, *inputs)
    assert loss is not None
    loss.backward()


def make_call(method: str, kind: str, *shape: Any) -> Callable[[], None]:
    return partial(step, method, kind, make_inputs(*shape))


def errors(kind: str, names: list[str], device: str) -> dict[str, float]:
    """Largest relative distance of each method's gradients from a float64 twin's, on 96 rows and
    1,000 tokens; the distance of a tensor over its norm."""
    shape = (96, 1000, 32, 48, 0.5, device)
    exact = make_inputs(*shape, torch.float64)
    dense(kind, *exact).backward()
    found = {}
    for name in names:
        inputs = make_inputs(*shape)
        step(name, kind, inputs)
        pairs = [(inputs[i].grad, exact[i].grad) for i in (0, 1)]
        found[name] = max(
            float((a.double() - b).norm() / b.norm())
            for a, b in pairs
            if a is not None and b is not None
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--teacher", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for masked in (0.5, 0.0):
        shape = (args.rows, args.vocabulary, args.student, args.teacher, masked, args.device)
        dtype = getattr(torch, args.dtype)
        for kind in KINDS:
            names = [name for name in methods() if has(name, kind)]
            inputs = make_inputs(*shape, dtype)
            calls = {name: partial(step, name, kind, inputs) for name in names}
            seconds = median_seconds(calls, args.repeats)
            small = (8, 64, 8, 8, 0.0, args.device, dtype)
            memory = {
                name: peak_bytes(make_call, (name, kind, *shape, dtype), (name, kind, *small))
                for name in names
            }
            results.append(
                {
                    "kind": kind,
                    "masked": masked,
                    "seconds": seconds,
                    "peak_bytes": memory,
                    "gradient_error": errors(kind, names, args.device),
                }
            )
            console.print(f"{kind}, {masked:.0%} masked: done", highlight=False)
    report(results)
    save(args, peers=peers()[1], results=results)


def report(results: list[dict[str, Any]]) -> None:
    """Time and MB of each method; in brackets mmkd's over it."""
    slowest = max(taken for r in results for taken in r["seconds"].values())
    time = ("seconds", "seconds", 1.0, 2) if slowest > 1 else ("ms", "seconds", 1e3, 1)
    for title, key, scale, digits in (
        time,
        ("peak MB", "peak_bytes", 1e-6, 0),
        ("gradients' distance from float64", "gradient_error", 1.0, None),
    ):
        names = list(dict.fromkeys(name for r in results for name in r[key]))
        table = Table(title=f"{title} (mmkd's part of it)" if digits is not None else title)
        for name in ("kind", "masked", *names):
            table.add_column(name, justify="right")
        for r in results:
            cells = []
            for name in names:
                value = r[key].get(name)
                if value is None:
                    cells.append("")
                elif digits is None:
                    cells.append(f"{value:.0e}")
                else:
                    part = r[key]["mmkd"] / value
                    cells.append(f"{scale * value:.{digits}f} ({part:.2f})")
            table.add_row(r["kind"], f"{r['masked']:.0%}", *cells)
        console.print(table)


if __name__ == "__main__":
    main()
