"""Conversations with a model about images.

model, processor = load_answering("runs/mine/01-mimic/student")
conversation = Conversation(model, processor)
conversation.ask("What is in the image?", ["image.png"]).text
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TextStreamer

from mmkd.data.answers import answered, generate_of, sample_answers
from mmkd.data.encoder import Encoder
from mmkd.data.images import load_image, picture_as_rgb
from mmkd.data.records import GivenRecords, located
from mmkd.data.schema import Record
from mmkd.data.vocabulary import check_head
from mmkd.errors import DataError
from mmkd.modeling.loading import load_pretrained, load_pretrained_processor
from mmkd.modeling.own_tokens import check_own_tokens
from mmkd.recipe import DataConfig, ImageSizeConfig, Quantization, SamplingConfig
from mmkd.runtime.distributed import choose_device

Picture = str | Path | Image.Image
GREEDY = SamplingConfig(temperature=0, max_new_tokens=256)


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: without end tokens.
        tokens: number of generated tokens, including the end token.
        seconds: duration of `generate`, including the forward pass of the prompt.
        finished: the model ended the answer; False if `max_new_tokens` was reached.
    """

    text: str
    tokens: int
    seconds: float
    finished: bool

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Conversation:
    """A conversation of user and model. The prompt of each question contains all earlier turns.

    Args:
        model: in eval mode, on the device on which it should run.
        processor: of the model.
        sampling: how answers are sampled; None is greedy decoding of at most 256 tokens.
        seed: of sampled answers.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ):
        self.model, self.processor = model, processor
        self.sampling, self.seed = sampling or GREEDY, seed
        name = "the conversation"
        self._encoder = Encoder(GivenRecords(name), processor, DataConfig(train=name))
        self.record = Record(name, [])

    def ask(
        self,
        question: str,
        images: Sequence[Picture] = (),
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Ask a question, and add question and answer to the conversation.

        Args:
            question: the user's turn.
            images: images before the question in this turn, as paths or PIL images.
            on_text: is called with each new piece of the answer during generation.

        Raises:
            DataError: an image cannot be read, or the processor refuses the conversation. The
                conversation is unchanged then.
        """
        prompt = self._with(question, images)
        timed = _Timed(generate_of(self.model), self.processor.tokenizer, on_text)
        [said] = sample_answers(
            timed,
            self._encoder,
            [prompt],
            self.sampling,
            seed=self.seed,
            device=self.model.device,
            ends=self.model.generation_config.eos_token_id,
        )
        self.record = answered(prompt, said.text, finished=said.finished)
        return Reply(said.text, timed.tokens, timed.seconds, said.finished)

    def _with(self, question: str, images: Sequence[Picture]) -> Record:
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": question})
        pictures = [*self.record.images, *map(_opened, images)]
        messages = [*self.record.messages, {"role": "user", "content": content}]
        return Record(self.record.id, messages, pictures)


class _Timed:
    """Wraps a model's `generate`: counts tokens and seconds, and streams the text."""

    def __init__(self, generate: Callable[..., Tensor], tokenizer: Any, on_text: Any):
        self._generate, self._tokenizer, self._on_text = generate, tokenizer, on_text
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        if self._on_text is not None:
            options["streamer"] = _Streamer(self._tokenizer, self._on_text)
        begun = time.perf_counter()
        ids = self._generate(inputs, **options)
        if ids.is_cuda:
            torch.cuda.synchronize(ids.device)
        self.seconds = time.perf_counter() - begun
        self.tokens = ids.shape[1] - inputs["input_ids"].shape[1]
        return ids


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _opened(picture: Picture) -> Image.Image:
    """
    Raises:
        DataError: it is missing, broken, or too large.
    """
    if isinstance(picture, Image.Image):
        return picture_as_rgb(picture)
    path = Path(picture)
    if not path.is_file():
        raise DataError("no such image", where=str(path), hint="check the path")
    target = path.resolve()  # a caller may name links to other folders, a record may not
    with located(lambda: str(path)):
        return load_image(target.name, target.parent)


def load_answering(
    name: str,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    processor: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantization | None = None,
    image_size: ImageSizeConfig | None = None,
) -> tuple[Any, Any]:
    """Load a model for generation, and its processor.

    Args:
        name: folder or Hub id.
        device: `auto` is the GPU if there is one.
        dtype: by default float32 on a CPU, where bfloat16 is slow, and the checkpoint's dtype on
            other devices.
        processor: a processor, or its folder or Hub id; the model's own by default.
        revision, trust_remote_code, quantize, image_size: as in `load_pretrained`.

    Raises:
        CheckpointError: model or processor cannot be loaded, or they do not match.
    """
    place = choose_device(str(device))
    # The processor is loaded first: if it is missing, no time is spent on gigabytes of weights.
    other = isinstance(processor, str) and processor != name
    if processor is None or isinstance(processor, str):
        processor = load_pretrained_processor(
            processor or name,
            revision=None if processor else revision,  # it is one of the model's repository
            trust_remote_code=trust_remote_code,
            image_size=image_size,
        )
    if other:
        check_own_tokens(name, processor, name, revision=revision, trusted=trust_remote_code)
    model: Any = load_pretrained(
        name,
        dtype=dtype or (torch.float32 if place.type == "cpu" else "auto"),
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        image_size=image_size,
    )
    nn.Module.to(model, place)  # transformers' own refuses quantized models
    check_head(model, processor.tokenizer, name)
    return model, processor
