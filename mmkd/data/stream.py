"""Batches in a deterministic order.

The order is a function of seed and step only. So a resumed run has the same batches, and the
records of a step do not depend on the number of processes.
"""

from collections.abc import Iterator, Sequence

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.lengths import SharedLengths
from mmkd.data.microbatches import by_size, by_tokens
from mmkd.data.mixture import Mixture, MovingMixture
from mmkd.data.workers import work_ahead
from mmkd.recipe import BatchConfig


class BatchStream:
    """The micro-batches of a stage, addressed by step.

    With a global batch size G, step s has the records s*G ... (s+1)*G - 1 of an endless sequence of
    epochs. Each epoch is a `Mixture` of the sources, shuffled by seed and epoch. The records of a
    step are divided into micro-batches by `mmkd.data.microbatches`.

    With `data.sampling`, intervals of steps are in the place of epochs (`MovingMixture`). The
    records of an interval are read when the shares of the sources in it are known.
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
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.records_per_step = batch.records_per_step(world_size)
        sampling = encoder.config.sampling
        self.mixture = Mixture(encoder.records, seed)
        self.moving: MovingMixture | None = None
        self.interval: int | None = None
        if sampling is not None:
            self.interval = sampling.every
            period = self.interval * self.records_per_step
            self.mixture = self.moving = MovingMixture(encoder.records, seed, period)
        self._epochs: dict[int, list[int]] = {}
        self._lengths = SharedLengths(encoder, rank=rank, world_size=world_size, workers=workers)
        several = batch.micro_steps(world_size) != 1 or world_size > 1
        self._grouped = several and batch.group_by_length

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.mixture) / self.records_per_step))

    def _record(self, position: int) -> int:
        epoch, offset = divmod(position, self.mixture.period)
        if epoch not in self._epochs:
            order = self.mixture.order(epoch)
            self._epochs = {epoch: order, **dict(list(self._epochs.items())[:1])}
        return self._epochs[epoch][offset]

    def plan(self, step: int) -> list[list[int]]:
        """The records of a step in this rank's micro-batches."""
        return self._cut(self._records(step))

    def _records(self, step: int) -> list[int]:
        """The records of a step, in the order of their epoch."""
        first = step * self.records_per_step
        return [self._record(first + i) for i in range(self.records_per_step)]

    def _cut(self, records: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of a step's records."""
        if self._grouped:
            records = sorted(records, key=self._lengths.__getitem__)
        if self.batch.tokens is None:
            cut = by_size(records, self.batch.size)
        else:
            lengths = {record: self._lengths[record] for record in records}
            packed = self.batch.pack is not None
            cut = by_tokens(records, lengths, self.batch.tokens, self.world_size, packed=packed)
        return cut[self.rank :: self.world_size]

    def seen(self, steps: int) -> list[int]:
        """The records of the first `steps` steps, ascending."""
        count, found = steps * self.records_per_step, set[int]()
        for epoch in range(-(-count // self.mixture.period)):
            if len(found) == len(self.encoder.records):
                break
            order = self.mixture.order(epoch)
            found.update(order[: count - epoch * self.mixture.period])
        return sorted(found)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        return [self.encoder.encode(indices) for indices in self.plan(step)]

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each step in first ... last - 1. Every rank must iterate over
        it.

        With `data.sampling`, nothing of an interval is read ahead before the last batches of the
        interval before it were taken, and a next step was asked for.

        Raises:
            MmkdError: from `Encoder.encode` or `Encoder.length`.
            PeerError: a worker process or another rank has ended.
        """
        while first < last:
            end = last
            if self.interval is not None:
                end = min(last, (first // self.interval + 1) * self.interval)
            yield from self._read_ahead(first, end)
            first = end

    def _read_ahead(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The same for steps whose records are known."""
        counts: list[int] = []

        def planned() -> Iterator[list[int]]:
            steps = map(self._records, range(first, last))
            by_length = self._grouped or self.batch.tokens is not None
            for records in self._lengths.ahead(steps) if by_length else steps:
                plan = self._cut(records)
                counts.append(len(plan))
                yield from plan

        pending: list[Batch] = []
        for batch in work_ahead(self.encoder.encode, planned(), self.workers):
            if isinstance(batch, Exception):
                raise batch
            pending.append(batch)
            if len(pending) == counts[0]:
                counts.pop(0)
                yield pending
                pending = []
