"""Which recipe a run's folder goes on with."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from mmkd.errors import RecipeError
from mmkd.files import read_yaml
from mmkd.recipe import Recipe, load_recipe


def refuse_other_recipe(recipe: Recipe, folder: Path) -> None:
    """A folder in which something was trained may only go on with the same recipe.

    Raises:
        RecipeError: it is another one; the keys that differ are named.
        CheckpointError: the folder does not say any more which one it was.
    """
    path = folder / "training.yaml"
    started = any(folder.glob("*/done.json")) or any(folder.glob("*/checkpoints/*"))
    if not path.exists() or not started:
        return
    found = read_yaml(path)
    with suppress(RecipeError):  # keys that are new since have their defaults
        found = load_recipe(found).model_dump(mode="json")
    found, wanted = (_without_layout(r) for r in (found, recipe.model_dump(mode="json")))
    if found != wanted:
        raise RecipeError(
            f"the folder holds a run of another recipe, it differs in "
            f"{', '.join(_differences(found, wanted))}",
            where=str(folder),
            mend="give the run another name, or delete the folder",
        )


def _without_layout(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without what may change between a stage's beginning and its end: where and in which
    pieces it runs, and where its charts go. How many records a step sees is for the checkpoint to
    tell."""
    layout = ("engine", "batch", "checkpoint", "activation_checkpointing")
    stages = [{k: v for k, v in s.items() if k not in layout} for s in recipe["stages"]]
    return {**recipe, "stages": stages, "report_to": []}


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
