"""Conversions of a recipe, applied to a model in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.loading import parameter_count
from mmkd.recipe import CONVERSIONS, Conversion, ConversionConfig
from mmkd.students.depth_pruning import DepthPruning
from mmkd.students.early_exit import EarlyExit
from mmkd.students.mamba import MambaConversion
from mmkd.students.moe import MoeConversion
from mmkd.students.width_pruning import WidthPruning

CLASSES: tuple[type[Conversion], ...] = (
    DepthPruning,
    WidthPruning,
    EarlyExit,
    MambaConversion,
    MoeConversion,
)
_BUILT_IN = {kind: cls for cls in CLASSES for kind in CONVERSIONS.kinds_of(cls)}


@dataclass
class ConversionReport:
    """What a conversion did: parameters before and after, and a line for each change."""

    before: int
    after: int = 0
    lines: list[str] = field(default_factory=list)


def is_built_in(config: ConversionConfig) -> bool:
    """Whether a conversion is part of mmkd, not of a plugin."""
    return config.kind in _BUILT_IN


def build_conversion(config: ConversionConfig) -> Conversion:
    """The conversion that a recipe's entry asks for."""
    cls = _BUILT_IN.get(config.kind) or CONVERSIONS.find(config.kind)
    assert cls is not None  # its settings were read
    return cls(config)


def convert(
    model: PreTrainedModel, conversions: ConversionConfig | Sequence[ConversionConfig]
) -> ConversionReport:
    """Apply conversions to a model in the given order, in place.

    After a Mamba or MoE conversion, the model's class and config contain the layout, and
    `save_pretrained` writes a folder that loads with the same structure.

    Args:
        model: any supported vision-language model.
        conversions: settings of one conversion, or of several.

    Raises:
        RecipeError: a conversion does not fit the model.
    """
    report = ConversionReport(before=parameter_count(model))
    for config in conversions if isinstance(conversions, Sequence) else [conversions]:
        conversion = build_conversion(config)
        try:
            conversion.check(model)
            report.lines += conversion.convert(model)
        except ValueError as error:
            raise RecipeError(str(error), where=conversion.where) from error
    report.after = parameter_count(model)
    return report
