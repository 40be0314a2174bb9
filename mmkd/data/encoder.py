"""Encode records as batches of a stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmkd.cache import Store
from mmkd.data.alignment import ALIGNED, same_processor
from mmkd.data.batch import Batch, paired
from mmkd.data.boundaries import boundary_tokens
from mmkd.data.chat import Rendered
from mmkd.data.collator import Collated, Collator
from mmkd.data.packer import Packer
from mmkd.data.processing import MOVED, Processing
from mmkd.data.records import Records, located
from mmkd.data.renderer import Renderer
from mmkd.data.samples import NO_INDEX, Sample, blank_sample
from mmkd.data.schema import Record
from mmkd.data.stored import with_stored
from mmkd.data.templates import check_processor
from mmkd.data.truncation import needs_answers
from mmkd.data.vocabulary import same_vocabulary
from mmkd.errors import DataError
from mmkd.objectives import Need, ObjectiveConfig, Region
from mmkd.recipe import DataConfig


class Encoder:
    """Encodes records as padded inputs with masks. A `Renderer` makes text, a `Collator` makes
    tensors, `with_stored` adds the outputs in a teacher's cache, and a `Packer` packs rows.

    Args:
        records: the data set.
        processor: of the student.
        config: settings of the data.
        vision_labels: add labels of image tokens.
        pairs: also encode the rejected answers, after the chosen ones. Then only the last answer of
            a conversation is a response.
        teacher_processor: of the teacher, if it returns other tokens or pixels.
        filler: add a blank image to the inputs of batches without images.
        store: the teacher's cache, if outputs are read from it.
        pack: largest number of tokens of a packed row; None: no packing.
        chunks: find the chunks of the responses.
        aligned: align image tokens, and responses if the vocabulary is the same, with those of a
            teacher that has another processor.
        sources: add the data source of each token's record.
        answers: refuse records without an answer, and those whose whole answer would be cut off by
            `max_length`.
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
        self.records, self.processor, self.config = records, processor, config
        self.pairs, self.store, self.pack, self.chunks = pairs, store, pack, chunks
        cache = None if config.image_cache is None else Path(config.image_cache)
        self.processing = Processing(processor, cache)
        self.renderer = Renderer(
            records, processor, self.processing, config, pairs=pairs, answers=answers
        )
        self.collator = Collator(
            records,
            processor,
            self.processing,
            config.max_length,
            Collated(vision_labels, pairs, chunks, sources, answers),
        )
        self.packer = Packer(records, self.processing, config.max_length)
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

    @classmethod
    def of(
        cls,
        objectives: Sequence[ObjectiveConfig],
        config: DataConfig,
        processor: Any,
        *,
        teacher_processor: Any = None,
        records: Records | None = None,
        filler: bool = False,
        store: Store | None = None,
        pack: int | None = None,
        sources: bool = False,
        sampled: bool = False,
    ) -> "Encoder":
        """The encoder that a stage's objectives need.

        Args:
            objectives: their settings.
            config, processor, teacher_processor, records, filler, store, pack, sources: as in
                `Encoder`; without `records`, those of `config`.
            sampled: all answers will be replaced by sampled ones, so records need none.
        """
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
            sources=sources,
            answers=not sampled and any(map(needs_answers, objectives)),
        )

    def load(self, index: int) -> Sample:
        """Text and images of a record. Raises DataError if it is bad."""
        with located(lambda: self.records.where(index)):
            record = self.records[index]
            pictures = self.records.pictures(record, self.processing.picture)
            rendered, rejected = self.renderer(index)
            return Sample(index, record, rendered, pictures, rejected)

    def length(self, index: int, *, keep: bool = True) -> int:
        """Number of tokens of a record: see `Renderer.length`."""
        return self.renderer.length(index, keep=keep)

    def loses_answer(self, index: int) -> bool:
        """Whether `max_length` cuts off a record's whole answer for one of the models; False for a
        record that is bad for other reasons."""
        theirs = self.teacher
        return self.renderer.loses_answer(index) or (
            theirs is not None and theirs.loses_answer(index)
        )

    def has_room(self, prompt: Record) -> bool:
        """Whether `max_length` leaves room for an answer to a prompt."""
        room = self.renderer.has_room(prompt)
        return room and (self.teacher is None or self.teacher.has_room(prompt))

    def batch(self, samples: list[Sample]) -> Batch:
        """A padded batch of samples from `load`, without the encoding by the teacher's
        processor."""
        return self._encode(samples)

    def encode_records(
        self, indices: list[int], records: list[Record], skipped: list[str] | None = None
    ) -> Batch:
        """A padded batch of records that are not from the data set, such as sampled answers.

        Args:
            indices: of the records from which they were made.
            records: to encode.
            skipped: becomes `Batch.skipped`.
        """
        batch = replace(self._read_records(indices, records), skipped=skipped or [])
        theirs = None if self.teacher is None else self.teacher._read_records(indices, records)
        return paired(batch, theirs, self.matched, self._boundary_tokens())

    def _read_records(self, indices: list[int], records: list[Record]) -> Batch:
        samples = []
        for index, record in zip(indices, records, strict=True):
            with located(lambda index=index: self.records.where(index)):  # type: ignore[misc]
                rendered, rejected = self.renderer.render(record)
                pictures = self.records.pictures(record)
                samples.append(Sample(index, record, rendered, pictures, rejected))
        return self._encode(samples)

    def prompts(self, records: list[Record], *, filler: bool = False) -> dict[str, Tensor]:
        """Inputs that ask for the next answer of each conversation, padded on the left.

        Args:
            records: conversations that end before an answer.
            filler: add a blank image as a further row, if the encoder does so for batches.

        Raises:
            DataError: a prompt is bad. The message names the record by its id.
        """
        samples = []
        for record in records:
            with located(lambda record=record: f"record {record.id}"):  # type: ignore[misc]
                text = self.renderer.prompt(record)
                pictures = self.records.pictures(record)
            samples.append(Sample(NO_INDEX, record, Rendered(text, (), ()), pictures))
        if filler and not any(s.pictures for s in samples):
            samples += self.filler
        encoded = self.collator.process(samples, side="left")
        return {k: v for k, v in encoded.items() if k not in ("offset_mapping", MOVED)}

    def encode(self, indices: list[int]) -> Batch:
        """A padded batch. With `on_bad_record: skip`, records that the processor of student or
        teacher refuses are replaced by others."""
        if self.config.on_bad_record == "stop":
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
        """A padded batch, with the encoding by the teacher's processor."""
        batch = self._encode(samples)
        return paired(batch, self._theirs(batch.indices), self.matched, self._boundary_tokens())

    def _boundary_tokens(self) -> tuple[Tensor, Tensor] | None:
        """Tokens of student and teacher that begin with white space or are special; None if no
        chunks are found."""
        if not self.chunks:
            return None
        theirs = (self.teacher or self).processor
        return boundary_tokens(self.processor.tokenizer), boundary_tokens(theirs.tokenizer)

    def _theirs(self, indices: list[int]) -> Batch | None:
        """The encoding of exactly these records by the teacher's processor, if it differs."""
        if self.teacher is None:
            return None
        try:
            return self.teacher._encode([self.teacher.load(index) for index in indices])
        except DataError as error:
            raise error.at(f"{error.where}, for the teacher") from error

    def _alone(self, index: int) -> Sample:
        """A sample that the processors of both models accept.

        Raises:
            DataError: it is bad. A record that is missing in a teacher's cache is not bad.
        """
        sample = self.load(index)
        batch, theirs = self._encode([sample], stored=False), self._theirs([index])
        with located(lambda: self.records.where(index)):
            paired(batch, theirs, self.matched, self._boundary_tokens())
        return sample

    def _encode(self, chosen: list[Sample], *, stored: bool = True) -> Batch:
        samples = chosen + [s.other() for s in chosen] if self.pairs else chosen
        filler = [] if any(s.pictures for s in samples) else self.filler
        bins: list[list[int]] = []
        if self.pack is not None:
            samples, bins = self.packer.order(samples, filler, self.pack)
        batch = self.collator(samples, chosen, filler)
        if self.store is not None and stored:
            # Objectives that read hidden states are never used with packing.
            hidden = self.pack is None
            batch = with_stored(batch, self.store, samples, self.records.where, hidden=hidden)
        return batch if self.pack is None else self.packer(batch, bins)
