"""Whether a made file is up to date, and what a model's answers depend on."""

import os
import shutil

import pytest
import torch
import yaml

from mmkd.errors import CheckpointError
from mmkd.making import make as make_module
from mmkd.making.local import LocalMaker
from mmkd.making.state import SETTINGS, end_writing, entry_facts, folder_of, is_made
from mmkd.recipe import ModelConfig, TeacherConfig, load_recipe

CPU = torch.device("cpu")


@pytest.fixture
def made(recipe, tmp_path, tiny_model_dir):
    """A recipe whose file is noted as made, with records, examples and a teacher of its own."""
    records, shots, teacher = (tmp_path / name for name in ("r.jsonl", "s.jsonl", "teacher"))
    records.write_text("{}")
    shots.write_text("{}")
    shutil.copytree(tiny_model_dir, teacher)
    path = recipe(
        pictures=None, records=str(records), context={"shots": str(shots)},
        top={"teacher": {"model": str(teacher)}},
    )  # fmt: skip
    found = load_recipe(path)
    folder_of(found.make["photos"]).mkdir()
    (tmp_path / "made.jsonl").write_text("{}")
    end_writing(found.make["photos"], entry_facts(found, "photos"), {})
    assert is_made(found, "photos")
    return path


@pytest.mark.parametrize(
    "override",
    ["teacher.model=assets/scenes_teacher", "teacher.dtype=bfloat16", "make.photos.seed=1",
     "teacher.image_size={max_pixels: 9}", "teacher.processor=assets/scenes_teacher"],
)  # fmt: skip
def test_settings_of_entry_and_models(made, override):
    assert not is_made(load_recipe(made, [override]), "photos")


@pytest.mark.parametrize(
    "override",
    ["make.photos.batch_size=3", "teacher.weight=2", "student.model=assets/scenes_teacher"],
)
def test_what_changes_no_answer(made, override):
    assert is_made(load_recipe(made, [override]), "photos")


@pytest.mark.parametrize("file", ["r.jsonl", "s.jsonl", "teacher/model.safetensors"])
def test_files_that_have_changed(made, tmp_path, file):
    os.utime(tmp_path / file, (1, 1))
    assert not is_made(load_recipe(made), "photos")


def test_a_damaged_note(made):
    found = load_recipe(made)
    (folder_of(found.make["photos"]) / SETTINGS).write_text("{")
    assert not is_made(found, "photos")


def test_a_server_is_a_model_too(made):
    raw = yaml.safe_load(made.read_text())
    raw["make"]["photos"]["by"] = "big"
    raw["servers"] = {"big": {"server": "http://localhost:1/v1", "model": "m"}}
    found = load_recipe(raw)
    end_writing(found.make["photos"], entry_facts(found, "photos"), {})
    assert is_made(found, "photos")
    assert is_made(load_recipe(raw, ["servers.big.concurrency=2"]), "photos")
    assert not is_made(load_recipe(raw, ["servers.big.model=n"]), "photos")


def test_a_file_that_could_not_be_written_is_not_made(recipe, monkeypatch):
    """If the second file fails, the first one is that of other settings."""
    path = recipe(checks=[], sampling={"max_new_tokens": 6})
    make_module.make_answers(load_recipe(path), "photos", CPU)
    assert is_made(load_recipe(path), "photos")

    def fail(out, *given):
        raise CheckpointError("cannot write")

    monkeypatch.setattr(make_module, "write_records", fail)
    with pytest.raises(CheckpointError):
        make_module.make_answers(load_recipe(path, ["make.photos.checks=[empty]"]), "photos", CPU)
    assert not is_made(load_recipe(path), "photos")


def test_a_revision_covers_template_processor_and_size(tiny_model_dir, tmp_path):
    def revision(**settings):
        return LocalMaker("a", TeacherConfig(**settings), 1, CPU).revision

    def weights(**settings):
        return LocalMaker("a", ModelConfig(**settings), 1, CPU).weights

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = str(folder)
    plain = revision(model=model)
    assert plain == revision(model=str(tiny_model_dir))  # of a copy
    others = [
        revision(model=model, processor="assets/scenes_teacher"),
        revision(model=model, image_size={"max_pixels": 9}),
        revision(model=model, quantize="4bit"),
    ]
    (folder / "chat_template.jinja").write_text("other")
    others.append(revision(model=model))
    (folder / "notes.json").write_text("{}")
    assert others[-1] == revision(model=model)
    assert len({plain, *others}) == 5
    assert weights(model=model) == weights(model=str(tiny_model_dir), dtype="bfloat16")
