"""Which parameters of a student train, by group name."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from mmkd.errors import RecipeError, nearest
from mmkd.modeling.adapters import adapter_parameters, add_adapters
from mmkd.recipe import LoraConfig
from mmkd_models.parts import parameter_groups


def set_trainable(
    model: PreTrainedModel, groups: Sequence[str], lora: LoraConfig | None = None
) -> list[str]:
    """Freeze all parameters except the named groups and new adapters; return the names that train.

    Raises:
        RecipeError: an unknown group, or one without parameters.
    """
    check_groups(model, groups, lora)
    known = parameter_groups(model)
    chosen = {name for group in groups for name in known[group]}
    whole = {id(p) for n, p in model.named_parameters() if n in chosen}
    if lora is not None:
        add_adapters(model, lora, groups)
    adapters = set(adapter_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in whole or name in adapters)
    return [n for n, p in model.named_parameters() if p.requires_grad]


def check_groups(
    model: PreTrainedModel, groups: Sequence[str], lora: LoraConfig | None = None
) -> None:
    """Check that the groups exist.

    Raises:
        RecipeError: an unknown group, or one without parameters.
    """
    known = parameter_groups(model)
    for group in [*groups, *(lora.groups if lora else [])]:
        if group not in known:
            hint = nearest(group, list(known))
            raise RecipeError(f"unknown group {group!r}", where="stages.train", hint=hint)
        if not known[group]:
            raise RecipeError(
                f"the student has no parameters in {group!r}",
                where="stages.train",
                hint=f"leave it out; it has {', '.join(g for g in known if known[g])}",
            )
