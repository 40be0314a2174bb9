"""The student from which a stage of a run starts. Converted students are written to disk first."""

from typing import Any

from transformers import PreTrainedModel

from mmkd.errors import CheckpointError
from mmkd.modeling.loading import load_processor
from mmkd.recipe import Recipe, StudentConfig
from mmkd.runs.inputs import note_start
from mmkd.runs.members import Member
from mmkd.runs.provenance import describe
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import StudentFolder
from mmkd.students import start_folder, student_at, write_converted, written_config
from mmkd.students.start import source_folder


def write_start(member: Member, index: int, recipe: Recipe) -> None:
    """Write the student from which a stage starts, if it is converted or made from a config. All
    ranks must call it.

    Args:
        member: the student.
        index: of the stage, from 0.
        recipe: of the whole run.

    Raises:
        CheckpointError: the student of the previous stage is missing.
        RecipeError: a conversion does not fit the model.
    """
    own, folder = member.recipe, member.folder
    source = source_folder(own, index, folder)
    if index == 0 and source is not None:
        _write(member, recipe, own.student, folder.start, 0)
    elif source is not None and not source.is_dir():
        raise CheckpointError(
            "its student is gone",
            where=str(source.parent),
            hint="bring it back, or delete the stage's folder to train it again",
        )
    if conversions := own.stages[index].convert:
        config = written_config(own.student, source)
        config = config.model_copy(update={"convert": conversions})
        _write(member, recipe, config, member.stages[index].start, index)


def student_before(member: Member, index: int) -> tuple[PreTrainedModel, Any]:
    """Student and processor from which a stage starts, after `write_start`.

    Raises:
        CheckpointError: the model cannot be loaded.
    """
    own, folder = member.recipe, member.folder
    start = written_config(own.student, start_folder(own, index, folder))
    return student_at(own, index, folder=folder), load_processor(start)


def _write(
    member: Member, recipe: Recipe, config: StudentConfig, folder: StudentFolder, index: int
) -> None:
    """Write a from-scratch or converted student, unless it exists. Rank 0 writes."""
    if not folder.is_done() and distributed.rank() == 0:
        report = write_converted(config, folder.student, seed=member.recipe.seed + index)
        for line in report.lines:
            say(line)
        describe(member, recipe)
        if index == 0:
            note_start(member)
        write_json(
            folder.done,
            {"before": report.before, "after": report.after, "changes": report.lines},
        )
    distributed.barrier()
