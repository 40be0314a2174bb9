"""A teacher's cache over a large vocabulary: bytes, error and read speed.

    python -m benchmarks.cache --json runs/bench/cache.json

No teacher with 152,000 tokens is at hand here, so the distributions are made: p falls as a power of
the rank, with an exponent drawn for each token from a range, and the student's logits are the
teacher's with noise. The error depends on the probability of all tokens but the k
most likely ones, which is printed too. Read speed: from the disk's cache through checksum-free
slices to tensors.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.measure import save
from mmkd.cache import RowCodec, Store, StoreWriter
from mmkd.runtime.progress import console

EXPONENTS = ((1.2, 3.0), (1.5, 4.0), (2.0, 6.0), (3.0, 8.0))


def made_rows(
    vocabulary: int, exponents: tuple[float, float], noise: float, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The teacher's and the student's log-probabilities of tokens, [1, V] float64, one by one."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64).log()
    low, high = exponents
    for _ in range(rows):
        exponent = low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64)
        teacher = -exponent * ranks
        student = teacher + noise * torch.randn(
            len(ranks), generator=generator, dtype=torch.float64
        )
        yield teacher.log_softmax(0)[None], student.log_softmax(0)[None]


def error(
    codec: RowCodec, exponents: tuple[float, float], noise: float, rows: int
) -> dict[str, Any]:
    """Of the KL through the codec, against the whole one, by token."""
    differences, whole_kl, masses = [], [], []
    for log_p, log_q in made_rows(codec.vocabulary, exponents, noise, rows):
        whole = (log_p.exp() * (log_p - log_q)).sum(1)
        log_probs, ids = log_p.topk(codec.k)
        rest = 1 - log_probs.exp().sum(1)
        ids, logs, log_rest = codec.decode(codec.encode(ids, log_probs, rest))
        logs, log_rest, mine = logs.double(), log_rest.double(), log_q.gather(1, ids)
        left = (1 - mine.exp().sum(1)).log()
        stored = (logs.exp() * (logs - mine)).sum(1) + log_rest.exp() * (log_rest - left)
        differences.append(float((stored - whole).abs()))
        whole_kl.append(float(whole))
        masses.append(float(rest))
    mean = sum(whole_kl) / rows
    return {
        "exponents": exponents,
        "rest_mass": sum(masses) / rows,
        "kl": mean,
        "difference_of_kl": sum(differences) / rows / mean,
    }


def speed(codec: RowCodec, records: int, tokens: int) -> dict[str, float]:
    """Bytes a token on disk, and tokens written and read a second."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack(
        [torch.randperm(codec.vocabulary, generator=generator)[: codec.k] for _ in range(tokens)]
    )
    log_probs = torch.randn(tokens, codec.k, generator=generator).log_softmax(1) - 0.1
    log_probs = log_probs.sort(descending=True).values
    rest = 1 - log_probs.exp().sum(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"vocabulary": codec.vocabulary, "k": codec.k, "regions": [], "max_length": 0}
        writer = StoreWriter(Path(folder), settings, 0)
        started = time.perf_counter()
        for number in range(records):
            writer.add(number.to_bytes(16, "big"), codec.encode(ids, log_probs, rest))
        writer.flush()
        writer.finish()
        written = time.perf_counter() - started
        store = Store(Path(folder))
        keys = store.keys
        store.get(keys[0], "")
        started = time.perf_counter()
        for key in keys:
            store.codec.decode(store.get(key, ""))
        read = time.perf_counter() - started
        count = records * tokens
        return {
            "bytes_per_token": store.size / count,
            "written_per_second": count / written,
            "read_per_second": count / read,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--k", type=int, default=34)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=150, help="of a record")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    codec = RowCodec(args.vocabulary, args.k)
    errors = [error(codec, e, args.noise, args.rows) for e in EXPONENTS]
    fast = speed(codec, args.records, args.tokens)
    table = Table(title=f"k = {args.k} of {args.vocabulary:,}")
    for name in ("exponents", "mass after k", "KL", "mean distance, of KL"):
        table.add_column(name, justify="right")
    for e in errors:
        low, high = e["exponents"]
        table.add_row(
            f"{low} - {high}",
            f"{e['rest_mass']:.2%}",
            f"{e['kl']:.4f}",
            f"{e['difference_of_kl']:.2%}",
        )
    console.print(table)
    console.print(
        f"{fast['bytes_per_token']:.1f} bytes a token, {fast['written_per_second']:,.0f} tokens/s "
        f"written, {fast['read_per_second']:,.0f} read",
        highlight=False,
    )
    save(args, errors=errors, **fast)


if __name__ == "__main__":
    main()
