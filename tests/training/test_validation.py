"""Validation: values, no effect on training, best student and early stopping."""

from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mmkd.commands.build_cache import build_cache
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, NonFiniteLossError, RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.training import stage
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model
from tests.support.validated_runs import (
    Broken,
    break_off,
    lines,
    losses,
    run,
    same_weights,
    validated_recipe,
)

EVERY_KIND = [
    {"kind": "ce"},
    {"kind": "kl", "weight": 0.5},
    {"kind": "tvd", "region": "vision"},
    {"kind": "relation"},
    {"kind": "hidden_mse", "layers": [1]},
]


@pytest.fixture(scope="module")
def teacher_dir(scenes_dir, tiny_model_dir, tmp_path_factory):
    """A teacher that says something else than the student: the tiny model after a few steps."""
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path_factory.mktemp("teacher"))
    raw["stages"][0] |= {"steps": 6, "optimizer": {"lr": 1e-2}}
    return pipeline.run(load_recipe(raw)) / "01-mimic" / "student"


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, teacher_dir, tmp_path):
    return partial(
        validated_recipe, scenes_dir, tiny_model_dir, tmp_path, teacher={"model": str(teacher_dir)}
    )


def cross_entropy_of(folder: Path, held_out: Path) -> tuple[float, float]:
    """What transformers computes for a run's student over all records' tokens, and their number."""
    source = ModelConfig(model=str(folder / "01-mimic" / "student"))
    model, processor = load_model(source), load_processor(source)
    total = count = 0.0
    data = DataConfig(train=str(held_out), max_length=128)
    encoder = Encoder(Records(data), processor, data)
    for index in range(len(encoder.records)):
        batch = encoder.encode([index])
        labels = batch.targets.input_ids.masked_fill(~batch.targets.response, -100)
        with torch.no_grad():
            loss = model(**batch.inputs, labels=labels).loss.item()
        tokens = int(batch.targets.response.sum())
        total, count = total + loss * tokens, count + tokens
    return total / count, count


def test_the_losses_are_those_of_the_models(recipe, scenes_dir):
    folder = run(recipe(validation={"interval": 2, "size": 3}))
    (line,) = lines(folder)
    loss, tokens = cross_entropy_of(folder, scenes_dir / "validation.parquet")
    assert line["answer_ce"] == pytest.approx(loss, rel=1e-5)
    assert line["ce"] == line["answer_ce"]
    assert line["teacher_kl"] == line["kl"] > 1e-3
    assert line["loss"] == pytest.approx(line["ce"] + line["kl"])
    assert (line["records"], line["supervised_tokens"]) == (16, tokens)


@pytest.mark.parametrize("kind", ["layer_l2", "mixer_mse"])
def test_a_teacher_forced_stage_measures_what_the_student_says(
    recipe, scenes_dir, tiny_model_dir, kind
):
    """In training its layers see the teacher's tensors only. Held-out answers are the student's
    own, and the objective is what it is without them."""
    values = {}
    for beside in (False, True):
        convert = [{"kind": "mamba", "layers": [1], "init": "inherit"}]
        raw = recipe(
            f"forced-{beside}",
            validation={"interval": 2},
            student={"model": str(tiny_model_dir), "convert": convert},
        )
        free = [{"kind": "kl", "weight": 0}] if beside else []
        raw["stages"][0]["objectives"] = [{"kind": kind}, *free]
        folder = run(raw)
        (values[beside],) = lines(folder)
        loss, _ = cross_entropy_of(folder, scenes_dir / "validation.parquet")
        assert values[beside]["answer_ce"] == pytest.approx(loss, rel=1e-4)
    for name in (kind, "answer_ce", "teacher_kl", "loss"):
        assert values[False][name] == pytest.approx(values[True][name], rel=1e-4)
    assert values[False]["loss"] == pytest.approx(values[False][kind])
    assert values[False]["teacher_kl"] > 1e-3


