"""A model that has diverged: sampling ends with an error."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkd.errors import NonFiniteLossError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe


def test_sampling_of_a_diverged_model_is_one_line(scenes_dir, tiny_model_dir, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model_dir.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    tensors = {name: torch.full_like(t, torch.nan) for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    stage = {
        "objectives": [{"kind": "kl"}],
        "on_policy": {"lmbda": 1, "max_new_tokens": 2},
        "steps": 1,
    }
    raw = tiny_recipe(
        scenes_dir, model, tmp_path, stage=stage, teacher={"model": str(tiny_model_dir)}
    )
    with pytest.raises(NonFiniteLossError, match="no answer can be sampled -- lower the learning"):
        pipeline.run(load_recipe(raw))
