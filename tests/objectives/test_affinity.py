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
from tests.support.relating import LAYOUT, TARGETS, B, T, losses_of_training, mask, normal


def affinity_twin(student, teacher, center, temperatures):
    """Rows 0 and 1 have images."""
    tables = []
    for hidden, temperature in zip((student, teacher), temperatures, strict=True):
        pictures, answers = [], []
        for b in (0, 1):
            said = [t - 1 for t in range(T) if LAYOUT[b][t] == "r"]
            pictures.append(hidden[b, [t for t in range(T) if LAYOUT[b][t] == "v"]].mean(0))
            answers.append(hidden[b, said].mean(0))
        for group in (pictures, answers):
            mean = sum(group) / 2 * center
            group[:] = [(x - mean) / (x - mean).norm() for x in group]
        tables.append(
            torch.stack([torch.stack([i @ t / temperature for t in answers]) for i in pictures])
        )
    mine, theirs = tables
    total = 0.0
    for k in (0, 1):
        for m, t in ((mine[k], theirs[k]), (mine[:, k], theirs[:, k])):
            p, q = t.softmax(0), m.softmax(0)
            total = total + (p * (p / q).log()).sum()
    return total / 2


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
    want = affinity_twin(student, teacher.detach(), center, (0.5, theirs or 0.5))
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
    objective = build_objective(AffinityConfig(kind="affinity", center=center))
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


def affinity_means(scenes_dir, model, tmp_path, batch):
    """The objective's value in the first step, and whether the recipe is refused."""
    raw = tiny_recipe(
        scenes_dir, model, tmp_path, name="-".join(map(str, batch.values())),
        teacher={"model": str(model)},
        student={"model": str(model), "convert": [{"kind": "width_pruning", "decoder": 16}]},
        stage={"objectives": [{"kind": "affinity"}], "batch": batch, "steps": 1},
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


def test_it_trains_a_student(scenes_dir, tiny_model_dir, tmp_path):
    losses = losses_of_training(scenes_dir, tiny_model_dir, tmp_path, {"kind": "affinity"})
    assert losses[0] > losses[-1] > 0
