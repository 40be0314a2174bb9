"""Compare a changed model with the one that its config builds, as its folder would be loaded."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.skeletons import without_weights

_INDEX = ("layer_idx", "layer_index", "layer_id", "layer_number")
_PLAIN = (int, float, str, bool, type(None))


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class from the present config, without storage for weights."""
    with torch.random.fork_rng(devices=[]), without_weights():
        return type(model)(copy.deepcopy(model.config))


def differing_weight(model: PreTrainedModel, built: PreTrainedModel) -> str | None:
    """The name of a weight that only one of two models has, or with another shape."""
    own, other = ({n: p.shape for n, p in m.state_dict().items()} for m in (model, built))
    return min((n for n in own.keys() | other.keys() if own.get(n) != other.get(n)), default=None)


def match_config(
    model: PreTrainedModel, before: PreTrainedModel, layers: str, kept: Sequence[int], where: str
) -> None:
    """Make a model with cut layers the same as the one that its config builds: update the settings
    that modules took from the old config.

    Args:
        model: cut, with its new config.
        before: `skeleton_of` the model as it was.
        layers: the name of the list of layers.
        kept: their old numbers, in the new order.
        where: for the message.

    Raises:
        RecipeError: the config would build other weights, or a layer that computes something else
            than the kept one.
    """
    after = skeleton_of(model)
    if other := differing_weight(model, after):
        raise RecipeError(
            f"no config describes the kept layers {list(kept)}: the weight {other} would differ",
            where=where,
            hint="keep other layers",
        )
    earlier = dict(before.named_modules())
    for name, module in after.named_modules():
        number, old = _old_name(name, layers, kept)
        if old in earlier:
            _follow(model.get_submodule(name), module, earlier[old], number, kept, where)


def _old_name(name: str, layers: str, kept: Sequence[int]) -> tuple[int | None, str]:
    """The number of the layer that a module is in, and the module's name before the cut."""
    if not name.startswith(f"{layers}."):
        return None, name
    number, dot, rest = name.removeprefix(f"{layers}.").partition(".")
    return int(number), f"{layers}.{kept[int(number)]}{dot}{rest}"


def _follow(
    own: nn.Module,
    after: nn.Module,
    before: nn.Module,
    number: int | None,
    kept: Sequence[int],
    where: str,
) -> None:
    """Set what the new config changed in a module of the model; layers keep what they are."""
    for key, value in vars(after).items():
        was = vars(before).get(key)
        if key.startswith("_") or not (_is_plain(value) and _is_plain(was)) or value == was:
            continue
        if number is None or (key in _INDEX and (was, value) == (kept[number], number)):
            setattr(own, key, copy.copy(value))
        else:
            raise RecipeError(
                f"layer {kept[number]} has {key} {was!r}, and would load from the cut model's "
                f"config as layer {number} with {value!r}",
                where=where,
                hint="keep other layers",
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)
