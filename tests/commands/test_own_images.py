"""examples/own_images.py: a folder of images becomes data, a recipe and a student."""

import importlib
import json

import pytest
from PIL import Image, ImageDraw

from mmkd.errors import DataError
from mmkd.recipe import load_recipe
from tests.support.pages import ROOT


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "my photos"
    (folder / "trip").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "trip/c.png", "trip/d.webp")):
        picture = Image.new("RGB", (50 + 9 * i, 64), (60 * i, 90, 200))
        ImageDraw.Draw(picture).ellipse((8, 8, 40, 40), fill="yellow")
        picture.save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture
def distil(photos, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = importlib.import_module("own_images")

    def run(held_out):
        model = str(tiny_model_dir)
        example.main(photos, model, model, tmp_path / "out", example.PROMPTS, held_out, 4)
        return example.PROMPTS

    return run


def test_a_folder_of_pictures_trains_a_student(distil, tmp_path, capfd):
    prompts = distil(held_out=1)
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    said = {(*row["images"], row["messages"][0]["content"][1]["text"]) for row in rows}
    assert 0 < len(said) == len(rows)  # what the tiny model leaves unanswered is no record
    assert said <= {(name, p) for name in ("a.png", "b.jpg", "trip/c.png") for p in prompts}
    assert all(row["messages"][1]["content"][0]["text"] for row in rows)
    recipe = load_recipe(out / "recipe.yaml")
    assert [o.kind for o in recipe.stages[0].objectives] == ["ce", "kl", "kl"]
    (line,) = (out / "photos" / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["ce"] > 0
    printed = capfd.readouterr().out
    assert "left out: broken.jpg is not a readable image" in printed
    answers = printed.partition(f"trip/d.webp: {prompts[0]}\n")[2].splitlines()
    assert [line.split(":")[0].strip() for line in answers] == ["teacher", "student"]


def test_too_few_pictures_are_refused(distil, tmp_path):
    with pytest.raises(DataError, match="my photos: 5 images -- add some"):
        distil(held_out=5)
    assert not (tmp_path / "out").exists()
