"""The documents of tasks, as lmms-eval asks them: their questions, and hashes of their images."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.data.content import printable
from mmkd.data.schema import record_id
from mmkd.data.twins import image_hash, require_hash
from mmkd.errors import DataError, MmkdError, one_line
from mmkd.evaluation.isolation import isolated
from mmkd.evaluation.pictures import allow
from mmkd.evaluation.refusals import is_of_document
from mmkd.evaluation.run import require_lmms_eval
from mmkd.runtime import interrupt
from mmkd.runtime.progress import track


@dataclass(frozen=True)
class Document:
    """A document of a task.

    Attributes:
        name: its id, or its number.
        question: the text that a model is asked.
        hashes: of its images.
    """

    name: str
    question: str
    hashes: tuple[int, ...]


@dataclass
class TaskDocuments:
    """The documents of a task.

    Attributes:
        unreadable: documents that could not be read, each with the reason.
        thumbnails: {hash: small image}, if they are kept.
    """

    task: str
    documents: list[Document] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    thumbnails: dict[int, Image.Image] = field(default_factory=dict)


def read_documents(
    tasks: Sequence[str], include: Path | None, local: Path | None, *, thumbnail: int = 0
) -> list[TaskDocuments]:
    """Read all documents of tasks.

    Args:
        tasks, include, local: as in `mmkd.evaluation.run.evaluate`.
        thumbnail: longest edge of the small images that are kept, in pixels; 0 for none.

    Raises:
        MmkdError: lmms-eval or ImageHash is missing, or a task is unknown or cannot be scored.
        DataError: a task's data is missing or of another schema.
    """
    require_lmms_eval()
    require_hash()
    with isolated(progress=False):
        from lmms_eval.tasks import get_task_dict
        from tenacity import RetryError

        from mmkd.evaluation.manager import find_tasks
        from mmkd.evaluation.scored import refuse_data

        manager = find_tasks(tasks, include, local)
        allow(*manager.data_folders())
        found = []
        for chosen in manager.chosen.tasks:
            try:
                with redirect_stdout(io.StringIO()):
                    task: Any = get_task_dict([chosen.name], manager)[chosen.name]
                    documents = task.eval_docs
            except RetryError as error:  # lmms-eval hides the cause after five retries
                refuse_data(error, chosen.name)
            found.append(_read(chosen.name, task, documents, thumbnail))
    return found


def _read(name: str, task: Any, documents: Any, thumbnail: int) -> TaskDocuments:
    found = TaskDocuments(name)
    count = len(documents)
    for number in track(range(count), name, count):
        interrupt.stop_here()
        place = f"document {number}"
        try:
            document = documents[number]
            place = printable(record_id(document)) or place
            images = _images(task, document, f"{name} {place}")
            hashes = tuple(map(image_hash, images))
            found.documents.append(Document(place, str(task.doc_to_text(document)), hashes))
        except Exception as error:
            interrupt.stop_here()
            if not is_of_document(error):
                raise
            found.unreadable.append(f"{name} {place}: {one_line(error)}")
            continue
        for value, image in zip(hashes, images, strict=True):
            if thumbnail and value not in found.thumbnails:
                image.thumbnail((thumbnail, thumbnail))
                found.thumbnails[value] = image
    if not found.documents:
        raise MmkdError(
            f"none of its {count:,} documents can be read, the first: {found.unreadable[:1]}",
            where=name,
            hint="repair the data of the task, or leave the task out",
        )
    return found


def _images(task: Any, document: Any, where: str) -> list[Image.Image]:
    """The decoded images of a document.

    Raises:
        DataError: it shows a video or other media, or an image that cannot be decoded.
    """
    from mmkd.evaluation.adapter import split_images

    shown = task.doc_to_visual(document) or []
    shown = shown if isinstance(shown, list | tuple) else [shown]
    parts = [{"type": "image", "url": image} for image in shown]
    _, images = split_images([{"role": "user", "content": parts}], where)
    for image in images:
        if not isinstance(image, Image.Image):
            raise DataError("it shows a video", where=where, hint="compare tasks with images")
    return images