def test_a_validation_does_not_depend_on_the_batch_layout(recipe):
    found = []
    layouts = [{"size": 16}, {"size": 1}, {"size": 5}]
    batches = [{"total": 8, "tokens": 260}]
    for number, layout in enumerate([*layouts, *batches]):
        own = {"batch": layout} if layout in batches else {"batch": {"size": 8}}
        validation = {"interval": 1, **({} if layout in batches else layout)}
        raw = recipe(f"layout-{number}", validation=validation)
        raw["stages"][0] |= {**own, "objectives": EVERY_KIND, "steps": 1}
        found.append(lines(run(raw))[0])
    for line in found[1:]:
        for name in ("loss", "ce", "kl", "tvd", "relation", "hidden_mse", "teacher_kl"):
            assert line[name] == pytest.approx(found[0][name], rel=2e-4), name


def test_packed_records_are_measured_as_single_ones(recipe):
    found = []
    for pack in (None, 400):
        raw = recipe(f"pack-{pack}", validation={"interval": 1})
        raw["stages"][0] |= {"batch": {"size": 4, "pack": pack}, "steps": 1}
        found.append(lines(run(raw))[0])
    for name in ("loss", "answer_ce", "teacher_kl"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[1]["supervised_tokens"] == found[0]["supervised_tokens"]


def test_training_does_not_notice(recipe, scenes_dir, tmp_path):
    """Dropout draws on at every step, so that one number drawn more would show."""
    model = tmp_path / "dropout"
    write_tiny_model(scenes_dir / "processor", model, dropout=0.3)
    found = []
    for every in (None, 1, 3):
        raw = recipe(f"every-{every}", student={"model": str(model)})
        raw["stages"][0] |= {"validation": {"interval": every, "records": 4}, "steps": 4}
        found.append(run(raw))
    assert losses(found[0]) == losses(found[1]) == losses(found[2])
    assert same_weights(found[0], found[1])
    assert [line["step"] for line in lines(found[1])] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(found[2])] == [3, 4]
    assert not (found[0] / "01-mimic" / "validation.jsonl").exists()
    for mine in lines(found[2]):  # without dropout there is nothing to draw
        (theirs,) = (line for line in lines(found[1]) if line["step"] == mine["step"])
        assert {**mine, "seconds": 0, "best": 0} == {**theirs, "seconds": 0, "best": 0}


def test_a_share_is_never_trained_on(scenes_dir, tmp_path):
    path = scenes_dir / "train.parquet"
    data = DataConfig(train=str(path), validation=0.25)
    trained, held_out = Records(data), Records(data, held_out=True)
    names = [[records[i].id for i in range(len(records))] for records in (trained, held_out)]
    assert (len(trained), len(held_out)) == (48, 16)
    assert sorted(names[0] + names[1]) == sorted(pq.read_table(path)["id"].to_pylist())
    assert names[1] != pq.read_table(path)["id"].to_pylist()[:16]
    # replacements of bad records come from the same part
    assert {records.tried(0).__next__() for records in (trained, held_out)} == {0}
    assert len(list(trained.tried(0))) == 48
    # messages name the row of the file
    assert names[1][0] in held_out.where(0)
    (number,) = (i for i, n in enumerate(pq.read_table(path)["id"].to_pylist()) if n == names[1][0])
    assert held_out.where(0).startswith(Records(DataConfig(train=str(path))).where(number))


def test_the_scale_to_global_mean_a_longer_file_is_nearly_the_same(scenes_dir, tmp_path):
    table = pq.read_table(scenes_dir / "train.parquet")
    pq.write_table(table.slice(0, 60), tmp_path / "shorter.parquet")
    data = [DataConfig(train=str(p), validation=0.25)
            for p in (tmp_path / "shorter.parquet", scenes_dir / "train.parquet")]  # fmt: skip
    held = [Records(d, held_out=True) for d in data]
    names = [{records[i].id for i in range(len(records))} for records in held]
    assert len(names[0] & names[1]) >= 12


def test_some_of_the_records_are_measured(recipe):
    folder = run(recipe(validation={"interval": 2, "records": 5, "size": 2}))
    assert lines(folder)[0]["records"] == 5


# Best step, patience, resume


