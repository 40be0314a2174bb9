"""A recipe from start to end: stages in order, resume, evaluation.

runs/<name>/
  recipe.yaml  provenance.json
  <member>/                     the recipe itself and its variants, once per seed
    training.yaml               what is trained here; another recipe may not continue it
    00-start/student/           from-scratch or converted students only
    01-<stage>/ metrics.jsonl  skipped.jsonl  checkpoints/  student/  done.json
                start/student/    what a stage that converts starts from
    replaced/                   what a recipe that has changed since has replaced
  evaluation/<member>/ results.json  samples/  answers.json  decode.json
  release/<member>/             what `mmkd release` sends to the Hub
  report.html
"""

import shutil
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from mmkd.cache import Store
from mmkd.errors import CheckpointError
from mmkd.evaluation.models import evaluate_models
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import build_objective
from mmkd.recipe import (
    ModelConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    to_yaml,
)
from mmkd.runs import preflight, provenance
from mmkd.runs.inputs import check_inputs, note_inputs, note_start
from mmkd.runs.resume import (
    Member,
    Restart,
    check_stage,
    find_restart,
    members,
    run_folder,
    start_again,
)
from mmkd.runs.timings import common_stages, stage_kind, steps_of
from mmkd.runtime import consent, distributed
from mmkd.runtime.files import link_folder, read_yaml, write_folder, write_json, write_text
from mmkd.runtime.progress import Course, console, say
from mmkd.runtime.shapes import Done, Started, read_as
from mmkd.students import write_converted
from mmkd.teachers import LiveTeacher, StoredTeacher, Teacher, asks_each, place_teacher
from mmkd.training.build import OWN, run_stage
from mmkd.training.checkpoint import check_batch
from mmkd.training.trackers import Tracked

TEACHER = "teacher"
DAMAGED = "bring it back, or delete it to make again what its folder holds"


