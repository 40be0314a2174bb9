"""A recipe from start to end: stages in order, resume, evaluation.

runs/<name>/
  recipe.yaml  provenance.json
  <member>/                     the recipe itself and its variants, once per seed
    training.yaml               what is trained here; another recipe may not continue it
    00-start/student/           from-scratch or converted students only
    01-<stage>/ metrics.jsonl  checkpoints/  student/  done.json
  evaluation/<member>/ results.json  samples/
  report.html
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, set_seed

from mmkd import provenance
from mmkd.engines import distributed
from mmkd.errors import RecipeError
from mmkd.files import read_json, write_folder, write_json, write_text
from mmkd.loading import load_model, load_processor, shared_vocabulary
from mmkd.progress import console
from mmkd.recipe import ModelConfig, Recipe, StageConfig, load_recipe, to_yaml
from mmkd.stage import run_stage, save_student
from mmkd.students import convert

TEACHER = "teacher"


@dataclass(frozen=True)
class Member:
    """One student of a run: the recipe or one of its variants, with one seed."""

    label: str
    recipe: Recipe
    folder: Path

    def stage_folder(self, index: int) -> Path:
        return self.folder / f"{index + 1:02d}-{self.recipe.stages[index].name}"

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.stage_folder(len(self.recipe.stages) - 1) / "student"


def run_folder(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / recipe.name


def members(recipe: Recipe) -> list[Member]:
    """The recipe and its variants, each once per seed, in a fixed order."""
    alone = not recipe.variants and not recipe.seeds
    found = []
    for seed in recipe.seeds or [recipe.seed]:
        for label, overrides in {recipe.label: [], **recipe.variants}.items():
            raw = recipe.model_dump(mode="json")
            raw |= {"variants": {}, "seeds": [], "evaluate": None, "seed": seed, "label": label}
            name = f"{label}-seed{seed}" if recipe.seeds else label
            folder = run_folder(recipe) if alone else run_folder(recipe) / name
            found.append(Member(name, load_recipe(raw, overrides), folder))
    return found


def run(recipe: Recipe) -> Path:
    """Train every member, evaluate, and return the run's folder.

    A second call on the same folder continues: finished stages are skipped, an unfinished one
    resumes from its newest checkpoint, finished evaluations are kept.

    Raises:
        RecipeError: the folder holds a run of another recipe.
    """
    folder = run_folder(recipe)
    device = distributed.choose_device(recipe.stages[0].engine.device)
    distributed.connect(device)
    todo = members(recipe)
    for member in todo:
        claim(member)
    if distributed.rank() == 0:
        write_text(folder / "recipe.yaml", to_yaml(recipe))
        write_json(folder / "provenance.json", provenance.collect(recipe))
    distributed.barrier()
    for member in todo:
        train(member)
    if distributed.rank() == 0:
        evaluate(recipe, todo)
    distributed.barrier()
    return folder


def claim(member: Member) -> None:
    """Mark the folder as this member's, or refuse it."""
    path = member.folder / "training.yaml"
    raw = yaml.safe_load(to_yaml(member.recipe))
    if not path.exists():
        if distributed.rank() == 0:
            write_text(path, to_yaml(member.recipe))
        return
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if found != raw:
        keys = ", ".join(_differences(found, raw))
        raise RecipeError(
            f"the folder holds a run of another recipe, it differs in {keys}",
            where=str(member.folder),
            mend="give the run another name, or delete the folder",
        )


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The dotted keys in which two recipes differ, three at most."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(k, a.get(k), b.get(k)) for k in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(i), x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [path] if a != b else []
    inner = [d for k, x, y in pairs for d in _differences(x, y, f"{path}.{k}" if path else k)]
    return inner[:3]


def train(member: Member) -> None:
    """Run the member's unfinished stages."""
    recipe = member.recipe
    pending = [i for i in range(len(recipe.stages)) if not _is_done(member.stage_folder(i))]
    if not pending:
        console.print(f"{member.label}: already trained", highlight=False)
        return
    teacher = _teacher(recipe, [recipe.stages[i] for i in pending])
    for index in pending:
        stage, folder = recipe.stages[index], member.stage_folder(index)
        source = member.stage_folder(index - 1) / "student" if index else start(member)
        student_source = (
            source
            if isinstance(source, ModelConfig)
            else recipe.student.model_copy(
                update={"model": str(source), "config": None, "processor": None, "revision": None}
            )
        )
        processor = load_processor(student_source)
        shared = None
        if teacher is not None:
            shared = shared_vocabulary(processor.tokenizer, _teacher_tokenizer(recipe))
        console.rule(f"{member.label}: stage {stage.name}")
        run_stage(
            stage,
            student=load_model(student_source),
            processor=processor,
            teacher=teacher,
            shared_vocabulary=shared,
            data=recipe.stage_data(stage),
            folder=folder,
            seed=recipe.seed + index,
        )
        if distributed.rank() == 0:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        distributed.barrier()


def start(member: Member) -> Path | ModelConfig:
    """The student before its first stage: its folder, or its source where nothing changes it."""
    config = member.recipe.student
    if config.config is None and not config.convert:
        return config
    folder = member.folder / "00-start"
    if not _is_done(folder) and distributed.rank() == 0:
        set_seed(member.recipe.seed)
        student = load_model(config)
        report = convert(student, config.convert)
        for line in report.lines:
            console.print(line, highlight=False)
        processor = load_processor(config)
        write_folder(folder / "student", lambda path: save_student(student, processor, path))
        write_json(
            folder / "done.json",
            {"before": report.before, "after": report.after, "changes": report.lines},
        )
    distributed.barrier()
    return folder / "student"


def _is_done(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _teacher(recipe: Recipe, stages: list[StageConfig]) -> PreTrainedModel | None:
    from mmkd.objectives import REGISTRY

    kinds = {o.kind for s in stages for o in s.objectives}
    if recipe.teacher is None or not any("teacher" in REGISTRY[k].needs for k in kinds):
        return None
    return load_model(recipe.teacher)


def _teacher_tokenizer(recipe: Recipe) -> Any:
    assert recipe.teacher is not None
    return load_processor(recipe.teacher).tokenizer


def evaluate(recipe: Recipe, trained: list[Member]) -> None:
    """Score the finished students, and the teacher, with lmms-eval."""
    if recipe.evaluate is None:
        return
    from mmkd.evaluation.run import evaluate as score

    settings = recipe.evaluate
    sources: dict[str, str] = {m.label: str(m.student) for m in trained}
    if recipe.teacher is not None and recipe.teacher.model and settings.teacher:
        sources = {TEACHER: recipe.teacher.model, **sources}
    for label, source in sources.items():
        out = run_folder(recipe) / "evaluation" / label
        request = {"model": source, **settings.model_dump(mode="json")}
        if (out / "request.json").exists() and read_json(out / "request.json") == request:
            continue
        console.rule(f"{label}: evaluation")
        score(
            source,
            tasks=settings.tasks,
            include_path=Path(settings.include) if settings.include else None,
            out=out,
            batch_size=settings.batch_size,
            limit=settings.limit,
        )
        write_json(out / "request.json", request)
