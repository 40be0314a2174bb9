"""How long stages take: their steps, and the seconds per step that `mmkd bench` measured and wrote
to the run's folder for `mmkd plan`."""

import hashlib
import json
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.errors import MmkdError
from mmkd.recipe import DataConfig, Recipe, StageConfig
from mmkd.runs.members import run_folder
from mmkd.runs.provenance import processor_name
from mmkd.runtime import distributed
from mmkd.runtime.files import write_json
from mmkd.runtime.shapes import Shape, read_if

NOT_TIMED = {"label", "name", "seed", "output_dir", "report_to", "evaluate", "release", "variants",
             "seeds"}  # fmt: skip
"""Keys of a recipe on which the time of a step does not depend."""
LENGTH = {"name", "steps", "epochs", "checkpoint", "optimizer", "schedule"}
"""The same for keys of a stage. The kind of optimizer is added separately."""


def timing_file(recipe: Recipe, index: int) -> Path:
    """The file with the timing of a stage. Stages whose steps take the same time, such as the
    rounds of a stage, have the same file."""
    return run_folder(recipe).timings / f"{stage_kind(recipe, index)}.json"


def keep_timing(recipe: Recipe, index: int, found: dict[str, Any]) -> Path:
    """Write the timing of a stage by `mmkd bench`; returns the file."""
    path = timing_file(recipe, index)
    write_json(path, {**found, "machine": _machine(recipe, index)})
    return path


def seconds_per_step(recipe: Recipe, index: int) -> float | None:
    """Seconds per step of a stage on this machine; None if it was not timed here."""
    found = read_if(Shape, timing_file(recipe, index)) or {}
    seconds = found.get("seconds")
    if found.get("machine") != _machine(recipe, index) or not isinstance(seconds, int | float):
        return None
    return float(seconds)


def stage_kind(recipe: Recipe, index: int) -> str:
    """A hash of the settings that the time of a stage's steps depends on."""
    stage = recipe.stages[index]
    content = {
        "recipe": recipe.model_dump(mode="json", exclude={*NOT_TIMED, "stages"}),
        "converted": [
            c.model_dump(mode="json") for s in recipe.stages[: index + 1] for c in s.convert
        ],
        "stage": stage.model_dump(mode="json", exclude=LENGTH),
        "optimizer": stage.optimizer.kind,
    }
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _machine(recipe: Recipe, index: int) -> dict[str, Any]:
    device = distributed.choose_device(recipe.stages[index].engine.device)
    there = device.type == "cuda" and torch.cuda.is_available()  # `imagined` GPUs are not there
    name = torch.cuda.get_device_name(device) if there else processor_name()
    return {
        "device": device.type,
        "name": name,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
    }


def steps_of(recipe: Recipe, stage: StageConfig) -> int | None:
    """Optimizer steps of a stage; None if its records cannot be counted."""
    if stage.steps is not None:
        return stage.steps
    try:
        records = _records(recipe.stage_data(stage).model_dump_json())
    except MmkdError:
        return None
    return steps_over(stage, records)


def steps_over(stage: StageConfig, records: int) -> int:
    """Optimizer steps of a stage whose epoch has `records` records."""
    per_step = stage.batch.records_per_step(distributed.world_size())
    return stage.steps or max(1, round((stage.epochs or 1.0) * records / per_step))


@cache
def _records(data: str) -> int:
    """Records of an epoch, cached because the members of a study have the same data."""
    return len(Mixture(Records(DataConfig.model_validate_json(data)), seed=0))


def common_stages(recipe: Recipe, other: Recipe) -> int:
    """Number of first stages that are equal in both recipes, from the same start. A run trains them
    once."""

    def begin(recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(exclude={"label", "name", "stages", "output_dir"})

    if begin(recipe) != begin(other):
        return 0
    pairs = zip(recipe.stages, other.stages, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
