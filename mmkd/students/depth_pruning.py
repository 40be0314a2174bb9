"""`depth_pruning`: keep some layers, in the given order. The width stays the same.

Starting from some of the teacher's layers is DistilBERT's initialisation (Sanh et al. 2019,
arXiv 1910.01108, section 2).
"""

from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import DepthPruningConfig
from mmkd.students.layer_lists import fit_lists
from mmkd.students.rebuilt import match_config, skeleton_of
from mmkd.students.towers import Tower, TowerConversion
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.moe import SparseFfn


class DepthPruning(TowerConversion):
    config_class = DepthPruningConfig
    uncut = (Mamba2Mixer, SparseFfn)

    def cut(self, model: PreTrainedModel, tower: Tower) -> str:
        return keep_layers(model, tower, getattr(self.config, tower.name))


def keep_layers(model: PreTrainedModel, tower: Tower, kept: list[int]) -> str:
    """Cut a tower's layers down in place, and adapt its config and modules to them.

    Args:
        model: that has the tower.
        tower: to cut.
        kept: numbers of the layers to keep, in the new order.

    Returns:
        What was done.

    Raises:
        RecipeError: a layer is named twice or is not there, or the config cannot be adapted.
    """
    layers, where = tower.layers, tower.where
    count = len(layers)
    if not kept or len(set(kept)) != len(kept) or not all(0 <= i < count for i in kept):
        raise RecipeError(
            f"cannot keep layers {kept} of {count}",
            where=where,
            hint=f"name different layers from 0 to {count - 1}",
        )
    done = f"kept layers {kept} of {count}"
    if kept == list(range(count)):
        return done
    before = skeleton_of(model)
    place = next(n for n, module in model.named_modules() if module is layers)
    lines = fit_lists(model, tower.config, count, kept, tower.name)
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    match_config(model, before, place, kept, where)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010
    return "; ".join([done, *lines])
