"""Ctrl-C and SIGTERM at many moments: nothing is lost, one line says how to go on, and no process
stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from mmkd.training.checkpoint import find_checkpoints
from tests.support import warm
from tests.support.recipes import tiny_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "true"}
MMKD = (sys.executable, "-m", "mmkd.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", "-m", "mmkd.cli")  # fmt: skip
DEEPSPEED = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port",
             "29437", "--module", "mmkd.cli")  # fmt: skip
PATIENCE = 150


def hear_ctrl_c():
    # A shell's background job, as which tests may run, ignores it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words):
    """A command in a session of its own, as the first of a terminal."""
    return warm.Command(*words, session=True)


def start_cold(*words):
    """The same, with the start of Python and all imports."""
    return subprocess.Popen(
        [str(word) for word in words],
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )


def ctrl_c(process):
    """What a terminal does: every process of the group gets it."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process):
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output


def wait_for(condition, process=None):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)


def listens(process):
    """Whether a process has its handler of SIGTERM, which nothing else installs so early."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def below(process):
    return psutil.Process(process.pid).children(recursive=True)


def workers(process):
    """The processes that train, whoever launched them."""
    return [p for p in below(process) if "mmkd.cli" in p.cmdline() and not p.children()] or below(
        process
    )


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def losses(folder):
    return [json.loads(line)["loss"] for line in lines(folder / "metrics.jsonl")]


def write(folder, raw):
    path = folder / f"{raw['name']}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture
def long_run(scenes_dir, tiny_model_dir, tmp_path):
    """A recipe of two stages with more steps than a test waits for, and its folder."""

    def make(name="long", steps=2000, workers=0, **stage):
        settings = {"steps": steps, "batch": {"size": 2, "total": 4}, **stage}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, stage=settings)
        raw["data"]["workers"] = workers
        raw["stages"] = [raw["stages"][0], {**raw["stages"][0], "name": "second"}]
        return write(tmp_path, raw), tmp_path / name

    return make


# Where it comes


@pytest.mark.parametrize("processes", [1, 2])
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
@pytest.mark.parametrize("seconds", [0, 0.5, 1.5, 3.0])
def test_a_signal_while_libraries_and_models_are_loaded(long_run, number, seconds):
    """At moments before the first step: nobody swallows it, no traceback is printed."""
    recipe, _ = long_run()
    process = start_cold(*MMKD, "run", recipe)
    wait_for(lambda: listens(process), process)
    time.sleep(seconds)
    process.send_signal(number)
    status, output = finish(process)
    assert status == (130 if number == signal.SIGINT else 0), output
    assert output.splitlines()[-1].endswith("stopped -- run the same command again to go on") or (
        "mimic stopped at step" in output
    )
    assert "Traceback" not in output


AT_ONCE = """
import os, signal, sys
from mmkd import cli
from mmkd.runtime import interrupt

install = signal.signal

def at_once(number, handler):
    before = install(number, handler)
    if handler is interrupt._on_signal:
        os.kill(os.getpid(), int(sys.argv.pop()))
    return before

signal.signal = at_once
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_the_handlers_are_installed(number):
    process = start_cold(
        sys.executable, "-c", AT_ONCE, "run", "recipe.yaml", int(number), int(number)
    )
    status, output = finish(process)
    assert status == (130 if number == signal.SIGINT else 0), output
    assert output == "mmkd: stopped -- run the same command again to go on\n"