def run(recipe: Recipe, *, from_stage: str | None = None) -> Path:
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

    Raises:
        MmkdError: in one line, what is wrong with recipe, models or data.
        EvaluationError: the students are trained, and some model could not be evaluated.
    """
    patience = max(stage.engine.patience for stage in recipe.stages)
    device = distributed.choose_device(recipe.stages[0].engine.device)
    distributed.connect(device, patience=patience)
    with distributed.alone_in(run_folder(recipe)):
        todo = members(recipe)
        restarts = _check_all(recipe, todo, from_stage)
        distributed.barrier()
        _start_again(restarts, from_stage)
        course = _course(todo)
        for number, member in enumerate(todo):
            share_stages(member, todo[:number], recipe)
            train(member, recipe, course)
        distributed.barrier()
        if recipe.evaluate is not None:
            distributed.leave()  # one process scores for hours, and waiting ends in a timeout
            if distributed.rank() == 0:
                evaluate(recipe, todo)
    return run_folder(recipe)


def _refuse_foreign(folder: Path) -> None:
    """A run writes recipe.yaml: refuse a folder whose recipe.yaml a person wrote.

    Raises:
        CheckpointError: it holds one, and no run.
    """
    path = folder / "recipe.yaml"
    if not path.is_file() or (folder / "provenance.json").exists():
        return
    held = read_yaml(path)
    whole = {"label", "seed", "output_dir", "variants", "seeds", "stages"}  # as a run writes it
    if not isinstance(held, dict) or not whole <= set(held):
        raise CheckpointError(
            "the run's folder holds a recipe.yaml that no run has written",
            where=str(path),
            mend="give the run another name or output_dir",
        )


def _check_all(recipe: Recipe, todo: list[Member], from_stage: str | None) -> list[Restart | None]:
    """Look through everything before anything is written; from where each member starts again."""
    _refuse_foreign(run_folder(recipe))
    restarts = [find_restart(member, from_stage) for member in todo]
    check_stage(from_stage, todo, restarts)
    pending = [r is not None or not _is_trained(m) for r, m in zip(restarts, todo, strict=True)]
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
    for index, stage in enumerate(kept):
        records = stage.batch.records_per_step(distributed.world_size())
        check_batch(member.stage_folder(index) / "checkpoints", records)


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


def describe(member: Member, recipe: Recipe) -> None:
    """Write down what is trained, on what and where."""
    if distributed.rank() == 0:
        folder = run_folder(recipe)
        write_text(folder / "recipe.yaml", to_yaml(recipe))
        provenance.write(folder / "provenance.json", recipe)
        write_text(member.folder / "training.yaml", to_yaml(member.recipe))


def _course(todo: list[Member]) -> Course:
    """The stages that are still to train, in order; those that members share come once."""
    steps: dict[str, int | None] = {}
    kinds: dict[str, str] = {}
    for number, member in enumerate(todo):
        shared = (common_stages(member.recipe, other.recipe) for other in todo[:number])
        for index in range(max(shared, default=0), len(member.recipe.stages)):
            folder = member.stage_folder(index)
            if not _is_done(folder):
                steps[str(folder)] = steps_of(member.recipe, member.recipe.stages[index])
                kinds[str(folder)] = stage_kind(member.recipe, index)
    return Course(steps, kinds)


def train(member: Member, recipe: Recipe, course: Course | None = None) -> None:
    """Run the member's unfinished stages; `recipe` is the whole run's, `course` too."""
    course = course or Course({}, {})
    _tidy(member)
    if _is_trained(member):
        say(f"{member.label}: already trained")
        return
    stages = member.recipe.stages
    pending = [i for i in range(len(stages)) if not _is_done(member.stage_folder(i))]
    teacher, teacher_processor = load_teacher(member.recipe, [stages[i] for i in pending])
    others = load_others(member.recipe, [stages[i] for i in pending])
    for index in pending:
        student, processor = _student_before(member, index, recipe)
        describe(member, recipe)
        if distributed.rank() == 0:
            note_inputs(member, index)
        place = f"stage {index + 1} of {len(stages)}"
        if distributed.rank() == 0:
            console.rule(f"{member.label}: {place}, {stages[index].name}")
        with course.part(str(member.stage_folder(index)), place):
            run_stage(
                stages[index],
                student=student,
                processor=processor,
                teacher=teacher,
                teacher_processor=teacher_processor,
                teachers=member.recipe.teachers,
                others=others,
                data=member.recipe.stage_data(stages[index]),
                folder=member.stage_folder(index),
                seed=member.recipe.seed + index,
                tracked=Tracked(member.recipe, run_folder(recipe), member.stage_folder(index)),
            )
        _tidy(member)
        distributed.barrier()


def _tidy(member: Member) -> None:
    """Finished stages need no checkpoints; a run that was killed behind a stage has left some."""
    for index in range(len(member.recipe.stages)):
        folder = member.stage_folder(index)
        written = any((folder / "student").glob("*.safetensors"))  # else it can be made again
        if distributed.rank() == 0 and written and _is_done(folder):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def share_stages(member: Member, trained: list[Member], recipe: Recipe) -> None:
    """Take over the stages that another member has trained in the same way from the same start:
    they would come out the same."""
    count = len(member.recipe.stages)
    done = sum(_is_done(member.stage_folder(i)) for i in range(count))
    same = {other.label: _common_stages(member, other) for other in trained}
    source = max(trained, key=lambda other: same[other.label], default=None)
    distributed.barrier()  # all ranks have looked before one of them changes what is there
    if source is None or same[source.label] <= done or member.folder == source.folder:
        return
    shared = range(done, same[source.label])
    if distributed.rank() == 0:
        folders = ["00-start"] + [member.stage_folder(i).name for i in shared]
        for name in folders:
            there = (member.folder / name / "done.json").exists()
            if (source.folder / name).is_dir() and not there:
                write_folder(member.folder / name, partial(link_folder, source.folder / name))
        describe(member, recipe)
        names = ", ".join(member.recipe.stages[i].name for i in shared)
        say(f"{member.label}: {names} as in {source.label}")
    distributed.barrier()


def _common_stages(member: Member, other: Member) -> int:
    """How many of the other's finished stages begin both recipes."""
    finished = (_is_done(other.stage_folder(i)) for i in range(len(other.recipe.stages)))
    return min(common_stages(member.recipe, other.recipe), len(list(takewhile(bool, finished))))


