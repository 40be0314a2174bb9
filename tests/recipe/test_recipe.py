"""The recipe: loading, extending, overriding, and one-line errors."""

import copy
import re

import pytest
import yaml

from mmkd.errors import RecipeError
from mmkd.ops import DIVERGENCES
from mmkd.recipe import Recipe, load_recipe, to_yaml
from mmkd.recipe.merge import merged, with_key
from mmkd.runs.members import students
from tests.support.places import CONFIGS

BASE = {
    "name": "base",
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
    "data": {"train": "train.json"},
    "stages": [
        {"name": "mimic", "steps": 10, "objectives": [{"kind": "ce"}, {"kind": "kl"}]},
    ],
}


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def test_extends_merges_over_the_base_and_overrides_come_last(tmp_path):
    write(tmp_path / "base.yaml", BASE)
    child = write(
        tmp_path / "child.yaml", {"extends": "base.yaml", "name": "child", "data": {"images": "i"}}
    )
    recipe = load_recipe(child, ["stages.0.optimizer.lr=1e-3", "seed=7", "data.max_length=99"])
    assert recipe.name == "child"
    assert (recipe.data.train, recipe.data.images, recipe.data.max_length) == (
        "train.json",
        "i",
        99,
    )
    assert recipe.stages[0].optimizer.lr == 1e-3
    assert recipe.seed == 7


def test_an_override_can_replace_a_list(tmp_path):
    path = write(tmp_path / "r.yaml", BASE)
    recipe = load_recipe(path, ["stages.0.objectives=[{kind: jsd, beta: 0.2}]"])
    (objective,) = recipe.stages[0].objectives
    assert (objective.kind, objective.beta) == ("jsd", 0.2)


def test_further_teachers_are_not_given_twice():
    raw = {"teacher": [{"model": "a", "name": "a"}, {"model": "b", "name": "b"}]}
    recipe = load_recipe(BASE | raw, ["teacher.1.model=c"])
    assert [t.model for t in recipe.teachers] == ["a", "c"]
    with pytest.raises(RecipeError, match=r"'more_teachers' is given too -- write all teachers"):
        load_recipe({**BASE, **raw, "more_teachers": [{"model": "c", "name": "c"}]})


def test_the_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = load_recipe(BASE)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe


def test_the_schema_names_every_objective():
    text = str(Recipe.model_json_schema())
    for kind in ("ce", *DIVERGENCES, "relation", "preference"):
        assert f"'{kind}'" in text


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_shipped_recipes_load_with_all_their_variants(path):
    recipe = load_recipe(path)
    labels = [m.label for m in students(recipe)]
    assert len(labels) == max(1, len(recipe.seeds)) * (1 + len(recipe.variants))


def changed(**changes):
    return {**BASE, **changes}


def stage(**changes):
    return changed(stages=[{**BASE["stages"][0], **changes}])


@pytest.mark.parametrize(
    ("raw", "parts"),
    [
        (changed(studnet={}), ["studnet", "unknown key", "did you mean 'student'?"]),
        (stage(optimiser={}), ["stages.0.optimiser", "did you mean 'optimizer'?"]),
        (stage(optimizer={"rl": 1}), ["stages.0.optimizer.rl", "unknown key", "'lr'"]),
        (
            stage(objectives=[{"kind": "kl", "temprature": 2}]),
            ["stages.0.objectives.0.temprature", "did you mean 'temperature'?"],
        ),
        (
            stage(objectives=[{"kind": "jsd", "betta": 2}]),
            ["stages.0.objectives.0.betta", "did you mean 'beta'?"],
        ),
        (
            stage(objectives=[{"kind": "revers_kl"}]),
            ["stages.0.objectives.0", "unknown kind 'revers_kl'", "did you mean 'reverse_kl'?"],
        ),
        (stage(steps="ten"), ["stages.0.steps", "integer", "'ten'"]),
        (stage(epochs=1), ["stages.0", "either 'steps' or 'epochs'"]),
        (stage(objectives=[{"kind": "ce"}, {"kind": "ce"}]), ["same name"]),
        (
            stage(objectives=[{"kind": "ce", "name": "loss"}]),
            ["stages.0", "the name of a metric, 'loss'", "give it another"],
        ),
        (stage(objectives=[{"kind": "ce", "name": "kl.a"}]), ["stages.0.objectives.0.name"]),
        (changed(student={}), ["student", "either 'model'"]),
        (changed(data={}), ["data: ", "either 'train' (one source) or 'sources' (a mixture)"]),
    ],
)
def test_errors_are_one_line_with_key_and_mend(tmp_path, raw, parts):
    path = write(tmp_path / "bad.yaml", raw)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in parts:
        assert part in message


