"""The best student by held-out records: kept, resumed after a kill, and stopped for."""

import json

import pytest

from mmkd.errors import CheckpointError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support.slow import only
from tests.support.validated_runs import (
    Broken,
    break_off,
    lines,
    losses,
    run,
    same_weights,
    validated_recipe,
)


@pytest.fixture
def worsening(scenes_dir, tiny_model_dir, tmp_path):
    """A stage whose validation is best in its middle: the learning rate is far too high."""

    def make(name, steps=6, checkpoint=1, **validation):
        validation = {"interval": 1, "records": 4, "metric": "answer_ce", **validation}
        raw = validated_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name, validation=validation, teacher=None
        )
        raw["stages"][0] |= {
            "objectives": [{"kind": "ce"}],
            "steps": steps,
            "batch": {"size": 2},
            "optimizer": {"lr": 0.4},
            "schedule": {"kind": "constant", "warmup": 0},
            "checkpoint": {"interval": checkpoint},
        }
        return raw

    return make


def test_the_best_student_is_kept(worsening):
    folder = run(worsening("kept", keep="best"))
    found = lines(folder)
    values = [line["answer_ce"] for line in found]
    best = values.index(min(values)) + 1
    assert 1 < best < 5, values
    done = json.loads((folder / "01-mimic" / "done.json").read_text())
    assert done["validation"]["best_step"] == done["validation"]["kept_step"] == best
    assert not (folder / "01-mimic" / "checkpoints").exists()
    # the very weights of that step: a stage of a constant rate that ends there
    short = run(worsening("short", steps=best, patience=9))
    assert same_weights(folder, short)


@pytest.mark.parametrize("checkpoint", only([2], [1, 2]))
def test_the_best_student_survives_a_kill_before_any_step(worsening, monkeypatch, checkpoint):
    want = run(worsening("whole", keep="best"))
    for at in (2, 4, 6):
        raw = worsening(f"broken-{at}", checkpoint=checkpoint, keep="best")
        with monkeypatch.context() as patch:
            break_off(patch, at)
            with pytest.raises(Broken):
                run(raw)
        got = run(raw)
        assert same_weights(got, want), at
        assert losses(got) == losses(want)
        strip = [[{**line, "seconds": 0} for line in lines(f)] for f in (got, want)]
        assert strip[0] == strip[1]


def test_weights_that_a_resumed_stage_needs_are_kept(worsening, monkeypatch):
    """Best after the newest checkpoint, and gone on with from an older one."""
    raw = worsening("pruned", steps=5, keep="best", checkpoint=2)
    with monkeypatch.context() as patch:
        break_off(patch, 4)
        with pytest.raises(Broken):
            run(raw)
    saved = pipeline.run_folder(load_recipe(raw)).path / "01-mimic" / "checkpoints"
    kept = sorted(p.name for p in (saved / "best").glob("step-*"))
    bests = [line["step"] for line in lines(saved.parent.parent) if line["best"]]
    assert kept == [f"step-{s}" for s in bests if s >= max(b for b in bests if b <= 2)]
    for name in kept:
        files = json.loads((saved / "best" / name / "state.json").read_text())["files"]
        assert not any("optimizer" in file for file in files)


def test_only_the_best_weights_and_those_of_a_checkpoint_are_on_the_disk(worsening, monkeypatch):
    """Where every validation is better than the last one, and checkpoints are rare."""
    raw = worsening("improving", steps=8, checkpoint=4, keep="best")
    raw["stages"][0]["optimizer"] = {"lr": 1e-3}
    with monkeypatch.context() as patch:
        break_off(patch, 8)
        with pytest.raises(Broken):
            run(raw)
    folder = pipeline.run_folder(load_recipe(raw)).path
    assert [line["best"] for line in lines(folder)] == [True] * 7
    best = folder / "01-mimic" / "checkpoints" / "best"
    assert sorted(path.name for path in best.iterdir()) == ["step-4", "step-7"]


def test_a_stage_without_improvement_stops(worsening):
    folder = run(worsening("patient", steps=12, keep="best", patience=2))
    found = lines(folder)
    values = [line["answer_ce"] for line in found]
    best = values.index(min(values)) + 1
    assert len(found) == len(lines(folder, "metrics.jsonl")) == best + 2 < 12
    done = json.loads((folder / "01-mimic" / "done.json").read_text())
    assert done["steps"] == best + 2
    assert done["validation"]["kept_step"] == best


def test_damaged_best_weights_are_an_error(worsening, monkeypatch):
    raw = worsening("damaged", keep="best")
    with monkeypatch.context() as patch:
        break_off(patch, 6)
        with pytest.raises(Broken):
            run(raw)
    folder = pipeline.run_folder(load_recipe(raw)).path / "01-mimic" / "checkpoints" / "best"
    for path in folder.glob("step-*/tensors*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"best.*damaged.*delete the stage"):
        run(raw)
