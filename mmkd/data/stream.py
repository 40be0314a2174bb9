"""Batches in a deterministic order.

The order is a function of seed and step alone, so that a resumed run sees the same batches and the
number of processes does not change what a step sees.
"""

from collections.abc import Iterator

import torch

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture
from mmkd.recipe import BatchConfig


class BatchStream:
    """The micro-batches of a stage, addressed by step.

    Step s of the global batch size G sees records s*G ... (s+1)*G - 1 of an endless sequence of
    epochs, each a `Mixture` of the sources in an order by seed and epoch number. Rank r of R
    takes every R-th of them, or, grouped by length, every R-th micro-batch of the step's records in
    the order of their length: what a step sees stays the same, with less padding.
    """

    def __init__(
        self,
        encoder: Encoder,
        batch: BatchConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
    ):
        self.encoder = encoder
        self.batch = batch
        self.mixture = Mixture(encoder.records, seed)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.micro_steps = batch.micro_steps(world_size)
        self._epochs: dict[int, list[int]] = {}
        self._lengths: dict[int, tuple[int, int]] = {}

    @property
    def records_per_step(self) -> int:
        return self.batch.size * self.micro_steps * self.world_size

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.mixture) / self.records_per_step))

    def _record(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.mixture))
        if epoch not in self._epochs:
            order = self.mixture.order(epoch)
            self._epochs = {epoch: order, **dict(list(self._epochs.items())[:1])}
        return self._epochs[epoch][offset]

    def indices(self, step: int, micro: int) -> list[int]:
        """Which records this rank's micro-batch `micro` of step `step` holds."""
        if self.batch.group_by_length and self.micro_steps * self.world_size > 1:
            start = (micro * self.world_size + self.rank) * self.batch.size
            return self._by_length(step)[start : start + self.batch.size]
        first = step * self.records_per_step + micro * self.batch.size * self.world_size
        return [
            self._record(first + i * self.world_size + self.rank) for i in range(self.batch.size)
        ]

    def _by_length(self, step: int) -> list[int]:
        first = step * self.records_per_step
        records = [self._record(first + i) for i in range(self.records_per_step)]
        return sorted(records, key=self._length)

    def _length(self, record: int) -> tuple[int, int]:
        """Pictures and characters of a record."""
        if record not in self._lengths:
            self._lengths[record] = self.encoder.records.length(record)
        return self._lengths[record]

    def seen(self, steps: int) -> list[int]:
        """The records that the first `steps` steps see, ascending."""
        count, found = steps * self.records_per_step, set[int]()
        for epoch in range(-(-count // len(self.mixture))):
            if len(found) == len(self.encoder.records):
                break
            order = self.mixture.order(epoch)
            found.update(order[: count - epoch * len(self.mixture)])
        return sorted(found)

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.micro_steps)
        return self.encoder.encode(self.indices(step, micro))

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step in first ... last - 1."""
        numbers = range(first * self.micro_steps, last * self.micro_steps)
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Its own: a loader draws a seed, and a resumed run must not draw one more.
            generator=torch.Generator(),
        )
        pending: list[Batch] = []
        for batch in loader:
            pending.append(batch)
            if len(pending) == self.micro_steps:
                yield pending
                pending = []
