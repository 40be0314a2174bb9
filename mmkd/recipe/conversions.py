"""How a student's structure changes before its first stage, as a recipe writes it."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mmkd.recipe.base import BOTH, Strict
from mmkd.runtime.fields import MOST

Layer = Annotated[int, Field(ge=-MOST, le=MOST)]


class LayersConversion(Strict):
    """Keep a subset of the layers, in the given order; the width stays."""

    kind: Literal["layers"]
    decoder: list[Layer] | None = Field(None, description="decoder layers to keep; all by default")
    vision: list[Layer] | None = Field(None, description="vision layers to keep; all by default")


class MlpConversion(Strict):
    """Keep a part of the neurons of every MLP, those with the largest weights."""

    kind: Literal["mlp"]
    decoder: int | None = Field(
        None, ge=1, le=MOST, description="neurons per decoder layer to keep"
    )
    vision: int | None = Field(None, ge=1, le=MOST, description="neurons per vision layer to keep")


class Every(Strict):
    """Every n-th layer: 0, n, 2n, ..., or the last of each n."""

    every: int = Field(ge=1, le=MOST, description="n")
    first: bool = Field(True, description="the first of each n; false: the last")


class Head(Strict):
    """The first layers."""

    head: int = Field(ge=0, le=MOST, description="how many")


class Tail(Strict):
    """The last layers."""

    tail: int = Field(ge=0, le=MOST, description="how many")


Layers = list[Annotated[int, Field(ge=0, le=MOST)]]
Named = Literal["all", "even", "odd", "first_half", "second_half"]
# Tags for errors to name one form of a placement, not every form that it is not.
_FORMS = {"every": "Every", "head": "Head", "tail": "Tail"}
PLACEMENT_TAGS = ("Layers", "Named", *_FORMS.values())


def _form(value: Any) -> str:
    if isinstance(value, Every | Head | Tail):
        return type(value).__name__
    if isinstance(value, dict):
        return next((tag for key, tag in _FORMS.items() if key in value), "Every")
    return "Named" if isinstance(value, str) else "Layers"


Placement = Annotated[
    Annotated[Layers, Tag("Layers")]
    | Annotated[Named, Tag("Named")]
    | Annotated[Every, Tag("Every")]
    | Annotated[Head, Tag("Head")]
    | Annotated[Tail, Tag("Tail")],
    Discriminator(_form),
]
MambaInit = Literal["default", "inherit", "mimic", "exact"]


class MambaConversion(Strict):
    """Attention of some decoder layers becomes a Mamba-2 mixer, seeded from it.

    What is left out of the mixer's form is what the init wants (`mmkd.students.mamba.FORMS`).
    """

    kind: Literal["mamba"]
    keep_attention: Placement | None = Field(None, description="layers that keep their attention")
    layers: Placement | None = Field(None, description="layers that become Mamba")
    init: MambaInit = Field("mimic", description="initialisation of the mixer")
    d_conv: int | None = Field(None, ge=1, le=256, description="width of the convolution")
    d_state: int | None = Field(
        None, ge=1, le=10**5, description="state size; the head size by default"
    )
    activation: Literal["silu", "none"] | None = Field(
        None, description="activation after the convolution"
    )
    norm: Literal["head_rms", "none"] | None = Field(None, description="of what the state gives")
    gate: Literal["silu", "none"] | None = Field(None, description="of what the state gives")
    norm_before_gate: bool | None = Field(None, description="false: the gate comes first")
    rope: bool | None = Field(None, description="apply the attention's rotary positions to C and B")
    state: Literal["query", "kv"] | None = Field(
        None, description="one state per query head, or one per key-value head"
    )

    @model_validator(mode="after")
    def _one_placement(self) -> "MambaConversion":
        if (self.keep_attention is None) == (self.layers is None):
            raise ValueError(f"{BOTH}give either 'keep_attention' or 'layers'")
        return self


class RouterConfig(Strict):
    """The linear map that scores the experts; float32, without bias."""

    std: float = Field(0.02, gt=0, le=100, description="standard deviation of its initial weights")


class MoeConversion(Strict):
    """Feed-forward networks of some decoder layers become experts, which start as copies of it."""

    kind: Literal["moe"]
    experts: int = Field(4, ge=2, le=4096, description="experts per layer")
    top_k: int = Field(2, ge=1, le=4096, description="experts per token")
    layers: Placement = Field("even", description="layers that become sparse")
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _chooses(self) -> "MoeConversion":
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.experts} experts -- lower it"
            )
        return self


Conversion = Annotated[
    LayersConversion | MlpConversion | MambaConversion | MoeConversion,
    Field(discriminator="kind"),
]
