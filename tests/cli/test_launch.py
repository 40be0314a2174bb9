"""One command under every launcher: two processes, the same losses."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmkd.cli import launch
from tests.support.places import SCRIPTS
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

BIN = Path(sys.executable).parent
LAUNCH = SCRIPTS / "launch"
LAUNCHERS = {
    "nproc": ["mmkd", "run", "RECIPE", "--nproc", "2"],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "mmkd.cli", "run",
                 "RECIPE"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "29431", "--module", "mmkd.cli",
                  "run", "RECIPE"],
    "single_node.sh": ["bash", str(LAUNCH / "single_node.sh"), "RECIPE"],
    "multi_node.sh": ["bash", str(LAUNCH / "multi_node.sh"), "RECIPE"],
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Losses of one process."""
    return losses(
        scenes_dir, tiny_model_dir, tmp_path_factory.mktemp("one"), ["mmkd", "run", "RECIPE"]
    )


def losses(scenes, model, folder, command, **engine):
    stage = {
        "objectives": [{"kind": "ce"}],
        "batch": {"size": 2, "total": 4},
        "engine": {"device": "cpu", **engine},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(scenes, model, folder, stage=stage)))
    place = {
        "PROCESSES": "2",
        "NODES": "1",
        "RANK_OF_NODE": "0",
        "HEAD": "127.0.0.1",
        "PORT": "29432",
    }
    done = subprocess.run(
        [str(recipe) if word == "RECIPE" else word for word in command],
        env={
            **os.environ,
            **place,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = (folder / "tiny" / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("launcher", only(["deepspeed", "multi_node.sh"], LAUNCHERS))
def test_every_launcher(scenes_dir, tiny_model_dir, tmp_path, expected, launcher):
    pytest.importorskip("deepspeed")
    engine = {"kind": "deepspeed", "zero": 2}
    found = losses(scenes_dir, tiny_model_dir, tmp_path, LAUNCHERS[launcher], **engine)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_a_killed_process_is_the_cause(order, capsys):
    """Others fail because of it, whoever is seen first."""
    words = ["exit 2", "kill -KILL $$"][::order]
    workers = [subprocess.Popen(["sh", "-c", word]) for word in words]
    for worker in workers:
        worker.wait()
    assert launch._stop(workers) == 128 + signal.SIGKILL
    number = words.index("kill -KILL $$")
    assert f"process {number} was killed (SIGKILL)" in capsys.readouterr().err
