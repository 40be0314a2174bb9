"""Transport between groups of a record's tokens, as an objective."""

import json

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model
from mmkd.objectives import Signals, build_objective
from mmkd.objectives.divergence_settings import SinkhornConfig
from mmkd.ops import Head, linear_sinkhorn
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe
from tests.support.relating import TARGETS, B, T, normal
from tests.support.tiny import write_tiny_model

H, V = 5, 11


def signals(seed):
    return Signals(normal(B, T, H, seed=seed), normal(V, H, seed=seed + 1))


@pytest.mark.parametrize("region", ["response", "vision", "prompt", "all"])
def test_groups_are_tokens_of_one_record_in_order(region):
    student, teacher = signals(0), signals(2)
    objective = build_objective(SinkhornConfig(kind="sinkhorn", region=region, group=2))
    rows = objective.rows(TARGETS)
    found = objective(student, teacher, TARGETS, count=7).loss
    total = 0
    for mine, theirs, chosen in zip(student.hidden, teacher.hidden, rows, strict=True):
        places = chosen.nonzero()[:, 0]
        for group in places.split(2):
            if len(group):
                total += linear_sinkhorn(
                    Head(mine[group], student.head_weight),
                    Head(theirs[group], teacher.head_weight),
                    [len(group)],
                )
    torch.testing.assert_close(found, total / 7)
    assert float(found.detach()) > 0


def run(scenes_dir, model, teacher, out, name, **stage):
    raw = tiny_recipe(
        scenes_dir, model, out, name=name, teacher=teacher,
        stage={
            "objectives": [
                {"kind": "kl"},
                {"kind": "sinkhorn", "group": 4},
                {"kind": "sinkhorn", "name": "of_images", "region": "vision", "epsilon": 0.05},
            ],
            "steps": 2,
            "optimizer": {"kind": "sgd", "lr": 0.1},
            **stage,
        },
    )  # fmt: skip
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def other(tiny_model_dir, tmp_path):
    """A teacher other than the student."""
    write_tiny_model(tiny_model_dir, tmp_path / "other")
    model = load_model(ModelConfig(model=str(tmp_path / "other")))
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    model.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_losses_do_not_depend_on_the_batch_layout(scenes_dir, tiny_model_dir, tmp_path, other):
    keys = ("loss", "sinkhorn", "of_images", "grad_norm")
    layouts = [{"size": 4}, {"size": 1, "accumulate": 4}]
    whole, parts = (
        run(scenes_dir, tiny_model_dir, {"model": other}, tmp_path, f"of-{b['size']}", batch=b)
        for b in layouts
    )
    for got, want in zip(parts, whole, strict=True):
        for key in keys:
            assert want[key] > 0
            assert got[key] == pytest.approx(want[key], rel=1e-4), key


def test_each_of_several_teachers_is_compared(scenes_dir, tiny_model_dir, tmp_path, other):
    teachers = [
        {"name": "a", "model": str(tiny_model_dir)},
        {"name": "b", "model": other, "weight": 0.5},
    ]
    first, *_ = run(scenes_dir, tiny_model_dir, teachers, tmp_path, "two")
    assert first["sinkhorn.a"] == pytest.approx(0, abs=1e-5)  # it is the student
    assert first["sinkhorn.b"] > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"size": 4, "pack": 2048}}, "sinkhorn relates the tokens of a row"),
        ({"objectives": [{"kind": "sinkhorn", "group": 33}]}, "group"),
    ],
)
def test_what_cannot_be_honoured_is_refused(scenes_dir, tiny_model_dir, tmp_path, changes, message):
    teacher = {"model": str(tiny_model_dir)}
    with pytest.raises(RecipeError, match=message):
        run(scenes_dir, tiny_model_dir, teacher, tmp_path, "bad", **changes)
    assert not (tmp_path / "bad").exists()
