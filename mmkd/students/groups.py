"""Which parameters of a student train, by group name."""

import difflib

from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd_models.parts import parameter_groups


def set_trainable(model: PreTrainedModel, groups: list[str]) -> list[str]:
    """Freeze everything but the named groups; return the names of what trains.

    Raises:
        RecipeError: an unknown group, or one without parameters.
    """
    known = parameter_groups(model)
    chosen: set[str] = set()
    for group in groups:
        if group not in known:
            close = difflib.get_close_matches(group, known, n=1)
            mend = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise RecipeError(f"unknown group {group!r}", where="stages.train", mend=mend)
        if not known[group]:
            raise RecipeError(f"the student has no parameters in {group!r}", where="stages.train")
        chosen.update(known[group])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [n for n, p in model.named_parameters() if p.requires_grad]
