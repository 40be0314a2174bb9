"""Commands change no other files, store no consent, and send no private data."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmkd.commands.build_cache import build_cache
from mmkd.commands.doctor import places
from mmkd.commands.doctor.isolated import Check, run_isolated
from mmkd.evaluation import models
from mmkd.recipe import EvaluateConfig, ModelConfig, load_recipe
from mmkd.runs.pipeline import run as train
from mmkd.runtime import consent
from mmkd.training import trackers
from mmkd.training.trackers import Place, Tracked
from tests.support import hub_server
from tests.support.bad_inputs import run, world_in
from tests.support.bad_inputs.table import RECORD, RUN, contents

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def world(given, tmp_path):
    with world_in(tmp_path / "world", given) as made:
        yield made


# What is the user's own


COMMANDS = {
    "runs/tiny": RUN,
    "cache": ["cache", "recipe.yaml"],
    "converted": ["convert", "model", "--out", "converted", "--keep-attention", "none"],
    "released": ["release", "runs/tiny", "--out", "released"],
    "built": ["data", "build", "scenes", "--out", "built", "--train", "2"],
    "pairs.parquet": [
        *("data", "pairs", "model", "--data", "records.json", "--out", "pairs.parquet"),
        *("--max-new-tokens", "4"),
    ],
    "scores": ["eval", "model", "--tasks", "scenes_pope", "--limit", "2", "--out", "scores"],
}


@pytest.mark.parametrize("out", COMMANDS)
def test_files_of_the_user_beside_an_output_stay(world, out, scenes_dir):
    words = list(COMMANDS[out])
    if out == "released":
        world.take(world.given.trained, "runs")
    if out == "cache":
        world.cache()
    if out == "scores":
        words += ["--include", str(scenes_dir / "tasks")]
    if out == "pairs.parquet":
        seen = [{"name": "cat", "box": [0, 0, 9, 9]}]
        world.records(*({**RECORD, "id": f"r{n}", "objects": seen} for n in range(8)))
    if "recipe.yaml" in words:
        Path("recipe.yaml").write_text(json.dumps(world.raw))
    place = Path(out)
    for name in (f"{place.name}.partial", f".{place.name}.partial", f"{place.name}.tmp"):
        (place.parent / name).mkdir(parents=True)
        (place.parent / name / "mine").write_text("mine")
    (place.parent / f"{place.name}.mmkd.partial").write_text("mine")
    before = contents(world.folder)
    status, message = run(words, world.patch)
    if out != "pairs.parquet":  # random weights may make no pair
        assert status in (0, None), message
        assert place.exists()
    after = contents(world.folder)
    assert {name: after.get(name) for name in before} == before


# What is kept of consent


def test_a_caches_manifest_names_whose_code_was_let_run(world):
    consent.withdraw()
    world.cache()
    Path("teacher/own.py").write_text("")
    build_cache(load_recipe(world.raw))
    manifest = Path("cache/manifest.json")
    assert "trusted" not in json.loads(manifest.read_text())
    shutil.rmtree("cache")
    consent.grant("teacher")
    try:
        build_cache(load_recipe(world.raw))
    finally:
        consent.withdraw()
    found = json.loads(manifest.read_text())["trusted"]
    assert list(found) == ["teacher"]
    assert len(found["teacher"]["own.py"]) == 64
    train(load_recipe(world.raw))  # the manifest is read as before


# What others are told


def test_trackers_are_told_no_secrets(world, monkeypatch):
    world.raw["label"] = f"x{SECRET}"
    recipe = load_recipe(world.raw)
    monkeypatch.setenv("SOME_API_KEY", SECRET)  # now the recipe holds a secret
    told = []

    def init(**settings):
        told.append(settings)
        return SimpleNamespace()

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=init))
    tracked, place = Tracked(recipe, Path("runs/tiny"), Path("runs/tiny/01-a")), Place("i", True, 0)
    trackers.WandB(tracked, place)
    trackers.Trackio(tracked, place)
    trackers.TensorBoard(tracked, place).finish(False)
    assert len(told) == 2
    for settings in told:
        assert settings["config"]["label"] == "x..."
        assert SECRET not in repr(settings)
    events = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert events
    assert all(SECRET.encode() not in path.read_bytes() for path in events)


@pytest.mark.parametrize("address", ["me:pass-word-1", "hf_" + "a1" * 17, "me:pa@ss-word-1"])
@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTPS_PROXY", "ALL_PROXY"])
def test_the_doctor_tells_no_login_of_an_address(monkeypatch, variable, address):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://localhost:9")
    monkeypatch.setenv(variable, f"http://{address}@localhost:9")
    (row,) = run_isolated([Check("s", "hub", places.hub)])
    assert row.state == "broken"
    assert "localhost:9" in row.detail
    for word in ("pass-word-1", "ss-word-1", "a1a1a1a1"):
        assert word not in repr(row)


def test_what_the_doctor_prints_has_no_login(tmp_path):
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    address = "http://me:pass-word-1@localhost:9"
    done = subprocess.run(
        [sys.executable, "-m", "mmkd.cli", "doctor", "--json"],
        env={**kept, "HF_ENDPOINT": address, "HTTP_PROXY": address, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "http://localhost:9" in done.stdout
    assert "pass-word-1" not in done.stdout + done.stderr


# Scores of other data


def test_changed_data_of_a_task_starts_its_evaluation_again(world, scenes_dir, monkeypatch):
    shutil.copytree(scenes_dir, "scenes")
    settings = EvaluateConfig(tasks=["scenes_pope"], include="scenes/tasks", limit=2)
    asked = []

    def score(*words, **more):
        asked.append(words)
        more["out"].mkdir(exist_ok=True, parents=True)
        (more["out"] / "results.json").write_text(json.dumps({"scores": {}}))

    monkeypatch.setattr("mmkd.evaluation.run.evaluate", score)

    def evaluated():
        asked.clear()
        sources = {"student": ModelConfig(model="model")}
        models.evaluate_models(sources, settings, Path("out"), "cpu")
        return len(asked)

    assert (evaluated(), evaluated()) == (1, 0)
    (data,) = models._data_of(settings)
    with open(data, "ab") as file:
        file.write(b"\n")
    assert (evaluated(), evaluated()) == (1, 0)


def test_another_commit_of_a_model_from_the_hub_starts_its_evaluation_again(world, monkeypatch):
    hub = world.hub()
    hub.repos["me/model"] = hub_server.Repo(False)
    settings = EvaluateConfig(tasks=["scenes_pope"])
    scored = []

    def score(*words, **more):
        scored.append(words)
        more["out"].mkdir(exist_ok=True, parents=True)
        (more["out"] / "results.json").write_text(json.dumps({"scores": {}}))

    monkeypatch.setattr("mmkd.evaluation.run.evaluate", score)

    def evaluated():
        scored.clear()
        sources = {"teacher": ModelConfig(model="me/model")}
        models.evaluate_models(sources, settings, Path("out"), "cpu")
        return len(scored)

    assert (evaluated(), evaluated()) == (1, 0)
    hub.repos["me/model"].commits += 1
    assert (evaluated(), evaluated()) == (1, 0)
