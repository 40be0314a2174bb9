"""`mmkd plan`: figures against counts made by hand, and real architectures without weights."""

import json

import pytest
import yaml

from mmkd.commands.plan import human, make_plan
from mmkd.modeling.loading import load_model, parameter_count
from mmkd.recipe import ModelConfig, load_recipe
from tests.support import warm
from tests.support.recipes import tiny_recipe


def test_counts_agree_with_the_real_model(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir)},
        stage={
            "train": ["connector"],
            "objectives": [{"kind": "kl"}],
            "batch": {"size": 4, "accumulate": 2},
        },
    )
    plan = make_plan(load_recipe(raw))
    (stage,) = plan["members"]["student"]["stages"]
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    connector = sum(p.numel() for n, p in model.named_parameters() if "multi_modal_projector" in n)
    assert stage["parameters"] == plan["teacher"]["parameters"] == parameter_count(model)
    assert stage["trainable"] == connector
    assert stage["records"] == 64
    assert stage["records_per_step"] == 8
    assert stage["vision_tokens_per_step"] == 8 * 64
    assert stage["memory_bytes"]["gradients"] == 4 * connector
    assert stage["memory_bytes"]["optimizer"] == 8 * connector
    assert stage["memory_bytes"]["teacher_weights"] == 4 * parameter_count(model)


def test_image_tokens_that_are_left_out_cost_no_decoder(scenes_dir, tiny_model_dir, tmp_path):
    def planned(**stage):
        stage["objectives"] = [{"kind": "kl", "region": "vision"}]
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            teacher={"model": str(tiny_model_dir)},
            stage=stage,
        )
        return make_plan(load_recipe(raw))["members"]["student"]["stages"][0]

    whole, half = planned(), planned(image_tokens={"keep": 0.5})
    assert whole["tokens_per_step"] - half["tokens_per_step"] == 4 * 32
    assert whole["vision_tokens_per_step"] == half["vision_tokens_per_step"] == 4 * 64
    before, after = whole["flops_per_step"], half["flops_per_step"]
    assert after["student_vision"] == before["student_vision"]
    assert all(
        after[part] < before[part]
        for part in ("student_decoder", "student_head", "teacher_decoder")
    )


def test_flops_follow_the_formula(scenes_dir, tiny_model_dir, tmp_path):
    """A frozen decoder behind a training connector: forward and gradients of activations."""

    def flops(**stage):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage=stage)
        return make_plan(load_recipe(raw))["members"]["student"]["stages"][0]["flops_per_step"]

    whole, connector, head = (flops(train=[g]) for g in ("all", "connector", "head"))
    forward = head["student_decoder"]
    assert connector["student_decoder"] == pytest.approx(2 * forward, rel=1e-6)
    assert whole["student_decoder"] == pytest.approx(3 * forward, rel=1e-6)
    assert whole["student_vision"] == pytest.approx(3 * connector["student_vision"], rel=1e-6)
    assert whole["total"] == sum(v for k, v in whole.items() if k != "total")


def test_pairs_are_two_sequences_and_a_reference_is_a_second_student(
    scenes_dir, tiny_model_dir, tmp_path
):
    def plan(data, objective):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            data={"train": str(scenes_dir / f"{data}.parquet")},
            stage={"objectives": [objective], "batch": {"size": 1}},
        )
        return make_plan(load_recipe(raw))["members"]["student"]["stages"][0]

    chosen = plan("preferences", {"kind": "ce"})
    pairs = plan("preferences", {"kind": "preference", "reference": "self"})
    tokens, twice = (p["tokens_per_step"] for p in (chosen, pairs))
    assert twice == pytest.approx(2 * tokens, rel=0.02)
    decoders = [p["flops_per_step"]["student_decoder"] for p in (chosen, pairs)]
    assert decoders[1] == pytest.approx(2 * decoders[0], rel=0.02)
    weights = pairs["memory_bytes"]
    assert weights["reference_weights"] == weights["student_weights"]
    assert "reference_weights" not in chosen["memory_bytes"]


def test_a_teacher_costs_the_layers_that_run(scenes_dir, tiny_model_dir, tmp_path):
    def flops(*objectives, **teacher):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, stage={"objectives": list(objectives)},
            teacher={"model": str(tiny_model_dir), **teacher},
        )  # fmt: skip
        return make_plan(load_recipe(raw))["members"]["student"]["stages"][0]["flops_per_step"]

    layers, last = {"kind": "hidden_mse", "layers": [0]}, {"kind": "minilm", "layers": "last"}
    whole, part, both = flops(layers, {"kind": "kl"}), flops(layers), flops(layers, last)
    assert part["teacher_decoder"] == pytest.approx(whole["teacher_decoder"] / 2, rel=1e-6)
    assert both["teacher_decoder"] == whole["teacher_decoder"]  # the last of two layers
    assert part["teacher_head"] == both["teacher_head"] == 0 < whole["teacher_head"]
    assert part["teacher_vision"] == whole["teacher_vision"]
    sharded = flops(layers, placement="sharded")
    assert sharded["teacher_decoder"] == whole["teacher_decoder"]


