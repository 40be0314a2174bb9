"""Webdataset shards are read without unpacking, and images only from inside of their folder."""

import io
import json
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from mmkd.data import images
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.sources import shards as shards_module
from mmkd.errors import DataError
from mmkd.recipe import DataConfig
from tests.support.layouts import drawn, encoded, put, read, sample, turns, words, write_tar
from tests.support.processors import FAMILIES


@pytest.fixture
def shards(tmp_path):
    """Two tars: five samples with records, and captions as downloaders leave them."""
    write_tar(tmp_path / "s-0.tar", {k: v for n in range(5) for k, v in sample(n).items()})
    two = turns("<image> and <image>?", "two")
    notes = json.dumps({"caption": "a ball", "url": "https://example.org", "width": 48}).encode()
    write_tar(
        tmp_path / "s-1.tar",
        {
            "x.jpg": encoded(7, "JPEG"),
            "x.txt": b"a ball\n",
            "x.json": notes,
            "._x.jpg": b"what a Mac leaves behind",
            "README": b"no extension",
            "y.0.png": encoded(8),
            "y.1.webp": encoded(9, "WEBP"),
            "y.json": json.dumps({"id": "pair", "conversations": two}).encode(),
            "z.v1.json": json.dumps({"other": "extension v1.json"}).encode(),
            "z.json": json.dumps({"conversations": turns("Hm?", "No.")}).encode(),
        },
    )
    return tmp_path


def test_shards_are_read_in_any_order_without_unpacking(shards):
    before = sorted(p.name for p in shards.iterdir())
    records = read(shards / "s-{0..1}.tar")
    assert len(records) == 8
    for index in (4, 0, 7, 2, 6, 5, 1, 3):
        record = records[index]
        pictures = records.pictures(record)
        if index < 5:
            assert (record.id, words(record)[1]) == (f"s{index}", f"ball {index}")
            assert pictures[0].tobytes() == drawn(index).tobytes()
    assert records.where(2) == f"{shards}/s-0.tar: record 2 (id s2)"
    caption, pair, text = (records[i] for i in (5, 6, 7))
    assert words(caption) == ["<image>Describe the image.", "a ball"]
    assert [p.tobytes() for p in records.pictures(pair)[:1]] == [drawn(8).tobytes()]
    assert len(records.pictures(pair)) == 2
    assert (caption.id, pair.id, text.id, text.images) == ("x", "pair", "z", [])
    assert sorted(p.name for p in shards.iterdir()) == before
    asked = Records(DataConfig(sources=[{"train": str(shards / "s-1.tar"), "prompt": "Hm?"}]))
    assert words(asked[0]) == ["<image>Hm?", "a ball"]


def test_pictures_of_a_sample_are_in_the_order_of_their_numbers(tmp_path):
    kinds = {"10.gif": "GIF", "9.bmp": "BMP", "0.tiff": "TIFF", "2.tif": "TIFF", "1.jpeg": "JPEG"}
    members = {f"a.{name}": encoded(3, kind) for name, kind in kinds.items()}
    said = turns("<image>" * 5 + "?", "five")
    members["a.json"] = json.dumps({"conversations": said}).encode()
    records = read(write_tar(tmp_path / "a.tar", members))
    names = [member.name for member in records[0].images]
    assert names == ["a.0.tiff", "a.1.jpeg", "a.2.tif", "a.9.bmp", "a.10.gif"]
    assert {picture.size for picture in records.pictures(records[0])} == {(48, 32)}


def test_pictures_of_shards_are_kept_as_others_are(shards, tmp_path):
    records = read(shards / "s-0.tar")
    plain = DataConfig(train="-")
    kept = DataConfig(train="-", image_cache=str(tmp_path / "kept"))
    wanted = Encoder(records, FAMILIES["llava"](), plain).encode([0, 3])
    for _ in range(2):
        found = Encoder(records, FAMILIES["llava"](), kept).encode([0, 3])
        for name, value in wanted.inputs.items():
            assert torch.equal(found.inputs[name], value), name
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 2
    write_tar(shards / "s-0.tar", {k: v for n in (8, 9) for k, v in sample(n).items()})
    changed = Encoder(read(shards / "s-0.tar"), FAMILIES["llava"](), kept).encode([0, 1])
    assert not torch.equal(changed.inputs["pixel_values"], wanted.inputs["pixel_values"])


