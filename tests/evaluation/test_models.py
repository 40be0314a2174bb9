"""Parts of an evaluation that are finished are kept."""

import json
from pathlib import Path
from unittest import mock

import pytest

from mmkd.evaluation import models
from mmkd.recipe import EvaluateConfig, StudentConfig
from mmkd.runtime.processes import ALONE
from mmkd.runtime.run_folder import EvaluationFolder

SETTINGS = EvaluateConfig(tasks=["scenes_pope"])


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """The models that were evaluated."""
    names: list[str] = []

    def score(model, *, out, **settings):
        names.append(model)
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps({"model": model, "scores": {}}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mmkd.evaluation.run.evaluate", score)
    return names


def evaluate(label: str, weights: str, settings: EvaluateConfig = SETTINGS) -> None:
    with mock.patch.object(models, "weights_hash", return_value=weights):
        model = models._Model(label, StudentConfig(model=label), EvaluationFolder(Path(label)), "")
        models._score(model, settings, ALONE)


def test_scores_of_the_same_weights_are_taken_over(scored):
    evaluate("kd", "a")
    evaluate("kd@align", "a")
    evaluate("ce", "b")
    assert scored == ["kd", "ce"]
    assert json.loads(Path("kd@align/results.json").read_text())["model"] == "kd@align"
    evaluate("kd@align", "a")
    assert scored == ["kd", "ce"]


@pytest.mark.parametrize("name", ["answers.json", "decode.json"])
def test_other_parts_stay_when_scores_are_taken_over(scored, name):
    evaluate("kd", "a")
    evaluate("ce", "b")
    (Path("kd") / name).write_text("of kd")
    (Path("ce") / name).write_text("of ce")
    evaluate("ce", "a")  # its weights are kd's now
    assert scored == ["kd", "ce"]
    assert (Path("ce") / name).read_text() == "of ce"
    assert (Path("kd") / name).read_text() == "of kd"


def test_calibration_is_computed_when_a_recipe_asks_for_it_later(scored):
    def asked(calibration: bool) -> None:
        settings = EvaluateConfig(tasks=["scenes_pope"], calibration=calibration)
        evaluate("kd", "a", settings)

    asked(False)
    asked(True)
    assert scored == ["kd", "kd"]
    asked(False)
    assert scored == ["kd", "kd"]


def test_scores_of_an_older_version_are_kept(scored):
    evaluate("kd", "a")
    request = json.loads(Path("kd/request.json").read_text())
    del request["calibration"]
    Path("kd/request.json").write_text(json.dumps(request))
    evaluate("kd", "a")
    assert scored == ["kd"]
