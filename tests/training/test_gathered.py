"""Objectives that compare all records of a step: exact in any layout, with and without dropout."""

import json

import pytest
import torch
from torch.nn.functional import dropout

from mmkd.data.batch import Batch
from mmkd.objectives import Signals, Targets, build_objective, score
from mmkd.objectives.affinity import AffinityConfig
from mmkd.objectives.layer_settings import RelationConfig
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.training.checkpoint import random_states
from mmkd.training.gathered import HeldOutFeatures, MicroBatch, first_pass, gathered_objectives
from tests.support.breaking import broken_off
from tests.support.ranks import on_ranks
from tests.support.recipes import tiny_recipe
from tests.support.relating import affinity_twin, normal
from tests.support.tiny import write_tiny_model
from tests.support.validated_runs import validated_recipe

LAYOUT = ["vvpprr.", "vpprrrr", "pprrr..", "pvvprr.", "pprrrr.", "vpr...."]
SIZES = [[6], [1] * 6, [2, 2, 2], [4, 2], [2, 1, 3]]
TEACHER = normal(6, 7, 8, seed=1).detach()
INPUTS = normal(6, 7, 6, seed=2).detach()
HEAD = torch.zeros(1, 1)
TAU = {"temperature": 0.5, "teacher_temperature": 0.3}


def targets(records):
    def mask(letters):
        return torch.tensor([[c in letters for c in LAYOUT[r]] for r in records])

    ids = torch.zeros(len(records), 7, dtype=torch.long)
    sources = torch.tensor([[r % 2] * 7 for r in records])
    return Targets(ids, mask("vpr"), mask("r"), mask("v"), sources=sources)


def batches_of(sizes):
    order = iter(range(6))
    parts = [[next(order) for _ in range(size)] for size in sizes]
    return [
        Batch({"x": INPUTS[part]}, targets(part), [str(r) for r in part], indices=part)
        for part in parts
    ]


class Step:
    """A step of a linear student; the teachers' final hidden states are fixed."""

    def __init__(self, batches, objectives, *, drop=0.0, teachers=("",)):
        self.batches, self.objectives, self.drop, self.teachers = (
            batches,
            objectives,
            drop,
            teachers,
        )
        self.weight = normal(6, 5, seed=3)
        self.prepared = 0
        self.rows = {
            o.name: float(sum(o.rows(b.targets.of(o.sources)).sum() for b in batches))
            for o in objectives
        }

    def student(self, batch):
        hidden = torch.cat([dropout(batch.inputs["x"], self.drop) @ self.weight] * 2)
        return Signals(hidden, HEAD).truncate(len(batch.indices))  # as with a filler

    def prepare(self, batch, objectives):
        self.prepared += 1
        signals = Signals(torch.cat([TEACHER[batch.indices]] * 2), HEAD)
        asked = {
            name: signals
            for name in self.teachers
            if any(
                bool(o.rows(batch.targets.of(o.sources)).any())
                for o in objectives
                if o.teacher in (None, name)
            )
        }
        return MicroBatch(batch, objectives, asked)

    def read(self, micro, read):
        with torch.no_grad():
            return read(self.student(micro.batch))

    def run(self, rows=None):
        """The objectives' values and the gradient, of this process."""
        rows = rows or self.rows
        gathered = gathered_objectives(self.objectives, rows)
        micros = first_pass(
            self.batches,
            self.objectives,
            {o.name: rows[o.name] for o in gathered},
            prepare=self.prepare,
            read=self.read,
        )
        values = dict.fromkeys(rows, 0.0)
        for micro in micros:
            micro.restore_random_states()
            student = self.student(micro.batch)
            loss, said = score(micro.objectives, student, micro.compared, micro.batch.targets, rows)
            loss.backward()
            values = {name: values[name] + float(said[name]) for name in values}
        return values, self.weight.grad


def affinity(**settings):
    return build_objective(AffinityConfig(kind="affinity", **TAU, **settings))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_loss_and_its_gradient_are_those_of_all_records_at_once(sizes, center):
    step = Step(batches_of(sizes), [affinity(center=center, weight=2.0)])
    values, gradient = step.run()
    weight = normal(6, 5, seed=3)
    want = affinity_twin(INPUTS @ weight, TEACHER, LAYOUT, center=center, temperatures=(0.5, 0.3))
    (wanted,) = torch.autograd.grad(2 * want, weight)
    assert values["affinity"] == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)
    assert step.prepared == len(sizes)  # the teacher runs once


