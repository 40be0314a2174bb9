"""Batches in a deterministic order.

The order is a function of seed and step alone, so that a resumed run sees the same batches and the
number of processes does not change what a step sees.
"""

import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.microbatches import by_size, by_tokens
from mmkd.data.mixture import Mixture
from mmkd.errors import MmkdError
from mmkd.recipe import BatchConfig
from mmkd.runtime.distributed import explained
from mmkd.runtime.interrupt import begin_worker


class BatchStream:
    """The micro-batches of a stage, addressed by step.

    Step s of the global batch size G sees records s*G ... (s+1)*G - 1 of an endless sequence of
    epochs, each a `Mixture` of the sources in an order by seed and epoch number, as
    `mmkd.data.microbatches` cuts them.
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
        self.records_per_step = batch.records_per_step(world_size)
        self._epochs: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.mixture) / self.records_per_step))

    def _record(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.mixture))
        if epoch not in self._epochs:
            order = self.mixture.order(epoch)
            self._epochs = {epoch: order, **dict(list(self._epochs.items())[:1])}
        return self._epochs[epoch][offset]

    def plan(self, step: int) -> list[list[int]]:
        """The records of each of this rank's micro-batches of a step."""
        first = step * self.records_per_step
        records = [self._record(first + i) for i in range(self.records_per_step)]
        several = self.batch.micro_steps(self.world_size) != 1 or self.world_size > 1
        if several and self.batch.group_by_length:
            records.sort(key=self._length)
        if self.batch.tokens is None:
            cut = by_size(records, self.batch.size)
        else:
            lengths = {record: self._length(record) for record in records}
            packed = self.batch.pack is not None
            cut = by_tokens(records, lengths, self.batch.tokens, self.world_size, packed=packed)
        return cut[self.rank :: self.world_size]

    def _length(self, record: int) -> int:
        if record not in self._lengths:
            self._lengths[record] = self.encoder.length(record)
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

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        return [self.encoder.encode(indices) for indices in self.plan(step)]

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step in first ... last - 1."""
        counts: list[int] = []

        def planned() -> Iterator[list[int]]:
            for step in range(first, last):
                plan = self.plan(step)
                counts.append(len(plan))
                yield from plan

        loader: torch.utils.data.DataLoader[Batch | Exception] = torch.utils.data.DataLoader(
            _Encoded(self.encoder),
            batch_size=None,
            sampler=planned(),
            num_workers=self.workers,
            worker_init_fn=partial(begin_worker, os.getpid()),
            prefetch_factor=4 if self.workers else None,
            # Its own: a loader draws a seed, and a resumed run must not draw one more.
            generator=torch.Generator(),
        )
        pending: list[Batch] = []
        for batch in _received(loader):
            pending.append(batch)
            if len(pending) == counts[0]:
                counts.pop(0)
                yield pending
                pending = []


def _received(batches: Iterable[Batch | Exception]) -> Iterator[Batch]:
    """Batches as they come from workers.

    Raises:
        MmkdError: what a worker has raised, or a worker is gone.
    """
    try:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        gone = explained(error)
        if gone is None:
            raise
        raise gone from error


class _Encoded(torch.utils.data.Dataset[Batch | Exception]):
    """Batches by the numbers of their records; what a worker process holds."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __getitem__(self, indices: list[int]) -> Batch | Exception:
        try:
            return self.encoder.encode(indices)
        except (MmkdError, OSError) as error:
            # Returned, not raised: a loader raises a worker's errors with the worker's traceback
            # as their message.
            return error
