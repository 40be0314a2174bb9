"""Sparse students of nine families: upcycle, save, load, generate, train."""

import json
import shutil

import pytest
import torch

from mmkd.commands.plan import make_plan
from mmkd.errors import CheckpointError, RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.modeling.loading import load_model, load_pretrained, parameter_count
from mmkd.objectives import Targets, build_objective
from mmkd.objectives.balance import BalanceConfig
from mmkd.recipe import (
    DepthPruningConfig,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    WidthPruningConfig,
    load_recipe,
)
from mmkd.report.rundata import read_run
from mmkd.runs import pipeline
from mmkd.students import convert, set_trainable
from mmkd_models.experts import route
from mmkd_models.moe import SparseFfn
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.recipes import tiny_recipe

MOE = MoeConfig(kind="moe")
MAMBA = MambaConfig(kind="mamba", layers=[1], init="mimic")
SPECIAL = [7, 8, 9, 10]  # image tokens, which a text must not contain


def converted(name, *conversions, seed=0):
    model = families.make(name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convert(model, list(conversions))
    return model


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def spread(model):
    """Experts that differ, as after training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", families.FAMILIES)
def test_upcycling_changes_no_output(name, tmp_path):
    batch = families.inputs(name, [5, 9])
    dense = families.make(name)
    sparse = converted(name, MOE)
    layers = find_parts(sparse).decoder_layers
    assert [isinstance(layer.mlp, SparseFfn) for layer in layers] == [True, False, True, False]
    assert parameter_count(sparse) > parameter_count(dense)
    torch.testing.assert_close(logits_of(sparse, batch), logits_of(dense, batch), rtol=0, atol=1e-5)

    spread(sparse).save_pretrained(tmp_path)
    assert {"moe.py", "experts.py", "modeling_mmkd.py"} <= {p.name for p in tmp_path.iterdir()}
    loaded = load_pretrained(str(tmp_path))
    assert type(loaded) is type(sparse)
    assert torch.equal(logits_of(loaded, batch), logits_of(sparse, batch))


@pytest.mark.parametrize("order", [(MOE, MAMBA), (MAMBA, MOE)], ids=["moe first", "mamba first"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_a_sparse_hybrid_is_the_hybrid_in_either_order(name, order, tmp_path):
    batch = families.inputs(name, [5, 9])
    hybrid, both = converted(name, MAMBA), converted(name, *order)
    torch.manual_seed(0)
    # a mixer's new weights are random: the two students share them
    state = hybrid.state_dict()
    both.load_state_dict({k: v for k, v in state.items() if "self_attn" in k}, strict=False)
    torch.testing.assert_close(logits_of(both, batch), logits_of(hybrid, batch), rtol=0, atol=1e-5)
    both.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.config.layout.keys() == {"mamba", "moe"}
    assert torch.equal(logits_of(loaded, batch), logits_of(both, batch))


@pytest.mark.parametrize("conversions", [(MOE,), (MAMBA, MOE)], ids=["sparse", "sparse hybrid"])
def test_decoding_is_the_full_forward_and_draws_nothing(conversions):
    model = spread(converted("llava", *conversions)).double()
    batch = families.inputs("llava", [5, 9])
    batch["pixel_values"] = batch["pixel_values"].double()
    answers = [
        model.generate(
            **batch,
            max_new_tokens=6,
            eos_token_id=None,
            suppress_tokens=SPECIAL,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for _ in range(2)
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    ids = answers[0].sequences
    new = ids.shape[1] - batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1)
    whole = {**batch, "input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        uncached = model(**whole, use_cache=False).logits[:, -7:-1]
    got = torch.stack(answers[0].logits, 1)
    torch.testing.assert_close(got, uncached.float(), rtol=0, atol=5e-6)
    model.train()
    assert torch.equal(logits_of(model, batch), logits_of(model.eval(), batch))


ALONE = """
import sys
sys.modules["mmkd"] = sys.modules["mmkd_models"] = None
import torch
from transformers import AutoModelForImageTextToText
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
batch = torch.load(folder + "/batch.pt")
with torch.no_grad():
    torch.save(model(**batch).logits, folder + "/got.pt")
"""


def test_a_sparse_hybrid_loads_where_only_torch_and_transformers_are(tmp_path):
    model = spread(converted("llava", MAMBA, MOE))
    model.save_pretrained(tmp_path)
    batch = families.inputs("llava", [5, 9])
    torch.save(batch, tmp_path / "batch.pt")
    families.run_alone(ALONE, tmp_path, tmp_path)
    got = torch.load(tmp_path / "got.pt")
    torch.testing.assert_close(got, logits_of(model, batch), rtol=0, atol=1e-6)


def test_routers_stay_float32(tmp_path):
    converted("llava", MOE).save_pretrained(tmp_path)
    model = load_model(ModelConfig(model=str(tmp_path), dtype="bfloat16"))
    ffn = find_parts(model).decoder_layers[0].mlp
    assert ffn.router.weight.dtype == torch.float32
    assert ffn.experts.up_proj.dtype == torch.bfloat16
    x = torch.randn(1, 3, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ffn.router(x.bfloat16())
    want = x.bfloat16().double() @ ffn.router.weight.double().T
    torch.testing.assert_close(logits.double(), want, rtol=1e-5, atol=1e-6)


def test_groups_of_a_sparse_student():
    model = converted("llava", MOE)
    experts, router, moe, ffn = (
        set(set_trainable(model, [g])) for g in ("moe.experts", "moe.router", "moe", "ffn")
    )
    assert len(router) == 2
    assert len(experts) == 6
    assert moe == experts | router
    assert ffn > experts
    assert len(ffn) == 6 + 6  # two sparse layers and two dense ones, three matrices each
    assert not ffn & router


def test_a_router_and_all_chosen_experts_learn():
    model = spread(converted("llava", MOE)).train()
    batch = families.inputs("llava", [12, 9])
    trained = set_trainable(model, ["moe"])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == set(trained)
    assert all(g.abs().sum() > 0 for g in gradients.values())


class Gated(torch.nn.Module):
    """A gated network in LFM's words, with any activation."""

    def __init__(self, activation):
        super().__init__()
        self.w1, self.w3 = (torch.nn.Linear(32, 48, bias=False) for _ in range(2))
        self.w2 = torch.nn.Linear(48, 32, bias=False)
        self.activation = activation

    def forward(self, x):
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


def test_a_network_with_another_activation_is_refused():
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    batch = families.inputs("llava", [5, 9])
    for activation in (silu, gelu):
        model = families.make("llava")
        for layer in find_parts(model).decoder_layers:
            del layer.mlp
            layer.mlp = Gated(activation)
        want = logits_of(model, batch)
        if activation is silu:
            convert(model, [MOE])
            torch.testing.assert_close(logits_of(model, batch), want, rtol=1e-5, atol=1e-5)
            continue
        with pytest.raises(RecipeError, match="Gated computes something else than its experts"):
            convert(model, [MOE])


def test_captured_routers_are_the_layers_own():
    model = spread(converted("llava", MOE))
    batch = families.inputs("llava", [5, 9], side="right")
    found = capture(model, batch, CaptureRequest(frozenset({0})))
    assert sorted(found.routers) == [0, 2]
    layer = find_parts(model).decoder_layers[0]
    normed = layer.post_attention_layernorm(
        found.layers[0].block_input + found.layers[0].mixer_output
    )
    torch.testing.assert_close(found.routers[0].logits, layer.mlp.router(normed))
    chosen = route(found.routers[0].logits.flatten(0, 1), 2).experts
    assert len(chosen.unique()) > 1


def test_activation_checkpointing_keeps_the_routers_gradients():
    batch = families.inputs("llava", [4, 9], side="right")
    attention = batch["attention_mask"].bool()
    nothing = torch.zeros_like(attention)
    targets = Targets(batch["input_ids"], attention, nothing, nothing)
    balance = build_objective(BalanceConfig(kind="balance"))
    gradients = []
    for checkpointing in (False, True):
        model = spread(converted("llava", MOE)).train()
        set_trainable(model, ["moe.router"])
        if checkpointing:
            model.activation_checkpointing_enable()
        balance(capture(model, batch), None, targets, 13).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for got, want in zip(*gradients, strict=True):
        assert want.abs().sum() > 0
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("even", [0, 2]), ("odd", [1, 3]), ("all", [0, 1, 2, 3]), ("first_half", [0, 1]),
     ("second_half", [2, 3]), ([3], [3]), ({"every": 3}, [0, 3])],
)  # fmt: skip
def test_placements_of_experts(layers, chosen):
    model = converted("llava", MoeConfig(kind="moe", layers=layers, experts=3, top_k=1))
    assert model.config.layout["moe"] == {"layers": chosen, "experts": 3, "top_k": 1}


