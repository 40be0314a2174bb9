"""Everything that can be known to be wrong before a run writes its first file."""

from typing import Any

from mmkd.data.batches import Encoder
from mmkd.data.records import Records
from mmkd.errors import RecipeError
from mmkd.loading import load_processor, shared_vocabulary, skeleton
from mmkd.objectives import Objective, build_objective
from mmkd.recipe import Recipe, StageConfig
from mmkd.signals import check_supported
from mmkd.students import convert, set_trainable


def check(recipe: Recipe) -> None:
    """Go through a recipe's models, data and objectives without loading weights.

    Raises:
        MmkdError: what a stage would stumble over, from an unknown group of parameters to a first
            record that cannot be encoded.
    """
    processor = load_processor(recipe.student)
    student = skeleton(recipe.student)
    check_supported(student, "student")
    convert(student, recipe.student.convert)
    if recipe.teacher is not None:
        check_supported(skeleton(recipe.teacher), "teacher")
    for stage in recipe.stages:
        objectives = [build_objective(o) for o in stage.objectives]
        _check_teacher(recipe, stage, objectives, processor)
        set_trainable(student, stage.train)
        _check_data(recipe, stage, objectives, processor)


def _check_teacher(
    recipe: Recipe, stage: StageConfig, objectives: list[Objective], processor: Any
) -> None:
    names = [o.name for o in objectives if "teacher" in o.needs]
    if not names:
        return
    if recipe.teacher is None:
        raise RecipeError(
            f"objective {', '.join(names)} needs a teacher",
            where=f"stage {stage.name}",
            mend="add 'teacher' to the recipe",
        )
    shared_vocabulary(processor.tokenizer, load_processor(recipe.teacher).tokenizer)


def _check_data(
    recipe: Recipe, stage: StageConfig, objectives: list[Objective], processor: Any
) -> None:
    data = recipe.stage_data(stage)
    labels = any("vision_labels" in o.needs for o in objectives)
    batch = Encoder(Records(data), processor, data, vision_labels=labels).encode([0])
    for objective in objectives:
        objective.rows(batch.targets)
