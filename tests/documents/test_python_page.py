"""docs/python.md, the notebook and the loop of examples/ run as they stand."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.support.pages import ROOT, blocks

PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"


@pytest.fixture
def clone(tmp_path, scenes_dir):
    """A folder with the shipped teacher and a small scenes data set where a clone has them."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "scenes").symlink_to(scenes_dir)
    return tmp_path


def printed(folder, *words):
    """What `python WORDS` prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_runs_from_its_top_to_its_end(clone):
    out = printed(clone, "-c", "\n".join(blocks(PAGE, "python")))
    losses = json.loads(out.splitlines()[0])
    assert losses[-1] < losses[0]
    assert "step 2: " in out
    assert re.search(r"^\d+\.\d{3} \['ce', 'kl'\]$", out, re.M)


def test_the_first_block_is_ten_lines():
    first = blocks(PAGE, "python")[0].splitlines()
    assert len([line for line in first if line]) <= 10


def cells():
    return json.loads(NOTEBOOK.read_text())["cells"]


def source(cell):
    return "".join(cell["source"])


def test_the_notebook_runs_from_its_top_to_its_end(clone):
    code = [source(cell) for cell in cells() if cell["cell_type"] == "code"]
    out = printed(clone, "-c", "\n".join(code))
    losses = re.findall(r"loss (\d+\.\d+)", out)
    assert float(losses[-1]) < float(losses[0])


def test_the_notebook_shows_what_its_cells_printed():
    for cell in cells():
        if cell["cell_type"] == "code" and "print(" in source(cell):
            assert cell["outputs"], source(cell)
            assert cell["outputs"][0]["name"] == "stdout"


def test_the_loop_of_the_examples_learns(tmp_path):
    out = printed_by_example(tmp_path, "--steps", "12", "--batch-size", "8")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", out)]
    assert losses[-1] < losses[0]
    assert "student: how many objects" in out


def printed_by_example(folder, *words):
    return printed(folder, ROOT / "examples" / "minimal_distillation.py", *words)