def test_a_validation_that_is_not_finite_stops_the_stage(recipe, monkeypatch):
    forward = stage.Stage._validate

    def spoiled(self, step):
        measure = self.validation.measure
        self.validation.measure = lambda *a: {**measure(*a), "answer_ce": float("nan")}
        return forward(self, step)

    monkeypatch.setattr(stage.Stage, "_validate", spoiled)
    with pytest.raises(NonFiniteLossError, match="answer_ce not finite in the validation at step"):
        run(recipe(validation={"interval": 1}))


# Kinds of stages


def test_pairs_are_measured_with_a_live_reference(recipe, scenes_dir):
    raw = recipe(
        data={
            "train": str(scenes_dir / "preferences.parquet"),
            "validation": str(scenes_dir / "preferences.parquet"),
        },
        validation={"interval": 2, "size": 3},
    )
    raw["stages"][0] |= {
        "objectives": [{"kind": "preference", "loss": "sigmoid"}], "steps": 2,
        "batch": {"size": 2},
    }  # fmt: skip
    (line,) = lines(run(raw))
    assert line["preference"] != pytest.approx(0.6931, abs=1e-6)
    assert {"preference", "answer_ce"} <= line.keys()
    assert "teacher_kl" not in line  # the teacher is only a reference here


def test_on_policy_is_measured_on_the_records_answers(recipe):
    raw = recipe(validation={"interval": 1})
    raw["stages"][0] |= {
        "objectives": [{"kind": "reverse_kl"}], "steps": 1,
        "on_policy": {"lmbda": 1.0, "max_new_tokens": 4},
    }  # fmt: skip
    (line,) = lines(run(raw))
    assert line["records"] == 16
    assert line["teacher_kl"] > 0


def test_several_teachers_are_measured_each(recipe, tiny_model_dir, teacher_dir):
    teachers = [{"name": "a", "model": str(teacher_dir)},
                {"name": "b", "model": str(tiny_model_dir), "weight": 2.0}]  # fmt: skip
    raw = recipe(validation={"interval": 1}, teacher=teachers)
    raw["stages"][0] |= {"objectives": [{"kind": "kl"}], "steps": 1}
    (line,) = lines(run(raw))
    assert line["teacher_kl.a"] == line["kl.a"]
    assert line["teacher_kl.b"] == line["kl.b"] != line["kl.a"]
    assert line["loss"] == pytest.approx(line["kl.a"] + 2 * line["kl.b"])


def test_a_stage_that_asks_one_teacher_of_several_is_measured_against_that_one(
    recipe, tiny_model_dir, teacher_dir
):
    """Objectives on layers compare with the first teacher; the others do not run."""
    found = []
    several = [
        {"name": "a", "model": str(teacher_dir)},
        {"name": "b", "model": str(tiny_model_dir)},
    ]
    for number, teacher in enumerate([several, {"model": str(teacher_dir)}]):
        raw = recipe(f"layers-{number}", validation={"interval": 1}, teacher=teacher)
        raw["stages"][0] |= {"objectives": [{"kind": "hidden_mse", "layers": [1]}], "steps": 1}
        (line,) = lines(run(raw))
        found.append({**line, "seconds": 0})
    assert found[0] == found[1]
    assert found[0]["teacher_kl"] > 1e-3


def test_answers_of_another_tokenizer_are_measured_by_chunks(recipe):
    raw = recipe(validation={"interval": 1, "metric": "alm", "keep": "best"})
    raw["stages"][0] |= {"objectives": [{"kind": "alm"}], "steps": 1}
    (line,) = lines(run(raw))
    assert line["alm"] > 0


def test_a_cached_teacher_has_the_held_out_records(recipe, teacher_dir, tmp_path):
    live = run(recipe("live", validation={"interval": 2}))
    cache = {"folder": str(tmp_path / "cache"), "k": 10_000}
    teacher = {"model": str(teacher_dir), "source": "cache", "cache": cache}
    without = load_recipe(recipe("cached", teacher=teacher, held_out=False))
    build_cache(without)
    raw = recipe("cached", teacher=teacher, validation={"interval": 2})
    with pytest.raises(DataError, match=r"validation.*not in the teacher's cache"):
        run(raw)
    assert not (tmp_path / "cached").exists()
    build_cache(load_recipe(raw))
    got = lines(run(raw))
    for mine, theirs in zip(got, lines(live), strict=True):
        assert mine["teacher_kl"] == pytest.approx(theirs["teacher_kl"], rel=1e-4)
        assert mine["answer_ce"] == pytest.approx(theirs["answer_ce"], rel=1e-5)


