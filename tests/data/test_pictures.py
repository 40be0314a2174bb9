"""Images are decoded in the same way everywhere, and their resized size is limited."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor

from mmkd.data.bounds import MOST_PIXELS, check_scaled, scaled_edge
from mmkd.data.check import Look, check_source
from mmkd.data.encoder import Encoder
from mmkd.data.images import image_content, load_image, picture_as_rgb, with_eight_bits
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.evaluation.adapter import MmkdModel, split_images
from mmkd.evaluation.scenes import images as scene_images
from mmkd.recipe import DataConfig, SourceConfig
from mmkd.report.samples import _data_uri
from tests.support.layouts import turns
from tests.support.processors import FAMILIES

DEPTH = np.linspace(0, 65_535, 64 * 48).reshape(48, 64).astype(np.uint16)


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(DEPTH).save(tmp_path / "deep.png")
    turned = Image.effect_noise((60, 40), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    return tmp_path


def opened(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


@pytest.mark.parametrize("name", ["deep.png", "turned.png"])
def test_everything_opens_a_picture_as_training_does(folder, name):
    wanted = np.asarray(load_image(name, folder))
    assert wanted.std() > 20, "neither white nor black"
    rows = [{"image": name, "conversations": turns("<image>?", "yes")}]
    (folder / "a.json").write_text(json.dumps(rows))
    records = Records(DataConfig(train=str(folder / "a.json")))
    # Made records store the files of images, evaluation and report read those of benchmarks.
    content = image_content(name, folder)
    stored = load_image({"bytes": content, "path": None}, None)
    said = [{"role": "user", "content": [{"type": "image", "url": opened(folder / name)}]}]
    named = [{"role": "user", "content": [{"type": "image", "url": str(folder / name)}]}]
    (asked,), (by_path,) = (split_images(turns_, "task")[1] for turns_ in (said, named))
    (scene,) = scene_images({"image": opened(folder / name)})
    for found in (records.pictures(records[0])[0], stored, asked, by_path, scene):
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), wanted)
    for source in ({"path": str(folder / name)}, {"bytes": (folder / name).read_bytes()}):
        shown = _data_uri(source, folder).partition(",")[2]
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
        assert np.array_equal(found, wanted)


def test_what_a_benchmark_converts_itself_is_not_clipped(folder):
    """lmms-eval's tasks call `convert("RGB")` on their documents' images."""
    doc = {"image": opened(folder / "deep.png"), "more": [opened(folder / "deep.png")], "id": 3}
    assert np.asarray(doc["image"].convert("RGB")).mean() > 250, "Pillow clips"
    found = with_eight_bits(doc)
    wanted = np.asarray(load_image("deep.png", folder))
    for picture in (found["image"], *found["more"]):
        assert np.array_equal(np.asarray(picture.convert("RGB")), wanted)
    other = Image.new("P", (4, 4))
    assert with_eight_bits({"image": other})["image"] is other
    with pytest.raises(DataError, match="numbers of 32 bits"):
        with_eight_bits({"image": Image.new("F", (4, 4))})
    with pytest.raises(DataError, match="numbers of 32 bits"):
        picture_as_rgb(Image.new("I", (4, 4)))


# What processors make of long and narrow images


def clip_llava(edge=336):
    """LLaVA-1.5's: scales the shorter edge and cuts out the middle."""
    base = FAMILIES["llava"]()
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": edge}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=base.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=base.chat_template,
    )


class NeverCalledError(Exception):
    pass


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A good record and two of images that fit into 145 bytes; resizing them fails the test."""
    rows = []
    for name, size in {"wide": (10_000, 2), "good": (64, 48), "high": (2, 10_000)}.items():
        Image.new("1", size).save(tmp_path / f"{name}.png")
        said = turns("<image>?", "yes")
        rows.append({"id": name, "image": f"{name}.png", "conversations": said})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    resize = CLIPImageProcessorPil.resize

    def bounded(self, image, *args, **kwargs):
        if max(image.shape) > 1000 and kwargs["size"].shortest_edge:
            raise NeverCalledError
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(CLIPImageProcessorPil, "resize", bounded)
    return tmp_path


def test_a_picture_that_a_processor_would_blow_up_is_refused(narrow):
    processor = clip_llava()
    message = r"record 0 \(id wide\): the processor would resize an image of 10000 x 2 to 564"
    for pack in (None, 200):
        config = DataConfig(train=str(narrow / "a.json"))
        encoder = Encoder(Records(config), processor, config, pack=pack)
        with pytest.raises(DataError, match=message):
            encoder.encode([0, 1])
        assert encoder.length(0) == 0
        skipping = DataConfig(train=str(narrow / "a.json"), on_bad_record="skip")
        batch = Encoder(Records(skipping), processor, skipping, pack=pack).encode([0, 1])
        assert batch.ids == ["good", "good"]
    kept = DataConfig(train=str(narrow / "a.json"), image_cache=str(narrow / "kept"))
    with pytest.raises(DataError, match=message):
        Encoder(Records(kept), processor, kept).encode([0, 1])
    other = Encoder(Records(config), FAMILIES["llava"](), config, teacher_processor=processor)
    with pytest.raises(DataError, match=r"record 0 \(id wide\), for the teacher: the processor"):
        other.encode([0])


@pytest.mark.parametrize("decode", [False, True])
def test_the_check_of_a_recipe_finds_them(narrow, decode):
    edge = scaled_edge(clip_llava())
    found = check_source(SourceConfig(train=str(narrow / "a.json")), Look(decode, edges=(edge,)), 1)
    (problem,) = found.problems.values()
    assert (found.bad, problem.records) == (2, 2)
    assert "record 0 (id wide): the processor would resize" in problem.places[0]


def test_an_evaluation_names_the_document(narrow, tiny_model_dir):
    adapter = MmkdModel(str(tiny_model_dir), device="cpu")
    adapter.processor = clip_llava()

    class Asked:
        task, split, doc_id, index = "narrow", "test", 0, 0

        @staticmethod
        def to_messages(doc):
            part = {"type": "image", "url": doc["image"]}
            return [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]

    docs = [{"image": opened(narrow / f"{name}.png")} for name in ("wide", "good")]
    adapter.task_dict = {"narrow": {"test": docs}}
    message = "narrow document 0: the processor would resize .* to 564,480,000"
    with pytest.raises(DataError, match=message):
        adapter._prompt(Asked)
    Asked.doc_id = 1
    assert adapter._prompt(Asked).images[0].size == (64, 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_scaled_shorter_edge_is_unbounded(family):
    """Of the other families' processors none may make more of a narrow image than of a square."""
    processor = FAMILIES[family]()
    assert scaled_edge(processor) is None
    check_scaled((10_000, 2), None)
    blank = Image.new("RGB", (10_000, 2))
    if family == "qwen":
        with pytest.raises(ValueError, match="aspect ratio"):
            processor.image_processor([blank], return_tensors="pt")
        return
    values = processor.image_processor([blank], return_tensors="pt")["pixel_values"]
    assert torch.as_tensor(values).numel() < 2**20


def test_the_bound():
    assert scaled_edge(clip_llava(224)) == 224
    check_scaled((600, 1), 224)
    check_scaled((1, 600), 224)
    check_scaled((9_000, 9_000), 336)
    with pytest.raises(DataError, match=f"an image of 1 x 700 to {224 * 224 * 700:,} pixels"):
        check_scaled((1, 700), 224)
    assert 224 * 224 * 600 < MOST_PIXELS < 224 * 224 * 700
