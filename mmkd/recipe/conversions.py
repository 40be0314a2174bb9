"""Conversions: changes of a student's structure before a stage. The base class, and the settings of
mmkd's own conversions, whose code is in `mmkd.students`.

This module does not import torch.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from mmkd.recipe.base import BOTH, LocalPath, Strict
from mmkd.runtime.fields import MOST, NAME, NAMED
from mmkd.runtime.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Layer = Annotated[int, Field(ge=-MOST, le=MOST)]


class ConversionConfig(Strict):
    """Base class of settings of conversions. A subclass defines `kind: Literal["..."]`.

    Attributes:
        changes_processor: the converted model has another processor. Such a conversion is for
            `student.convert` only, because all stages of a student share its processor.
    """

    changes_processor: ClassVar[bool] = False

    kind: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Files, folders and Hub ids of models and processors that the conversion reads."""
        return ()


class Conversion:
    """Base class of all conversions. A subclass sets `config_class` and implements `convert`.

    Attributes:
        config_class: class of its settings.
        processor: the model's processor before the conversion. It is set if the settings say
            `changes_processor`, and may be None otherwise.
    """

    config_class: ClassVar[type[ConversionConfig]]
    processor: Any = None

    def __init__(self, config: ConversionConfig):
        """
        Args:
            config: an instance of `config_class`.
        """
        self.config = config

    @property
    def where(self) -> str:
        """The place in messages."""
        return f"student.convert: {self.config.kind}"

    def new_processor(self) -> Any:
        """The processor of the converted model: `processor`, unless a subclass overrides it.

        Raises:
            RecipeError: the processor cannot be made.
        """
        return self.processor

    def check(self, model: "PreTrainedModel") -> None:
        """Check that the conversion fits a model, without changing it.

        It is called before `convert`, and before a run writes its first file. In the second case
        the model is on the meta device.

        Raises:
            ValueError: the conversion does not fit. `convert` may raise it too. The message is
                printed after `where`.
            RecipeError: the same, with its own place and hint.
        """

    def convert(self, model: "PreTrainedModel") -> list[str]:
        """Convert a model in place. Its saved folder must load with the new structure.

        It must work on the meta device too, because `mmkd plan` counts the parameters.

        Returns:
            Descriptions of the changes, one line each, for the run's log and report.
        """
        raise NotImplementedError


class DepthPruningConfig(ConversionConfig):
    """Keep some of the layers, in the given order. The width does not change."""

    kind: Literal["depth_pruning"]
    decoder: list[Layer] | None = Field(None, description="decoder layers to keep; all by default")
    vision: list[Layer] | None = Field(None, description="vision layers to keep; all by default")


class WidthPruningConfig(ConversionConfig):
    """Keep the neurons of each MLP that have the largest weights."""

    kind: Literal["width_pruning"]
    decoder: int | None = Field(
        None, ge=1, le=MOST, description="neurons per decoder layer to keep"
    )
    vision: int | None = Field(None, ge=1, le=MOST, description="neurons per vision layer to keep")