def test_missing_file_broken_yaml_circle_and_override(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(broken)
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(RecipeError, match="circle"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"key\.path=value"):
        load_recipe(BASE, ["seed"])
    with pytest.raises(RecipeError, match=r"stages\.7"):
        load_recipe(BASE, ["stages.7.steps=3"])


def test_yaml_never_runs_code(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(RecipeError, match="not YAML"):
        load_recipe(path)
    assert not (tmp_path / "pwned").exists()


TEXTS = ["a ${price} of $5", "${oc.env:HOME}", "${data.train}", "${", "$${x}", "???", "{{ x }}"]


@pytest.mark.parametrize("overrides", [[], ["seed=3"], ["stages.0.steps=5"]])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_mean_themselves(text, overrides, extended, tmp_path):
    """No text is looked up in the recipe or in the environment, whatever way it gets there."""
    changed = {**BASE, "data": {**BASE["data"], "images": text}}
    if extended:
        write(tmp_path / "base.yaml", changed)
        path = write(tmp_path / "r.yaml", {"extends": "base.yaml", "name": "child"})
    else:
        path = write(tmp_path / "r.yaml", changed)
    assert load_recipe(path, overrides).data.images == text
    assert load_recipe(changed, overrides).data.images == text
    told = yaml.safe_dump(text, default_flow_style=True).partition("\n...")[0].strip()
    got = load_recipe(BASE, [f"data.images={told}", *overrides])
    assert got.data.images == text


def test_paths_of_keys():
    raw = {"a": {"b": 1}, "items": [{"x": 1}, {"x": 2}], "none": None, 3: "three"}
    whole = copy.deepcopy(raw)
    assert with_key(raw, "a.c.d", [1])["a"] == {"b": 1, "c": {"d": [1]}}
    for path in ("items.1.x", "items[1].x", "items.-1.x"):
        assert with_key(raw, path, 9)["items"] == [{"x": 1}, {"x": 9}]
    assert with_key(raw, "items", None)["items"] is None
    assert with_key(raw, "none.deep", 1)["none"] == {"deep": 1}
    assert with_key(raw, "3", "drei")[3] == "drei"
    assert raw == whole
    for path, message in (
        ("a.b.c", "a.b.c: a.b is 1, which has no keys"),
        ("items.2.x", "items.2: items is a list of 2 items"),
        ("items.first", "items.first: items is a list of 2 items"),
        ("a..b", "not a path of keys"),
        (".a", "not a path of keys"),
        ("a[b]", "not a path of keys"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            with_key(raw, path, 1)


def test_one_recipe_over_another():
    below = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merged(below, {"a": {"c": [3]}, "d": {"e": 2}}) == {
        "a": {"b": 1, "c": [3]},
        "d": {"e": 2},
    }
    assert merged(below, {"a": None}) == {"a": None, "d": 1}
    with pytest.raises(ValueError, match=r"a\.c: one file has a mapping here, the other a list"):
        merged(below, {"a": {"c": {}}})


@pytest.mark.parametrize("key", ["name", "output_dir", "label", "seeds", "variants", "release"])
@pytest.mark.parametrize("end", ["=x", ".some=1", "[0]=1", " = x"])
def test_a_variant_cannot_change_what_is_one_for_all_students(key: str, end: str) -> None:
    """It was ignored."""
    raw = {
        "name": "n",
        "student": {"model": "m"},
        "data": {"train": "t.json"},
        "stages": [{"name": "s", "objectives": [{"kind": "ce"}], "steps": 1}],
        "variants": {"long": [f"{key}{end}"]},
    }
    with pytest.raises(RecipeError, match=f"the variant 'long' changes '{key}'"):
        load_recipe(raw)
    load_recipe({**raw, "variants": {"long": ["stages.0.steps=2", "seed=3"]}})
