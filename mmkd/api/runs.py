"""A recipe from start to end, as `mmkd run` does it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import EvaluationError
from mmkd.recipe import Recipe, load_recipe
from mmkd.report import write_report
from mmkd.runs import pipeline
from mmkd.runtime import distributed
from mmkd.training.callbacks import Callback


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    from_stage: str | None = None,
    report: bool = True,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train and evaluate every student of a recipe, and write its report.

    A second call continues where the first stopped. With several processes (torchrun), each calls
    it with the same recipe; if the recipe has an evaluation, the processes part during it, and the
    first one ends it.

    Args:
        recipe: a recipe, its YAML file, or its keys and values.
        overrides: `key.path=value`, as on the command line; for a file or keys and values.
        from_stage: if the recipe has changed since: train again from this stage on.
        report: write `report.html` into the run's folder.
        callbacks: called at moments of every stage that is trained.

    Returns:
        The run's folder.

    Raises:
        MmkdError: in one line, what is wrong with recipe, models or data. Nothing is written then.
        EvaluationError: the students are trained, and some model could not be evaluated.
    """
    if not isinstance(recipe, Recipe):
        source = dict(recipe) if isinstance(recipe, Mapping) else recipe
        recipe = load_recipe(source, [*overrides])
    elif overrides:
        raise TypeError("overrides change a file, or keys and values: this recipe is loaded")
    try:
        folder = pipeline.run(recipe, from_stage=from_stage, callbacks=callbacks)
    except EvaluationError:
        if report:
            write_report(pipeline.run_folder(recipe).path)  # without the scores that failed
        raise
    if report and distributed.rank() == 0:
        write_report(folder, use=True)
    return folder