def special(tar, kind, name="part/0001.png"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "../../../etc/hostname"
    tar.addfile(info)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_devices_in_shards_are_refused(tmp_path, kind):
    with tarfile.open(write_tar(tmp_path / "a.tar", sample(0)), "a") as tar:
        special(tar, kind)
    with pytest.raises(DataError, match=r"a\.tar: part/0001\.png is not a regular file"):
        read(tmp_path / "a.tar")


def test_a_size_below_nothing_ends_the_reading(tmp_path):
    """It would lead back to its own header, for ever."""
    with tarfile.open(write_tar(tmp_path / "a.tar", sample(0)), "a") as tar:
        info = tarfile.TarInfo("b.json")
        info.pax_headers = {"size": "-1536"}
        tar.addfile(info)
    with pytest.raises(DataError, match=r"a\.tar: damaged at b\.json -- copy or pack it again"):
        read(tmp_path / "a.tar")


def test_headers_of_large_shards_are_not_held(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.txt": b"?" for i in range(3000)})
    tracemalloc.start()
    try:
        assert sum(1 for _ in shards_module._members(str(path))) == 3000
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


def test_names_in_shards_that_lead_elsewhere_name_nothing_on_disk(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    drawn(1).save(tmp_path / "victim.png")
    record = {"conversations": turns("<image>?", "ball")}
    members = {"../victim.png": encoded(2), "../victim.json": json.dumps(record).encode()}
    outside = json.dumps({**record, "image": "../victim.png"}).encode()
    records = read(write_tar(root / "a.tar", {**members, "/b.json": outside}))
    assert records.pictures(records[0])[0].tobytes() == drawn(2).tobytes()
    with pytest.raises(DataError, match="is outside of"):
        records.pictures(records[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "victim.png"]


def test_damaged_shards_are_named(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {k: v for n in range(3) for k, v in sample(n).items()})
    content = whole.read_bytes()
    second = content.index(b"part/0001.json")
    cases = {
        "cut.tar": (
            content[: second + 600],
            r"after part/0001\.json: unexpected end of data -- copy or pack it again",
        ),
        "header.tar": (
            content[: second + 148] + b"garbage!" + content[second + 156 :],
            r"damaged after part/0001\.png",
        ),
        "none.tar": (b"x" * 2000, "cannot read"),
    }
    for name, (broken, message) in cases.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(DataError, match=rf"{name}: .*{message}"):
            read(tmp_path / name)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(whole, "whole")
    with pytest.raises(DataError, match="name tars without compression"):
        read(tmp_path / "packed.tar")


def test_samples_that_are_too_large_or_double_are_bad_records(tmp_path, monkeypatch):
    with tarfile.open(write_tar(tmp_path / "a.tar", sample(0)), "a") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("b.json"))
    records = read(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"record 1: the sample has two files b\.json"):
        records[1]
    monkeypatch.setattr(images, "MEMBER_BYTES", 100)
    with pytest.raises(DataError, match=r"record 0: part/0000\.json has 1\d\d bytes, the limit"):
        records[0]


# images


def test_pictures_stay_inside_of_their_folder(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    put(root, "sub/a.png")
    drawn().save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "inner.png").symlink_to(root / "sub" / "a.png")
    for good in ("sub/a.png", "sub/../sub/a.png", str(root / "sub/a.png"), "inner.png"):
        assert images.load_image(good, root).size == (48, 32)
    for bad in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "folder/secret.png"):
        for read_image in (images.load_image, images.image_size):
            with pytest.raises(DataError, match="is outside of"):
                read_image(bad, root)
    for bad in ("sub", "a\0b", "/dev/null", "gone\n.png"):
        with pytest.raises(DataError) as caught:
            images.load_image(bad, root)
        assert str(caught.value).isprintable()
    with pytest.raises(DataError, match="there is no image folder"):
        images.load_image("sub/a.png", None)


def test_pictures_that_are_none_are_refused(tmp_path, monkeypatch):
    cut = encoded(1)[:-30]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    for content in (b"", b"no image", script, cut):
        with pytest.raises(DataError, match="is not a readable image"):
            images.load_image({"bytes": content, "path": "x.png"}, None)
    assert images.image_size({"bytes": cut}, None) == (48, 32)  # the header is there
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    for read_image in (images.load_image, images.image_size):
        with pytest.raises(DataError, match="is too large to decode"):
            read_image({"bytes": encoded(1)}, None)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_upright(kind):
    """As transformers and `datasets` turn them; their size is known without decoding."""
    for orientation in range(10):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        out = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        drawn(5).save(out, kind, exif=exif, **options)
        with Image.open(out) as plain:
            wanted = ImageOps.exif_transpose(plain).convert("RGB")
        ref = {"bytes": out.getvalue()}
        found = images.load_image(ref, None)
        assert found.tobytes() == wanted.tobytes(), orientation
        assert images.image_size(ref, None) == found.size == wanted.size


def test_damaged_metadata_damage_no_picture():
    out = io.BytesIO()
    drawn(5).save(out, "JPEG", exif=b"Exif\0\0no exif at all")
    assert images.load_image({"bytes": out.getvalue()}, None).size == (48, 32)
    assert images.image_size({"bytes": out.getvalue()}, None) == (48, 32)


def saved(picture, kind):
    out = io.BytesIO()
    picture.save(out, kind)
    return {"bytes": out.getvalue(), "path": "x"}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_levels_of_sixteen_bits_become_levels_of_eight(kind):
    levels = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    found = np.asarray(images.load_image(saved(Image.fromarray(levels), kind), None))
    assert (found == (levels // 256)[..., None]).all()


def test_modes_of_pictures():
    red = drawn(0).convert("RGB")
    for mode in ("RGB", "RGBA", "P", "CMYK", "L", "LA", "1"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        found = images.load_image(saved(red.convert(mode), kind), None)
        assert (found.mode, found.size) == ("RGB", red.size), mode
        assert found.tobytes() == red.convert(mode).convert("RGB").tobytes(), mode
    for mode in ("I", "F"):
        for read_image in (images.load_image, images.image_size):
            for ref in (saved(red.convert(mode), "TIFF"), red.convert(mode)):
                with pytest.raises(DataError, match="numbers of 32 bits for pixels -- store it"):
                    read_image(ref, None)
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        out = io.BytesIO()
        red.save(out, kind, save_all=True, append_images=[drawn(3)])
        with Image.open(out) as moving:
            assert moving.n_frames == 2
            first = moving.convert("RGB").tobytes()
        assert images.load_image({"bytes": out.getvalue()}, None).tobytes() == first


@pytest.mark.parametrize(
    "box", [[0, 0, float("nan"), 1], [0, 0, float("inf"), 1], [5, 0, 1, 1], [0, 1], None, "abcd"]
)
def test_boxes_that_are_none_are_refused(tmp_path, box):
    row = {"conversations": turns("?", "a"), "objects": [{"name": "ball", "box": box}]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match=r"record 0: .*box"):
        read(tmp_path / "a.json")[0]