def test_both_passes_draw_the_same_dropout():
    """One graph over all micro-batches, which draws in the same order, is the reference."""
    torch.manual_seed(5)
    sizes, states = [2, 1, 3], random_states()
    values, gradient = Step(batches_of(sizes), [affinity()], drop=0.4).run()
    twin = Step(batches_of(sizes), [affinity()], drop=0.4)
    torch.set_rng_state(states["torch"])
    hidden = torch.cat([twin.student(b).hidden for b in twin.batches])
    want = affinity_twin(hidden, TEACHER, LAYOUT, center=True, temperatures=(0.5, 0.3))
    want.backward()
    assert values["affinity"] == pytest.approx(want.item(), rel=1e-12)
    torch.testing.assert_close(gradient, twin.weight.grad, rtol=1e-10, atol=1e-12)


def test_other_objectives_find_the_teacher_in_the_second_pass():
    relation = build_objective(RelationConfig(kind="relation", features="hidden", region="all"))
    found = [Step(batches_of(sizes), [relation, affinity()]) for sizes in ([6], [2, 1, 3])]
    (whole, gradient), (values, parts) = [step.run() for step in found]
    assert values == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(parts, gradient, rtol=1e-5, atol=1e-7)  # relation is in float32
    assert found[1].prepared == 3


@pytest.mark.parametrize("sizes", [[3, 3], [1] * 6], ids=str)
def test_each_of_several_teachers_compares_the_records_of_its_sources(sizes):
    """Source 1 has the records 1, 3 and 5, all with images."""
    pair = [
        affinity().for_teacher("a", 1.0, None),
        affinity().for_teacher("b", 0.5, frozenset({1})),
    ]
    step = Step(batches_of(sizes), pair, teachers=("a", "b"))
    values, gradient = step.run()
    weight = normal(6, 5, seed=3)
    hidden, how = INPUTS @ weight, {"center": True, "temperatures": (0.5, 0.3)}
    every = affinity_twin(hidden, TEACHER, LAYOUT, **how)
    some = affinity_twin(hidden[1::2], TEACHER[1::2], LAYOUT[1::2], **how)
    assert values == pytest.approx({"affinity.a": every.item(), "affinity.b": some.item()})
    (wanted,) = torch.autograd.grad(every + 0.5 * some, weight)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("shares", [([2, 1], [2, 1]), ([1, 1, 1], [1, 1, 1]), ([3], [3])], ids=str)
