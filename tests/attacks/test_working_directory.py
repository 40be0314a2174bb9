"""Python files in the folder that a command is run in are data: they never run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.attacks.on_code import EVIL
from tests.support.bad_inputs import Given, world_in

BIN = Path(sys.executable).parent
MODULES = ("torch", "transformers", "yaml", "datasets", "PIL", "numpy", "mmkd_models", "peft")
STANDARD = ("json", "pickle", "multiprocessing", "random", "signal")
TORCHRUN = (sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", "-m", "mmkd.cli")  # fmt: skip


@pytest.fixture(scope="session")
def given(tiny_model_dir, tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"), tiny_model_dir)


@pytest.mark.parametrize(
    ("command", "modules"),
    [
        # The interpreter itself imports the standard library before mmkd for `python -m`.
        ((sys.executable, "-m", "mmkd.cli", "run", "recipe.yaml"), MODULES),
        ((BIN / "mmkd", "run", "recipe.yaml", "data.workers=2"), MODULES + STANDARD),
        ((BIN / "mmkd", "run", "recipe.yaml", "--nproc", "2"), MODULES + STANDARD),
        ((*TORCHRUN, "run", "recipe.yaml"), MODULES),
        ((BIN / "mmkd", "doctor"), MODULES + STANDARD),
    ],
    ids=["module", "command", "nproc", "torchrun", "doctor"],
)
def test_modules_of_the_working_directory_do_not_run(given, tmp_path, command, modules):
    with world_in(tmp_path / "world", given) as world:
        world.stage(batch={"size": 1, "total": 2})
        Path("recipe.yaml").write_text(yaml.safe_dump(world.raw))
        for name in modules:
            Path(f"{name}.py").write_text(EVIL)
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        done = subprocess.run(
            [str(word) for word in command],
            env={**kept, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert not Path("ran").exists(), done.stderr
        assert done.returncode == 0 or "doctor" in command, done.stdout + done.stderr
        if "doctor" not in command:
            steps = Path("runs/tiny/01-mimic/metrics.jsonl").read_text().splitlines()
            assert json.loads(steps[-1])["step"] == 1
