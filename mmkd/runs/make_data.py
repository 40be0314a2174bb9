"""Make the records that a run trains on, before its first stage: the recipe's `make`."""

from collections.abc import Sequence

from mmkd.errors import RecipeError
from mmkd.making.make import make_answers
from mmkd.making.show import print_made
from mmkd.making.state import Facts, entry_facts, is_made
from mmkd.making.used import used_entries
from mmkd.recipe import Recipe
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
        RecipeError: two members make the same file with different settings or models.
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
    found: dict[str, tuple[str, Recipe, Facts]] = {}
    for member in pending:
        for name, config in used_entries(member.recipe).items():
            facts = entry_facts(member.recipe, name)
            known = found.setdefault(config.out, (name, member.recipe, facts))
            if known[2] != facts:
                different = "settings" if known[2]["settings"] != facts["settings"] else "models"
                raise RecipeError(
                    f"two students make {config.out} with different {different}",
                    where=f"make.{name}",
                    hint="give each an entry of its own",
                )
    made = [out for out, (name, recipe, _) in found.items() if is_made(recipe, name)]
    made = distributed.gather([made])[0]
    return [(name, recipe) for out, (name, recipe, _) in found.items() if out not in made]
