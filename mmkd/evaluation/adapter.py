"""The model class lmms-eval talks to: any image-text-to-text model, batched generation.

    python -m lmms_eval --model mmkd --model_args pretrained=DIR --tasks ...

Inside mmkd, `mmkd.evaluation.run.evaluate` hands over a model in memory instead.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from mmkd.data.bounds import check_scaled, scaled_edge
from mmkd.data.generation import end_tokens, padding_token
from mmkd.data.images import load_image, picture_as_rgb, with_eight_bits
from mmkd.data.processing import drop_appended
from mmkd.data.records import located
from mmkd.data.templates import check_template, render
from mmkd.errors import CheckpointError, DataError
from mmkd.evaluation.options import generate_options, stop_strings
from mmkd.evaluation.pictures import find_picture
from mmkd.evaluation.refusals import Refusals, Unanswered, is_of_document
from mmkd.modeling.conversation import load_answering
from mmkd.recipe import ImageSizeConfig, Quantization
from mmkd.runtime import interrupt
from mmkd.runtime.processes import ALONE, Processes

Message = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """One question: where it came from and how to generate its answer."""

    index: int
    task: str
    split: str
    doc_id: int
    length: int
    settings: dict[str, Any]
    to_messages: Any

    @property
    def group(self) -> tuple[str, str]:
        """Only requests with equal groups share a batch."""
        return self.task, repr(sorted(self.settings.items(), key=lambda item: item[0]))


@dataclass(frozen=True)
class Prompt:
    """One rendered question: the template's text and the images its placeholders stand for."""

    index: int
    text: str
    images: list[Any]


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    """The type by its name; `None` and "auto" stay as they are."""
    if dtype is None or isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(
            f"unknown dtype {dtype!r}", hint="use auto, float32, bfloat16 or float16"
        )
    return found


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`eval()` inside; afterwards every module has its own train/eval state back."""
    states = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in states:
            module.training = training


@contextmanager
def left_padding(tokenizer: Any) -> Iterator[None]:
    """Pad on the left inside: new tokens must follow the prompt's last token."""
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        yield
    finally:
        tokenizer.padding_side = side


def split_images(messages: Sequence[Message], where: str) -> tuple[list[Message], list[Any]]:
    """Convert lmms-eval's messages to the template's: placeholders in the text, and images."""
    turns: list[Message] = []
    images: list[Any] = []
    for message in messages:
        parts: list[Message] = []
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                images.append(_picture(part["url"], where))
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise DataError(
                    f"the task asks about {part['type']}", where=where, hint="use image tasks"
                )
        turns.append({"role": message["role"], "content": parts})
    return turns, images


def _picture(found: Any, where: str) -> Any:
    """A task's image, decoded or a path, as training reads its own.

    Raises:
        DataError: it cannot be read.
    """
    with located(lambda: where):
        if isinstance(found, Image.Image):
            return picture_as_rgb(found)
        if isinstance(found, str | Path):  # a processor would fetch what lies on the web
            path = Path(find_picture(str(found)))
            return load_image(path.name, path.parent)
        if not isinstance(found, np.ndarray | Tensor):
            raise DataError(
                f"the task gives an image as {type(found).__name__}",
                hint="give one by Pillow, or a path",
            )
        return found


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def answer_length(tokens: Tensor, ends: Sequence[int]) -> int:
    """Number of generated tokens [T] up to and including the first end token."""
    is_end = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device))
    positions = is_end.nonzero()
    return int(positions[0]) + 1 if len(positions) else len(tokens)


