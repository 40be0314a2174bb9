"""What the checks of a stage look at before anything runs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmkd.cache import Store
from mmkd.objectives import Objective
from mmkd.recipe.models import Recipe
from mmkd.recipe.sources import DataConfig
from mmkd.recipe.stages import StageConfig

if TYPE_CHECKING:  # takes long, and processes that read data do not need it
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class StageContext:
    """A stage with its models and processors, before any weights are loaded.

    Attributes:
        recipe: of one student.
        stage: one of its stages.
        objectives: of the stage, in the recipe's order.
        student: on the meta device, as it stands before the stage.
        processor: the student's.
        teacher: the first teacher on the meta device; None if there is none, or only a cache.
        teacher_processor: its processor, or None.
        store: the teacher's cache, if the teacher is one.
    """

    recipe: Recipe
    stage: StageConfig
    objectives: list[Objective]
    student: "PreTrainedModel"
    processor: Any
    teacher: "PreTrainedModel | None" = None
    teacher_processor: Any = None
    store: Store | None = None

    @property
    def data(self) -> DataConfig:
        return self.recipe.stage_data(self.stage)

    @property
    def where(self) -> str:
        """The stage in messages."""
        return f"stage {self.stage.name}"

    @property
    def read_store(self) -> Store | None:
        """The teacher's cache, if an objective reads it."""
        return self.store if self.needing("teacher") else None

    def at(self, objective: Objective) -> str:
        """An objective of the stage in messages."""
        return f"{self.where}: objective {objective.name}"

    def needing(self, signal: str) -> list[Objective]:
        """The objectives that need a signal."""
        return [o for o in self.objectives if signal in o.needs]
