"""Ctrl-C and SIGTERM before and after training, and in other commands: nothing is lost, and one
line says how to continue."""

import json
import signal
import sys
import time

import pytest

from tests.support.interrupted import (
    MMKD,
    below,
    ctrl_c,
    finish,
    listens,
    start,
    start_cold,
    wait_for,
    write,
)
from tests.support.recipes import tiny_recipe


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


def test_ctrl_c_in_an_evaluation_keeps_the_training(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        stage={"steps": 1},
        evaluate={"tasks": ["scenes_vqa"], "include": str(scenes_dir / "tasks"), "batch_size": 1},
    )
    recipe, folder, plugin = write(tmp_path, raw), tmp_path / "tiny", tmp_path / "signal.py"
    plugin.write_text(
        "import os, signal\n"
        "from mmkd.evaluation.adapter import MmkdModel\n"
        "answer = MmkdModel._answer\n"
        "def signalled(self, batch):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return answer(self, batch)\n"
        "MmkdModel._answer = signalled\n"
    )
    status, output = finish(start("run", recipe, "--plugin", plugin))
    assert status == 130, output
    assert (folder / "01-mimic" / "done.json").exists()
    assert output.splitlines()[-1] == "mmkd: stopped -- run the same command again to go on"
    assert "Traceback" not in output
    assert not (folder / "evaluation" / "student" / "results.json").exists()
    assert finish(start("run", recipe))[0] == 0
    assert (folder / "evaluation" / "student" / "results.json").exists()


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
