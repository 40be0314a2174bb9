"""A model in this process that answers."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmkd.data.answers import Sampled, generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.records import GivenRecords
from mmkd.data.schema import Record
from mmkd.data.vocabulary import check_head
from mmkd.errors import DataError
from mmkd.making.base import Answer, Request
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig
from mmkd.runtime.hashes import file_hash, weights_hash
from mmkd.runtime.interrupt import deferred

SETTINGS = ("*config.json", "chat_template*", "*token*", "vocab*", "merges.txt")
"""Files of a model's folder, besides weights, on which its answers depend."""


class LocalMaker:
    """A model of transformers, loaded when it is first asked.

    Each answer has random numbers of its own, so that it does not depend on the batch. Logits are
    rounded differently in batches of other sizes; two tokens that are equally likely up to this
    rounding may be exchanged.

    Args:
        name: in the recipe.
        source: the model.
        batch_size: requests that run at once.
        device: of the model.
    """

    def __init__(self, name: str, source: ModelConfig, batch_size: int, device: torch.device):
        self._name, self._source = name, source
        self._batch_size, self._device = batch_size, device
        self._model: Any = None
        self._encoder: Encoder | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def source(self) -> ModelConfig:
        return self._source

    @property
    def weights(self) -> str:
        source = self._source
        return weights_hash(source.model) or f"{source.model}@{source.revision or 'main'}"

    @property
    def revision(self) -> str:
        """Weights, data type, and what else decides answers: generation settings, chat template,
        tokenizer, and how images are prepared."""
        source = self._source
        size = source.image_size
        parts = [
            self.weights,
            getattr(source, "quantize", None) or source.dtype,
            "" if source.processor is None else source.processor,
            "" if size is None else size.model_dump_json(),
            _settings_hash([source.model, source.processor]),
        ]
        return " ".join(filter(None, parts))

    def answer(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        keep: Callable[[Request, Answer], None],
    ) -> None:
        """Answer requests in batches; arguments and errors as in `Maker.answer`."""
        for first in range(0, len(requests), self._batch_size):
            with deferred():
                batch, records = [], []
                for request in requests[first : first + self._batch_size]:
                    try:
                        images = request.images()
                    except DataError as error:
                        keep(request, Answer("", False, str(error)))
                        continue
                    batch.append(request)
                    records.append(Record(request.key, request.messages, images))
                if not batch:
                    continue
                found = self._answers(records, sampling, [r.seed for r in batch])
                for request, answer in zip(batch, found, strict=True):
                    keep(request, answer)

    def _answers(
        self, records: list[Record], sampling: SamplingConfig, seeds: list[int]
    ) -> list[Answer]:
        """The answers to a batch. A prompt that cannot be encoded gets an error."""
        try:
            found = self._sample(records, sampling, seeds)
            return [Answer(sampled.text, sampled.finished) for sampled in found]
        except DataError as error:
            if len(records) == 1:
                return [Answer("", False, str(error))]
            pairs = zip(records, seeds, strict=True)
            return [a for r, seed in pairs for a in self._answers([r], sampling, [seed])]

    def _sample(
        self, records: list[Record], sampling: SamplingConfig, seeds: list[int]
    ) -> list[Sampled]:
        encoder = self._load()
        return sample_answers(
            generate_of(self._model),
            encoder,
            records,
            sampling,
            seed=0,
            device=self._device,
            ends=self._model.generation_config.eos_token_id,
            seeds=seeds,
        )

    def _load(self) -> Encoder:
        if self._encoder is None:
            model: Any = load_model(self._source)
            processor = load_processor(self._source)
            check_head(model, processor.tokenizer, self._name)
            self._model = model.to(self._device)
            records = GivenRecords(self._name)
            self._encoder = Encoder(records, processor, DataConfig(train=self._name))
        return self._encoder

    def release(self) -> None:
        """Free the model's memory, which the stages need."""
        self._model = self._encoder = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _settings_hash(models: Sequence[str | None]) -> str:
    """One hash over the `SETTINGS` of model folders; "" for models of the Hub."""
    folders = [Path(model) for model in models if model]
    found = {p for folder in folders for name in SETTINGS for p in folder.glob(name) if p.is_file()}
    if not found:
        return ""
    words = [f"{path.name} {file_hash(path)}" for path in sorted(found)]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
