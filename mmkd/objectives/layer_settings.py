"""Settings of objectives on decoder layers and on relations of tokens, as a recipe writes them."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mmkd.objectives.base_settings import (
    Layer,
    Need,
    ObjectiveConfig,
    OwnParametersConfig,
    Region,
)

TEACHER_LAYERS = "teacher layers, one for each student layer; the same numbers by default"


def _check_pairs(layers: list[int] | str | None, teacher_layers: list[int] | None) -> None:
    count = 1 if isinstance(layers, str) else len(layers or ())
    if teacher_layers is not None and len(teacher_layers) != count:
        raise ValueError("'teacher_layers' needs 'layers' -- add it, one for each")


class RelationConfig(ObjectiveConfig):
    """Cosine between the token-to-token similarities of student and teacher."""

    kind: Literal["relation"]
    region: Region = Field("vision", description="tokens that are compared with each other")
    features: Literal["logits", "hidden"] = Field(
        "logits",
        description="features of a token: its logits (LLaVA-KD), or its final hidden state",
    )
    center: bool = Field(True, description="subtract the tokens' mean; the paper does not")
    normalize: bool = Field(False, description="scale the features of each token to length 1")
    diagonal: bool = Field(True, description="include a token's similarity to itself")
    layers: list[Layer] | None = Field(
        None,
        min_length=1,
        description="student layers after which hidden states are compared, for `features: "
        "hidden`; by default those at the model's output",
    )
    teacher_layers: list[Layer] | None = Field(None, description=TEACHER_LAYERS)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"teacher", "distribution" if self.layers is None else "layers"})

    @property
    def reads_hidden(self) -> tuple[Region, ...]:
        return (self.region,) if self.layers is None else ()

    @model_validator(mode="after")
    def _pairs(self) -> "RelationConfig":
        _check_pairs(self.layers, self.teacher_layers)
        if self.layers is not None and self.features != "hidden":
            raise ValueError("'layers' have hidden states, no logits -- add 'features: hidden'")
        return self


class LayerwiseConfig(ObjectiveConfig):
    """Compare decoder layers of student and teacher."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "layers"})

    layers: list[Layer] | None = Field(
        None, description="student layers; by default its Mamba layers"
    )
    teacher_layers: list[Layer] | None = Field(None, description=TEACHER_LAYERS)
    teacher_forced: bool = Field(True, description="student layers run on the teacher's input")
    region: Region = Field("all", description="tokens that it covers")

    @model_validator(mode="after")
    def _pairs(self) -> "LayerwiseConfig":
        _check_pairs(self.layers, self.teacher_layers)
        return self


class MixerMseConfig(LayerwiseConfig):
    """Mean squared error of the heads before the output projection."""

    kind: Literal["mixer_mse"]


class LayerL2Config(LayerwiseConfig):
    """Euclidean distance of the outputs."""

    kind: Literal["layer_l2"]
    at: Literal["block", "mixer"] = Field(
        "block", description="compare whole layers, or only their mixers"
    )


class HiddenMseConfig(LayerwiseConfig, OwnParametersConfig):
    """Mean squared error of the hidden states after each layer."""

    kind: Literal["hidden_mse"]
    teacher_forced: bool = Field(False, description="student layers run on the teacher's input")
    normalize: Literal["token", "none"] = Field(
        "none",
        description="token: divide each token's error by the mean square of the teacher's token",
    )
    linear_map: bool = Field(
        False,
        description="compare a linear map of the student's hidden states, one for each pair of "
        "layers, which trains for this objective only; widths may differ",
    )

    @property
    def trains_own(self) -> bool:
        return self.linear_map

    @model_validator(mode="after")
    def _maps_its_own_input(self) -> "HiddenMseConfig":
        if self.linear_map and self.teacher_forced:
            raise ValueError(
                "'linear_map' and 'teacher_forced' exclude each other: a forced layer has the "
                "teacher's width -- leave one of them out"
            )
        return self


class MatrixConfig(LayerwiseConfig):
    """Distance between attention probabilities and the mixer's matrix; quadratic in tokens."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "layers", "matrices"})

    kind: Literal["matrix"]


Projection = Literal["queries", "keys", "values"]
MiniLmRelation = Literal["queries", "keys", "values", "query_key"]


class MiniLmConfig(LayerwiseConfig):
    """Self-relations of queries, keys and values, for any widths and heads; query-key relations,
    for equal numbers of heads."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "layers", "projections"})

    kind: Literal["minilm"]
    layers: Annotated[list[Layer], Field(min_length=1)] | Literal["last"] = Field(  # type: ignore[assignment]
        description="student layers; last: the last layer of each model that has attention"
    )
    heads: int = Field(
        8,
        ge=1,
        le=10**6,
        description="relation heads of queries, keys and values; divides all widths of both models",
    )
    relations: list[MiniLmRelation] = Field(
        ["queries", "keys", "values"],
        min_length=1,
        description="which are compared; query_key: queries with keys, for each attention head",
    )
    causal: bool = Field(
        False,
        description="relate a token to itself and to earlier tokens only, which query_key always "
        "does",
    )
    teacher_forced: Literal[False] = Field(False, description="not possible for this objective")


class MutualConfig(LayerwiseConfig, OwnParametersConfig):
    """Lower bound of the mutual information of both models' hidden states, for any widths."""

    kind: Literal["mutual"]
    layers: list[Layer] = Field(min_length=1, description="student layers")
    teacher_forced: Literal[False] = Field(False, description="not possible for this objective")
    alpha: float = Field(
        0.9,
        ge=0,
        le=1,
        description="1: the bound has little variance, and is at most the logarithm of the number "
        "of tokens; 0: the bound has no limit, and much variance",
    )
    width: int = Field(128, ge=1, le=10**5, description="of the critic's maps of both models")
    tokens: int = Field(
        256, ge=2, le=10**5, description="most tokens of a micro-batch that are compared"
    )

    @property
    def trains_own(self) -> bool:
        return True
