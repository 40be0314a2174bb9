"""Queries, keys and values of an attention after its norms, without gates."""

import copy
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.modeling.layer_projections import PROJECTIONS, as_compared, width_of
from mmkd.objectives import Targets, build_objective
from mmkd.objectives.minilm import MiniLmConfig
from mmkd.recipe import MambaConfig
from mmkd.students import convert
from mmkd_models.parts import find_parts
from tests.support import families


def twins(family):
    """A model twice, with norms whose weights differ from place to place in a head."""
    model = families.make(family)
    for layer in find_parts(model).decoder_layers:
        layer.self_attn.q_norm.weight.data.copy_(torch.linspace(0.5, 1.5, 8))
    return model, copy.deepcopy(model)


def relations(objective, student, teacher, batch):
    request = CaptureRequest(frozenset({0, 1}), projections=True)
    mine = capture(student, batch, request)
    with torch.no_grad():
        theirs = capture(teacher, batch, request)
    real = batch["attention_mask"].bool()
    targets = Targets(batch["input_ids"], real, real, torch.zeros_like(real))
    return objective(mine, theirs, targets, 10.0).loss


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_queries_and_keys_are_read_behind_their_norms(family):
    """Scaling what a norm undoes changes no output and no relation; scaling the norm does."""
    teacher, student = twins(family)
    batch = families.inputs(family, [5, 9], side="right")
    objective = build_objective(MiniLmConfig(kind="minilm", layers=[0, 1], heads=2))
    assert relations(objective, student, teacher, batch).item() == 0
    for layer in find_parts(student).decoder_layers:
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).weight.data *= 8
    want = capture(teacher, batch).hidden
    torch.testing.assert_close(capture(student, batch).hidden, want, rtol=1e-4, atol=1e-4)
    loss = relations(objective, student, teacher, batch)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    attention = find_parts(student).decoder_layers[0].self_attn
    attention.q_norm.weight.data += 1.5
    loss = relations(objective, student, teacher, batch)
    assert loss.item() > 1e-2
    loss.backward()
    assert attention.q_norm.weight.grad.abs().sum() > 0
    assert attention.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_a_mixer_starts_at_the_relations_of_the_attention_whose_weights_it_took(family):
    teacher, student = twins(family)
    convert(student, MambaConfig(kind="mamba", layers=[0], init="inherit"))
    batch = families.inputs(family, [5, 9], side="right")
    objective = build_objective(MiniLmConfig(kind="minilm", layers=[0], heads=2))
    assert relations(objective, student, teacher, batch).item() == pytest.approx(0, abs=1e-6)
    find_parts(student).decoder_layers[0].self_attn.q_norm.weight.data += 1.5
    assert relations(objective, student, teacher, batch).item() > 1e-2


def attention_of(kind, **settings):
    """A decoder layer's attention of a text family, with 4 heads and 2 key-value heads."""
    base = {**families.TEXT, "head_dim": 8, "num_hidden_layers": 1}
    config = CONFIG_MAPPING[kind](**{**base, **settings})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return model, model.get_decoder().layers[0].self_attn


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {}),
        ("gemma3_text", {"layer_types": ["full_attention"]}),
        ("olmo2", {}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"]}),
        ("qwen3_next", {"layer_types": ["full_attention"], "num_experts": 0}),
        ("qwen3_5_text", {"layer_types": ["full_attention"]}),
        ("llama", {}),
    ],
)
def test_what_is_read_is_what_the_attention_rotates(kind, settings, monkeypatch):
    """Against the tensors that the family's own code hands to its rotation."""
    model, attention = attention_of(kind, **settings)
    for name in ("q_norm", "k_norm"):
        if getattr(attention, name, None) is not None:
            torch.nn.init.normal_(getattr(attention, name).weight, mean=1.0)
    rotated = {}
    module = sys.modules[type(attention).__module__]

    def keep(q, k, *args, **kwargs):  # [B, heads, T, P]
        rotated.update(queries=q.transpose(1, 2).flatten(2), keys=k.transpose(1, 2).flatten(2))
        return real(q, k, *args, **kwargs)

    real = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", keep)
    projected = {}
    for name, projection in PROJECTIONS.items():
        getattr(attention, projection).register_forward_hook(
            lambda m, a, out, name=name: projected.update({name: out})
        )
    # as many tokens as heads, so that no axis is taken for another
    model(input_ids=torch.tensor([[3, 4, 5, 6]]))
    for name, want in rotated.items():
        got = as_compared(attention, name, projected[name])
        torch.testing.assert_close(got, want, msg=name)
        assert width_of(attention, name) == want.shape[-1]
    assert width_of(attention, "values") == projected["values"].shape[-1]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("phi3", {}, "no separate q_proj .it has o_proj, qkv_proj"),
        ("hunyuan_v1_dense", {}, "an unknown norm: query_layernorm"),
    ],
)
def test_queries_that_cannot_be_told_are_refused_by_name(kind, settings, message):
    _, attention = attention_of(kind, **settings)
    with pytest.raises(ValueError, match=message):
        width_of(attention, "queries")


def test_a_gate_that_is_not_known_is_refused():
    _, attention = attention_of("llama")
    attention.q_proj = torch.nn.Linear(32, 64, bias=False)
    with pytest.raises(ValueError, match="has a gate in its q_proj"):
        width_of(attention, "queries")
    attention.is_kv_shared_layer = True
    with pytest.raises(ValueError, match="takes its keys from another layer"):
        width_of(attention, "keys")
