"""Relative paths in a recipe: from the working directory, or else from the recipe's own folder."""

import os
from pathlib import Path

import pytest
import yaml

from mmkd.recipe import Recipe, load_recipe, to_yaml
from mmkd.recipe.paths import ANY, path_keys
from mmkd.recipe.sources import HUB, SourceConfig
from mmkd.runs.pipeline import members, run
from tests.support.recipes import tiny_recipe

WHOLE = {
    "name": "base",
    "teacher": {"model": "Org/teacher", "cache": {"folder": "none"}},
    "student": {"model": "Org/student"},
    "data": {"sources": [{"train": "none.json"}], "validation": {"sources": [{"train": "n.json"}]}},
    "evaluate": {"tasks": ["pope"]},
    "stages": [
        {
            "name": "kd",
            "steps": 1,
            "objectives": [{"kind": "ce"}],
            "data": {
                "sources": [{"train": "none.json"}],
                "validation": {"sources": [{"train": "n.json"}]},
            },
            "engine": {"kind": "deepspeed"},
        }
    ],
}
ASSISTANT = {
    "student": WHOLE["student"],
    "stages": [{**WHOLE["stages"][0], "name": "first"}],
    "data": WHOLE["data"],
}
CONVERSIONS = {
    "processor": {"kind": "tokenizer"},
    "objectives": {"kind": "early_exit", "layer": 0},
}
MADE = {"photos": {"pictures": "none", "prompts": ["What?"], "out": "made.jsonl"}}
KEYS = sorted(
    tuple("photos" if part == ANY else part for part in key)
    for key in path_keys(Recipe)
    if key[0] != "more_teachers"
    and ("validation" not in key or "sources" in key)
    and key[-3:] != ("stages", "convert", "processor")  # refused
    and key[-3:] != ("validation", "sources", "leave_out")  # refused
    and not ({"validation", "select"} <= {*key})  # refused
)


def put(raw, key, value):
    """A recipe with a key set, in the first item of each list on the way."""
    if isinstance(raw, list):
        return [put(raw[0], key, value), *raw[1:]]
    if not key:
        return value
    return {**raw, key[0]: put(raw.get(key[0], {}), key[1:], value)}


def at(recipe, key):
    for part in key:
        recipe = recipe[0] if isinstance(recipe, list) else recipe
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    return recipe[0] if isinstance(recipe, list) else recipe  # one path is a list of one


def with_key(key, value):
    raw = WHOLE
    if key[0] == "assistant":
        raw = {**raw, "assistant": ASSISTANT}
    if key[0] == "make":
        raw = {**raw, "make": MADE}
        if key[-1] in ("records", "images"):
            raw = {**raw, "make": {"photos": {"records": "none.json", "out": "made.jsonl"}}}
        if key[-2] == "why":
            raw = put(raw, key[:-1], {"out": "why.jsonl"})
        value = f"{value}.jsonl" if key[-1] == "out" else value
    if "convert" in key:
        raw = put(raw, key[:-1], [CONVERSIONS[key[-1]]])
    if key[-1] in ("train", "images") and key[-2] == "data":
        raw = put(raw, key[:-1], {"train": "none.json"})  # in place of the mixture
    if key[-2] == "select":
        if key[-3] == "data":
            raw = put(raw, key[:-2], {"train": "none.json"})
        raw = put(raw, key[:-1], {"kind": "difficulty", "field": "made.pass_rate"})
    return put(raw, key, value)


def named(key, name):
    """A path that the key may have."""
    return f"{name}.jsonl" if key[0] == "make" and key[-1] == "out" else name


def write(path, raw):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory; the recipe stands in `recipes` below it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "things").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_every_path_is_found_beside_the_recipe(here, key):
    things = named(key, "things")
    (here / "recipes" / things).mkdir(exist_ok=True)
    file = write(Path("recipes/r.yaml"), with_key(key, "things"))
    assert at(load_recipe(file), key) == f"recipes/{things}"
    assert at(load_recipe(file.resolve()), key) == f"recipes/{things}"  # however it is called
    (here / things).mkdir()
    assert at(load_recipe(file), key) == things  # the working directory comes first


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_a_path_that_leads_nowhere_stays_as_it_is(here, key):
    file = write(Path("recipes/r.yaml"), with_key(key, "nowhere"))
    assert at(load_recipe(file), key) == named(key, "nowhere")


@pytest.mark.parametrize("key", KEYS, ids=".".join)
def test_an_override_is_found_beside_the_recipe_too(here, key):
    file = write(Path("recipes/r.yaml"), with_key(key, "nowhere"))
    parts, node = [], with_key(key, "nowhere")
    for part in key:
        if isinstance(node, list):
            parts, node = [*parts, "0"], node[0]
        parts, node = [*parts, part], node[part]
    things = named(key, "things")
    (here / "recipes" / things).mkdir(exist_ok=True)
    assert at(load_recipe(file, [f"{'.'.join(parts)}={things}"]), key) == f"recipes/{things}"


