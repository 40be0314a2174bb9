"""Conversions: pure functions of model and layout that change a student's structure in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.loading import parameter_count
from mmkd.recipe import LayersConversion, MlpConversion
from mmkd.students.layers import keep_layers
from mmkd.students.mlp import keep_neurons
from mmkd_models.parts import find_parts


@dataclass
class ConversionReport:
    """What a conversion did: parameters before and after, and a line for each change."""

    before: int
    after: int = 0
    lines: list[str] = field(default_factory=list)


def convert(
    model: PreTrainedModel, conversions: Sequence[LayersConversion | MlpConversion]
) -> ConversionReport:
    """Apply the conversions of a recipe in order, in place, to decoder and vision tower.

    Raises:
        RecipeError: a conversion does not fit the model.
    """
    report = ConversionReport(before=parameter_count(model))
    for conversion in conversions:
        for name, layers, config in _towers(model):
            wanted = getattr(conversion, name)
            if wanted is None:
                continue
            if layers is None or config is None:
                raise RecipeError("the model has no such layers", where=f"student.convert: {name}")
            change = keep_layers if isinstance(conversion, LayersConversion) else keep_neurons
            report.lines.append(f"{name}: {change(layers, config, wanted, name)}")
    report.after = parameter_count(model)
    return report


def _towers(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList | None, Any]]:
    parts = find_parts(model)
    return [
        ("decoder", parts.decoder_layers, model.config.get_text_config()),
        ("vision", parts.vision_layers, getattr(model.config, "vision_config", None)),
    ]
