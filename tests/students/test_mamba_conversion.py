"""Attention becomes Mamba: which layers, what does not fit, and one step after another."""

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_pretrained
from mmkd.recipe import DepthPruningConfig, MambaConfig
from mmkd.students import convert
from mmkd.students.layer_choice import choose, parse
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.hybrids import generate, student

SELECTIONS = [
    ("every:4", {"every": 4}, [0, 4]),
    ("every:4:last", {"every": 4, "first": False}, [3, 7]),
    ("head:2", {"head": 2}, [0, 1]),
    ("tail:2", {"tail": 2}, [6, 7]),
    ("none", [], []),
    ("1,5", [1, 5], [1, 5]),
]


@pytest.mark.parametrize(("text", "selection", "layers"), SELECTIONS)
def test_layer_selections(text, selection, layers):
    spoken, written = (
        MambaConfig(kind="mamba", keep_attention=p).keep_attention for p in (parse(text), selection)
    )
    assert spoken == written
    assert choose(written, 8, where="here") == layers


@pytest.mark.parametrize("text", ["every", "every:0", "every:4:middle", "head:", "half", "1,,2"])
def test_a_selection_that_cannot_be_read(text):
    with pytest.raises(RecipeError, match="every:4"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llava", {"layers": [4]}, "cannot select layers"),
        ("llava", {"keep_attention": {"head": 4}}, "all 4 layers keep their attention"),
        ("llava", {"layers": [0], "d_state": 4}, "d_state 4 is less than the head size 8"),
        ("gemma3", {"keep_attention": []}, "layer 2 cannot be converted: .*sliding-window"),
    ],
)
def test_layouts_that_do_not_fit(name, settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        convert(families.make(name), MambaConfig(kind="mamba", **settings))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted_faithfully_stays_untouched():
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config=GemmaConfig(**families.TEXT, head_dim=8), vision_config=families.SIGLIP
    )
    model = PaliGemmaForConditionalGeneration(config)
    before = type(model)
    with pytest.raises(RecipeError, match="over image and prompt is bidirectional"):
        convert(model, MambaConfig(kind="mamba", keep_attention=[0]))
    assert type(model) is before


def test_a_student_is_converted_further_step_by_step(tmp_path):
    """MambaInLlama's stepwise conversion: the layers of earlier steps stay what they are."""
    model = student("llava", [1], init="inherit")
    earlier = {n: t.clone() for n, t in model.state_dict().items() if "layers.1." in n}
    report = convert(model, MambaConfig(kind="mamba", layers=[3], init="inherit"))
    assert "in layers [1, 3], attention in [0, 2]" in report.lines[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in earlier.items())
    batch = families.inputs("llava", [5, 9])
    whole = model(**batch).logits
    found = generate(model, batch, do_sample=False)
    torch.testing.assert_close(found.logits[0], whole[:, -1], rtol=1e-5, atol=1e-5)
    alone = {k: v[:1, 4:] if v.ndim == 2 else v[:1] for k, v in batch.items()}  # 4 are padding
    torch.testing.assert_close(model(**alone).logits, whole[:1, 4:], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = load_pretrained(str(tmp_path))
    assert torch.equal(again(**batch).logits, whole)
    at_once = student("llava", [1, 3], init="inherit")
    at_once.load_state_dict(model.state_dict())
    assert torch.equal(at_once(**batch).logits, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, "layers \\[1\\] are Mamba already"),
        ({"keep_attention": [1]}, "layer 1 cannot keep its attention: it is Mamba already"),
        ({"layers": [2], "d_conv": 3}, "d_conv 3, but layer 1 is Mamba already with 4"),
    ],
)
def test_a_further_conversion_that_does_not_fit(settings, message):
    model = student("llava", [1])
    before = [type(x.self_attn) for x in find_parts(model).decoder_layers]
    with pytest.raises(RecipeError, match=message):
        convert(model, MambaConfig(kind="mamba", init="inherit", **settings))
    assert [type(x.self_attn) for x in find_parts(model).decoder_layers] == before


def test_layers_are_dropped_before_attention_becomes_mamba():
    model = families.make("llava")
    cut = DepthPruningConfig(kind="depth_pruning", decoder=[0, 2])
    report = convert(model, [cut, MambaConfig(kind="mamba", layers=[1])])
    assert report.lines[0] == "decoder: kept layers [0, 2] of 4"
    assert "Mamba-2 mixers (mimic) in layers [1], attention in [0]" in report.lines[1]
    assert "inherited: q_proj.weight" in report.lines[2]
    with pytest.raises(RecipeError, match="put 'depth_pruning' before 'mamba' and 'moe'"):
        convert(model, cut)
