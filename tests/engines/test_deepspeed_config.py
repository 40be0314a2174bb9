"""DeepSpeed's config: from the recipe, from a file, and contradictions between the two."""

import json

import pytest

pytest.importorskip("deepspeed")

from mmkd.engines.deepspeed_config import resolve
from mmkd.errors import RecipeError
from mmkd.recipe import StageConfig


def stage(engine, **changes):
    raw = {
        "name": "mimic",
        "objectives": [{"kind": "ce"}],
        "steps": 4,
        "batch": {"size": 4, "accumulate": 2},
        "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
        "engine": {"kind": "deepspeed", "device": "cpu", **engine},
        **changes,
    }
    return StageConfig.model_validate(raw)


@pytest.fixture
def file(tmp_path):
    def write(settings):
        path = tmp_path / "zero.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return str(path)

    return write


def test_without_a_file_the_recipe_says_it_all():
    made = resolve(stage({}))
    assert made["zero_optimization"] == {"stage": 2}
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 2
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": False}


def test_clipping_that_is_off_is_written_down():
    made = resolve(stage({}, optimizer={"lr": 1e-3, "max_grad_norm": 0}))
    assert made["gradient_clipping"] == 0  # left out it would mean 1


def test_a_file_fills_in_what_the_recipe_leaves_open(file):
    settings = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": "auto"},
        "train_batch_size": "auto",
        "gradient_clipping": 0.5,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "wall_clock_breakdown": False,
    }
    made = resolve(stage({"config": file(settings)}))
    assert made["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}
    assert made["train_batch_size"] == 8
    assert made["wall_clock_breakdown"] is False
    assert "optimizer" not in made
    assert "scheduler" not in made
    assert "auto" not in json.dumps(made)


def test_offload_is_zeros_own_setting():
    made = resolve(stage({"zero": 3, "offload": "all"}))["zero_optimization"]
    assert made["offload_optimizer"]["device"] == made["offload_param"]["device"] == "cpu"
    assert "offload_param" not in resolve(stage({"offload": "optimizer"}))["zero_optimization"]


@pytest.mark.parametrize(
    ("engine", "settings", "changes", "message"),
    [
        ({"zero": 2}, {"zero_optimization": {"stage": 3}}, {}, "stage is 3, the recipe says 2"),
        ({}, {"gradient_clipping": 1.0}, {}, "gradient_clipping is 1.0, the recipe says 0.5"),
        ({}, {"gradient_accumulation_steps": 8}, {}, "recipe says 2"),
        ({}, {"fp16": {"enabled": True}}, {}, "fp16.enabled is True"),
        ({}, {"optimizer": {"params": {"lr": 1.0}}}, {}, "params.lr is 1.0, the recipe says 0.001"),
        ({}, {"optimizer": {"type": "Lion"}}, {}, "type is 'Lion'"),
        (
            {},
            {"scheduler": {"params": {"warmup_num_steps": 5}}},
            {},
            "brings a scheduler of its own",
        ),
        ({}, "no json", {}, "cannot read the DeepSpeed file"),
        ({}, "[]", {}, "one JSON object"),
        ({"zero": 0}, {}, {"precision": "bfloat16"}, "no float32 master weights"),
        ({"zero": 0, "offload": "optimizer"}, {}, {}, "stage 0 offloads nothing"),
        ({"zero": 2, "offload": "all"}, {}, {}, "only stage 3 offloads weights"),
        ({"zero": 1}, {}, {"optimizer": {"kind": "adafactor"}}, "flat pieces"),
        ({"zero": 3}, {}, {"on_policy": {}}, "gather all weights"),
    ],
)
def test_what_contradicts_is_named(file, engine, settings, changes, message):
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(stage({**engine, "config": file(settings)}, **changes))
    assert "stage mimic" in str(caught.value) or "zero.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_deepspeed_on_the_torch_engine_are_refused():
    with pytest.raises(ValueError, match="'zero' is for kind deepspeed"):
        stage({"kind": "torch", "zero": 2})


def test_a_total_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="total 6 is not a multiple of size 4 x 2 processes"):
        resolve(stage({}, batch={"size": 4, "total": 6}))
    made = resolve(stage({}, batch={"size": 4, "total": 16}))
    assert made["gradient_accumulation_steps"] == 2
    assert made["train_batch_size"] == 16
