"""The records of an epoch: how many of each source, which ones, and in which order.

Let n_i be the number of records of source i, c_i its cap and w_i its weight. Without weights, an
epoch has min(n_i, c_i) records of source i. With weights it has T w_i / sum(w), rounded so that the
sum is T. T is the sum of min(n_j, c_j), or less if a cap would be exceeded.

The records of a source are read in passes, each shuffled by seed, source and pass. An epoch
continues where the previous one ended, so all records of a source are seen equally often, up to one
time. The records of an epoch are shuffled by seed and epoch.

A streamed source is read in windows of some thousand records. A pass reads the windows in order and
shuffles the records of each window. They keep this order in the epoch, and are mixed with the
records of other sources.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mmkd.data.records import Records
from mmkd.errors import RecipeError


class Mixture:
    """The epochs of a data set, a function of the sources' sizes, weights, caps and the seed.

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

    @property
    def period(self) -> int:
        """Number of records that `order` shuffles."""
        return len(self)

    def drawn(self, epoch: int) -> tuple[list[int], list[int]]:
        """Number of records of each source in an epoch, and in all epochs before it."""
        return self.draws, [epoch * count for count in self.draws]

    def members(self, epoch: int) -> Tensor:
        """Indices of an epoch's records, ordered by source, int64."""
        parts = []
        places = zip(self.records.starts, self.sizes, *self.drawn(epoch), strict=True)
        for number, (start, size, count, first) in enumerate(places):
            whole = count == size and first % size == 0 and self.windows[number] is None
            own = torch.arange(size) if whole else self._walk(number, first, count)
            parts.append(start + own)
        return torch.cat(parts)

    def order(self, epoch: int) -> list[int]:
        """Indices of an epoch's records, shuffled; records of a stream keep their order."""
        members = self.members(epoch)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        chosen = torch.randperm(len(members), generator=generator)  # a member for each position
        begin = 0
        for window, count in zip(self.windows, self.drawn(epoch)[0], strict=True):
            if window is not None:
                own = (chosen >= begin) & (chosen < begin + count)
                chosen[own] = torch.arange(begin, begin + count)
            begin += count
        return members[chosen].tolist()

    def sample(self, most: int) -> list[int]:
        """At most `most` records of the first epoch, evenly spread; from the first window of a
        stream."""
        members = self.members(epoch=0)
        for start, size, window in zip(self.records.starts, self.sizes, self.windows, strict=True):
            if window is not None:
                members = members[(members < start + window) | (members >= start + size)]
        count = min(most, len(members))
        return [int(members[i * len(members) // count]) for i in range(count)]

    def _walk(self, number: int, first: int, count: int) -> Tensor:
        """`count` records of a source, beginning at position `first` of its passes."""
        size, last = self.sizes[number], first + count
        if count == 0:
            return torch.arange(0)
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


class MovingMixture(Mixture):
    """Records in intervals of equal length, each with other shares of the sources.

    Interval j has n_ij records of source i, which are in proportion to the shares of the interval
    and rounded so that their sum is the length of the interval. In the passes of a source, it
    begins at n_i0 + ... + n_i(j-1). With shares that do not change, it is a `Mixture` of these
    weights with epochs of this length.

    Args:
        records: of several sources, without streams.
        seed: as for `Mixture`.
        period: number of records of an interval.

    Attributes:
        shares: of the sources, by interval, as far as they are known. The shares of the first
            interval are those of the sources' records among all records.
    """

    def __init__(self, records: Records, seed: int, period: int):
        super().__init__(records, seed)
        self._period = period
        self.shares: list[list[float]] = []
        self._counts: list[list[int]] = []
        self.add([size / sum(self.sizes) for size in self.sizes])

    @property
    def period(self) -> int:
        return self._period

    def add(self, shares: Sequence[float]) -> None:
        """Set the shares of the next interval.

        Args:
            shares: of the sources, not negative, with a positive sum.
        """
        self.shares.append(list(shares))
        self._counts.append(apportioned(self.period, list(map(Fraction, shares))))

    def drawn(self, epoch: int) -> tuple[list[int], list[int]]:
        if epoch >= len(self._counts):
            raise ValueError(f"the shares of interval {epoch} are not known yet")
        before = self._counts[:epoch]
        firsts = [sum(counts[i] for counts in before) for i in range(len(self.sizes))]
        return self._counts[epoch], firsts


def draws(sizes: list[int], weights: list[float | None], caps: list[int | None]) -> list[int]:
    """Number of records of each source in an epoch.

    Args:
        sizes: numbers of records.
        weights: relative shares; all or none of them are given.
        caps: largest numbers of records.
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
    return apportioned(total, given)


def apportioned(total: int, weights: list[Fraction]) -> list[int]:
    """Integers in proportion to weights, with the sum `total`: those with the largest remainders
    are rounded up."""
    whole = sum(weights, Fraction(0))
    exact = [total * w / whole for w in weights]
    found = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(weights)), key=lambda i: (found[i] - exact[i], i))
    for i in by_rest[: total - sum(found)]:
        found[i] += 1
    return found
