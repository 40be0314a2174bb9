"""A run resumes only with the data, images and models with which it started."""

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmkd.runs import inputs, provenance
from mmkd.runtime import hashes
from mmkd.runtime.files import sha256
from tests.support import hub_server
from tests.support.bad_inputs import run, world_in
from tests.support.bad_inputs.table import RECORD, RUN, contents
from tests.support.breaking import broken_off


def train(world, *, until=1, words=RUN):
    """Run a recipe to a step of its last stage; returns exit status and message."""
    last = world.raw["stages"][-1]["name"]
    Path("recipe.yaml").write_text(json.dumps(world.raw))
    with broken_off(lambda stage, number: stage.config.name == last and number > until):
        return run(words, world.patch)
    return None, ""


def losses(folder="runs/tiny/01-mimic"):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="session")
def made(given):
    """A folder with a run that stopped behind a checkpoint: data, images, teacher, student."""
    with world_in(given.folder / "begun", given) as world:
        prepare(world)
        assert train(world) == (None, "")
    return given


def prepare(world):
    world.teach()
    world.raw["data"]["validation"] = "held.json"
    Path("held.json").write_text(Path("records.json").read_text())
    world.stage(steps=2, checkpoint={"interval": 1})


@pytest.fixture
def world(made, tmp_path):
    with world_in(tmp_path / "world", made) as world:
        prepare(world)
        for path in (made.folder / "begun").iterdir():
            if path.is_dir():
                shutil.copytree(path, path.name, dirs_exist_ok=True)
            else:
                shutil.copy2(path, path.name)
        yield world


def shift(path):
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 0.5}, path, metadata={"format": "pt"})


def rewrite(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def twice(path):
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))


def add(path, text):
    path.write_text(path.read_text() + text)


def write_lines(path, answer):
    """The record without its image, as JSONL."""
    record = {k: v for k, v in RECORD.items() if k != "image"}
    record["conversations"] = [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]
    Path(path).write_text(json.dumps(record) + "\n")
    return Path(path)


