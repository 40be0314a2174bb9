"""Checkpoints: damage is found, a full disk loses nothing, SIGTERM saves."""

import json
import os
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmkd.errors import CheckpointError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.training import checkpoint
from mmkd.training.checkpoint import find_checkpoints
from tests.support import warm
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe
from tests.support.slow import only


@pytest.fixture
def begun(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    """A recipe of eight steps; `begun(name, stop)` runs it and breaks off before a step."""

    def make(name, stop=None, **changes):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            stage={"steps": 8, "checkpoint": {"interval": 2, "keep_last": 2}, **changes},
        )

        with broken_off(lambda stage, number: number == stop):
            pipeline.run(load_recipe(raw))
        folder = pipeline.run_folder(load_recipe(raw)).path
        return folder / "01-mimic"

    return make


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_checkpoint_holds_what_trains_and_nothing_else(begun):
    folder = begun("part", stop=8, train=["connector"])
    newest = find_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step-6"
    names = {n for path in newest.glob("*.safetensors") for n in load_file(path)}
    weights = {n for n in names if n.startswith("weights/")}
    assert len(weights) == 4
    assert all("multi_modal_projector" in n for n in names)
    assert len(names) == 4 * len(weights)  # exp_avg, exp_avg_sq, step
    state = json.loads((newest / "state.json").read_text())
    assert set(state["files"]) == {p.name for p in newest.iterdir()} - {"state.json"}
    assert state["records_per_step"] == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over(begun, capsys, damage):
    whole = begun("whole")
    folder = begun("damaged", stop=8)
    older, newest = find_checkpoints(folder / "checkpoints")
    path = next(newest.glob("*.safetensors"))
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flipped":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        (newest / "state.json").write_text("{")
    capsys.readouterr()
    begun("damaged")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{newest.name}: " in said
    assert "passed over" in said
    assert older.name == "step-4"
    assert losses(folder) == losses(whole)


def test_a_full_disk_ends_the_run_and_loses_nothing(begun, monkeypatch):
    whole = begun("whole")
    save = checkpoint.save_file

    def full(tensors, path):
        if "step-4" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot save step 4 .*No space.*from step 2"):
        begun("full")
    folder = whole.parents[1] / "full" / "01-mimic"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-2"]
    monkeypatch.setattr(checkpoint, "save_file", save)
    assert losses(begun("full")) == losses(whole)


def test_another_number_of_records_is_refused(begun):
    begun("part", stop=4)
    with pytest.raises(CheckpointError, match="had 4 records, and now it would have 8 -- set"):
        begun("part", batch={"size": 8})
    folder = begun("part", batch={"size": 2, "total": 4})
    assert len(losses(folder)) == 8


@pytest.mark.parametrize("processes", only([2], [1, 2]))
def test_sigterm_saves_and_ends_well(scenes_dir, tiny_model_dir, tmp_path, processes):
    runs = {}
    for name in ("whole", "stopped"):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            stage={"steps": 60, "batch": {"size": 2, "total": 4}},
        )
        runs[name] = tmp_path / f"{name}.yaml"
        runs[name].write_text(yaml.safe_dump(raw))

    def start(name):
        return warm.Command("run", runs[name], "--nproc", processes)

    def finish(process):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        return output

    finish(start("whole"))
    process = start("stopped")
    path = tmp_path / "stopped" / "01-mimic" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "mmkd: mimic stopped at step" in output
    assert "run the same command again to go on" in output
    saved = find_checkpoints(path.parent / "checkpoints")
    assert len(saved) == 1
    stopped = json.loads((saved[0] / "state.json").read_text())["step"]
    assert 5 <= stopped < 60
    assert len(path.read_text().splitlines()) == stopped
    finish(start("stopped"))
    assert losses(path.parent) == losses(tmp_path / "whole" / "01-mimic")


def test_one_failing_process_ends_the_others(tmp_path):
    done = warm.run("run", tmp_path / "none.yaml", "--nproc", 2)
    assert done.returncode == 2
    assert "none.yaml" in done.stderr


def test_tensors_are_split_into_files(begun, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", 50_000)
    folder = begun("parts", stop=4)
    (only,) = find_checkpoints(folder / "checkpoints")
    files = list(only.glob("*.safetensors"))
    assert len(files) > 3
    saved = checkpoint.SavedTensors(only)
    assert len(saved) == sum(len(load_file(f)) for f in files)
    assert isinstance(saved[next(iter(saved))], torch.Tensor)
