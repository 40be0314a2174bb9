"""The student as it stands before a stage: converted, and trained by the stages before."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mmkd.modeling.loading import identity, load_config, load_model, load_processor, skeleton
from mmkd.modeling.skeletons import copied
from mmkd.recipe import Recipe, StudentConfig
from mmkd.runtime import consent
from mmkd.runtime.run_folder import MemberFolder
from mmkd.runtime.seeds import set_seed
from mmkd.students.convert import convert, is_built_in


def student_at(
    recipe: Recipe, index: int, *, meta: bool = False, folder: MemberFolder | None = None
) -> PreTrainedModel:
    """The student as it stands before stage `index`, with the conversions of that stage.

    Without a folder nothing is trained: it is the recipe's model with the conversions of all stages
    up to this one. New weights are drawn from the seeds that a run draws them from, so that before
    the first stage both are equal.

    Args:
        recipe: of one student.
        index: of the stage, from 0.
        meta: make it on the meta device, without weights.
        folder: the student's folder in a run, in which `start_folder` is written; the student is
            read from it.

    Raises:
        CheckpointError: the model cannot be loaded.
        RecipeError: a conversion does not fit the model.
    """
    if folder is not None:
        make = skeleton if meta else load_model
        return make(written_config(recipe.student, start_folder(recipe, index, folder)))
    if meta:
        return _skeleton_at(recipe, index)
    set_seed(recipe.seed)
    student = load_model(recipe.student)
    convert(student, recipe.student.convert, _processor_for(recipe.student))
    for number, stage in enumerate(recipe.stages[: index + 1]):
        if stage.convert:
            set_seed(recipe.seed + number)
        convert(student, stage.convert)
    return student


def _skeleton_at(recipe: Recipe, index: int) -> PreTrainedModel:
    """`student_at` on the meta device. The model is cached, since the students of a study often
    differ in other settings only."""
    stages = recipe.stages[: index + 1]
    conversions = [*recipe.student.convert, *(c for s in stages for c in s.convert)]

    def make() -> PreTrainedModel:
        student = skeleton(recipe.student)
        convert(student, conversions, _processor_for(recipe.student))
        return student

    # A conversion of a plugin may depend on more than its settings.
    if not all(map(is_built_in, conversions)):
        return make()
    described = tuple(c.model_dump_json() for c in conversions)
    return copied((*identity(recipe.student, load_config(recipe.student)), *described), make)


def finished(recipe: Recipe) -> PreTrainedModel:
    """The student after its last stage, on the meta device."""
    return student_at(recipe, len(recipe.stages) - 1, meta=True)


def _processor_for(config: StudentConfig) -> Any:
    """The processor before the conversions; None if none of them changes it."""
    changed = any(conversion.changes_processor for conversion in config.convert)
    return load_processor(config) if changed else None


def start_folder(recipe: Recipe, index: int, folder: MemberFolder) -> Path | None:
    """Where a run keeps the student that a stage starts from; it may not be written yet.

    Args:
        recipe: of one student.
        index: of the stage, from 0.
        folder: the student's.

    Returns:
        None if the stage starts from the recipe's model as it is.
    """
    stage = recipe.stages[index]
    if stage.convert:
        return folder.stage(index, stage.name).start.student
    return source_folder(recipe, index, folder)


def source_folder(recipe: Recipe, index: int, folder: MemberFolder) -> Path | None:
    """As `start_folder`, before the conversions of the stage."""
    if index > 0:
        return folder.stage(index - 1, recipe.stages[index - 1].name).student
    is_made = recipe.student.config is not None or recipe.student.convert
    return folder.start.student if is_made else None


def written_config(config: StudentConfig, student: Path | None) -> StudentConfig:
    """The same settings for a student that a run has written. It has its `image_size`, and the code
    of its model; the consent to that code goes on to its folder.

    Args:
        config: the recipe's student.
        student: the folder of the written one; if it is None, the settings stay as they are.
    """
    if student is None:
        return config
    consent.inherit(student, config.model)
    source = {"model": str(student), "config": None, "processor": None, "revision": None}
    return config.model_copy(update={**source, "convert": [], "image_size": None})
