"""Several teachers: one objective per teacher, on the records of its data sources."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmkd.commands.plan import make_plan
from mmkd.errors import RecipeError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model


@pytest.fixture
def world(scenes_dir, tiny_model_dir, tmp_path):
    """Two teachers that differ from the student, and the records in two halves."""
    for name, factor in (("chat", 0.9), ("ocr", 0.7)):
        write_tiny_model(scenes_dir / "processor", tmp_path / name)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        model.save_pretrained(tmp_path / name)
    table = pq.read_table(scenes_dir / "train.parquet")
    half = len(table) // 2
    pq.write_table(table.slice(0, half), tmp_path / "talk.parquet")
    pq.write_table(table.slice(half), tmp_path / "letters.parquet")
    sources = [{"train": str(tmp_path / f"{n}.parquet"), "name": n} for n in ("talk", "letters")]

    def make(name, teacher, *, mixed=True, objectives=None, **stage):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name, teacher=teacher,
            stage={"objectives": objectives or [{"kind": "ce"}, {"kind": "kl"}], **stage},
        )  # fmt: skip
        if mixed:
            raw["data"] = {"sources": sources}
        return raw

    make.folder = tmp_path
    return make


def trained(raw):
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "student" / "model.safetensors")


def one(world, name, **changes):
    return {"model": str(world.folder / name), "name": name, **changes}


def test_equal_teachers_are_one_teacher(world):
    """Of halves of its weight."""
    kinds = [{"kind": "ce"}, {"kind": "kl"}, {"kind": "relation"}, {"kind": "jsd"}]
    alone, weights = trained(world("alone", one(world, "chat"), objectives=kinds))
    halves = [one(world, "chat", weight=0.5), {**one(world, "chat", weight=0.5), "name": "twin"}]
    twice, again = trained(world("twice", halves, objectives=kinds))
    for mine, theirs in zip(twice, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        for kind in ("kl", "relation", "jsd"):
            assert mine[f"{kind}.chat"] == pytest.approx(theirs[kind], rel=1e-4, abs=1e-6)
            assert mine[f"{kind}.twin"] == mine[f"{kind}.chat"]
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-4)


def test_a_routed_teacher_is_asked_about_its_sources_only(world):
    """Its mean is that of a run on its source's records alone, from the same start."""
    both = [one(world, "chat", sources=["talk"]), one(world, "ocr", sources=["letters"], weight=2)]
    size = {"batch": {"size": 64}, "steps": 1}
    lines, _ = trained(world("routed", both, **size))
    (line,) = lines
    assert line["sources"] == {"talk": 32, "letters": 32}
    assert line["loss"] == pytest.approx(line["ce"] + line["kl.chat"] + 2 * line["kl.ocr"])
    for name, source in (("chat", "talk"), ("ocr", "letters")):
        raw = world(f"only-{name}", one(world, name), mixed=False, batch={"size": 32}, steps=1)
        raw["data"] = {"train": str(world.folder / f"{source}.parquet")}
        (alone,), _ = trained(raw)
        assert line[f"kl.{name}"] == pytest.approx(alone["kl"], rel=1e-4)


