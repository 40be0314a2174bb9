"""Depth pruning: per-layer settings of configs and modules follow the kept layers."""

import copy

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmkd.errors import RecipeError
from mmkd.recipe import DepthPruningConfig
from mmkd.students import convert
from mmkd_models.parts import find_parts
from tests.support import families

DEEP = 6
# what each family's config says of single layers, at six layers
SETTINGS = {
    "llava": [
        {"vision_feature_layer": -1},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 3},
        {"vision_feature_layer": [-2, 1, -4]},
    ],
    "llava_onevision": [{"vision_feature_layer": -2}],
    "mistral3": [{"vision_feature_layer": -2}],
    "internvl": [{"vision_feature_layer": -2}],
    "smolvlm": [{}],
    "qwen2_5_vl": [{"vision": {"fullatt_block_indexes": [1, 4]}}],
    "qwen3_vl": [{"vision": {"deepstack_visual_indexes": [1, 3]}}],
    "gemma3": [
        {
            "text": {
                "layer_types": [
                    *["sliding_attention", "full_attention"] * 2,
                    *["full_attention"] * 2,
                ]
            }
        }
    ],
}
CASES = [(family, given) for family, each in SETTINGS.items() for given in each]
KEPT = [[3, 4, 5], [1, 3, 4]]
# Qwen3-VL adds its deep-stack features behind the first decoder layers, whichever these are
KEPT_BELOW_TAPS = [[0, 1, 4], [0, 1, 2, 5]]


def deep(family, given):
    """A tiny model of the family with six layers in each tower."""
    config = copy.deepcopy(families.config_of(family))
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers = DEEP
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", DEEP)
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * DEEP
    for key, value in given.items():
        if key in ("text", "vision"):
            for name, inner in value.items():
                setattr(text if key == "text" else vision, name, inner)
        else:
            setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


def skip(model, tower, kept):
    """Make the layers that are not kept pass on what they get."""
    parts = find_parts(model)
    for index, layer in enumerate(
        parts.decoder_layers if tower == "decoder" else parts.vision_layers
    ):
        if index not in kept:
            layer.register_forward_hook(
                lambda m, args, kwargs, out: (
                    (kept_of(args, kwargs), *out[1:])
                    if isinstance(out, tuple)
                    else kept_of(args, kwargs)
                ),
                with_kwargs=True,
            )


def kept_of(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


@pytest.mark.parametrize("tower", ["vision", "decoder"])
@pytest.mark.parametrize(("family", "given"), CASES, ids=str)
def test_a_cut_model_is_the_model_with_these_layers_skipped(family, given, tower, tmp_path):
    """And the folder loads in plain transformers as the model in memory."""
    whole = deep(family, given)
    batch = families.inputs(family, [5, 9], side="right")
    below_taps = family == "qwen3_vl" and tower == "decoder"
    for kept in KEPT_BELOW_TAPS if below_taps else KEPT:
        if family == "qwen3_vl" and kept[0] == 3 and tower == "vision":
            continue  # nothing is there that the first deep-stack module could read
        model, skipped = copy.deepcopy(whole), copy.deepcopy(whole)
        skip(skipped, tower, kept)
        convert(model, DepthPruningConfig(kind="depth_pruning", **{tower: kept}))
        with torch.no_grad():
            got, want = (m(**batch, use_cache=False).logits for m in (model, skipped))
        torch.testing.assert_close(got, want, msg=str(kept), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch, use_cache=False).logits, got)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    one = families.row_of(batch, 0)
    assert torch.equal(again.generate(**one, **settings), model.generate(**one, **settings))


def test_lists_of_layer_numbers_follow_in_config_and_module():
    model = deep("qwen2_5_vl", {"vision": {"fullatt_block_indexes": [1, 4, 5]}})
    convert(model, DepthPruningConfig(kind="depth_pruning", vision=[0, 1, 5]))
    assert list(model.config.vision_config.fullatt_block_indexes) == [1, 2]
    assert list(find_parts(model).vision.fullatt_block_indexes) == [1, 2]


def test_deep_stack_modules_go_with_what_feeds_them():
    model = deep("qwen3_vl", {"vision": {"deepstack_visual_indexes": [0, 2, 4]}})
    mergers = list(find_parts(model).vision.deepstack_merger_list)
    report = convert(model, DepthPruningConfig(kind="depth_pruning", vision=[1, 2, 3, 5]))
    vision = find_parts(model).vision
    assert list(model.config.vision_config.deepstack_visual_indexes) == [1, 2]
    assert list(vision.deepstack_visual_indexes) == [1, 2]
    assert list(vision.deepstack_merger_list) == mergers[1:]
    assert "without the modules of deepstack_visual_indexes [0]" in report.lines[0]
    model(**families.inputs("qwen3_vl", [5, 9]))


def test_decoder_layers_that_take_deep_stack_features():
    given = {"vision": {"deepstack_visual_indexes": [0, 2, 4]}}
    model = deep("qwen3_vl", given)
    report = convert(model, DepthPruningConfig(kind="depth_pruning", decoder=[0, 1, 2, 5]))
    assert "deepstack" not in report.lines[0]
    report = convert(model, DepthPruningConfig(kind="depth_pruning", decoder=[0, 2, 3]))
    assert (
        "deepstack_visual_indexes are now added after the old layers [0, 2, 3]" in (report.lines[0])
    )
    with pytest.raises(RecipeError, match="after the first 3 decoder layers, and 2 are kept"):
        convert(model, DepthPruningConfig(kind="depth_pruning", decoder=[0, 1]))
    assert len(find_parts(model).decoder_layers) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("taps", [1, 4]), ("rates", [0.5] * DEEP), ("kinds", list("abcdef")), ("exit_layer_id", 4)],
)
@pytest.mark.parametrize("of", ["tower", "model"])
def test_what_may_speak_of_layers_and_is_not_known_is_refused_by_name(key, value, of):
    model = deep("llava", {})
    before = model.config.to_dict()
    setattr(model.config.vision_config if of == "tower" else model.config, key, value)
    with pytest.raises(RecipeError, match=f"the config's {key} may be about single layers"):
        convert(model, DepthPruningConfig(kind="depth_pruning", vision=[0, 1]))
    assert len(find_parts(model).vision_layers) == DEEP
    assert (
        model.config.vision_config.num_hidden_layers == before["vision_config"]["num_hidden_layers"]
    )


def test_layers_that_a_config_cannot_place_are_refused():
    """Behind which layer features are read is not said where the order changes."""
    model = deep("llava", {"vision_feature_layer": -3})
    with pytest.raises(RecipeError, match="vision_feature_layer -3 is read after layer 3"):
        convert(model, DepthPruningConfig(kind="depth_pruning", vision=[5, 0, 1]))
    model = deep("qwen3_vl", {"vision": {"deepstack_visual_indexes": [1, 3]}})
    with pytest.raises(RecipeError, match=r"deepstack_visual_indexes .1, 3. change their order"):
        convert(model, DepthPruningConfig(kind="depth_pruning", vision=[3, 1]))
