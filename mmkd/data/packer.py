"""Pack padded batches into rows of several records."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.labels import IGNORED
from mmkd.data.packing import (
    Packing,
    bins_of,
    pack_inputs,
    pack_stored,
    pack_targets,
    renumbered,
)
from mmkd.data.processing import Processing
from mmkd.data.records import Records, located
from mmkd.data.samples import Sample
from mmkd.objectives import Targets


class Packer:
    """Packs the records of a batch.

    Args:
        records: the data set.
        processing: calls the processor.
        max_length: largest number of tokens of a sequence.
    """

    def __init__(self, records: Records, processing: Processing, max_length: int):
        self.records, self.processing, self.max_length = records, processing, max_length

    def order(
        self, samples: list[Sample], filler: list[Sample], capacity: int
    ) -> tuple[list[Sample], list[list[int]]]:
        """The samples in the order of packed rows, and their indices by row. Models expect images
        in the order of their tokens.

        Args:
            samples: of a batch.
            filler: further samples, after them.
            capacity: largest number of tokens of a row.
        """
        bins = bins_of(list(map(self._tokens, samples + filler)), capacity)
        order, bins = renumbered(bins, len(samples))
        return [samples[i] for i in order], bins

    def _tokens(self, sample: Sample) -> int:
        with located(lambda: self.records.where(sample.index)):
            length = self.processing.length(sample.rendered.text, [p.size for p in sample.pictures])
        return min(length, self.max_length)

    def __call__(self, batch: Batch, bins: list[list[int]]) -> Batch:
        """Pack a batch. A filler is packed like a record, but has no targets.

        Args:
            batch: padded, with samples in the order that `order` returns.
            bins: as `order` returns them.
        """
        seen = batch.inputs["attention_mask"].bool()  # [B, T], or [B + 1, T]
        count = len(batch.targets.input_ids)
        packing = Packing(seen, bins)
        extra = (0, 0, 0, len(seen) - count)

        def padded(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.dim() == 2
            return torch.nn.functional.pad(value, extra) if rows else value

        targets = Targets(**{k: padded(v) for k, v in vars(batch.targets).items()})
        token = self.processing.processor.tokenizer.pad_token_id or 0
        stored = batch.stored
        if stored is not None:
            at = torch.nn.functional.pad(stored.at.view(count, -1), extra, value=-1)
            stored = pack_stored(replace(stored, at=at.flatten()), packing)
        return replace(
            batch,
            inputs=pack_inputs(batch.inputs, packing, token),
            targets=pack_targets(targets, packing, IGNORED),
            stored=stored,
        )
