"""A recipe from start to end: stages in order, resume, evaluation."""

import shutil
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from mmkd.errors import CheckpointError
from mmkd.recipe import Recipe
from mmkd.runs import preflight
from mmkd.runs.evaluate import evaluate
from mmkd.runs.inputs import check_inputs, note_inputs
from mmkd.runs.members import Member, members, run_folder
from mmkd.runs.provenance import describe
from mmkd.runs.resume import Restart, check_stage, find_restart, start_again
from mmkd.runs.start import student_before
from mmkd.runs.timings import common_stages, stage_kind, steps_of
from mmkd.runtime import distributed
from mmkd.runtime.files import link_folder, read_yaml, write_folder
from mmkd.runtime.progress import Course, say, say_heading
from mmkd.runtime.run_folder import RunFolder, StudentFolder
from mmkd.teachers import load_teachers
from mmkd.training.build import StageInputs, run_stage
from mmkd.training.callbacks import Callback
from mmkd.training.checkpoint import check_batch
from mmkd.training.trackers import Tracked


def run(
    recipe: Recipe, *, from_stage: str | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Train every member, evaluate, and return the run's folder.

    A second call on the same folder continues: finished stages are skipped, an unfinished one
    resumes from its newest checkpoint, finished evaluations are kept. Where the recipe has changed
    since, the stages before the first changed one are kept. Nothing is written before recipe,
    models and data have been looked through.

    Args:
        recipe: to run.
        from_stage: a stage's name: work of this stage and those behind it may be replaced where the
            recipe has changed. It is moved away, see `mmkd.runs.resume`. Without it such a recipe
            is refused.
        callbacks: called at moments of every stage that is trained.

    Raises:
        MmkdError: in one line, what is wrong with recipe, models or data.
        EvaluationError: the students are trained, and some model could not be evaluated.
    """
    patience = max(stage.engine.patience for stage in recipe.stages)
    device = distributed.choose_device(recipe.stages[0].engine.device)
    distributed.connect(device, patience=patience)
    with distributed.alone_in(run_folder(recipe).path):
        todo = members(recipe)
        restarts = _check_all(recipe, todo, from_stage)
        distributed.barrier()
        _start_again(restarts, from_stage)
        course = _course(todo)
        for number, member in enumerate(todo):
            share_stages(member, todo[:number], recipe)
            train(member, recipe, course, callbacks)
        distributed.barrier()
        if recipe.evaluate is not None:
            distributed.leave()  # one process scores for hours, and waiting ends in a timeout
            if distributed.rank() == 0:
                evaluate(recipe, todo)
    return run_folder(recipe).path


def _refuse_foreign(folder: RunFolder) -> None:
    """A run writes recipe.yaml: refuse a folder whose recipe.yaml a person wrote.

    Raises:
        CheckpointError: it holds one, and no run.
    """
    path = folder.recipe
    if not path.is_file() or folder.provenance.exists():
        return
    held = read_yaml(path)
    whole = {"label", "seed", "output_dir", "variants", "seeds", "stages"}  # as a run writes it
    if not isinstance(held, dict) or not whole <= set(held):
        raise CheckpointError(
            "the run's folder holds a recipe.yaml that no run has written",
            where=str(path),
            hint="give the run another name or output_dir",
        )


def _check_all(recipe: Recipe, todo: list[Member], from_stage: str | None) -> list[Restart | None]:
    """Look through everything before anything is written; from where each member starts again."""
    _refuse_foreign(run_folder(recipe))
    restarts = [find_restart(member, from_stage) for member in todo]
    check_stage(from_stage, todo, restarts)
    pending = [r is not None or not m.is_trained() for r, m in zip(restarts, todo, strict=True)]
    for member, restart, trains in zip(todo, restarts, pending, strict=True):
        if trains:
            _check(member, restart)
    if recipe.evaluate is not None and any(pending):
        preflight.check_evaluation(recipe.evaluate, recipe.student)
    restarts = check_inputs(todo, restarts, from_stage)
    for member, restart, trains in zip(todo, restarts, pending, strict=True):
        if restart is not None and not trains:
            _check(member, restart)
    return restarts


def _check(member: Member, restart: Restart | None) -> None:
    """Look through what a member trains, and the checkpoints that it goes on from."""
    preflight.check(member.recipe)
    kept = member.recipe.stages[: None if restart is None else restart.index]
    for stage, folder in zip(kept, member.stages, strict=False):
        records = stage.batch.records_per_step(distributed.world_size())
        check_batch(folder.checkpoints, records)


def _start_again(restarts: list[Restart | None], from_stage: str | None) -> None:
    """Make room where the recipe has changed."""
    if distributed.rank() == 0:
        changed = [restart for restart in restarts if restart is not None]
        for restart in changed:
            target = start_again(restart)
            say(f"{restart}; what was there before is in {target}")
        if from_stage is not None and not changed:
            say(f"--from-stage {from_stage}: the recipe has not changed, nothing is trained again")
    distributed.barrier()


def _course(todo: list[Member]) -> Course:
    """The stages that are still to train, in order; those that members share come once."""
    steps: dict[str, int | None] = {}
    kinds: dict[str, str] = {}
    for number, member in enumerate(todo):
        shared = (common_stages(member.recipe, other.recipe) for other in todo[:number])
        for index in range(max(shared, default=0), len(member.recipe.stages)):
            folder = member.stages[index]
            if not folder.is_done():
                steps[str(folder.path)] = steps_of(member.recipe, member.recipe.stages[index])
                kinds[str(folder.path)] = stage_kind(member.recipe, index)
    return Course(steps, kinds)


def train(
    member: Member,
    recipe: Recipe,
    course: Course | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Run the member's unfinished stages; `recipe` is the whole run's, `course` too."""
    course = course or Course({}, {})
    _tidy(member)
    if member.is_trained():
        say(f"{member.label}: already trained")
        return
    stages = member.recipe.stages
    folders = member.stages
    pending = [i for i, folder in enumerate(folders) if not folder.is_done()]
    teachers = load_teachers(member.recipe, [stages[i] for i in pending])
    for index in pending:
        student, processor = student_before(member, index, recipe)
        describe(member, recipe)
        if distributed.rank() == 0:
            note_inputs(member, index)
        place = f"stage {index + 1} of {len(stages)}"
        if distributed.rank() == 0:
            say_heading(f"{member.label}: {place}, {stages[index].name}")
        with course.part(str(folders[index].path), place):
            inputs = StageInputs(
                config=stages[index],
                student=student,
                processor=processor,
                teachers=teachers,
                data=member.recipe.stage_data(stages[index]),
                folder=folders[index].path,
                seed=member.recipe.seed + index,
                tracked=Tracked(member.recipe, run_folder(recipe).path, folders[index].path),
                callbacks=callbacks,
            )
            run_stage(inputs)
        _tidy(member)
        distributed.barrier()


def _tidy(member: Member) -> None:
    """Finished stages need no checkpoints; a run that was killed behind a stage has left some."""
    for folder in member.stages:
        written = any(folder.student.glob("*.safetensors"))  # else it can be made again
        if distributed.rank() == 0 and written and folder.is_done():
            shutil.rmtree(folder.checkpoints, ignore_errors=True)


def share_stages(member: Member, trained: list[Member], recipe: Recipe) -> None:
    """Take over the stages that another member has trained in the same way from the same start:
    they would come out the same."""
    done = sum(folder.is_done() for folder in member.stages)
    same = {other.label: _common_stages(member, other) for other in trained}
    source = max(trained, key=lambda other: same[other.label], default=None)
    distributed.barrier()  # all ranks have looked before one of them changes what is there
    if source is None or same[source.label] <= done or member.folder == source.folder:
        return
    shared = range(done, same[source.label])
    if distributed.rank() == 0:
        pairs: list[tuple[StudentFolder, StudentFolder]]
        pairs = [(source.folder.start, member.folder.start)]
        pairs += [(source.stages[i], member.stages[i]) for i in shared]
        for theirs, own in pairs:
            if theirs.path.is_dir() and not own.done.exists():
                write_folder(own.path, partial(link_folder, theirs.path))
        describe(member, recipe)
        names = ", ".join(member.recipe.stages[i].name for i in shared)
        say(f"{member.label}: {names} as in {source.label}")
    distributed.barrier()


def _common_stages(member: Member, other: Member) -> int:
    """How many of the other's finished stages begin both recipes."""
    finished = (folder.is_done() for folder in other.stages)
    return min(common_stages(member.recipe, other.recipe), len(list(takewhile(bool, finished))))
