"""Checks of teachers that need no weights."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from mmkd.data.alignment import same_processor
from mmkd.data.vocabulary import check_head
from mmkd.errors import RecipeError
from mmkd.modeling.capture import check_supported
from mmkd.modeling.kept_inputs import check_kept_inputs
from mmkd.modeling.loading import check_quantization, load_processor, skeleton
from mmkd.modeling.own_tokens import check_source_tokens
from mmkd.objectives import HeadObjective, Objective
from mmkd.objectives.divergence_settings import DivergenceConfig
from mmkd.recipe import Recipe, StageConfig, TeacherConfig
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed
from mmkd.teachers.assign import ask_each


def check_teacher(teacher: TeacherConfig, where: str) -> tuple[PreTrainedModel, Any]:
    """Load a teacher on the meta device, with its processor, and check that it is supported.

    Args:
        teacher: settings with a model.
        where: the teacher's name in messages.

    Raises:
        CheckpointError: the family is not supported, or the head is smaller than the vocabulary.
    """
    model, processor = skeleton(teacher), load_processor(teacher)
    check_supported(model, where)
    check_head(model, processor.tokenizer, where)
    check_source_tokens(teacher, processor, where)
    return model, processor


def check_quantized(recipe: Recipe) -> None:
    """Check that this machine can load the quantized teachers.

    Raises:
        MmkdError: it has no GPU, or a package is missing.
    """
    for teacher in recipe.teachers:
        if teacher.quantize is not None and teacher.source == "live":
            device = distributed.choose_device(recipe.stages[0].engine.device)
            check_quantization(teacher.quantize, f"teacher {teacher.name}: quantize", device)


def check_further(recipe: Recipe, stages: Sequence[StageConfig], processor: Any) -> None:
    """Check that all teachers except the first have the student's processor, and that the data
    sources that they name exist.

    Args:
        recipe: as these stages see it.
        stages: that have the same teachers.
        processor: of the student.

    Raises:
        CheckpointError: as `check_teacher`.
        RecipeError: a processor differs from the student's, a source is unknown, or image tokens
            are left out and the family does not allow it.
    """
    for teacher in recipe.more_teachers:
        where = f"teacher {teacher.name}"
        model, own_processor = check_teacher(teacher, where)
        if any(stage.image_tokens for stage in stages):
            check_kept_inputs(model, where)
        if not same_processor(processor, own_processor):
            raise RecipeError(
                "of several teachers, all but the first need the student's processor",
                where=where,
                hint="put it first, or leave it out",
            )
    for stage in stages:
        ask_each([], recipe.teachers, recipe.stage_data(stage))


def check_ensemble(context: StageContext) -> None:
    """Check that a stage can weigh its teachers by record and token.

    Raises:
        RecipeError: there is one teacher, or an objective cannot.
    """
    settings, where = context.stage.ensemble, f"{context.where}: ensemble"
    if settings is None:
        return
    if len(context.recipe.teachers) < 2:
        raise RecipeError(
            "it weighs several teachers, and there is one",
            where=where,
            hint="leave it out, or make 'teacher' a list",
        )
    compared = [o for o in context.objectives if o.config.compares_outputs]
    if not compared:
        raise RecipeError(
            "no objective of the stage compares with several teachers",
            where=where,
            hint="leave it out, or add a divergence such as kl",
        )
    for objective in compared:
        if objective.config.sources:
            raise RecipeError(
                "'ensemble' weighs the teachers over the records of all their sources",
                where=f"{context.at(objective)}: sources",
                hint="leave it out, or put the objective in a stage of its own",
            )
        if not isinstance(objective, HeadObjective):
            raise RecipeError(
                "'ensemble' weighs teachers by token, which this objective does not support",
                where=context.at(objective),
                hint="put it in a stage of its own, or leave 'ensemble' out",
            )
        copies = ask_each([objective], context.recipe.teachers, context.data, settings)
        shared = any(o.ensemble and o.ensemble.normalize for o in copies)
        if shared and len({o.sources for o in copies}) > 1 and _accepts(objective):
            raise RecipeError(
                "'acceptance' is a mean over each teacher's records, and 'normalize' takes one "
                "over all",
                where=context.at(objective),
                hint="leave one of them out, or give the teachers the same sources",
            )


def check_sources(context: StageContext) -> None:
    """Check the data sources of a stage's objectives.

    Raises:
        RecipeError: an objective names an unknown one, or has none in common with its teacher.
    """
    try:
        ask_each(context.objectives, context.recipe.teachers, context.data)
    except RecipeError as error:
        where = f"{context.where}: {error.where}"
        raise RecipeError(error.what, where=where, hint=error.hint) from error


def _accepts(objective: Objective) -> bool:
    return isinstance(objective.config, DivergenceConfig) and objective.config.acceptance
