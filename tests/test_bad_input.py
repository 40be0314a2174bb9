"""What a user gets wrong: one line that names it, exit status 2, and nothing on disk."""

import json
import shutil
import sys

import pytest
import yaml
from recipes import tiny_recipe
from safetensors.torch import load_file, save_file

from mmkd.cli import main

RECORD = {
    "id": "r1",
    "image": "picture.png",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def record(**changes):
    return {**RECORD, **changes}


@pytest.fixture
def world(scenes_dir, tiny_model_dir, tmp_path):
    """A folder with a good recipe, records, a picture and a model to spoil."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but not really")
    shutil.copytree(tiny_model_dir, tmp_path / "model")

    class World:
        folder = tmp_path
        model = tmp_path / "model"
        raw = tiny_recipe(scenes_dir, tmp_path / "model", tmp_path / "runs")

        def records(self, *rows):
            path = tmp_path / "records.json"
            path.write_text(json.dumps(list(rows)))
            self.raw["data"] = {"train": str(path)}

        def stage(self, **changes):
            self.raw["stages"][0].update(changes)

    return World()


def run(world, capsys, monkeypatch, *overrides):
    path = world.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(world.raw))
    monkeypatch.setattr(sys, "argv", ["mmkd", "run", str(path), *overrides])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().err.strip()


def unknown_key(world):
    world.raw["optimiser"] = {}


def wrong_type(world):
    world.stage(steps="many")


def missing_file(world):
    world.raw["data"] = {"train": str(world.folder / "none.json")}


def no_image(world):
    world.records({k: v for k, v in RECORD.items() if k != "image"})


def missing_image(world):
    world.records(record(image="gone.png"))


def broken_image(world):
    world.records(record(image="broken.png"))


def image_outside(world):
    world.records(record(image="../picture.png"))


def more_images_than_placeholders(world):
    world.records({**record(images=["picture.png", "picture.png"]), "image": None})


def no_response(world):
    world.records(record(conversations=RECORD["conversations"][:1]))


def empty_data(world):
    world.records()


def another_vocabulary(world):
    teacher = world.folder / "teacher"
    shutil.copytree(world.model, teacher)
    for path in (teacher / "tokenizer.json", teacher / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    world.raw["teacher"] = {"model": str(teacher)}
    world.stage(objectives=[{"kind": "kl"}])


def no_teacher(world):
    world.stage(objectives=[{"kind": "kl"}])


def not_a_student(world):
    shutil.rmtree(world.model)
    world.model.mkdir()


def no_such_student(world):
    world.raw["student"] = {"model": str(world.folder / "nowhere")}


def truncated_weights(world):
    path = world.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def truncated_weights_to_convert(world):
    world.raw["student"]["convert"] = [{"kind": "mamba", "layers": [1]}]
    truncated_weights(world)


def a_lost_tensor(world):
    path = world.model / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(n for n in tensors if n.endswith("mlp.down_proj.weight")))
    save_file(tensors, path, metadata={"format": "pt"})


def no_processor(world):
    for path in world.model.glob("*"):
        if path.name not in ("config.json", "model.safetensors", "generation_config.json"):
            path.unlink()


def unknown_group(world):
    world.stage(train=["visoin"])


def impossible_layers(world):
    world.raw["student"]["convert"] = [{"kind": "layers", "decoder": [7]}]


def unknown_architecture(world):
    world.raw["student"] = {"config": {"model_type": "lava"}, "processor": str(world.model)}


def images_longer_than_a_sequence(world):
    world.raw["data"]["max_length"] = 20


CASES = [
    (unknown_key, ["optimiser", "unknown key"]),
    (wrong_type, ["stages.0.steps", "integer"]),
    (missing_file, ["none.json", "no such data file"]),
    (no_image, ["record 0 (id r1)", "1 image placeholder(s) but 0 image(s)"]),
    (missing_image, ["record 0 (id r1)", "no such image: gone.png"]),
    (broken_image, ["record 0 (id r1)", "broken.png is not a readable image"]),
    (image_outside, ["record 0 (id r1)", "lies outside of"]),
    (more_images_than_placeholders, ["record 0 (id r1)", "1 image placeholder(s) but 2 image(s)"]),
    (no_response, ["record 0 (id r1)", "no response of the assistant"]),
    (empty_data, ["records.json", "empty"]),
    (another_vocabulary, ["the vocabularies differ", "<|user|>", "<|human|>"]),
    (no_teacher, ["stage mimic", "objective kl needs a teacher"]),
    (not_a_student, ["model", "holds no"]),
    (no_such_student, ["nowhere", "no such model folder"]),
    (truncated_weights, ["model", "cannot load the model"]),
    (truncated_weights_to_convert, ["model", "cannot load the model"]),
    (a_lost_tensor, ["model", "1 weights are missing", "mlp.down_proj"]),
    (no_processor, ["model", "processor"]),
    (unknown_group, ["unknown group 'visoin'", "did you mean 'vision'?"]),
    (impossible_layers, ["student.convert", "cannot keep layers [7]"]),
    (unknown_architecture, ["lava", "no such architecture"]),
    (images_longer_than_a_sequence, ["max_length 20"]),
]


@pytest.mark.parametrize(("spoil", "parts"), CASES, ids=[c[0].__name__ for c in CASES])
def test_bad_input_is_one_line_and_leaves_nothing(world, capsys, monkeypatch, spoil, parts):
    spoil(world)
    code, message = run(world, capsys, monkeypatch)
    assert code == 2
    assert message.startswith("mmkd: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert not (world.folder / "runs").exists()


def test_a_mended_recipe_runs_in_the_same_place(world, capsys, monkeypatch):
    broken_image(world)
    assert run(world, capsys, monkeypatch)[0] == 2
    world.records(RECORD)
    world.stage(steps=1)
    path = world.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(world.raw))
    monkeypatch.setattr(sys, "argv", ["mmkd", "run", str(path)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    assert (world.folder / "runs" / "tiny" / "01-mimic" / "student" / "config.json").exists()
