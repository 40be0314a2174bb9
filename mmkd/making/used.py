"""Which entries of `make` a recipe's stages read."""

from collections.abc import Sequence

from mmkd.data.truncation import needs_answers
from mmkd.errors import DataError, RecipeError
from mmkd.making.state import is_made
from mmkd.recipe import DataConfig, MakeConfig, Recipe
from mmkd.recipe.context import StageContext


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


def check_questions(context: StageContext) -> None:
    """Check that a stage that needs answers does not read an entry that writes questions.

    Raises:
        RecipeError: it does.
    """
    stage, data = context.stage, context.data
    answers = not stage.samples_all and any(map(needs_answers, stage.objectives))
    read = [*(data.parts if answers else []), *data.validation_parts]
    for name, config in context.recipe.make.items():
        if config.writes == "questions" and config.out in [part.train for part in read]:
            raise RecipeError(
                f"it reads made:{name}, which has questions without answers",
                where=context.where,
                hint=f"add an entry of 'make' with 'records: made:{name}', and read its answers",
            )
