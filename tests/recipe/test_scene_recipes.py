"""The recipes of the scene benchmark: one step of every stage, and every student of the studies."""

from pathlib import Path

import pytest

from mmkd.modeling.loading import load_pretrained
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline, preflight
from scripts.scenes_bytes import byte_processor
from tests.support.places import CONFIGS

RECIPES = ["quickstart", *(f"scenes/{n}" for n in ("matvlm", "mmmamba", "llava_mod", "llava_kd",
                                                   "sparse_hybrid", "best_step",
                                                   "assistant", "label_free", "ernie_tiny",
                                                   "ernie_tiny_teacher"))]  # fmt: skip
STUDIES = ["study", "hybrid_study", "mod_study", "kd_study", "divergence_study", "layer_study"]
STUDIES += ["tokenizer_transfer"]


@pytest.fixture
def shipped(scenes_dir, tmp_path):
    """A shipped recipe on the tests' scenes, every stage cut to one step of two records."""

    def load(name, *overrides):
        def own(data):
            found = data and {**data, "train": str(scenes_dir / Path(data["train"]).name)}
            if data and data["validation"]:
                found["validation"] = str(scenes_dir / "validation.parquet")
            return found

        raw = load_recipe(CONFIGS / f"{name}.yaml").model_dump(mode="json")
        raw |= {"output_dir": str(tmp_path), "data": own(raw["data"]), "evaluate": None}
        for teacher in raw["more_teachers"]:  # another run's student
            teacher["model"] = raw["teacher"]["model"]
        for conversion in raw["student"]["convert"]:
            if conversion["kind"] == "tokenizer":
                byte_processor().save_pretrained(tmp_path / "processor")
                conversion["processor"] = str(tmp_path / "processor")
        for stage in [*raw["stages"], *(raw["assistant"] or {"stages": []})["stages"]]:
            small = {"steps": 1, "batch": {"size": 2}, "precision": "float32"}
            stage |= {**small, "data": own(stage["data"])}
        return load_recipe(raw, list(overrides))

    return load


@pytest.mark.parametrize("name", RECIPES)
def test_every_stage_runs(shipped, name, tmp_path):
    recipe = shipped(name, "variants={}")
    folder = pipeline.run(recipe)
    for index, stage in enumerate(recipe.stages, 1):
        load_pretrained(str(folder / f"{index:02d}-{stage.name}" / "student"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_student_of_a_study_can_be_trained(shipped, name, monkeypatch, scenes_dir):
    """Models, objectives and data of all of them pass what is checked before a run."""
    recipe = shipped(f"scenes/{name}", "seeds=[0]")
    found = pipeline.members(recipe)
    assert len(found) == 1 + len(recipe.variants) > 2
    for member in found:
        for stage in member.recipe.stages:
            data = stage.data or member.recipe.data
            data.train = str(scenes_dir / Path(data.train).name)
        preflight.check(member.recipe)
