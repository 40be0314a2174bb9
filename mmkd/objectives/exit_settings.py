"""Settings of `exits`, as a recipe writes them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mmkd.objectives.base_settings import HeadObjectiveConfig, Need, OwnParametersConfig, Region
from mmkd.objectives.divergence_settings import (
    AlphaConfig,
    BalancedKlConfig,
    CrossEntropyConfig,
    DivergenceConfig,
    EnhancedConfig,
    JsdConfig,
    SkewConfig,
)
from mmkd.runtime.fields import MOST


def _with_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


OutputLoss = Annotated[
    Annotated[
        CrossEntropyConfig
        | DivergenceConfig
        | JsdConfig
        | SkewConfig
        | AlphaConfig
        | BalancedKlConfig
        | EnhancedConfig,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_with_kind),
]
"""Settings of `ce` or of a divergence; a kind alone has its default settings."""


class ExitsConfig(OwnParametersConfig):
    """A loss on the output head after some of the student's decoder layers."""

    kind: Literal["exits"]
    layers: list[Annotated[int, Field(ge=0, le=MOST)]] = Field(
        min_length=1, description="student layers after which the output head is read"
    )
    loss: OutputLoss = Field(
        DivergenceConfig(kind="kl"),
        description="`ce` or a divergence with its settings, or its kind alone",
    )
    teacher: Literal["teacher", "self"] = Field(
        "teacher",
        description="what a divergence compares with; self: the student's own output after its "
        "last layer, without gradients",
    )
    weighting: Literal["depth", "equal"] = Field(
        "depth",
        description="weights of the exits; depth: the share of the student's layers that have run; "
        "equal: 1",
    )
    norm: Literal["final", "own"] = Field(
        "final",
        description="the norm before the output head: the student's final norm, or for each exit a "
        "copy of it that trains for this objective only",
    )
    block: bool = Field(
        False,
        description="each exit has a further decoder layer, a copy of the next one that trains for "
        "this objective only",
    )

    @property
    def needs(self) -> frozenset[Need]:
        own: frozenset[Need] = frozenset({"distribution"})
        return own | {"teacher"} if self._asks_the_teacher else own

    @property
    def _asks_the_teacher(self) -> bool:
        return self.teacher == "teacher" and "teacher" in self.loss.needs

    @property
    def output_loss(self) -> HeadObjectiveConfig | None:
        return self.loss if self._asks_the_teacher else None

    @property
    def reads_final_hidden(self) -> bool:
        return False

    @property
    def learns_answers(self) -> bool:
        return self.loss.learns_answers

    @property
    def region(self) -> Region:
        """Tokens that the loss covers."""
        return self.loss.region

    @property
    def trains_own(self) -> bool:
        return self.norm == "own" or self.block

    @model_validator(mode="after")
    def _fits(self) -> "ExitsConfig":
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("'layers' names a layer twice -- name each layer once")
        if self.teacher == "self" and isinstance(self.loss, CrossEntropyConfig):
            raise ValueError("'teacher: self' is for a divergence, not for ce -- leave it out")
        for key in ("weight", "name", "sources", "acceptance"):
            field = type(self.loss).model_fields.get(key)
            if field is not None and getattr(self.loss, key) != field.default:
                raise ValueError(f"'loss' has no {key!r} -- set it beside 'loss', or leave it out")
        return self