CHANGES = {
    "an answer": ("records.json", lambda p: rewrite(p, "yes", "no.")),
    "a held-out answer": ("held.json", lambda p: rewrite(p, "yes", "no.")),
    "a record more": ("records.json", twice),
    "an image": ("picture.png", lambda p: Image.new("RGB", (64, 64), "blue").save(p)),
    "an image's name": ("picture.png", lambda p: Image.new("RGB", (32, 32)).save(p, "JPEG")),
    "the student's frozen weights": ("model/model.safetensors", shift),
    "the teacher's weights": ("teacher/model.safetensors", shift),
    "the teacher's settings": ("teacher/config.json", lambda p: rewrite(p, "{", '{"note": 1,')),
    "the student's template": ("model/chat_template.jinja", lambda p: add(p, " ")),
    "a file more": ("model/added_tokens.json", lambda p: p.write_text("{}")),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_changed_inputs_are_refused_and_nothing_is_written(world, what):
    name, change = CHANGES[what]
    path = Path(name)
    before = path.read_bytes() if path.exists() else None
    status = path.stat() if path.exists() else None
    change(path)
    whole = contents(world.folder)
    found = train(world)
    assert found[0] == 2, found
    assert found[1].startswith(f"mmkd: {name}: it ")
    assert "train the stage with the change: `mmkd run RECIPE --from-stage mimic`" in found[1]
    assert "\n" not in found[1]
    assert contents(world.folder) == whole
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
        assert path.stat().st_mtime_ns != status.st_mtime_ns  # its content counts
    assert train(world, until=2)[0] == 0
    assert len(losses()) == 2


def test_a_picture_that_is_gone_is_named(world):
    Path("picture.png").rename("other.png")
    world.raw["data"]["on_bad_record"] = "stop"
    status, message = train(world)
    assert status == 2
    assert "picture.png" in message


def test_with_leave_the_stage_is_trained_again_with_what_is_there_now(world):
    rewrite("records.json", "yes", "no.")
    first = json.loads(Path("runs/tiny/provenance.json").read_text())
    status, message = train(world, until=2, words=[*RUN, "--from-stage", "mimic"])
    assert status == 0, message
    assert Path("runs/tiny/replaced/1/01-mimic/inputs.json").exists()
    found = json.loads(Path("runs/tiny/provenance.json").read_text())
    assert found["replaced"][0]["differs_in"] == ["records.json"]
    assert found["replaced"][0]["provenance"] == first
    assert found["data"]["records.json"] != first["data"]["records.json"]
    rewrite("records.json", "no.", "yes")
    assert train(world, until=2)[0] == 0, "a finished run does not read its data again"


def test_where_the_run_comes_from_is_not_overwritten(world):
    path = Path("runs/tiny/provenance.json")
    first = json.loads(path.read_text())
    world.patch.setenv("WORLD_SIZE", "1")
    world.patch.setattr("mmkd.runs.provenance.processor_name", lambda: "another one")
    assert train(world, until=2)[0] == 0
    found = json.loads(path.read_text())
    assert {key: found[key] for key in first} == first
    (later,) = found["continued"]
    assert later["machine"]["processor"] == "another one"


@pytest.mark.parametrize("stream", [None, 1])
def test_a_folder_that_is_read_as_a_hub_data_set_is_noted(world, datasets_cache, stream):
    shutil.rmtree("runs")
    Path("data").mkdir()
    write_lines("data/train.jsonl", "yes")
    world.raw["data"] = {"sources": [{"train": "hub:data", "stream": stream}]}
    assert train(world) == (None, "")
    write_lines("data/train.jsonl", "no.")
    status, message = train(world)
    assert status == 2
    assert message.startswith("mmkd: data/train.jsonl: it has changed since the run began")
    write_lines("data/train.jsonl", "yes")
    Path("data/.git").mkdir()
    Path("data/.git/index").write_text("not data")
    assert train(world, until=2)[0] == 0


def test_a_picture_in_a_folder_that_is_read_as_a_hub_data_set_is_noted(world, datasets_cache):
    shutil.rmtree("runs")
    Path("data").mkdir()
    Path("data/train.jsonl").write_text(json.dumps(RECORD) + "\n")
    Image.new("RGB", (64, 64), "red").save("data/picture.png")
    Image.new("RGB", (64, 64), "red").save("data/unused.png")
    world.raw["data"] = {"sources": [{"train": "hub:data"}]}
    assert train(world) == (None, "")
    Image.new("RGB", (64, 64), "blue").save("data/unused.png")
    assert train(world, until=1)[0] is None
    Image.new("RGB", (64, 64), "blue").save("data/picture.png")
    status, message = train(world)
    assert status == 2
    assert message.startswith("mmkd: data/picture.png: it has changed since the run began")


def test_files_that_a_folder_of_data_does_not_name_are_not_noted(world):
    shutil.rmtree("runs")
    Path("data").mkdir()
    shutil.copy("records.json", "data/records.json")
    shutil.copy("picture.png", "data/picture.png")
    Path("data/README.md").write_text("first")
    world.raw["data"] = {"train": "data"}
    assert train(world) == (None, "")
    Path("data/README.md").write_text("second")
    assert train(world, until=2)[0] == 0


@pytest.mark.parametrize("stream", [None, 1])
def test_another_commit_of_a_hub_data_set_is_refused(world, datasets_cache, stream):
    hub = world.hub()
    world.patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    world.patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    held = hub.repos["me/data"] = hub_server.Repo(False)
    shutil.rmtree("runs")
    held.files["train.jsonl"] = write_lines("train.jsonl", "yes").read_bytes()
    world.raw["data"] = {"sources": [{"train": "hub:me/data", "stream": stream}]}
    assert train(world) == (None, "")
    first = held.sha
    notes = json.loads(Path("runs/tiny/01-mimic/inputs.json").read_text())
    assert notes["commits"] == {"hub:me/data train": first}
    held.commits += 1
    status, message = train(world)
    assert status == 2
    changed = f"it has changed since the run began with commit {first}"
    assert message.startswith(f"mmkd: hub:me/data train: {changed} ")
    held.commits -= 1
    assert train(world, until=2)[0] == 0


def test_another_plugin_is_named_and_recorded(world, capsys):
    plugin = Path("mine.py")
    shutil.rmtree("runs")
    plugin.write_text("FIRST = 1\n")
    words = [*RUN, "--plugin", "mine.py"]
    assert train(world, words=words) == (None, "")
    plugin.write_text("SECOND = 2\n")
    said = []
    world.patch.setattr(provenance, "say", said.append)
    assert train(world, until=2, words=words)[0] == 0
    assert said == [
        "mine.py: changed since the run began; runs/tiny/provenance.json has both checksums"
    ]
    found = json.loads(Path("runs/tiny/provenance.json").read_text())
    assert found["continued"][0]["plugins"] == {"mine.py": sha256(plugin)}
    assert found["plugins"]["mine.py"] != sha256(plugin)


def test_a_run_that_noted_nothing_goes_on_and_says_so(world):
    Path("runs/tiny/01-mimic/inputs.json").unlink()
    rewrite("records.json", "yes", "no.")
    said = []
    world.patch.setattr(inputs, "say", said.append)
    assert train(world, until=2)[0] == 0
    assert "cannot be checked" in said[0]
    assert "01-mimic" in said[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "null"])
