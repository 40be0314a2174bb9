"""Conversions of a recipe, applied to a model in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_processor, parameter_count
from mmkd.recipe import CONVERSIONS, Conversion, ConversionConfig, StudentConfig
from mmkd.students.depth_pruning import DepthPruning
from mmkd.students.early_exit import EarlyExit
from mmkd.students.mamba import MambaConversion
from mmkd.students.moe import MoeConversion
from mmkd.students.tokenizer import TokenizerConversion
from mmkd.students.width_pruning import WidthPruning

CLASSES: tuple[type[Conversion], ...] = (
    DepthPruning,
    WidthPruning,
    EarlyExit,
    MambaConversion,
    MoeConversion,
    TokenizerConversion,
)
_BUILT_IN = {kind: cls for cls in CLASSES for kind in CONVERSIONS.kinds_of(cls)}


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        before, after: number of parameters.
        lines: a line for each change.
        processor: of the converted model; None if the caller gave none.
    """

    before: int
    after: int = 0
    lines: list[str] = field(default_factory=list)
    processor: Any = None


def is_built_in(config: ConversionConfig) -> bool:
    """Whether a conversion is part of mmkd, not of a plugin."""
    return config.kind in _BUILT_IN


def build_conversion(config: ConversionConfig, processor: Any = None) -> Conversion:
    """The conversion that a recipe's entry asks for.

    Args:
        config: the entry.
        processor: of the model to convert.

    Raises:
        RecipeError: the conversion needs the processor, and there is none.
    """
    cls = _BUILT_IN.get(config.kind) or CONVERSIONS.find(config.kind)
    assert cls is not None  # its settings were read
    made = cls(config)
    made.processor = processor
    if config.changes_processor and processor is None:
        raise RecipeError(
            "it changes the processor, and the model is given without one",
            where=made.where,
            hint="name the model's folder, or give 'processor' and 'out'",
        )
    return made


def convert(
    model: PreTrainedModel,
    conversions: ConversionConfig | Sequence[ConversionConfig],
    processor: Any = None,
) -> ConversionReport:
    """Apply conversions to a model in the given order, in place.

    After a Mamba or MoE conversion, the model's class and config contain the layout, and
    `save_pretrained` writes a folder that loads with the same structure.

    Args:
        model: any supported vision-language model.
        conversions: settings of one conversion, or of several.
        processor: the model's, for conversions that change it.

    Raises:
        RecipeError: a conversion does not fit the model.
    """
    report = ConversionReport(before=parameter_count(model), processor=processor)
    for config in conversions if isinstance(conversions, Sequence) else [conversions]:
        conversion = build_conversion(config, report.processor)
        try:
            conversion.check(model)
            report.lines += conversion.convert(model)
            if config.changes_processor:
                report.processor = conversion.new_processor()
        except ValueError as error:
            raise RecipeError(str(error), where=conversion.where) from error
    report.after = parameter_count(model)
    return report


def converted_processor(config: StudentConfig) -> Any:
    """The processor of a student after the conversions of `student.convert`.

    Raises:
        CheckpointError: a processor cannot be loaded.
        RecipeError: a conversion does not fit it.
    """
    processor = load_processor(config)
    for conversion in config.convert:
        if conversion.changes_processor:
            processor = build_conversion(conversion, processor).new_processor()
    return processor
