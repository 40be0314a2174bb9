"""Check that a stage can leave out image tokens, before a run starts."""

from mmkd.data.alignment import same_processor
from mmkd.errors import RecipeError
from mmkd.modeling.kept_inputs import check_kept_inputs
from mmkd.objectives import Preference
from mmkd.recipe.context import StageContext

LEAVE_OUT = "leave out image_tokens"


def check_image_tokens(context: StageContext) -> None:
    """Check that the models and the settings of a stage work with `image_tokens`.

    Raises:
        RecipeError: they do not.
    """
    if context.stage.image_tokens is None:
        return
    where = f"{context.where}: image_tokens"
    check_kept_inputs(context.student, f"{where}: student")
    if context.stage.batch.pack is not None:
        raise RecipeError(
            "image tokens cannot be left out of packed rows",
            where=where,
            hint=f"set batch.pack to null, or {LEAVE_OUT}",
        )
    for objective in context.objectives:
        if isinstance(objective, Preference) and objective.config.reference_logps == "once":
            raise RecipeError(
                "the reference of preferences is computed once, and each step has other tokens",
                where=context.at(objective),
                hint=f"set reference_logps to live, or {LEAVE_OUT}",
            )
    if context.read_store is not None:
        raise RecipeError(
            "a teacher's cache has outputs for all image tokens",
            where=where,
            hint=f"set teacher.source to live, or {LEAVE_OUT}",
        )
    if not context.needing("teacher"):
        return
    if context.teacher is not None:
        check_kept_inputs(context.teacher, f"{where}: teacher")
    theirs = context.teacher_processor
    if theirs is not None and not same_processor(context.processor, theirs):
        raise RecipeError(
            "teacher and student have different processors, so their image tokens differ",
            where=where,
            hint=f"use models with the same processor, or {LEAVE_OUT}",
        )
