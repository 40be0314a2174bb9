"""docs/extending.md: a conversion and a family are added as the page says."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.pages import ROOT, apply_change, blocks
from tests.support.recipes import tiny_recipe

PAGE = ROOT / "docs" / "extending.md"
CONVERSION, FAMILY = blocks(PAGE, "diff")
CODE = blocks(PAGE, "python")[1]


@pytest.fixture
def copy(tmp_path):
    """The repository's code, to be changed, and a way to run it."""
    root = tmp_path / "copy"
    for name in ("mmkd", "models", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    places = os.pathsep.join([str(root), str(root / "models")])

    def run(*words):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": places},
            capture_output=True,
            text=True,
        )

    return root, run


def test_a_conversion_is_added_as_the_page_says(copy, scenes_dir, tiny_model_dir, tmp_path):
    root, run = copy
    (root / "mmkd" / "students" / "kv_heads.py").write_text(CODE)
    apply_change(CONVERSION, root)
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 1})
    (shown,) = [y for y in blocks(PAGE, "yaml") if "kv_heads" in y]
    raw["student"]["convert"] = yaml.safe_load(shown)["student"]["convert"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw))

    done = run("-m", "mmkd.cli", "run", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    start = tmp_path / "tiny" / "00-start" / "student"
    config = json.loads((start / "config.json").read_text())
    assert config["text_config"]["num_key_value_heads"] == 1
    old, new = (load_file(folder / "model.safetensors") for folder in (tiny_model_dir, start))
    merged = [name for name in old if old[name].shape != new[name].shape]
    assert len(merged) == 4  # keys and values of two layers
    for name in merged:
        torch.testing.assert_close(new[name], old[name].unflatten(0, (2, -1)).mean(0))


def test_a_family_is_added_as_the_page_says(copy):
    root, run = copy
    apply_change(FAMILY, root)
    (command,) = [b for b in blocks(PAGE, "") if "pytest" in b]
    words = command.split()
    assert words[0] == "python"
    done = run(*words[1:], "-p", "no:xdist", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]  # nor is it 0 where no test is found
