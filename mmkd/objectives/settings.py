"""Settings of the objectives, as a recipe writes them.

This module does not import torch, which takes seconds, so that recipes are checked quickly. The
code of each objective is in the other modules of this package; `mmkd.objectives.build` combines the
two.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainSerializer, WithJsonSchema, WrapValidator, model_validator

from mmkd.objectives.base_settings import (
    GatheredObjectiveConfig,
    Need,
    ObjectiveConfig,
    OwnParametersConfig,
    Region,
)
from mmkd.objectives.divergence_settings import (
    AlphaConfig,
    BalancedKlConfig,
    CrossEntropyConfig,
    DivergenceConfig,
    EnhancedConfig,
    JsdConfig,
    SinkhornConfig,
    SkewConfig,
)
from mmkd.objectives.exit_settings import ExitsConfig
from mmkd.objectives.layer_settings import (
    HiddenMseConfig,
    LayerL2Config,
    MatrixConfig,
    MiniLmConfig,
    MixerMseConfig,
    MutualConfig,
    RelationConfig,
)
from mmkd.runtime.fields import LEAST_TEMPERATURE

BinaryKind = Literal["kl", "reverse_kl", "tvd"]


class ChunkObjectiveConfig(ObjectiveConfig):
    """Settings of objectives that compare pieces of responses."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "distribution", "chunks"})


def _or_infinite(value: Any, validate: Callable[[Any], float]) -> float:
    # Infinity: what `json.dumps` makes of it, in overrides with paths
    return math.inf if value in ("inf", "Infinity", math.inf) else validate(value)


TemperatureOrInf = Annotated[
    float,
    Field(ge=LEAST_TEMPERATURE, le=1e6),
    WrapValidator(_or_infinite),
    PlainSerializer(lambda value: "inf" if value == math.inf else value, when_used="json"),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": LEAST_TEMPERATURE, "maximum": 1e6},
                {"const": "inf", "type": "string"},
            ]
        }
    ),
]
"""A temperature, or `inf` (in YAML also `.inf`). JSON has no infinity, so there it is a text."""

GAMMA = 0.1


class AlmConfig(ChunkObjectiveConfig, OwnParametersConfig):
    """Likelihoods of pieces of responses, for any two tokenizers."""

    kind: Literal["alm"]
    divergence: BinaryKind = Field(
        "kl", description="between the probabilities that a piece is generated or not"
    )
    temperature: TemperatureOrInf = Field(
        math.inf,
        description="tau: likelihoods are raised to the power of 1/tau, and the loss is "
        "proportional to 1/tau; inf: the limit of tau times the loss",
        json_schema_extra={"default": "inf"},
    )
    debias: Literal["auto", "none", "outcome", "both"] = Field(
        "auto",
        description="outcome: with the probability that the piece ends where it ends (the paper); "
        "both: also given that it begins where it begins; none: neither; auto: both at temperature "
        "inf, and none at other temperatures",
    )
    gamma: float = Field(
        GAMMA,
        ge=0,
        lt=1,
        description="with `debias`, a piece that ends with less than this probability under the "
        "teacher is merged with the next one; 0: pieces are not merged",
    )
    hidden: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of the distance between hidden states at the ends of pieces, of which "
        "the student's go through a linear map that trains for this objective only",
    )

    @property
    def trains_own(self) -> bool:
        return self.hidden > 0

    @model_validator(mode="after")
    def _merges_what_ends(self) -> "AlmConfig":
        if self.debias == "auto":
            self.debias = "both" if self.temperature == math.inf else "none"
        if self.debias == "none" and self.gamma != GAMMA:
            raise ValueError("'gamma' is for 'debias: outcome' or 'both' only -- leave it out")
        return self


class UldConfig(ChunkObjectiveConfig):
    """Sorted next-token distributions where pieces of responses begin, for any two tokenizers."""

    kind: Literal["uld"]


class AffinityConfig(GatheredObjectiveConfig):
    """Image-text affinities within a batch."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "distribution"})
    reads_hidden: ClassVar[tuple[Region, ...]] = ("vision", "response")

    kind: Literal["affinity"]
    temperature: float = Field(0.1, ge=LEAST_TEMPERATURE, le=1e6, description="tau")
    teacher_temperature: float | None = Field(
        None, ge=LEAST_TEMPERATURE, le=1e6, description="tau of the teacher; the same by default"
    )
    center: bool = Field(True, description="subtract the batch's mean from images and answers")


class EmbeddingConfig(OwnParametersConfig):
    """Cosines of the mean image token, at the input of the decoder, with those of the teacher's
    image and of its words of the answer."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "layers"})

    kind: Literal["embedding"]
    image_weight: float = Field(
        0.5, ge=0, le=1, description="weight of the teacher's image; its words have the rest"
    )

    @property
    def learns_answers(self) -> bool:
        return self.image_weight < 1

    @property
    def trains_own(self) -> bool:
        return True


