"""Objectives from plugins: a file that the command names, and an installed package."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mmkd.objectives import OBJECTIVES, REGISTRY
from tests.support.outside import (
    broken_packages,
    changed,
    check_broken_package,
    error_line,
    install,
    mmkd,
)
from tests.support.places import DOCS
from tests.support.recipes import tiny_recipe

PAGE = DOCS / "extending.md"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
ENTRY = ("mmkd.objectives", "hidden_cosine", "Cosine")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(OBJECTIVES, "_added", {})


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def written(**objective):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path,
            teacher={"model": str(tiny_model_dir)},
            stage={"objectives": [{"kind": "ce"}, {"kind": "hidden_cosine", **objective}]},
        )  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return written


def cosines(folder):
    lines = (folder / "tiny" / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["hidden_cosine"] for line in lines]


def test_the_file_in_the_docs_trains(recipe, tmp_path, monkeypatch, capsys):
    file = tmp_path / "my_objective.py"
    file.write_text(CODE)
    words = ("run", recipe(region="vision", weight=0.5), "--plugin", file)
    assert mmkd(monkeypatch, *words) in (0, None)
    found = cosines(tmp_path)
    assert abs(found[0]) < 1e-5  # the student begins as its teacher
    assert found[-1] > 1e-4
    said = json.loads((tmp_path / "tiny" / "provenance.json").read_text())
    assert len(said["plugins"][str(file)]) == 64

    monkeypatch.setattr(OBJECTIVES, "_added", {})  # as in a process of its own
    out = tmp_path / "released"
    words = ("release", tmp_path / "tiny", "--out", out)
    assert mmkd(monkeypatch, *words) == 2
    assert mmkd(monkeypatch, *words, "--plugin", file) in (0, None)
    assert "hidden_cosine" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "provenance.json").read_text()
    assert "hidden_cosine" in yaml.safe_dump(
        yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text())
    )
    assert "hidden_cosine" not in REGISTRY


def test_an_installed_package_needs_no_plugin(recipe, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, CODE, ENTRY)
    assert mmkd(monkeypatch, "run", recipe()) in (0, None)
    assert len(cosines(tmp_path)) == 4


@pytest.mark.parametrize(
    ("words", "code", "objective", "said"),
    [
        (["--plugin", "none.py"], None, {}, "--plugin none.py: no such file"),
        (["--plugin", "no.such.module"], None, {}, "cannot be loaded (ModuleNotFoundError"),
        (["--plugin", "my.py"], "1 / 0", {}, "cannot be loaded (ZeroDivisionError"),
        (["--plugin", "my.py"], "raise SystemExit(0)", {}, "cannot be loaded (SystemExit"),
        (["--plugin", "my.py"], CODE, {"regoin": "all"},
         "stages.0.objectives.1.regoin: unknown key -- did you mean 'region'?"),
        (["--plugin", "my.py"], CODE, {"region": "al"},
         "stages.0.objectives.1.region: got 'al' -- input should be 'response', 'vision' or 'all'"),
        (["--plugin", "my.py"], changed(CODE, "hidden_cosine", "kl"), {},
         "two objectives have the kind 'kl'"),
        (["--plugin", "my.py"], changed(CODE, 'Literal["hidden_cosine"]', "str"), {},
         "Cosine has no kind: give its config_class 'kind: Literal[...]'"),
        (["--plugin", "my.py"], changed(CODE, '"teacher", "dis', '"teachr", "dis'), {},
         "it needs 'teachr', which is unknown -- did you mean 'teacher'?"),
        (["--plugin", "my.py"], changed(CODE, "config_class", "needs = None\n    config_class"), {},
         "Cosine defines 'needs': move it to its settings, CosineConfig"),
        (["--plugin", "my.py"], changed(CODE, "needs: ClassVar", "needs: frozenset[str]"), {},
         "a recipe could set 'needs' of CosineConfig: annotate it as ClassVar"),
        (["--plugin", "my.py"], changed(CODE, "ObjectiveConfig", "HeadObjectiveConfig"), {},
         "Cosine and CosineConfig differ: settings of a HeadObjective, and no others, are"),
        (["--plugin", "my.py"],
         changed(CODE, "@add_objective", "add_objective(CosineConfig)\n"), {},
         "cannot be loaded (TypeError: it is not a subclass of Objective)"),
        (["--plugin", "my.py"], changed(CODE, "hidden_cosine", "other"), {},
         "unknown kind 'hidden_cosine'"),
        ([], None, {}, "unknown kind 'hidden_cosine'"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(
    recipe, tmp_path, monkeypatch, capsys, words, code, objective, said
):
    monkeypatch.chdir(tmp_path)
    if code is not None:
        Path("my.py").write_text(code)
    assert mmkd(monkeypatch, "run", recipe(**objective), *words) == 2
    assert said in error_line(capsys)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(("code", "said"), broken_packages(CODE, ENTRY, "objective"))
def test_a_broken_package_is_one_line(recipe, tmp_path, monkeypatch, capsys, code, said):
    check_broken_package(tmp_path, monkeypatch, capsys, recipe(), code, ENTRY, said)


def test_two_objectives_of_one_kind_are_refused(recipe, tmp_path, monkeypatch, capsys):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(CODE)
    words = ("--plugin", tmp_path / "a.py", "--plugin", tmp_path / "b.py")
    assert mmkd(monkeypatch, "run", recipe(), *words) == 2
    assert "two objectives have the kind 'hidden_cosine'" in capsys.readouterr().err
