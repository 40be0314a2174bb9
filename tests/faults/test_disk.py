"""A disk that fills up, by the operating system's limit on the size of a file."""

import json

import pytest
import yaml

from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

CHECKPOINT, STUDENT = 300_000, 250_000  # bytes: less than one file of a checkpoint, of a student


def start(path, processes, limit=None):
    return warm.run("run", path, "--nproc", processes, largest=limit, timeout=120)


@pytest.fixture
def runs(scenes_dir, tiny_model_dir, tmp_path):
    """A quiet run's losses, and the recipe and folder of another one."""

    def make(processes, every):
        for name in ("quiet", "full"):
            raw = tiny_recipe(
                scenes_dir,
                tiny_model_dir,
                tmp_path,
                name=name,
                stage={
                    "steps": 6,
                    "batch": {"size": 2, "total": 4},
                    "checkpoint": {"interval": every},
                },
            )
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        done = start(tmp_path / "quiet.yaml", processes)
        assert done.returncode == 0, done.stderr
        return losses(tmp_path / "quiet"), tmp_path / "full.yaml", tmp_path / "full"

    return make


def losses(folder):
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("processes", only([2], [1, 2]))
def test_full_while_a_checkpoint_is_written(runs, processes):
    expected, recipe, folder = runs(processes, every=2)
    done = start(recipe, processes, CHECKPOINT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mmkd: ")]
    (line,) = said  # of all processes
    assert "checkpoints: cannot save step 2 (" in line
    assert "File too large" in line
    assert "free space and run again: it goes on from the start of the stage" in line
    assert not list(folder.rglob("*.partial"))
    assert start(recipe, processes).returncode == 0
    assert losses(folder) == expected


@pytest.mark.parametrize("processes", only([2], [1, 2]))
def test_full_while_the_student_is_written(runs, processes):
    expected, recipe, folder = runs(processes, every=100)
    done = start(recipe, processes, STUDENT)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "student: cannot write (" in done.stderr
    assert "File too large" in done.stderr
    assert not list(folder.rglob("*.partial"))
    assert not (folder / "01-mimic" / "student").exists()
    assert start(recipe, processes).returncode == 0
    assert losses(folder) == expected


def test_full_before_the_first_step(runs):
    expected, recipe, folder = runs(1, every=2)
    done = start(recipe, 1, 1000)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot write (File too large) -- free space and run the same command" in done.stderr
    assert start(recipe, 1).returncode == 0
    assert losses(folder) == expected