def test_damaged_notes_are_refused(world, text):
    Path("runs/tiny/01-mimic/inputs.json").write_text(text)
    status, message = train(world)
    assert status == 2
    assert "inputs.json: it is damaged" in message


def test_a_stage_that_is_not_begun_reads_what_the_stages_before_read(world):
    shutil.rmtree("runs")
    world.raw["stages"].append({**world.raw["stages"][0], "name": "second"})
    assert train(world, until=0) == (None, "")  # the second stage fails at its first step
    rewrite("records.json", "yes", "no.")
    status, message = train(world)
    assert status == 2
    assert "records.json: it has changed since the run began (stage second)" in message
    kept = Path("runs/tiny/01-mimic/student/model.safetensors").read_bytes()
    assert train(world, until=2, words=[*RUN, "--from-stage", "second"])[0] == 0
    assert Path("runs/tiny/01-mimic/student/model.safetensors").read_bytes() == kept
    assert not Path("runs/tiny/replaced").exists()


def test_a_student_that_is_not_begun_reads_what_the_others_read(world):
    shutil.rmtree("runs")
    world.raw["variants"] = {"slow": ["stages.0.optimizer.lr=1e-5"]}
    Path("recipe.yaml").write_text(json.dumps(world.raw))
    with broken_off(lambda stage, number: "slow" in str(stage.folder)):
        pytest.fail(f"it is not broken off: {run(RUN, world.patch)}")
    shift("teacher/model.safetensors")
    status, message = run(RUN, world.patch)
    assert status == 2
    assert "teacher/model.safetensors: it has changed since the run began" in message


def test_a_file_is_read_whole_once_for_inputs_and_provenance(world):
    shutil.rmtree("runs")
    read = []
    real = hashes.sha256
    world.patch.setattr(hashes, "sha256", lambda path: read.append(str(path)) or real(path))
    hashes.forget()
    assert train(world) == (None, "")
    assert read.count("records.json") == read.count("teacher/model.safetensors") == 1
    hashes.forget()  # as another process, which knows the notes
    read.clear()
    assert train(world, until=2)[0] == 0
    assert "records.json" not in read


def test_a_file_that_is_replaced_under_its_old_time_is_hashed_again(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_text("one")
    before = hashes.file_hash(path)
    other.write_text("two")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    assert hashes.file_hash(path) == sha256(path) != before
