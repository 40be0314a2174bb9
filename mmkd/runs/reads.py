"""Find the inputs of a stage, its data and models, without reading their content."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmkd.cache.store import MANIFEST
from mmkd.data.images import SUFFIXES
from mmkd.data.records import Source
from mmkd.data.sources import find_files
from mmkd.data.sources.tables import is_saved
from mmkd.errors import DataError
from mmkd.making.used import with_stage_data
from mmkd.recipe import HUB, ModelConfig, Recipe, SourceConfig, StudentConfig
from mmkd.runs.members import Member
from mmkd.runtime.files import read_json
from mmkd.runtime.hub import model_commit
from mmkd.students import start_folder
from mmkd.teachers.by_stage import with_stage_teachers

PICTURES = 2_000
"""Number of records of a source whose images are noted."""
OF_MODELS = (".safetensors", ".json", ".jinja", ".py", ".model", ".txt", ".tiktoken")


@dataclass(frozen=True)
class Reads:
    """The inputs of a stage, before their content is read.

    Attributes:
        files: paths of data, images, models and processors.
        sources: {data source: paths of its files}.
        caches: {folder of a teacher's cache: {shard or "settings": SHA-256}}.
        commits: {Hub id of a model, or data source: commit}.
    """

    files: frozenset[str]
    sources: dict[str, list[str]]
    caches: dict[str, dict[str, str]]
    commits: dict[str, str]


def start_of(member: Member, index: int) -> ModelConfig:
    """The model that a stage starts from. It may not exist yet if an earlier stage writes it."""
    folder = start_folder(member.recipe, index, member.folder)
    if folder is None or (index == 0 and not folder.is_dir()):
        return member.recipe.student
    return ModelConfig(model=str(folder))


def reads_of_stage(member: Member, index: int) -> Reads:
    """The inputs of a member's stage.

    Args:
        member: the run's member.
        index: number of the stage, from 0.
    """
    own = with_stage_data(member.recipe, index, member.stages[index].made)
    recipe = with_stage_teachers(own, own.stages[index], member.folder)
    return reads_of(recipe, index, start_of(member, index))


def reads_of(recipe: Recipe, index: int, start: ModelConfig) -> Reads:
    """The inputs of a stage.

    Args:
        recipe: the member's recipe, as the stage sees it (`with_stage_teachers`).
        index: number of the stage, from 0.
        start: the model that the stage starts from.
    """
    stage = recipe.stages[index]
    models = [start]
    caches = {}
    if any("teacher" in o.needs for o in stage.objectives):
        for teacher in recipe.teachers:
            if teacher.source == "live":
                models.append(teacher)
            elif teacher.source == "cache" and teacher.cache is not None:
                caches[teacher.cache.folder] = _cache_sums(Path(teacher.cache.folder))
    data = recipe.stage_data(stage)
    files, sources, commits = set[str](), {}, {}
    for part in [*data.parts, *data.validation_parts]:
        scores = getattr(part.select, "scores", None)
        read = _data_read(part.model_copy(update={"select": None}).model_dump_json())
        if not part.train.startswith(HUB):
            sources[part.train] = read.files
        named_files = [part.leave_out, scores]
        files |= {*read.files, *read.pictures, *(file for file in named_files if file is not None)}
        if read.commit is not None:
            commits[_named(part)] = read.commit
    named = {(name, model.revision) for model in models for name in names_of(model)}
    named |= {(name, None) for conversion in stage.convert for name in conversion.sources}
    for name, revision in named:
        if Path(name).is_dir():
            files |= {str(p) for p in _model_files(Path(name))}
        elif Path(name).is_file():
            files.add(str(Path(name)))
        elif commit := model_commit(name, revision):
            commits[name if revision is None else f"{name}@{revision}"] = commit
    return Reads(frozenset(files), sources, caches, commits)


def names_of(model: ModelConfig) -> set[str]:
    """Files, folders and Hub ids of a model, its processor and what its conversions read."""
    conversions = model.convert if isinstance(model, StudentConfig) else []
    names = {model.model, model.processor, *(n for c in conversions for n in c.sources)}
    return {name for name in names if name is not None}


def _model_files(folder: Path) -> Iterator[Path]:
    return (p for p in sorted(folder.iterdir()) if p.suffix in OF_MODELS and p.is_file())


def _cache_sums(folder: Path) -> dict[str, str]:
    try:
        manifest = read_json(folder / MANIFEST)
        sums = {shard["file"]: shard["sha256"] for shard in manifest.pop("shards")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # refused elsewhere
        return {}
    text = json.dumps(manifest, sort_keys=True)
    return sums | {"settings": hashlib.sha256(text.encode()).hexdigest()}


def forget_sources() -> None:
    """Clear the cache of data sources, so that they are read again."""
    _data_read.cache_clear()


@dataclass(frozen=True)
class _DataRead:
    """Inputs of a data source: its files, its noted image files, its commit."""

    files: list[str]
    pictures: list[str]
    commit: str | None = None


def _named(part: SourceConfig) -> str:
    """Name of a data set on the Hub, with subset, split and revision."""
    return " ".join([part.train, *filter(None, (part.subset, part.split, part.revision))])


def _visible(folder: Path) -> list[Path]:
    """The files below a folder, without hidden ones such as those of git and of caches."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


@cache
def _data_read(config: str) -> _DataRead:
    part = SourceConfig.model_validate_json(config)
    path = Path(part.train.removeprefix(HUB))
    from_hub = part.train.startswith(HUB)
    try:
        if from_hub:
            files = _visible(path)  # of a local folder
        elif is_saved(path):
            files = [p for p in sorted(path.iterdir()) if p.is_file()]
        else:
            files = find_files(part.train)
        records = Source(part)
    except DataError:  # refused elsewhere
        return _DataRead([], [])
    # Records on the Hub contain their images, and records of a stream are in distant windows.
    if part.stream is not None or (from_hub and not path.is_dir()):
        return _DataRead([str(file) for file in files], [], records.commit)
    files = [file for file in files if file.suffix.lower() not in SUFFIXES]
    return _DataRead([str(file) for file in files], _pictures(records), records.commit)


def _pictures(records: Source) -> list[str]:
    """The image files of some records, evenly spread over a source."""
    pictures = set()
    count = min(PICTURES, len(records))
    for number in range(count):
        try:
            record = records[number * len(records) // count]
        except DataError:  # a bad one
            continue
        for ref in record.images:
            if isinstance(ref, str) and (found := (record.root or Path()) / ref).is_file():
                pictures.add(str(found))
    return sorted(pictures)
