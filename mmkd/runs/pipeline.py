"""Run a recipe from start to end: stages in order, resuming, evaluation."""

import shutil
from collections.abc import Sequence
from functools import partial
from itertools import compress, takewhile
from pathlib import Path

from mmkd.errors import CheckpointError, RecipeError
from mmkd.making.used import made_for
from mmkd.recipe import Recipe
from mmkd.runs import preflight
from mmkd.runs.end_rounds import end_rounds
from mmkd.runs.evaluate import evaluate
from mmkd.runs.inputs import check_inputs, note_inputs
from mmkd.runs.make_data import make_data, make_stage_data, note_counts, stage_recipe
from mmkd.runs.members import Member, members, run_folder
from mmkd.runs.provenance import describe
from mmkd.runs.resume import Restart, check_stage, find_restart, start_again
from mmkd.runs.start import student_before, write_start
from mmkd.runs.timings import common_stages, stage_kind, steps_of
from mmkd.runtime import distributed
from mmkd.runtime.files import link_folder, read_yaml, write_folder
from mmkd.runtime.progress import Course, say, say_heading
from mmkd.runtime.run_folder import RunFolder, StudentFolder
from mmkd.teachers import TeacherPool, with_stage_teachers
from mmkd.training.build import StageInputs, run_stage
from mmkd.training.callbacks import Callback
from mmkd.training.checkpoint import check_batch
from mmkd.training.trackers import Tracked


def run(
    recipe: Recipe, *, from_stage: str | None = None, callbacks: Sequence[Callback] = ()
) -> Path:
    """Train every member, evaluate, and return the run's folder.

    A second call on the same folder continues: finished stages are skipped, an unfinished one
    resumes from its newest checkpoint, finished evaluations are kept. If the recipe has changed,
    the stages before the first changed one are kept. Recipe, models and data are checked before
    anything is written, except for data that models make (`make`).

    Args:
        recipe: to run.
        from_stage: name of a stage. If the recipe has changed, the work of this stage and later
            ones may be replaced; it is moved, see `mmkd.runs.resume`. Without it, a changed recipe
            is refused.
        callbacks: are called in each stage that is trained.

    Raises:
        MmkdError: a one-line error about recipe, models or data.
        EvaluationError: the students are trained, but a model could not be evaluated.
    """
    first = [] if recipe.assistant is None else recipe.assistant.stages
    timeout_s = max(stage.engine.timeout_s for stage in [*first, *recipe.stages])
    device = distributed.choose_device(recipe.stages[0].engine.device)
    distributed.connect(device, timeout_s=timeout_s)
    with distributed.alone_in(run_folder(recipe).path):
        todo = members(recipe)
        restarts = _find_restarts(recipe, todo, from_stage)
        make_data(recipe, list(compress(todo, _pending(todo, restarts))))
        restarts = _check_all(recipe, todo, restarts, from_stage)
        distributed.barrier()
        _start_again(restarts, from_stage)
        course = _course(todo)
        for number, member in enumerate(todo):
            share_stages(member, todo[:number], recipe)
            train(member, recipe, course, callbacks)
        distributed.barrier()
        if recipe.evaluate is not None:
            evaluate(recipe, todo)
    return run_folder(recipe).path


def _refuse_foreign(folder: RunFolder) -> None:
    """Refuse a folder with a recipe.yaml that no run has written, because a run would overwrite it.

    Raises:
        CheckpointError: the folder has such a file.
    """
    path = folder.recipe
    if not path.is_file() or folder.provenance.exists():
        return
    held = read_yaml(path)
    whole = {"label", "seed", "output_dir", "variants", "seeds", "stages"}  # as a run writes it
    if not isinstance(held, dict) or not whole <= set(held):
        raise CheckpointError(
            "the run's folder has a recipe.yaml that no run has written",
            where=str(path),
            hint="give the run another name or output_dir",
        )


def _find_restarts(
    recipe: Recipe, todo: list[Member], from_stage: str | None
) -> list[Restart | None]:
    """For each member, where it starts again if the recipe has changed. What is refused is refused
    before data are made."""
    _refuse_foreign(run_folder(recipe))
    restarts = [find_restart(member, from_stage) for member in todo]
    check_stage(from_stage, todo, restarts)
    _refuse_other_assistant(todo, restarts)
    return restarts


def _pending(todo: list[Member], restarts: Sequence[Restart | None]) -> list[bool]:
    """Whether each member has stages to train."""
    return [r is not None or not m.is_trained() for r, m in zip(restarts, todo, strict=True)]


def _check_all(
    recipe: Recipe, todo: list[Member], restarts: list[Restart | None], from_stage: str | None
) -> list[Restart | None]:
    """Check recipe, models and data before the run writes anything. Returns for each member where
    it starts again, because of inputs that have changed too."""
    pending = _pending(todo, restarts)
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