@pytest.mark.parametrize("short", ["things", {"train": "things"}, [{"train": "things"}]])
def test_held_out_records_are_found_however_they_are_written(here, short):
    raw = {**WHOLE, "data": {"train": "none.json", "validation": short}}
    recipe = load_recipe(write(Path("recipes/r.yaml"), raw))
    assert recipe.data.validation.sources[0].train == "recipes/things"
    raw["data"] = {"train": "none.json"}
    override = f"data.validation={yaml.safe_dump(short, default_flow_style=True).split(chr(10))[0]}"
    recipe = load_recipe(write(Path("recipes/r.yaml"), raw), [override])
    assert recipe.data.validation.sources[0].train == "recipes/things"


def test_the_file_that_a_path_is_written_in_decides(here):
    """`extends`: each file's paths are from its own folder."""
    write(Path("base/base.yaml"), put(WHOLE, ("student", "model"), "things"))
    (here / "base" / "things").mkdir()
    child = {"extends": "../base/base.yaml", "teacher": {"model": "things"}}
    recipe = load_recipe(write(Path("recipes/r.yaml"), child))
    assert (recipe.student.model, recipe.teacher.model) == ("base/things", "recipes/things")


def test_a_mapping_as_override_and_a_list_of_teachers(here):
    file = write(Path("recipes/r.yaml"), WHOLE)
    recipe = load_recipe(
        file,
        [
            "teacher=[{model: things, name: a}, {model: Org/other, processor: things, name: b}]",
            "data={train: things, images: things}",
        ],
    )
    assert [t.model for t in recipe.teachers] == ["recipes/things", "Org/other"]
    assert recipe.teachers[1].processor == "recipes/things"
    assert (recipe.data.train, recipe.data.images) == ("recipes/things", "recipes/things")


def test_variants_find_theirs_too_and_so_does_the_recipe_that_a_run_writes(here):
    variants = {"other": ["student.model=things", "stages.0.optimizer.lr=1e-3"]}
    recipe = load_recipe(write(Path("recipes/r.yaml"), {**WHOLE, "variants": variants}))
    models = [m.recipe.student.model for m in members(recipe)]
    assert models == ["Org/student", "recipes/things"]
    again = load_recipe(write(Path("runs/base/recipe.yaml"), yaml.safe_load(to_yaml(recipe))))
    assert again == recipe
    assert [m.recipe.student.model for m in members(again)] == models


def test_from_another_place_the_path_is_absolute(here, monkeypatch):
    file = write(here / "recipes/r.yaml", put(WHOLE, ("student", "model"), "things"))
    (here / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    recipe = load_recipe(file)
    assert recipe.student.model == str(here / "recipes" / "things")
    assert load_recipe(os.path.relpath(file)) == recipe


@pytest.mark.parametrize(
    "train", ["*.json", "*/p-*.tar", "part-{00..01}.tar", "sub/p-{0..3}-*.tar", "part-00.tar"]
)
def test_patterns_are_looked_for_as_well(here, train):
    for name in ("a.json", "part-00.tar", "sub/p-1-x.tar"):
        path = here / "recipes" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    raw = put(WHOLE, ("data",), {"train": train})
    assert load_recipe(write(Path("recipes/r.yaml"), raw)).data.train == f"recipes/{train}"


def test_what_is_no_path_of_this_machine_stays(here):
    for other in (f"{HUB}Org/set", "https://host/x.tar", str(here / "none")):
        raw = put(WHOLE, ("data",), {"train": other})
        assert load_recipe(write(Path("recipes/r.yaml"), raw)).data.train == other


def test_every_path_of_a_source_is_known():
    """A key that is described as a file or a folder has to be of the type that is looked for."""
    keys = {".".join(key) for key in path_keys(Recipe)}
    for name, field in SourceConfig.model_fields.items():
        if "folder" in (field.description or ""):
            assert f"data.sources.{name}" in keys


def test_a_run_goes_on_from_its_own_recipe(here, scenes_dir, tiny_model_dir, capsys):
    """Data and model beside the recipe: it trains, goes on, and so does `runs/tiny/recipe.yaml`."""
    (here / "recipes" / "student").symlink_to(tiny_model_dir)
    (here / "recipes" / "data").symlink_to(scenes_dir)
    raw = tiny_recipe(Path("data"), "student", Path("runs"), stage={"steps": 1})
    file = write(Path("recipes/r.yaml"), raw)
    folder = run(load_recipe(file))
    stage = folder / "01-mimic"
    written = (stage / "metrics.jsonl").read_text()
    for again in (file, file.resolve(), folder / "recipe.yaml"):
        assert run(load_recipe(again)) == folder
        assert "already trained" in capsys.readouterr().out
    assert (stage / "metrics.jsonl").read_text() == written
    told = yaml.safe_load((folder / "training.yaml").read_text())
    assert told["student"]["model"] == "recipes/student"
    assert told["data"]["train"] == "recipes/data/train.parquet"
