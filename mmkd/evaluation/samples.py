"""Answers to questions about a few held-out images, for the report. lmms-eval is not needed.

`evaluation/<label>/answers.json` holds the questions, the answers and thumbnails. It is written
after each batch. If the process is killed, the same call continues after the last batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkd.data.answers import answers_of, asked, generate_of, sample
from mmkd.data.encoder import Encoder
from mmkd.data.images import SUFFIXES, images_in, load_image, thumbnail
from mmkd.data.records import GivenRecords, Records, located
from mmkd.data.schema import Record
from mmkd.data.sources.files import find_files
from mmkd.data.sources.tables import is_saved
from mmkd.errors import DataError, one_line
from mmkd.evaluation.finished import facts_of
from mmkd.evaluation.refusals import is_of_document
from mmkd.modeling.conversation import load_answering
from mmkd.recipe import (
    HUB,
    DataConfig,
    ImageSizeConfig,
    Quantization,
    SamplesConfig,
    SamplingConfig,
)
from mmkd.runtime.files import write_json
from mmkd.runtime.interrupt import stop_here
from mmkd.runtime.progress import say
from mmkd.runtime.shapes import Answers, read_if

FORMAT = 1


@dataclass(frozen=True)
class Question:
    """One question about a record's images.

    Attributes:
        where: file and record, for error messages.
        record: the conversation up to and including the question.
        truth: the record's own answer; "" if there is none.
    """

    where: str
    record: Record
    truth: str

    @property
    def text(self) -> str:
        """The text of the user's last message."""
        return _text(self.record.messages[-1])


def find_questions(config: SamplesConfig) -> list[Question]:
    """The questions of a recipe's `evaluate.samples`, spread evenly over its records or images.

    Raises:
        DataError: a file or an image is missing or cannot be read.
    """
    with _own_keys():
        return _of_records(config) if config.records is not None else _of_pictures(config)


@contextmanager
def _own_keys() -> Iterator[None]:
    """Errors of data files name the keys of `evaluate.samples` in place of those of `data`."""
    try:
        yield
    except DataError as error:
        hint = (error.hint or "").replace("data.train", "evaluate.samples.records")
        hint = hint.replace("data.images", "evaluate.samples.images")
        raise DataError(
            error.what, where=error.where, hint=hint or None, kind=error.kind
        ) from error


def _of_records(config: SamplesConfig) -> list[Question]:
    folder = config.images if isinstance(config.images, str) else None
    records = Records(DataConfig(train=str(config.records), images=folder))
    found = []
    for index in _spread(len(records), config.count):
        where = records.where(index)
        with located(lambda where=where: where):  # type: ignore[misc]
            record = records[index]
            answer = answers_of(record)[0]
            records.sizes(record)
        truth = _text(record.messages[answer])
        found.append(Question(where, asked(record, answer), truth))
    return found


def _of_pictures(config: SamplesConfig) -> list[Question]:
    if isinstance(config.images, list):
        paths = [Path(path) for path in config.images]
    else:
        paths = _in_folder(Path(str(config.images)))
        paths = [paths[i] for i in _spread(len(paths), config.count)]
    found = []
    for path in paths:
        if not path.is_file():
            raise DataError("no such image", where=str(path), hint="check evaluate.samples.images")
        target = path.resolve()  # the recipe, unlike a record, may name links to other folders
        with located(lambda path=path: str(path)):  # type: ignore[misc]
            load_image(target.name, target.parent)
        for prompt in config.prompts:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            message = {"role": "user", "content": content}
            record = Record(str(path), [message], [target.name], root=target.parent)
            found.append(Question(str(path), record, ""))
    return found


def _in_folder(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            "no such folder of images", where=str(folder), hint="check evaluate.samples.images"
        )
    paths = images_in(folder)
    if not paths:
        raise DataError(
            "no images in it", where=str(folder), hint=f"read are {', '.join(SUFFIXES)}"
        )
    return paths


def _spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, evenly spread."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def _text(message: dict[str, Any]) -> str:
    return " ".join(p["text"].strip() for p in message["content"] if p["type"] == "text").strip()


def check_samples(config: SamplesConfig, processor: Any) -> None:
    """Check that all questions can be asked: their files exist, and the processor takes them.

    Raises:
        DataError: it names the first question that cannot be asked, and why.
    """
    encoder = _encoder(processor)
    for question in find_questions(config):
        with located(lambda question=question: question.where):  # type: ignore[misc]
            try:
                encoder.prompts([question.record])
            except DataError as error:
                raise error.at(question.where) from error


def _encoder(processor: Any) -> Encoder:
    name = "evaluate.samples"
    return Encoder(GivenRecords(name), processor, DataConfig(train=name))


