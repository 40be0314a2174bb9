"""What is asked: questions about a folder of images, or those of records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from mmkd.data.answers import answers_of
from mmkd.data.answers import asked as asked_before
from mmkd.data.images import SUFFIXES, images_in, load_image
from mmkd.data.records import Records, located
from mmkd.data.schema import Record
from mmkd.data.turns import PLACEHOLDER, Message
from mmkd.errors import DataError, RecipeError
from mmkd.recipe import DataConfig, MakeConfig
from mmkd.recipe.making import OF_RECORDS
from mmkd.recipe.templates import escaped, placeholders

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A conversation that ends before an answer.

    Attributes:
        id: of the record that is made from it.
        messages: chat messages.
        references: of the images: each as a record has it (a path, a {bytes, path} pair or
            another), and the folder of its path.
        objects: names of the objects in the image, if the record says them.
        reference: the record's own answer; None if it has none, or another question is asked.
        own: the record's own question; None if there is no record.
        expected: the answer by a list of the image's objects, yes or no; None for others.
        about: the image's path, or the record's id.
        group: questions about the same image or record share it, and no others; ids of records
            may be equal.
    """

    id: str
    messages: list[Message]
    references: list[tuple[Any, Path | None]]
    objects: tuple[str, ...] = ()
    reference: str | None = None
    own: str | None = None
    expected: str | None = None
    about: str = ""
    group: str = ""

    def images(self) -> list[Image.Image]:
        """The decoded images.

        Raises:
            DataError: one cannot be read.
        """
        return [load_image(*reference) for reference in self.references]

    @property
    def text(self) -> str:
        """The text of the last message."""
        return _text(self.messages[-1])


@dataclass(frozen=True)
class Questions:
    """The questions of an entry of `make`. A record is read again each time, so that the images of
    large data sets need not fit into memory.

    Attributes:
        at: reads a question by its index.
        count: number of questions.
        names: names of all objects in the records.
    """

    at: Callable[[int], Question]
    count: int
    names: frozenset[str] = field(default_factory=frozenset)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Question]:
        return (self.at(index) for index in range(self.count))

    def only(self, places: Sequence[int]) -> "Questions":
        """Those of these questions that have given indices, in this order."""
        return replace(self, at=lambda index: self.at(places[index]), count=len(places))

    def with_more(self, images: "Questions", more: Sequence[tuple[int, Question]]) -> "Questions":
        """These questions, and more after them.

        Args:
            images: questions whose images the others are about.
            more: indices in `images`, with questions without references.
        """

        def at(index: int) -> Question:
            if index < self.count:
                return self.at(index)
            number, question = more[index - self.count]
            return replace(question, references=images.at(number).references)

        return replace(self, at=at, count=self.count + len(more))


def open_questions(config: MakeConfig, where: str) -> Questions:
    """The questions of an entry of `make`.

    Args:
        config: the entry.
        where: what messages call it.

    Raises:
        MmkdError: there are none, or a prompt is not possible.
    """
    for key, text in _texts(config):
        if PLACEHOLDER in text:
            raise RecipeError(
                f"a text has the placeholder {PLACEHOLDER}, and images are put before questions",
                where=f"{where}.{key}",
                hint="leave it out",
            )
    if config.pictures is not None:
        return _about_folder(Path(config.pictures), config)
    return _of_records(config)


def _texts(config: MakeConfig) -> Iterator[tuple[str, str]]:
    """The texts of an entry that models read, with their keys."""
    yield from (("prompts", prompt) for prompt in config.prompts)
    if (objects := config.objects) is not None:
        yield "objects.prompt", objects.prompt
        yield from (("objects.ask", text) for text in objects.ask)
        if objects.existence is not None:
            yield "objects.existence.question", objects.existence.question
    if config.context is not None and config.context.system is not None:
        yield "context.system", config.context.system
    if config.why is not None:
        yield from (("why.prompt", config.why.prompt), ("why.question", config.why.question))


def questions_for_lists(config: MakeConfig, where: str) -> Questions | None:
    """The question for the objects of each image; None if there are no questions about objects.
    Arguments and errors as of `open_questions`."""
    if config.objects is None:
        return None
    asks = {"prompts": [escaped(config.objects.prompt)], "checks": []}
    return open_questions(config.model_copy(update=asks), where)