def test_two_processes_compare_all_their_records(shares, tmp_path):
    """The second process's records differ in number, and one of its micro-batches has none. With
    one micro-batch on each process there is no first pass."""
    order = [0, 2, 4, 1, 3, 5]  # one record with an image, then three

    def work(rank):
        starts = iter(order[3 * rank : 3 * rank + 3])
        parts = [[next(starts) for _ in range(size)] for size in shares[rank]]
        batches = [Batch({"x": INPUTS[p]}, targets(p), [], indices=p) for p in parts]
        objective = affinity().for_teacher("a", 1.0, None)
        step, rows = Step(batches, [objective], teachers=("a",)), {"affinity.a": 4.0}
        if len(batches) > 1:
            values, gradient = step.run(rows)
            return values["affinity.a"], gradient.tolist()
        micro = step.prepare(batches[0], [objective])
        student = step.student(batches[0])
        loss, said = score([objective], student, micro.compared, batches[0].targets, rows)
        loss.backward()
        return float(said["affinity.a"]), step.weight.grad.tolist()

    found = on_ranks(work, 2, tmp_path)
    assert not [result for result in found if isinstance(result, str)]
    weight = normal(6, 5, seed=3)
    want = affinity_twin(INPUTS @ weight, TEACHER, LAYOUT, center=True, temperatures=(0.5, 0.3))
    want.backward()
    assert sum(value for value, _ in found) == pytest.approx(want.item(), rel=1e-12)
    assert found[0][0] == pytest.approx(want.item() / 4, rel=1e-12)  # its share of the records
    torch.testing.assert_close(sum(torch.tensor(g).double() for _, g in found), weight.grad)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_validation_compares_groups_of_as_many_records_as_a_step(sizes):
    """Groups of four, of which the second one has a single record with an image."""
    objective = affinity()
    kept = HeldOutFeatures([objective])
    batches = batches_of(sizes)
    step = Step(batches, [objective])
    for batch in [*batches, batches[0]]:
        counts = batch is not batches[0] or not kept._found["affinity"]
        objectives = kept.objectives(batch, counts)
        with torch.no_grad():
            loss, said = score(
                objectives,
                step.student(batch),
                step.prepare(batch, objectives).compared,
                batch.targets,
                {"affinity": 1.0},
            )
        assert loss == said["affinity"] == 0
    cpu = torch.device("cpu")
    hidden, how = INPUTS @ step.weight, {"center": True, "temperatures": (0.5, 0.3)}
    first = affinity_twin(hidden[:4], TEACHER[:4], LAYOUT[:4], **how).item()
    assert kept.means(range(6), 4, cpu) == pytest.approx({"affinity": first})
    every = affinity_twin(hidden, TEACHER, LAYOUT, **how).item()
    assert kept.means(range(6), 6, cpu) == pytest.approx({"affinity": every})
    assert HeldOutFeatures([objective]).means(range(6), 4, cpu) == {"affinity": 0}


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    """A student with dropout that is not its teacher."""
    model = tmp_path / "dropout"
    write_tiny_model(scenes_dir / "processor", model, dropout=0.3)

    def make(name, **stage):
        return tiny_recipe(
            scenes_dir, model, tmp_path, name=name,
            teacher={"model": str(tiny_model_dir)},
            student={"model": str(model), "convert": [{"kind": "width_pruning", "decoder": 16}]},
            stage={
                "objectives": [{"kind": "affinity"}, {"kind": "kl", "weight": 0.5}],
                "batch": {"size": 2, "total": 6},
                "checkpoint": {"interval": 2},
                **stage,
            },
        )  # fmt: skip

    return make


def metrics(folder):
    return [json.loads(x) for x in (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_dropout_goes_on_where_it_stopped(recipe):
    whole = metrics(pipeline.run(load_recipe(recipe("whole"))))
    raw = load_recipe(recipe("again"))
    with broken_off(lambda stage, number: number == 4):
        pipeline.run(raw)
    again = metrics(pipeline.run(raw))
    assert [m["loss"] for m in again] == [m["loss"] for m in whole]
    assert len(whole) == 4
    assert all(m["affinity"] > 0 for m in whole)


def test_own_answers_are_sampled_once_in_a_step(recipe, monkeypatch):
    from mmkd.training.on_policy import OnPolicy

    sampled, own = [], OnPolicy.batch

    def batch(self, batch, step, micro):
        sampled.append((step, micro))
        return own(self, batch, step, micro)

    monkeypatch.setattr(OnPolicy, "batch", batch)
    settings = {"lmbda": 1.0, "max_new_tokens": 4}
    raw = recipe("sampled", on_policy=settings, steps=1, batch={"size": 2, "total": 4})
    (line,) = metrics(pipeline.run(load_recipe(raw)))
    assert sampled == [(1, 0), (1, 1)]
    assert line["affinity"] > 0


def test_a_validation_measures_what_training_does(scenes_dir, tiny_model_dir, tmp_path):
    """At a learning rate of zero, for the records of one step, in any micro-batches."""
    found = []
    for size in (16, 3):
        raw = validated_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            f"size-{size}",
            validation={"interval": 1, "size": size},
            data={"train": str(scenes_dir / "validation.parquet")},
            teacher={"model": str(tiny_model_dir)},
        )
        raw["student"]["convert"] = [{"kind": "width_pruning", "decoder": 16}]
        raw["stages"][0] |= {
            "objectives": [{"kind": "affinity"}],
            "steps": 1,
            "batch": {"size": 4, "total": 16},
            "optimizer": {"kind": "sgd", "lr": 1e-12},
        }
        folder = pipeline.run(load_recipe(raw))
        line = json.loads((folder / "01-mimic" / "validation.jsonl").read_text())
        found += [line["affinity"], line["loss"], metrics(folder)[0]["affinity"]]
    assert found[0] > 0
    assert found == pytest.approx([found[0]] * 6, rel=1e-4)
