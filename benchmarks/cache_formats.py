"""Teachers on the disk in mmkd's format and in DistillKit's: bytes, error, and the KL against them.

    python -m benchmarks.cache_formats --json runs/bench/cache_formats.json

DistillKit's format is written after its README: ids in ceil(log2 V) bits, the first values
in bfloat16, a polynomial over the rank through the others with float32 coefficients. `recommended`
and `budget` are its two settings there. Ranks run from 0 to 1 and the fit is in float64, which is
the format at its best. All other tokens are left out and the k tokens scaled to 1 (`zero`),
or one cell more (`uniform`), as in its losses.

Distributions are made as in `benchmarks.cache`. Time: from hidden states and stored rows that are
decoded already to gradients; DistillKit's loss is dense in the student's logits.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.cache import EXPONENTS, made_rows
from benchmarks.measure import median_seconds, peak_bytes, save
from mmkd.cache import RowCodec
from mmkd.ops import Head, HeadLoss, SparseRows, head_losses
from mmkd.runtime.progress import console


@dataclass(frozen=True)
class Polynomial:
    """DistillKit's settings.

    Attributes:
        k: tokens kept.
        exact: of them in bfloat16.
        powers: of the rank, 0.5 for its root.
    """

    k: int
    exact: int
    powers: tuple[float, ...]

    def bytes_per_token(self, vocabulary: int) -> float:
        ids = -(-self.k * (vocabulary - 1).bit_length() // 8)
        return ids + 2 * self.exact + 4 * len(self.powers)

    def read_back(self, log_probs: Tensor) -> Tensor:
        """[n, k] float64 log-probabilities, falling, as they come from the disk."""
        rank = torch.linspace(0, 1, self.k - self.exact, dtype=torch.float64)
        terms = torch.stack([rank**power for power in self.powers], 1)  # [k - exact, terms]
        tail = log_probs[:, self.exact :].T  # [k - exact, n]
        weights = torch.linalg.lstsq(terms, tail).solution.float().double()
        first = log_probs[:, : self.exact].bfloat16().double()
        return torch.cat([first, (terms @ weights).T], 1)


DISTILLKIT = {
    "recommended": Polynomial(128, 16, (0, 1, 2, 3, 4, 0.5)),
    "budget": Polynomial(50, 1, (0, 1, 0.5)),
}


def kl_of_cells(log_p: Tensor, log_q: Tensor, *, rest: bool) -> Tensor:
    """KL of stored log-probabilities [n, k], with one cell for all other tokens or scaled to 1."""
    if not rest:
        log_p = log_p.log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)
    left_p = (1 - log_p.exp().sum(1)).clamp(min=1e-6)
    left_q = (1 - log_q.exp().sum(1)).clamp(min=1e-6)
    return (log_p.exp() * (log_p - log_q)).sum(1) + left_p * (left_p.log() - left_q.log())


def errors(vocabulary: int, k: int, noise: float, rows: int) -> list[dict[str, Any]]:
    """Mean distance of a token's KL from the whole one, of the mean KL, by exponents and format."""
    codec = RowCodec(vocabulary, k)
    found = []
    for exponents in EXPONENTS:
        apart: dict[str, list[Tensor]] = {}
        whole = []
        for log_p, log_q in made_rows(vocabulary, exponents, noise, rows):
            kl = (log_p.exp() * (log_p - log_q)).sum(1)
            whole.append(kl)
            kept, ids = log_p.topk(k)
            ids, logs, log_rest = codec.decode(codec.encode(ids, kept, 1 - kept.exp().sum(1)))
            mine = log_q.gather(1, ids)
            left = (1 - mine.exp().sum(1)).log()
            logs, log_rest = logs.double(), log_rest.double()
            stored = (logs.exp() * (logs - mine)).sum(1) + log_rest.exp() * (log_rest - left)
            apart.setdefault("mmkd", []).append((stored - kl).abs())
            for name, form in DISTILLKIT.items():
                kept, ids = log_p.topk(form.k)
                theirs, mine = form.read_back(kept), log_q.gather(1, ids)
                for rest in (False, True):
                    label = f"{name}, {'uniform' if rest else 'zero'}"
                    stored = kl_of_cells(theirs, mine, rest=rest)
                    apart.setdefault(label, []).append((stored - kl).abs())
        mean = float(torch.cat(whole).mean())
        of_kl = {name: float(torch.cat(parts).mean()) / mean for name, parts in apart.items()}
        found.append({"exponents": exponents, "kl": mean, "of_kl": of_kl})
    return found


def make_loss(name: str, rows: int, vocabulary: int, k: int, width: int) -> Callable[[], Any]:
    """KL against k stored tokens, half of the rows masked, with gradients of hidden and head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, generator=generator)).requires_grad_()
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:k] for _ in range(rows)])
    log_probs = torch.randn(rows, k, generator=generator).log_softmax(1) - 0.05
    mask = torch.arange(rows) % 2 == 0
    if name == "mmkd":
        log_rest = (1 - log_probs.exp().sum(1)).log()
        stored = SparseRows(ids, log_probs, log_rest, torch.arange(rows))

        def run() -> Any:
            losses = [HeadLoss("kl", mask=mask, scale=2 / rows)]
            head_losses(Head(hidden, weight), losses, stored)[0].backward()
            hidden.grad = weight.grad = None

        return run

    def dense() -> Any:
        logits = hidden @ weight.t()
        log_q = logits.gather(1, ids) - logits.logsumexp(1, keepdim=True)
        left_q = (1 - log_q.exp().sum(1)).clamp(min=1e-6).log()
        left_p = (1 - log_probs.exp().sum(1)).clamp(min=1e-6).log()
        kl = (log_probs.exp() * (log_probs - log_q)).sum(1) + left_p.exp() * (left_p - left_q)
        ((kl * mask).sum() * 2 / rows).backward()
        hidden.grad = weight.grad = None

    return dense


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=34)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=256, help="rows of each range of exponents")
    parser.add_argument("--rows", type=int, default=512, help="of the timed loss")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = errors(args.vocabulary, args.k, args.noise, args.samples)
    sizes = {"mmkd": 8.0 * RowCodec(args.vocabulary, args.k).words}
    sizes |= {name: form.bytes_per_token(args.vocabulary) for name, form in DISTILLKIT.items()}
    settings = (args.rows, args.vocabulary, args.k, args.width)
    calls = {name: make_loss(name, *settings) for name in ("mmkd", "DistillKit")}
    seconds = median_seconds(calls, args.repeats)
    small = (8, 1000, args.k, args.width)
    peaks = {n: peak_bytes(make_loss, (n, *settings), (n, *small)) for n in calls}
    table = Table(title="mean distance of a token's KL, of KL")
    for name in ("format", "bytes", *(f"{a} - {b}" for a, b in EXPONENTS)):
        table.add_column(name, justify="right")
    for name in found[0]["of_kl"]:
        size = sizes[name.split(",")[0]]
        table.add_row(name, f"{size:.0f}", *(f"{f['of_kl'][name]:.2%}" for f in found))
    console.print(table)
    for name, taken in seconds.items():
        console.print(f"{name}: {taken:.3f} s, {peaks[name] / 1e6:.0f} MB", highlight=False)
    save(args, errors=found, bytes_per_token=sizes, seconds=seconds, peak_bytes=peaks)


if __name__ == "__main__":
    main()
