"""The teacher of a single stage: one of the recipe's, or the student after an earlier stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from mmkd.errors import HINT, nearest
from mmkd.recipe.base import BOTH, Strict
from mmkd.runtime.fields import NAME

if TYPE_CHECKING:
    from mmkd.recipe.stages import StageConfig


class StageTeacherConfig(Strict):
    """The teacher of a single stage. A text is the name of a teacher."""

    name: str | None = Field(None, max_length=NAME, description="of one of the recipe's teachers")
    stage: str | None = Field(
        None,
        max_length=NAME,
        description="name of an earlier stage; the student as that stage has left it",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, said: Any) -> Any:
        return {"name": said} if isinstance(said, str) else said

    @model_validator(mode="after")
    def _one_kind(self) -> "StageTeacherConfig":
        if (self.name is None) == (self.stage is None):
            raise ValueError(f"{BOTH}give either 'name' (of a teacher) or 'stage'")
        return self

    @property
    def words(self) -> str:
        """What it is, for people."""
        return self.name or f"the student after stage {self.stage}"


def check_stage_teachers(stages: Sequence["StageConfig"], teachers: Sequence[str]) -> None:
    """Check that the teachers of single stages exist and are needed.

    Args:
        stages: of a recipe.
        teachers: the names of its teachers.

    Raises:
        ValueError: one does not exist, is a later stage, or no objective compares with it.
    """
    for index, stage in enumerate(stages):
        if stage.teacher is None:
            continue
        where = f"stage {stage.name}: teacher: "
        name, earlier = stage.teacher.name, stage.teacher.stage
        if name is not None and name not in teachers:
            hint = nearest(name, teachers) if teachers else "name it in the recipe's 'teacher'"
            raise ValueError(f"{where}no teacher {name!r}{HINT}{hint}")
        before = [s.name for s in stages[:index]]
        if earlier is not None and earlier not in before:
            hint = nearest(earlier, before) if before else "it is the first stage; name a teacher"
            raise ValueError(f"{where}no earlier stage {earlier!r}{HINT}{hint}")
        if not any("teacher" in o.needs for o in stage.objectives):
            raise ValueError(
                f"{where}no objective of the stage compares with it{HINT}leave it out, or add an "
                "objective such as kl"
            )
