"""`stages[].teacher`: one of the recipe's for a stage, or the student after an earlier stage."""

import gc
import json
import weakref

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmkd.commands.bench import bench
from mmkd.commands.plan import check_recipe, make_plan
from mmkd.errors import RecipeError
from mmkd.recipe import load_recipe
from mmkd.report.summary import describe_stage
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher
from mmkd.training.stage import Stage
from tests.support.places import CONFIGS
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model

KL = [{"kind": "kl"}, {"kind": "hidden_mse", "layers": [0]}]


@pytest.fixture
def world(scenes_dir, tiny_model_dir, tmp_path):
    """Two teachers that differ from the student; stages of two steps."""
    for name, factor in (("base", 0.9), ("tuned", 0.7)):
        write_tiny_model(scenes_dir / "processor", tmp_path / name)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        model.save_pretrained(tmp_path / name)

    def make(name, stages, teachers=("base", "tuned")):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name)
        common = {**raw["stages"][0], "objectives": KL, "steps": 2}
        raw["stages"] = [{**common, "name": n, **changes} for n, changes in stages.items()]
        raw["teacher"] = [{"name": t, "model": str(tmp_path / t)} for t in teachers]
        if not teachers:
            del raw["teacher"]
        return raw

    make.folder = tmp_path
    return make


def stage(folder, name):
    [found] = folder.glob(f"0?-{name}")
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return kept, load_file(found / "student" / "model.safetensors")


def same(one, other):
    (lines, weights), (others, theirs) = one, other
    assert lines == others
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


def test_each_stage_has_its_teacher_alone(world):
    """Bit for bit the stages of recipes with one teacher."""
    named = {"general": {"teacher": "base"}, "task": {"teacher": {"name": "tuned"}}}
    folder = pipeline.run(load_recipe(world("named", named)))
    general = pipeline.run(load_recipe(world("general", {"general": {}}, ["base"])))
    same(stage(folder, "general"), stage(general, "general"))
    alone = world("alone", {"task": {}}, ["tuned"])
    alone["student"] = {"model": str(folder / "01-general" / "student")}
    alone["seed"] = 43  # of the second stage
    same(stage(folder, "task"), stage(pipeline.run(load_recipe(alone)), "task"))


def test_one_model_under_two_names_is_one_teacher(world):
    twins = world("twins", {"a": {"teacher": "base"}, "b": {"teacher": "twin"}}, ["base"])
    twins["teacher"].append({**twins["teacher"][0], "name": "twin"})
    today = world("today", {"a": {}, "b": {}}, ["base"])
    folders = [pipeline.run(load_recipe(raw)) for raw in (twins, today)]
    for name in ("a", "b"):
        same(*(stage(folder, name) for folder in folders))


def test_the_student_after_an_earlier_stage(world):
    """After the stage before, it is what `source: self` is; a resumed run loads it too."""
    ce = [{"kind": "ce"}]
    stages = {"a": {"objectives": ce}, "b": {"teacher": {"stage": "a"}}}
    further = {**stages, "c": {"teacher": {"stage": "a"}}}
    raw = world("earlier", further, [])
    check_recipe(load_recipe(raw))
    folder = pipeline.run(load_recipe(raw))
    own = world("own", {"a": {"objectives": ce}, "b": {}}, [])
    own["teacher"] = {"source": "self"}
    same(stage(folder, "b"), stage(pipeline.run(load_recipe(own)), "b"))
    lines, weights = stage(folder, "c")
    assert lines[0]["kl"] > 0  # b is no longer a
    notes = json.loads((folder / "03-c" / "inputs.json").read_text())["files"]
    assert str(folder / "01-a" / "student" / "model.safetensors") in notes
    for name in ("student", "done.json", "metrics.jsonl"):
        (folder / "03-c" / name).rename(folder / f"old-{name}")
    same((lines, weights), stage(pipeline.run(load_recipe(raw)), "c"))
    told = yaml.safe_load((folder / "training.yaml").read_text())["stages"][2]
    assert describe_stage(told).endswith("; teacher: the student after stage a")


def test_a_teacher_is_released_after_its_stage(world, monkeypatch):
    seen, alive = [], []
    ask, train = LiveTeacher.signals, Stage.train

    def asked(self, batch, *request):
        if self not in [ref() for ref in seen]:
            seen.append(weakref.ref(self))
        return ask(self, batch, *request)

    def trained(self):
        gc.collect()
        alive.append([ref() is not None for ref in seen])
        return train(self)

    monkeypatch.setattr(LiveTeacher, "signals", asked)
    monkeypatch.setattr(Stage, "train", trained)
    stages = {"a": {"teacher": "base"}, "b": {"teacher": "base"}, "c": {"teacher": "tuned"}}
    pipeline.run(load_recipe(world("released", stages)))
    assert alive == [[], [True], [False]]


def test_plan_and_bench_know_it(world):
    narrow = {"kind": "depth_pruning", "decoder": [0]}
    stages = {
        "a": {"teacher": "base"},
        "b": {"teacher": {"stage": "a"}, "convert": [narrow]},
    }
    raw = world("planned", stages)
    raw["stages"][1]["objectives"] = [{"kind": "kl"}]
    recipe = load_recipe(raw)
    both = load_recipe({**raw, "stages": [{**raw["stages"][0], "teacher": None}]})
    first, second = make_plan(recipe)["members"]["student"]["stages"]
    whole = make_plan(both)["members"]["student"]["stages"][0]
    assert "other_teachers_weights" in whole["memory_bytes"]
    assert "other_teachers_weights" not in first["memory_bytes"]
    # The teacher has the two layers of the student before its conversion.
    assert second["memory_bytes"]["teacher_weights"] == first["memory_bytes"]["teacher_weights"]
    assert second["memory_bytes"]["student_weights"] < first["memory_bytes"]["student_weights"]
    assert bench(recipe, "b", 1)["parts"]["teacher"] > 0


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"a": {"teacher": "tunde"}},
            "stage a: teacher: no teacher 'tunde' -- did you mean 'tuned'",
        ),
        ({"a": {}, "b": {"teacher": {"stage": "c"}}, "c": {}}, "no earlier stage 'c' -- "),
        ({"a": {"teacher": {"stage": "a"}}}, "it is the first stage; name a teacher"),
        ({"a": {"teacher": {}}}, "give either 'name'"),
        (
            {"a": {"teacher": "base", "objectives": [{"kind": "ce"}]}},
            "no objective of the stage compares with it -- leave it out",
        ),
    ],
)
def test_refused(world, stages, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(world("refused", stages))


def test_the_recipe_of_real_size():
    recipe = load_recipe(CONFIGS / "ernie_tiny.yaml")
    assert [s.teacher.name for s in recipe.stages] == ["base", *["tuned"] * 3]


@pytest.mark.slow
def test_an_offloaded_teacher_is_released_too(world):
    pytest.importorskip("deepspeed")
    stages = {"a": {"teacher": "base"}, "b": {"teacher": "tuned"}, "c": {"teacher": "base"}}
    found = []
    for placement in ("offload", "replicated"):
        raw = world(placement, stages)
        for config in raw["stages"]:
            config["objectives"] = [{"kind": "kl"}]
        for teacher in raw["teacher"]:
            teacher["placement"] = placement
        folder = pipeline.run(load_recipe(raw))
        found.append([[line["kl"] for line in stage(folder, name)[0]] for name in "abc"])
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
