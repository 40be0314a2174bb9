"""Conversions: pure functions of model and layout that change a student's structure in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.loading import parameter_count
from mmkd.recipe import LayersConversion
from mmkd_models.parts import find_parts


@dataclass
class ConversionReport:
    """What a conversion did: parameters before and after, and a line for each change."""

    before: int
    after: int = 0
    lines: list[str] = field(default_factory=list)


def convert(model: PreTrainedModel, conversions: Sequence[LayersConversion]) -> ConversionReport:
    """Apply the conversions of a recipe in order, in place.

    Raises:
        RecipeError: a conversion does not fit the model.
    """
    report = ConversionReport(before=parameter_count(model))
    for conversion in conversions:
        report.lines += keep_layers(model, conversion)
    report.after = parameter_count(model)
    return report


def keep_layers(model: PreTrainedModel, conversion: LayersConversion) -> list[str]:
    """Keep some layers of decoder and vision tower, in the given order; the width stays.

    Starting a student from its teacher's alternate layers is DistilBERT's initialisation
    (Sanh et al. 2019, arXiv 1910.01108, section 2).
    """
    parts = find_parts(model)
    lines = []
    for name, layers, kept, config in (
        ("decoder", parts.decoder_layers, conversion.decoder, model.config.get_text_config()),
        ("vision", parts.vision_layers, conversion.vision, _vision_config(model)),
    ):
        if kept is None:
            continue
        if layers is None or config is None:
            raise RecipeError("the model has no such layers", where=f"student.convert: {name}")
        count = len(layers)
        if not kept or len(set(kept)) != len(kept) or not all(0 <= i < count for i in kept):
            raise RecipeError(
                f"cannot keep layers {kept} of {count}",
                where=f"student.convert: {name}",
                mend=f"name different layers from 0 to {count - 1}",
            )
        _keep(layers, kept)
        _shorten(config, count, kept)
        lines.append(f"{name}: kept layers {kept} of {count}")
    return lines


def _vision_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", None)


def _keep(layers: nn.ModuleList, kept: list[int]) -> None:
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010


def _shorten(config: Any, count: int, kept: list[int]) -> None:
    """Fit a config to the kept layers: its depth, and every list that has an entry a layer."""
    for key, value in config.to_dict().items():
        if key in ("num_hidden_layers", "depth") and value == count:
            setattr(config, key, len(kept))
        elif isinstance(value, list) and len(value) == count and key.endswith("layer_types"):
            setattr(config, key, [value[i] for i in kept])
