"""Validation on every engine, with one and two processes: the same values, the same kept student.

Five records in micro-batches of two make three of them: one process has one more than the other,
and where weights are spread over both, each forward takes both.
"""

import json

import pytest
import torch

from tests.engines.test_deepspeed import Runs
from tests.support.slow import only, runs_all_cases

pytest.importorskip("deepspeed")

QUICK = ["torch", "zero2", "zero3"]
ENGINES = ["torch", "zero0", "zero1", "zero2", "zero3", "sharded-torch", "waiting"]
STEPS, STOP = 4, 4
KINDS = [
    {"kind": "ce"},
    {"kind": "kl", "weight": 0.5},
    {"kind": "relation"},
    {"kind": "affinity"},
    {"kind": "layer_l2"},
]
NAMES = ("loss", "ce", "kl", "relation", "affinity", "layer_l2", "answer_ce", "teacher_kl")


@pytest.fixture(scope="module")
def runs(request, scenes_dir, tiny_model_dir, tmp_path_factory) -> Runs:
    """The teacher is what the student begins as: the student leaves it step by step, so that the
    first validation is the best by `kl`."""
    made = Runs(scenes_dir, tiny_model_dir, tmp_path_factory.mktemp("runs"))

    def recipe(name, engine, **validation):
        how = {"interval": 1, "records": 5, "metric": "kl", "keep": "best", **validation}
        raw = made.recipe(name, engine, objectives=KINDS, steps=STEPS, validation=how)
        raw["student"] = {"model": str(tiny_model_dir)}
        raw["stages"][0]["objectives"][-1] = {"kind": "layer_l2", "layers": [1]}
        raw["data"]["validation"] = str(scenes_dir / "validation.parquet")
        return raw

    off = {"interval": None, "metric": "loss", "keep": "last"}
    whole = runs_all_cases(request)
    two = [(recipe(f"{engine}-2", engine), None) for engine in (ENGINES if whole else QUICK)]
    for engine in ["torch", "zero3"] if whole else ["zero3"]:
        two.append((recipe(f"{engine}-off", engine, **off), None))
    for engine in ["zero1", "zero3"] if whole else ["zero3"]:
        two += [(recipe(f"{engine}-again", engine), stop) for stop in (STOP, None)]
    made.start([(recipe("torch-1", "torch"), None)], 1)
    made.start(two, 2)
    return made


def validations(runs: Runs, name: str) -> list[dict]:
    path = runs.folder / name / "01-mimic" / "validation.jsonl"
    return [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("engine", only(QUICK, ENGINES))
def test_every_engine_measures_the_same(runs, engine):
    got, want = validations(runs, f"{engine}-2"), validations(runs, "torch-1")
    assert [line["step"] for line in got] == [1, 2, 3, 4]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for key in NAMES:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (key, mine["step"])
        exact = ("records", "supervised_tokens", "best")
        assert [mine[k] for k in exact] == [theirs[k] for k in exact]
    assert want[0]["records"] == 5


@pytest.mark.parametrize("engine", only(QUICK, ENGINES))
def test_every_engine_keeps_the_best_student(runs, engine):
    done = json.loads((runs.folder / f"{engine}-2" / "01-mimic" / "done.json").read_text())
    assert done["validation"]["kept_step"] == 1
    weights, expected = runs.weights(f"{engine}-2"), runs.weights("torch-1")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", only(["zero3"], ["torch", "zero3"]))
def test_training_on_two_processes_does_not_notice(runs, engine):
    lines = [runs.metrics(f"{engine}-{how}") for how in ("2", "off")]
    assert [m["loss"] for m in lines[0]] == [m["loss"] for m in lines[1]]
    assert [m["grad_norm"] for m in lines[0]] == [m["grad_norm"] for m in lines[1]]
    kept, last = runs.weights(f"{engine}-2"), runs.weights(f"{engine}-off")
    assert any(not torch.equal(t, last[name]) for name, t in kept.items())


@pytest.mark.parametrize("engine", only(["zero3"], ["zero1", "zero3"]))
def test_a_broken_off_stage_keeps_the_same_student(runs, engine):
    again, whole = f"{engine}-again", f"{engine}-2"
    assert validations(runs, again) == validations(runs, whole)
    mine, theirs = runs.weights(again), runs.weights(whole)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
