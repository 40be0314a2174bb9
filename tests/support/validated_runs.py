"""Tiny runs that measure held-out records."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.training import stage
from tests.support.recipes import tiny_recipe


def validated_recipe(
    scenes_dir,
    tiny_model_dir,
    folder,
    name="tiny",
    *,
    validation=None,
    held_out=True,
    data=None,
    **changes,
):
    """A tiny recipe of two steps by cross-entropy and KL.

    Args:
        folder: of its run.
        validation: the stage's.
        held_out: whether the data have held-out records.
        data: further keys of the data.
        changes: of the recipe, or of its stage by the key `stage`.
    """
    own = {"train": str(scenes_dir / "train.parquet"), "max_length": 128, **(data or {})}
    if held_out:
        own.setdefault("validation", str(scenes_dir / "validation.parquet"))
    stage = {
        "objectives": [{"kind": "ce"}, {"kind": "kl"}],
        "steps": 2,
        "batch": {"size": 2},
        "checkpoint": {"interval": 1, "keep_last": 1},
        **({"validation": validation} if validation is not None else {}),
        **changes.pop("stage", {}),
    }
    return tiny_recipe(
        scenes_dir, tiny_model_dir, folder, name=name, data=own, stage=stage, **changes
    )


def lines(folder: Path, file: str = "validation.jsonl") -> list[dict]:
    path = folder / "01-mimic" / file
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "01-mimic" / "student" / "model.safetensors")


def run(raw: dict) -> Path:
    return pipeline.run(load_recipe(raw))


def same_weights(a: Path, b: Path) -> bool:
    mine, theirs = weights(a), weights(b)
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def losses(folder: Path) -> list[dict]:
    """The steps' metrics without what the clock says."""
    return [{**line, "seconds": 0} for line in lines(folder, "metrics.jsonl")]


class Broken(Exception):  # noqa: N818
    pass


def break_off(monkeypatch, at: int) -> None:
    """A run stops before a step, as a kill would; the step before has left a checkpoint."""
    step = stage.Stage.step

    def watched(self, number, batches):
        if number == at:
            raise Broken
        return step(self, number, batches)

    monkeypatch.setattr(stage.Stage, "step", watched)
