"""End the rounds of a stage early, because no question is left for one of them."""

from pathlib import Path

from mmkd.runs.inputs import note_inputs
from mmkd.runs.make_data import note_counts
from mmkd.runs.members import Member
from mmkd.runtime import distributed
from mmkd.runtime.files import link_folder, write_folder, write_json
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import StageFolder


def end_rounds(member: Member, index: int, entry: str) -> None:
    """Finish a round, and those after it, without a step: their student is that of the round
    before. Every rank calls it.

    If the process is killed, the same call on the next round ends the rest.

    Args:
        member: the run's member.
        index: of the round, from 0. It is not the first one of its stage.
        entry: of `make`, which keeps no question for it.
    """
    if distributed.rank() == 0:
        names = [stage.name for stage in member.recipe.stages]
        say(
            f"{member.label}: {names[index]}: no question of make.{entry} is left; the rounds end, "
            f"and the student is that of {names[index - 1]}"
        )
        note_counts(member, index)
        for number in member.later_rounds(index):
            note_inputs(member, number)
            _finish(member.stages[number], member.stages[number - 1].student)
    distributed.barrier()


def _finish(folder: StageFolder, student: Path) -> None:
    """Write a stage's folder again, in one step, with a student that was trained before."""

    def write(target: Path) -> None:
        link_folder(folder.path, target)
        new = StageFolder(target)
        link_folder(student, new.student)
        write_json(new.done, {"steps": 0})

    write_folder(folder.path, write)
