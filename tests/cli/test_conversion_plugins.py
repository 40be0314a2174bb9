"""Conversions from plugins: a file that the command names, and an installed package."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import load_file

from mmkd.objectives import OBJECTIVES
from mmkd.recipe import CONVERSIONS, load_recipe
from mmkd.recipe.conversions import AnyConversionConfig
from tests.support.outside import (
    broken_packages,
    changed,
    check_broken_package,
    error_line,
    install,
    mmkd,
)
from tests.support.pages import blocks
from tests.support.places import DOCS
from tests.support.recipes import tiny_recipe

PAGE = DOCS / "extending.md"
(CODE,) = [code for code in blocks(PAGE, "python") if "add_conversion" in code]
(SHOWN,) = [text for text in blocks(PAGE, "yaml") if "kv_heads" in text]
ENTRY = ("mmkd.conversions", "kv_heads", "KvHeads")
ONE_HEAD = {"kind": "kv_heads", "heads": 1}
NO_SETTINGS = changed(CODE, "(ConversionConfig)", "(BaseModel)")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(CONVERSIONS, "_added", {})


def command(monkeypatch, *words):
    """The exit status of a command as in a process of its own."""
    monkeypatch.setattr(CONVERSIONS, "_added", {})
    return mmkd(monkeypatch, *words)


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def written(*conversions, stage=()):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 2})
        raw["student"]["convert"] = [*conversions]
        raw["stages"][0]["convert"] = [*stage]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return written


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my_conversion.py"
    path.write_text(CODE)
    return path


def has_merged_heads(before, after):
    """Whether the keys and values of both layers are means of two heads, and all else the same."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    merged = [name for name in old if old[name].shape != new[name].shape]
    for name, weight in new.items():
        want = old[name].unflatten(0, (2, -1)).mean(0) if name in merged else old[name]
        torch.testing.assert_close(weight, want)
    config = json.loads((after / "config.json").read_text())
    return len(merged) == 4 and config["text_config"]["num_key_value_heads"] == 1


