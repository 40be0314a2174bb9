"""Settings that choose some of a source's records for training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmkd.recipe.base import BOTH, LocalPath, Strict
from mmkd.runtime.fields import MOST, MOST_SEED, NAME, NAMED

Model = Annotated[str, Field(max_length=NAME, pattern=NAMED)]
SCORES = "file that `mmkd data score` wrote"
FIELD = "key of the record, with dots for keys inside of mappings, or a column of 'scores'"


class DifferenceSelection(Strict):
    """Keep the records that a large model predicts well and a small one does not (MiniPLM)."""

    kind: Literal["difference"]
    scores: LocalPath = Field(description=SCORES)
    large: Model = Field(description="name of the large model in the scores")
    small: Model = Field(description="name of the small model in the scores")
    keep: float = Field(
        0.5, gt=0, le=1, description="share of the records, those with the largest differences"
    )

    @model_validator(mode="after")
    def _two_models(self) -> "DifferenceSelection":
        if self.large == self.small:
            raise ValueError(
                f"both models are {self.large!r} -- name two models, whose losses differ"
            )
        return self


class RobustSelection(Strict):
    """Keep records on which a model is uncertain, robust to wrong answers of the teacher (Robust
    Active Distillation)."""

    kind: Literal["robust"]
    scores: LocalPath = Field(description=SCORES)
    model: Model = Field(description="name of the uncertain model in the scores")
    keep: float | None = Field(None, gt=0, le=1, description="share of the records; or give budget")
    budget: int | None = Field(None, ge=1, le=MOST, description="number of records; or give keep")
    wrong: float = Field(
        0.1, ge=0, lt=1, description="share of the records to which the teacher's answer is wrong"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the random choice")

    @model_validator(mode="after")
    def _one_size(self) -> "RobustSelection":
        if (self.keep is None) == (self.budget is None):
            raise ValueError(f"{BOTH}give either 'keep' (a share) or 'budget' (a number)")
        return self


class BalanceSelection(Strict):
    """Give all values of a field a similar number of records: large groups are cut, and the records
    of small ones are repeated."""

    kind: Literal["balance"]
    field: str = Field(min_length=1, max_length=2 * NAME, description=FIELD)
    scores: LocalPath | None = Field(None, description=f"{SCORES}, if the field is one of its")
    bins: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="number of intervals of equal width that a number is sorted into; by default "
        "each value is a group",
    )
    to: float = Field(
        0.75, ge=0, le=1, description="quantile of the groups' sizes that all groups get"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of the random choice")


class DifficultySelection(Strict):
    """Keep the records in which a number is between two bounds, such as the share of a teacher's
    answers that are right."""

    kind: Literal["difficulty"]
    field: str = Field(min_length=1, max_length=2 * NAME, description=FIELD)
    scores: LocalPath | None = Field(None, description=f"{SCORES}, if the field is one of its")
    least: float = Field(0.0, ge=-1e9, le=1e9, description="records above it are kept")
    most: float = Field(1.0, ge=-1e9, le=1e9, description="records below it are kept")

    @model_validator(mode="after")
    def _between(self) -> "DifficultySelection":
        if self.least >= self.most:
            raise ValueError("no number is above 'least' and below 'most' -- raise 'most'")
        return self


class ClusterSelection(Strict):
    """Keep the records of a cluster of similar images, so that several students share the data
    (Multi-Student Distillation)."""

    kind: Literal["cluster"]
    scores: LocalPath = Field(description=f"{SCORES}, with --clusters")
    part: Annotated[int, Field(ge=0, le=MOST)] | list[Annotated[int, Field(ge=0, le=MOST)]] = Field(
        description="number of a cluster, or a list of them"
    )

    @property
    def parts(self) -> list[int]:
        """Numbers of the clusters."""
        return [self.part] if isinstance(self.part, int) else self.part


SelectionConfig = (
    DifferenceSelection
    | RobustSelection
    | BalanceSelection
    | DifficultySelection
    | ClusterSelection
)
AnySelectionConfig = Annotated[SelectionConfig, Field(discriminator="kind")]
