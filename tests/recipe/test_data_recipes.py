"""Recipes of methods that make, choose or mix data, or that train with a teacher for each stage."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoProcessor

from mmkd.commands.plan.make import check_recipe, make_plan
from mmkd.commands.score_data import score_data
from mmkd.modeling.loading import load_pretrained
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline, preflight
from mmkd.runs.make_data import make_data
from mmkd.runtime.teacher_hacking import FEWEST
from scripts.scenes_parts import write_parts
from scripts.scenes_photos import write_photos
from scripts.scenes_questions import SHORT, WORDINGS, kind_of, write_questions
from tests.support.places import CONFIGS, DOCS, ROOT

REAL = sorted(p for folder in ("data", "stages") for p in (CONFIGS / folder).glob("*.yaml"))
SCENES = CONFIGS / "scenes"
STUDIES = ["selection", "mixture", "rationales", "negatives", "hacking", "rounds"]
SMALL = sorted(p for folder in ("data", "stages") for p in (SCENES / folder).glob("*.yaml"))
RUN = [*(SCENES / f"{name}_study.yaml" for name in STUDIES), SCENES / "unlabelled.yaml", *SMALL]
"""Scene recipes, of which one step of each stage is run."""
TEACHER = "assets/scenes_teacher"


@pytest.fixture(scope="session")
def prepared(scenes_dir, tmp_path_factory):
    """A folder with the files that the recipes' preparing commands write, of few records."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "assets").symlink_to(ROOT / "assets")
    data = folder / "data"
    data.mkdir()
    (data / "scenes").symlink_to(scenes_dir)
    train, held_out = scenes_dir / "train.parquet", scenes_dir / "validation.parquet"
    write_photos(train, data / "scenes_photos", 6)
    write_questions(train, data / "scenes_questions")
    write_questions(held_out, data / "scenes_held_out")
    write_questions(held_out, data / "scenes_shots", 2)
    write_parts(train, data / "scenes_parts", 32)
    return folder


@pytest.fixture
def shortened(prepared, tmp_path, monkeypatch):
    """A scene recipe on these files, every stage cut to one step of two records."""
    for name in ("assets", "data"):
        (tmp_path / name).mkdir()
        for path in (prepared / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def load(path):
        raw = load_recipe(path)
        changes = ["evaluate=null", "seeds=[0]", f"name={path.stem}"]
        for i, stage in enumerate(raw.stages):
            changes += [f"stages.{i}.steps=1", f"stages.{i}.batch.size=2"]
            if stage.validation.records != 512:
                changes.append(f"stages.{i}.validation.records=2")
        rounds = any(stage.rounds > 1 for stage in raw.stages)
        for entry, config in raw.make.items():
            changes.append(f"make.{entry}.limit={32 if rounds else 4}")  # some are hard
            if config.objects is not None:
                changes.append(f"make.{entry}.objects.least_images=1")
        if raw.data.select is not None and raw.data.select.kind == "difficulty":
            changes.append("data.select.most=2")  # of few records, all may be easy
        if raw.data.sampling is not None:
            changes += ["data.sampling.every=1", "data.sampling.held_out=1", "stages.0.steps=2"]
        recipe = load_recipe(path, changes)
        for teacher in recipe.teachers:
            if not Path(teacher.model).exists():  # another run's student
                teacher.model = TEACHER
        if not Path(recipe.student.model).exists():
            recipe.student.model = TEACHER
        return recipe

    return load


def scored(recipe):
    """Scores of the recipe's records by two models, where its selection reads them."""
    folder = Path("reference")
    model = load_pretrained(TEACHER)
    model.model.language_model.norm.weight.data.mul_(0.5)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TEACHER).save_pretrained(folder)
    select = recipe.data.select
    clusters = 2 if select.kind == "cluster" else None
    names = [] if clusters else ["teacher", f"reference={folder}"]
    score_data(recipe, Path(select.scores), models=names, batch_size=32, clusters=clusters)


