"""Config settings of single layers, adapted to the layers that are kept.

A kept layer does what it did: a list with an item for each layer keeps the items of the kept ones,
a list of layer numbers gets their new numbers, and what is read after a layer is read after the
same layer, or after the last kept one before it, as if the layers between were skipped. A key that
may be about single layers and is unknown here is refused by name.
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError

DEPTHS = ("num_hidden_layers", "depth")
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "indexer_types",
    "layers_block_type",
    "no_rope_layers",
    "layer_rope_theta",
    "intermediate_size",
    "activation_sparsity_pattern",
)
NUMBERS = (
    "fullatt_block_indexes",
    "full_attn_idxs",
    "global_attn_indexes",
    "cross_attention_layers",
    "moe_layers",
    "mlp_only_layers",
    "rope_scaling_layers",
    "local_layer_ids",
)
# Layers of the vision tower whose output also goes into a module of its own, one for each layer.
TAPS = ("deepstack_visual_indexes",)
# Numbers of the vision tower's hidden states: 0 is what enters its first layer, -1 the last one.
HIDDEN_STATES = ("vision_feature_layer", "vision_feature_layers")
_OF_NO_LAYER = re.compile(
    r"(size|sizes|mean|std|pinpoints|token_ids?|architectures|channels|multiplier|section|shape"
    r"|stride|kernel|summary_idxs)$"
)
_OF_ONE_LAYER = re.compile(r"(^|_)layer(_id|_idx|_index)?(_start|_end)?$")


def fit_lists(
    model: PreTrainedModel, config: Any, count: int, kept: Sequence[int], name: str
) -> list[str]:
    """Adapt a tower's config, and the settings of that tower in the model's own config, in place.

    Args:
        model: whose layers are cut already, or will be.
        config: of the tower.
        count: layers that it had.
        kept: their old numbers, in the new order.
        name: "decoder" or "vision".

    Returns:
        A line for each module that was removed because no kept layer feeds it, and for features
        that now enter at other decoder layers.

    Raises:
        RecipeError: a key cannot be adapted, or is unknown and may be about single layers.
    """
    where = f"student.convert: {name}"
    entries = _entries(model.config, kept, where) if name == "decoder" else []
    changes, taps = _of_tower(config, count, kept, where)
    outer = {} if model.config is config else _of_model(model.config, count, kept, name, where)
    for copied in _same_configs(model, config):
        for key, value in changes.items():
            setattr(copied, key, value)
    for key, value in outer.items():
        setattr(model.config, key, value)
    lines = entries
    for key, (old, gone) in taps.items():
        if gone:
            _drop_modules(model, [layer not in gone for layer in old])
            lines.append(f"without the modules of {key} {gone}: no kept layer feeds them")
    return lines


def _of_tower(
    config: Any, count: int, kept: Sequence[int], where: str
) -> tuple[dict[str, Any], dict[str, tuple[list[int], list[int]]]]:
    """New values by key, and for each list of taps its old numbers: all of them, and the removed
    ones."""
    changes: dict[str, Any] = {}
    taps: dict[str, tuple[list[int], list[int]]] = {}
    for key, value in config.to_dict().items():
        if key in DEPTHS and value == count:
            changes[key] = len(kept)
        elif key in TAPS and value:
            changes[key], gone = _moved_taps(value, kept, key, where)
            taps[key] = list(value), gone
        elif key in NUMBERS and isinstance(value, (list, tuple)):
            old = set(value)
            changes[key] = type(value)(new for new, layer in enumerate(kept) if layer in old)
        elif key in PER_LAYER and isinstance(value, (list, tuple)) and len(value) == count:
            changes[key] = type(value)(value[layer] for layer in kept)
        else:
            _refuse_unknown(key, value, count, where)
    return changes, taps


def _of_model(
    config: Any, count: int, kept: Sequence[int], name: str, where: str
) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        if key not in HIDDEN_STATES:
            _refuse_unknown(key, value, count, where)
        elif name == "vision" and value is not None:
            many = isinstance(value, (list, tuple))
            moved = [_moved_state(v, count, kept, key, where) for v in (value if many else [value])]
            changes[key] = type(value)(moved) if many else moved[0]
    return changes


def _behind(layer: int, kept: Sequence[int]) -> int | None:
    """How many kept layers have run at the place where the old model had just run `layer`; None if
    that place is lost because the layers change their order."""
    if layer in kept:
        return list(kept).index(layer) + 1
    if list(kept) != sorted(kept):
        return None
    return sum(other < layer for other in kept)


def _moved_state(number: int, count: int, kept: Sequence[int], key: str, where: str) -> int:
    """The new number of a hidden state of the vision tower."""
    place = number if number >= 0 else number + count + 1
    if number == -1:
        return number
    if place == count:
        return len(kept)
    behind = 0 if place == 0 else _behind(place - 1, kept)
    if behind is None:
        raise RecipeError(
            f"{key} {number} is read after layer {place - 1}, which is not kept, and the kept "
            "layers change their order",
            where=where,
            hint="keep that layer, or the order",
        )
    if behind == 0:
        return -len(kept) - 1  # transformers takes a single 0 for a missing value
    # in some families -1 would not be the last layer's output
    return behind - len(kept) - 1 if number < 0 and behind < len(kept) else behind


def _moved_taps(
    layers: Sequence[int], kept: Sequence[int], key: str, where: str
) -> tuple[Any, list[int]]:
    """The new numbers of layers that feed a module each, and the old numbers of those that no kept
    layer can replace."""
    new: list[int] = []
    gone: list[int] = []
    for layer in layers:
        behind = _behind(layer, kept)
        if not behind or behind - 1 in new:
            gone.append(layer)
        else:
            new.append(behind - 1)
    if new != sorted(new):
        raise RecipeError(
            f"the layers of {key} {list(layers)} change their order",
            where=where,
            hint="keep the order of these layers",
        )
    return type(layers)(new), gone  # type: ignore[call-arg]


def _entries(config: Any, kept: Sequence[int], where: str) -> list[str]:
    """Lines that say at which decoder layers the features of the vision tower's taps now enter. The
    features of tap i are added after decoder layer i: no setting could keep the old layers.

    Raises:
        RecipeError: fewer layers are kept than there are taps.
    """
    vision = getattr(config, "vision_config", None)
    lines = []
    for key in TAPS:
        count = len(getattr(vision, key, None) or [])
        if count > len(kept):
            raise RecipeError(
                f"the features of {key} are added after the first {count} decoder layers, and "
                f"{len(kept)} are kept",
                where=where,
                hint=f"keep {count} decoder layers or more",
            )
        if list(kept[:count]) != list(range(count)):
            lines.append(
                f"the features of {key} are now added after the old layers {list(kept[:count])}"
            )
    return lines


def _refuse_unknown(key: str, value: Any, count: int, where: str) -> None:
    """
    Raises:
        RecipeError: the key may be about single layers.
    """
    if isinstance(value, (list, tuple)) and value and not _OF_NO_LAYER.search(key):
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        numbers = whole and len({*value}) == len(value) and all(0 <= v < count for v in value)
        plain = all(isinstance(v, (int, float, str, bool, type(None))) for v in value)
        unknown = numbers or (plain and len(value) == count)
    else:
        single = isinstance(value, int) and not isinstance(value, bool)
        unknown = single and bool(_OF_ONE_LAYER.search(key)) and -count <= value <= count
    if unknown:
        raise RecipeError(
            f"the config's {key} may be about single layers, and mmkd does not know how to adapt "
            "it to fewer layers",
            where=where,
            hint="keep all layers of this part, or use another model",
        )


def _same_configs(model: PreTrainedModel, config: Any) -> list[Any]:
    """The config, and copies of it that modules hold."""
    found = {id(config): config}
    said = config.to_dict()
    for module in model.modules():
        other: Any = getattr(module, "config", None)
        if type(other) is type(config) and id(other) not in found and other.to_dict() == said:
            found[id(other)] = other
    return list(found.values())


def _drop_modules(model: PreTrainedModel, stay: list[bool]) -> None:
    """Keep some of the modules that taps feed."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.ModuleList) and "deepstack" in last and len(module) == len(stay):
            chosen = [m for m, kept in zip(module, stay, strict=True) if kept]
            del module[:]
            module.extend(chosen)
