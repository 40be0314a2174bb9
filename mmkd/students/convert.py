"""Conversions: pure functions of model and layout that change a student's structure in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.loading import parameter_count
from mmkd.recipe import (
    Conversion,
    LayersConversion,
    MambaConversion,
    MlpConversion,
    MoeConversion,
)
from mmkd.students.layer_choice import converted_layers
from mmkd.students.layers import keep_layers
from mmkd.students.mamba import layout_of, seed
from mmkd.students.mlp import keep_neurons
from mmkd.students.moe import upcycle
from mmkd_models.layout import mamba_layers
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.modeling_mmkd import become_student
from mmkd_models.moe import SparseFfn
from mmkd_models.parts import find_parts
from mmkd_models.surgery import replace_attention


@dataclass
class ConversionReport:
    """What a conversion did: parameters before and after, and a line for each change."""

    before: int
    after: int = 0
    lines: list[str] = field(default_factory=list)


def convert(
    model: PreTrainedModel, conversions: Conversion | Sequence[Conversion]
) -> ConversionReport:
    """Apply conversions to a model in the given order, in place.

    After a Mamba or MoE conversion, the model's class and config contain the layout, and
    `save_pretrained` writes a folder that loads with the same structure.

    Args:
        model: any supported vision-language model.
        conversions: one conversion of a recipe, or several.

    Raises:
        RecipeError: a conversion does not fit the model.
    """
    report = ConversionReport(before=parameter_count(model))
    for conversion in conversions if isinstance(conversions, Sequence) else [conversions]:
        if isinstance(conversion, MambaConversion):
            report.lines += _to_mamba(model, conversion)
        elif isinstance(conversion, MoeConversion):
            report.lines += upcycle(model, conversion)
        else:
            report.lines += _cut(model, conversion)
    report.after = parameter_count(model)
    return report


def _to_mamba(model: PreTrainedModel, conversion: MambaConversion) -> list[str]:
    layers = find_parts(model).decoder_layers
    chosen = converted_layers(conversion.keep_attention, conversion.layers, len(layers))
    present = mamba_layers(model.config)
    if not set(chosen) - set(present):
        raise RecipeError(
            f"layers {chosen} are Mamba already",
            where="student.convert: mamba",
            mend="name layers that have attention",
        )
    if conversion.layers is not None:
        chosen = sorted({*chosen, *present})
    try:
        layout = layout_of(conversion, chosen)
        replaced = replace_attention(model, layout)
    except ValueError as error:
        raise RecipeError(str(error), where="student.convert: mamba") from error
    inherited: list[str] = []
    for index, attention in replaced.items():
        mixer: Any = layers[index].self_attn
        inherited = seed(mixer, attention, conversion.init)
    become_student(model, {"mamba": layout.to_dict()})
    return _described(mixer, inherited, chosen, len(layers), conversion.init)


def _described(
    mixer: Mamba2Mixer, inherited: list[str], chosen: list[int], count: int, init: str
) -> list[str]:
    kept = [i for i in range(count) if i not in chosen]

    def listed(names: list[str]) -> str:
        sizes = dict(mixer.named_parameters())
        total = sum(sizes[n].numel() for n in names)
        return f"{', '.join(names) or 'nothing'} ({total:,} weights a layer)"

    new = [n for n, _ in mixer.named_parameters() if n not in inherited]
    return [
        f"decoder: Mamba-2 mixers ({init}) in layers {chosen}, attention in {kept or 'none'}",
        f"  inherited: {listed(inherited)}",
        f"  new: {listed(new)}",
    ]


def _cut(model: PreTrainedModel, conversion: LayersConversion | MlpConversion) -> list[str]:
    lines = []
    for name, layers, config in _towers(model):
        wanted = getattr(conversion, name)
        if wanted is None:
            continue
        if layers is None or config is None:
            raise RecipeError("the model has no such layers", where=f"student.convert: {name}")
        settled = (Mamba2Mixer, SparseFfn) if conversion.kind == "layers" else SparseFfn
        if any(isinstance(m, settled) for m in layers.modules()):
            raise RecipeError(
                "layers cannot be cut after they became Mamba or sparse",
                where=f"student.convert: {name}",
                mend=f"put '{conversion.kind}' before 'mamba' and 'moe'",
            )
        if isinstance(conversion, LayersConversion):
            lines.append(f"{name}: {keep_layers(model, layers, config, wanted, name)}")
        else:
            lines.append(f"{name}: {keep_neurons(layers, config, wanted, name)}")
    return lines


def _towers(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList | None, Any]]:
    parts = find_parts(model)
    return [
        ("decoder", parts.decoder_layers, model.config.get_text_config()),
        ("vision", parts.vision_layers, getattr(model.config, "vision_config", None)),
    ]