class EarlyExitConfig(ConversionConfig):
    """End the decoder at an exit, which the objective `exits` has trained."""

    kind: Literal["early_exit"]
    layer: int = Field(ge=0, le=MOST, description="the decoder layer before the exit")
    objectives: LocalPath | None = Field(
        None,
        description="`objectives.safetensors` of the stage that has trained the exit, if the exit "
        "has a norm or a block of its own",
    )
    name: str = Field(
        "exits",
        max_length=NAME,
        pattern=NAMED,
        description="name of the objective that has trained the exit",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        return () if self.objectives is None else (self.objectives,)


class EveryNth(Strict):
    """Every n-th layer: 0, n, 2n, ..., or n-1, 2n-1, ..."""

    every: int = Field(ge=1, le=MOST, description="n")
    first: bool = Field(True, description="the first of each n; false: the last")


class FirstLayers(Strict):
    """The first layers."""

    head: int = Field(ge=0, le=MOST, description="how many")


class LastLayers(Strict):
    """The last layers."""

    tail: int = Field(ge=0, le=MOST, description="how many")


Layers = list[Annotated[int, Field(ge=0, le=MOST)]]
NamedLayers = Literal["all", "even", "odd", "first_half", "second_half"]
# With a tag for each form of a selection, an error concerns the form that the user wrote, instead
# of all forms.
_FORMS = {"every": "EveryNth", "head": "FirstLayers", "tail": "LastLayers"}
LAYER_SELECTION_TAGS = ("Layers", "NamedLayers", *_FORMS.values())


def _form(value: Any) -> str:
    if isinstance(value, EveryNth | FirstLayers | LastLayers):
        return type(value).__name__
    if isinstance(value, dict):
        return next((tag for key, tag in _FORMS.items() if key in value), "EveryNth")
    return "NamedLayers" if isinstance(value, str) else "Layers"


LayerSelection = Annotated[
    Annotated[Layers, Tag("Layers")]
    | Annotated[NamedLayers, Tag("NamedLayers")]
    | Annotated[EveryNth, Tag("EveryNth")]
    | Annotated[FirstLayers, Tag("FirstLayers")]
    | Annotated[LastLayers, Tag("LastLayers")],
    Discriminator(_form),
]
MambaInit = Literal["default", "inherit", "mimic", "exact"]


class MambaConfig(ConversionConfig):
    """Replace the attention of some decoder layers with Mamba-2 mixers, initialised from it.

    Settings of the mixer that are not given depend on `init` (`mmkd.students.mamba.FORMS`).
    """

    kind: Literal["mamba"]
    keep_attention: LayerSelection | None = Field(
        None, description="layers that keep their attention"
    )
    layers: LayerSelection | None = Field(None, description="layers that become Mamba")
    init: MambaInit = Field("mimic", description="initialisation of the mixer")
    d_conv: int | None = Field(None, ge=1, le=256, description="width of the convolution")
    d_state: int | None = Field(
        None, ge=1, le=10**5, description="state size; the head size by default"
    )
    activation: Literal["silu", "none"] | None = Field(
        None, description="activation after the convolution"
    )
    norm: Literal["head_rms", "none"] | None = Field(None, description="norm of the output")
    gate: Literal["silu", "none"] | None = Field(None, description="gate of the output")
    norm_before_gate: bool | None = Field(None, description="false: the gate comes first")
    rope: bool | None = Field(None, description="apply the attention's rotary positions to C and B")
    state: Literal["query", "kv"] | None = Field(
        None, description="one state per query head, or one per key-value head"
    )

    @model_validator(mode="after")
    def _one_selection(self) -> "MambaConfig":
        if (self.keep_attention is None) == (self.layers is None):
            raise ValueError(f"{BOTH}give either 'keep_attention' or 'layers'")
        return self


class RouterConfig(Strict):
    """The linear map that scores the experts; float32, without bias."""

    std: float = Field(0.02, gt=0, le=100, description="standard deviation of its initial weights")


class MoeConfig(ConversionConfig):
    """Replace the feed-forward networks of some decoder layers with experts, initialised as
    copies."""

    kind: Literal["moe"]
    experts: int = Field(4, ge=2, le=4096, description="experts per layer")
    top_k: int = Field(2, ge=1, le=4096, description="experts per token")
    layers: LayerSelection = Field("even", description="layers that become sparse")
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _chooses(self) -> "MoeConfig":
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k {self.top_k} is more than the {self.experts} experts -- lower it"
            )
        return self


class TokenizerConfig(ConversionConfig):
    """Give the model the tokens of another processor, with new embeddings and a new head. Image
    processor and all other weights stay the same."""

    changes_processor: ClassVar[bool] = True

    kind: Literal["tokenizer"]
    processor: LocalPath = Field(
        description="folder or Hub id with the new tokenizer and its chat template"
    )
    special_tokens: Literal["new", "keep"] = Field(
        "new",
        description="new: special tokens and chat template of the new processor; keep: the model's "
        "own, which are added to the new tokenizer",
    )
    init: Literal["mean", "random"] = Field(
        "mean",
        description="embeddings of new texts; mean: of the model's own tokens for the text; "
        "random: normally distributed",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.processor,)


def _check(cls: Any) -> None:
    """Check a class before its registration.

    Raises:
        TypeError: `cls` is not a subclass of `Conversion`, or its settings are not a
            `ConversionConfig`.
    """
    if not (isinstance(cls, type) and issubclass(cls, Conversion)):
        raise TypeError("it is not a subclass of Conversion")
    settings = getattr(cls, "config_class", ConversionConfig)
    if not issubclass(settings, ConversionConfig):
        raise TypeError(f"its settings, {settings.__name__}, are not a ConversionConfig")


T = TypeVar("T", bound=type[Conversion])
CONVERSIONS: Registry[Conversion] = Registry(
    "conversion",
    [
        DepthPruningConfig,
        WidthPruningConfig,
        EarlyExitConfig,
        MambaConfig,
        MoeConfig,
        TokenizerConfig,
    ],
    _check,
)


def add_conversion(cls: T) -> T:
    """Class decorator that registers a conversion under its kinds.

    Raises:
        TypeError: `cls` is not a subclass of `Conversion`, or its settings are not a
            `ConversionConfig`.
        ValueError: another conversion has the kind.
    """
    return CONVERSIONS.add(cls)


if TYPE_CHECKING:
    AnyConversionConfig = ConversionConfig
else:
    AnyConversionConfig = CONVERSIONS.entry()
