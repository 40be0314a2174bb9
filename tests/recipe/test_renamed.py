"""Recipes may use old names of keys and conversions."""

import copy
import logging

import pytest
import yaml

from mmkd.errors import RecipeError
from mmkd.recipe import load_recipe, load_student, load_written, to_yaml
from mmkd.recipe.renamed import RENAMED_KEYS, RENAMED_KINDS, rename, rename_override
from mmkd.runs.members import members
from mmkd.runtime import progress

BASE = {
    "name": "base",
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
    "data": {"train": "train.json"},
    "stages": [
        {
            "name": "first",
            "steps": 10,
            "objectives": [{"kind": "ce"}],
            "data": {"train": "other.json"},
        }
    ],
}
VALUES = {
    "on_bad_sample": "skip",
    "picture_cache": "cache",
    "every": 7,
    "keep": 3,
    "patience": 60.0,
}
KEYS = sorted(RENAMED_KEYS.items())
KEY_NAMES = [".".join(path) for path, _ in KEYS]
SETTINGS = {"depth_pruning": {"decoder": [0]}, "width_pruning": {"decoder": 8}}


@pytest.fixture
def notes(monkeypatch, caplog):
    """The notes that are logged; each test starts with none."""
    monkeypatch.setattr(progress, "_said", set())
    monkeypatch.setattr(progress.logger, "propagate", True)
    caplog.set_level(logging.INFO, "mmkd")
    return lambda: [r.getMessage() for r in caplog.records if "now called" in r.getMessage()]


def with_key(path, key, value):
    raw = copy.deepcopy(BASE)
    node = raw
    for part in path:
        node = node.setdefault(part, {})
        node = node[0] if isinstance(node, list) else node
    node[key] = value
    return raw


def override(path, key, value):
    return ".".join(["stages.0" if p == "stages" else p for p in path] + [f"{key}={value}"])


@pytest.mark.parametrize(("path", "new"), KEYS, ids=KEY_NAMES)
@pytest.mark.parametrize("way", ["mapping", "file", "override", "override of a mapping", "variant"])
def test_an_old_key_sets_what_its_new_name_sets(path, new, way, tmp_path, notes):
    *above, old = path
    value = VALUES[old]
    want = load_recipe(with_key(above, new, value))
    assert want != load_recipe(BASE)
    assert not notes()
    if way == "mapping":
        recipe = load_recipe(with_key(above, old, value))
    elif way == "file":
        file = tmp_path / "old.yaml"
        file.write_text(yaml.safe_dump(with_key(above, old, value)))
        recipe = load_recipe(file)
    elif way == "override":
        recipe = load_recipe(BASE, [override(above, old, value)])
    elif way == "override of a mapping":
        extra = "train: other.json, " if above == ["stages", "data"] else "train: train.json, "
        inner = f"{{{extra if above[-1] == 'data' else ''}{old}: {value}}}"
        recipe = load_recipe(BASE, [override(above[:-1], above[-1], inner)])
    else:
        raw = {**BASE, "variants": {"v": [override(above, old, value)]}}
        recipe = load_recipe(raw)
        (written,) = recipe.variants["v"]
        assert written.startswith(override(above, new, ""))
        (member,) = [m.recipe for m in members(recipe) if m.label == "v"]
        recipe = load_recipe({**member.model_dump(mode="json"), "label": "student"})
    assert recipe == want
    assert notes() == [f"note: '{above[-1]}.{old}' is now called {new!r}"]


@pytest.mark.parametrize(("path", "new"), KEYS, ids=KEY_NAMES)
def test_an_old_key_overrides_the_new_name_of_a_file_that_is_extended(path, new, tmp_path, notes):
    *above, old = path
    raw = with_key(above, new, VALUES[old])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    child = {"extends": "base.yaml", **raw}
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    other = {**VALUES, "on_bad_sample": "stop", "picture_cache": "b", "every": 9, "keep": 4}[old]
    changed = load_recipe(tmp_path / "child.yaml", [override(above, old, other)])
    assert changed == load_recipe(with_key(above, new, other))


@pytest.mark.parametrize(("path", "new"), KEYS, ids=KEY_NAMES)
def test_both_names_of_a_key_are_refused(path, new):
    *above, old = path
    raw = with_key(above, old, VALUES[old])
    raw = with_new_name(raw, above, new, VALUES[old])
    with pytest.raises(RecipeError, match=f"both '{old}' and '{new}', its new name -- leave out"):
        load_recipe(raw)


def with_new_name(raw, above, new, value):
    """`raw`, with the new name beside the old one."""
    node = raw
    for part in above:
        node = node[part]
        node = node[0] if isinstance(node, list) else node
    node[new] = value
    return raw


@pytest.mark.parametrize(("old", "new"), RENAMED_KINDS.items())
def test_an_old_kind_of_conversion_is_the_new_one(old, new, notes):
    settings = SETTINGS[new]
    for place in (["student"], ["stages"]):
        want = load_recipe(with_key(place, "convert", [{"kind": new, **settings}]))
        assert load_recipe(with_key(place, "convert", [{"kind": old, **settings}])) == want
        at = override(place, "convert", "")
        text = f"[{{kind: {old}, decoder: {settings['decoder']}}}]"
        assert load_recipe(BASE, [at + text]) == want
        kind = at.replace("=", f".0.kind={old}")
        assert load_recipe(BASE, [at + f"[{{decoder: {settings['decoder']}}}]", kind]) == want
    student = load_student({"model": "m", "convert": [{"kind": old, **settings}]})
    assert student == load_student({"model": "m"}, [f"convert=[{{kind: {new}, decoder: "
                                                    f"{settings['decoder']}}}]"])  # fmt: skip
    assert notes() == [f"note: the conversion {old!r} is now called {new!r}"]


def test_names_elsewhere_stay_as_they_are(notes):
    raw = {
        **BASE,
        "student": {"config": {"model_type": "llava", "every": 2, "kind": "mlp"}, "processor": "p",
                    "convert": [{"kind": "mamba", "layers": {"every": 2}}]},
        "seed": 3,
    }  # fmt: skip
    assert rename(raw) == raw
    raw = with_key(["stages", "validation"], "keep", "best")
    raw = with_key(["stages"], "validation", {"keep": "best", "patience": 2})
    assert rename(raw) == raw
    assert not notes()


def test_the_recipe_of_an_older_run_loads_without_notes(notes):
    new = load_recipe(with_key(["stages", "engine"], "timeout_s", 60.0))
    written = yaml.safe_load(to_yaml(new))
    for path, name in KEYS:
        node = written
        for part in path[:-1]:
            node = node[part]
            node = node[0] if isinstance(node, list) else node
        node[path[-1]] = node.pop(name)
    assert load_written(written) == new
    assert not notes()


@pytest.mark.parametrize(
    "override", ["seed=.nan", "stages.0.optimizer={lr: .nan}", "data.train=[", "x"]
)
def test_an_override_without_old_names_stays_as_it_is(override):
    assert rename_override(override) == override
