"""From records to batches of a stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmkd.cache import Store
from mmkd.data.alignment import ALIGNED, same_processor
from mmkd.data.batch import Batch, paired
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
    """Turns records into padded model inputs with masks, through the processor: a `Renderer` makes
    text of them, a `Collator` tensors, `with_stored` adds a teacher's cache and a `Packer` packs.

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
        self.records, self.processor, self.config = records, processor, config
        self.pairs, self.store, self.pack, self.chunks = pairs, store, pack, chunks
        cache = None if config.picture_cache is None else Path(config.picture_cache)
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
    ) -> "Encoder":
        """The encoder that a stage's objectives need.

        Args:
            objectives: their settings.
            config, processor, teacher_processor, records, filler, store, pack, sources: as in
                `Encoder`; without `records`, those of `config`.
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
            answers=any(map(needs_answers, objectives)),
        )

    def load(self, index: int) -> Sample:
        """Text and pictures of one record; raises DataError if it is bad."""
        with located(lambda: self.records.where(index)):
            record = self.records[index]
            pictures = self.records.pictures(record, self.processing.picture)
            rendered, rejected = self.renderer(index)
            return Sample(index, record, rendered, pictures, rejected)

    def length(self, index: int, *, keep: bool = True) -> int:
        """Tokens of a record: see `Renderer.length`."""
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
                rendered, rejected = self.renderer.render(record)
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
                text = self.renderer.prompt(record)
                pictures = self.records.pictures(record)
            samples.append(Sample(NO_INDEX, record, Rendered(text, (), ()), pictures))
        encoded = self.collator.process(samples, side="left")
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
            samples, bins = self.packer.order(samples, filler, self.pack)
        batch = self.collator(samples, chosen, filler)
        if self.store is not None and stored:
            # What reads hidden states is never packed.
            hidden = self.pack is None
            batch = with_stored(batch, self.store, samples, self.records.where, hidden=hidden)
        return batch if self.pack is None else self.packer(batch, bins)
