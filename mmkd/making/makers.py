"""Build the models that answer and judge, from a recipe."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from mmkd.errors import RecipeError
from mmkd.making.base import Maker, MakerSource
from mmkd.making.local import LocalMaker
from mmkd.recipe import STUDENT, MakeConfig, Recipe, ServerConfig, StudentConfig


def sources_of(recipe: Recipe, names: Sequence[str]) -> dict[str, MakerSource]:
    """Settings of models that entries of `make` name."""
    known: dict[str, MakerSource] = {STUDENT: recipe.student, **recipe.servers}
    known |= {teacher.name: teacher for teacher in recipe.teachers}
    return {name: known[name] for name in names}


def build_makers(
    recipe: Recipe, names: Sequence[str], batch_size: int, device: torch.device
) -> dict[str, Maker]:
    """Models that entries of `make` name. None is loaded yet.

    Args:
        recipe: with the models.
        names: of the models.
        batch_size: questions that run at once on a device.
        device: of models that run here.

    Raises:
        RecipeError: a model has no weights, or is a student that is converted before its first
            stage.
    """
    return {
        name: _build(name, source, batch_size, device)
        for name, source in sources_of(recipe, names).items()
    }


def _build(name: str, source: MakerSource, batch_size: int, device: torch.device) -> Maker:
    if isinstance(source, ServerConfig):
        from mmkd.making.server import ServerMaker  # its HTTP client is slow to import

        return ServerMaker(source)
    if source.model is None:
        raise RecipeError(
            f"{name!r} has no weights, and is to answer or to judge",
            where=f"{name}.model",
            hint="name a model with weights",
        )
    if isinstance(source, StudentConfig) and source.convert:
        raise RecipeError(
            "the student is to answer or to judge, and its conversions come before its training",
            where="student.convert",
            hint="name another model in 'by'",
        )
    return LocalMaker(name, source, batch_size, device)


def check_judges(config: MakeConfig, makers: Mapping[str, Maker], where: str) -> None:
    """Check that no model judges its own answers, or judges twice, under another name or with
    other settings. Equal names are checked when the recipe is read.

    Args:
        config: the entry of `make`.
        makers: the models that it names.
        where: what messages call it.

    Raises:
        RecipeError: one does.
    """
    if not any(check.models for check in config.checks):
        return
    weights = {name: makers[name].weights for name in config.models}
    for check in config.checks:
        own = [(judge, maker) for judge in check.models for maker in config.by if judge != maker]
        for one, other in own:
            if weights[one] == weights[other]:
                raise _same_model(one, other, "would judge its own answers", where)
        for one, other in combinations(check.models, 2):
            if weights[one] == weights[other]:
                raise _same_model(one, other, "would judge twice", where)


def _same_model(one: str, other: str, what: str, where: str) -> RecipeError:
    return RecipeError(
        f"{one!r} and {other!r} are the same model, which {what}",
        where=f"{where}.checks",
        hint="name another model",
    )
