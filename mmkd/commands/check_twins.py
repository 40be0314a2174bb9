"""The part of `mmkd data check` that looks for twins: what is compared, and what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.commands.cluster_sheet import check_sheet
from mmkd.commands.find_twins import (
    Side,
    Twins,
    compare,
    divide,
    task_sides,
)
from mmkd.commands.twins_report import THUMBNAIL, as_json, twins_sheet
from mmkd.data.check import Findings
from mmkd.data.left_out import LeftOut, Section, read_left_out, section, write_left_out
from mmkd.data.records import Source
from mmkd.data.sources import open_rows
from mmkd.data.twins import BITS, NAME, require_hash
from mmkd.errors import DataError, MmkdError
from mmkd.evaluation.documents import read_documents
from mmkd.recipe import DataConfig, Recipe, SourceConfig
from mmkd.runtime.files import writing
from mmkd.runtime.progress import say

NONE = "none"


@dataclass(frozen=True)
class TwinOptions:
    """How to look for twins.

    Attributes:
        bits: most bits in which twins differ.
        against: names of tasks; None for those of the recipe.
        include, local: as in a recipe's `evaluate`; None for those of the recipe.
        drop: file of records to leave out, which is written.
        sheet: PNG file of twins, which is written.
    """

    bits: int = BITS
    against: tuple[str, ...] | None = None
    include: Path | None = None
    local: Path | None = None
    drop: Path | None = None
    sheet: Path | None = None


def twin_options(
    bits: int | None,
    against: str | None,
    include: Path | None,
    local: Path | None,
    drop: Path | None,
    sheet: Path | None,
) -> TwinOptions:
    """The options of the command line.

    Raises:
        MmkdError: two options contradict each other, a file would be overwritten, or ImageHash is
            not installed.
    """
    require_hash()
    tasks = None
    if against is not None:
        tasks = tuple(name.strip() for name in against.split(",") if name.strip())
        if not tasks:
            raise MmkdError("--against names no task", hint="name some, or write --against none")
        if NONE in tasks:
            if len(tasks) > 1:
                raise MmkdError("--against names tasks and none", hint="leave none out")
            tasks = ()
    check_sheet(sheet)
    if drop is not None and drop.exists():
        try:
            read_left_out(drop)
        except DataError as error:
            raise MmkdError(
                "--drop would overwrite a file of another kind",
                where=str(drop),
                hint="name a new file",
            ) from error
    return TwinOptions(BITS if bits is None else bits, tasks, include, local, drop, sheet)


def records_key(part: SourceConfig) -> str:
    """A key of the records of a source: the same for sources that differ in shares only."""
    return part.model_dump_json(exclude={"name", "weight", "cap"})


def twin_sides(
    options: TwinOptions,
    recipe: Recipe | None,
    data: Sequence[DataConfig],
    sources: Sequence[SourceConfig],
    target: str,
) -> list[Side]:
    """The tasks that training records are compared with.

    Args:
        options: of the command.
        recipe: that is checked; None for a single source.
        data: the data sets of the recipe.
        sources: all sources.
        target: for messages.

    Raises:
        MmkdError: the options do not fit the recipe, or a task cannot be read.
    """
    wanted = recipe.evaluate if recipe else None
    tasks, include, local = options.against, options.include, options.local
    if tasks is None:
        tasks = tuple(wanted.tasks) if wanted else ()
    if wanted is not None:
        include = include or (Path(wanted.include) if wanted.include else None)
        local = local or (Path(wanted.local) if wanted.local else None)
    if not tasks:
        for name in ("include", "local"):
            if getattr(options, name) is not None:
                hint = "name them with --against"
                raise MmkdError(
                    f"--{name} is for tasks, and none is named", where=target, hint=hint
                )
    if options.drop is not None:
        _check_drop(bool(tasks) or any(d.validation for d in data), sources, target)
    if not tasks:
        return []
    thumbnail = 0 if options.sheet is None else THUMBNAIL
    return task_sides(read_documents(tasks, include, local, thumbnail=thumbnail))


def _check_drop(compared: bool, sources: Sequence[SourceConfig], target: str) -> None:
    """Refuse to write a file that could not be used.

    Raises:
        MmkdError: there is nothing to compare with, a source is a stream, or the recipe leaves
            records out already.
    """
    if not compared:
        raise MmkdError(
            "--drop lists twins of held-out records and tasks, and there are none",
            where=target,
            hint="name tasks with --against, or give a recipe with data.validation",
        )
    for source in sources:
        if source.stream is not None:
            raise MmkdError(
                f"--drop cannot list records of the stream {source.label}",
                where=target,
                hint="leave 'stream' out of the source",
            )
        if source.leave_out is not None:
            raise MmkdError(
                f"--drop lists all records to leave out, and {source.label} leaves out those of "
                f"{source.leave_out}",
                where=target,
                hint="check the recipe without 'leave_out'",
            )


def find_twins(
    options: TwinOptions,
    data: Sequence[DataConfig],
    found: Sequence[Findings],
    sides: Sequence[Side],
) -> dict[str, Any]:
    """Compare training images with each other and with all sides, and write what is asked for.

    Args:
        options: of the command.
        data: the data sets of the recipe; none for a single source.
        found: results of checking the sources, with fingerprints.
        sides: the tasks.

    Returns:
        The results as JSON.
    """
    masks = [_roles(one.source, data) for one in found]
    training, held_out = divide(found, [m[0] for m in masks], [m[1] for m in masks])
    compared = [held_out, *sides] if held_out.count else list(sides)
    twins = compare(training, compared, options.bits)
    result = as_json(twins)
    if options.drop is not None:
        result["drop"] = _write_drop(options.drop, twins, found)
    if options.sheet is not None:
        result["sheet"] = _write_sheet(options.sheet, twins)
    return result


def _roles(source: SourceConfig, data: Sequence[DataConfig]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each record of a source is trained on, and whether it is held out, [records] bool."""
    count = len(Source(source, whole=True))
    trained, held_out = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    if not data:
        return ~trained, held_out
    key = records_key(source)
    for config in data:
        share = None if config.validation is None else config.validation.share
        for part in config.parts:
            if records_key(part) == key:
                trained[Source(part, share=share, apart=config.records_apart).rows] = True
        for part in config.validation_parts:
            if records_key(part) == key:
                held_out[Source(part, share=share, held_out=True).rows] = True
    return trained, held_out


def _write_drop(path: Path, twins: Twins, found: Sequence[Findings]) -> dict[str, Any]:
    listed: list[list[LeftOut]] = [[] for _ in found]
    sources = twins.training.sources
    for (number, index), why in twins.left_out().items():
        name = sources[number].id(index)
        listed[number].append(LeftOut(record=index, id=name, why=why))
    sections: list[Section] = []
    left: dict[str, int] = {}
    for source, mask, records in zip(sources, twins.training.trained, listed, strict=True):
        if mask.any():
            sections.append(section(source.config, open_rows(source.config), records))
            label = source.config.label
            left[label] = left.get(label, 0) + len(records)
    names = [side.name for side in twins.sides]
    write_left_out(path, sections, {"hash": NAME, "bits": twins.bits, "against": names})
    return {"file": str(path), "records": left}


def _write_sheet(path: Path, twins: Twins) -> str | None:
    sheet = twins_sheet(twins)
    if sheet is None:
        say(f"no twins, {path} is not written")
        return None
    with writing(path) as partial:
        sheet.save(partial, "PNG")
    return str(path)