def _about_folder(folder: Path, config: MakeConfig) -> Questions:
    if not folder.is_dir():
        raise DataError("no such folder", where=str(folder), hint="check 'pictures'")
    names = sorted(str(path.relative_to(folder)) for path in images_in(folder))[: config.limit]
    if not names:
        raise DataError(
            "the folder has no images", where=str(folder), hint=f"known are {', '.join(SUFFIXES)}"
        )
    prompts = config.prompts

    def at(index: int) -> Question:
        number, prompt = divmod(index, len(prompts))
        name = names[number]
        if name != name.encode(errors="ignore").decode():
            hint = "rename it"
            raise DataError(f"the image's name {name!a} is not UTF-8", hint=hint)
        label = name if len(prompts) == 1 else f"{name}-{prompt}"
        messages = about_images(1, prompts[prompt].format())
        return Question(label, messages, [(name, folder)], about=name, group=name)

    return Questions(at, len(names) * len(prompts))


def _of_records(config: MakeConfig) -> Questions:
    records = Records(DataConfig(train=config.records, images=config.images))
    count = min(len(records), config.limit or len(records))
    prompts: list[str | None] = [*config.prompts] or [None]
    reads_objects = any(c.kind == "objects" for c in config.checks)
    names = frozenset[str]()
    if reads_objects:
        names = _names_in(records)
        if not names:
            raise DataError(
                "the records say nothing of objects",
                where=records.name,
                hint="add 'objects' (name, box)",
            )
    compares = [c.kind for c in config.checks if c.compares]
    if compares and not first_readable(lambda index: records[index], count).has_answer:
        raise DataError(
            "the records have no answers to compare with",
            where=records.name,
            hint=f"change the check {compares[0]!r}",
        )

    def at(index: int) -> Question:
        number, prompt = divmod(index, len(prompts))
        record = records[number]
        label = record.id if len(prompts) == 1 else f"{record.id}-{prompt}"
        with located(lambda: records.where(number)):
            return replace(_of_record(record, label, prompts[prompt]), group=str(number))

    return Questions(at, count * len(prompts), names)


def _names_in(records: Records) -> frozenset[str]:
    """The names of all objects. Records that cannot be read are reported when they are asked."""
    names: set[str] = set()
    for index in range(len(records)):
        with suppress(DataError):
            names.update(thing.name for thing in records[index].objects)
    return frozenset(names)


def first_readable(read: Callable[[int], T], count: int) -> T:
    """The first of `count` things that can be read.

    Raises:
        DataError: none can be read; the error of the first one.
    """
    first: DataError | None = None
    for index in range(count):
        try:
            return read(index)
        except DataError as error:
            first = first or error
    raise first or DataError("there is nothing to ask")


def _of_record(record: Record, label: str, prompt: str | None) -> Question:
    """The first question of a record, or another question about its images.

    Raises:
        DataError: the prompt has a placeholder for what the record does not have.
    """
    objects = tuple(o.name for o in record.objects)
    turn = answers_of(record)[0]
    before = asked_before(record, turn)
    answer = None
    if turn < len(record.messages):
        answer = _text(record.messages[turn])
    own = _text(before.messages[-1])
    question = Question(
        label, before.messages, _located(before), objects, answer, own, about=record.id
    )
    if prompt is None:
        return question
    text = _filled(prompt, {"question": own, "answer": answer})
    messages = about_images(len(record.images), text)
    return replace(question, messages=messages, references=_located(record), reference=None)


def _filled(prompt: str, values: Mapping[str, str | None]) -> str:
    """A prompt with the texts of a record.

    Raises:
        DataError: one that it needs is not there.
    """
    for name in sorted(placeholders(prompt, OF_RECORDS)):
        if not values[name]:
            raise DataError(f"the record has no {name}, which a prompt contains",
                            hint="change the prompt, or drop the record")  # fmt: skip
    return prompt.format(**values)


def _text(message: Message) -> str:
    return "".join(part.get("text", "") for part in message["content"])


def _located(record: Record) -> list[tuple[Any, Path | None]]:
    return [(image, record.root) for image in record.images]


def about_images(count: int, prompt: str) -> list[Message]:
    """A question about images, which come before it."""
    images = [{"type": "image"} for _ in range(count)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}]