AT_THE_END = """
import atexit, os, sys
from mmkd import cli

atexit.register(os.kill, os.getpid(), int(sys.argv.pop()))
cli.entry()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_the_command_has_ended_changes_nothing(number):
    status, output = finish(start_cold(sys.executable, "-c", AT_THE_END, "--version", int(number)))
    assert status == 0, output
    assert output.startswith("mmkd ")
    assert output.count("\n") == 1


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


def test_ctrl_c_in_an_evaluation_keeps_the_training(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        stage={"steps": 1},
        evaluate={"tasks": ["scenes_vqa"], "include": str(scenes_dir / "tasks"), "batch_size": 1},
    )
    recipe = write(tmp_path, raw)
    process = start("run", recipe)
    folder = tmp_path / "tiny"
    wait_for((folder / "01-mimic" / "done.json").exists, process)
    time.sleep(1)
    ctrl_c(process)
    status, output = finish(process)
    assert status == 130, output
    assert output.splitlines()[-1] == "mmkd: stopped -- run the same command again to go on"
    assert "Traceback" not in output
    assert not (folder / "evaluation" / "student" / "results.json").exists()
    assert finish(start("run", recipe))[0] == 0
    assert (folder / "evaluation" / "student" / "results.json").exists()


# Again


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


# Other commands


def stored(folder):
    return sum(json.loads(p.read_text())["records"] for p in folder.glob("rows-*.json"))


def test_a_cache_goes_on_where_it_was_stopped(scenes_dir, tiny_model_dir, tmp_path):
    teacher = {"model": str(tiny_model_dir), "source": "cache"}
    sums = {}
    for name in ("whole", "stopped"):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            stage={"objectives": [{"kind": "kl"}], "batch": {"size": 1}},
            teacher={**teacher, "cache": {"folder": str(tmp_path / f"{name}-cache"), "k": 8}},
        )
        recipe, folder = write(tmp_path, raw), tmp_path / f"{name}-cache"
        if name == "stopped":
            plugin = tmp_path / "signal.py"
            plugin.write_text(
                "import os, signal\n"
                "from mmkd.teachers import LiveTeacher\n"
                "signals, calls = LiveTeacher.signals, []\n"
                "def counted(self, *words, **settings):\n"
                "    calls.append(1)\n"
                "    if len(calls) == 20: os.kill(os.getpid(), signal.SIGINT)\n"
                "    return signals(self, *words, **settings)\n"
                "LiveTeacher.signals = counted\n"
            )
            status, output = finish(start("cache", recipe, "--plugin", plugin))
            assert status == 130, output
            assert "stopped at batch 20 of 64 -- run the same command again" in output
            assert stored(folder) == 20
        status, output = finish(start("cache", recipe))
        assert status == 0, output
        sums[name] = stored(folder)
    assert sums["stopped"] == sums["whole"] == 64


@pytest.mark.parametrize("command", ["check", "build"])
def test_what_cannot_go_on_says_so(tmp_path, command):
    """Nothing half-written stays, and no process."""
    records = tmp_path / "many.jsonl"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    records.write_text((json.dumps({"messages": turns}) + "\n") * 400_000)
    words = {
        "check": ("check", records, "--workers", 2),
        "build": ("build", "scenes", "--out", tmp_path / "built"),
    }[command]
    process = start("data", *words)

    def begun():
        partial = tmp_path.glob(".built.*.partial/train.parquet")
        return len(below(process)) == 2 if command == "check" else any(partial)

    wait_for(begun, process)
    children = below(process)
    ctrl_c(process)
    status, output = finish(process)
    assert status == 130, output
    assert output.splitlines()[-1].startswith("mmkd: stopped -- run the same command again, it")
    assert "Traceback" not in output
    assert {path.name for path in tmp_path.iterdir()} == {"many.jsonl"}
    assert not any(child.is_running() for child in children)


# The end of a launcher


@pytest.mark.parametrize(
    ("launcher", "hanging"),
    [
        ("nproc", False),
        ("nproc", True),
        ("torchrun", False),
        ("torchrun", True),
        # it starts a second launcher, which goes on: a process has to see itself that it is alone
        ("deepspeed", False),
    ],
)
def test_processes_end_with_the_launcher_that_is_killed(long_run, launcher, hanging):
    """SIGKILL of the launcher alone; a process that hangs does not stay either."""
    pytest.importorskip("deepspeed")
    recipe, folder = long_run()
    if launcher == "nproc":
        process = start("run", recipe, "--nproc", 2)
    else:
        process = start_cold(
            *{"torchrun": TORCHRUN, "deepspeed": DEEPSPEED}[launcher], "run", recipe
        )
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 2, process)
    everyone = below(process)
    ranks = workers(process)
    assert len(ranks) == 2
    if hanging:
        for rank in ranks:
            rank.suspend()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    for left in alive:
        left.kill()
    assert not alive
