"""Scores of other weights than the current ones are marked in the report and not published."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mmkd.report import write_report
from mmkd.runtime.hashes import weights_hash
from tests.support.bad_inputs import run, world_in

WARNING = "its scores are of other weights than the run holds now"


@pytest.fixture
def student(given, tmp_path):
    """The student's folder of a finished run that has scores of it and of its teacher."""
    with world_in(tmp_path / "world", given) as world:
        world.take(given.trained, "runs")
        student = Path("runs/tiny/01-mimic/student")
        for label in ("student", "teacher"):
            folder = Path("runs/tiny/evaluation") / label
            folder.mkdir(parents=True, exist_ok=True)
            scores = {"scenes_pope": {"pope_accuracy": 0.9}}
            (folder / "results.json").write_text(json.dumps({"scores": scores}))
            held = weights_hash(student if label == "student" else "teacher")
            (folder / "request.json").write_text(json.dumps({"weights": held}))
        for path in (Path("runs/tiny/recipe.yaml"), *Path("runs/tiny").rglob("training.yaml")):
            recipe = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**recipe, "teacher": {"model": "teacher"}}))
        yield student, world


def test_the_report_names_scores_of_a_stages_other_weights(student, capsys):
    _, _ = student
    of_stage = Path("runs/tiny/evaluation/student@mimic")
    shutil.copytree("runs/tiny/evaluation/student", of_stage)
    _, printed = reported(capsys)
    assert WARNING not in printed
    (of_stage / "request.json").write_text(json.dumps({"weights": "0" * 64}))
    _, printed = reported(capsys)
    assert f"student@mimic: {WARNING}" in printed
    assert f"student: {WARNING}" not in printed


def reported(capsys):
    page = write_report(Path("runs/tiny")).read_text()
    return page, capsys.readouterr().out


@pytest.mark.parametrize("label", ["student", "teacher"])
def test_the_report_names_scores_of_other_weights(student, capsys, label):
    folder, world = student
    page, printed = reported(capsys)
    assert WARNING not in page + printed
    weights = (folder if label == "student" else Path("teacher")) / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    page, printed = reported(capsys)
    assert f"{label}: {WARNING}" in printed
    assert f"{label}: {WARNING}" in page
    status, message = run(["release", "runs/tiny", "--out", "out"], world.patch)
    assert status == 2
    assert WARNING in message
    assert not Path("out").exists()
