"""Which entries of `make` a recipe's stages read."""

from collections.abc import Sequence

from mmkd.errors import DataError
from mmkd.making.state import is_made
from mmkd.recipe import DataConfig, MakeConfig, Recipe


def used_entries(recipe: Recipe, data: Sequence[DataConfig] | None = None) -> dict[str, MakeConfig]:
    """The entries of a recipe's `make` that its stages train on or measure, by name; or those that
    other `data` read."""
    data = [recipe.stage_data(stage) for stage in recipe.stages] if data is None else data
    read = {part.train for d in data for part in (*d.parts, *d.validation_parts)}
    return {name: config for name, config in recipe.make.items() if read & {*config.files}}


def check_made(recipe: Recipe, data: Sequence[DataConfig] | None = None) -> None:
    """Check that the recipe's records are made; arguments as in `used_entries`.

    Raises:
        DataError: some are not.
    """
    for name in used_entries(recipe, data):
        if not is_made(recipe, name):
            raise DataError(
                "its records are not made yet, or with other settings or models",
                where=f"make.{name}",
                hint="make them with `mmkd data answers RECIPE`; `mmkd run` does it too",
            )
