"""Words of the objects that image tokens show."""

import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from mmkd.data.encoder import Encoder
from mmkd.data.labels import grid_words, view
from mmkd.data.schema import GroundedObject
from mmkd.recipe import DataConfig
from tests.support.processors import FAMILIES
from tests.support.written_records import TURNS, conversations, records


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    Image.new("L", (24, 40), 9).save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_grid_words_take_the_smallest_box_at_each_centre():
    objects = (GroundedObject("big", (0, 0, 8, 8)), GroundedObject("small", (4, 0, 8, 4)))
    assert grid_words(objects, (0, 0, 16, 16), 4) == [
        *["big", "small", None, None],
        *["big", "big", None, None],
        *[None] * 8,
    ]


@pytest.mark.parametrize("size", [(90, 40), (40, 90), (64, 64), (33, 47)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"height": 48, "width": 40}, "crop_size": {"height": 32, "width": 32}},
        {"do_resize": False, "crop_size": {"height": 64, "width": 32}},
        {"size": {"height": 32, "width": 32}, "do_center_crop": False},
    ],
)
def test_grid_words_are_of_what_a_crop_leaves(size, settings):
    """A picture of stripes, each an object: the word of a cell is the colour that stands there."""
    processor = CLIPImageProcessorPil(resample=0, do_normalize=False, do_rescale=False, **settings)
    picture, objects = Image.new("RGB", size), []
    for i in range(16):
        left, right = round(i * size[0] / 16), round((i + 1) * size[0] / 16)
        for j in range(16):
            top, bottom = round(j * size[1] / 16), round((j + 1) * size[1] / 16)
            picture.paste((10 + 15 * i, 10 + 15 * j, 0), (left, top, right, bottom))
            objects.append(GroundedObject(f"{i} {j}", (left, top, right, bottom)))
    pixels = processor([picture], return_tensors="pt")["pixel_values"][0]  # [3, H, W]
    height, width = pixels.shape[1:]
    words = grid_words(tuple(objects), view(processor, size), 4)
    for cell, word in enumerate(words):
        row, column = (cell // 4 + 0.5) * height / 4, (cell % 4 + 0.5) * width / 4
        red, green, _ = pixels[:, int(row), int(column)].tolist()
        if word is None:  # padded
            assert red == green == 0
        else:
            i, j = map(int, word.split())
            assert abs(i - (red - 10) / 15) <= 1
            assert abs(j - (green - 10) / 15) <= 1


def test_vision_labels_name_what_each_image_token_shows(folder):
    processor = FAMILIES["llava"]()
    objects = [{"name": "cats", "box": [0, 0, 20, 12]}, {"name": "dog", "box": [20, 12, 40, 24]}]
    rows = [
        {"image": "red.png", "conversations": conversations(TURNS[:2]), "objects": objects},
        {"image": "grey.png", "conversations": conversations(TURNS[:2]), "objects": []},
    ]
    encoder = Encoder(records(folder, rows), processor, DataConfig(train="-"), vision_labels=True)
    targets = encoder.encode([0, 1]).targets
    cats, dog = (processor.tokenizer.encode(w)[-1] for w in ("cats", "dog"))
    grid = targets.vision_labels[0][targets.vision[0]].view(4, 4)
    assert (grid[:2, :2] == cats).all()
    assert (grid[2:, 2:] == dog).all()
    assert (grid[:2, 2:] == -100).all()
    background = targets.background[0][targets.vision[0]].view(4, 4)
    assert background.tolist() == (grid == -100).tolist()
    assert (targets.vision_labels[1] == -100).all()
    assert not targets.background[1].any()
    assert (targets.vision_labels[~targets.vision] == -100).all()
    assert targets.end_id == processor.tokenizer.eos_token_id
