"""Which entries of `make` a recipe's stages read, and when a run makes them.

Entries that ask the student depend on when they are made. Those that the first stage reads are made
before the run, by the student as the recipe starts it. Those that a later stage reads are made
right before that stage, in its folder, by the student from which it starts. All others are made
before the run, once.
"""

from collections.abc import Sequence
from pathlib import Path

from mmkd.data.truncation import needs_answers
from mmkd.errors import DataError, RecipeError
from mmkd.making.state import is_made
from mmkd.recipe import (
    DataConfig,
    MakeConfig,
    Recipe,
    SourceConfig,
    StageConfig,
    asking_student,
    read_entry,
)
from mmkd.recipe.context import StageContext


def used_entries(recipe: Recipe, data: Sequence[DataConfig] | None = None) -> dict[str, MakeConfig]:
    """The entries of a recipe's `make` that its stages train on or measure, by name, and those
    whose records these entries read; or those that other `data` read. Each is after the entry that
    it reads."""
    data = [recipe.stage_data(stage) for stage in recipe.stages] if data is None else data
    files = {part.train for d in data for part in (*d.parts, *d.validation_parts)}
    used: set[str] = set()
    for name, config in reversed(recipe.make.items()):
        if name in used or files & {*config.files}:
            used |= {name, *filter(None, [read_entry(config, recipe.make)])}
    return {name: config for name, config in recipe.make.items() if name in used}


def made_for(recipe: Recipe, index: int) -> dict[str, MakeConfig]:
    """The entries that are made right before a stage.

    Args:
        recipe: of one student.
        index: of the stage, from 0.
    """
    if index == 0:
        return {}
    used = used_entries(recipe, [recipe.stage_data(recipe.stages[index])])
    asking = asking_student(recipe.make)
    return {name: config for name, config in used.items() if name in asking}


def made_before(recipe: Recipe) -> dict[str, MakeConfig]:
    """The entries that are made before the first stage of a student's recipe."""
    first = used_entries(recipe, [recipe.stage_data(recipe.stages[0])])
    asking = asking_student(recipe.make)
    return {n: c for n, c in used_entries(recipe).items() if n in first or n not in asking}


def with_stage_data(recipe: Recipe, index: int, folder: Path) -> Recipe:
    """The recipe as one of its stages sees it: what is made right before the stage is in `folder`,
    and the stage's data are there.

    Args:
        recipe: of one student.
        index: of the stage, from 0.
        folder: of what is made for this stage.
    """
    moved = {n: _moved(config, folder) for n, config in made_for(recipe, index).items()}
    if not moved:
        return recipe
    for name, config in moved.items():
        read = read_entry(recipe.make[name], recipe.make)
        if read in moved:
            new = _source_of(config.records, recipe.make[read], moved[read])
            moved[name] = config.model_copy(
                update={"records": new["train"], "images": config.images or new["images"]}
            )
    stage = recipe.stages[index]
    stages = [*recipe.stages]
    data = _moved_data(recipe.stage_data(stage), recipe.make, moved)
    stages[index] = stage.model_copy(update={"data": data})
    return recipe.model_copy(update={"make": {**recipe.make, **moved}, "stages": stages})


def _moved(config: MakeConfig, folder: Path) -> MakeConfig:
    """An entry that writes to a folder. Paths of images stay relative to where they were."""
    update: dict[str, object] = {"out": str(folder / Path(config.out).name)}
    if config.records is not None and config.images is None and config.out.endswith(".jsonl"):
        update["images"] = str(Path(config.out).parent)
    if config.why is not None:
        out = str(folder / Path(config.why.out).name)
        update["why"] = config.why.model_copy(update={"out": out})
    return config.model_copy(update=update)


