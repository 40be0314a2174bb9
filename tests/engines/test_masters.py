"""A bfloat16 student on the torch engine: its optimizer changes float32 copies."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mmkd.commands.plan import make_plan
from mmkd.engines import build_engine
from mmkd.engines.masters import Masters
from mmkd.engines.state import WEIGHTS
from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model
from mmkd.recipe import ModelConfig, StageConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.students import set_trainable
from mmkd.training import stage
from tests.support.recipes import tiny_recipe

CPU = torch.device("cpu")
STEPS = 12
OPTIMIZERS = {
    "adamw": {"kind": "adamw", "lr": 1e-5},
    "adam": {"kind": "adam", "lr": 1e-5},
    "sgd": {"kind": "sgd", "lr": 1e-3, "momentum": 0.9},
    "adafactor": {"kind": "adafactor", "lr": 1e-5},
}


def stage_of(optimizer, **settings):
    return StageConfig(
        name="mimic",
        objectives=[{"kind": "ce"}],
        steps=STEPS,
        engine={"device": "cpu"},
        optimizer=optimizer,
        schedule={"kind": "constant", "warmup": 0.0},
        **settings,
    )


def engine_of(folder, dtype, optimizer, train=None, **settings):
    """An engine of a student in `dtype` that starts from bfloat16 values."""
    model = load_model(ModelConfig(model=str(folder), dtype="bfloat16"))
    model = model if dtype == "bfloat16" else model.float()
    config = stage_of(optimizer, **({"train": train} if train else {}), **settings)
    torch.manual_seed(0)
    set_trainable(model, config.train.groups, config.train.lora)
    return build_engine(config, model, STEPS, CPU)


def gradients(engine, seed, micro_steps=1):
    """Backward of a loss whose gradients are given, and the same for every dtype."""
    for micro in range(micro_steps):
        generator = torch.Generator().manual_seed(100 * seed + micro)
        loss = torch.zeros(())
        for parameter in engine.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).bfloat16()
            if parameter.requires_grad:
                loss = loss + (parameter.float() * noise.float()).sum()
        engine._begin()
        engine.backward(loss, last=micro == micro_steps - 1)


def weights(engine):
    return {k: v.float().clone() for k, v in engine.tensors() if k.startswith(f"{WEIGHTS}/")}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_bfloat16_student_follows_the_float32_one(kind, tiny_model_dir):
    """Steps that are too small for bfloat16, in two micro-steps each, through every optimizer."""
    half = engine_of(tiny_model_dir, "bfloat16", OPTIMIZERS[kind])
    single = engine_of(tiny_model_dir, "float32", OPTIMIZERS[kind])
    before = weights(half)
    for step in range(STEPS):
        for engine in (half, single):
            gradients(engine, step, micro_steps=2)
            engine.step()
    found, wanted = weights(half), weights(single)
    moved = {n: wanted[n] - before[n] for n in wanted}
    assert sum(float(m.abs().sum()) for m in moved.values()) > 0
    for name, move in moved.items():
        error = (found[name] - before[name] - move).norm()
        assert error <= 1e-3 * move.norm() + 1e-9, name
    for name, parameter in half.model.named_parameters():  # and the student has their rounding
        assert torch.equal(parameter, found[f"{WEIGHTS}/{name}"].to(parameter.dtype))
        assert parameter.grad is None


def test_without_copies_bfloat16_would_stand_still(tiny_model_dir):
    """What the copies are for."""
    engine = engine_of(tiny_model_dir, "bfloat16", OPTIMIZERS["adamw"])
    start = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
    plain = torch.optim.AdamW(engine.model.parameters(), lr=1e-5)
    for _ in range(STEPS):
        for parameter in engine.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        plain.step()
    large = [(n, p) for n, p in engine.model.named_parameters() if p.dtype == torch.bfloat16]
    still = sum(int((p == start[n]).sum()) for n, p in large)
    assert still > 0.8 * sum(p.numel() for _, p in large)


def test_frozen_and_float32_weights_have_no_copies(tiny_model_dir):
    lora = {"lora": {"groups": ["language_model"], "rank": 2}}
    engine = engine_of(tiny_model_dir, "bfloat16", OPTIMIZERS["adamw"], train=lora)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    halves = [p for p in trained if p.dtype == torch.bfloat16]
    assert len(engine.masters) == len(halves)
    assert all(engine.masters.of(p).dtype == torch.float32 for p in trained)
    inside = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert len(inside) == len(trained)
    single = load_model(ModelConfig(model=str(tiny_model_dir)))
    masters = Masters(single)
    assert len(masters) == 0
    assert list(masters.parameters(single)) == list(single.parameters())


def test_copies_and_states_go_on_exactly(tiny_model_dir):
    """From its own checkpoint, from one of float32, and from one that was written before there
    were copies."""
    first = engine_of(tiny_model_dir, "bfloat16", OPTIMIZERS["adamw"])
    for step in range(4):
        gradients(first, step)
        first.step()
    saved = {k: v.detach().clone() for k, v in first.tensors()}
    assert all(v.dtype != torch.bfloat16 for v in saved.values())
    again = engine_of(tiny_model_dir, "bfloat16", OPTIMIZERS["adamw"])
    again.restore(saved, 4)
    for engine in (first, again):
        gradients(engine, 9)
        engine.step()
    for (name, one), (_, other) in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other), name

    old = {k: v.bfloat16() if v.dim() else v for k, v in saved.items()}
    again.restore(old, 4)
    for name, tensor in again.tensors():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, old[name].to(tensor.dtype)), name
    gradients(again, 9)
    again.step()


def test_a_run_resumes_to_the_same_student(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    def recipe(name):
        return load_recipe(
            tiny_recipe(
                scenes_dir, tiny_model_dir, tmp_path, name=name,
                student={"model": str(tiny_model_dir), "dtype": "bfloat16"},
                stage={"steps": 3, "checkpoint": {"interval": 2}, "optimizer": {"lr": 1e-5}},
            )
        )  # fmt: skip

    whole = pipeline.run(recipe("whole")) / "01-mimic"
    step = stage.Stage.step

    def broken(self, number, batches):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(stage.Stage, "step", broken)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        pipeline.run(recipe("cut"))
    monkeypatch.setattr(stage.Stage, "step", step)
    cut = pipeline.run(recipe("cut")) / "01-mimic"
    one, other = (load_file(f / "student" / "model.safetensors") for f in (whole, cut))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert json.loads((whole / "student/config.json").read_text())["dtype"] == "bfloat16"


def test_the_plan_counts_the_copies(scenes_dir, tiny_model_dir, tmp_path):
    def needed(dtype):
        student = {"model": str(tiny_model_dir), "dtype": dtype}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, student=student)
        (stage,) = make_plan(load_recipe(raw))["members"]["student"]["stages"]
        return stage["trainable"], stage["memory_bytes"]

    count, half = needed("bfloat16")
    assert half["student_weights"] == 2 * count
    assert (half["gradients"], half["optimizer"]) == (4 * count, 12 * count)
    count, single = needed("float32")
    assert single["student_weights"] == single["gradients"] == 4 * count
    assert single["optimizer"] == 8 * count


@pytest.mark.parametrize(
    ("dtype", "engine", "says"),
    [
        ("float16", {}, "float16 gradients underflow"),
        ("bfloat16", {"kind": "deepspeed", "zero": 2}, "master weights of a bfloat16 student"),
    ],
)
def test_what_would_lose_updates_is_refused(
    dtype, engine, says, scenes_dir, tiny_model_dir, tmp_path
):
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path,
        student={"model": str(tiny_model_dir), "dtype": dtype},
        stage={"engine": {"device": "cpu", **engine}},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=says):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "tiny").exists()
