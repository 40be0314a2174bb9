"""A loss that is not finite ends the run before it is saved, and the run can resume."""

import json

import pytest
import torch

from mmkd.errors import NonFiniteLossError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.training import stage
from mmkd.training.checkpoint import find_checkpoints
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

ENGINES = {
    "torch": {"kind": "torch"},
    "zero2": {"kind": "deepspeed", "zero": 2},
    "zero3": {"kind": "deepspeed", "zero": 3},
}


@pytest.mark.parametrize("engine", only(["torch", "zero3"], ENGINES))
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_no_number(scenes_dir, tiny_model_dir, tmp_path, monkeypatch, engine, where):
    def run(name):
        settings = {
            "steps": 8,
            "checkpoint": {"interval": 2},
            "engine": {"device": "cpu", **ENGINES[engine]},
        }
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, stage=settings)
        return pipeline.run(load_recipe(raw)) / "01-mimic"

    def losses(folder):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    whole = run("whole")
    made = stage.Stage._losses
    steps = []

    def poisoned(self, batch, *settings):
        found, counts = made(self, batch, *settings)
        steps.append(1)
        if len(steps) == 6:
            loss = found["loss"]
            if where == "loss":
                found = {**found, "loss": loss * float("nan")}
            else:
                loss.register_hook(lambda gradient: gradient * float("nan"))
        return found, counts

    with monkeypatch.context() as patch:
        patch.setattr(stage.Stage, "_losses", poisoned)
        with pytest.raises(NonFiniteLossError, match="not finite at step 6, samples: train-"):
            run("broken")
    folder = tmp_path / "broken" / "01-mimic"
    assert [p.name for p in find_checkpoints(folder / "checkpoints")] == ["step-4"]
    assert len(losses(folder)) == 5
    assert losses(run("broken")) == losses(whole)
    assert torch.isfinite(torch.tensor(losses(folder))).all()
