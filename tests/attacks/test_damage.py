"""Files of a run's folder that are valid but have other content, or are empty."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import yaml

from mmkd.commands.build_cache import build_cache
from mmkd.recipe import load_recipe
from tests.support.bad_inputs import run, world_in
from tests.support.bad_inputs.table import RUN, contents
from tests.support.slow import only

TEXTS = ("", "null", "[]", "7", '"text"', "{}", '{"steps": "many", "step": [], "files": {}}', "{\n")
ROOT = "runs/tiny"
STAGE = f"{ROOT}/01-mimic"


@pytest.fixture(scope="session")
def made(given):
    """A finished, evaluated run, and a teacher's cache."""
    with world_in(given.folder / "finished", given) as world:
        prepare(world)
        assert run(RUN, world.patch)[0] == 0
    with world_in(given.folder / "caching", given) as world:
        world.cache()
        build_cache(load_recipe(world.raw))
    return given


def prepare(world):
    world.raw["evaluate"] = {
        "samples": {"records": "records.json", "count": 1},
        "decode": [4],
    }
    Path("recipe.yaml").write_text(json.dumps(world.raw))


@pytest.fixture
def world(made, tmp_path):
    with world_in(tmp_path / "world", made) as world:
        prepare(world)
        world.take(made.folder / "finished", "runs")
        yield world


def tried(world, words):
    """A command ends well, or in one line; never in a traceback, which `run` would raise."""
    status, message = run(words, world.patch)
    assert status in (0, 2), message
    said = [line for line in message.splitlines() if line.startswith("mmkd: ")]
    assert len(said) == (status == 2), message
    return status, message


FILES = [
    f"{ROOT}/provenance.json",
    f"{ROOT}/recipe.yaml",
    f"{ROOT}/training.yaml",
    f"{STAGE}/done.json",
    f"{STAGE}/metrics.jsonl",
    f"{STAGE}/validation.jsonl",
    f"{STAGE}/inputs.json",
    f"{ROOT}/evaluation/student/answers.json",
    f"{ROOT}/evaluation/student/decode.json",
    f"{ROOT}/evaluation/student/results.json",
    f"{ROOT}/evaluation/student/request.json",
    f"{STAGE}/student/config.json",
    f"{STAGE}/student/generation_config.json",
]


@pytest.mark.parametrize("name", FILES)
def test_report_release_and_eval_take_damaged_files(world, name):
    path = Path(name)
    for text in TEXTS:
        path.write_text(text)
        tried(world, ["report", ROOT])
        status, _ = tried(world, ["release", ROOT, "--out", "out", "--dry-run"])
        if name.endswith(("done.json", ".yaml")):
            assert status == 2, text
        assert path.read_text() == text


KEYS = (
    *("label", "seed", "seeds", "variants", "student", "data", "data.train", "data.sources"),
    *("teacher", "teacher.model", "teacher.source", "more_teachers", "release"),
    *("stages", "stages.0", "stages.0.name", "stages.0.objectives", "stages.0.objectives.0"),
    *("stages.0.data", "stages.0.validation", "stages.0.validation.patience"),
    *("evaluate", "evaluate.include", "evaluate.tasks"),
    *("evaluate.samples", "evaluate.samples.records"),
)


@pytest.mark.parametrize("name", only(["recipe.yaml"], ["recipe.yaml", "training.yaml"]))
@pytest.mark.parametrize("key", KEYS)
def test_report_and_release_take_a_value_of_another_kind(world, name, key):
    path = Path(ROOT) / name
    whole = yaml.safe_load(path.read_text())
    for value in ("text", 7, [7], {"text": 7}, [["text"]], None):
        *parents, last = key.split(".")
        raw = copy.deepcopy(whole)
        holder = raw
        for parent in parents:
            holder = holder[int(parent)] if isinstance(holder, list) else holder.get(parent)
            if holder is None:
                return
        holder[int(last) if isinstance(holder, list) else last] = value
        path.write_text(yaml.safe_dump(raw))
        tried(world, ["report", ROOT])
        tried(world, ["release", ROOT, "--out", "out", "--dry-run"])


@pytest.mark.parametrize("name", FILES)
def test_report_release_and_eval_take_missing_files(world, name):
    Path(name).unlink(missing_ok=True)
    tried(world, ["report", ROOT])
    tried(world, ["release", ROOT, "--out", "out", "--dry-run"])
    Path(name).mkdir()
    tried(world, ["report", ROOT])
    tried(world, ["release", ROOT, "--out", "out", "--dry-run"])


