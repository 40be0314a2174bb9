"""`mmkd data answers`: make the records of a recipe's `make` section."""

from collections.abc import Sequence

from mmkd.errors import RecipeError, nearest
from mmkd.making.make import Made, make_answers
from mmkd.making.show import print_made
from mmkd.recipe import Recipe
from mmkd.runtime import distributed


def make_entries(recipe: Recipe, names: Sequence[str] = ()) -> list[Made]:
    """Make entries of a recipe's `make`. Every rank calls it.

    Args:
        recipe: with the entries.
        names: of the entries; all by default.

    Raises:
        RecipeError: there is no such entry.
        MmkdError: as of `make_answers`.
    """
    if not recipe.make:
        raise RecipeError(
            "the recipe makes no data", where="make", hint="add an entry with pictures and prompts"
        )
    for name in names:
        if name not in recipe.make:
            hint = nearest(name, list(recipe.make))
            raise RecipeError(f"no entry {name!r}", where="make", hint=hint)
    device = distributed.choose_device(recipe.stages[0].engine.device)
    distributed.connect(device, timeout_s=max(s.engine.timeout_s for s in recipe.stages))
    found = []
    for name in names or recipe.make:
        found.append(make_answers(recipe, name, device))
        if distributed.rank() == 0:
            print_made(found[-1])
    return found