def test_layout_and_packing_change_nothing(world):
    both = [one(world, "chat"), one(world, "ocr", sources=["letters"])]
    whole, _ = trained(world("whole", both, batch={"size": 8}))
    for number, batch in enumerate(({"size": 2, "accumulate": 4}, {"size": 8, "pack": 512})):
        parts, _ = trained(world(f"parts-{number}", both, batch=batch))
        for mine, theirs in zip(parts, whole, strict=True):
            for key in ("loss", "kl.chat", "kl.ocr"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (number, key)


def test_an_ensemble_of_equal_teachers_is_one_teacher(world):
    """Of weight 1, though one of them sees half of the records only; in validation too."""
    held_out = {"validation": {"interval": 2}, "ensemble": {"normalize": True, "kappa": 0.5}}
    twins = [one(world, "chat", weight=3), {**one(world, "chat"), "name": "b", "sources": ["talk"]}]
    alone, twice = (
        world("alone", one(world, "chat"), validation=held_out["validation"]),
        world("twice", twins, **held_out),
    )
    for raw in (alone, twice):
        raw["data"]["validation"] = [{**source} for source in raw["data"]["sources"]]
    for mine, theirs in zip(trained(twice)[0], trained(alone)[0], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert 3 * mine["kl.chat"] + mine["kl.b"] == pytest.approx(theirs["kl"], rel=1e-4)
    measured = [
        json.loads(
            (world.folder / name / "01-mimic" / "validation.jsonl").read_text().split("\n")[0]
        )
        for name in ("twice", "alone")
    ]
    assert measured[0]["loss"] == pytest.approx(measured[1]["loss"], rel=1e-4)
    assert measured[0]["teacher_kl.chat"] == pytest.approx(measured[1]["teacher_kl"], rel=1e-4)


def test_weights_by_token_do_not_depend_on_layout_and_packing(world):
    both = [one(world, "chat"), one(world, "ocr", sources=["letters"])]
    kinds = [{"kind": "kl"}, {"kind": "jsd", "region": "all"}]
    how = {"ensemble": {"normalize": True, "kappa": 0.02}, "objectives": kinds, "steps": 2}
    whole, _ = trained(world("whole", both, batch={"size": 8}, **how))
    for number, batch in enumerate(({"size": 1, "accumulate": 8}, {"size": 8, "pack": 512})):
        parts, _ = trained(world(f"parts-{number}", both, batch=batch, **how))
        for mine, theirs in zip(parts, whole, strict=True):
            for key in ("loss", "kl.chat", "kl.ocr", "jsd.chat", "jsd.ocr"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (number, key)


@pytest.mark.parametrize("first", [[], ["talk"]])
def test_a_teacher_does_not_run_where_it_is_not_asked(world, monkeypatch, first):
    ran = []
    signals = LiveTeacher.signals

    def watched(self, batch, *request):
        ran.append(self)
        return signals(self, batch, *request)

    monkeypatch.setattr(LiveTeacher, "signals", watched)
    both = [one(world, "chat", sources=first), one(world, "ocr", sources=["letters"])]
    lines, _ = trained(world("some", both, batch={"size": 1}, steps=8))
    letters = sum(line["sources"]["letters"] for line in lines)
    assert 0 < letters < 8
    assert len(ran) == (8 if first else 8 + letters)
    assert all(("kl.chat" in line) == bool(not first or line["sources"]["talk"]) for line in lines)
    assert all(("kl.ocr" in line) == (line["sources"]["letters"] > 0) for line in lines)


def test_one_teacher_can_be_routed_too(world, monkeypatch):
    ran = []
    signals = LiveTeacher.signals

    def watched(self, batch, *request):
        ran.append(batch)
        return signals(self, batch, *request)

    monkeypatch.setattr(LiveTeacher, "signals", watched)
    lines, _ = trained(world("one", one(world, "ocr", sources=["letters"]), batch={"size": 1}))
    asked = [line["sources"]["letters"] > 0 for line in lines]
    assert any(asked)
    assert not all(asked)
    assert len(ran) == sum(asked)
    for line, about_it in zip(lines, asked, strict=True):
        assert ("kl.ocr" in line) == about_it
        assert line["loss"] == pytest.approx(line["ce"] + line.get("kl.ocr", 0))


def test_objectives_without_anyone_asked_have_no_loss(world):
    """Not one of the step's records is of a source that a teacher is asked about."""
    teachers = [one(world, "chat", sources=["talk"]), one(world, "ocr", sources=["talk"])]
    kinds = [{"kind": "kl"}, {"kind": "relation"}]
    lines, _ = trained(world("none", teachers, objectives=kinds, batch={"size": 1}))
    silent = [line for line in lines if not line["sources"]["talk"]]
    assert silent
    assert all(line["loss"] == line["grad_norm"] == 0 for line in silent)
    assert all(line["loss"] > 0 for line in lines if line["sources"]["talk"])


def test_one_teacher_has_a_weight_too(world):
    whole, _ = trained(world("whole", one(world, "chat"), steps=1))
    light, _ = trained(world("light", one(world, "chat", weight=0.25), steps=1))
    assert light[0]["kl.chat"] == pytest.approx(whole[0]["kl"])
    assert light[0]["loss"] == pytest.approx(whole[0]["ce"] + 0.25 * whole[0]["kl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sources": ["leters"]},
            "teacher ocr: sources: no data source 'leters' -- did you mean",
        ),
        ({"name": "chat"}, "two teachers have the same name"),
        ({"source": "self", "model": None}, "several teachers must all run"),
        ({"weight": 0}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(world, change, message):
    both = [one(world, "chat"), {**one(world, "ocr"), **change}]
    with pytest.raises(RecipeError, match=message) as error:
        pipeline.run(load_recipe(world("refused", both)))
    assert "\n" not in str(error.value)
    assert not (world.folder / "refused").exists()


def test_plans_count_all_teachers(world):
    single = make_plan(load_recipe(world("plan", one(world, "chat"))))
    both = make_plan(load_recipe(world("plan", [one(world, "chat"), one(world, "ocr")])))
    alone, more = (p["members"]["student"]["stages"][0] for p in (single, both))
    teacher = sum(v for k, v in alone["flops_per_step"].items() if k.startswith("teacher"))
    assert more["flops_per_step"]["teacher_others"] == pytest.approx(teacher, rel=1e-6)
    weights = alone["memory_bytes"]["teacher_weights"]
    assert more["memory_bytes"]["total"] == alone["memory_bytes"]["total"] + weights
    weighed = world("plan", [one(world, "chat"), one(world, "ocr")], ensemble={"kappa": 1.0})
    (twice,) = make_plan(load_recipe(weighed))["members"]["student"]["stages"]
    heads = [stage["flops_per_step"]["teacher_head"] for stage in (alone, twice)]
    assert heads[1] == pytest.approx(2 * heads[0])


def test_plans_count_the_teachers_that_are_asked(world):
    """The second of two is not asked about layers; its weights are where its settings say."""
    layers = [{"kind": "hidden_mse", "layers": [0]}]
    waiting = one(world, "ocr", placement="offload")
    both = [one(world, "chat"), waiting]
    for objectives, count in ((layers, 1), ([{"kind": "kl"}], 2)):
        recipe = load_recipe(world("plan", both, objectives=objectives))
        (stage,) = make_plan(recipe)["members"]["student"]["stages"]
        others = "teacher_others" in stage["flops_per_step"]
        assert others == ("other_teachers_weights" in stage["memory_bytes"]) == (count == 2)
        assert (stage["memory_bytes"]["cpu"] > 0) == (count == 2)
    memory = stage["memory_bytes"]
    assert memory["other_teachers_weights"] < memory["teacher_weights"] == memory["cpu"]
