"""From records to a batch: encoding, padding, masks."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.cache import Store
from mmkd.data.alignment import ALIGNED, same_processor
from mmkd.data.batch import Batch, paired
from mmkd.data.bounds import check_text
from mmkd.data.chat import (
    Rendered,
    expanded_spans,
    mark_tokens,
    render_chat,
    special_tokens,
)
from mmkd.data.chunks import Answer, cut_answers
from mmkd.data.labels import IGNORED, vision_labels
from mmkd.data.packing import (
    Packing,
    bins_of,
    pack_inputs,
    pack_stored,
    pack_targets,
    renumbered,
)
from mmkd.data.processing import MOVED, Processing, Size
from mmkd.data.records import Records, located
from mmkd.data.samples import NO_INDEX, Sample, blank_sample
from mmkd.data.schema import Message, Record
from mmkd.data.stored import stored_hidden, stored_rows
from mmkd.data.templates import check_processor, render
from mmkd.data.truncation import check_answers, needs_answers, tokens_before_answer, truncate
from mmkd.data.vocabulary import same_vocabulary
from mmkd.errors import DataError
from mmkd.objectives import Need, Objective, Region, Targets
from mmkd.recipe import DataConfig

RENDERED_KEPT = 50_000


class Encoder:
    """Turns records into padded model inputs with masks, through the processor.

    Args:
        records: the data.
        processor: a model's.
        config: of the data.
        vision_labels: mark what image tokens show.
        pairs: encode the rejected answers too, behind the chosen ones; only the last answer of a
            conversation is then a response.
        teacher_processor: the teacher's, if it makes other tokens or pixels.
        filler: have the models see a blank picture behind a batch that has none.
        store: the teacher's cache, to be read beside each batch.
        pack: most tokens of a row in which records lie one behind another; None for one a row.
        chunks: find the pieces of responses that both models' tokens have in common.
        aligned: match the tokens of a teacher with a processor of its own one by one: image tokens,
            and responses if the vocabulary is the student's.
        sources: say which data source each token's record is from.
        answers: refuse records whose whole answer lies behind `max_length`.
    """

    def __init__(
        self,
        records: Records,
        processor: Any,
        config: DataConfig,
        *,
        vision_labels: bool = False,
        pairs: bool = False,
        teacher_processor: Any = None,
        filler: bool = False,
        store: Store | None = None,
        pack: int | None = None,
        chunks: bool = False,
        aligned: bool = True,
        sources: bool = False,
        answers: bool = True,
    ):
        check_processor(processor)
        self.sources = sources
        self.records = records
        self.processor = processor
        cache = None if config.picture_cache is None else Path(config.picture_cache)
        self.processing = Processing(processor, cache)
        self.config = config
        self.vision_labels = vision_labels
        self.pairs = pairs
        self.store = store
        self.pack = pack
        self.chunks = chunks
        self.answers = answers
        self.filler = [blank_sample(processor)] if filler else []
        self.teacher = None
        self.matched: tuple[Region, ...] = ALIGNED if aligned else ()
        if teacher_processor is not None and not same_processor(processor, teacher_processor):
            self.teacher = Encoder(
                records,
                teacher_processor,
                config,
                pairs=pairs,
                filler=filler,
                chunks=chunks,
                answers=answers,
            )
            if aligned and not same_vocabulary(processor.tokenizer, teacher_processor.tokenizer):
                self.matched = ("vision",)
        self._rendered = lru_cache(maxsize=RENDERED_KEPT)(self._render)

    @classmethod
    def of(
        cls,
        objectives: Sequence[Objective],
        config: DataConfig,
        processor: Any,
        *,
        teacher_processor: Any = None,
        records: Records | None = None,
        filler: bool = False,
        store: Store | None = None,
        pack: int | None = None,
    ) -> "Encoder":
        """The encoder that a stage's objectives need."""
        needs: frozenset[Need] = frozenset().union(*(o.needs for o in objectives))
        by_token = [o for o in objectives if "teacher" in o.needs and "chunks" not in o.needs]
        return cls(
            records or Records(config),
            processor,
            config,
            vision_labels="vision_labels" in needs,
            pairs="pairs" in needs,
            teacher_processor=teacher_processor if "teacher" in needs else None,
            filler=filler,
            store=store,
            pack=pack,
            chunks="chunks" in needs,
            aligned=bool(by_token),
            sources=any(o.sources is not None for o in objectives),
            answers=any(map(needs_answers, objectives)),
        )

    def _render(self, index: int) -> tuple[Rendered, Rendered | None]:
        return self._rendered_record(self.records[index])

    def _rendered_record(self, record: Record) -> tuple[Rendered, Rendered | None]:
        def rendered(messages: list[Message]) -> Rendered:
            check_text(messages, self.config.max_length)
            whole = render_chat(self.processor, messages)
            if record.unfinished:
                cut = (whole.spans[-1][0], whole.said[-1][1])
                whole = replace(whole, spans=(*whole.spans[:-1], cut))
            if not record.last_answer_only:
                return whole
            return replace(whole, spans=whole.spans[-1:], said=whole.said[-1:])

        if not self.pairs:
            return rendered(record.messages), None
        if record.rejected is None:
            raise DataError(
                "the record has no rejected answer", mend="add 'chosen' and 'rejected' to it"
            )
        return rendered(record.messages), rendered(record.rejected)

    def load(self, index: int) -> Sample:
        """Text and pictures of one record; raises DataError if it is bad."""
        with located(lambda: self.records.where(index)):
            record = self.records[index]
            pictures = self.records.pictures(record, self.processing.picture)
            rendered, rejected = self._rendered(index)
            return Sample(index, record, rendered, pictures, rejected)

    def length(self, index: int, *, keep: bool = True) -> int:
        """Tokens of a record, of a pair's longer answer; of a bad one what is read in its place
        has, or 0 if that would stop the run.

        Args:
            index: the record.
            keep: keep what is rendered, for a batch that this process encodes.
        """
        rendered = self._rendered if keep else self._render
        skip = self.config.on_bad_sample == "skip"
        for number in self.records.tried(index) if skip else [index]:
            try:
                record = self.records[number]
                sizes = self.records.sizes(record)
                answers = [r for r in rendered(number) if r is not None]
                longest = max(self.processing.length(r.text, sizes) for r in answers)
                if longest > self.config.max_length and self.cut_off(answers, sizes):
                    continue
                return min(longest, self.config.max_length)
            except DataError:
                continue
        return 0

    def cut_off(self, answers: Sequence[Rendered], sizes: list[Size]) -> bool:
        """Whether `max_length` leaves no token of an answer of one of a record's conversations, and
        the objectives need it."""
        before = (tokens_before_answer(self.processing, r, sizes) for r in answers)
        limit = self.config.max_length
        return self.answers and any(n is not None and n >= limit for n in before)

    def loses_answer(self, index: int) -> bool:
        """Whether `max_length` cuts off a record's whole answer for one of the models; False for a
        record that is bad for other reasons."""
        try:
            sizes = self.records.sizes(self.records[index])
            answers = [r for r in self._rendered(index) if r is not None]
            lost = self.cut_off(answers, sizes)
        except DataError:
            lost = False
        return lost or (self.teacher is not None and self.teacher.loses_answer(index))

    def has_room(self, prompt: Record) -> bool:
        """Whether `max_length` leaves room for an answer to a prompt."""
        text = render(self.processor, prompt.messages, prompt=True)
        length = self.processing.length(text, self.records.sizes(prompt))
        room = length < self.config.max_length
        return room and (self.teacher is None or self.teacher.has_room(prompt))

    def batch(self, samples: list[Sample]) -> Batch:
        """One padded batch of samples that `load` gave, without the teacher's own view."""
        return self._encode(samples)

    def encode_records(
        self, indices: list[int], records: list[Record], skipped: list[str] | None = None
    ) -> Batch:
        """One padded batch of records that were made from those of the data; `skipped` is passed
        on."""
        batch = replace(self._read_records(indices, records), skipped=skipped or [])
        theirs = None if self.teacher is None else self.teacher._read_records(indices, records)
        return paired(batch, theirs, self.matched, chunks=self.chunks)

    def _read_records(self, indices: list[int], records: list[Record]) -> Batch:
        samples = []
        for index, record in zip(indices, records, strict=True):
            with located(lambda index=index: self.records.where(index)):  # type: ignore[misc]
                rendered, rejected = self._rendered_record(record)
                pictures = self.records.pictures(record)
                samples.append(Sample(index, record, rendered, pictures, rejected))
        return self._encode(samples)

    def prompts(self, records: list[Record]) -> dict[str, Tensor]:
        """Inputs that ask for the next answer of each conversation, padded on the left.

        Raises:
            DataError: a prompt is bad; its record is named by its id, since nothing else is known.
        """
        samples = []
        for record in records:
            with located(lambda record=record: f"record {record.id}"):  # type: ignore[misc]
                text = render(self.processor, record.messages, prompt=True)
                pictures = self.records.pictures(record)
            samples.append(Sample(NO_INDEX, record, Rendered(text, (), ()), pictures))
        encoded = self._process(samples, side="left")
        return {k: v for k, v in encoded.items() if k not in ("offset_mapping", MOVED)}

    def encode(self, indices: list[int]) -> Batch:
        """One padded batch; records that are bad for one of the models are replaced by others if
        the recipe says so."""
        if self.config.on_bad_sample == "stop":
            return self._whole(list(map(self.load, indices)))
        skipped: list[str] = []
        samples = [self.records.usable(index, self.load, skipped) for index in indices]
        try:
            batch = self._whole(samples)
        except DataError:  # a processor refuses one of them
            samples = [self.records.usable(s.index, self._alone, skipped) for s in samples]
            batch = self._whole(samples)
        return replace(batch, skipped=skipped)

    def _whole(self, samples: list[Sample]) -> Batch:
        """One padded batch with the teacher's own view."""
        batch = self._encode(samples)
        return paired(batch, self._theirs(batch.indices), self.matched, chunks=self.chunks)

    def _theirs(self, indices: list[int]) -> Batch | None:
        """The teacher's own view of these records, and of no others."""
        if self.teacher is None:
            return None
        try:
            return self.teacher._encode([self.teacher.load(index) for index in indices])
        except DataError as error:
            raise error.at(f"{error.where}, for the teacher") from error

    def _alone(self, index: int) -> Sample:
        """A record that both models' processors take.

        Raises:
            DataError: it is bad; what a teacher's cache lacks is not the record's fault.
        """
        sample = self.load(index)
        batch, theirs = self._encode([sample], stored=False), self._theirs([index])
        with located(lambda: self.records.where(index)):
            paired(batch, theirs, self.matched, chunks=self.chunks)
        return sample

    def _encode(self, chosen: list[Sample], *, stored: bool = True) -> Batch:
        samples = chosen + [s.other() for s in chosen] if self.pairs else chosen
        filler = [] if any(s.pictures for s in samples) else self.filler
        bins: list[list[int]] = []
        if self.pack is not None:
            samples, bins = self._in_packed_order(samples, filler, self.pack)
        encoded = self._process(samples + filler)
        offsets = encoded.pop("offset_mapping")
        moved = encoded.pop(MOVED, None) or [[] for _ in samples]
        ids = encoded["input_ids"][: len(samples)]  # [B, T]
        attention = encoded["attention_mask"][: len(samples)].bool()  # [B, T]
        response = torch.zeros_like(attention)
        for row, sample in enumerate(samples):
            spans = expanded_spans(sample.rendered.spans, moved[row])
            words = expanded_spans(sample.rendered.said, moved[row])
            response[row] = torch.tensor(mark_tokens(offsets[row].tolist(), spans, words))
        vision = ids == self.processing.image_token_id  # [B, T]
        labels = background = None
        if self.vision_labels:
            labels, background = vision_labels(
                [s.record.objects for s in samples],
                [s.pictures for s in samples],
                vision,
                self.processor,
                lambda row: self.records.where(samples[row].index),
            )
        targets = Targets(
            ids,
            attention,
            response & attention & ~vision,
            vision,
            labels,
            background,
            self.processor.tokenizer.eos_token_id,
            torch.arange(len(samples)) >= len(chosen) if self.pairs else None,
            sources=self._sources(samples, ids) if self.sources else None,
        )
        batch = Batch(
            dict(encoded),
            targets,
            [s.record.id for s in chosen],
            indices=[s.index for s in chosen],
            grids=self.processing.grids(encoded, vision, [len(s.pictures) for s in samples]),
        )
        if self.chunks:
            batch = replace(batch, answers=self._answers(chosen, moved, offsets, ids))
        limit, where = self.config.max_length, self.records.where
        batch = truncate(batch, samples, limit, self.processing.image_token_id, where)
        if self.answers:
            check_answers(batch.targets.response, samples, limit, where)
        if self.store is not None and stored:
            said = (self.store, batch.targets, samples, self.records.where)
            batch = replace(batch, stored=stored_rows(*said))
            if self.pack is None:  # what reads hidden states is never packed
                batch = replace(batch, stored_hidden=stored_hidden(*said))
        return batch if self.pack is None else self._packed(batch, samples, bins)

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

    def _in_packed_order(
        self, samples: list[Sample], filler: list[Sample], capacity: int
    ) -> tuple[list[Sample], list[list[int]]]:
        """The samples as they lie one behind another in packed rows, and their numbers by row:
        models take pictures in the order of their tokens."""
        bins = bins_of(list(map(self._tokens, samples + filler)), capacity)
        order, bins = renumbered(bins, len(samples))
        return [samples[i] for i in order], bins

    def _tokens(self, sample: Sample) -> int:
        with located(lambda: self.records.where(sample.index)):
            length = self.processing.length(sample.rendered.text, [p.size for p in sample.pictures])
        return min(length, self.config.max_length)

    def _packed(self, batch: Batch, samples: list[Sample], bins: list[list[int]]) -> Batch:
        """The batch in rows of several records; a filler is one of them that has no targets."""
        seen = batch.inputs["attention_mask"].bool()  # [B, T], or [B + 1, T]
        packing = Packing(seen, bins)
        extra = (0, 0, 0, len(seen) - len(samples))

        def padded(value: Any) -> Any:
            rows = isinstance(value, Tensor) and value.dim() == 2
            return torch.nn.functional.pad(value, extra) if rows else value

        targets = Targets(**{k: padded(v) for k, v in vars(batch.targets).items()})
        token = self.processor.tokenizer.pad_token_id or 0
        stored = batch.stored
        if stored is not None:
            at = torch.nn.functional.pad(stored.at.view(len(samples), -1), extra, value=-1)
            stored = pack_stored(replace(stored, at=at.flatten()), packing)
        return replace(
            batch,
            inputs=pack_inputs(batch.inputs, packing, token),
            targets=pack_targets(targets, packing, IGNORED),
            stored=stored,
        )

    def _process(self, samples: list[Sample], side: str = "right") -> dict[str, Any]:
        try:
            return self.processing(
                [s.rendered.text for s in samples], [s.pictures for s in samples], side
            )
        except DataError as error:
            if len(samples) > 1:  # which of them it is
                for sample in samples:
                    self._process([sample], side)
            first = samples[0]
            known = first.index != NO_INDEX
            where = self.records.where(first.index) if known else f"record {first.record.id}"
            raise error.at(where) from error
