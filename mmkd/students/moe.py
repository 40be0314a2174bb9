"""Upcycling: feed-forward networks become experts that start as copies of them (Komatsuzaki et al.
2022, arXiv 2212.05055; LLaVA-MoD, arXiv 2408.15881, section 3.2)."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import MoeConversion
from mmkd.students.placement import choose
from mmkd_models.layout import MoeLayout, moe_layers
from mmkd_models.modeling_mmkd import become_student
from mmkd_models.parts import find_parts
from mmkd_models.surgery import replace_ffn

WHERE = "student.convert: moe"


def upcycle(model: PreTrainedModel, conversion: MoeConversion) -> list[str]:
    """Make the chosen layers sparse, in place; returns what was done.

    The model computes what it did before.

    Raises:
        RecipeError: the layers are not there, are sparse already, or have no network to copy.
    """
    layers = find_parts(model).decoder_layers
    if present := moe_layers(model.config):
        raise RecipeError(
            f"layers {list(present)} are sparse already", where=WHERE, mend="upcycle once"
        )
    chosen = choose(conversion.layers, len(layers), where=WHERE)
    if not chosen:
        raise RecipeError("no layer is chosen", where=WHERE, mend="name at least one")
    layout = MoeLayout(tuple(chosen), conversion.experts, conversion.top_k)
    try:
        replaced = replace_ffn(model, layout)
    except ValueError as error:
        raise RecipeError(str(error), where=WHERE) from error
    for index, mlp in replaced.items():
        sparse: Any = layers[index].mlp
        sparse.experts.copy_of(mlp)
        nn.init.normal_(sparse.router.weight, std=conversion.router.std)
    become_student(model, {"moe": layout.to_dict()})
    size = sum(p.numel() for p in sparse.experts.parameters()) // layout.experts
    return [
        f"decoder: {layout.experts} experts, top {layout.top_k}, in layers {chosen}, "
        f"copies of the dense network ({size:,} weights an expert)"
    ]
