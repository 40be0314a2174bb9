"""Mistakes in a command or a recipe are reported before the slow libraries are imported."""

import importlib
import subprocess
import sys

import pytest
import yaml

from mmkd import objectives

SLOW = ("torch", "transformers", "datasets", "huggingface_hub.hf_api", "pyarrow")
RUN = """
import sys
from mmkd.cli import main
sys.argv = ["mmkd", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print(end.code, *(name for name in {slow!r} if name in sys.modules))
"""


def told(*words, cwd):
    """The exit status, the slow modules that were imported, and what was said."""
    code = RUN.format(slow=SLOW)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], cwd=cwd, capture_output=True, text=True
    )
    status, *slow = done.stdout.splitlines()[-1].split()
    return int(status), slow, done.stderr


@pytest.fixture
def mistaken(tmp_path):
    raw = {
        "name": "typo",
        "student": {"model": "student"},
        "data": {"train": "train.jsonl"},
        "stages": [
            {
                "name": "kd",
                "steps": 1,
                "objectives": [{"kind": "kl", "regoin": "vision"}, {"kind": "preference"}],
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "more.yaml").write_text("extends: recipe.yaml\nseed: 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["run", "recipe.yaml"],
        ["run", "recipe.yaml", "--nproc", "2"],
        ["run", "more.yaml", "seed=3"],
        ["plan", "recipe.yaml"],
        ["bench", "recipe.yaml"],
        ["cache", "recipe.yaml"],
        ["cache", "build", "recipe.yaml", "--nproc", "2"],
        ["cache", "stats", "folder", "--recipe", "recipe.yaml"],
        ["data", "check", "recipe.yaml"],
    ],
    ids=" ".join,
)
def test_a_typo_is_reported_before_torch_is_imported(mistaken, words):
    status, slow, error = told(*words, cwd=mistaken)
    assert status == 2
    assert "stages.0.objectives.0.regoin: unknown key -- did you mean 'region'?" in error
    assert error.count("\n") == 1
    assert slow == []


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["run", "--help"], ["recipe", "schema"]]
)
def test_help_needs_no_torch(tmp_path, words):
    status, slow, _ = told(*words, cwd=tmp_path)
    assert (status, slow) == (0, [])


def test_a_plan_imports_no_package_that_only_some_recipes_need():
    code = """
import sys
import mmkd.commands.plan
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""
    needless = ("peft", "deepspeed", "datasets", "pandas", "matplotlib", "lmms_eval")
    done = subprocess.run([sys.executable, "-c", code, *needless], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [])


def test_every_name_of_the_lazy_package_is_there():
    for name in objectives.__all__:
        assert getattr(objectives, name) is not None
    for name, module in objectives._MODULE_OF.items():
        found = importlib.import_module(f"mmkd.objectives.{module}")
        assert getattr(objectives, name) is getattr(found, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = objectives.nothing


def test_settings_and_objectives_belong_together():
    """Each class of settings has one objective, and each objective its settings."""
    from mmkd.objectives import OBJECTIVES
    from mmkd.objectives.build import CLASSES, REGISTRY
    from mmkd.objectives.settings import SETTINGS

    assert [cls.config_class for cls in CLASSES] == list(SETTINGS)
    assert {kind: cls.config_class for kind, cls in REGISTRY.items()} == OBJECTIVES.built_in
