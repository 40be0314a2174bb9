"""Make the records that a run trains on: the recipe's `make`.

What the first stage reads, and what does not ask the student, is made before the first stage. The
rest is made right before the stage that reads it: `mmkd.making.used`.
"""

from collections.abc import Sequence

from mmkd.errors import RecipeError
from mmkd.making.make import NothingKeptError, make_answers
from mmkd.making.show import print_made
from mmkd.making.state import Facts, counts_of, entry_facts, is_made
from mmkd.making.used import made_before, made_for, used_entries, with_stage_data
from mmkd.recipe import Recipe
from mmkd.runs import preflight
from mmkd.runs.members import Member
from mmkd.runs.reads import forget_sources
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.progress import say
from mmkd.students import start_folder, written_config


def make_data(whole: Recipe, pending: Sequence[Member]) -> None:
    """Make the records that are not made yet and that are made before the first stage. Models,
    stages and tasks are checked before. Every rank calls it.

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
        _make(recipe, name, 0)
    distributed.barrier()


def stage_recipe(member: Member, index: int) -> Recipe:
    """The member's recipe as one of its stages sees it: data that are made right before the stage
    are in the stage's folder."""
    return with_stage_data(member.recipe, index, member.stages[index].made)


def make_stage_data(member: Member, index: int) -> str | None:
    """Make the records that are made right before a stage, by the student from which it starts,
    unless the stage has begun; then check them with the stage. Every rank calls it.

    Args:
        member: the run's member. The student from which the stage starts is written.
        index: of the stage, from 0.

    Returns:
        The name of the entry that keeps no question, if the stage is a round after the first one;
        then nothing is checked. Otherwise None.

    Raises:
        MmkdError: as of `make_answers`, or the stage cannot train on the records.
    """
    own, names = stage_recipe(member, index), [*made_for(member.recipe, index)]
    if not names:
        return None
    start = start_folder(member.recipe, index, member.folder)
    asked = own.model_copy(update={"student": written_config(own.student, start)})
    begun = member.stages[index].is_begun()
    missing = [] if begun else [name for name in names if not is_made(asked, name)]
    for name in distributed.gather([missing])[0]:
        try:
            _make(asked, name, index)
        except NothingKeptError as error:
            if member.later_rounds(index):
                if distributed.rank() == 0:
                    say(f"{name}: {error.what}")
                return name
            raise
    distributed.barrier()
    forget_sources()
    preflight.check_data(own, index, assistant=member.untrained_teacher)
    return None


def note_counts(member: Member, index: int) -> None:
    """Write how many questions were kept of the data that models made for a stage."""
    own, stage = stage_recipe(member, index), member.stages[index]
    data = own.stage_data(own.stages[index])
    found = {name: counts_of(config) for name, config in used_entries(own, [data]).items()}
    entries = {name: counts for name, counts in found.items() if counts is not None}
    if entries:
        write_json(stage.counts, {"entries": entries})


def _make(recipe: Recipe, name: str, index: int) -> None:
    device = distributed.choose_device(recipe.stages[index].engine.device)
    made = make_answers(recipe, name, device)
    if distributed.rank() == 0:
        print_made(made)


def _missing(pending: Sequence[Member]) -> list[tuple[str, Recipe]]:
    """Entries of `make` that are made before the first stage and not made yet, each with the recipe
    that has it."""
    found: dict[str, tuple[str, Recipe, Facts]] = {}
    for member in pending:
        for name, config in made_before(member.recipe).items():
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
