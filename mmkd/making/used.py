"""Which entries of `make` a recipe's stages read."""

from mmkd.errors import DataError
from mmkd.making.make import is_made
from mmkd.recipe import MakeConfig, Recipe


def used_entries(recipe: Recipe) -> dict[str, MakeConfig]:
    """The entries of a recipe's `make` that its stages train on or measure, by name."""
    data = [recipe.stage_data(stage) for stage in recipe.stages]
    read = {part.train for d in data for part in (*d.parts, *d.validation_parts)}
    return {name: config for name, config in recipe.make.items() if read & {*config.files}}


def check_made(recipe: Recipe) -> None:
    """Check that the recipe's records are made.

    Raises:
        DataError: some are not.
    """
    for name, config in used_entries(recipe).items():
        if not is_made(config):
            raise DataError(
                "its records are not made yet",
                where=f"make.{name}",
                hint="make them with `mmkd data answers RECIPE`; `mmkd run` does it too",
            )
