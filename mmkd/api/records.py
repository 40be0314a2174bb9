"""From the records that a program has to the data of a recipe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.data.sources import memory_source
from mmkd.errors import RecipeError
from mmkd.recipe import DataConfig, HeldOutConfig, load_recipe

HELD_OUT = "held_out"
OWN = {"train": "dataset", "sources": "dataset", "images": "images", "validation": HELD_OUT}
"""Keys of a recipe's `data` that are arguments, and their names."""


def data_of(
    dataset: Any, images: str | Path | None, held_out: Any, settings: Mapping[str, Any]
) -> DataConfig:
    """The `data` of a recipe.

    Args:
        dataset: what `data.train` may be, or records in memory.
        images: the folder of image paths; None for none, or that of the file.
        held_out: a share of the records, or as `dataset`; None for none.
        settings: further keys of `data`.

    Raises:
        RecipeError: a key is unknown, or has a value that cannot be.
        DataError: records in memory have no length or no numbers.
    """
    for key in settings:
        if key in OWN:
            raise RecipeError("it is given twice", where=f"data: {key}", hint=f"use {OWN[key]}=")
    raw: dict[str, Any] = {"train": "dataset", **settings}
    folder = None if images is None else str(images)
    if isinstance(dataset, str | Path):
        raw |= {"train": str(dataset), "images": folder}
    if held_out is not None and (isinstance(held_out, float | str | Path)):
        raw["validation"] = held_out if isinstance(held_out, float) else str(held_out)
    stage = {"name": "stage", "steps": 1, "objectives": [{"kind": "ce"}]}
    recipe = {"name": "x", "student": {"model": "x"}, "data": raw, "stages": [stage]}
    config = load_recipe(recipe).data
    root = None if images is None else Path(images)
    if not isinstance(dataset, str | Path):
        sources = [memory_source(dataset, root)]
        config = config.model_copy(update={"train": None, "sources": sources})
    if held_out is not None and "validation" not in raw:
        sources = [memory_source(held_out, root, name=HELD_OUT)]
        config = config.model_copy(update={"validation": HeldOutConfig(sources=[*sources])})
    return config
