"""Make the records that a run trains on, before its first stage: the recipe's `make`."""

from collections.abc import Sequence

from mmkd.errors import RecipeError
from mmkd.making.make import is_made, make_answers
from mmkd.making.show import print_made
from mmkd.making.used import used_entries
from mmkd.recipe import MakeConfig, Recipe
from mmkd.runs import preflight
from mmkd.runs.members import Member
from mmkd.runtime import distributed


def make_data(whole: Recipe, pending: Sequence[Member]) -> None:
    """Make the records that members train on and that are not made yet. Models, stages and tasks
    are checked before. Every rank calls it.

    Args:
        whole: the recipe of the run.
        pending: the members that will train.

    Raises:
        RecipeError: two members make the same file with different settings.
        MmkdError: a member's recipe is not possible, or as of `make_answers`.
    """
    missing = _missing(pending)
    if not missing:
        return
    for member in pending:
        preflight.check(member.recipe, data=False, assistant=member.untrained_teacher)
    if whole.evaluate is not None:
        tasks = whole.evaluate.model_copy(update={"samples": None})  # these may not be made yet
        preflight.check_evaluation(tasks, whole.student)
    for name, recipe in missing:
        device = distributed.choose_device(recipe.stages[0].engine.device)
        made = make_answers(recipe, name, device)
        if distributed.rank() == 0:
            print_made(made)
    distributed.barrier()


def _missing(pending: Sequence[Member]) -> list[tuple[str, Recipe]]:
    """Entries of `make` that are used and not made yet, each with the recipe that has it."""
    found: dict[str, tuple[str, Recipe, MakeConfig]] = {}
    for member in pending:
        for name, config in used_entries(member.recipe).items():
            known = found.setdefault(config.out, (name, member.recipe, config))
            if known[2] != config:
                raise RecipeError(
                    f"two students make {config.out} with different settings",
                    where=f"make.{name}",
                    hint="give each an entry of its own",
                )
    made = distributed.gather([[out for out in found if is_made(found[out][2])]])[0]
    return [(name, recipe) for out, (name, recipe, _) in found.items() if out not in made]
