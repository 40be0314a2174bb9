"""Parts of an evaluation that are finished are kept."""

import json
from pathlib import Path

import pytest

from mmkd.evaluation import models
from mmkd.recipe import EvaluateConfig
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


def evaluate(label: str, weights: str) -> None:
    model = dict.fromkeys(("revision", "processor", "quantize"), None)
    models._score(
        label,
        {**model, "model": label, "weights": weights},
        SETTINGS,
        EvaluationFolder(Path(label)),
        {},
    )


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
        model = dict.fromkeys(("revision", "processor", "quantize"), None)
        settings = EvaluateConfig(tasks=["scenes_pope"], calibration=calibration)
        request = {**model, "model": "kd", "weights": "a"}
        models._score("kd", request, settings, EvaluationFolder(Path("kd")), {})

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