@pytest.mark.parametrize("name", FILES)
def test_a_run_whose_files_are_damaged_loses_no_student(world, name):
    """It says which file is damaged, or makes it again."""
    path, student = Path(name), Path(STAGE) / "student" / "model.safetensors"
    weights = student.read_bytes()
    for text in TEXTS[::2]:
        path.write_text(text)
        status, message = tried(world, RUN)
        assert student.read_bytes() == weights
        if status == 2:
            other = path.name == "training.yaml" and text.startswith("{")  # a recipe by its shape
            assert ("a run of another recipe" if other else path.name) in message
            assert path.read_text() == text
    if name.endswith(("done.json", "training.yaml")):
        assert status == 2


@pytest.mark.parametrize("text", TEXTS)
def test_a_stage_with_a_damaged_done_json_keeps_its_checkpoints(made, tmp_path, text):
    with world_in(tmp_path / "world", made) as world:
        world.take(made.stopped, "runs")
        world.stage(steps=2, checkpoint={"interval": 1})
        Path("recipe.yaml").write_text(json.dumps(world.raw))
        Path(f"{STAGE}/done.json").write_text(text)
        before = contents(world.folder)
        status, message = tried(world, RUN)
        assert status == 2
        assert "done.json: it is damaged" in message
        assert contents(world.folder) == before


@pytest.mark.parametrize(
    "change",
    [
        *TEXTS,
        {"step": 9},
        {"records_per_step": "4"},
        {"records_per_step": None},
        {"files": {}},
        {"files": []},
        {"files": {"a": 7}},
        {"files": {"../../x": {"bytes": 1, "sha256": "a"}}},
    ],
    ids=str,
)
def test_a_checkpoint_with_a_damaged_state_is_passed_over(made, tmp_path, change):
    with world_in(tmp_path / "world", made) as world:
        world.take(made.stopped, "runs")
        world.stage(steps=2, checkpoint={"interval": 1})
        Path("recipe.yaml").write_text(json.dumps(world.raw))
        path = Path(f"{STAGE}/checkpoints/step-1/state.json")
        state = json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps(state | change))
        assert tried(world, RUN)[0] == 0
        lines = Path(f"{STAGE}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_checkpoint_under_another_steps_name_is_passed_over(made, tmp_path):
    with world_in(tmp_path / "world", made) as world:
        world.take(made.stopped, "runs")
        world.stage(steps=3, checkpoint={"interval": 1})
        Path(f"{STAGE}/checkpoints/step-1").rename(f"{STAGE}/checkpoints/step-2")
        training = Path(f"{ROOT}/training.yaml")
        training.write_text(training.read_text().replace("steps: 2", "steps: 3"))
        Path("recipe.yaml").write_text(json.dumps(world.raw))
        assert tried(world, RUN)[0] == 0
        lines = Path(f"{STAGE}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.parametrize("name", ["manifest.json", "settings.json", "rows-0-0.json"])
def test_a_teachers_cache_with_damaged_files_is_refused_or_made_again(made, tmp_path, name):
    for number, text in enumerate(TEXTS):
        with world_in(tmp_path / str(number), made) as world:
            world.cache()
            Path("recipe.yaml").write_text(json.dumps(world.raw))
            shutil.copytree(made.folder / "caching" / "cache", "cache")
            Path("cache", name).write_text(text)
            if name == "manifest.json":
                status, message = tried(world, RUN)
                assert status == 2
                assert "manifest.json: it cannot be read" in message
            status, message = tried(world, ["cache", "recipe.yaml"])
            assert status == (2 if name == "settings.json" else 0), message
            if status == 0:
                assert tried(world, ["cache", "stats", "cache"])[0] == 0


def test_a_cache_that_names_a_users_file_leaves_it_alone(made, tmp_path):
    with world_in(tmp_path / "world", made) as world:
        world.cache()
        Path("recipe.yaml").write_text(json.dumps(world.raw))
        shutil.copytree(made.folder / "caching" / "cache", "cache")
        Path("thesis.txt").write_text("years of work")
        (shard,) = Path("cache").glob("rows-*.json")
        held = json.loads(shard.read_text())
        shard.write_text(json.dumps({**held, "file": "../thesis.txt"}))
        status, message = run(["cache", "recipe.yaml"], world.patch)
        assert status == 0, message
        assert Path("thesis.txt").read_text() == "years of work"
        (shard,) = Path("cache").glob("rows-*.json")
        assert json.loads(shard.read_text())["sha256"] == held["sha256"]


def test_damaged_weights_of_a_student_are_one_line(made, tmp_path):
    with world_in(tmp_path / "world", made) as world:
        prepare(world)
        shutil.copytree(made.folder / "finished" / "runs", "runs")
        weights = Path(STAGE, "student", "model.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[:8] + b"\x00\x00\x00\xff" + content[12:])
        status, message = run(["report", ROOT], world.patch)
        assert status == 2, message
        assert "model.safetensors: its weights are damaged -- " in message
        assert "\n" not in message