def test_exits_and_balanced_objectives_have_their_own_products(
    scenes_dir, tiny_model_dir, tmp_path
):
    def head(*objectives, **stage):
        stage = {"objectives": objectives, **stage}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage=stage,
                          teacher={"model": str(tiny_model_dir)})  # fmt: skip
        [stage] = make_plan(load_recipe(raw))["members"]["student"]["stages"]
        return [stage["flops_per_step"][f"{role}_head"] for role in ("student", "teacher")]

    kl = {"kind": "kl"}
    alone = head(kl)
    assert head(kl, {"kind": "exits", "layers": [0]}) == pytest.approx([2 * x for x in alone])
    exits = {"kind": "exits", "layers": [0, 1], "norm": "own"}
    assert head(exits) == pytest.approx([2 * x for x in alone])
    ce = {"kind": "ce"}
    assert head(kl, ce) == pytest.approx(alone)
    assert head(kl, ce, balance_gradients=True) == pytest.approx([2 * x for x in alone])


def test_own_parameters_of_objectives_take_memory(scenes_dir, tiny_model_dir, tmp_path):
    def planned(*objectives):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"objectives": objectives},
                          teacher={"model": str(tiny_model_dir)})  # fmt: skip
        [stage] = make_plan(load_recipe(raw))["members"]["student"]["stages"]
        return stage

    alone = planned({"kind": "ce"})
    mapped = planned({"kind": "ce"}, {"kind": "hidden_mse", "layers": [0, 1], "linear_map": True})
    added = 2 * 32 * 32  # a matrix for each layer
    more = {k: mapped["memory_bytes"][k] - alone["memory_bytes"][k] for k in alone["memory_bytes"]}
    assert more["student_weights"] == more["gradients"] == 4 * added
    assert more["optimizer"] == 8 * added
    assert mapped["trainable"] == alone["trainable"]


def test_only_experts_that_a_token_meets_cost_flops(scenes_dir, tiny_model_dir, tmp_path):
    def plan(*convert):
        student = {"model": str(tiny_model_dir), "convert": list(convert)}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, student=student)
        return make_plan(load_recipe(raw))["members"]["student"]["stages"][0]

    moe = {"kind": "moe", "experts": 4, "top_k": 1, "layers": "all"}
    dense, sparse = plan(), plan(moe)
    ffn, router = 3 * 32 * 64, 4 * 32
    assert sparse["parameters"] == dense["parameters"] + 2 * (3 * ffn + router)
    assert sparse["active_parameters"] == dense["parameters"] + 2 * router
    assert dense["active_parameters"] == dense["parameters"]
    tokens = sparse["tokens_per_step"]
    more = sparse["flops_per_step"]["student_decoder"] - dense["flops_per_step"]["student_decoder"]
    assert more == pytest.approx(3 * 2 * 2 * router * tokens, rel=1e-2)


def test_zero_spreads_what_its_stage_says(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    """Adam in float32: weights, gradients, master weights and two states of 4 bytes each."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("WORLD_SIZE", "4")

    def plan(engine, placement="replicated"):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            teacher={"model": str(tiny_model_dir), "placement": placement},
            stage={"engine": {"device": "cpu", **engine}, "objectives": [{"kind": "kl"}]},
        )
        (stage,) = make_plan(load_recipe(raw))["members"]["student"]["stages"]
        return stage["parameters"], stage["memory_bytes"]

    for zero, (weights, gradients, states) in enumerate(
        [(4, 4, 8), (4, 4, 3), (4, 1, 3), (1, 1, 3)]
    ):
        count, found = plan({"kind": "deepspeed", "zero": zero})
        assert found["student_weights"] == pytest.approx(weights * count, abs=4)
        assert found["gradients"] == pytest.approx(gradients * count, abs=4)
        assert found["optimizer"] == pytest.approx(states * count, abs=4)
        assert found["teacher_weights"] == 4 * count
        assert found["cpu"] == 0
    count, found = plan({"kind": "deepspeed", "zero": 3, "offload": "all"}, "offload")
    assert found["student_weights"] == found["optimizer"] == 0
    assert found["cpu"] == pytest.approx((1 + 3 + 1) * count, abs=8)
    assert found["teacher_weights"] < 4 * count
    _, spread = plan({}, "sharded")
    assert spread["teacher_weights"] == pytest.approx(found["teacher_weights"] + count, abs=4)


def test_a_seven_billion_model_is_planned_without_weights(scenes_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        "unused",
        tmp_path,
        student={
            "processor": str(scenes_dir / "processor"),
            "config": {"model_type": "llava", "image_token_index": 4},
        },
    )
    (stage,) = make_plan(load_recipe(raw))["members"]["student"]["stages"]
    assert 6.7e9 < stage["parameters"] < 7.3e9


def test_the_command_prints_a_table_and_json(scenes_dir, tiny_model_dir, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)))
    table, raw = (
        warm.run("plan", path, *more, env={"COLUMNS": "120"}) for more in ([], ["--json"])
    )
    assert table.returncode == raw.returncode == 0
    assert "supervised" in table.stdout
    assert json.loads(raw.stdout)["members"]["student"]["stages"][0]["stage"] == "mimic"
    assert not (tmp_path / "tiny").exists()


def test_numbers_for_people():
    assert [human(v) for v in (7, 1500, 2.5e6)] == ["7", "1.50 k", "2.50 M"]
