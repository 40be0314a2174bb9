"""docs/extending.md: a family is added as the page says. `tests.cli.test_plugins` and
`tests.cli.test_conversion_plugins` run its objective and its conversion."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.pages import ROOT, apply_change, blocks

PAGE = ROOT / "docs" / "extending.md"
(FAMILY,) = blocks(PAGE, "diff")


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


def test_a_family_is_added_as_the_page_says(copy):
    root, run = copy
    apply_change(FAMILY, root)
    (command,) = [b for b in blocks(PAGE, "") if "pytest" in b]
    words = command.split()
    assert words[0] == "python"
    done = run(*words[1:], "-p", "no:xdist", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-3000:]  # nor is it 0 where no test is found
