"""Lengths of records in tokens, for `group_by_length` and token budgets.

Lengths decide the micro-batch of each record. So each process needs the lengths of the whole global
batch of a step, although it trains on a part of it, and computing a length means to render and
tokenize the record. Therefore each process computes the lengths of its share of the next steps
only, in its workers and ahead of training, and the processes exchange them step by step.

Lengths are not stored on disk. An index of all lengths would require to render the whole data set
first, and again after each change of data, processor or template; for streamed data it is
impossible. Lengths that are computed ahead do not slow down training either.

A length is a function of the record only. A length that no other process has sent is computed here,
so batches do not depend on which process computed a length.
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
    """Numbers of tokens of records, `Encoder.length`, computed by all processes together.

    Args:
        encoder: of the records.
        rank, world_size: of this process.
        workers: number of worker processes that compute lengths for this one; 0 for none.
    """

    def __init__(self, encoder: Encoder, *, rank: int = 0, world_size: int = 1, workers: int = 0):
        self.encoder = encoder
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self._known = np.full(len(encoder.records), UNKNOWN, np.int32)

    def __getitem__(self, record: int) -> int:
        """The length of a record. It is computed by this process if it is not known."""
        if self._known[record] == UNKNOWN:
            self._known[record] = self._find(record)
        return int(self._known[record])

    def of(self, records: Sequence[int]) -> list[int]:
        """The lengths of records, computed by all processes. Every rank must call it."""
        (found,) = self.ahead([records])
        return [self[record] for record in found]

    def ahead(self, steps: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yields the records of each step as soon as their lengths are known. Every rank must
        iterate over it.

        Args:
            steps: the records of each step. They are read about two steps ahead.

        Raises:
            MmkdError, OSError: from `Encoder.length`. The other ranks then compute the same lengths
                themselves, and fail for the same reason.
        """
        begun: deque[tuple[Sequence[int], int]] = deque()

        def pieces() -> Iterator[list[int]]:
            for records in steps:
                share = [
                    r for r in records[self.rank :: self.world_size] if self._known[r] == UNKNOWN
                ]
                # One piece per worker, so that all workers compute lengths of the next step; at
                # least one piece, which marks the step.
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
        # With workers, batches are encoded in other processes, so this text is not needed again.
        return self.encoder.length(record, keep=self.workers == 0)