def _student_before(member: Member, index: int, recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    """Student and processor that stage `index` starts from."""
    config = member.recipe.student
    conversions = member.recipe.stages[index].convert
    if index > 0:
        config = _from_folder(config, _written(member, index - 1))
    elif config.config is not None or config.convert:
        folder = member.folder / "00-start"
        config = _from_folder(config, _converted(member, recipe, config, folder, 0))
    if conversions:
        config = config.model_copy(update={"convert": conversions})
        folder = member.stage_folder(index) / "start"
        config = _from_folder(config, _converted(member, recipe, config, folder, index))
    return load_model(config), load_processor(config)


def _written(member: Member, index: int) -> Path:
    """The student that a finished stage has written; CheckpointError if it was deleted since."""
    stage = member.stage_folder(index)
    if not (stage / "student").is_dir():
        raise CheckpointError(
            "its student is gone",
            where=str(stage),
            mend="bring it back, or delete the stage's folder to train it again",
        )
    return stage / "student"


def _from_folder(config: StudentConfig, folder: Path) -> StudentConfig:
    """The same settings for a student that a run has written, which has its `image_size`, and the
    code of its model."""
    consent.inherit(folder, config.model)
    source = {"model": str(folder), "config": None, "processor": None, "revision": None}
    return config.model_copy(update={**source, "convert": [], "image_size": None})


def _converted(
    member: Member, recipe: Recipe, config: StudentConfig, folder: Path, index: int
) -> Path:
    """Write the from-scratch or converted student that stage `index` starts from; returns its
    folder."""
    if not _is_started(folder) and distributed.rank() == 0:
        report = write_converted(config, folder / "student", seed=member.recipe.seed + index)
        for line in report.lines:
            say(line)
        describe(member, recipe)
        if index == 0:
            note_start(member)
        write_json(
            folder / "done.json",
            {"before": report.before, "after": report.after, "changes": report.lines},
        )
    distributed.barrier()
    return folder / "student"


def _is_done(folder: Path) -> bool:
    """Whether a stage is finished.

    Raises:
        CheckpointError: its `done.json` is damaged.
    """
    path = folder / "done.json"
    return path.exists() and bool(read_as(Done, path, DAMAGED))


def _is_started(folder: Path) -> bool:
    """Whether a stage's converted student is written; raises as `_is_done`."""
    path = folder / "done.json"
    return path.exists() and bool(read_as(Started, path, DAMAGED))


def _is_trained(member: Member) -> bool:
    return all(_is_done(member.stage_folder(i)) for i in range(len(member.recipe.stages)))


def load_teacher(
    recipe: Recipe, stages: list[StageConfig]
) -> tuple[Teacher | Literal["self"] | None, Any]:
    """Teacher and its processor, where one of the stages has an objective that needs them; a
    stored one has the student's."""
    needing = [
        s for s in stages if any("teacher" in build_objective(o).needs for o in s.objectives)
    ]
    if recipe.teacher is None or not needing:
        return None, None
    if recipe.teacher.source == "cache":
        assert recipe.teacher.cache is not None
        stored = StoredTeacher(Store(Path(recipe.teacher.cache.folder)))
        return stored, load_processor(recipe.student)
    if recipe.teacher.source == OWN:
        return OWN, load_processor(recipe.student)
    device = distributed.choose_device(needing[0].engine.device)
    teacher = place_teacher(load_model(recipe.teacher), recipe.teacher.placement, device)
    return teacher, load_processor(recipe.teacher)


def load_others(recipe: Recipe, stages: list[StageConfig]) -> dict[str, LiveTeacher]:
    """All teachers but the first, by name, where one of the stages has an objective that asks each
    of them."""
    if not any(asks_each(build_objective(o)) for s in stages for o in s.objectives):
        return {}
    device = distributed.choose_device(recipe.stages[0].engine.device)
    return {t.name: place_teacher(load_model(t), t.placement, device) for t in recipe.more_teachers}


def evaluate(recipe: Recipe, trained: list[Member]) -> None:
    """Score the finished students, and the teacher, with lmms-eval; time their decoding."""
    settings = recipe.evaluate
    if settings is None:
        return
    sources: dict[str, ModelConfig] = {}
    if recipe.teacher is not None and recipe.teacher.model and settings.teacher:
        sources[TEACHER] = recipe.teacher
    for member in trained:
        student = member.recipe.student
        if settings.every_stage:
            for index, stage in enumerate(member.recipe.stages[:-1]):
                folder = member.stage_folder(index) / "student"
                sources[f"{member.label}@{stage.name}"] = _from_folder(student, folder)
        sources[member.label] = _from_folder(student, member.student)
    device = str(distributed.choose_device(recipe.stages[0].engine.device))
    evaluate_models(sources, settings, run_folder(recipe) / "evaluation", device)
