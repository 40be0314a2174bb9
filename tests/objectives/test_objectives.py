"""Objectives against naive float64 twins, regions token by token, and signals of real models."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmkd.errors import CheckpointError
from mmkd.modeling.capture import capture, check_supported
from mmkd.objectives import REGISTRY, Layerwise, Signals, Targets, build_objective
from mmkd.objectives.divergence_settings import (
    AlphaConfig,
    BalancedKlConfig,
    CrossEntropyConfig,
    DivergenceConfig,
    EnhancedConfig,
    JsdConfig,
    SkewConfig,
)
from mmkd.objectives.token_labels import TokenLabelsConfig
from tests.support.divergences import balanced_kl, by_definition, enhanced

B, T, H, V = 3, 9, 5, 13
#            img img  prompt   response  pad
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
LAYOUT = ("v", "v", "p", "p", "r", "r", "p", "r", ".")


def targets(seed=0):
    g = torch.Generator().manual_seed(seed)
    kinds = [list(LAYOUT), list(LAYOUT), ["v", "v", "p", "r", "r", "r", "r", ".", "."]]

    def mask(letters):
        return torch.tensor([[k in letters for k in row] for row in kinds])

    labels = torch.full((B, T), -100)
    labels[0, 0], labels[1, 1], labels[2, 0] = 3, 7, 1
    ids = torch.randint(0, V, (B, T), generator=g)
    background = mask("v") & (labels == -100)
    return Targets(ids, mask("vpr"), mask("r"), mask("v"), labels, background, end_id=2)


def signals(seed, width=H):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    return Signals(normal(B, T, width), normal(V, width), normal(V), normal(B, T, width))


def leaves(s):
    return [s.hidden, s.head_weight, s.head_bias]


def twin(rows, loss_of_row, count):
    """Sum of a per-row loss over the rows of a boolean [B, T], by Python loops."""
    total = 0.0
    for b in range(B):
        for t in range(T):
            if rows[b][t]:
                total = total + loss_of_row(b, t)
    return total / count


def logp(s, b, t, temperature=1.0, hidden=None):
    h = (s.hidden if hidden is None else hidden)[b, t]
    return torch.log_softmax((s.head_weight @ h + s.head_bias) / temperature, -1)


def same(got, want, inputs):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    a = torch.autograd.grad(got, inputs, allow_unused=True)
    b = torch.autograd.grad(want, inputs, allow_unused=True)
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


REGIONS = {
    "response": "...rr.r..",
    "prompt": ".pp..p...",
    "vision": "vv.......",
    "all": "xxxxxxxx.",
}


@pytest.mark.parametrize("region", REGIONS)
def test_regions_cover_the_rows_that_predict_their_tokens(region):
    rows = targets().predicts(region)[0].tolist()
    assert rows == [c != "." for c in REGIONS[region]]


@pytest.mark.parametrize("region", ["response", "prompt"])
def test_cross_entropy(region):
    t, s = targets(), signals(1)
    objective = build_objective(CrossEntropyConfig(region=region))
    rows = t.predicts(region)
    got = objective(s, None, t, 7.0).loss
    same(got, twin(rows, lambda b, i: -logp(s, b, i)[t.input_ids[b, i + 1]], 7.0), leaves(s))


CONFIGS = [
    *(DivergenceConfig(kind=k, region=r) for k in ("kl", "reverse_kl", "tvd") for r in REGIONS),
    DivergenceConfig(kind="kl", temperature=2.0),
    JsdConfig(kind="jsd", beta=0.2, region="vision"),
    SkewConfig(kind="skew_kl", alpha=0.3),
    SkewConfig(kind="skew_reverse_kl", alpha=0.3),
    AlphaConfig(kind="alpha", alpha=0.3, region="prompt"),
    *(
        DivergenceConfig(kind=k, region="all")
        for k in ("jeffreys", "soft_reverse_kl", "hellinger", "pearson", "neyman")
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.kind}-{c.region}-{c.temperature}")
def test_divergences(config):
    t, s, teacher = targets(), signals(2), signals(3, width=8)
    temperature = config.temperature

    def row(b, i):
        log_p = logp(teacher, b, i, temperature).detach()
        log_q = logp(s, b, i, temperature)
        shares = {"beta": getattr(config, "beta", 0.5), "alpha": getattr(config, "alpha", 0.1)}
        return by_definition(config.kind, log_p, log_q, **shares)

    got = build_objective(config)(s, teacher, t, 5.0).loss
    same(got, twin(t.predicts(config.region), row, 5.0), leaves(s))


@pytest.mark.parametrize("sign", [1, -1])
def test_balanced_kl(sign):
    t, s, teacher = targets(), signals(2), signals(3, width=8)
    config = BalancedKlConfig(kind="balanced_kl", kappa=0.4, sign=sign, region="all")

    def row(b, i):
        return balanced_kl(logp(teacher, b, i).detach(), logp(s, b, i), sign * 0.4)

    got = build_objective(config)(s, teacher, t, 5.0).loss
    same(got, twin(t.predicts("all"), row, 5.0), leaves(s))


@pytest.mark.parametrize("region", ["response", "prompt"])
def test_enhanced(region):
    t, s, teacher = targets(), signals(2), signals(3, width=8)
    config = EnhancedConfig(kind="enhanced", gamma=1.7, region=region)

    def row(b, i):
        return enhanced(logp(teacher, b, i), logp(s, b, i), t.input_ids[b, i + 1], 1.7)

    got = build_objective(config)(s, teacher, t, 5.0).loss
    same(got, twin(t.predicts(region), row, 5.0), leaves(s))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("at", ["connector", "decoder"])
def test_token_labels(at, background):
    t, s = targets(), signals(4)
    rms = s.embeddings * (s.embeddings.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    hidden = rms if at == "connector" else s.hidden
    words = {(0, 0): 3, (1, 1): 7, (2, 0): 1}
    if background:
        words |= {(0, 1): 2, (1, 0): 2, (2, 1): 2}
    rows = [[(b, i) in words for i in range(T)] for b in range(B)]
    want = twin(rows, lambda b, i: -logp(s, b, i, hidden=hidden)[words[b, i]], 3.0)
    objective = build_objective(TokenLabelsConfig(at=at, background=background))
    assert objective.rows(t).tolist() == rows
    got = objective(s, None, t, 3.0).loss
    inputs = [s.head_weight, s.head_bias, s.embeddings if at == "connector" else s.hidden]
    same(got, want, inputs)


def test_an_empty_region_gives_zero_and_zero_gradients():
    t, s = targets(), signals(5)
    none = Targets(t.input_ids, t.attention, torch.zeros_like(t.response), t.vision)
    loss = build_objective(CrossEntropyConfig())(s, None, none, 1.0).loss
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, leaves(s)))


def test_a_shared_vocabulary_keeps_mass_off_the_padding_rows():
    t, s, teacher = targets(), signals(6), signals(7)
    padded = Signals(
        s.hidden,
        torch.cat([s.head_weight, 9 * torch.ones(3, H)]),
        torch.cat([s.head_bias, torch.ones(3)]),
    )
    config = DivergenceConfig(kind="kl")
    want = build_objective(config)(s, teacher, t, 1.0).loss
    got = build_objective(config, shared_vocabulary=V)(padded, teacher, t, 1.0).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


def test_every_kind_of_the_registry_is_tested_here():
    """All but those that have a file of their own."""
    tested = {c.kind for c in CONFIGS} | {"ce", "token_labels", "balanced_kl", "enhanced"}
    tested |= {"relation", "balance", "router_z", "preference", "affinity", "alm", "uld"}
    tested |= {"exits", "embedding", "sinkhorn"}
    assert tested == {kind for kind, cls in REGISTRY.items() if not issubclass(cls, Layerwise)}


def test_signals_are_the_models_own(tiny_model_dir):
    from mmkd.modeling.loading import load_model
    from mmkd.recipe import ModelConfig

    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    image_id = model.config.image_token_id
    ids = torch.cat([torch.full((2, 64), image_id), torch.randint(300, 700, (2, 7))], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 64, 64),
    }
    with torch.no_grad():
        s = capture(model, inputs)
        logits = model(**inputs).logits
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(s.hidden @ s.head_weight.t(), logits)
    torch.testing.assert_close(s.embeddings[:, :64], torch.stack(list(features)))


def test_models_that_change_logits_behind_the_head_are_refused():
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SMALL, "final_logit_softcapping": 30.0, "vocab_size": 64},
        vision_config=SMALL,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(CheckpointError, match="final_logit_softcapping"):
        check_supported(model, "teacher")
