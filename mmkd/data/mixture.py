"""How many records of each source an epoch holds, which, and in which order.

Let n_i be a source's records, c_i its cap and w_i its weight. Without weights an epoch holds
min(n_i, c_i) records of source i. With weights it holds T w_i / sum(w) of them, rounded so that
they sum to T, where T is the sum of min(n_j, c_j), or less where a cap would be passed.

A source walks through passes over its records, each shuffled by seed, source and pass, and an
epoch goes on where the one before ended. So all records of a source are seen equally often, give
or take one. The records of an epoch are shuffled by seed and epoch.

A source that is streamed comes in windows of some thousand records: a pass goes through them in
their order and shuffles each. Its records keep that order in the epoch, spread among those of the
other sources.
"""

import hashlib
import math
from fractions import Fraction

import torch
from torch import Tensor

from mmkd.data.records import Records
from mmkd.errors import RecipeError


class Mixture:
    """The epochs of a data set, a function of the records' numbers, weights, caps and seed.

    Raises:
        RecipeError: a source's weight is too small for one record in an epoch.
    """

    def __init__(self, records: Records, seed: int):
        self.records = records
        self.seed = seed
        configs = [s.config for s in records.sources]
        self.sizes = list(map(len, records.sources))
        self.windows = [source.window for source in records.sources]
        self.draws = draws(self.sizes, [c.weight for c in configs], [c.cap for c in configs])
        for config, count in zip(configs, self.draws, strict=True):
            if count == 0:
                raise RecipeError(
                    f"an epoch of {len(self):,} records has none of {config.label}",
                    where="data.sources",
                    hint="raise its weight, or leave it out",
                )

    def __len__(self) -> int:
        """Records in an epoch."""
        return sum(self.draws)

    def members(self, epoch: int) -> Tensor:
        """[records in an epoch] int64: which ones, source behind source."""
        parts = []
        starts = self.records.starts
        for number, (start, size, count) in enumerate(
            zip(starts, self.sizes, self.draws, strict=True)
        ):
            whole = count == size and self.windows[number] is None
            own = torch.arange(size) if whole else self._walk(number, epoch * count)
            parts.append(start + own)
        return torch.cat(parts)

    def order(self, epoch: int) -> list[int]:
        """The epoch's records, shuffled; those of a stream in their members' order."""
        members = self.members(epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        chosen = torch.randperm(len(members), generator=generator)  # a member for each place
        begin = 0
        for window, count in zip(self.windows, self.draws, strict=True):
            if window is not None:
                own = (chosen >= begin) & (chosen < begin + count)
                chosen[own] = torch.arange(begin, begin + count)
            begin += count
        return members[chosen].tolist()

    def sample(self, most: int) -> list[int]:
        """Some of the first epoch's records, evenly spread; of a stream from its first window."""
        members = self.members(epoch=0)
        for start, size, window in zip(self.records.starts, self.sizes, self.windows, strict=True):
            if window is not None:
                members = members[(members < start + window) | (members >= start + size)]
        count = min(most, len(members))
        return [int(members[i * len(members) // count]) for i in range(count)]

    def _walk(self, number: int, first: int) -> Tensor:
        """An epoch's records of a source, from one place of its walk on."""
        size, last = self.sizes[number], first + self.draws[number]
        passes = range(first // size, -(-last // size))
        walk = torch.cat([self._pass(number, p) for p in passes])
        return walk[first - passes[0] * size :][: last - first]

    def _pass(self, number: int, which: int) -> Tensor:
        words = f"{self.seed} {number} {which}".encode()
        seed = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) % 2**63
        generator, size = torch.Generator().manual_seed(seed), self.sizes[number]
        window = self.windows[number] or size
        parts = [
            first + torch.randperm(min(window, size - first), generator=generator)
            for first in range(0, size, window)
        ]
        return torch.cat(parts)


def draws(sizes: list[int], weights: list[float | None], caps: list[int | None]) -> list[int]:
    """Records of each source in an epoch.

    Args:
        sizes: records that there are.
        weights: relative shares, all or none of them given.
        caps: most records of each.
    """
    capped = [
        size if cap is None else min(size, cap) for size, cap in zip(sizes, caps, strict=True)
    ]
    given = [Fraction(w) for w in weights if w is not None]
    if not given:
        return capped
    whole = sum(given, Fraction(0))
    limits = [cap * whole / w for cap, w in zip(caps, given, strict=True) if cap is not None]
    total = math.floor(min([Fraction(sum(capped)), *limits]))
    exact = [total * w / whole for w in given]
    found = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(given)), key=lambda i: (found[i] - exact[i], i))
    for i in by_rest[: total - sum(found)]:
        found[i] += 1
    return found
