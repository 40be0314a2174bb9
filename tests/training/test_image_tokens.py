"""Stages that leave out image tokens."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import SiglipVisionModel

from mmkd.commands import bench
from mmkd.data.encoder import Encoder
from mmkd.data.image_tokens import ImageTokenDropout
from mmkd.data.labels import IGNORED
from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import build_objective, score
from mmkd.recipe import DataConfig, ModelConfig, StageConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.training.objective_modules import build_own
from mmkd_models.parts import find_parts
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe

OBJECTIVES = [
    {"kind": "ce"},
    {"kind": "kl"},
    {"kind": "kl", "name": "kl_vision", "region": "vision"},
    {"kind": "jsd", "region": "all"},
    {"kind": "reverse_kl", "region": "prompt"},
    {"kind": "alm"},
    {"kind": "relation"},
    {"kind": "hidden_mse", "layers": [0, 1]},
    {"kind": "minilm", "layers": [1], "heads": 2},
    {"kind": "affinity"},
    {"kind": "token_labels"},
    {"kind": "embedding"},
    {"kind": "exits", "layers": [0], "norm": "own", "block": True},
]
KEEP = {"image_tokens": {"keep": 0.5}}


@pytest.fixture(scope="module")
def teacher_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with another decoder."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in find_parts(model).decoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def raw(scenes_dir, tiny_model_dir, teacher_dir, tmp_path):
    def make(name="tiny", *, data=None, **stage):
        return tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name,
            teacher={"model": str(teacher_dir)},
            data={"train": str(scenes_dir / "train.parquet"), **(data or {})},
            stage={"objectives": OBJECTIVES, "steps": 3, **stage},
        )  # fmt: skip

    return make


def lines(folder, file="metrics.jsonl"):
    found = (folder / "01-mimic" / file).read_text().splitlines()
    return [{**json.loads(line), "seconds": 0} for line in found]


def train(raw):
    return lines(pipeline.run(load_recipe(raw)))


def masked_out(keep):
    return lambda module, args, kw: (args, {**kw, "attention_mask": kw["attention_mask"] * keep})


def test_losses_are_those_of_whole_images_with_tokens_masked_out(
    scenes_dir, tiny_model_dir, teacher_dir
):
    """Values and gradients, in float64."""
    student, teacher = (
        load_model(ModelConfig(model=str(d))).double().eval() for d in (tiny_model_dir, teacher_dir)
    )
    configs = StageConfig.model_validate({"name": "a", "steps": 1, "objectives": OBJECTIVES})
    objectives = [build_objective(o) for o in configs.objectives]
    build_own(objectives, student, teacher).double()
    data = DataConfig(train=str(scenes_dir / "train.parquet"))
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    encoder = Encoder.of(configs.objectives, data, processor)
    batch = encoder.encode([0, 1, 2, 3])
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].double()
    short = ImageTokenDropout(0.4, 1, encoder.processing.image_token_id)(batch, 1)
    keep = short.kept.keep(batch.targets.input_ids.shape[1])
    targets = replace(
        batch.targets,
        attention=batch.targets.attention & keep,
        vision=batch.targets.vision & keep,
        vision_labels=batch.targets.vision_labels.masked_fill(~keep, IGNORED),
        background=batch.targets.background & keep,
    )
    plan = LayerPlan.of(objectives)

    def losses(kept, targets):
        student.zero_grad()
        with torch.no_grad():
            theirs = capture(teacher, batch.inputs, replace(plan.teacher_request(), kept=kept))
        mine = capture(student, batch.inputs, replace(plan.student_request({}), kept=kept))
        counts = {o.name: float(o.rows(targets).sum()) for o in objectives}
        total, said = score(objectives, mine, {"": theirs}, targets, counts)
        total.backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        return {"loss": total.detach(), **said}, gradients

    got, got_gradients = losses(short.kept, short.targets)
    for model in (student, teacher):
        find_parts(model).decoder.register_forward_pre_hook(masked_out(keep), with_kwargs=True)
    want, want_gradients = losses(None, targets)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float(value) != 0
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=name)
    scale = max(float(g.abs().max()) for g in want_gradients.values())
    for name, value in want_gradients.items():
        torch.testing.assert_close(got_gradients[name], value, rtol=1e-5, atol=1e-7 * scale)


def test_all_image_tokens_are_bit_equal_to_the_stage_without(raw):
    whole = train(raw("all", steps=2, image_tokens={"keep": 1.0}))
    assert whole == train(raw("without", steps=2))


def test_losses_do_not_depend_on_the_batch_layout(raw):
    objectives = [OBJECTIVES[i] for i in (0, 2, 5, 6, 7)]
    layouts = [{"size": 8}, {"size": 1, "accumulate": 8}, {"total": 8, "tokens": 260}]
    found = [
        train(
            raw(
                f"layout-{number}", objectives=objectives, batch=batch,
                data={"max_length": 128}, optimizer={"kind": "sgd", "lr": 0.1}, steps=2, **KEEP,
            )
        )
        for number, batch in enumerate(layouts)
    ]  # fmt: skip
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert got["tokens"] == want["tokens"]
            for key in ("loss", "grad_norm", *(o.get("name") or o["kind"] for o in objectives)):
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-6), key


def test_a_resumed_run_equals_an_uninterrupted_one(raw):
    stage = {"objectives": OBJECTIVES[:3], "checkpoint": {"interval": 1}, **KEEP}
    with broken_off(lambda stage, number: number == 3):
        train(raw("stopped", **stage))
    assert train(raw("stopped", **stage)) == train(raw("whole", **stage))


def test_fewer_tokens_are_logged_and_each_step_has_others(raw):
    """Each step has all records."""
    stage = {
        "objectives": [{"kind": "ce"}, {"kind": "kl", "region": "vision"}],
        "batch": {"size": 16, "total": 64},
        "optimizer": {"lr": 1e-12},
        "steps": 2,
    }
    whole, short = train(raw("whole", **stage)), train(raw("short", **stage, **KEEP))
    for before, after in zip(whole, short, strict=True):
        assert before["tokens"] - after["tokens"] == 64 * 64 / 2
        assert before["supervised_tokens"] == after["supervised_tokens"]
    assert whole[0]["kl"] == pytest.approx(whole[1]["kl"], rel=1e-5)
    assert abs(short[0]["kl"] / short[1]["kl"] - 1) > 1e-4


def requests(monkeypatch):
    """The tokens that models keep, in the order of their forward passes."""
    seen = []

    def watched(model, inputs, request=CaptureRequest()):  # noqa: B008
        seen.append((model, request.kept))
        return capture(model, inputs, request)

    for module in ("teachers.live", "engines.torch_engine"):
        monkeypatch.setattr(f"mmkd.{module}.capture", watched)
    return seen


@pytest.mark.parametrize("kind", ["teacher", "preference", "sampled"])
def test_all_models_keep_the_same_tokens(raw, scenes_dir, monkeypatch, kind):
    seen = requests(monkeypatch)
    settings = {"objectives": [{"kind": "kl"}], "steps": 1, **KEEP}
    if kind == "preference":
        settings["objectives"] = [{"kind": "preference", "loss": "ipo", "reference": "self"}]
        settings["data"] = {"train": str(scenes_dir / "preferences.parquet")}
    elif kind == "sampled":
        settings["on_policy"] = {"lmbda": 1.0, "max_new_tokens": 4}
    (line,) = train(raw(kind, **settings))
    assert line["loss"] > 0 if kind == "preference" else line["loss"] != 0
    (model, kept), (other, theirs) = seen
    assert model is not other
    assert torch.equal(kept.columns, theirs.columns)
    assert line["tokens"] == int(kept.real.sum())


def test_validation_has_whole_images(raw, scenes_dir):
    def validated(name, **stage):
        data = {"validation": str(scenes_dir / "validation.parquet")}
        folder = pipeline.run(
            load_recipe(
                raw(
                    name, data=data, optimizer={"lr": 1e-12}, steps=1,
                    validation={"interval": 1}, **stage,
                )
            )
        )  # fmt: skip
        return lines(folder, "validation.jsonl")

    (whole,), (short,) = validated("whole"), validated("short", **KEEP)
    for name, value in whole.items():
        assert short[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_shared_vision_tower_runs_once(raw, monkeypatch):
    """On whole images."""
    ran = []
    forward = SiglipVisionModel.forward

    def watched(self, pixel_values, *args, **kwargs):
        ran.append(pixel_values.shape[0])
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(SiglipVisionModel, "forward", watched)
    stage = {"objectives": [{"kind": "kl"}], "train": ["language_model"], **KEEP}
    shared = train(raw("shared", **stage))
    assert ran == [4] * 3
    monkeypatch.setattr("mmkd.training.build.share_vision", lambda *models: None)
    assert shared == train(raw("apart", **stage))
    assert ran == [4] * 9


def test_a_hybrid_sparse_student_trains(raw):
    made = raw(objectives=[{"kind": "layer_l2"}, {"kind": "kl"}, {"kind": "router_z"}], **KEEP)
    made["student"]["convert"] = [
        {"kind": "mamba", "keep_attention": [0], "init": "mimic"},
        {"kind": "moe", "experts": 4, "top_k": 2, "layers": "all"},
    ]
    last = train(made)[-1]
    assert 0 < last["layer_l2"] < 100
    assert set(last["expert_load"]) == {"0", "1"}


def test_every_teacher_needs_a_known_family(raw, tiny_model_dir, teacher_dir, tmp_path):
    folder = tmp_path / "sliding"
    shutil.copytree(teacher_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"model_type": "mistral", "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = raw(objectives=[{"kind": "kl"}], **KEEP)
    recipe["teacher"] = [
        {"name": "one", "model": str(tiny_model_dir)},
        {"name": "two", "model": str(folder)},
    ]
    with pytest.raises(RecipeError, match=r"teacher two: .* sliding-window attention"):
        train(recipe)
    recipe["teacher"] = {"model": str(folder)}
    with pytest.raises(RecipeError, match=r"image_tokens: teacher: .* sliding-window attention"):
        train(recipe)


def test_bench_times_the_shorter_sequences(raw, monkeypatch):
    lengths = []

    def watched(model, inputs, request):
        lengths.append(request.kept.columns.shape[1] < inputs["input_ids"].shape[1])
        return capture(model, inputs, request)

    monkeypatch.setattr("mmkd.commands.bench.capture", watched)
    found = bench.bench(load_recipe(raw(objectives=[{"kind": "kl"}], **KEEP)), None, 1)
    assert lengths == [True] * 3
    assert found["floor"]["student"] > 0
