"""Ctrl-C and SIGTERM while a run trains: nothing is lost, one line says how to continue, and no
process is left."""

import os
import signal
import time

import psutil
import pytest

from mmkd.training.checkpoint import find_checkpoints
from tests.support.interrupted import (
    below,
    ctrl_c,
    finish,
    lines,
    losses,
    start,
    wait_for,
    workers,
)
from tests.support.slow import only


@pytest.mark.parametrize("processes", only([2], [1, 2]))
def test_ctrl_c_in_a_step_saves_and_the_same_command_goes_on(long_run, processes):
    nproc = ("--nproc", processes)
    whole, folder = long_run("whole", steps=40)
    assert finish(start("run", whole, *nproc))[0] == 0
    expected = [losses(folder / stage) for stage in ("01-mimic", "02-second")]
    recipe, folder = long_run("stopped", steps=40)
    process = start("run", recipe, *nproc)
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 5, process)
    ctrl_c(process)
    status, output = finish(process)
    assert status == 130, output
    said = [line for line in output.splitlines() if line.startswith("mmkd: ")]
    assert len(said) == 1, output
    assert "mmkd: mimic stopped at step" in said[0]
    assert "run the same command again to go on" in said[0]
    assert "Traceback" not in output
    (saved,) = find_checkpoints(folder / "01-mimic" / "checkpoints")
    assert len(losses(folder / "01-mimic")) == int(saved.name[5:])
    assert finish(start("run", recipe, *nproc))[0] == 0
    assert [losses(folder / stage) for stage in ("01-mimic", "02-second")] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_the_loaders_workers_to_their_parent(long_run, number):
    """They feed the step that ends, and are gone with the run."""
    recipe, folder = long_run(workers=2)
    process = start("run", recipe)
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 2, process)
    loaders = below(process)
    assert len(loaders) == 4  # two for batches, two for the lengths of records
    for _ in range(3):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    status, output = finish(process)
    assert status == (130 if number == signal.SIGINT else 0), output
    assert "mmkd: mimic stopped at step" in output
    assert len(find_checkpoints(folder / "01-mimic" / "checkpoints")) == 1
    assert not any(loader.is_running() for loader in loaders)


def test_workers_end_with_a_run_that_is_killed(long_run):
    recipe, folder = long_run(workers=2)
    process = start("run", recipe)
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 2, process)
    loaders = below(process)
    for loader in loaders:
        loader.suspend()
    process.kill()
    process.wait()
    assert not psutil.wait_procs(loaders, timeout=20)[1]


def test_a_signal_behind_the_last_step_does_not_lose_it(long_run, tmp_path):
    """While the student is written: it is written to its end."""
    recipe, folder = long_run(steps=3)
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import os, signal, time\n"
        "from mmkd.training import build\n"
        "write = build.write_student\n"
        "def slow(*words):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.2)\n"
        "    write(*words)\n"
        "build.write_student = slow\n"
    )
    status, output = finish(start("run", recipe, "--plugin", plugin))
    assert status == 130, output
    assert output.splitlines()[-1] == "mmkd: stopped -- run the same command again to go on"
    assert (folder / "01-mimic" / "done.json").exists()
    assert (folder / "01-mimic" / "student" / "model.safetensors").exists()
    assert not list(folder.rglob("*.partial"))
    assert not (folder / "02-second").exists()


def test_a_signal_while_a_checkpoint_is_saved_waits_for_it(long_run, tmp_path):
    recipe, folder = long_run(checkpoint={"interval": 2})
    plugin = tmp_path / "slow.py"
    plugin.write_text(
        "import os, signal, time\n"
        "from mmkd.training import checkpoint\n"
        "save = checkpoint.save_file\n"
        "def slow(*words):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.2)\n"
        "    save(*words)\n"
        "checkpoint.save_file = slow\n"
    )
    status, output = finish(start("run", recipe, "--plugin", plugin))
    assert status == 130, output
    (saved,) = find_checkpoints(folder / "01-mimic" / "checkpoints")
    assert len(losses(folder / "01-mimic")) == int(saved.name[5:])
    assert not list(folder.rglob("*.partial"))


def test_a_second_ctrl_c_ends_at_once(long_run, tmp_path):
    recipe, folder = long_run()
    plugin = tmp_path / "hang.py"
    plugin.write_text(
        "import time\n"
        "from mmkd.training import stage\n"
        "step = stage.Stage.step\n"
        "def slow(self, number, batches):\n"
        "    if number == 3: time.sleep(600)\n"
        "    return step(self, number, batches)\n"
        "stage.Stage.step = slow\n"
    )
    process = start("run", recipe, "--plugin", plugin)
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) == 2, process)
    ctrl_c(process)
    ctrl_c(process)  # the same one, as a launcher passes it on
    time.sleep(1.5)
    assert process.poll() is None
    ctrl_c(process)
    started = time.monotonic()
    status, output = finish(process)
    assert status == 130, output
    assert time.monotonic() - started < 30
    assert "ended before it could save -- run the same command again to go on" in output


def test_a_second_ctrl_c_kills_all_processes(long_run):
    recipe, folder = long_run()
    process = start("run", recipe, "--nproc", 2)
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 2, process)
    ranks = workers(process)
    ranks[1].suspend()  # it does not hear anything, and the other one waits for it
    ctrl_c(process)
    time.sleep(1.5)
    assert process.poll() is None
    ctrl_c(process)
    assert finish(process)[0] == 130
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() for rank in ranks)