class TokenLabelsConfig(ObjectiveConfig):
    """Cross-entropy of image tokens with the name of the object that they show."""

    needs: ClassVar[frozenset[Need]] = frozenset({"vision_labels", "distribution"})

    kind: Literal["token_labels"] = "token_labels"
    at: Literal["connector", "decoder"] = Field(
        "connector", description="the module whose output predicts the label"
    )
    background: bool = Field(
        False, description="tokens without an object predict the end-of-turn token"
    )

    @property
    def reads_final_hidden(self) -> bool:
        return self.at == "decoder"


class RouterObjectiveConfig(ObjectiveConfig):
    """Settings of objectives on the routers of sparse layers."""

    needs: ClassVar[frozenset[Need]] = frozenset({"experts"})


class BalanceConfig(RouterObjectiveConfig):
    """Load-balancing loss of experts; the minimum is 1 per layer, for equal load."""

    kind: Literal["balance"]
    weight: float = Field(
        0.01, ge=0, le=1e6, description="factor of this objective in the stage's loss"
    )


class RouterZConfig(RouterObjectiveConfig):
    """Penalty of large router logits."""

    kind: Literal["router_z"]
    weight: float = Field(
        1e-3, ge=0, le=1e6, description="factor of this objective in the stage's loss"
    )


PreferenceKind = Literal["kto_pair", "sigmoid", "ipo", "hinge", "margin_mse"]


class PreferenceConfig(ObjectiveConfig):
    """Preference of chosen over rejected answers, relative to a reference."""

    kind: Literal["preference"]
    loss: PreferenceKind = Field("kto_pair", description="sigmoid is DPO")
    beta: float = Field(
        0.1,
        ge=1e-6,
        le=1e3,
        description="inverse temperature of the log-ratios; larger values keep the student "
        "closer to the reference",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of wrong labels that `sigmoid` expects"
    )
    reference: Literal["teacher", "self", "none"] = Field(
        "teacher", description="self: the student before the stage"
    )
    reference_logps: Literal["live", "once"] = Field(
        "live", description="once: computed before the first step and kept in the run"
    )
    average: bool = Field(False, description="log-probabilities per token, not of the whole answer")
    lambda_sft: float = Field(
        0.0, ge=0, le=1e6, description="weight of the chosen answers' cross-entropy, per token"
    )

    @property
    def needs(self) -> frozenset[Need]:
        own: frozenset[Need] = frozenset({"distribution", "pairs"})
        return own | {"teacher"} if self.reference == "teacher" else own

    @property
    def learns_answers(self) -> bool:
        return True

    @property
    def selects_records(self) -> bool:
        return False

    @model_validator(mode="after")
    def _smooths(self) -> "PreferenceConfig":
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError("'label_smoothing' is for 'loss: sigmoid' only -- leave it out")
        return self

    @model_validator(mode="after")
    def _has_margins(self) -> "PreferenceConfig":
        if self.loss == "margin_mse" and self.reference == "none":
            raise ValueError("'loss: margin_mse' needs the margins of a reference -- set one")
        # A resolved recipe has the default.
        if self.loss == "margin_mse" and self.beta != type(self).model_fields["beta"].default:
            raise ValueError("'loss: margin_mse' has no 'beta' -- leave it out")
        return self


SETTINGS: tuple[type[ObjectiveConfig], ...] = (
    CrossEntropyConfig,
    DivergenceConfig,
    JsdConfig,
    SkewConfig,
    AlphaConfig,
    BalancedKlConfig,
    EnhancedConfig,
    SinkhornConfig,
    ExitsConfig,
    AlmConfig,
    UldConfig,
    RelationConfig,
    MiniLmConfig,
    AffinityConfig,
    EmbeddingConfig,
    TokenLabelsConfig,
    BalanceConfig,
    RouterZConfig,
    PreferenceConfig,
    MixerMseConfig,
    LayerL2Config,
    HiddenMseConfig,
    MutualConfig,
    MatrixConfig,
)
"""Settings of mmkd's own objectives."""
