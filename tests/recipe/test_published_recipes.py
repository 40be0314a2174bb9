"""The recipes of the four papers: they run, on tiny models as deep as the papers'."""

import json

import pytest
from safetensors.torch import load_file

from mmkd.modeling.loading import load_config
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd_models.layout import mamba_layers, moe_layers
from tests.recipe.conftest import DEPTH
from tests.support.places import CONFIGS
from tests.support.slow import only

# What becomes Mamba of 32 layers.
LAYERS = {
    "matvlm/mamba_12": [0, 6, 12, 18],
    "matvlm/mamba_25": [0, 4, 8, 12, 16, 20, 24, 28],
    "matvlm/mamba_50": list(range(0, 32, 2)),
    "mmmamba/linear": list(range(32)),
    "mmmamba/hybrid": [i for i in range(32) if i % 4],
    "llava_mod/qwen3_vl": [],
    "llava_mod/preference": [],
    "llava_kd/llava_onevision": [],
}
# of each method the recipe with most in it
QUICK = ["matvlm/mamba_50", "mmmamba/hybrid", "llava_mod/qwen3_vl", "llava_mod/preference"]
QUICK += ["llava_kd/llava_onevision"]
NEW = ("conv_weight", "conv_bias", "dt_proj", "dt_bias", "A_log", "D", "gate_proj", "norm_weight")
QKV = ("q_proj", "k_proj", "v_proj")


def shortened(name, model, scenes, out):
    """The shipped recipe on other models and data, two steps a stage."""
    recipe = load_recipe(CONFIGS / f"{name}.yaml")
    small = {"steps": 2, "epochs": None, "precision": "float32"}
    stages = [
        {**s.model_dump(mode="json"), **small, "batch": {"size": 2, "accumulate": 1}}
        for s in recipe.stages
    ]
    for stage in stages:
        pairs = any(o["kind"] == "preference" for o in stage["objectives"])
        stage["data"] = {"train": str(scenes / f"{'preferences' if pairs else 'train'}.parquet")}
    raw = recipe.model_dump(mode="json") | {
        "output_dir": str(out),
        "teacher": {"model": str(model)},
        "data": {"train": str(scenes / "train.parquet")},
        "stages": stages,
        "variants": {},
        "evaluate": None,
    }
    raw["student"] |= {"model": str(model)}
    return load_recipe(raw)


@pytest.mark.parametrize("name", only(QUICK, LAYERS))
def test_a_published_recipe_runs(name, deep_model_dir, scenes_dir, tmp_path):
    recipe = shortened(name, deep_model_dir, scenes_dir, tmp_path)
    folder = pipeline.run(recipe)
    before = deep_model_dir
    if recipe.student.convert:
        before = folder / "00-start" / "student"
    assert list(mamba_layers(config_of(before))) == LAYERS[name]
    for index, stage in enumerate(recipe.stages, 1):
        done = folder / f"{index:02d}-{stage.name}"
        if stage.convert:
            before = done / "start" / "student"
            assert moe_layers(config_of(before)) == tuple(range(0, DEPTH, 2))
        old, new = (load_file(f / "model.safetensors") for f in (before, done / "student"))
        changed = {n for n in old if not old[n].equal(new[n])}
        assert changed == {n for n in old if belongs(n, LAYERS[name], stage.train.groups)}
        losses = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in losses] == [1, 2]
        before = done / "student"


def config_of(folder):
    return load_config(ModelConfig(model=str(folder)))


def belongs(name, converted, groups):
    """Whether a tensor is one that the groups may change."""
    if "multi_modal_projector" in name:
        return "connector" in groups
    if "vision_tower" in name:
        return False
    if ".router." in name:
        return "moe.router" in groups
    if "language_model" in groups or (".mlp." in name and "ffn" in groups):
        return True
    if not any(f".layers.{i}.self_attn." in name for i in converted):
        return False
    part = name.split(".self_attn.")[1].split(".")[0]
    allowed = {"mamba.new": NEW, "mamba.qkv": QKV, "mamba": (*NEW, *QKV, "o_proj")}
    return any(part in allowed[g] for g in groups if g in allowed)
