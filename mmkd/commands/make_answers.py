"""`mmkd data answers`: make the records of a recipe's `make` section."""

from collections.abc import Sequence

from mmkd.errors import RecipeError, nearest
from mmkd.making.make import Made, make_answers
from mmkd.making.show import print_made
from mmkd.making.state import is_made
from mmkd.recipe import Recipe, read_entry
from mmkd.runtime import distributed


def make_entries(recipe: Recipe, names: Sequence[str] = ()) -> list[Made]:
    """Make entries of a recipe's `make`. Every rank calls it.

    Args:
        recipe: with the entries.
        names: of the entries; all by default. An entry whose records one of them reads is made
            before it, unless it is made already.

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
    for name in _in_order(recipe, names):
        found.append(make_answers(recipe, name, device))
        if distributed.rank() == 0:
            print_made(found[-1])
    return found


def _in_order(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """The entries to make, each after the one whose records it reads."""
    wanted = set(names or recipe.make)
    for name, config in reversed(recipe.make.items()):
        read = read_entry(config, recipe.make)
        if name in wanted and read is not None and not is_made(recipe, read):
            wanted.add(read)
    return distributed.gather([[name for name in recipe.make if name in wanted]])[0]
