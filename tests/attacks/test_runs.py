"""Commands that are interrupted by a kill, a signal, a full disk or another command."""

import json
import os
import resource
import signal

import pytest
import torch

from mmkd.cache import StoreWriter
from mmkd.errors import CheckpointError
from mmkd.runs import pipeline
from mmkd.runtime import files
from mmkd.runtime.files import locked, locked_file, write_folder, write_text
from mmkd.runtime.steplog import StepLog, read_lines
from tests.support.bad_inputs import run, world_in
from tests.support.bad_inputs.table import RUN

LINES = [{"step": n, "loss": n / 7} for n in (1, 2, 3)]
TEXT = "".join(json.dumps(line) + "\n" for line in LINES)


@pytest.fixture
def world(given, tmp_path):
    with world_in(tmp_path / "world", given) as made:
        yield made


def write_recipe(world):
    (world.folder / "recipe.yaml").write_text(json.dumps(world.raw))


# Step logs


@pytest.mark.parametrize("cut", range(1, len(TEXT)))
def test_a_log_that_is_cut_anywhere_keeps_its_whole_lines_and_goes_on(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT[:cut])
    whole = [line for line in LINES if TEXT[:cut].count(json.dumps(line))]
    log = StepLog(path, 3)
    assert log.found == whole
    assert log.missing(3) == [n for n in (1, 2, 3) if n > len(whole)]
    log.write({"step": 4})
    assert read_lines(path) == [*whole, {"step": 4}]
    assert path.read_text().count("\n") == len(whole) + 1


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(LINES[0]) + json.dumps(LINES[1]) + "\n" + json.dumps(LINES[2]),
        TEXT + "\0" * 64,
        "\0" * 7 + TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT + "[1]\n7\nnull\n" + '{"step": "4"}\n{"step": true}\n{"step": null}\n{"loss": 1}\n',
        TEXT + '{"step": -1}\n{"step": NaN}\n{"step": Infinity}\n' + "[" * 100_000 + "\n",
    ],
)
def test_lines_beside_or_within_others_are_told_apart(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert StepLog(path, 3).found == LINES
    assert path.read_text() == TEXT


@pytest.mark.parametrize("loss", ['"lossq": 1.0', '"loss": null', '"loss": "1.0"', '"loss": true'])
def test_lines_without_their_number_are_lost(tmp_path, loss, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT.replace("\n", '\n{"step": 9}\n', 1) + '{"step": 4, ' + loss + "}\n")
    log = StepLog(path, 4, key="loss")
    assert log.found == LINES
    assert log.missing(4) == [4]
    log.say_missing(4)
    assert "the lines of 1 steps are lost (4); training goes on" in capsys.readouterr().out
    assert log.missing(4, every=2) == [4]
    assert path.read_text() == TEXT


def test_a_log_of_bytes_that_are_no_text_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\x80\n" + TEXT.encode())
    assert StepLog(path, 3).found == LINES


def test_a_line_that_the_disk_takes_half_of_is_taken_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(TEXT)
    log = StepLog(path, 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(TEXT) + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            log.write({"step": 4, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == TEXT


# A full disk


def no_space(*words, **settings):
    raise OSError(28, "No space left on device")


def test_a_full_disk_under_a_file_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file", ["rows", "head", "manifest", "settings"])
def test_a_full_disk_under_a_teachers_cache_is_one_line(world, file):
    world.cache()
    if file == "head":
        world.raw["teacher"]["cache"]["hidden"] = True
        world.stage(objectives=[{"kind": "relation"}])
    write_recipe(world)
    real_sync, real_fsync = files.sync_file, files.os.fsync

    def sync(path):
        if path.name.removeprefix(".").startswith(file):
            no_space()
        real_sync(path)

    def fsync(handle):
        name = os.readlink(f"/proc/self/fd/{handle}").split("/")[-1]
        if name.removeprefix(".").startswith(file):
            no_space()
        real_fsync(handle)

    world.patch.setattr(files, "sync_file", sync)
    world.patch.setattr(files.os, "fsync", fsync)
    status, message = run(["cache", "recipe.yaml"], world.patch)
    assert status == 2, message
    assert "No space left on device" in message
    assert "free space and run" in message
    assert message.count("\n") == 0
    assert not list(world.folder.rglob("*.partial"))
    world.patch.setattr(files, "sync_file", real_sync)
    world.patch.setattr(files.os, "fsync", real_fsync)
    assert run(["cache", "recipe.yaml"], world.patch)[0] == 0


# Two commands in one place

BUSY = "another command is writing there -- wait for it to end, or stop it"


def test_two_that_write_one_folder_do_not_meet(tmp_path):
    def inner(folder):
        with pytest.raises(CheckpointError, match="new: another command is writing there"):
            write_folder(tmp_path / "new", lambda folder: None)
        (folder / "a").write_text("first")

    write_folder(tmp_path / "new", inner)
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "a"]
    write_folder(tmp_path / "new", lambda folder: (folder / "b").write_text("second") and None)
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "b"]


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_a_folder_that_is_not_finished_is_gone(tmp_path, error):
    def write(folder):
        (folder / "a").write_text("half")
        raise error

    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write_folder(tmp_path / "above" / "new", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["run", "cache", "convert", "release", "eval", "data build"])
def test_a_second_command_in_one_folder_is_refused(world, command):
    """The first one holds the lock that the second one asks for; nothing is changed."""
    if command == "release":
        world.take(world.given.trained, "runs")
    if command == "cache":
        world.cache()
    write_recipe(world)
    words = {
        "run": RUN,
        "cache": ["cache", "recipe.yaml"],
        "convert": ["convert", "model", "--out", "out", "--keep-attention", "none"],
        "release": ["release", "runs/tiny", "--out", "out"],
        "eval": ["eval", "model", "--tasks", "scenes_vqa", "--out", "out"],
        "data build": ["data", "build", "scenes", "--out", "out", "--train", "1"],
    }[command]
    folder = {"run": "runs/tiny", "cache": "cache", "eval": "out"}.get(command, ".out.mmkd.partial")
    with locked(world.folder / folder):
        before = sorted(world.folder.rglob("*"))
        status, message = run(words, world.patch)
        assert (status, message.endswith(BUSY)) == (2, True), message
        assert sorted(world.folder.rglob("*")) == before


def test_a_file_is_locked_too_and_may_be_deleted(tmp_path):
    path = tmp_path / "answers.jsonl"
    busy = pytest.raises(CheckpointError, match="another command")
    with locked_file(path), busy, locked_file(path):
        pass
    with locked_file(path):
        path.unlink()
    assert not path.exists()


# A stop


def signalled(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def swallowing(*words, **settings):
    try:
        signalled()
    except BaseException:
        return None


def turning(*words, **settings):
    try:
        signalled()
    except BaseException as error:
        raise OSError("no such file") from error


class Callback:
    """Python passes over what is raised in `__del__`, as in a callback of an import."""

    def __del__(self):
        signalled()


def in_callback(*words, **settings):
    made = Callback()
    del made
    for _ in range(1000):
        signal.sigtimedwait([], 0.01)


@pytest.mark.parametrize("how", [swallowing, turning, in_callback])
@pytest.mark.parametrize("place", ["processor", "skeleton", "model", "evaluation"])
def test_a_stop_that_a_library_swallows_or_turns_into_its_own_error(world, capsys, place, how):
    from mmkd.modeling import loading
    from mmkd.students import check
    from mmkd.training import build

    owner, name = {
        "processor": (loading.AutoProcessor, "from_pretrained"),
        "skeleton": (check, "check_supported"),
        "model": (build, "set_trainable"),
        "evaluation": (pipeline, "evaluate"),
    }[place]
    real = getattr(owner, name)

    def before(*words, **settings):
        how()
        return real(*words, **settings)

    world.raw["evaluate"] = {"samples": {"records": "records.json", "count": 1}}
    world.patch.setattr(owner, name, before)
    write_recipe(world)
    status, message = run(RUN, world.patch)
    assert (status, message) == (0, "")
    assert not (world.folder / "runs/tiny/evaluation").exists()
    if how is not swallowing:
        return
    world.patch.setattr(owner, name, real)
    assert run(RUN, world.patch)[0] == 0
    assert (world.folder / "runs/tiny/evaluation/student/answers.json").exists()


# Nothing to learn from


def test_a_run_without_a_token_to_learn_from_is_refused(world):
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    world.records({"id": "r1", "conversations": turns})
    world.teach({"kind": "kl", "region": "vision"})
    world.stage(steps=3)
    write_recipe(world)
    status, message = run(RUN, world.patch)
    assert status == 2
    assert "stage mimic: no objective covers a token in 3 steps in a row" in message
    assert not (world.folder / "runs/tiny/01-mimic/done.json").exists()


def test_stored_rows_are_whole_or_not_there(tmp_path, monkeypatch):
    settings = {"vocabulary": 8, "k": 2}
    writer = StoreWriter(tmp_path, settings, 0)
    rows = writer.codec.encode(
        torch.tensor([[1, 2]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([0.1])
    )
    writer.add(b"k" * 16, rows)
    monkeypatch.setattr(files, "sync_file", no_space)
    with pytest.raises(CheckpointError, match=r"rows-0-0\.safetensors: cannot write"):
        writer.flush()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["settings.json"]
