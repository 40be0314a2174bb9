"""Evaluate the models of a run."""

from mmkd.evaluation.models import evaluate_models
from mmkd.recipe import ModelConfig, Recipe
from mmkd.runs.members import Member, run_folder
from mmkd.runtime import distributed
from mmkd.runtime.processes import all_processes
from mmkd.runtime.run_folder import TEACHER
from mmkd.students import written_config


def evaluate(recipe: Recipe, trained: list[Member]) -> None:
    """Score the finished students, and the teacher, with lmms-eval; time their decoding. All
    processes call it; the first one raises its errors, and is alone afterwards."""
    settings = recipe.evaluate
    if settings is None:
        return
    sources: dict[str, ModelConfig] = {}
    if recipe.teacher is not None and recipe.teacher.model and settings.teacher:
        sources[TEACHER] = recipe.teacher
    for member in trained:
        student = member.recipe.student
        if settings.every_stage:
            for stage, folder in zip(member.recipe.stages[:-1], member.stages, strict=False):
                sources[f"{member.label}@{stage.name}"] = written_config(student, folder.student)
        sources[member.label] = written_config(student, member.student)
    device = str(distributed.choose_device(recipe.stages[0].engine.device))
    out = run_folder(recipe).evaluations
    evaluate_models(sources, settings, out, device, all_processes())