def _refuse_other_assistant(todo: list[Member], restarts: list[Restart | None]) -> None:
    """Refuse to train an assistant again if a student of it has begun.

    Raises:
        RecipeError: a student has begun.
    """
    again = {m.label: r for m, r in zip(todo, restarts, strict=True) if r is not None}
    for member in todo:
        changed = None if member.assistant is None else again.get(member.assistant.label)
        if changed is not None and any(folder.is_begun() for folder in member.stages):
            raise RecipeError(
                f"the assistant changes in {', '.join(changed.keys)}, and {member.label} has begun "
                "with it as it was",
                where=str(member.folder.path),
                hint="give the run another name, or delete the folder",
            )


def _check(member: Member, restart: Restart | None) -> None:
    """Check a member's stages, and the checkpoints from which it resumes."""
    preflight.check(member.recipe, assistant=member.untrained_teacher)
    kept = member.recipe.stages[: None if restart is None else restart.index]
    for stage, folder in zip(kept, member.stages, strict=False):
        records = stage.batch.records_per_step(distributed.world_size())
        check_batch(folder.checkpoints, records)


def _start_again(restarts: list[Restart | None], from_stage: str | None) -> None:
    """Move the work of stages that start again, because the recipe has changed."""
    if distributed.rank() == 0:
        changed = [restart for restart in restarts if restart is not None]
        for restart in changed:
            target = start_again(restart)
            say(f"{restart}; the earlier work is in {target}")
        if from_stage is not None and not changed:
            say(f"--from-stage {from_stage}: the recipe has not changed, nothing is trained again")
    distributed.barrier()


def _course(todo: list[Member]) -> Course:
    """The stages that are not trained yet, in order; stages that members share occur once."""
    steps: dict[str, int | None] = {}
    kinds: dict[str, str] = {}
    for number, member in enumerate(todo):
        shared = (common_stages(member.recipe, other.recipe) for other in todo[:number])
        for index in range(max(shared, default=0), len(member.recipe.stages)):
            folder = member.stages[index]
            if not folder.is_done():
                own = stage_recipe(member, index)
                steps[str(folder.path)] = steps_of(own, own.stages[index])
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
    pool = TeacherPool()
    for index, folder in enumerate(member.stages):
        if not folder.is_done():
            _train_stage(member, index, recipe, pool, course, callbacks)
            _tidy(member)
            distributed.barrier()


def _train_stage(
    member: Member,
    index: int,
    recipe: Recipe,
    pool: TeacherPool,
    course: Course,
    callbacks: Sequence[Callback],
) -> None:
    """Run a stage with its teachers. Nothing here refers to them afterwards, so that the pool can
    release them."""
    stages, folder = member.recipe.stages, member.stages[index]
    config, own = stages[index], stage_recipe(member, index)
    place = f"stage {index + 1} of {len(stages)}"
    if distributed.rank() == 0:
        say_heading(f"{member.label}: {place}, {config.name}")
    if made_for(member.recipe, index):
        write_start(member, index, recipe)
        pool.release()  # the models that make data need the memory
        if (empty := make_stage_data(member, index)) is not None:
            describe(member, recipe)
            end_rounds(member, index, empty)
            return
    teachers = pool.for_stage(with_stage_teachers(member.recipe, config, member.folder), config)
    write_start(member, index, recipe)
    student, processor = student_before(member, index)
    describe(member, recipe)  # not before the models are loaded: an error leaves nothing on disk
    if distributed.rank() == 0:
        note_inputs(member, index)
        note_counts(member, index)
    with course.part(str(folder.path), place):
        inputs = StageInputs(
            config=config,
            student=student,
            processor=processor,
            teachers=teachers,
            data=own.stage_data(own.stages[index]),
            folder=folder.path,
            seed=member.recipe.seed + index,
            tracked=Tracked(member.recipe, run_folder(recipe).path, folder.path),
            callbacks=callbacks,
        )
        run_stage(inputs)


def _tidy(member: Member) -> None:
    """Delete checkpoints of finished stages, which a run that was killed after a stage has left."""
    for folder in member.stages:
        written = any(folder.student.glob("*.safetensors"))  # otherwise the checkpoints are needed
        if distributed.rank() == 0 and written and folder.is_done():
            shutil.rmtree(folder.checkpoints, ignore_errors=True)


def share_stages(member: Member, trained: list[Member], recipe: Recipe) -> None:
    """Copy stages that another member has trained with the same settings from the same start. Their
    results would be identical."""
    done = sum(folder.is_done() for folder in member.stages)
    same = {other.label: _common_stages(member, other) for other in trained}
    source = max(trained, key=lambda other: same[other.label], default=None)
    distributed.barrier()  # all ranks have read the folder before one of them changes it
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
    """Number of the other member's finished stages at the start of both recipes."""
    finished = (folder.is_done() for folder in other.stages)
    return min(common_stages(member.recipe, other.recipe), len(list(takewhile(bool, finished))))
