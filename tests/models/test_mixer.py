"""The Mamba-2 mixer compared with the attention from which it is initialised."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3TextConfig,
    GlmConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from mmkd.recipe import MambaConfig
from mmkd.students.mamba import layout_of, seed
from mmkd_models.cache import MambaLayer
from mmkd_models.layout import MambaLayout
from mmkd_models.mixer import Mamba2Mixer, SequenceContext

SIZES = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 10,
    "pad_token_id": 0,
}
FULL = {"layer_types": ["full_attention"]}
# What each brings: RoPE and GQA; biases; norm per head; norm over all heads; partial RoPE of the
# interleaved kind; norm that scales by 1 + w, and a scaling of its own.
ATTENTIONS = {
    "llama": (LlamaConfig(**SIZES), LlamaAttention, LlamaRotaryEmbedding),
    "llama_bias": (
        LlamaConfig(**SIZES, attention_bias=True),
        LlamaAttention,
        LlamaRotaryEmbedding,
    ),
    "qwen2": (Qwen2Config(**SIZES), Qwen2Attention, Qwen2RotaryEmbedding),
    "qwen3": (Qwen3Config(**SIZES), Qwen3Attention, Qwen3RotaryEmbedding),
    "olmo2": (Olmo2Config(**SIZES), Olmo2Attention, Olmo2RotaryEmbedding),
    "glm": (GlmConfig(**SIZES, partial_rotary_factor=0.5), GlmAttention, GlmRotaryEmbedding),
    "gemma3": (
        Gemma3TextConfig(**SIZES, **FULL, query_pre_attn_scalar=24),
        Gemma3Attention,
        Gemma3RotaryEmbedding,
    ),
}


def linear_attention(module, query, key, value, mask, scaling, **kwargs):
    """sum_{s <= t} (q_t . k_s) scaling v_s from what the family's own code hands over."""
    key, value = (
        t.repeat_interleave(query.shape[1] // t.shape[1], dim=1).double() for t in (key, value)
    )
    weights = (query.double() @ key.transpose(-1, -2) * scaling).tril()
    return (weights @ value).transpose(1, 2).to(query.dtype), None


@pytest.fixture(autouse=True)
def _linear(monkeypatch):
    ALL_ATTENTION_FUNCTIONS.register("linear", linear_attention)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.pop("linear", None)


def attention_of(name, tokens=37, batch=2):
    """An attention with random weights, what enters it, and its linear attention."""
    torch.manual_seed(0)
    config, kind, rotary = ATTENTIONS[name]
    config = copy.deepcopy(config)
    config._attn_implementation = "linear"
    attention = kind(config, layer_idx=0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    u = torch.randn(batch, tokens, config.hidden_size)
    positions = torch.arange(tokens)[None]
    extra = ("full_attention",) if name == "gemma3" else ()
    embeddings = rotary(config=config)(u, positions, *extra)
    with torch.no_grad():
        want = attention(
            hidden_states=u, position_embeddings=embeddings, attention_mask=None, cache=None
        )[0]
    return attention, u, embeddings, want


def mixer_of(attention, init="exact", **form):
    conversion = MambaConfig(kind="mamba", layers=[0], init=init, **form)
    mixer = Mamba2Mixer(attention, layout_of(conversion, [0]), 0, SequenceContext())
    inherited = seed(mixer, attention, init)
    return mixer, inherited


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("state", ["query", "kv"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_exact_is_the_attentions_unnormalised_linear_attention(name, state):
    attention, u, embeddings, want = attention_of(name)
    mixer, _ = mixer_of(attention, state=state)
    with torch.no_grad():
        assert error(mixer(u, position_embeddings=embeddings)[0], want) < 1e-5


def test_exact_holds_with_a_wider_state():
    attention, u, embeddings, want = attention_of("qwen3")
    mixer, _ = mixer_of(attention, d_state=16)
    assert mixer.d_state == 16
    assert mixer.shape.value_dim == 8
    mixer(u, position_embeddings=embeddings)[0].pow(2).sum().backward()
    with torch.no_grad():
        assert error(mixer(u, position_embeddings=embeddings)[0], want) < 1e-5
    # the new columns can learn: random queries meet zero keys
    assert mixer.k_proj.weight.grad.unflatten(0, (2, 16))[:, 8:].abs().min() > 0


@pytest.mark.parametrize("change", ["silu", "no_rope", "kv_order", "scaling"])
def test_exact_fails_where_it_should(change):
    attention, u, embeddings, want = attention_of("llama")
    form = {"silu": {"activation": "silu"}, "no_rope": {"rope": False}}.get(change, {})
    mixer, _ = mixer_of(attention, **form)
    with torch.no_grad():
        if change == "kv_order":
            # query heads 0, 2, 4 would read the first key-value head
            q = mixer.q_proj.weight.unflatten(0, (6, 8))
            q.copy_(q[[0, 2, 4, 1, 3, 5]].clone())
        if change == "scaling":
            mixer.q_proj.weight.mul_(8**0.5)
        assert error(mixer(u, position_embeddings=embeddings)[0], want) > 0.3


def test_inherit_and_mimic_keep_the_projections():
    attention, *_ = attention_of("llama_bias")
    for init in ("inherit", "mimic", "exact"):
        mixer, inherited = mixer_of(attention, init)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            for kind in ("weight", "bias"):
                assert f"{name}.{kind}" in inherited
                assert torch.equal(
                    getattr(getattr(mixer, name), kind), getattr(getattr(attention, name), kind)
                )
    mixer, inherited = mixer_of(attention, "default")
    assert inherited == []
    assert not torch.equal(mixer.q_proj.weight, attention.q_proj.weight)


def test_mimic_is_linear_attention_in_direction():
    """Without decay the per-head norm leaves linear attention's direction per head."""
    attention, u, embeddings, _ = attention_of("llama")
    mixer, _ = mixer_of(attention, "mimic", activation="none", gate="none")
    exact, _ = mixer_of(attention)
    with torch.no_grad():
        mixer.A_log.fill_(-30)
        got = mixer.mix(u, embeddings).unflatten(-1, (6, 8))
        want = exact.mix(u, embeddings).unflatten(-1, (6, 8))
    assert torch.cosine_similarity(got, want, dim=-1).min() > 0.999


@pytest.mark.parametrize("state", ["query", "kv"])
@pytest.mark.parametrize("init", ["default", "inherit", "mimic", "exact"])
def test_steps_and_chunks_equal_the_whole(init, state):
    attention, u, (cos, sin), _ = attention_of("llama", tokens=11)
    mixer, _ = mixer_of(attention, init, state=state)

    class Layers:
        layers = (MambaLayer(),)

    with torch.no_grad():
        whole = mixer(u, position_embeddings=(cos, sin))[0]
        parts, start = [], 0
        for size in (4, 1, 3, 1, 2):
            now = slice(start, start + size)
            rope = (cos[:, now], sin[:, now])
            parts.append(mixer(u[:, now], position_embeddings=rope, cache=Layers)[0])
            start += size
    assert error(torch.cat(parts, 1), whole) < 1e-5
    states = 6 if state == "query" else 2
    assert Layers.layers[0].ssm_state.shape == (2, states, 8, 8)
    assert Layers.layers[0].tokens == 11


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_neither_output_nor_state(side):
    attention, u, (cos, sin), _ = attention_of("qwen2", tokens=12, batch=1)
    mixer, _ = mixer_of(attention, "inherit")
    real = torch.ones(1, 12, dtype=torch.bool)
    pads = slice(0, 5) if side == "left" else slice(7, 12)
    real[:, pads] = False
    kept = real[0]

    class Padded:
        layers = (MambaLayer(),)

    class Alone:
        layers = (MambaLayer(),)

    with torch.no_grad():
        rope = (cos[:, kept], sin[:, kept])
        alone = mixer(u[:, kept], position_embeddings=rope, cache=Alone)[0]
        u[:, pads] = 100.0
        mixer.context.real = real
        padded = mixer(u, position_embeddings=(cos, sin), cache=Padded)[0]
    assert error(padded[:, kept], alone) < 1e-5
    for name in ("conv_state", "ssm_state"):
        got, want = getattr(Padded.layers[0], name), getattr(Alone.layers[0], name)
        assert error(got, want) < 1e-5


def test_the_mixing_matrix_is_what_the_mixer_does():
    attention, u, embeddings, _ = attention_of("llama", tokens=9)
    mixer, _ = mixer_of(attention, "inherit", norm="none", gate="none")
    with torch.no_grad():
        matrix = mixer.matrix(u, embeddings)  # [B, heads, T, T]
        v = torch.nn.functional.silu(
            torch.nn.functional.conv1d(
                torch.nn.functional.pad(mixer._project(u).transpose(1, 2), (3, 0)),
                mixer.conv_weight[:, None],
                mixer.conv_bias,
                groups=mixer.conv_bias.numel(),
            )
        )[:, -16:]
        x = v.unflatten(1, (2, 8)).repeat_interleave(3, dim=1).transpose(-1, -2)  # [B, heads, T, P]
        want = (matrix @ x + mixer.D[:, None, None] * x).transpose(1, 2).flatten(2)
        got = mixer.mix(u, embeddings)
    assert error(got, want) < 1e-5


def test_every_parameter_gets_a_gradient():
    attention, u, embeddings, _ = attention_of("qwen3")
    mixer, _ = mixer_of(attention, "inherit")
    mixer(u, position_embeddings=embeddings)[0].pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


REFUSED = {
    "sliding_window": (lambda a: setattr(a, "sliding_window", 8), "sliding-window"),
    "soft cap": (lambda a: setattr(a, "attn_logit_softcapping", 50.0), "soft-caps"),
    "bidirectional": (lambda a: setattr(a, "is_causal", False), "bidirectional"),
    "sinks": (lambda a: setattr(a, "sinks", nn.Parameter(torch.zeros(6))), "sinks"),
    "other names": (lambda a: delattr(a, "o_proj"), "o_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_attention_that_no_mixer_stands_in_for_is_refused(case):
    attention, *_ = attention_of("llama")
    change, reason = REFUSED[case]
    change(attention)
    with pytest.raises(ValueError, match=reason):
        Mamba2Mixer(attention, MambaLayout(layers=(0,)), 0, SequenceContext())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 0]}, "ascending"),
        ({"layers": [0], "norm": "batch"}, "norm 'batch'"),
        ({"layers": [0], "d_conv": 0}, "d_conv"),
        ({"layers": [0], "heads": 3}, "unknown key 'heads'"),
        ({}, "'layers' is missing"),
    ],
)
def test_a_bad_layout_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        MambaLayout.from_dict(settings)


def test_a_state_narrower_than_the_head_is_refused():
    attention, *_ = attention_of("llama")
    with pytest.raises(ValueError, match="d_state 4 is less than the head size 8"):
        Mamba2Mixer(attention, MambaLayout(layers=(0,), d_state=4), 0, SequenceContext())
