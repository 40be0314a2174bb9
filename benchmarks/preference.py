"""DPO from final hidden states to gradients, against TRL's dense way and Liger's chunks.

    pip install -e '.[bench]'
    python -m benchmarks.preference --json runs/bench/preference.json
    python -m benchmarks.preference --reference 0   # no reference model, as in SimPO and CPO

Pairs of answers, float32; student and reference with their own heads. Methods' losses and gradient
norms are compared before anything is timed. Times: all in turn in this process, medians, and
quartiles of the ratios of the calls of one round. Memory: growth of the peak resident size in a
fresh process each.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import peak_bytes, ratio_quartiles, save, seconds
from mmkd.objectives import preference_loss
from mmkd.ops import linear_pair_loss, token_logps
from mmkd.runtime.progress import console

BETA = 0.1
IGNORED = -100
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_inputs(
    pairs: int, tokens: int, vocabulary: int, student: int, reference: int, masked: float
) -> Inputs:
    """Hidden states [2 pairs, tokens, H] and heads of both models, and labels. A reference of width
    0 gives all tokens the same probability, as if there were none, and methods leave it out."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hs, ws = normal(2 * pairs, tokens, student), normal(vocabulary, student).mul_(0.05)
    hr, wr = normal(2 * pairs, tokens, reference), normal(vocabulary, reference).mul_(0.05)
    labels = torch.randint(vocabulary, (2 * pairs, tokens), generator=generator)
    labels[:, : round(masked * tokens)] = IGNORED
    return hs.requires_grad_(), ws.requires_grad_(), hr, wr, labels


def mmkd(hs: Tensor, ws: Tensor, hr: Tensor, wr: Tensor, labels: Tensor) -> Tensor:
    kept = labels != IGNORED
    sequences, pairs = kept.nonzero()[:, 0], len(labels) // 2
    reference = torch.zeros(2 * pairs)
    if wr.shape[1]:
        with torch.no_grad():
            found = token_logps(hr[kept], wr, labels[kept])
            reference = reference.index_add(0, sequences, found)
    reference = reference.view(2, pairs)

    def loss(policy: Tensor, some: slice) -> Tensor:
        mean = preference_loss(*policy, *reference[:, some], kind="sigmoid", beta=BETA)
        return mean * policy.shape[1]

    total, _ = linear_pair_loss(hs[kept], ws, labels[kept], sequences, pairs, loss)
    return total / pairs


def trl(hs: Tensor, ws: Tensor, hr: Tensor, wr: Tensor, labels: Tensor) -> Tensor:
    from trl.trainer.utils import selective_log_softmax

    kept = labels != IGNORED

    def answers(hidden: Tensor, weight: Tensor) -> Tensor:
        found = selective_log_softmax(hidden @ weight.t(), labels.clamp(min=0))
        return (found * kept).sum(1)

    with torch.no_grad():
        reference = answers(hr, wr) if wr.shape[1] else torch.zeros(len(labels))
    chosen, rejected = (answers(hs, ws) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def liger(hs: Tensor, ws: Tensor, hr: Tensor, wr: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(
        ignore_index=IGNORED,
        beta=BETA,
        compute_nll_loss=False,
        compiled=False,
        use_ref_model=bool(wr.shape[1]),
        average_log_prob=False,
    )
    return loss(ws, hs, labels, None, hr, wr)[0]


METHODS: dict[str, Callable[..., Tensor]] = {"mmkd": mmkd, "TRL dense": trl, "Liger": liger}


def step(method: str, inputs: Inputs) -> float:
    inputs[0].grad = inputs[1].grad = None
    loss = METHODS[method](*inputs)
    loss.backward()
    return float(loss.detach())


def make_call(method: str, *shape: Any) -> Callable[[], float]:
    return partial(step, method, make_inputs(*shape))


def check(reference: int) -> None:
    """All methods' losses and gradients are the same."""
    found = {}
    for name in METHODS:
        inputs = make_inputs(3, 20, 500, 16, reference, 0.5)
        loss = step(name, inputs)
        found[name] = [loss, *(float(t.grad.norm()) for t in inputs[:2] if t.grad is not None)]
    for name, values in found.items():
        for mine, theirs in zip(found["mmkd"], values, strict=True):
            if abs(mine - theirs) > 1e-4 * abs(mine):
                raise SystemExit(f"{name} differs: {values}, mmkd {found['mmkd']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--student", type=int, default=256)
    parser.add_argument("--reference", type=int, default=512, help="width; 0 for none")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    check(args.reference)
    results = []
    for masked in (0.5, 0.0):
        shape = (args.pairs, args.tokens, args.vocabulary, args.student, args.reference, masked)
        inputs = make_inputs(*shape)
        times = seconds({m: partial(step, m, inputs) for m in METHODS}, args.repeats)
        small = (1, 4, 64, 8, min(args.reference, 8), 0.0)
        results.append(
            {
                "masked": masked,
                "seconds": {m: statistics.median(taken) for m, taken in times.items()},
                "ratios": ratio_quartiles(times, "mmkd"),
                "peak_bytes": {m: peak_bytes(make_call, (m, *shape), (m, *small)) for m in METHODS},
            }
        )
    table = Table(title="DPO, seconds and peak MB (mmkd's part of it)")
    for name in ("masked", *METHODS):
        table.add_column(name, justify="right")
    for r in results:
        for key, scale, digits in (("seconds", 1.0, 2), ("peak_bytes", 1e-6, 0)):
            cells = [f"{scale * v:.{digits}f} ({r[key]['mmkd'] / v:.2f})" for v in r[key].values()]
            table.add_row(f"{r['masked']:.0%}", *cells)
        spread = ["/".join(f"{x:.2f}" for x in r["ratios"].get(m, [])) for m in METHODS]
        table.add_row("ratios", *spread)
    console.print(table)
    versions = {p: version(p) for p in ("trl", "liger-kernel")}
    save(args, peers=versions, results=results)


if __name__ == "__main__":
    main()
