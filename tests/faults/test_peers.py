"""If a process dies, hangs or never starts, the others end with an error, and the run resumes."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

ENGINES = {"torch": {"kind": "torch"}, "zero2": {"kind": "deepspeed", "zero": 2}}
STEPS = 40
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"}


class Run:
    def __init__(self, folder, raw):
        self.path = folder / f"{raw['name']}.yaml"
        self.path.write_text(yaml.safe_dump(raw))
        self.metrics = folder / raw["name"] / "01-mimic" / "metrics.jsonl"

    def start(self):
        return warm.Command("run", self.path, "--nproc", 2)

    def lines(self):
        return self.metrics.read_text().splitlines() if self.metrics.exists() else []

    def losses(self):
        return [json.loads(line)["loss"] for line in self.lines()]


@pytest.fixture(scope="module", params=only(["zero2"], ENGINES))
def quiet(request, scenes_dir, tiny_model_dir, tmp_path_factory):
    """An engine, and the losses of a run of two processes on it that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    run = Run(folder, recipe(request.param, scenes_dir, tiny_model_dir, folder))
    finish(run)
    return request.param, run.losses()


def recipe(engine, scenes, model, folder):
    stage = {
        "steps": STEPS,
        "batch": {"size": 2, "total": 4},
        "checkpoint": {"interval": 5},
        "engine": {"device": "cpu", "timeout_s": 15, **ENGINES[engine]},
    }
    return tiny_recipe(scenes, model, folder, stage=stage)


def finish(run):
    process = run.start()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture
def disturbed(quiet, scenes_dir, tiny_model_dir, tmp_path):
    """A run of two processes that a signal to one of them disturbs after some steps.

    Returns its exit status, its output, and its losses after it was resumed with those of the
    quiet run.
    """
    engine, expected = quiet

    def make(number):
        run = Run(tmp_path, recipe(engine, scenes_dir, tiny_model_dir, tmp_path))
        process = run.start()
        deadline = time.monotonic() + 120
        while len(run.lines()) < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        psutil.Process(process.pid).children()[1].send_signal(number)
        output, _ = process.communicate(timeout=120)
        finish(run)
        return process.returncode, output, run.losses(), expected

    return make


def test_a_killed_process_ends_the_others(disturbed):
    status, output, losses, expected = disturbed(signal.SIGKILL)
    assert status == 128 + signal.SIGKILL
    assert "process 1 was killed (SIGKILL) -- run the same command again to go on" in output
    assert "mmkd: process 0 lost the connection to another process -- see the errors" in output
    assert "Traceback" not in output
    assert losses == expected


def test_a_hanging_process_is_waited_for_and_then_named(disturbed):
    status, output, losses, expected = disturbed(signal.SIGSTOP)
    assert status == 2
    assert "mmkd: process 0 waits for another process that does not answer" in output
    assert "Traceback" not in output
    assert losses == expected


def test_a_process_that_never_comes(scenes_dir, tiny_model_dir, tmp_path):
    stage = {"engine": {"device": "cpu", "timeout_s": 5}}
    run = Run(tmp_path, tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage=stage))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29417", "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "mmkd.cli", "run", run.path],
        env={**ENVIRONMENT, **place, "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert "mmkd: process 0 waited 5 s, and not all 2 came -- start all of them" in said[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny").exists()
