"""The teachers of a single stage (`stages[].teacher`)."""

from mmkd.recipe import Recipe, StageConfig, TeacherConfig
from mmkd.runtime import consent
from mmkd.runtime.run_folder import MemberFolder


def with_stage_teachers(
    recipe: Recipe, stage: StageConfig, folder: MemberFolder | None = None
) -> Recipe:
    """The recipe as one of its stages sees it, with the teachers of this stage only.

    Args:
        recipe: of one student.
        stage: of this recipe.
        folder: of the student, in which earlier stages write theirs. Without it, the model of a
            student after an earlier stage has only a name, and `earlier_stage` finds its recipe.
    """
    if stage.teacher is None:
        return recipe
    index = earlier_stage(recipe, stage)
    if index is None:
        [teacher] = [t for t in recipe.teachers if t.name == stage.teacher.name]
    else:
        teacher = _after_stage(recipe, index, folder)
    return recipe.model_copy(update={"teacher": teacher, "more_teachers": []})


def earlier_stage(recipe: Recipe, stage: StageConfig) -> int | None:
    """The index of the earlier stage whose student is a stage's teacher; None if it is not one."""
    if stage.teacher is None or stage.teacher.stage is None:
        return None
    return [s.name for s in recipe.stages].index(stage.teacher.stage)


def _after_stage(recipe: Recipe, index: int, folder: MemberFolder | None) -> TeacherConfig:
    """The student after a stage, as a teacher."""
    student, name = recipe.student, recipe.stages[index].name
    written = None if folder is None else folder.stage(index, name).student
    if written is not None:
        consent.inherit(written, student.model)
    return TeacherConfig(
        model=name if written is None else str(written),
        name=name,
        dtype=student.dtype,
        attn_implementation=student.attn_implementation,
        trust_remote_code=student.trust_remote_code,
    )