def answer_samples(
    source: str,
    config: SamplesConfig,
    out: Path,
    *,
    model: dict[str, Any],
    batch_size: int,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: Quantization | None = None,
    image_size: ImageSizeConfig | None = None,
) -> None:
    """Write a model's greedy answers to the questions, unless they are written already.

    Args:
        source: folder or Hub id of the model.
        config: the questions.
        out: file to write.
        model: what identifies the model, as JSON; `processor` names one that is not the model's
            own.
        batch_size: questions at once.
        device: where the model runs.
        revision, trust_remote_code, quantize, image_size: as in `load_pretrained`.

    Raises:
        DataError: a file or an image is missing, or no question can be asked.
    """
    questions = find_questions(config)
    request = {
        "format": FORMAT,
        **model,
        "samples": config.model_dump(mode="json"),
        "files": facts_of(_files(config)),
        "batch_size": batch_size,
    }
    answers = _known(out, request)
    if len(answers) == len(questions):
        return
    network, processor = load_answering(
        source,
        device=device,
        processor=model["processor"],
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantize=quantize,
        image_size=image_size,
    )
    asking = _Asking(network, _encoder(processor), config.max_new_tokens, device)
    for start in range(len(answers), len(questions), batch_size):
        stop_here()
        part = questions[start : start + batch_size]
        answers += [_row(q, a) for q, a in zip(part, asking.answers(part), strict=True)]
        write_json(out, {"request": request, "expected": len(questions), "answers": answers})
    _report_refused(answers)


def _known(out: Path, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers that an earlier call with the same request has written.

    A model that could be asked nothing is asked again, so that its failure is reported each time.
    """
    found = read_if(Answers, out)
    if found is None or found.get("request") != request:
        return []
    answers: list[dict[str, Any]] = found["answers"]
    return [] if all("unanswered" in answer for answer in answers) else answers


def _report_refused(answers: list[dict[str, Any]]) -> None:
    """Say how many questions could not be asked.

    Raises:
        DataError: no question could be asked.
    """
    refused = [a["unanswered"] for a in answers if "unanswered" in a]
    if len(refused) == len(answers):
        raise DataError(
            f"none of {len(refused)} questions can be asked: {refused[0]}",
            where="evaluate.samples",
            hint="check that the images and the model's processor fit",
        )
    if refused:
        say(f"samples: {len(refused)} of {len(answers)} questions could not be asked: {refused[0]}")


def _files(config: SamplesConfig) -> list[Path]:
    """The files that the answers depend on."""
    records = config.records
    if records is not None and is_saved(Path(records)):
        return list(Path(records).iterdir())
    if records is not None:
        return [] if records.startswith(HUB) else find_files(records)
    given = config.images
    return [Path(p) for p in given] if isinstance(given, list) else _in_folder(Path(str(given)))


@dataclass(frozen=True)
class Reply:
    """A model's answer, or why it could not be asked."""

    text: str
    refused: str | None = None


class _Asking:
    """Asks a model batches of questions. A batch has questions with images only, or without."""

    def __init__(self, model: Any, encoder: Encoder, new_tokens: int, device: torch.device):
        self.model, self.encoder, self.device = model, encoder, device
        self.settings = SamplingConfig(max_new_tokens=new_tokens, temperature=0)

    def answers(self, questions: list[Question]) -> list[Reply]:
        found: dict[int, Reply] = {}
        for wanted in (True, False):
            part = [i for i, q in enumerate(questions) if bool(q.record.images) is wanted]
            if part:
                replies = self._replies([questions[i] for i in part])
                found |= dict(zip(part, replies, strict=True))
        return [found[i] for i in range(len(questions))]

    def _replies(self, questions: list[Question]) -> list[Reply]:
        """Replies in order. If a batch is refused, its halves are asked one after the other, down
        to the questions that cause it."""
        try:
            texts = sample(
                generate_of(self.model),
                self.encoder,
                [q.record for q in questions],
                self.settings,
                seed=0,
                device=self.device,
                ends=self.model.generation_config.eos_token_id,
            )
        except Exception as error:
            stop_here()
            if not is_of_document(error):
                raise
            if len(questions) == 1:
                return [Reply("", one_line(error))]
            half = len(questions) // 2
            return self._replies(questions[:half]) + self._replies(questions[half:])
        return [Reply(text) for text in texts]


def _row(question: Question, reply: Reply) -> dict[str, Any]:
    record = question.record
    try:
        picture = thumbnail(load_image(record.images[0], record.root)) if record.images else None
    except DataError:  # deleted meanwhile; the answer is shown without its image
        picture = None
    row = {
        "id": record.id,
        "question": question.text,
        "truth": question.truth,
        "pictures": len(record.images),
        "picture": picture,
        "answer": reply.text,
    }
    return row if reply.refused is None else {**row, "unanswered": reply.refused}
