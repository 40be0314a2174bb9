"""Pieces for a training loop of one's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.api.records import data_of
from mmkd.data.encoder import Encoder
from mmkd.objectives import Objective, ObjectiveConfig
from mmkd.objectives import build_objective as build
from mmkd.recipe import load_recipe

ObjectiveLike = str | Mapping[str, Any] | ObjectiveConfig
"""An objective's kind, such as "kl"; or its keys as in a recipe; or its settings."""


def build_objective(objective: ObjectiveLike) -> Objective:
    """An objective, for `score`.

    Args:
        objective: its kind, such as "kl", or its keys as in a recipe.

    Raises:
        RecipeError: it has an unknown kind or key, or a value that cannot be.
    """
    stage = {"name": "stage", "steps": 1, "objectives": [keys_of(objective)]}
    raw = {"name": "x", "student": {"model": "x"}, "data": {"train": "x"}, "stages": [stage]}
    return build(load_recipe(raw).stages[0].objectives[0])


def keys_of(objective: ObjectiveLike) -> dict[str, Any]:
    """The keys of an objective as a recipe has them."""
    if isinstance(objective, str):
        return {"kind": objective}
    if isinstance(objective, ObjectiveConfig):
        return objective.model_dump(mode="json")
    return dict(objective)


def build_encoder(
    dataset: Any,
    processor: Any,
    objectives: Sequence[Objective] = (),
    *,
    images: str | Path | None = None,
    teacher_processor: Any = None,
    **data: Any,
) -> Encoder:
    """What makes batches of records: `encoder.encode([0, 1])` is one of the first two.

    Args:
        dataset: records as in `distill`.
        processor: the student's.
        objectives: which of a record's parts are needed, such as the rejected answers of pairs.
        images: the folder of image paths.
        teacher_processor: the teacher's, if it is another one than the student's.
        data: further keys of a recipe's `data`, such as `max_length`.

    Raises:
        DataError: there are no records.
    """
    config = data_of(dataset, images, None, data)
    settings = [o.config for o in objectives]
    return Encoder.of(settings, config, processor, teacher_processor=teacher_processor)
