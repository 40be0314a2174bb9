"""`layers`: keep some layers, in the given order; the width stays.

Starting from some of the teacher's layers is DistilBERT's initialisation (Sanh et al. 2019,
arXiv 1910.01108, section 2).
"""

from typing import Any

from torch import nn

from mmkd.errors import RecipeError


def keep_layers(layers: nn.ModuleList, config: Any, kept: list[int], name: str) -> str:
    """Cut `layers` down in place and fit `config` to them; returns what was done.

    Raises:
        RecipeError: a layer is named twice or is not there.
    """
    count = len(layers)
    if not kept or len(set(kept)) != len(kept) or not all(0 <= i < count for i in kept):
        raise RecipeError(
            f"cannot keep layers {kept} of {count}",
            where=f"student.convert: {name}",
            mend=f"name different layers from 0 to {count - 1}",
        )
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010
    _shorten(config, count, kept)
    return f"kept layers {kept} of {count}"


def _shorten(config: Any, count: int, kept: list[int]) -> None:
    """Fit a config to the kept layers: its depth, and its list of layer types."""
    for key, value in config.to_dict().items():
        if key in ("num_hidden_layers", "depth") and value == count:
            setattr(config, key, len(kept))
        elif isinstance(value, list) and len(value) == count and key.endswith("layer_types"):
            setattr(config, key, [value[i] for i in kept])
