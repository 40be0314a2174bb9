"""Lengths of records in tokens, for batches of alike length and for token budgets.

The length of a record decides where in its step it is read. So each process needs the lengths of a
step's whole global batch, though it trains on a part of it, and a length costs as much as rendering
and tokenizing the record. Therefore each process finds the lengths of its share of the coming
steps only, in its workers and ahead of training, and the processes exchange them step by step.

Nothing is kept on the disk. An index of all lengths would be complete only when the whole data set
has been rendered, would have to be made again whenever data, processor or template change, and
cannot be made for streamed data. Lengths that are found ahead cost training no time either.

A length is a function of the record alone. A length that does not come from another process is
found here, so batches never depend on which process has found what.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mmkd.data.encoder import Encoder
from mmkd.data.microbatches import by_size
from mmkd.data.workers import work_ahead
from mmkd.runtime import distributed

UNKNOWN = -1


class SharedLengths:
    """The tokens of each record, `Encoder.length`, found by all processes together.

    Args:
        encoder: of the records.
        rank, world_size: which of the processes this one is.
        workers: processes that find lengths for this one; 0 for none.
    """

    def __init__(self, encoder: Encoder, *, rank: int = 0, world_size: int = 1, workers: int = 0):
        self.encoder = encoder
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self._known = np.full(len(encoder.records), UNKNOWN, np.int32)

    def __getitem__(self, record: int) -> int:
        """The length of one record, found here if it is not known."""
        if self._known[record] == UNKNOWN:
            self._known[record] = self._find(record)
        return int(self._known[record])

    def of(self, records: Sequence[int]) -> list[int]:
        """The lengths of some records, found by all processes; every rank calls it."""
        (found,) = self.ahead([records])
        return [self[record] for record in found]

    def ahead(self, steps: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The records of each step, when their lengths are known; every rank iterates over it.

        Args:
            steps: the records of each, which are taken about two steps ahead.

        Raises:
            MmkdError, OSError: of `Encoder.length`; the other ranks then find the same lengths
                themselves, and fail for the same reason.
        """
        begun: deque[tuple[Sequence[int], int]] = deque()

        def pieces() -> Iterator[list[int]]:
            for records in steps:
                share = [
                    r for r in records[self.rank :: self.world_size] if self._known[r] == UNKNOWN
                ]
                # As many as workers, so that all of them work for the next step; at least one,
                # which says that the step is there.
                size = max(1, -(-len(share) // max(1, self.workers)))
                cut = by_size(share, size) or [[]]
                begun.append((records, len(cut)))
                yield from cut

        found: list[tuple[int, int]] = []
        errors: list[Exception] = []
        count = 0
        for piece in work_ahead(self._find_all, pieces(), self.workers, waiting=2):
            if isinstance(piece, Exception):
                errors.append(piece)
            else:
                found += piece
            count += 1
            if count < begun[0][1]:
                continue
            records, _ = begun.popleft()
            for record, length in distributed.gather(found):
                self._known[record] = length
            if errors:
                raise errors[0]
            found, count = [], 0
            yield records

    def _find_all(self, records: list[int]) -> list[tuple[int, int]]:
        return [(record, self._find(record)) for record in records]

    def _find(self, record: int) -> int:
        # With workers, batches are encoded in other processes than lengths are found.
        return self.encoder.length(record, keep=self.workers == 0)
