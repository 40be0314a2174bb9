"""Collate samples into padded tensors and masks."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.chat import expanded_spans, mark_tokens, special_tokens
from mmkd.data.chunks import Answer, cut_answers
from mmkd.data.labels import vision_labels
from mmkd.data.processing import MOVED, Processing
from mmkd.data.records import Records
from mmkd.data.samples import NO_INDEX, Sample
from mmkd.data.truncation import check_answers, truncate
from mmkd.errors import DataError
from mmkd.objectives import Targets


@dataclass(frozen=True)
class Collated:
    """What batches contain in addition to tokens and masks.

    Attributes:
        vision_labels: labels of image tokens, from the objects of records.
        pairs: rows are chosen and rejected answers.
        chunks: token boundaries in the answers.
        sources: the data source of each token's record.
        answers: refuse records whose whole answer would be cut off by `max_length`.
    """

    vision_labels: bool = False
    pairs: bool = False
    chunks: bool = False
    sources: bool = False
    answers: bool = True


class Collator:
    """Makes padded batches of samples.

    Args:
        records: the data set.
        processor: of a model.
        processing: calls the processor.
        max_length: largest number of tokens of a sequence.
        wanted: what batches contain in addition to tokens and masks.
    """

    def __init__(
        self,
        records: Records,
        processor: Any,
        processing: Processing,
        max_length: int,
        wanted: Collated,
    ):
        self.records, self.processor, self.processing = records, processor, processing
        self.max_length, self.wanted = max_length, wanted

    def __call__(self, samples: list[Sample], chosen: list[Sample], filler: list[Sample]) -> Batch:
        """A padded batch.

        Args:
            samples: one per row.
            chosen: one per record; the first of `samples`, in any order.
            filler: further samples, which are in the inputs but not in the targets.

        Raises:
            DataError: a sample is bad.
        """
        encoded = self.process(samples + filler)
        offsets = encoded.pop("offset_mapping")
        moved = encoded.pop(MOVED, None) or [[] for _ in samples]
        targets = self._targets(encoded, samples, len(chosen), offsets, moved)
        pictures = [len(s.pictures) for s in samples]
        batch = Batch(
            dict(encoded),
            targets,
            [s.record.id for s in chosen],
            indices=[s.index for s in chosen],
            grids=self.processing.grids(encoded, targets.vision, pictures),
        )
        if self.wanted.chunks:
            answers = self._answers(chosen, moved, offsets, targets.input_ids)
            batch = replace(batch, answers=answers)
        limit, where = self.max_length, self.records.where
        batch = truncate(batch, samples, limit, self.processing.image_token_id, where)
        if self.wanted.answers:
            check_answers(batch.targets.response, samples, limit, where)
        return batch

    def process(self, samples: list[Sample], side: str = "right") -> dict[str, Any]:
        """Run the processor.

        Args:
            samples: one per row.
            side: of the padding, left or right.

        Raises:
            DataError: the processor refuses a sample, which the message names.
        """
        try:
            return self.processing(
                [s.rendered.text for s in samples], [s.pictures for s in samples], side
            )
        except DataError as error:
            if len(samples) > 1:  # find the sample
                for sample in samples:
                    self.process([sample], side)
            first = samples[0]
            known = first.index != NO_INDEX
            where = self.records.where(first.index) if known else f"record {first.record.id}"
            raise error.at(where) from error

    def _targets(
        self,
        encoded: dict[str, Any],
        samples: list[Sample],
        chosen: int,
        offsets: Tensor,
        moved: list[Any],
    ) -> Targets:
        """The targets of a batch.

        Args:
            encoded: tensors by name, [B, T] or with a filler [B + 1, T].
            samples: one per row.
            chosen: rows other than rejected answers.
            offsets: [B, T, 2], (start, end) characters of the tokens in the text.
            moved: replacements of image placeholders in each row.
        """
        ids = encoded["input_ids"][: len(samples)]  # [B, T]
        attention = encoded["attention_mask"][: len(samples)].bool()  # [B, T]
        response = torch.zeros_like(attention)
        for row, sample in enumerate(samples):
            spans = expanded_spans(sample.rendered.spans, moved[row])
            words = expanded_spans(sample.rendered.said, moved[row])
            response[row] = torch.tensor(mark_tokens(offsets[row].tolist(), spans, words))
        vision = ids == self.processing.image_token_id  # [B, T]
        labels = background = None
        if self.wanted.vision_labels:
            labels, background = vision_labels(
                [s.record.objects for s in samples],
                [s.pictures for s in samples],
                vision,
                self.processor,
                lambda row: self.records.where(samples[row].index),
            )
        return Targets(
            ids,
            attention,
            response & attention & ~vision,
            vision,
            labels,
            background,
            self.processor.tokenizer.eos_token_id,
            torch.arange(len(samples)) >= chosen if self.wanted.pairs else None,
            sources=self._sources(samples, ids) if self.wanted.sources else None,
        )

    def _answers(
        self, samples: list[Sample], moved: list[Any], offsets: Tensor, ids: Tensor
    ) -> list[list[Answer]]:
        specials = frozenset(special_tokens(self.processor.tokenizer).values())
        rows = zip(samples, moved, offsets.tolist(), ids.tolist(), strict=False)
        return [cut_answers(s.rendered, m, o, i, specials) for s, m, o, i in rows]

    def _sources(self, samples: list[Sample], ids: Tensor) -> Tensor:
        """[B, T] int64."""
        numbers = [self.records.source_of(s.index) for s in samples]
        return torch.tensor(numbers)[:, None].expand_as(ids).clone()
