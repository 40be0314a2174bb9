"""Pairs of a chosen and a rejected answer, in every schema that is read."""

import json

import pytest
import torch
from PIL import Image

from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.recipe import DataConfig
from tests.support.processors import llava, qwen


def said(text):
    return {"from": "gpt", "value": text}


ASKED = {"from": "human", "value": "<image>\nTwo cats?"}


SCHEMAS = {
    "llava": {"id": "a", "image": "red.png", "chosen": [ASKED, said("a dog")],
              "rejected": [ASKED, said("two cats")]},
    "trl": {"images": ["red.png"], "prompt": [{"role": "user", "content": "Two cats?"}],
            "chosen": [{"role": "assistant", "content": "a dog"}],
            "rejected": [{"role": "assistant", "content": "two cats"}]},
    "trl text": {"images": ["red.png"], "prompt": "Two cats?", "chosen": "a dog",
                 "rejected": "two cats"},
    "rlaif-v": {"image": "red.png", "question": "Two cats?", "chosen": "a dog",
                "rejected": "two cats", "origin_dataset": "x", "idx": 3},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    return tmp_path


def encoder(folder, row, processor=None, **settings):
    path = folder / "pairs.json"
    path.write_text(json.dumps([row]))
    config = DataConfig(train=str(path))
    return Encoder(Records(config), processor or llava(), config, **settings)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("family", [llava, qwen])
def test_every_schema_gives_the_same_pair(folder, name, family):
    processor = family()
    batch = encoder(folder, SCHEMAS[name], processor, pairs=True).encode([0])
    targets = batch.targets
    assert targets.rejected.tolist() == [False, True]
    texts = [
        processor.tokenizer.decode(ids[mask])
        for ids, mask in zip(targets.input_ids, targets.response, strict=True)
    ]
    assert texts[0].strip().startswith("a dog")
    assert texts[1].strip().startswith("two cats")
    assert targets.vision.sum(1)[0] == targets.vision.sum(1)[1] > 0
    # without a preference objective the chosen answer is an ordinary response
    alone = encoder(folder, SCHEMAS[name], processor).encode([0]).targets
    assert alone.rejected is None
    assert torch.equal(alone.input_ids[0][alone.response[0]],
                       targets.input_ids[0][targets.response[0]])  # fmt: skip


def test_earlier_answers_are_prompt(folder):
    turns = [ASKED, said("hat"), {"from": "human", "value": "And?"}]
    row = {"image": "red.png", "chosen": [*turns, said("dog")], "rejected": [*turns, said("cats")]}
    targets = encoder(folder, row, pairs=True).encode([0]).targets
    text = llava().tokenizer.decode(targets.input_ids[0][targets.response[0]])
    assert text.strip().startswith("dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": [{"from": "human", "value": "<image>\nHat?"}, said("x")]},
         "have different prompts"),
        ({"rejected": SCHEMAS["llava"]["chosen"]}, "are the same"),
        ({"rejected": None}, "neither 'conversations' nor 'messages'"),
        ({"rejected": [ASKED, said("  ")]}, "no response of the assistant"),
        ({"image": None}, "1 image placeholder"),
        ({"chosen": None, "rejected": None, "conversations": [ASKED, said("x")]},
         "the record has no rejected answer"),
    ],
)  # fmt: skip
def test_bad_pairs_name_file_record_and_mend(folder, change, message):
    with pytest.raises(DataError, match=message) as caught:
        encoder(folder, {**SCHEMAS["llava"], **change}, pairs=True).encode([0])
    assert "pairs.json: record 0 (id a)" in str(caught.value)
    assert "\n" not in str(caught.value)
