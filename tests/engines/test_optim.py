"""Optimizers against their equations, schedules against theirs."""

import json
import math

import pytest
import torch

from mmkd.engines import build
from mmkd.engines.optim import build_optimizer, build_schedule, forward_schedule
from mmkd.recipe import OptimizerConfig, ScheduleConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.runtime import distributed
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe


def adam(weight, gradients, config, decay):
    """Adam in float64 (Kingma & Ba, arXiv 1412.6980, algorithm 1) with decoupled weight decay
    (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2)."""
    weight = weight.detach().double()
    first = second = torch.zeros_like(weight)
    a, b = config.betas
    for number, gradient in enumerate(gradients, 1):
        gradient = gradient.double()
        if config.kind == "adam":
            gradient = gradient + decay * weight
        else:
            weight = weight * (1 - config.lr * decay)
        first = a * first + (1 - a) * gradient
        second = b * second + (1 - b) * gradient**2
        mean, variance = first / (1 - a**number), second / (1 - b**number)
        weight = weight - config.lr * mean / (variance.sqrt() + config.eps)
    return weight


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
def test_adam_follows_its_equations(kind, fused):
    config = OptimizerConfig(kind=kind, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (5, 3), "vector": (7,)}
    weights = {
        n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()
    }
    gradients = {n: torch.randn(6, *s, generator=generator) for n, s in shapes.items()}
    decay = {"matrix": 0.1, "vector": 0.0}
    expected = {n: adam(w, gradients[n], config, decay[n]) for n, w in weights.items()}
    optimizer = build_optimizer(weights.values(), config, fused=fused)
    for step in range(6):
        for name, weight in weights.items():
            weight.grad = gradients[name][step].clone()
        optimizer.step()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedules_and_where_they_go_on(kind):
    config = ScheduleConfig(kind=kind, warmup=0.1, min_ratio=0.2)

    def fresh():
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = build_optimizer([weight], OptimizerConfig(lr=2.0))
        return optimizer, build_schedule(optimizer, config, 100)

    optimizer, schedule = fresh()
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    start = 0.4 if kind == "wsd" else 0.0  # transformers' warms up from the least rate
    assert rates[:11] == pytest.approx([start + (2.0 - start) * i / 10 for i in range(11)])
    half = {
        "cosine": 0.4 + 1.6 * (1 + math.cos(math.pi * 45 / 90)) / 2,
        "linear": 0.4 + 1.6 * 45 / 90,
        "constant": 2.0,
        "wsd": 2.0,
    }
    assert rates[55] == pytest.approx(half[kind])
    other, later = fresh()
    forward_schedule(later, 60)
    assert other.param_groups[0]["lr"] == rates[60] == later.get_last_lr()[0]
    other.step()
    later.step()
    assert later.get_last_lr()[0] == rates[61]


def test_fused_adam_under_offload_goes_on_where_it_stopped(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    """What GPUs use, here with the states on the CPU."""
    pytest.importorskip("deepspeed")

    def run(name, stop=None):
        settings = {
            "steps": 6,
            "checkpoint": {"interval": 2},
            "engine": {"device": "cpu", "kind": "deepspeed", "zero": 3, "offload": "all"},
        }
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, stage=settings)

        with broken_off(lambda stage, number: number == stop):
            pipeline.run(load_recipe(raw))
        lines = (tmp_path / name / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    plain = run("plain")
    make = build.build_optimizer
    monkeypatch.setattr(build, "build_optimizer", lambda *args, **_: make(*args, fused=True))
    fused = run("fused")
    assert fused == pytest.approx(plain, rel=1e-5)
    run("stopped", stop=4)
    assert run("stopped") == fused


def test_a_second_run_after_the_processes_parted(scenes_dir, tiny_model_dir, tmp_path):
    """A run that scores leaves its group of processes; the next one makes another."""
    pytest.importorskip("deepspeed")
    for name in ("one", "two"):
        engine = {"device": "cpu", "kind": "deepspeed", "zero": 2}
        stage = {"steps": 1, "engine": engine}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, stage=stage)
        pipeline.run(load_recipe(raw))
        distributed.disconnect()
    metrics = [(tmp_path / n / "01-mimic" / "metrics.jsonl").read_text() for n in ("one", "two")]
    assert len({json.loads(text)["loss"] for text in metrics}) == 1


def rates(steps, **settings):
    """The learning rate of each step, of a stage whose rate is 1."""
    optimizer = build_optimizer(
        [torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(kind="sgd", lr=1.0)
    )
    schedule = build_schedule(optimizer, ScheduleConfig(**settings), steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.97, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_every_stage_reaches_its_rate_whatever_it_rounds_to(kind, warmup, steps):
    found = rates(steps, kind=kind, warmup=warmup, decay=0.5)
    assert max(found) == pytest.approx(1.0)
    assert all(0 <= rate <= 1 for rate in found)


@pytest.mark.parametrize(
    ("warmup", "decay", "steps"), [(0.5, 0.5, 3), (0.5, 0.5, 11), (0.9, 0.9, 40)]
)
def test_warmup_and_decay_meet_without_a_jump(warmup, decay, steps):
    found = rates(steps, kind="wsd", warmup=warmup, decay=decay)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert found[top] == pytest.approx(1.0)
