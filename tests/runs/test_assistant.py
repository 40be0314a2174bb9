"""`assistant`: a student that is trained first, and then is the teacher of the others."""

import json
import shutil

import pytest
import yaml

from mmkd.commands.plan import check_recipe, make_plan
from mmkd.errors import RecipeError
from mmkd.recipe import load_recipe
from mmkd.report import write_report
from mmkd.report.rundata import read_run
from mmkd.runs import pipeline
from mmkd.runs.members import members, students
from scripts.scenes_photos import write_photos
from tests.support.recipes import tiny_recipe

KL = [{"kind": "kl"}]


@pytest.fixture
def raw(scenes_dir, tiny_model_dir, tmp_path):
    """A teacher of two layers, an assistant with narrower networks, a student of one layer."""
    found = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir)},
        stage={"objectives": KL, "steps": 2},
    )
    narrow = [{"kind": "width_pruning", "decoder": 48}]
    stage = {**found["stages"][0], "name": "narrow", "objectives": [{"kind": "ce"}, *KL]}
    made = {"student": {"model": str(tiny_model_dir), "convert": narrow}, "stages": [stage]}
    shallow = [*narrow, {"kind": "depth_pruning", "decoder": [0]}]
    student = {"model": str(tiny_model_dir), "convert": shallow}
    return {**found, "assistant": made, "student": student}


def losses(stage):
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_it_equals_two_runs(raw, tmp_path):
    folder = pipeline.run(load_recipe(raw))
    first = {**raw, **raw["assistant"], "assistant": None, "name": "first"}
    one = pipeline.run(load_recipe(first))
    taught = {"model": str(one / "01-narrow" / "student")}
    two = pipeline.run(load_recipe({**raw, "assistant": None, "name": "second", "teacher": taught}))
    assert losses(folder / "assistant" / "01-narrow") == losses(one / "01-narrow")
    assert losses(folder / "01-mimic") == losses(two / "01-mimic")
    direct = pipeline.run(load_recipe({**raw, "assistant": None, "name": "direct"}))
    assert losses(folder / "01-mimic") != losses(direct / "01-mimic")
    own = yaml.safe_load((folder / "training.yaml").read_text())
    assert own["teacher"]["model"] == str(folder / "assistant" / "01-narrow" / "student")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["assistant"]["stages"]


def test_a_run_goes_on_with_the_students(raw):
    recipe = load_recipe(raw)
    folder = pipeline.run(recipe)
    before, made = losses(folder / "01-mimic"), folder / "assistant" / "01-narrow"
    weights = (made / "student" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(folder / "01-mimic")
    assert pipeline.run(recipe) == folder
    assert losses(folder / "01-mimic") == before
    assert (made / "student" / "model.safetensors").stat().st_mtime_ns == weights


def test_variants_and_seeds_share_it(raw, tiny_model_dir):
    other = {"variants": {"direct": [f"teacher={{model: {tiny_model_dir}}}"]}, "seeds": [0, 1]}
    recipe = load_recipe({**raw, **other})
    found = members(recipe)
    assert [m.label for m in found] == [
        "assistant",
        *("student-seed0", "direct-seed0", "student-seed1", "direct-seed1"),
    ]
    assert [m.assistant is not None for m in found] == [False, True, False, True, False]
    assert found[1:] == students(recipe)
    assert found[0].recipe.teacher.model == found[2].recipe.teacher.model == str(tiny_model_dir)


def test_the_report_and_the_plan_show_it(raw):
    recipe = load_recipe({**raw, "variants": {"ce": ["stages.0.objectives=[{kind: ce}]"]}})
    check_recipe(recipe)
    plan = make_plan(recipe)["members"]
    assert list(plan) == ["assistant", "student", "ce"]
    teacher, student = (
        plan[n]["stages"][0]["flops_per_step"]["teacher_decoder"] for n in ("assistant", "student")
    )
    assert 0 < student < teacher  # the assistant is narrower than the teacher
    alone = load_recipe(raw)
    folder = pipeline.run(alone)
    assert {m.label for m in read_run(folder).members} == {"student", "assistant"}
    assert read_run(folder).expected == 2
    write_report(folder)
    assert "assistant" in (folder / "report.html").read_text()


def test_everything_is_checked_before_the_assistant_trains(raw, tmp_path):
    minilm = [{"kind": "minilm", "layers": [0], "teacher_layers": [5], "heads": 2}]
    raw["stages"][0]["objectives"] = minilm
    with pytest.raises(RecipeError, match="layer"):
        pipeline.run(load_recipe(raw))
    assert not (tmp_path / "tiny").exists()


def test_a_changed_assistant_is_refused_where_students_have_begun(raw):
    pipeline.run(load_recipe(raw))
    raw["assistant"]["stages"][0]["steps"] = 3
    with pytest.raises(RecipeError, match=r"differs in stages\.0\.steps"):
        pipeline.run(load_recipe(raw))
    with pytest.raises(RecipeError, match=r"the assistant changes in stages.0.steps, and student"):
        pipeline.run(load_recipe(raw), from_stage="narrow")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "assistant"}, "label 'assistant', which the assistant has"),
        (
            {"variants": {"long": ["assistant.stages.0.steps=9"]}},
            "a variant changes the assistant",
        ),
        ({"teacher": {"source": "self"}}, "at most one teacher, which runs"),
        ({"teacher": [{"model": "a"}, {"model": "b", "name": "b"}]}, "at most one teacher"),
    ],
)
def test_refused(raw, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**raw, **changes})


