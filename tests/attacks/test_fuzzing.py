"""Random attacks: the same seed gives the same attacks, and failures are detected."""

import json
import random

import pytest
import yaml

from mmkd.recipe import Recipe, load_recipe
from scripts.attacks.__main__ import judged, silent
from scripts.attacks.folders import spoil_file
from scripts.attacks.kinds import KINDS
from scripts.attacks.mutate import Schema, damaged, mutated
from scripts.attacks.worlds import Ended, Worlds

RECIPE = {
    "name": "a",
    "student": {"model": "m"},
    "data": {"train": "a.json"},
    "stages": [{"name": "s", "steps": 1, "objectives": [{"kind": "ce"}]}],
}


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_draws_the_same_attack(seed):
    def drawn():
        draw = random.Random(seed)
        raw = Schema(Recipe.model_json_schema()).spoil(draw, mutated(draw, RECIPE))
        return repr(raw), damaged(draw, json.dumps(RECIPE).encode())

    assert drawn() == drawn()


def test_spoilt_recipes_reach_most_keys():
    schema, draw = Schema(Recipe.model_json_schema()), random.Random(0)
    whole = load_recipe(RECIPE).model_dump(mode="json")
    texts = {yaml.safe_dump(schema.spoil(draw, whole)) for _ in range(400)}
    assert len(texts) > 250
    spoilt = [schema.spoil(draw, whole)["stages"] for _ in range(1000)]
    stages = [s[0] for s in spoilt if isinstance(s, list) and s and isinstance(s[0], dict)]
    for part in ("optimizer", "batch", "schedule", "engine", "validation", "checkpoint"):
        kept = whole["stages"][0][part]
        told = [stage[part] for stage in stages if isinstance(stage.get(part), dict)]
        found = {key for said in told for key in kept if said.get(key) != kept[key]}
        assert len(found) > len(kept) / 2, part


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (Ended(None, "", "", 60.0), "it hangs"),
        (Ended(-9, "", "", 1.0), "exit status -9"),
        (Ended(1, "", "Traceback (most recent call last):", 1.0), "a traceback"),
        (Ended(2, "", "mmkd: a\nmmkd: b", 1.0), "2 lines on stderr"),
        (Ended(2, "", "KeyError: 'x'", 1.0), "no line of what, where and hint"),
        (Ended(0, "\x1b[2J", "", 1.0), "a terminal's control characters"),
    ],
)
def test_what_breaks_is_seen(ended, said):
    assert said in judged(ended, ["run", "recipe.yaml"], {}, {})


def test_what_a_command_leaves_is_seen():
    ended = Ended(2, "", "mmkd: a: b -- c", 1.0)
    assert judged(ended, ["run", "recipe.yaml"], {"a": "1"}, {"a": "1"}) == []
    assert "half-written" in judged(ended, ["run", "r.yaml"], {}, {"runs/x.partial": "1"})[0]
    assert "an input has changed: a" in judged(ended, ["run", "r.yaml"], {"a": "1"}, {})[0]
    assert "leaves the disk alone" in judged(ended, ["plan", "r.yaml"], {}, {"new": "1"})[0]


def test_the_others_of_several_processes_may_say_that_they_lost_one():
    words = ["run", "recipe.yaml", "--nproc", "2"]
    lost = "mmkd: process 1 lost the connection to another process -- see"
    for err, found in [
        (f"mmkd: a: b -- c\n{lost}", []),
        (lost, []),
        (f"mmkd: a: b -- c\nmmkd: a: b -- c\n{lost}", ["2 lines on stderr"]),
        ("mmkd: a: b -- c\nmmkd: d: b -- c", []),
        ("mmkd: a: b -- c\nmmkd: d: b -- c\nmmkd: e: b -- c", ["3 lines on stderr"]),
        ("mmkd: a: b -- c\nw: d", ["no line of what, where and hint"]),
    ]:
        assert judged(Ended(2, "", err, 1.0), words, {}, {}) == found


def test_what_a_release_may_write_is_its_folder():
    words = ["release", "runs/tiny", "--out", "released"]
    well, refused = Ended(0, "", "", 1.0), Ended(2, "", "mmkd: a: b -- c", 1.0)
    new = {"released/config.json": "1"}
    assert judged(well, words, {}, new) == []
    assert "leaves the disk alone" in judged(refused, words, {}, new)[0]
    assert "leaves the disk alone" in judged(well, [*words, "--dry-run"], {}, new)[0]
    changed = judged(well, words, {"runs/tiny/recipe.yaml": "1"}, {"runs/tiny/recipe.yaml": "2"})
    assert changed == ["an input has changed: runs/tiny/recipe.yaml"]


def test_other_weights_in_a_release_are_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "model.safetensors").write_bytes(b"other")
    words, ended = ["release", "runs/tiny", "--out", "released"], Ended(0, "", "", 1.0)
    assert "other weights" in silent(ended, words, {"losses": [], "student": "0"})[0]
    assert silent(ended, [*words, "--dry-run"], {"losses": [], "student": "0"}) == []


@pytest.mark.parametrize("seed", range(30))
def test_each_way_to_spoil_a_file_changes_it(tmp_path, seed):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RECIPE))
    spoil_file(random.Random(seed), path)
    assert not path.is_file() or path.read_text(errors="replace") != json.dumps(RECIPE)


def test_every_kind_has_a_world_and_is_drawn():
    assert {name for kind in KINDS.values() for name in kind.worlds} == {*Worlds.NAMES}
    assert all(kind.weight > 0 for kind in KINDS.values())


def test_a_silent_change_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = {"losses": [[1, 0.5]], "student": ""}
    words = ["run", "recipe.yaml"]
    assert "other losses" in silent(Ended(0, "", "", 1.0), words, reference)[0]
    assert silent(Ended(0, "step-1: damaged; passed over", "", 1.0), words, reference) == []
