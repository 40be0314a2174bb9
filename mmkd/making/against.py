"""What the images of an entry of `make` are compared with (`against`).

OUT.answers/tasks.json   hashes of the images of tasks, with what they depend on
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmkd.data.images import images_in
from mmkd.data.records import Records
from mmkd.data.sources import find_files
from mmkd.data.sources.files import KINDS
from mmkd.data.twins import NAME
from mmkd.errors import HINT, DataError, MmkdError
from mmkd.evaluation.catalog import own_files
from mmkd.evaluation.documents import read_documents
from mmkd.evaluation.finished import facts_of
from mmkd.making.image_hashes import ImageHashes, Reference
from mmkd.recipe import HUB, DataConfig, EvaluateConfig, MakeConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import read_json, write_json

TASKS = "tasks.json"


@dataclass(frozen=True)
class Side:
    """Images that others are compared with.

    Attributes:
        name: of a task, a file or a folder.
        hashes: of its images.
        unreadable: why images could not be compared.
    """

    name: str
    hashes: frozenset[int]
    unreadable: tuple[str, ...] = ()


def is_task(name: str) -> bool:
    """Whether an item of `against` names a task, not a file or folder."""
    is_path = "/" in name or Path(name).suffix in KINDS or name.startswith(HUB)
    return not is_path


def sides_of(
    config: MakeConfig, evaluation: EvaluateConfig | None, hashes: ImageHashes, folder: Path
) -> list[Side]:
    """The images of an entry's `against`. Every rank calls it.

    Args:
        config: the entry.
        evaluation: of the recipe, which says where tasks are.
        hashes: finds hashes of images.
        folder: of the answers.

    Raises:
        MmkdError: a task is unknown, or a file or folder has no images.
        StoppedError: a process was asked to stop.
    """
    tasks = [name for name in config.against if is_task(name)]
    found = _of_tasks(tasks, evaluation, folder) if tasks else []
    for name in config.against:
        if not is_task(name):
            found.append(_of_images(name, hashes))
    return found


def against_facts(config: MakeConfig, evaluation: EvaluateConfig | None) -> dict[str, Any]:
    """What the images of an entry's `against` depend on, as JSON: files of records, images of
    folders, and files of tasks on this machine, with their sizes and modification times. What the
    Hub holds under a task's name is not looked at, nor the images that records name."""
    tasks = [name for name in config.against if is_task(name)]
    files: list[Path] = []
    for name in config.against:
        if not is_task(name):
            files += images_in(Path(name)) or _record_files(name)
    return {"tasks": _task_facts(tasks, evaluation), "files": facts_of(files)}


def _task_facts(tasks: Sequence[str], evaluation: EvaluateConfig | None) -> dict[str, Any]:
    if not tasks:
        return {}
    include, local = _places(evaluation)
    try:
        known = version("lmms_eval")
    except PackageNotFoundError:
        known = ""
    return {
        "names": list(tasks),
        "lmms_eval": known,
        "hash": NAME,
        "include": None if include is None else str(include),
        "local": None if local is None else str(local),
        "files": facts_of(own_files(tasks, include, local)),
    }


def _places(evaluation: EvaluateConfig | None) -> tuple[Path | None, Path | None]:
    """Folders of task files and of tasks' data."""
    if evaluation is None:
        return None, None
    include, local = evaluation.include, evaluation.local
    return Path(include) if include else None, Path(local) if local else None


def _record_files(name: str) -> list[Path]:
    try:
        return find_files(name)
    except DataError:  # a data set of the Hub, or one that is missing
        return []


def _of_images(name: str, hashes: ImageHashes) -> Side:
    """The images of a file of records, or of a folder."""
    images = images_in(Path(name))
    if images:
        count, read = len(images), partial(_of_folder, Path(name), images)
    else:
        records = Records(DataConfig(train=name))
        count, read = len(records), partial(_of_record, records)
    found, errors = hashes.of_all(count, read, f"images of {name}")
    values = frozenset(value for own in found.values() for value in own)
    if not values:
        first = next(iter(errors.values()), "no record has any")
        raise DataError(
            f"none of its images can be compared, the first: {first}".replace(HINT, "; "),
            where=name,
            hint="name a file of records with images, or a folder of images, in 'against'",
        )
    return Side(name, values, tuple(errors.values()))


def _of_folder(folder: Path, images: Sequence[Path], index: int) -> list[Reference]:
    return [(str(images[index].relative_to(folder)), folder)]


def _of_record(records: Records, index: int) -> list[Reference]:
    record = records[index]
    return [(image, record.root) for image in record.images]


def _of_tasks(tasks: Sequence[str], evaluation: EvaluateConfig | None, folder: Path) -> list[Side]:
    """The images of tasks. The first process reads them, and those of an earlier call are kept."""
    found: list[Side] = []
    problem = ""
    if distributed.rank() == 0:
        try:
            found = _read_tasks(tasks, evaluation, folder)
        except MmkdError as error:
            if distributed.world_size() == 1:
                raise
            problem = str(error)
    for said in distributed.gather([problem]):
        if said:
            what, _, hint = said.partition(HINT)
            raise DataError(what, hint=hint)
    return distributed.gather(found)


def _read_tasks(
    tasks: Sequence[str], evaluation: EvaluateConfig | None, folder: Path
) -> list[Side]:
    facts, path = _task_facts(tasks, evaluation), folder / TASKS
    kept = _kept(path, facts)
    if kept is not None:
        return kept
    sides = [
        Side(one.task, frozenset(v for d in one.documents for v in d.hashes), (*one.unreadable,))
        for one in read_documents(tasks, *_places(evaluation))
    ]
    listed = [[s.name, [f"{v:x}" for v in sorted(s.hashes)], s.unreadable] for s in sides]
    write_json(path, {"facts": facts, "sides": listed})
    return sides


def _kept(path: Path, facts: dict[str, Any]) -> list[Side] | None:
    """The images of tasks as an earlier call has read them; None if these are others."""
    try:
        found = read_json(path)
        if found["facts"] != facts:
            return None
        return [
            Side(name, frozenset(int(v, 16) for v in values), tuple(unreadable))
            for name, values, unreadable in found["sides"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
