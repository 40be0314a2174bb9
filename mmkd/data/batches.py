"""From records to batches: encoding, padding, masks, and a deterministic order.

The order is a function of seed and step alone, so that a resumed run sees the same batches and the
number of processes does not change what a step sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.chat import Rendered, expanded_spans, mark_tokens, render_chat
from mmkd.data.records import GroundedObject, Record, Records, located
from mmkd.errors import DataError
from mmkd.objectives import Targets
from mmkd.recipe import BatchConfig, DataConfig

IGNORED = -100
RENDERED_KEPT = 50_000


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        inputs: what the model is called with, without labels.
        targets: what its tokens are.
        ids: the records' ids, for messages.
        skipped: messages of the records that were left out.
    """

    inputs: dict[str, Tensor]
    targets: Targets
    ids: list[str]
    skipped: list[str] = field(default_factory=list)

    def to(self, device: torch.device) -> "Batch":
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        targets = Targets(**{k: move(v) for k, v in vars(self.targets).items()})
        return replace(self, inputs={k: move(v) for k, v in self.inputs.items()}, targets=targets)


@dataclass(frozen=True)
class Sample:
    """A record ready to be encoded."""

    index: int
    record: Record
    rendered: Rendered
    pictures: list[Image.Image]


class Encoder:
    """Turns records into padded model inputs with masks, through the processor."""

    def __init__(
        self, records: Records, processor: Any, config: DataConfig, *, vision_labels: bool = False
    ):
        self.records = records
        self.processor = processor
        self.config = config
        self.vision_labels = vision_labels
        self._rendered = lru_cache(maxsize=RENDERED_KEPT)(self._render)

    def _render(self, index: int) -> Rendered:
        return render_chat(self.processor, self.records[index].messages)

    def load(self, index: int) -> Sample:
        """Text and pictures of one record; raises DataError if it is bad."""
        with located(lambda: self.records.where(index)):
            record = self.records[index]
            pictures = self.records.pictures(record)
            return Sample(index, record, self._rendered(index), pictures)

    def encode(self, indices: list[int]) -> Batch:
        """One padded batch; bad records are replaced by later ones if the recipe says so."""
        samples: list[Sample] = []
        skipped: list[str] = []
        for index in indices:
            for attempt in range(len(self.records)):
                try:
                    samples.append(self.load((index + attempt) % len(self.records)))
                    break
                except DataError as error:
                    if self.config.on_bad_sample == "stop":
                        raise
                    skipped.append(str(error))
            else:
                raise DataError("every record is bad", where=str(self.records.path))
        return replace(self._encode(samples), skipped=skipped)

    def _encode(self, samples: list[Sample]) -> Batch:
        encoded = self._process(samples)
        offsets = encoded.pop("offset_mapping")
        moved = encoded.pop("text_replacement_offsets", None) or [[] for _ in samples]
        attention = encoded["attention_mask"].bool()  # [B, T]
        response = torch.zeros_like(attention)
        for row, sample in enumerate(samples):
            spans = expanded_spans(sample.rendered.spans, moved[row])
            response[row] = torch.tensor(mark_tokens(offsets[row].tolist(), spans))
        vision = encoded["input_ids"] == image_token_id(self.processor)  # [B, T]
        labels = background = None
        if self.vision_labels:
            labels, background = self._vision_labels(samples, vision)
        targets = Targets(
            encoded["input_ids"],
            attention,
            response & attention & ~vision,
            vision,
            labels,
            background,
            self.processor.tokenizer.eos_token_id,
        )
        batch = Batch(dict(encoded), targets, [s.record.id for s in samples])
        return self._truncate(batch, samples)

    def _process(self, samples: list[Sample]) -> dict[str, Any]:
        texts = [s.rendered.text for s in samples]
        flat: list[Any] = [p for s in samples for p in s.pictures]
        # Idefics-like processors want the pictures of each row apart, the others one flat list.
        nested = hasattr(self.processor, "fake_image_token")
        images = ([s.pictures for s in samples] if nested else flat) if flat else None
        try:
            encoded = self.processor(
                text=texts,
                images=images,
                padding=True,
                padding_side="right",
                add_special_tokens=not _template_writes_bos(self.processor, texts[0]),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                # Idefics3 would try to turn the replacement offsets into a tensor too.
                return_tensors=None if nested else "pt",
            )
            moved = encoded.pop("text_replacement_offsets", None)
            encoded.convert_to_tensors("pt")
            return {**encoded, "text_replacement_offsets": moved}
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the processor refuses it: {reason}",
                where=self.records.where(samples[0].index),
                mend="check the record's images and placeholders",
            ) from error

    def _truncate(self, batch: Batch, samples: list[Sample]) -> Batch:
        limit = self.config.max_length
        length = batch.targets.input_ids.shape[1]
        if length <= limit:
            return batch
        cut = batch.targets.vision[:, limit:].any(1)
        if cut.any():
            raise DataError(
                f"its images alone pass max_length {limit}",
                where=self.records.where(samples[int(cut.nonzero()[0])].index),
                mend="raise data.max_length or use smaller images",
            )

        def head(value: Any) -> Any:
            is_sequence = isinstance(value, Tensor) and value.shape[:2] == (len(samples), length)
            return value[:, :limit] if is_sequence else value

        targets = Targets(**{k: head(v) for k, v in vars(batch.targets).items()})
        return replace(batch, inputs={k: head(v) for k, v in batch.inputs.items()}, targets=targets)

    def _vision_labels(self, samples: list[Sample], vision: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.full(vision.shape, IGNORED)  # [B, T]
        labelled = torch.zeros(len(samples), 1, dtype=torch.bool)
        for row, sample in enumerate(samples):
            if len(sample.pictures) != 1 or not sample.record.objects:
                continue
            tokens = int(vision[row].sum())
            grid = round(tokens**0.5)
            if grid**2 != tokens:
                raise DataError(
                    "token_labels needs image tokens on a square grid",
                    where=self.records.where(sample.index),
                    mend="use a processor without tiling or rows",
                )
            words = grid_words(sample.record.objects, sample.pictures[0].size, grid)
            labels[row, vision[row]] = torch.tensor([self._word_id(w) for w in words])
            labelled[row] = True
        return labels, vision & labelled & (labels == IGNORED)

    def _word_id(self, word: str | None) -> int:
        if word is None:
            return IGNORED
        return _last_token(self.processor.tokenizer, word)


@lru_cache(maxsize=65536)
def _last_token(tokenizer: Any, word: str) -> int:
    return tokenizer.encode(word, add_special_tokens=False)[-1]


def _template_writes_bos(processor: Any, text: str) -> bool:
    bos = processor.tokenizer.bos_token
    return bos is not None and text.startswith(bos)


def image_token_id(processor: Any) -> int:
    """The id of the token that image features replace."""
    known = getattr(processor, "image_token_id", None)
    if known is not None:
        return known
    return processor.tokenizer.convert_tokens_to_ids(processor.image_token)


def grid_words(
    objects: tuple[GroundedObject, ...], size: tuple[int, int], grid: int
) -> list[str | None]:
    """The word for each cell of a grid x grid picture, row by row: the smallest box that covers
    the cell's centre, None where there is none.

    Args:
        objects: names and boxes in pixels.
        size: (width, height) of the picture in pixels.
        grid: cells per side.
    """
    by_area = sorted(
        objects, key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1]), reverse=True
    )
    words: list[str | None] = [None] * grid**2
    for cell in range(grid**2):
        x = (cell % grid + 0.5) * size[0] / grid
        y = (cell // grid + 0.5) * size[1] / grid
        for obj in by_area:
            left, top, right, bottom = obj.box
            if left <= x < right and top <= y < bottom:
                words[cell] = obj.name
    return words


class BatchStream:
    """The micro-batches of a stage, addressed by step.

    Step s of the global batch size G sees records s*G ... (s+1)*G - 1 of an endless sequence of
    epochs, each shuffled by seed and epoch number. Rank r of R takes every R-th of them.
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
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self._epochs: dict[int, list[int]] = {}

    @property
    def records_per_step(self) -> int:
        return self.batch.size * self.batch.accumulate * self.world_size

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.encoder.records) / self.records_per_step))

    def _record(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.encoder.records))
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(len(self.encoder.records), generator=generator)
            self._epochs = {epoch: order.tolist(), **dict(list(self._epochs.items())[:1])}
        return self._epochs[epoch][offset]

    def indices(self, step: int, micro: int) -> list[int]:
        """Which records this rank's micro-batch `micro` of step `step` holds."""
        first = step * self.records_per_step + micro * self.batch.size * self.world_size
        return [
            self._record(first + i * self.world_size + self.rank) for i in range(self.batch.size)
        ]

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.batch.accumulate)
        return self.encoder.encode(self.indices(step, micro))

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """The micro-batches of each step in first ... last - 1."""
        numbers = range(first * self.batch.accumulate, last * self.batch.accumulate)
        loader: torch.utils.data.DataLoader[Batch] = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Its own: a loader draws a seed, and a resumed run must not draw one more.
            generator=torch.Generator(),
        )
        pending: list[Batch] = []
        for batch in loader:
            pending.append(batch)
            if len(pending) == self.batch.accumulate:
                yield pending
                pending = []
