"""The modules that belong to objectives: made before a stage, and written after it.

They train with the student and are in its checkpoints. They are not a part of the student: the
stage writes them into a file of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.objectives import DecoderParts, Objective
from mmkd.recipe.context import StageContext
from mmkd.runtime.files import writing
from mmkd_models.parts import find_parts

GRADIENT_NORMS = "gradient_norms"
"""Name of the module with the norms of `balance_gradients`."""


def build_own(
    objectives: Sequence[Objective], student: PreTrainedModel, teacher: PreTrainedModel | None
) -> nn.ModuleDict:
    """Make the modules of all objectives, by the objective's name, and give each its own.

    Args:
        objectives: of the stage, before they are copied for each of several teachers.
        student: before the stage, with all its weights and without adapters.
        teacher: the primary teacher's model; None if it does not run.

    Raises:
        RecipeError: a parameter has no dimension.
    """
    own = nn.ModuleDict()
    if any(o.config.trains_own for o in objectives):
        parts = _parts(student), None if teacher is None else _parts(teacher)
        for objective in objectives:
            objective.own = objective.own_modules(*parts)
            if objective.own is not None:
                _check_dimensions(objective.name, objective.own)
                own[objective.name] = objective.own
    return own


def _check_dimensions(objective: str, own: nn.Module) -> None:
    for name, parameter in own.named_parameters():
        if parameter.dim() == 0:
            raise RecipeError(
                f"its parameter {name} has no dimension, which DeepSpeed cannot train",
                where=f"objective {objective}",
                hint="give it one dimension, of size 1",
            )


def _parts(model: PreTrainedModel) -> DecoderParts:
    parts = find_parts(model)
    layers: Any = parts.decoder_layers
    return DecoderParts(layers, parts.final_norm, model.config.get_text_config().hidden_size)


def write_own(path: Path, weights: dict[str, Tensor]) -> None:
    """Write the state dict of the modules of objectives; no file if there are none."""
    kept = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
        if not name.startswith(f"{GRADIENT_NORMS}.")
    }
    if kept:
        with writing(path) as partial:
            save_file(kept, partial)


def check_own(context: StageContext) -> None:
    """Check that modules of objectives can be named and trained.

    Raises:
        RecipeError: they cannot.
    """
    if context.stage.balance_gradients:
        _check_balanced(context)
    for objective in context.objectives:
        if not objective.config.trains_own:
            continue
        where = context.at(objective)
        if hasattr(nn.ModuleDict(), objective.name) or objective.name == GRADIENT_NORMS:
            raise RecipeError(
                f"the name {objective.name!r} is reserved for other modules",
                where=where,
                hint="choose another 'name'",
            )
        if objective.config.compares_outputs and len(context.recipe.teachers) > 1:
            raise RecipeError(
                "an objective with parameters of its own compares with one teacher",
                where=where,
                hint="leave the other teachers out, or use the objective without own parameters",
            )


def _check_balanced(context: StageContext) -> None:
    """Check that the gradients of the objectives can be compared.

    Raises:
        RecipeError: there is one only, or one that does not read the final hidden states.
    """
    where = f"{context.where}: balance_gradients"
    weighted = [o for o in context.objectives if o.config.weight > 0]
    if len(weighted) < 2:
        raise RecipeError("there is one objective only", where=where, hint="leave it out")
    for objective in weighted:
        if not objective.config.reads_final_hidden:
            raise RecipeError(
                f"objective {objective.name} does not read the final hidden states, where "
                "gradients are compared",
                where=where,
                hint="leave it out, and set the objectives' weights",
            )
