"""Image-text affinities, against float64 twins and on real models."""

import importlib
import json

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.objectives import Signals, Targets, build_objective
from mmkd.objectives.affinity import AffinityConfig
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe
from tests.support.relating import (
    LAYOUT,
    TARGETS,
    B,
    T,
    affinity_twin,
    losses_of_training,
    mask,
    normal,
)


@pytest.mark.parametrize("theirs", [None, 0.2])
@pytest.mark.parametrize("center", [True, False])
def test_affinities_equal_their_twin(center, theirs):
    student, teacher = normal(B, T, 5), normal(B, T, 8, seed=1)
    config = AffinityConfig(
        kind="affinity", temperature=0.5, teacher_temperature=theirs, center=center
    )
    objective = build_objective(config)
    assert objective.rows(TARGETS).nonzero().tolist() == [[0, 3], [1, 2]]
    head = torch.zeros(1, 1)
    got = objective(Signals(student, head), Signals(teacher, head), TARGETS, 2.0).loss
    want = affinity_twin(
        student, teacher.detach(), LAYOUT, center=center, temperatures=(0.5, theirs or 0.5)
    )
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(x, student)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)
    same = objective(Signals(student, head), Signals(student, head), TARGETS, 2.0).loss
    if theirs is None:
        assert same.item() == pytest.approx(0, abs=1e-12)
    else:
        assert same.item() > 1e-3


def test_a_batch_without_pictures_has_no_affinity():
    text = Targets(TARGETS.input_ids, TARGETS.attention, TARGETS.response, mask("x"))
    student = normal(B, T, 5)
    objective = build_objective(AffinityConfig(kind="affinity"))
    loss = objective(*[Signals(student, torch.zeros(1, 1))] * 2, text, 1.0).loss
    assert loss.item() == 0
    loss.backward()


@pytest.mark.parametrize("center", [True, False])
def test_a_sample_alone_has_nothing_to_tell_apart_and_does_not_count(center):
    config = AffinityConfig(kind="affinity", center=center, gather=False)
    objective = build_objective(config)
    alone = Targets(
        TARGETS.input_ids[:1], TARGETS.attention[:1], TARGETS.response[:1], TARGETS.vision[:1]
    )
    assert objective.rows(TARGETS).sum() == 2
    assert objective.rows(alone).sum() == 0
    signals = [Signals(normal(1, T, 5, seed=s), torch.zeros(1, 1)) for s in (0, 1)]
    loss = objective(*signals, alone, 2.0).loss
    assert loss.item() == 0
    loss.backward()
    # a micro-batch with one image among texts is no other case
    vision = TARGETS.vision.clone()
    vision[1:] = False
    mixed = Targets(TARGETS.input_ids, TARGETS.attention, TARGETS.response, vision)
    assert objective.rows(mixed).sum() == 0
    # a step of micro-batches counts each record, and may still have only one
    gathering = build_objective(config.model_copy(update={"gather": True}))
    assert gathering.rows(alone).sum() == gathering.rows(mixed).sum() == 1
    loss = gathering(*signals, alone, 1.0).loss
    assert loss.item() == 0
    loss.backward()


def affinity_means(scenes_dir, model, tmp_path, batch, *, gather=False):
    """The objective's value in the first step."""
    raw = tiny_recipe(
        scenes_dir, model, tmp_path, name="-".join(map(str, batch.values())),
        teacher={"model": str(model)},
        student={"model": str(model), "convert": [{"kind": "width_pruning", "decoder": 16}]},
        stage={
            "objectives": [{"kind": "affinity", "gather": gather}], "batch": batch, "steps": 1,
        },
    )  # fmt: skip
    lines = (pipeline.run(load_recipe(raw)) / "01-mimic" / "metrics.jsonl").read_text()
    return json.loads(lines.splitlines()[0])["affinity"]


def test_micro_batches_without_contrast_are_left_out_of_the_mean(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    """With a third micro-batch of one record the step's value is that of the two others."""
    stream = importlib.import_module("mmkd.data.stream")

    def cut(sizes):
        def by_size(records, size):
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
            return [list(records[e - n : e]) for e, n in zip(ends, sizes, strict=True)]

        return by_size

    values = []
    for number, sizes in enumerate(([3, 3], [3, 3, 1])):
        monkeypatch.setattr(stream, "by_size", cut(sizes))
        batch = {"size": 3, "accumulate": 3 - (number == 0), "group_by_length": False}
        values.append(affinity_means(scenes_dir, tiny_model_dir, tmp_path, batch))
    assert values[0] > 0
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize(
    "batch", [{"size": 1}, {"size": 1, "accumulate": 8}, {"size": 1, "total": 4},
              {"tokens": 4096, "total": 1}],
)  # fmt: skip
def test_a_layout_without_contrast_is_refused(scenes_dir, tiny_model_dir, tmp_path, batch):
    with pytest.raises(RecipeError, match="objective affinity: it compares the records"):
        affinity_means(scenes_dir, tiny_model_dir, tmp_path, batch)


@pytest.mark.parametrize("batch", [{"size": 1}, {"tokens": 4096, "total": 1}])
def test_a_step_without_contrast_is_refused(scenes_dir, tiny_model_dir, tmp_path, batch):
    with pytest.raises(RecipeError, match="the records of a step, and each step has one record"):
        affinity_means(scenes_dir, tiny_model_dir, tmp_path, batch, gather=True)


def test_it_trains_a_student(scenes_dir, tiny_model_dir, tmp_path):
    losses = losses_of_training(scenes_dir, tiny_model_dir, tmp_path, {"kind": "affinity"})
    assert losses[0] > losses[-1] > 0
