"""mmkd imports no files of the current folder that have the names of modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmkd.data.sources import streamed
from tests.support.bad_inputs import world_in
from tests.support.bad_inputs.table import write
from tests.support.slow import slow

MODULES = (
    *("torch", "transformers", "datasets", "yaml", "numpy", "typer", "huggingface_hub"),
    *("mmkd_models", "typing", "random", "subprocess", "multiprocessing", "tempfile"),
    *("sitecustomize", "json"),
)  # fmt: skip
BIN = Path(sys.executable).parent
MMKD = (sys.executable, "-m", "mmkd.cli")


@pytest.fixture
def world(given, tmp_path):
    with world_in(tmp_path / "world", given) as made:
        for name in MODULES:
            write("import os; os.mkdir('ran-' + __name__)", f"{name}.py")
        yield made


def ran():
    return sorted(path.name for path in Path().glob("ran-*"))


def started(*words, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    return subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [
        ("--version",),
        ("plan", "recipe.yaml"),
        ("run", "recipe.yaml", "stages.0.batch.size=2", "--nproc", "2"),
        slow(("run", "recipe.yaml", "data.workers=1"), name="run-workers"),
    ],
    ids=lambda words: "-".join(w for w in words if w.isalpha()) or words[0],
)
def test_a_command_imports_nothing_from_its_folder(world, words):
    write(json.dumps(world.raw))
    done = started(*MMKD, *words)
    assert (done.returncode, ran()) == (0, []), done.stderr


TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "-m")
DEEPSPEED = (BIN / "deepspeed", "--num_gpus", "2", "--master_port", "29439", "--module")


# deepspeed's own launcher imports from the folder, before mmkd does anything.
@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        pytest.param(TORCHRUN, {}, id="torchrun"),
        slow(DEEPSPEED, {"PYTHONSAFEPATH": "1", "DS_ACCELERATOR": "cpu"}, name="deepspeed"),
    ],
)
def test_processes_of_a_launcher_import_nothing_from_their_folder(world, launcher, environment):
    world.stage(batch={"size": 1, "total": 2})
    write(json.dumps(world.raw))
    words = (*launcher, "mmkd.cli", "run", "recipe.yaml")
    done = started(*words, OMP_NUM_THREADS="1", **environment)
    assert (done.returncode, ran()) == (0, []), done.stderr
    assert Path("runs/tiny/01-mimic/done.json").exists()


def test_the_doctors_processes_import_nothing_from_their_folder(world):
    code = (
        "import sys; sys.argv[:] = ['mmkd', '--version']\n"
        "import contextlib, mmkd.cli\n"
        "with contextlib.suppress(SystemExit): mmkd.cli.main()\n"
        "from mmkd.commands.doctor import packages\n"
        "from mmkd.commands.doctor.isolated import Check, run_isolated\n"
        "if __name__ == '__main__':\n"
        "    print(*run_isolated([Check('s', 'n', packages.torchvision)]))\n"
    )
    place = world.folder.parent / "program"
    place.mkdir()
    (place / "doctor.py").write_text(code)
    done = started(sys.executable, str(place / "doctor.py"))
    assert "name='n'" in done.stdout, done.stderr
    assert ran() == []


def test_a_window_of_a_stream_is_read_by_a_process_that_imports_nothing_from_its_folder(world):
    done = started(*streamed._command({"name": "no/such"}, 0, 1), HF_HUB_OFFLINE="1")
    assert "Error" in done.stderr or "hub:no/such" in done.stderr
    assert ran() == []


def test_a_plugin_of_the_folder_still_runs(world):
    write("open('plugged', 'w').close()", "plugin.py")
    write(json.dumps(world.raw))
    done = started(*MMKD, "plan", "recipe.yaml", "--plugin", "plugin.py")
    assert (done.returncode, Path("plugged").exists(), ran()) == (0, True, []), done.stderr


def test_other_programs_that_import_mmkd_keep_their_path(tmp_path):
    (tmp_path / "own.py").write_text("import sys, mmkd; print(sys.path[0])")
    done = subprocess.run(
        (sys.executable, "-m", "own"), cwd=tmp_path, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path)
