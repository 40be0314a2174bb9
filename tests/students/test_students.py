"""Conversions and parameter groups on real families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model
from mmkd.recipe import DepthPruningConfig, ModelConfig, WidthPruningConfig
from mmkd.students import convert, set_trainable
from mmkd_models.parts import find_parts, parameter_groups

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 4}  # fmt: skip
FAMILIES = {
    "llava": {
        "text_config": {"model_type": "llama", **SMALL},
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
    },
    "qwen2_5_vl": {
        "text_config": {
            **SMALL,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **SMALL},
        "vision_config": {**TOWER, "image_size": 16},
    },
}


def family(name):
    config = AutoConfig.for_model(name, **FAMILIES[name])
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_and_groups_cover_every_parameter(name):
    model = family(name)
    parts = find_parts(model)
    assert len(parts.decoder_layers) == len(parts.vision_layers) == 3
    groups = parameter_groups(model)
    everything = {n for n, _ in model.named_parameters()}
    parted = groups["vision"] + groups["connector"] + groups["language_model"]
    assert sorted(parted) == sorted(everything)
    assert groups["connector"]
    assert set(groups["embeddings"]) <= set(groups["language_model"])


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_layers_changes_nothing(name):
    model = family(name)
    ids = torch.arange(10, 20)[None]
    want = model(input_ids=ids).logits
    convert(model, [DepthPruningConfig(kind="depth_pruning", decoder=[0, 1, 2], vision=[0, 1, 2])])
    assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_layers_are_the_named_ones_and_reload(name, tmp_path):
    model = family(name)
    layers = list(find_parts(model).decoder_layers)
    report = convert(model, [DepthPruningConfig(kind="depth_pruning", decoder=[0, 2], vision=[1])])
    kept = find_parts(model)
    assert [id(x) for x in kept.decoder_layers] == [id(layers[0]), id(layers[2])]
    assert len(kept.vision_layers) == 1
    assert report.after < report.before
    ids = torch.arange(10, 20)[None]
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = load_model(ModelConfig(model=str(tmp_path)))
    assert torch.equal(again(input_ids=ids).logits, want)
    out = again.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] >= 11


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_neurons_changes_nothing(name):
    model = family(name)
    ids = torch.arange(10, 20)[None]
    want = model(input_ids=ids).logits
    convert(model, [WidthPruningConfig(kind="width_pruning", decoder=48, vision=48)])
    assert torch.equal(model(input_ids=ids).logits, want)


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_that_say_nothing_go_first(name, tmp_path):
    """With the output of half of the neurons at zero, cutting them away changes nothing."""
    model = family(name)
    with torch.no_grad():
        for layer in find_parts(model).decoder_layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    ids = torch.arange(10, 20)[None]
    want = model(input_ids=ids).logits
    report = convert(model, [WidthPruningConfig(kind="width_pruning", decoder=24, vision=12)])
    torch.testing.assert_close(model(input_ids=ids).logits, want)
    assert report.lines == [
        "decoder: kept 24 of 48 neurons per layer",
        "vision: kept 12 of 48 neurons per layer",
    ]
    model.save_pretrained(tmp_path)
    again = load_model(ModelConfig(model=str(tmp_path)))
    torch.testing.assert_close(again(input_ids=ids).logits, want)
    assert sum(p.numel() for p in again.parameters()) == report.after < report.before


def test_more_neurons_than_there_are_is_refused():
    with pytest.raises(RecipeError, match="cannot keep 49 of 48 neurons"):
        convert(family("llava"), [WidthPruningConfig(kind="width_pruning", decoder=49)])


@pytest.mark.parametrize("kept", [[], [0, 0], [3], [-1]])
def test_impossible_layers_are_refused(kept):
    with pytest.raises(RecipeError, match="cannot keep layers"):
        convert(family("llava"), [DepthPruningConfig(kind="depth_pruning", decoder=kept)])


def test_unknown_groups_are_refused_with_the_nearest_name():
    model = family("llava")
    with pytest.raises(RecipeError, match="did you mean 'connector'"):
        set_trainable(model, ["conector"])
    names = set_trainable(model, ["connector", "head"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)
    assert any("lm_head" in n for n in names)