def _moved_data(
    data: DataConfig, make: dict[str, MakeConfig], moved: dict[str, MakeConfig]
) -> DataConfig:
    """Settings of data that read the files of moved entries."""
    files = {file: name for name in moved for file in make[name].files}

    def new(part: SourceConfig, images: str | None) -> SourceConfig:
        name = files.get(part.train)
        if name is None:
            return part
        found = _source_of(part.train, make[name], moved[name])
        return part.model_copy(update={**found, "images": found["images"] or images})

    update: dict[str, object] = {}
    if data.train in files:
        [part] = data.parts  # as a list, so that held-out records keep their folder of images
        part = part.model_copy(update={"name": part.label})
        update = {"train": None, "select": None, "sources": [new(part, data.images)]}
    else:
        update = {"sources": [new(part, part.images) for part in data.sources]}
    if data.validation is not None:
        held_out = [new(part, part.images) for part in data.validation.sources]
        update["validation"] = data.validation.model_copy(update={"sources": held_out})
    return data.model_copy(update=update)


def _source_of(file: str | None, old: MakeConfig, new: MakeConfig) -> dict[str, str | None]:
    """Where a file of an entry is after the entry was moved, and the folder of its images."""
    train = new.files[old.files.index(str(file))]
    return {"train": train, "images": new.source["images"]}


def check_made(recipe: Recipe, data: Sequence[DataConfig] | None = None) -> None:
    """Check that records are made.

    Args:
        recipe: with the entries.
        data: that will be read; by default those that a run's stages read, without what the run
            makes itself.

    Raises:
        DataError: some are not.
    """
    for name in made_before(recipe) if data is None else used_entries(recipe, data):
        if not is_made(recipe, name):
            raise DataError(
                "its records are not made yet, or with other settings or models",
                where=f"make.{name}",
                hint="make them with `mmkd data answers RECIPE`; `mmkd run` does it too",
            )


def check_assistant(recipe: Recipe) -> None:
    """Check that what is made before the first stage does not ask an assistant that is not trained.

    Args:
        recipe: of a student whose teacher is such an assistant.

    Raises:
        RecipeError: it does.
    """
    names = [teacher.name for teacher in recipe.teachers]
    for entry, config in made_before(recipe).items():
        if asked := [name for name in config.models if name in names]:
            raise RecipeError(
                f"it asks {asked[0]!r}, which is the assistant, and it is made before the "
                "assistant is trained",
                where=f"make.{entry}",
                hint="name another model, or train the assistant in a run of its own and name its "
                "student as the teacher",
            )


def check_questions(context: StageContext) -> None:
    """Check that a stage that needs answers does not read an entry that writes questions.

    Raises:
        RecipeError: it does.
    """
    stage, data = context.stage, context.data
    answers = not stage.samples_all and any(map(needs_answers, stage.objectives))
    read = [*(data.parts if answers else []), *data.validation_parts]
    for name, config in context.recipe.make.items():
        if config.writes == "questions" and config.out in [part.train for part in read]:
            raise RecipeError(
                f"it reads made:{name}, which has questions without answers",
                where=context.where,
                hint=f"add an entry of 'make' with 'records: made:{name}', and read its answers",
            )


def check_later(recipe: Recipe) -> None:
    """Check that a run can make records between its stages.

    Args:
        recipe: of one student.

    Raises:
        RecipeError: two files have one name, or a stage reads something of these records that
            cannot be there before the run.
    """
    for index, stage in enumerate(recipe.stages):
        later = made_for(recipe, index)
        files = [file for config in later.values() for file in config.files]
        names = [Path(file).name for file in files]
        where = f"stage {stage.name}"
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(
                f"two entries of 'make' write files with the name {twice[0]}, and both are made in "
                "the stage's folder",
                where=where,
                hint="give one another name",
            )
        if files and (fixed := _fixed(recipe, stage, files)) is not None:
            raise RecipeError(
                f"{fixed} belongs to records that are there before the run, and those of "
                f"'{[*later][-1]}' are made right before the stage, by the student",
                where=where,
                hint="leave it out, or name another model in 'by'",
            )


def _fixed(recipe: Recipe, stage: StageConfig, files: Sequence[str]) -> str | None:
    """What belongs to records in some files and is made before a run; None if there is none."""
    for part in recipe.stage_data(stage).parts:
        scores = getattr(part.select, "scores", None)
        if part.train in files and (named := part.leave_out or scores) is not None:
            return str(named)
    cached = [t for t in recipe.teachers if t.source == "cache"]
    if cached and any("teacher" in o.needs for o in stage.objectives):
        return "the teacher's cache"
    return None
