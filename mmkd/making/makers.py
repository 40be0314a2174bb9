"""Build the models that answer, from a recipe."""

import torch

from mmkd.making.base import Maker
from mmkd.making.local import LocalMaker
from mmkd.recipe import STUDENT, MakeConfig, Recipe


def build_makers(recipe: Recipe, config: MakeConfig, device: torch.device) -> dict[str, Maker]:
    """The models that an entry of `make` asks, judges included, by name. None is loaded yet.

    Args:
        recipe: with the models.
        config: the entry.
        device: of models that run here.

    Raises:
        RecipeError: a teacher does not run, or the student has no weights.
    """
    judges = [check.model for check in config.checks if check.model is not None]
    return {
        name: _build(name, recipe, config.batch_size, device)
        for name in dict.fromkeys([*config.by, *judges])
    }


def _build(name: str, recipe: Recipe, batch_size: int, device: torch.device) -> Maker:
    if name in recipe.servers:
        from mmkd.making.server import ServerMaker  # its HTTP client is slow to import

        return ServerMaker(recipe.servers[name])
    if name == STUDENT:
        return LocalMaker(name, recipe.student, batch_size, device)
    teacher = next(t for t in recipe.teachers if t.name == name)
    return LocalMaker(name, teacher, batch_size, device)