class MmkdModel(lmms):
    """lmms-eval adapter (chat interface) of an `AutoModelForImageTextToText` and its processor.

    Args:
        pretrained: folder or Hub name of the model and its processor.
        batch_size: questions per generate call.
        device: `None` is the GPU if there is one. A model in memory stays where it is.
        dtype: name or type; `None` is float32 on a CPU and the checkpoint's own elsewhere.
        trust_remote_code: run the model code that comes with the checkpoint.
        revision: commit, tag or branch on the Hub.
        processor: folder or Hub name of one that is not the model's own.
        image_size: size of images; None is the processor's own.
        model: a model in memory, which comes with its processor; `pretrained` is then only a name.
        progress: show a progress bar; `None` shows it on a terminal.
        quantize: as in `mmkd.modeling.loading.load_pretrained`.
        processes: that answer together, each a share of the batches; all of them have all answers
            then. Batches and answers do not depend on their number.

    Attributes:
        end_tokens: ids that end an answer, see `mmkd.data.generation.end_tokens`.
        asked: the requests of the latest task, by task and document.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | Path | None = None,
        batch_size: int | str = 1,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        *,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | str | None = None,
        image_size: ImageSizeConfig | None = None,
        progress: bool | None = None,
        quantize: Quantization | None = None,
        processes: Processes = ALONE,
    ):
        super().__init__()
        if model is None:
            if pretrained is None:
                raise CheckpointError("no model given", hint="say pretrained=FOLDER")
            model, processor = load_answering(
                str(pretrained),
                device=device or "auto",
                dtype=resolve_dtype(dtype),
                processor=processor,
                revision=revision,
                trust_remote_code=trust_remote_code,
                quantize=quantize,
                image_size=image_size,
            )
        if processor is None or isinstance(processor, str):
            raise CheckpointError("a model in memory needs its processor", hint="pass processor=")
        self.model, self.processor = model, processor
        check_template(processor)
        self.tokenizer: Any = processor.tokenizer
        self.end_tokens = end_tokens(processor, model.generation_config.eos_token_id)
        self.batch_size = int(batch_size)
        self.processes = processes
        self.progress = progress if processes.is_first else False
        self.refusals = Refusals()
        self.asked: dict[tuple[str, int], Request] = {}
        self.generated_tokens = 0
        self.generation_seconds = 0.0

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, end tokens included, per second of `generate`; 0 before the first."""
        return self.generated_tokens / self.generation_seconds if self.generation_seconds else 0.0

    def clean(self) -> None:
        """Keep the model: lmms-eval's default deletes it, and training still needs it."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("mmkd answers by generation; use output_type: generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("mmkd answers single questions; use output_type: generate_until")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in the order of `requests`."""
        answers: dict[int, GenerationResult] = {}
        batches = self.processes.own(list(self._batches(requests)))
        hidden = self.rank != 0 or (None if self.progress is None else not self.progress)
        total = sum(map(len, batches))
        bar = tqdm(total=total, desc="Answering", unit="question", disable=hidden)
        tokens, seconds = self.generated_tokens, self.generation_seconds
        with evaluation_mode(self.model), left_padding(self.tokenizer), bar:
            for batch in batches:
                interrupt.stop_here()  # a library may have swallowed the exception
                answers |= self._answer(batch)
                bar.update(len(batch))
        self._log(self.generated_tokens - tokens, self.generation_seconds - seconds)
        self._share(answers, {instance.args[4] for instance in requests})
        return [answers[i] for i in range(len(requests))]

    def _share(self, answers: dict[int, GenerationResult], tasks: set[str]) -> None:
        """Add the other processes' answers, and the documents that they could not ask about."""
        found = self.processes.exchange((answers, self.refusals.part(tasks)))
        for rank, (theirs, refusals) in enumerate(found):
            if rank != self.processes.rank:
                answers |= theirs
                self.refusals.merge(refusals)

    def _log(self, tokens: int, seconds: float) -> None:
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0)

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[Request]]:
        """Batches of one task and one setting each, longest questions first."""
        parsed = []
        for index, instance in enumerate(requests):
            context, to_messages, settings, doc_id, task, split = instance.args
            parsed.append(Request(index, task, split, doc_id, len(context), settings, to_messages))
        self.asked = {(r.task, r.doc_id): r for r in parsed}
        parsed.sort(key=lambda r: (r.group, -r.length, r.index))
        for _, members in groupby(parsed, key=lambda r: r.group):
            group = list(members)
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def conversation(self, request: Request) -> tuple[list[Message], list[Any]]:
        """The messages of a request for the chat template, and their images.

        Raises:
            DataError: an image cannot be used.
        """
        where = f"{request.task} document {request.doc_id}"
        doc = self.task_dict[request.task][request.split][request.doc_id]
        with located(lambda: where):
            doc = with_eight_bits(doc)
        turns, images = split_images(request.to_messages(doc), where)
        with located(lambda: where):
            for image in images:
                if isinstance(image, Image.Image):
                    check_scaled(image.size, scaled_edge(self.processor))
        return turns, images

    def _prompt(self, request: Request) -> Prompt:
        turns, images = self.conversation(request)
        text = render(self.processor, turns, prompt=True)
        return Prompt(request.index, text, images)

    def _answer(self, batch: Sequence[Request]) -> dict[int, GenerationResult]:
        """Answers by request index. Prompts with and without images are asked separately, because
        no processor takes both in one call. `refusals` names the documents that cannot be asked
        about."""
        prompts: list[Prompt] = []
        answers: dict[int, GenerationResult] = {}
        requests = {request.index: request for request in batch}
        for request in batch:
            try:
                prompts.append(self._prompt(request))
            except Exception as error:
                answers[request.index] = self._refuse(request, error)
        for wanted in (True, False):
            part = [p for p in prompts if bool(p.images) is wanted]
            if part:
                answers |= self._answer_usable(part, requests)
        return answers

    def _answer_usable(
        self, prompts: Sequence[Prompt], requests: dict[int, Request]
    ) -> dict[int, GenerationResult]:
        """Answers by request index. If the processor or the model refuses a batch, its halves are
        asked one after the other, so that only the documents that cause it are asked alone."""
        first = requests[prompts[0].index]
        try:
            results = self._generate(prompts, first.settings)
        except Exception as error:
            if len(prompts) == 1 or not is_of_document(error):
                return {first.index: self._refuse(first, error)}
            half = len(prompts) // 2
            parts = (prompts[:half], prompts[half:])
            return self._answer_usable(parts[0], requests) | self._answer_usable(parts[1], requests)
        for prompt in prompts:
            self.refusals.answered(requests[prompt.index].task)
        return {p.index: r for p, r in zip(prompts, results, strict=True)}

    def _refuse(self, request: Request, error: Exception) -> GenerationResult:
        """The empty answer to a document that cannot be asked about.

        Raises:
            Exception: `error`, if it is not about this document.
        """
        interrupt.stop_here()
        self.refusals.add(request.task, request.doc_id, error)
        return GenerationResult(Unanswered(), TokenCounts(0, 0))

    def _encode(self, prompts: Sequence[Prompt]) -> Any:
        """Model inputs; input_ids and attention_mask are [B, T], padded on the left."""
        texts = [p.text for p in prompts]
        has_images = bool(prompts[0].images)
        bos = self.tokenizer.bos_token
        templated_bos = bos is not None and texts[0].startswith(bos)
        inputs = self.processor(
            text=texts,
            images=[p.images for p in prompts] if has_images else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not templated_bos,
        )
        if not templated_bos:
            drop_appended(inputs, self.tokenizer, "left")
        return inputs.to(self.device, dtype=self.model.dtype)

    def _generate(
        self, prompts: Sequence[Prompt], settings: dict[str, Any]
    ) -> list[GenerationResult]:
        inputs = self._encode(prompts)
        options = generate_options(settings, "the task") | {
            "eos_token_id": self.end_tokens or None,
            "pad_token_id": padding_token(self.processor, self.end_tokens),
        }
        started = self._clock()
        # not inference_mode: a model with its tensors could not be trained further
        with torch.no_grad():
            generate: Any = self.model.generate
            output = generate(**inputs, **options)
        self.generation_seconds += self._clock() - started
        new = output[:, inputs["input_ids"].shape[1] :]  # [B, new tokens]
        asked = inputs["attention_mask"].sum(dim=1).tolist()
        stops = stop_strings(settings)
        results = []
        for row, input_tokens in zip(new, asked, strict=True):
            length = answer_length(row, self.end_tokens)
            self.generated_tokens += length
            said = [token for token in row[:length].tolist() if token not in self.end_tokens]
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            results.append(
                GenerationResult(cut_at(text, stops), TokenCounts(int(input_tokens), length))
            )
        return results

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