@pytest.mark.parametrize(
    ("conversions", "message"),
    [
        ([MOE, MOE], "sparse already"),
        (
            [MOE, DepthPruningConfig(kind="depth_pruning", decoder=[0])],
            "put 'depth_pruning' before",
        ),
        ([MOE, WidthPruningConfig(kind="width_pruning", decoder=8)], "put 'width_pruning' before"),
        ([MoeConfig(kind="moe", layers=[7])], r"layers \[7\] of 4"),
        ([MoeConfig(kind="moe", layers=[])], "no layer is chosen"),
    ],
)
def test_conversions_that_do_not_fit(conversions, message):
    with pytest.raises(RecipeError, match=message) as caught:
        converted("llava", *conversions)
    assert "\n" not in str(caught.value)


def test_a_layer_without_a_gated_network_is_refused_untouched():
    model = families.make("llava")
    layers = find_parts(model).decoder_layers
    layers[2].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(RecipeError, match="layer 2 cannot become sparse: Linear has no gate_proj"):
        convert(model, MOE)
    assert not any(isinstance(m, SparseFfn) for m in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layout"]["moe"].update(experts=5), "another shape"),
        (lambda c: c["layout"]["moe"].update(layers=[0, 1]), "missing"),
        (lambda c: c["layout"]["moe"].update(top_k=9), "top_k 9 of 4 experts"),
        (lambda c: c["layout"].update(wide={}), "unknown kind 'wide'"),
    ],
)
def test_a_layout_that_does_not_fit_its_weights_is_one_line(tmp_path, change, message):
    converted("llava", MOE).save_pretrained(tmp_path / "sparse")
    shutil.copytree(tmp_path / "sparse", tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(str(tmp_path / "student"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def sparse_recipe(scenes_dir, tiny_model_dir, tmp_path):
    def make(name="sparse", **stage):
        student = {"model": str(tiny_model_dir), "convert": [{"kind": "moe", "layers": "all"}]}
        settings = {"train": ["moe"], "objectives": [{"kind": "ce"}, {"kind": "router_z"}], **stage}
        return tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name, student=student, stage=settings
        )

    return make


def test_a_sparse_student_trains_and_logs_its_experts(sparse_recipe):
    """Shares and z-loss are of the global batch, whatever its layout."""
    logs = []
    for size, accumulate in ((4, 1), (1, 4)):
        raw = sparse_recipe(
            f"sparse-{size}",
            steps=3,
            batch={"size": size, "accumulate": accumulate},
            optimizer={"kind": "sgd", "lr": 0.1},
        )
        folder = pipeline.run(load_recipe(raw))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
        assert load_pretrained(str(folder / "01-mimic" / "student")).config.layout["moe"]
    for got, want in zip(*logs, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert got["router_z"] == pytest.approx(want["router_z"], rel=1e-4)
        assert got["expert_load"].keys() == {"0", "1"}
        for layer, shares in got["expert_load"].items():
            assert shares == pytest.approx(want["expert_load"][layer], abs=2e-3)
            assert sum(shares) == pytest.approx(1, abs=1e-3)


def test_balance_without_experts_is_refused_before_anything_is_written(
    scenes_dir, tiny_model_dir, tmp_path
):
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path / "runs", stage={"objectives": [{"kind": "balance"}]}
    )
    with pytest.raises(RecipeError, match="balance needs a student with experts"):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "runs").exists()


def test_a_student_becomes_sparse_between_two_stages(scenes_dir, tiny_model_dir, tmp_path):
    """Dense, then sparse: the second stage starts as the model that the first one made."""
    stage = {"objectives": [{"kind": "ce"}], "batch": {"size": 4}, "engine": {"device": "cpu"}}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)
    moe = {"kind": "moe", "layers": "all"}
    raw["stages"] = [
        {**stage, "name": "dense", "steps": 2},
        {**stage, "name": "sparse", "steps": 2, "convert": [moe], "train": ["moe"]},
    ]
    folder = pipeline.run(load_recipe(raw))
    dense, start, sparse = (
        load_pretrained(str(folder / name / "student"))
        for name in ("01-dense", "02-sparse/start", "02-sparse")
    )
    assert not hasattr(dense.config, "layout")
    assert start.config.layout == sparse.config.layout
    x = torch.randint(300, 700, (1, 9))
    with torch.no_grad():
        outputs = [m(input_ids=x).logits for m in (dense, start, sparse)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)
    assert not torch.equal(outputs[2], outputs[1])
    stages = make_plan(load_recipe(raw))["members"]["student"]["stages"]
    assert stages[0]["parameters"] == parameter_count(dense)
    assert stages[1]["parameters"] == parameter_count(sparse)
    (member,) = read_run(folder).members
    assert len(member.changes) == 1
    assert "4 experts" in member.changes[0]


def test_a_later_conversion_that_does_not_fit_is_refused_at_the_start(
    scenes_dir, tiny_model_dir, tmp_path
):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path / "runs")
    second = {**raw["stages"][0], "name": "sparse", "convert": [{"kind": "moe", "layers": [9]}]}
    raw["stages"].append(second)
    with pytest.raises(RecipeError, match=r"cannot select layers \[9\]"):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "runs").exists()
