"""Read outputs for a batch from a teacher's cache."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mmkd.cache import Store
from mmkd.data.batch import Batch, covered_rows
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.objectives import Targets
from mmkd.ops import SparseRows


def with_stored(
    batch: Batch,
    store: Store,
    samples: Sequence[Sample],
    where: Callable[[int], str],
    *,
    hidden: bool,
) -> Batch:
    """Add the outputs in the cache to a batch.

    Args:
        batch: padded, of the samples.
        store, samples, where: as in `stored_rows`.
        hidden: also read final hidden states.

    Raises:
        DataError: a record is not in the cache, or has other tokens there.
    """
    said = (store, batch.targets, samples, where)
    batch = replace(batch, stored=stored_rows(*said))
    return replace(batch, stored_hidden=stored_hidden(*said)) if hidden else batch


def stored_rows(
    store: Store, targets: Targets, samples: Sequence[Sample], where: Callable[[int], str]
) -> SparseRows:
    """The teacher's distributions at the positions that the cache covers.

    Args:
        store: the cache.
        targets: [B, T], of the samples.
        samples: one per row.
        where: returns the place of a record for messages.

    Raises:
        DataError: a record is not in the cache, or has other tokens there.
    """
    covered = covered_rows(targets, store.manifest["regions"])  # [B, T]
    found = []
    for sample, count in zip(samples, covered.sum(1).tolist(), strict=True):
        place = where(sample.index)
        rows = store.get(sample.key, place)
        if len(rows) != count:
            raise DataError(
                f"the teacher's cache has {len(rows)} of its tokens, and the student {count}",
                where=place,
                hint="build the cache again",
            )
        found.append(rows)
    at = torch.full((covered.numel(),), -1)
    at[covered.flatten()] = torch.arange(sum(map(len, found)))
    return SparseRows(*store.codec.decode(np.concatenate(found)), at)


def stored_hidden(
    store: Store, targets: Targets, samples: Sequence[Sample], where: Callable[[int], str]
) -> Tensor | None:
    """The teacher's final hidden states, [B, T, H] float16, zeros at positions that are not stored;
    None if the cache has no hidden states. Arguments as in `stored_rows`."""
    if store.hidden is None:
        return None
    covered = covered_rows(targets, store.hidden["regions"])  # [B, T]
    found = [store.get_hidden(s.key, where(s.index)) for s in samples]
    made = torch.zeros(*covered.shape, store.hidden["width"], dtype=torch.float16)
    made[covered] = torch.cat(found)
    return made
