"""Images from the disk are what the processor makes, and are not decoded again."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mmkd.data import image_cache
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import CheckpointError, DataError, RecipeError
from mmkd.recipe import DataConfig
from tests.support.processors import FAMILIES

SIZES = ((120, 80), (64, 64), (50, 150))


@pytest.fixture
def data(tmp_path):
    rows = []
    for number, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "id": number,
                "images": [f"{number}.png"] * (1 + number % 2),
                "messages": [
                    {"role": "user", "content": "what?"},
                    {"role": "assistant", "content": "two cats"},
                ],
            }
        )
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def encoder(data, family, cached=True):
    kept = str(data / "kept") if cached else None
    config = DataConfig(train=str(data / "data.json"), image_cache=kept)
    return Encoder(Records(config), FAMILIES[family](), config)


def same(mine, theirs):
    assert mine.inputs.keys() == theirs.inputs.keys()
    return all(torch.equal(mine.inputs[k], theirs.inputs[k]) for k in mine.inputs)


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    found = []
    load = image_cache.load_image

    def watched(ref, root):
        found.append(ref)
        return load(ref, root)

    monkeypatch.setattr(image_cache, "load_image", watched)
    return found


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_batches_are_the_same_and_pictures_are_decoded_once(data, family, decoded):
    want = encoder(data, family, cached=False)
    cached = encoder(data, family)
    assert same(cached.encode([0, 1, 2]), want.encode([0, 1, 2]))
    assert len(decoded) == 4
    assert same(encoder(data, family).encode([2, 0, 1]), want.encode([2, 0, 1]))
    assert len(decoded) == 4
    for number in range(3):
        assert cached.load(number).key == want.load(number).key


def test_what_has_changed_or_is_damaged_is_made_again(data, decoded):
    encoder(data, "llava").encode([0, 1, 2])
    files = sorted((data / "kept").rglob("*.safetensors"))
    assert len(files) == 3
    decoded.clear()
    Image.new("RGB", SIZES[1], "red").save(data / "1.png")
    os.utime(data / "1.png", ns=(1, 1))
    for file in files:
        file.write_bytes(file.read_bytes()[:-7])
    got = encoder(data, "llava").encode([0, 1, 2])
    assert same(got, encoder(data, "llava", cached=False).encode([0, 1, 2]))
    assert len(decoded) == 4
    assert not list((data / "kept").rglob("*.partial"))


def test_a_family_whose_pictures_depend_on_each_other_is_refused(data):
    with pytest.raises(RecipeError, match=r"depend on other images of a batch.*leave it out"):
        encoder(data, "smolvlm")


def test_other_settings_have_their_own_pictures(data):
    encoder(data, "llava").encode([0])
    encoder(data, "qwen").encode([0])
    assert len(list((data / "kept").iterdir())) == 2


@pytest.mark.parametrize(
    "ref", [{"bytes": "text", "path": "0.png"}, {"path": "0.png"}, {"a": 1}, 5, "a\0b", "x" * 5000]
)
def test_odd_references_are_what_they_are_without_it(data, ref):
    said = json.loads((data / "data.json").read_text())[0]["messages"]
    (data / "data.json").write_text(json.dumps([{"image": ref, "messages": said}]))
    found = []
    for cached in (False, True):
        try:
            found.append(encoder(data, "llava", cached).encode([0]).ids)
        except DataError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_a_disk_that_takes_no_more_leaves_no_parts(data, monkeypatch):
    def full(arrays, path, *_):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "save_file", full)
    with pytest.raises(CheckpointError, match="No space"):
        encoder(data, "llava").encode([0])
    assert not [f for f in (data / "kept").rglob("*") if f.is_file()]


def test_turned_pictures_come_back_turned(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data / "0.png").convert("RGB").save(data / "0.png", exif=exif)
    want = encoder(data, "qwen", cached=False).encode([0])
    for _ in range(2):
        assert same(encoder(data, "qwen").encode([0]), want)
