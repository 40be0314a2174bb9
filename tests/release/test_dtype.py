"""`release: {dtype: ...}`: weights in another number format, and settings of older runs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkd.errors import CheckpointError
from mmkd.modeling.loading import load_pretrained
from mmkd.recipe import load_recipe
from mmkd.release import dtype as release_dtype
from mmkd.release import release
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from tests.support.recipes import tiny_recipe

CONVERT = [
    {"kind": "mamba", "keep_attention": [0]},
    {"kind": "moe", "layers": [1], "experts": 2, "top_k": 1},
]


@pytest.fixture(scope="module")
def run(scenes_dir, tiny_model_dir, tmp_path_factory):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path_factory.mktemp("runs"),
        stage={"steps": 1},
        student={"model": str(tiny_model_dir), "convert": CONVERT},
        release={"dtype": "bfloat16", "license": "mit"},
    )
    return pipeline.run(load_recipe(raw))


def released(run, out, *overrides):
    release(run, out=out, overrides=list(overrides))
    return load_file(out / "model.safetensors"), (out / "README.md").read_text()


def test_weights_are_the_students_rounded_once(run, tmp_path, capsys):
    student = load_file(run / "01-mimic" / "student" / "model.safetensors")
    weights, card = released(run, tmp_path / "half")
    assert weights.keys() == student.keys()
    kept = {n.rpartition(".")[2] for n, t in weights.items() if t.dtype == torch.float32}
    assert {"A_log", "dt_bias", "D"} <= kept
    assert not any(
        n.endswith("q_proj.weight") and weights[n].dtype != torch.bfloat16 for n in weights
    )
    for name, tensor in weights.items():
        assert torch.equal(tensor, student[name].to(tensor.dtype)), name
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"
    model = load_pretrained(str(tmp_path / "half"), dtype="auto")
    assert model.dtype == torch.bfloat16
    assert "of weights in bfloat16" in card
    single, card = released(run, tmp_path / "whole", "dtype=null")
    assert all(torch.equal(single[n], student[n]) for n in student)
    assert "of weights in float32" in card
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_a_dry_run_shows_the_smaller_size_and_writes_nothing(run, tmp_path, capsys):
    release(run, out=tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    planned = release_dtype.Rounded(run / "01-mimic/student/model.safetensors", "bfloat16").size
    whole = (run / "01-mimic/student/model.safetensors").stat().st_size
    assert 0.4 * whole < planned < 0.6 * whole


def test_what_does_not_fit_or_differs_is_not_released(run, tmp_path, monkeypatch):
    path = run / "01-mimic" / "student" / "model.safetensors"
    held = path.read_bytes()
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    try:
        weights[name][0, 0] = 1e6
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(
            CheckpointError, match=r"q_proj.weight has values outside the range of float16"
        ):
            release(run, out=tmp_path / "out", overrides=["dtype=float16"])
    finally:
        path.write_bytes(held)
    save = release_dtype.load_pretrained

    def spoilt(*arguments, **settings):
        model = save(*arguments, **settings)
        if settings["dtype"] != "auto":
            model.get_input_embeddings().weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(release_dtype, "load_pretrained", spoilt)
    with pytest.raises(CheckpointError, match="is not the student's weight in this dtype"):
        release(run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_of_an_older_run_gets_its_end_of_turn(run, tmp_path):
    path = run / "01-mimic" / "student" / "generation_config.json"
    held = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(held), "eos_token_id": 2}))
        released(run, tmp_path / "out", "dtype=null")
    finally:
        path.write_text(held)
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [1, 2]
