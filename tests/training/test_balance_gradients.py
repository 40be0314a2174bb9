"""`balance_gradients`: weights from the norms of the objectives' gradients in the step before."""

import json
from types import SimpleNamespace

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.objectives import Signals, Targets, build_objective, score
from mmkd.objectives.divergence_settings import CrossEntropyConfig, DivergenceConfig
from mmkd.objectives.gradient_norms import GradientNorms
from mmkd.objectives.settings import AffinityConfig
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.training.gathered import MicroBatch, first_pass
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe

B, T, H, V = 2, 7, 5, 11
CONFIGS = [
    CrossEntropyConfig(weight=2.0),
    DivergenceConfig(kind="kl", region="all"),
    AffinityConfig(kind="affinity", weight=0.5),
    DivergenceConfig(kind="tvd", weight=0.0),
]
COUNTS = {"ce": 7.0, "kl": 14.0, "affinity": 4.0, "tvd": 14.0}


def normal(seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def batch(seed):
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))
    response = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
    vision = torch.tensor([[0, 1, 1, 0, 0, 0, 0]] * 2).bool()
    student = Signals(normal(seed, B, T, H).requires_grad_(), normal(1, V, H).requires_grad_())
    teacher = Signals(normal(seed + 100, B, T, H), normal(2, V, H))
    return student, teacher, Targets(ids, torch.ones(B, T).bool(), response, vision)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_weights_are_those_of_the_definition(scale):
    """Two steps of two micro-batches; `scale` is what an engine multiplies losses by."""
    objectives = [build_objective(c) for c in CONFIGS]
    norms = GradientNorms(objectives)
    given = {"ce": 2.0, "kl": 1.0, "affinity": 0.5}
    weights = {name: c / 3.5 for name, c in given.items()}
    for step in range(2):
        norms.begin(torch.device("cpu"))
        squares = dict.fromkeys(given, 0.0)
        for micro in range(2):
            student, teacher, targets = batch(10 * step + micro)
            alone = {}
            for o in objectives:
                one, _ = score([o], student, teacher, targets, COUNTS)
                if o.name in given:
                    value = one / o.config.weight
                    (g,) = torch.autograd.grad(value, student.hidden)
                    squares[o.name] += float(g.square().sum())
                    alone[o.name] = value.item()
            total, said = score(objectives, student, teacher, targets, COUNTS, norms)
            want = sum(weights[name] * value for name, value in alone.items())
            assert total.item() == pytest.approx(want, rel=1e-9)
            assert said["kl"].item() == pytest.approx(alone["kl"], rel=1e-9)
            (total * scale).backward()
        logged = norms.end(norms.sums(), scale)
        assert logged == pytest.approx({f"{n}/weight": w for n, w in weights.items()})
        shares = {name: given[name] / squares[name] ** 0.5 for name in given}
        weights = {name: share / sum(shares.values()) for name, share in shares.items()}
    assert norms.find_weights() == pytest.approx(weights, rel=1e-9)


def test_the_norm_of_a_gathered_objective_is_that_over_all_micro_batches():
    objectives = [build_objective(CONFIGS[i]) for i in (0, 2)]
    counts = {"ce": 14.0, "affinity": 4.0}
    parts = [batch(0), batch(1)]
    students = {id(targets): student for student, _, targets in parts}
    hidden, theirs = (torch.cat([p[i].hidden.detach() for p in parts]) for i in (0, 1))
    whole = Targets(*(torch.cat([getattr(p[2], name) for p in parts])
                      for name in ("input_ids", "attention", "response", "vision")))  # fmt: skip
    mine = Signals(hidden.requires_grad_(), normal(1, V, H))
    loss = objectives[1](mine, Signals(theirs, normal(2, V, H)), whole, 4.0).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    norms = GradientNorms(objectives)
    norms.begin(torch.device("cpu"))
    teachers = {id(targets): teacher for _, teacher, targets in parts}
    micros = first_pass(
        [SimpleNamespace(targets=targets) for _, _, targets in parts],
        objectives,
        {"affinity": 4.0},
        prepare=lambda b, asked: MicroBatch(b, asked, {"": teachers[id(b.targets)]}),
        read=lambda micro, features: features(students[id(micro.batch.targets)]),
    )
    for micro in micros:
        student, targets = students[id(micro.batch.targets)], micro.batch.targets
        total, _ = score(micro.objectives, student, micro.compared, targets, counts, norms)
        total.backward()
    norms.end(norms.sums(), 1.0)
    assert norms.norms[1].item() == pytest.approx(gradient.norm().item(), rel=1e-6)


def test_an_objective_without_a_gradient_keeps_its_norm():
    norms = GradientNorms([build_objective(c) for c in CONFIGS])
    norms.begin(torch.device("cpu"))
    norms.end(torch.tensor([4.0, 0.0, 0.0]), 1.0)
    [first, *unknown] = norms.norms.tolist()
    assert first == 2.0 / (2 / 3.5)
    assert unknown == [0, 0]
    assert norms.find_weights() == pytest.approx({n: c / 3.5 for n, c in norms.given.items()})
    norms.begin(torch.device("cpu"))
    norms.end(torch.tensor([0.0, 1.0, 1.0]), 1.0)
    assert norms.norms[0] == first
    assert all(n > 0 for n in norms.norms)


def lines(folder):
    text = (folder / "01-mimic" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def make(name, batch=None, **stage):
        stage = {
            "objectives": [{"kind": "ce"}, {"kind": "ce", "name": "prompt", "region": "prompt"}],
            "balance_gradients": True,
            "steps": 5,
            "batch": batch or {"size": 4},
            "optimizer": {"kind": "sgd", "lr": 0.01},
            "checkpoint": {"interval": 2},
            **stage,
        }
        teacher = {"model": str(tiny_model_dir)}
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name, teacher=teacher, stage=stage
        )
        return load_recipe(raw)

    return make


def test_a_stage_logs_them_for_any_layout_and_goes_on(recipe):
    whole = lines(pipeline.run(recipe("whole")))
    parts = lines(pipeline.run(recipe("parts", {"size": 1, "accumulate": 4})))
    with broken_off(lambda stage, number: number == 4):
        pipeline.run(recipe("stopped"))
    resumed = lines(pipeline.run(recipe("stopped")))
    assert [m["loss"] for m in resumed] == [m["loss"] for m in whole]
    assert [m["ce/weight"] for m in whole][:1] == pytest.approx([0.5])
    assert whole[-1]["ce/weight"] != pytest.approx(0.5, rel=0.05)
    for mine, theirs in zip(parts, whole, strict=True):
        for key in ("loss", "ce/weight", "prompt/weight", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key
        assert sum(theirs[f"{n}/weight"] for n in ("ce", "prompt")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([{"kind": "ce"}], "there is one objective only"),
        ([{"kind": "ce"}, {"kind": "kl", "weight": 0}], "there is one objective only"),
        ([{"kind": "ce"}, {"kind": "exits", "layers": [0]}], "objective exits does not read"),
        ([{"kind": "ce"}, {"kind": "layer_l2", "layers": [0]}], "objective layer_l2 does not read"),
    ],
)
def test_what_has_no_gradient_to_compare_is_refused(recipe, objectives, message):
    with pytest.raises(RecipeError, match=message):
        preflight.check(recipe("refused", objectives=objectives))