def test_stages_need_names_of_their_own(raw):
    raw["assistant"]["stages"][0]["name"] = raw["stages"][0]["name"]
    with pytest.raises(RecipeError, match="two stages of assistant and students"):
        load_recipe(raw)


def made_by(names, scenes_dir, tmp_path, checks=()):
    folder = tmp_path / "photos"
    write_photos(scenes_dir / "train.parquet", folder, 3)
    return {"pictures": str(folder), "prompts": ["What?"], "by": names, "checks": [*checks],
            "sampling": {"max_new_tokens": 4}, "out": str(tmp_path / "made.jsonl")}  # fmt: skip


@pytest.mark.parametrize("judges", [False, True])
def test_data_that_it_would_make_before_it_is_trained(raw, scenes_dir, tmp_path, judges):
    checks = [{"kind": "judge", "by": "teacher"}] if judges else []
    entry = made_by("student" if judges else "teacher", scenes_dir, tmp_path, checks)
    student = raw["assistant"]["student"]["model"]
    recipe = load_recipe(
        {**raw, "student": {"model": student}, "make": {"photos": entry}},
        ["stages.0.data={train: 'made:photos'}"],
    )
    for command in (pipeline.run, check_recipe):
        with pytest.raises(RecipeError, match=r"make\.photos: it asks 'teacher', which is the ass"):
            command(recipe)
    assert not (tmp_path / "made.jsonl").exists()
    assert not members(recipe)[0].folder.path.exists()


def test_data_that_it_makes_after_it_is_trained(raw, scenes_dir, tmp_path):
    """It answers what the student has written before a later stage."""
    own = made_by("student", scenes_dir, tmp_path)
    again = {**own, "records": "made:own", "by": "teacher", "out": str(tmp_path / "again.jsonl")}
    again = {key: value for key, value in again.items() if key not in ("pictures", "prompts")}
    later = {**raw["stages"][0], "name": "later", "data": {"train": "made:again"}}
    recipe = load_recipe(
        {**raw, "stages": [*raw["stages"], later], "make": {"own": own, "again": again}}
    )
    check_recipe(recipe)
    folder = pipeline.run(recipe)
    row = json.loads((folder / "02-later/made/again.jsonl").read_text().splitlines()[0])
    assert row["made"]["by"] == "teacher"
    assert losses(folder / "02-later")
