"""Base classes of the settings of objectives.

Like all modules of settings it does not import torch, which takes seconds, so that recipes are
checked quickly.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from mmkd.errors import HINT, nearest
from mmkd.runtime.fields import MOST, NAME, NAMED, Bounded

Layer = Annotated[int, Field(ge=-MOST, le=MOST)]
Region = Literal["response", "prompt", "vision", "all"]
# distribution: the head's output; layers: tensors of decoder layers; matrices, projections: further
# tensors of layers; experts: router logits; pairs: chosen and rejected answers; chunks: pieces of
# answers that begin and end at token boundaries of student and teacher
Need = Literal[
    "teacher",
    "vision_labels",
    "distribution",
    "layers",
    "matrices",
    "projections",
    "experts",
    "pairs",
    "chunks",
]


class ObjectiveConfig(Bounded):
    """Base class of settings of objectives, with the inputs that the objective requires.

    A subclass defines `needs` and `reads_hidden`: as a `ClassVar` if they are constant, as a
    property if they depend on other settings.
    """

    weight: float = Field(
        1.0, ge=0, le=1e6, description="factor of this objective in the stage's loss"
    )
    name: str | None = Field(
        None,
        max_length=NAME,
        pattern=NAMED,
        description="name in metrics; the kind by default",
    )
    sources: list[str] = Field(
        [],
        description="names of the data sources whose records it covers, with a mean of its own; "
        "all by default",
    )

    @property
    def needs(self) -> frozenset[Need]:
        """The inputs that the objective requires."""
        return frozenset()

    @property
    def reads_hidden(self) -> tuple[Region, ...]:
        """Regions in which the objective reads the teacher's final hidden states, if it reads
        nothing else of the teacher."""
        return ()

    @property
    def output_loss(self) -> "HeadObjectiveConfig | None":
        """Settings of the loss with which the objective compares the output of a teacher's head;
        None if it compares something else."""
        return None

    @property
    def reads_final_hidden(self) -> bool:
        """Whether it reads the student through its final hidden states only."""
        return "distribution" in self.needs or bool(self.reads_hidden)

    @property
    def learns_answers(self) -> bool:
        """Whether the data set's answers are its targets, so that it cannot learn from answers that
        the student has sampled."""
        return False

    @property
    def selects_records(self) -> bool:
        """Whether the objective can cover the records of some data sources only (`sources`)."""
        return True

    @property
    def trains_own(self) -> bool:
        """Whether the objective has parameters of its own, which train with the student."""
        return False

    @property
    def metric_name(self) -> str:
        """The objective's name in metrics and messages."""
        return self.name or str(getattr(self, "kind"))  # noqa: B009

    @property
    def compares_outputs(self) -> bool:
        """Whether the objective compares only the input or output of a teacher's head. Such
        objectives use all teachers if there are several."""
        on_outputs = self.output_loss is not None or bool(self.reads_hidden)
        return on_outputs and "teacher" in self.needs

    @model_validator(mode="after")
    def _covers_its_sources(self) -> "ObjectiveConfig":
        if self.sources and not self.selects_records:
            raise ValueError("it covers all records of a stage -- leave 'sources' out")
        return self

    @model_validator(mode="after")
    def _needs_are_known(self) -> "ObjectiveConfig":
        for need in self.needs:
            if need not in get_args(Need):
                known = nearest(str(need), get_args(Need))
                raise ValueError(f"it needs {need!r}, which is unknown{HINT}{known}")
        return self


class GatheredObjectiveConfig(ObjectiveConfig):
    """Settings of a `GatheredObjective`, which compares records with each other."""

    gather: bool = Field(
        True,
        description="compare all records of a step, of all micro-batches and processes, and not "
        "only those of a micro-batch; with several micro-batches in a step, the student makes one "
        "forward pass more",
    )


class HeadObjectiveConfig(ObjectiveConfig):
    """Settings of a `HeadObjective`, a loss on the head's output."""

    @property
    def output_loss(self) -> "HeadObjectiveConfig":
        return self


class OwnParametersConfig(ObjectiveConfig):
    """Settings of an objective that can have parameters of its own."""

    lr: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="learning rate of the objective's own parameters; the stage's by default",
    )

    @model_validator(mode="after")
    def _has_parameters_for_lr(self) -> "OwnParametersConfig":
        if self.lr is not None and not self.trains_own:
            raise ValueError("'lr' is for parameters of its own, and it has none -- leave it out")
        return self