def test_a_cache_has_the_records_of_every_stage(recipe, teacher_dir, tmp_path):
    """Of one file, where one stage holds a share out and another one trains on all of it."""
    cache = {"folder": str(tmp_path / "cache"), "k": 8}
    teacher = {"model": str(teacher_dir), "source": "cache", "cache": cache}
    raw = recipe(teacher=teacher, held_out=False, validation={"interval": None})
    (first,) = raw["stages"]
    raw["stages"].append({**first, "name": "all", "data": dict(raw["data"])})
    raw["data"]["validation"] = 0.25
    assert len(build_cache(load_recipe(raw))) == 64
    run(raw)


# What is refused before the first step


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        ({"validation": None}, {"validation": {"interval": 2}}, "no records are held out"),
        ({}, {"validation": {"metric": "anser_ce", "keep": "best"}}, "did you mean 'answer_ce'"),
        (
            {},
            {"objectives": [{"kind": "preference", "loss": "sigmoid", "reference_logps": "once"}]},
            "set reference_logps to live",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, tmp_path, scenes_dir, data, settings, said):
    if "objectives" in settings:
        data = dict.fromkeys(("train", "validation"), str(scenes_dir / "preferences.parquet"))
    raw = recipe(data=data, held_out=False)
    if data.get("validation", True) is not None:
        raw["data"].setdefault("validation", str(scenes_dir / "validation.parquet"))
    raw["stages"][0] |= settings
    with pytest.raises(RecipeError, match=said):
        run(raw)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (1.5, "between 0 and 1"),
        (True, "between 0 and 1"),
        ([{"train": "a.parquet", "weight": 2.0}], "'weight' is only for training"),
        ({"train": "hub:a/b", "stream": 10}, "'stream' is only for training"),
        ([{"train": "a.parquet"}, {"train": "b/a.parquet"}], "the same name"),
    ],
)
def test_held_out_records_are_said_plainly(data, said):
    with pytest.raises(ValueError, match=said):
        DataConfig(train="t.parquet", validation=data)


def test_no_scale_to_global_mean_a_stream_is_held_out():
    with pytest.raises(ValueError, match="a share of a stream cannot"):
        DataConfig(sources=[{"train": "hub:a/b", "stream": 10}], validation=0.1)


def test_a_run_of_before_goes_on_without_validation(recipe, monkeypatch):
    """Its `training.yaml` knows neither of the keys."""
    import yaml

    raw = recipe(held_out=False)
    with monkeypatch.context() as patch:
        break_off(patch, 2)
        with pytest.raises(Broken):
            run(raw)
    path = pipeline.run_folder(load_recipe(raw)).path / "training.yaml"
    said = yaml.safe_load(path.read_text())
    del said["data"]["validation"], said["stages"][0]["validation"]
    path.write_text(yaml.safe_dump(said))
    assert len(lines(run(raw), "metrics.jsonl")) == 2


def test_the_first_sign_of_teacher_hacking_is_logged_once(recipe, monkeypatch, caplog):
    """Also by a run that goes on after the sign."""
    forward = stage.Stage._validate

    def turning(self, step):
        measure = self.validation.measure
        found = {"answer_ce": 1 + abs(step - 4) / 100, "teacher_kl": 1 / step}
        self.validation.measure = lambda *a: {**measure(*a), **found}
        return forward(self, step)

    monkeypatch.setattr(stage.Stage, "_validate", turning)
    raw = recipe(stage={"steps": 10}, validation={"interval": 1, "records": 2})
    with monkeypatch.context() as broken:
        break_off(broken, at=9)
        with pytest.raises(Broken):
            run(raw)
    run(raw)
    said = [r.getMessage() for r in caplog.records if "teacher hacking" in r.getMessage()]
    assert said == [
        "warning: teacher hacking, by teacher_kl: the student comes closer to the teacher, and its "
        "answers get worse (seen at step 7): stop at step 4"
    ]