def test_the_file_in_the_docs_is_planned_run_continued_and_released(
    recipe, plugin, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    path = recipe(*yaml.safe_load(SHOWN)["student"]["convert"])
    assert command(monkeypatch, "plan", path, "--plugin", plugin, "--json") in (0, None)
    planned = capsys.readouterr().out
    assert not (tmp_path / "tiny").exists()
    assert command(monkeypatch, "run", path, "--plugin", plugin) in (0, None)
    run = tmp_path / "tiny"
    start = run / "00-start" / "student"
    assert has_merged_heads(tiny_model_dir, start)
    size = sum(w.numel() for w in load_file(start / "model.safetensors").values())
    assert str(size) in planned
    assert "decoder: 1 key-value heads, 2 before" in (run / "report.html").read_text()
    metrics = (run / "01-mimic" / "metrics.jsonl").read_text()

    again = ("run", path, "stages.0.steps=2", "--plugin", plugin)
    assert command(monkeypatch, *again) in (0, None)
    assert (run / "01-mimic" / "metrics.jsonl").read_text() == metrics

    release = ("release", run, "--out", tmp_path / "released")
    assert command(monkeypatch, *release) == 2
    assert command(monkeypatch, *release, "--plugin", plugin) in (0, None)
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["student"]["convert"] == [ONE_HEAD]


def test_an_installed_package_converts_between_others_of_a_stage(recipe, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, CODE, ENTRY)
    mamba = {"kind": "mamba", "layers": [1], "init": "inherit"}
    path = recipe({"kind": "depth_pruning", "decoder": [1, 0]}, stage=[ONE_HEAD, mamba])
    assert command(monkeypatch, "run", path) in (0, None)
    config = json.loads((tmp_path / "tiny" / "01-mimic" / "start/student/config.json").read_text())
    assert config["text_config"]["num_key_value_heads"] == 1
    assert config["layout"]["mamba"]["layers"] == [1]


def test_the_convert_command_takes_any_conversion(
    plugin, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    def converted(name, *words):
        out = tmp_path / name
        words = ("convert", tiny_model_dir, "--out", out, "--plugin", plugin, *words)
        return command(monkeypatch, *words), out

    one_head = ("--conversion", "{kind: kv_heads, heads: 1}")
    status, out = converted("alone", *one_head)
    assert status in (0, None)
    assert has_merged_heads(tiny_model_dir, out)
    capsys.readouterr()
    cut = ("--conversion", "{kind: depth_pruning, decoder: [0]}")
    status, out = converted("hybrid", *cut, *one_head, "--layers", "0", "rope=false")
    assert status in (0, None)
    layout = json.loads((out / "config.json").read_text())["layout"]["mamba"]
    assert (layout["layers"], layout["rope"]) == ([0], False)
    said = capsys.readouterr().out
    lines = ["kept layers [0] of 2", "1 key-value heads, 2 before", "Mamba-2 mixers (mimic)"]
    places = [said.index(line) for line in lines]
    assert places == sorted(places)
    for text, what in (("{kind: kv_haeds}", "unknown kind 'kv_haeds'"), ("{", "no YAML"),
                       ("{kind: kv_heads, heads: 0}", "convert.0.heads: got 0")):  # fmt: skip
        status, out = converted("refused", "--conversion", text)
        assert status == 2
        assert what in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize(
    ("code", "entry", "said"),
    [
        (None, ONE_HEAD, "student.convert.0: unknown kind 'kv_heads'"),
        (CODE, {**ONE_HEAD, "haeds": 1},
         "student.convert.0.haeds: unknown key -- did you mean 'heads'?"),
        (CODE, {"kind": "kv_heads"}, "student.convert.0.heads: this key is missing -- add it"),
        (CODE, {"kind": "kv_heads", "heads": True}, "'heads' is true -- give a number"),
        (CODE, {"kind": "kv_heads", "heads": 3},
         "student.convert: kv_heads: 2 heads are no multiple of 3"),
        (changed(CODE, "kv_heads", "mamba"), ONE_HEAD, "two conversions have the kind 'mamba'"),
        (changed(CODE, 'Literal["kv_heads"]', "str"), ONE_HEAD,
         "KvHeads has no kind: give its config_class 'kind: Literal[...]'"),
        (changed(CODE, "class KvHeads(Conversion)", "class KvHeads"), ONE_HEAD,
         "cannot be loaded (TypeError: it is not a subclass of Conversion)"),
        (changed(NO_SETTINGS, "Field\n", "BaseModel, Field\n"), ONE_HEAD,
         "(TypeError: its settings, KvHeadsConfig, are not a ConversionConfig)"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(recipe, tmp_path, monkeypatch, capsys, code, entry, said):
    monkeypatch.chdir(tmp_path)
    words = ("run", recipe(entry))
    if code is not None:
        Path("my.py").write_text(code)
        words = (*words, "--plugin", "my.py")
    assert command(monkeypatch, *words) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(("code", "said"), broken_packages(CODE, ENTRY, "conversion"))
def test_a_broken_package_is_one_line(recipe, tmp_path, monkeypatch, capsys, code, said):
    check_broken_package(tmp_path, monkeypatch, capsys, recipe(ONE_HEAD), code, ENTRY, said)


def test_a_kind_of_mmkd_is_never_looked_for_outside(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "1 / 0", ("mmkd.conversions", "depth_pruning", "Layers"))
    assert CONVERSIONS.find("depth_pruning") is None
    adapter = TypeAdapter(AnyConversionConfig)
    assert adapter.validate_python({"kind": "depth_pruning", "decoder": [0]}).decoder == [0]


def test_objectives_and_conversions_may_share_a_kind(recipe, plugin, tmp_path, monkeypatch):
    """An unknown key is looked for among the settings of its own list."""
    monkeypatch.setattr(OBJECTIVES, "_added", {})
    path = recipe(ONE_HEAD)
    code = (
        "from typing import Literal\n"
        "from mmkd.objectives import Objective, ObjectiveConfig, add_objective\n"
        "class Config(ObjectiveConfig):\n    kind: Literal['kv_heads']\n    hats: int = 1\n"
        "@add_objective\nclass Hats(Objective):\n    config_class = Config\n"
    )
    for text in (CODE, code):
        exec(compile(text, "plugin", "exec"), {"__name__": "plugin"})
    objectives = "stages.0.objectives=[{kind: kv_heads, hatz: 1}]"
    with pytest.raises(Exception, match=r"objectives\.0\.hatz: unknown key -- did you mean 'hats'"):
        load_recipe(path, [objectives])
    with pytest.raises(Exception, match=r"convert\.0\.haeds: unknown key -- did you mean 'heads'"):
        load_recipe(path, ["student.convert.0.haeds=1"])