@pytest.mark.parametrize("path", RUN, ids=lambda p: p.stem)
def test_every_stage_runs_and_every_student_can_be_trained(path, shortened):
    recipe = shortened(path)
    if getattr(recipe.data.select, "scores", None) is not None:
        scored(recipe)
    found = pipeline.members(recipe)
    make_data(recipe, found)
    for member in found[1:]:
        preflight.check(member.recipe)
    whole = recipe.model_copy(update={"variants": {}})
    pipeline.run(whole)
    (member,) = pipeline.members(whole)
    for stage in member.stages:
        load_pretrained(str(stage.student))


def test_the_validations_of_the_study_can_show_teacher_hacking():
    (stage,) = load_recipe(SCENES / "hacking_study.yaml").stages
    assert stage.steps // stage.validation.interval >= FEWEST
    assert stage.validation.records >= 256


def tiny(part, model):
    """Settings of a recipe with a tiny model in place of those of the Hub and of other runs."""
    if isinstance(part, list):
        return [tiny(item, model) for item in part]
    if isinstance(part, str):
        return re.sub(r"(?<=model: )[\w./-]+", model, part)  # of a variant
    if not isinstance(part, dict):
        return part
    selects = "scores" in part  # 'model' is a name in a file
    return {
        k: model if k == "model" and v and not selects else tiny(v, model) for k, v in part.items()
    }


@pytest.mark.parametrize("path", REAL, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_of_real_size_is_planned(path, deep_model_dir, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"  # what entries of `make` ask about that the student answers
    data.mkdir()
    (data / "photos").symlink_to(prepared / "data" / "scenes_photos")
    (data / "images").mkdir()
    asked = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a cat"}]
    (data / "questions.json").write_text(json.dumps([{"id": "0", "messages": asked}]))
    recipe = load_recipe(tiny(load_recipe(path).model_dump(mode="json"), str(deep_model_dir)))
    check_recipe(recipe, without_data=True)
    stages = make_plan(recipe)["members"][recipe.label]["stages"]
    assert len(stages) == sum(stage.rounds for stage in recipe.stages)


def test_questions_are_sorted_by_kind(prepared, scenes_dir):
    folder = prepared / "data" / "scenes_questions"
    found = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in WORDINGS}
    kinds = {row["kind"] for name in WORDINGS for row in found[name]}
    assert all(row["kind"] == name for name, rows in found.items() for row in rows)
    assert kinds == set(WORDINGS)
    whole = pq.read_table(scenes_dir / "train.parquet").to_pylist()
    turns = sum(len(row["conversations"]) // 2 for row in whole)
    assert sum(map(len, found.values())) == turns
    short = pq.read_table(folder / f"{SHORT}.parquet").to_pylist()
    assert len(short) == turns - len(found["caption"])
    tested = pq.read_table(scenes_dir / "eval" / "vqa.parquet").to_pylist()
    assert [kind_of(row["question"]) for row in tested] == [row["kind"] for row in tested]
    for row in short:
        asked, said = row["conversations"]
        assert asked["value"].startswith("<image>\n")
        assert said["value"] == row["answer"]
    with pytest.raises(ValueError, match="unpack"):
        kind_of("Who is it?")


def test_parts_have_each_record_once(prepared, scenes_dir):
    parts = {
        name: pq.read_table(prepared / "data" / "scenes_parts" / f"{name}.parquet")[
            "id"
        ].to_pylist()
        for name in ("reference", "pool", "half")
    }
    whole = pq.read_table(scenes_dir / "train.parquet")["id"].to_pylist()
    assert parts["reference"] + parts["pool"] == whole
    assert set(parts["half"]) < set(parts["pool"])
    assert len(parts["half"]) == len(parts["pool"]) // 2


def test_the_table_names_every_recipe():
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(configs/[\w/.]+\.yaml)`", text))
    assert all((ROOT / name).is_file() for name in named)
    shipped = {str(p.relative_to(ROOT)) for p in CONFIGS.rglob("*.yaml")}
    assert shipped - named == set()
